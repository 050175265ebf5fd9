"""One build at a time in a cache, and nothing of one that was killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from image.build import _alone
from image.cache import held
from image.progress import Clock

#: Holds a cache, starts a program that stays when its parent is killed, and says so.
HOLDER = """
import subprocess, sys
from pathlib import Path
from image.cache import held
with held(Path(sys.argv[1])):
    left = subprocess.Popen(["sleep", sys.argv[2]], close_fds=False, stdout=subprocess.DEVNULL)
    print(left.pid, flush=True)
    sys.stdin.read()
"""


def holder(cache: Path, seconds: float) -> tuple[subprocess.Popen[str], int]:
    """The process that holds a cache, and the number of the program that it started."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cache), str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def ended(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    process.wait()


def test_what_a_killed_build_left_is_cleared_away_and_what_is_finished_stays(tmp_path: Path) -> None:
    for name in ("build-abc/root", "build-wheels-x", "base-1.unfinished/root", "base-2/boot", "wheels-3", "debs"):
        (tmp_path / name).mkdir(parents=True)

    with held(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"base-2", "wheels-3", "debs", "lock"}


def test_whoever_comes_second_waits_and_says_so(tmp_path: Path) -> None:
    first, _ = holder(tmp_path, 0)
    said: list[str] = []

    def shown(words: str) -> None:
        said.append(words)
        ended(first)

    with held(tmp_path, shown):
        assert said == ["waiting for another build to end"]


def test_programs_of_a_killed_build_keep_the_cache_until_they_end(tmp_path: Path) -> None:
    first, program = holder(tmp_path, 2)
    first.kill()
    ended(first)
    said: list[str] = []

    with held(tmp_path, said.append):
        assert said
        assert "sleep" not in _command(program)


def test_who_ends_well_leaves_the_cache_to_others_whatever_still_runs(tmp_path: Path) -> None:
    first, program = holder(tmp_path, 300)
    said: list[str] = []
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.close()
    first.wait()
    first.stdout.close()

    with held(tmp_path, said.append):
        assert not said
        assert "sleep" in _command(program)
    os.kill(program, signal.SIGTERM)


def _command(process: int) -> str:
    """What a process runs; nothing for one that has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def test_a_build_shows_its_waiting_as_a_stage_and_else_nothing(tmp_path: Path) -> None:
    first, _ = holder(tmp_path, 0)
    clock = Clock()

    def ends(process: subprocess.Popen[str]) -> None:
        time.sleep(0.5)
        ended(process)

    thread = threading.Thread(target=ends, args=(first,))
    thread.start()
    with _alone(tmp_path, clock.stage):
        assert clock.words == {"wait": "waiting for another build to end"}
    thread.join()

    free = Clock()
    with _alone(tmp_path, free.stage):
        assert not free.seconds


def test_programs_inherit_the_lock_under_a_high_number(tmp_path: Path) -> None:
    """A shell takes no number of two digits for a redirection, and mmdebstrap uses the lowest free one for one."""

    def inherited() -> set[int]:
        said = subprocess.run(["ls", "/proc/self/fd"], close_fds=False, check=True, capture_output=True, text=True)
        return {int(name) for name in said.stdout.split()}

    before = inherited()
    with held(tmp_path):
        more = inherited() - before

    assert len(more) == 1
    assert min(more) >= 100
    assert inherited() == before
