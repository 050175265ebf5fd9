"""Room on the disk: looked at before a build, and told when there is none left in the middle of one."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from image.errors import CommandFailedError, DiskFullError

MEBIBYTE = 1024 * 1024

#: What a build of the product's recipe takes at most, measured. A larger one takes more, and says so when it is short.
OUTPUT_BYTES = 500 * MEBIBYTE
WORKING_BYTES = 900 * MEBIBYTE
BASE_BYTES = 1900 * MEBIBYTE

#: Less than this is none: programs give up before the last byte is gone.
_NOTHING = 8 * MEBIBYTE


@contextmanager
def room(needs: Mapping[Path, int]) -> Iterator[None]:
    """That there is room for a build, now and as long as it runs.

    Where one fails because somebody else filled the disk, that is said before what was made so far is cleared away.

    Args:
        needs: bytes by directory; those of one file system add up.

    Raises:
        DiskFullError: there is none; it says where, and how much is needed.
    """
    places = _by_file_system(needs)
    for place, needed in places.items():
        if (free := shutil.disk_usage(place).free) < needed:
            raise _full(place, free, needed)
    try:
        yield
    except (OSError, CommandFailedError) as error:
        for place, needed in places.items():
            if (free := shutil.disk_usage(place).free) < _NOTHING:
                raise _full(place, free, needed) from error
        raise


def _by_file_system(needs: Mapping[Path, int]) -> dict[Path, int]:
    """Bytes by the top of each file system."""
    found: dict[Path, int] = {}
    for place, needed in needs.items():
        top = next(folder for folder in (place, *place.parents) if folder.is_mount() or folder == folder.parent)
        found[top] = found.get(top, 0) + needed
    return found


def _full(place: Path, free: int, needed: int) -> DiskFullError:
    return DiskFullError(
        f"the file system {place} is full: {free // MEBIBYTE} MiB are free, and a build needs about"
        f" {needed // MEBIBYTE} MiB there. Make room, or name other places by --cache and --output"
    )
