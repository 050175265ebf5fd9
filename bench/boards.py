"""The virtual Pi's boots."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.clock import alternating, median, seconds, spread
from bench.figures import Place, Reading
from bench.tools import built_image, need, run
from factory.bench import Bench, Image
from factory.boot import BOOT_SECONDS
from factory.drivers.virtual import open_bench
from factory.flash import flash
from factory.record import NoWatcher, Step
from firmware_agent.wire import parse_banner
from image import initramfs
from image.manifest import ImageManifest

ROUNDS = 3
TOOLS = ("qemu-system-aarch64", "swtpm", "fdtput", "mcopy", "setpriv")

_READY = "bench: the root file system is up"
_START = "switch_root /root /sbin/init"
_MINIMAL_START = f"switch_root /root /bin/sh -c 'echo {_READY} >/dev/console; while :; do sleep 60; done'"


class NoBootError(Exception):
    """The board did not say what it was to say."""


def to_banner(place: Place) -> Reading:
    """Power-on to the factory banner, each time from a medium that was just flashed, as on the line.

    The peer has the same kernel, initramfs and root file system, and in the place of systemd a shell that prints a
    line: nothing that runs on this image can be ready sooner.
    """
    need(*TOOLS)
    image, manifest, _ = built_image(place.image)

    def ours() -> float:
        place.say("boot to the banner")
        with _blank_board(place.scratch / "ours", place.scratch / "no-key", image) as bench:
            return _boot(bench, lambda line: parse_banner(line) is not None)

    def peer() -> float:
        place.say("boot to a minimal init")
        board = place.scratch / "peer"
        with _blank_board(board, place.scratch / "no-key", image) as bench:
            _replace_init(board / "medium.img", manifest, place.scratch)
            return _boot(bench, lambda line: _READY in line)

    mine, theirs = alternating(ROUNDS, ours, peer)
    note = f"{spread(mine)} against {spread(theirs)} in {ROUNDS} rounds"
    return Reading(median(mine), median(theirs), note)


def boot_twice(folder: Path, key: Path, image: Image) -> tuple[float, float]:
    """Flash a board and boot it to its banner, then cut the power and do it again."""
    with _blank_board(folder, key, image) as bench:
        first = _boot(bench, lambda line: parse_banner(line) is not None)
        bench.power.off()
        return first, _boot(bench, lambda line: parse_banner(line) is not None)


@contextmanager
def _blank_board(folder: Path, key: Path, image: Image) -> Iterator[Bench]:
    with open_bench(folder, key, {}) as bench:
        flash(bench.storage, image, Step("flash", NoWatcher()))
        yield bench


def _boot(bench: Bench, done: Callable[[str], bool]) -> float:
    """Seconds from power-on until the console says what is waited for.

    Raises:
        NoBootError: it never does.
    """

    def boot() -> None:
        bench.power.on()
        last = ""
        for line in bench.console.lines(BOOT_SECONDS):
            if done(line):
                return
            last = line.strip() or last
        raise NoBootError(f"{bench.name} did not boot in {BOOT_SECONDS:.0f} s; its console ended with {last!r}")

    return seconds(boot)


def _replace_init(medium: Path, manifest: ImageManifest, scratch: Path) -> None:
    """Let the initramfs of a medium start a line of shell in the place of systemd.

    The kernel unpacks one archive behind the other, and the last /init is the one that counts.
    """
    script = initramfs.INIT.read_text()
    if script.count(_START) != 1:
        raise NoBootError(f"image/init has no line {_START} any more")
    init = initramfs.file("init", script.replace(_START, _MINIMAL_START).encode(), executable=True)
    boot = next(part for part in manifest.partitions if part.label == "PICKETBOOT")
    place, archive = f"{medium}@@{boot.start}", scratch / "initrd.img"
    run("mcopy", "-n", "-o", "-i", place, "::initrd.img", archive)
    with archive.open("ab") as appended:
        appended.write(gzip.compress(initramfs.cpio([init])))
    run("mcopy", "-n", "-o", "-i", place, archive, "::initrd.img")
