"""Flash and read back against `dd`: the same mapped bytes, the same medium, in turn.

The peer is given the best of it: it writes one dense file that holds the mapped bytes and nothing else, and checks
nothing. Both forget what the medium held before (`dd` by cutting the file off, on a device by `blkdiscard`), both read
the image from the page cache, and both read back from the medium itself.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.clock import alternating, median, seconds, spread
from bench.figures import NotMeasuredError, Place, Reading
from bench.tools import ProgramFailedError, built_image, need, need_root, run
from factory.bench import Image, Storage
from factory.drivers.blockdev import BlockStorage
from factory.drivers.media import FileStorage
from factory.flash import flash
from factory.record import NoWatcher, Step
from image.bmap import Bmap

ROUNDS = 9
#: The smallest medium that the product is sold with.
MEDIUM_BYTES = 4 * 2**30

_BLOCK = "bs=4M"


def to_file(place: Place) -> Reading:
    """On a file, through the page cache: how the virtual Pi's medium is written."""
    need("dd")
    image, _, blocks = built_image(place.image)
    storage = FileStorage(place.scratch / "medium.img", max(MEDIUM_BYTES, image.size))
    return _compare(place, image, blocks, storage, _dd(place, blocks, place.scratch / "dd.img", "conv=fsync"))


def to_block_device(place: Place) -> Reading:
    """On a block device, past the page cache: how an SD card is written."""
    need("dd", "losetup", "blkdiscard")
    need_root()
    image, _, blocks = built_image(place.image)
    with _loop_device(place.scratch / "card.img", max(MEDIUM_BYTES, image.size)) as device:
        forget = ("blkdiscard", "--zeroout", "--force", device)
        peer = (forget, *_dd(place, blocks, Path(device), "oflag=direct", "conv=fsync,notrunc"))
        return _compare(place, image, blocks, BlockStorage(device, named_again=True), peer)


def _compare(place: Place, image: Image, blocks: Bmap, storage: Storage, peer: Sequence[Sequence[str]]) -> Reading:
    """Ours and the commands of the peer in turn."""
    gather(image.path, blocks, _mapped(place))
    commands: dict[str, list[float]] = {}

    def ours() -> float:
        place.say("flash and read back")
        return seconds(lambda: flash(storage, image, Step("flash", NoWatcher())))

    def theirs() -> float:
        place.say("the same with ordinary tools")
        for number, command in enumerate(peer, 1):
            took = seconds(functools.partial(run, *command))
            commands.setdefault(f"{number}. {command[0]}", []).append(took)
        return sum(times[-1] for times in commands.values())

    our_times, their_times = alternating(ROUNDS, ours, theirs)
    with storage.attach() as medium:
        forgetting = seconds(medium.discard)
    note = (
        f"{blocks.mapped_bytes / 1e6:.0f} MB mapped of {image.size / 1e6:.0f} MB; {spread(our_times)}, of which "
        f"forgetting the medium {forgetting:.2f}; peer {spread(their_times)}: "
        + ", ".join(f"{name} {median(times):.2f}" for name, times in commands.items())
    )
    return Reading(median(our_times), median(their_times), note)


def _mapped(place: Place) -> Path:
    return place.scratch / "mapped"


def _dd(place: Place, blocks: Bmap, target: Path, *how: str) -> Sequence[Sequence[str]]:
    """Write with these flags, then read the same bytes past the page cache."""
    return (
        ("dd", f"if={_mapped(place)}", f"of={target}", _BLOCK, *how),
        ("dd", f"if={target}", "of=/dev/null", _BLOCK, "iflag=direct,count_bytes", f"count={blocks.mapped_bytes}"),
    )


def gather(image: Path, blocks: Bmap, into: Path) -> None:
    """The mapped bytes, one after another; reading them also puts the image into the page cache."""
    with image.open("rb") as source, into.open("wb") as target:
        for one in blocks.ranges:
            offset, left = blocks.span(one)
            while left:
                moved = os.sendfile(target.fileno(), source.fileno(), offset, left)
                offset, left = offset + moved, left - moved
        os.fsync(target.fileno())


@contextmanager
def _loop_device(backing: Path, size: int) -> Iterator[str]:
    with backing.open("wb") as file:
        file.truncate(size)
    try:
        # Direct, so that what is read back comes from the disk and not from the backing file's page cache.
        device = run("losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", backing).strip()
    except ProgramFailedError as error:
        raise NotMeasuredError(f"this machine gives no loop device: {error}") from error
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
