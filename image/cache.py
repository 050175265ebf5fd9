"""The cache of builds, which one build at a time may use."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(cache: Path) -> Iterator[None]:
    """Hold the cache alone; whoever comes second waits, and then finds what the first one made."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in (*cache.glob("build-*"), *cache.glob("*.unfinished")):
            shutil.rmtree(left)  # of a build that was killed
        yield
