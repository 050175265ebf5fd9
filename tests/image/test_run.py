import sys
from pathlib import Path

import pytest

from image.errors import CommandFailedError, ToolMissingError
from image.run import run


def test_a_failed_command_can_be_pasted_and_shows_its_last_words() -> None:
    code = "import sys; sys.exit('no such thing')"

    with pytest.raises(CommandFailedError, match=r"failed with 1[^$]*no such thing") as caught:
        run(sys.executable, "-c", code)

    assert "-c 'import sys" in str(caught.value)


def test_a_missing_program_says_what_to_do() -> None:
    with pytest.raises(ToolMissingError, match="make setup"):
        run("no-such-program-of-ours")


def test_a_killed_command_is_named_by_its_signal() -> None:
    with pytest.raises(CommandFailedError, match="SIGKILL"):
        run(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")


def test_a_log_takes_what_is_said(tmp_path: Path) -> None:
    log = tmp_path / "log"

    said = run(sys.executable, "-c", "print('hello')", log=log)

    assert said == ""
    assert log.read_text() == "hello\n"
