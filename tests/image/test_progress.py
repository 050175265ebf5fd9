"""What is shown of a build."""

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from image import progress
from image.progress import Clock, shown


def test_a_finished_stage_is_a_line_with_its_time_and_its_last_words() -> None:
    said = io.StringIO()
    clock = Clock()

    with shown(clock, Console(file=said, width=100)) as stage:
        with stage("base") as say:
            say("fetching 1 of 2")
            say("cached")
        with stage("disk"):
            pass

    assert re.sub(r"\d\.\d", "N", said.getvalue()).splitlines() == [
        "  base                       N s  cached",
        "  disk                       N s",
    ]
    assert list(clock.seconds) == ["base", "disk"]
    assert clock.words == {"base": "cached"}


def test_waiting_is_said_at_once() -> None:
    said = io.StringIO()

    with shown(Clock(), Console(file=said, width=100)) as stage, stage(progress.WAIT) as say:
        say("waiting for another build to end")
        assert said.getvalue() == "  waiting for another build to end\n"


def test_a_terminal_has_one_bar_over_all_stages() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=100, color_system=None)

    with shown(Clock(), console, {"one": 3.0, "two": 1.0}) as stage:
        with stage("one") as say:
            say("half way")
        with stage("two"):
            time.sleep(0.3)  # as long as it takes to be drawn

    drawn = said.getvalue()
    assert re.search(r"two .*(7[5-9]|[89]\d)%", drawn)
    assert "one" in drawn


def test_the_bar_moves_within_a_stage_and_never_to_its_end() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=100, color_system=None)

    with shown(Clock(), console, {"one": 0.1, "two": 0.1}) as stage, stage("one"):
        time.sleep(0.5)

    shares = [int(found) for found in re.findall(r"(\d+)%", said.getvalue())]
    assert max(shares) in range(45, 51)


def test_a_stage_that_fails_is_named() -> None:
    said = io.StringIO()

    with pytest.raises(ValueError, match="no"), shown(Clock(), Console(file=said)) as stage, stage("disk"):
        raise ValueError("no")

    assert said.getvalue().split() == ["disk", "failed"]


def test_the_next_build_expects_what_this_one_took(tmp_path: Path) -> None:
    assert progress.expected(tmp_path) == progress.TYPICAL

    progress.remember(tmp_path, Clock({"wait": 60.0, "base": 1.5}))

    assert progress.expected(tmp_path) == {"base": 1.5}


@pytest.mark.parametrize("text", ["", "[]", "1", '{"base": "long"}', "{}", '{"base": null}'])
def test_times_that_cannot_be_read_are_typical_ones(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages.json").write_text(text)

    assert progress.expected(tmp_path) == progress.TYPICAL


def test_results_are_listed_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "picket.img").write_bytes(bytes(3 << 20))
    (tmp_path / "picket.json").write_bytes(bytes(2048))
    said = io.StringIO()

    Console(file=said, width=80).print(progress.results(tmp_path))

    assert [line.split() for line in said.getvalue().splitlines()] == [
        ["picket.img", "3.0", "MiB"], ["picket.json", "2.0", "KiB"],
    ]  # fmt: skip
