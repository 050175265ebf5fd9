import sys
from pathlib import Path

import pytest

from image.errors import CommandFailedError, RecipeError, ToolMissingError
from image.run import logged, note, run


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


# --- the log of a build -----------------------------------------------------------------------------------------------


def python(code: str) -> tuple[str, str, str]:
    return (sys.executable, "-c", code)


def test_a_builds_log_has_every_command_and_what_it_said(tmp_path: Path) -> None:
    log = tmp_path / "new/build.log"

    with logged(log):
        assert run(*python("import sys; print('one'); print('two', file=sys.stderr)")) == "one\n"
        run(*python("print('three')"), log=tmp_path / "other")
        note("four")

    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["one", "two", "three", "four"]
    assert len([line for line in lines if line.startswith(f"$ {sys.executable} -c ")]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("straight", [True, False])
def test_a_failure_shows_the_command_the_last_15_lines_and_where_the_log_is(tmp_path: Path, *, straight: bool) -> None:
    log = tmp_path / "build.log"

    with pytest.raises(CommandFailedError) as caught, logged(log):
        run(*python("print('before')"))
        run(*python("import sys\nfor n in range(40): print(f'line {n}')\nsys.exit(7)"),
            log=tmp_path / "other" if straight else None)  # fmt: skip

    said = str(caught.value)
    assert said.splitlines()[-15:] == [f"line {number}" for number in range(25, 40)]
    assert "line 24" not in said
    assert "failed with 7" in said
    assert caught.value.__notes__ == [f"The whole log: {log}"]
    assert "line 0\n" in log.read_text()
    assert "failed with 7" in log.read_text()


def test_a_mistake_in_a_recipe_needs_no_log(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught, logged(tmp_path / "build.log"):
        raise RecipeError("flavour is not a key")

    assert not hasattr(caught.value, "__notes__")


def test_an_interrupt_is_written_down(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), logged(tmp_path / "build.log"):
        raise KeyboardInterrupt

    assert "KeyboardInterrupt" in (tmp_path / "build.log").read_text()


def test_another_builds_log_of_the_same_name_is_not_written_into(tmp_path: Path) -> None:
    log = tmp_path / "build.log"

    with logged(log):
        with log.open() as first:
            with logged(log):
                note("second")
            note("first")
            assert first.read() == "first\n"
        assert log.read_text() == "second\n"
