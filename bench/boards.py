"""The virtual Pi's boots."""

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
from image.manifest import ImageManifest

ROUNDS = 3
TOOLS = ("qemu-system-aarch64", "swtpm", "fdtput", "mcopy", "setpriv")

_READY = "bench: the root file system is up"
_MINIMAL_INIT = f"#!/bin/sh\necho '{_READY}' >/dev/console\nwhile :; do sleep 60; done\n"


class NoBootError(Exception):
    """The board did not say what it was to say."""


def to_banner(place: Place) -> Reading:
    """Power-on to the factory banner, each time from a medium that was just flashed, as on the line.

    The peer has the same kernel, initramfs and root file system, and in the place of systemd a shell script that prints
    a line: nothing that runs on this image can be ready sooner.
    """
    need(*TOOLS, "debugfs")
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
    """Put a minimal init into the root file system of a medium, without mounting it."""
    root = next(part for part in manifest.partitions if part.type == "ext4")
    init, orders = scratch / "init", scratch / "orders"
    init.write_text(_MINIMAL_INIT)
    orders.write_text(f"rm /usr/sbin/init\nwrite {init} /usr/sbin/init\nset_inode_field /usr/sbin/init mode 0100755\n")
    run("debugfs", "-w", "-f", orders, f"{medium}?offset={root.start}")
