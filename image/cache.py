"""The cache of builds, which one build at a time may use."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: The number under which programs inherit the lock, at least. Low ones are left to them: a shell that mmdebstrap starts
#: takes no number of two digits for a redirection.
_INHERITED = 100


@contextmanager
def held(cache: Path, shown: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the cache alone; whoever comes second waits, and then finds what the first one made.

    What a build left that was killed is cleared away. Its programs may outlive it, and go on writing: they inherit the
    lock (image.run), so that nobody comes in before the last of them has ended.

    Args:
        cache: made if it is not there.
        shown: told of waiting.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        inherited = fcntl.fcntl(file, fcntl.F_DUPFD, _INHERITED)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                shown("waiting for another build to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            for left in (*cache.glob("build-*"), *cache.glob("*.unfinished")):
                shutil.rmtree(left)
            yield
            fcntl.flock(file, fcntl.LOCK_UN)  # whatever still runs now may
        finally:
            os.close(inherited)
