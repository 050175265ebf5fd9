"""The benchmarks: that they measure what was promised and say so honestly. How fast we are is not tested."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import flashing
from bench.figures import Figure, Measurement, NotMeasuredError, Place, Reading, Target
from bench.run import exit_code, take
from bench.table import MEASUREMENTS
from image import sample
from tests.site import ROOT

KEYS = {"name", "value", "unit", "peer", "peer_value", "ratio", "target", "met", "note"}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench/run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "160"},
    )


def measurement(
    found: Reading | Exception, target: Target | None = None, *, slow: bool = False, name: str = "some"
) -> Measurement:
    def run(_place: Place) -> Reading:
        if isinstance(found, Exception):
            raise found
        return found

    return Measurement(name, "something", "something else", target or Target(1.0), run, slow=slow)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_everything_that_was_promised_is_measured() -> None:
    assert {one.name: (one.target.limit, one.target.of_peer) for one in MEASUREMENTS} == {
        "image-cold": (240, False),
        "image-agent-change": (20, False),
        "image-size": (160, False),
        "root-size": (450, False),
        "virtual-ready": (20, False),
        "virtual-boot": (30, False),
        "virtual-unit": (180, False),
        "simulated-unit": (5, False),
        "flash": (1.2, True),
        "flash-block": (1.2, True),
        "edge-to-sms": (1, False),
        "agent-memory": (40, False),
        "agent-idle-cpu": (0.3, False),
        "edge-to-publish": (5, False),
        "spool-drain": (60, False),
        "idle-bytes": (2000, False),
        "update-bytes": (6, False),
        "update-bytes-dependencies": (12, False),
        "update-gap": (3, False),
    }
    assert all(one.peer for one in MEASUREMENTS)


def test_the_list_shows_every_name() -> None:
    done = command("--list")

    assert done.returncode == 0
    assert [one.name for one in MEASUREMENTS if one.name not in done.stdout] == []


def test_help_carries_an_example() -> None:
    done = command("--help")

    assert done.returncode == 0
    assert "make bench ONLY=flash" in done.stdout


@pytest.mark.parametrize("arguments", [["--only", "flahs"], ["--quick"]])
def test_what_is_not_known_is_a_mistake_of_the_user(tmp_path: Path, arguments: list[str]) -> None:
    done = command(*arguments, "--output", tmp_path / "bench.json")

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bench.json").exists()


def test_one_measurement_writes_its_figure_beside_the_peers(tmp_path: Path) -> None:
    image, output = tmp_path / "image" / "picket-sample.json", tmp_path / "bench.json"
    sample.build(image)

    done = command("--only", "flash", "--image", image, "--output", output)

    assert done.returncode == 0, done.stderr
    (figure,) = strict_json(output.read_text())
    assert set(figure) == KEYS
    assert (figure["name"], figure["unit"]) == ("flash", "s")
    assert min(figure["value"], figure["peer_value"]) > 0
    assert figure["ratio"] == pytest.approx(figure["value"] / figure["peer_value"], rel=0.2)
    assert figure["met"] is (figure["value"] <= figure["target"])
    assert "flash" in done.stdout


def test_what_cannot_be_measured_is_null_with_the_reason(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"

    done = command("--only", "flash", "--image", tmp_path / "none.json", "--output", output)

    assert done.returncode == 0
    (figure,) = strict_json(output.read_text())
    assert set(figure) == KEYS
    assert (figure["value"], figure["peer_value"], figure["ratio"], figure["met"]) == (None, None, None, None)
    assert figure["note"].startswith("not measured: ")
    assert "make image" in figure["note"]


def test_a_measurement_that_fails_is_an_error(tmp_path: Path) -> None:
    image, output = tmp_path / "picket-sample.json", tmp_path / "bench.json"
    manifest = sample.build(image)
    with manifest.image_path.open("r+b") as file:
        file.seek(sample.PARTITION_START)
        file.write(b"damaged")

    done = command("--only", "flash", "--image", image, "--output", output)

    assert done.returncode == 1
    (figure,) = strict_json(output.read_text())
    assert figure["value"] is None
    assert figure["note"].startswith("error: StationFault: ")


def test_two_runs_at_once_are_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    with (tmp_path / "bench" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        done = command("--only", "flash", "--output", tmp_path / "bench.json")

    assert done.returncode == 2
    assert "another run is measuring" in done.stderr


def test_a_target_may_be_a_multiple_of_the_peer() -> None:
    figure = Figure.of(measurement(Reading(0.5, 0.4), Target(1.2, of_peer=True)), Reading(0.5, 0.4))

    assert (figure.target, figure.ratio, figure.met) == (0.48, 1.25, False)


def test_the_worst_of_many_is_held_against_the_target() -> None:
    reading = Reading(0.1, 0.1, judged=1.1)

    assert Figure.of(measurement(reading), reading).met is False


def test_a_missed_target_is_shown_and_fails_only_a_strict_run() -> None:
    missed = Figure.of(measurement(Reading(2.0, 1.0)), Reading(2.0, 1.0))
    unknown = Figure.without(measurement(Reading(2.0, 1.0)), "no QEMU")

    assert [exit_code([missed, unknown], strict=strict) for strict in (False, True)] == [0, 1]
    assert exit_code([unknown], strict=True) == 0
    assert exit_code([Figure.without(measurement(RuntimeError()), "it broke", failed=True)], strict=False) == 1


def test_the_slow_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    slow = measurement(Reading(1.0, 1.0), slow=True)

    assert take(slow, tmp_path, tmp_path, wanted=False).note.startswith("not measured: takes minutes")
    assert take(slow, tmp_path, tmp_path, wanted=True).value == 1.0


@pytest.mark.parametrize(("error", "failed"), [(NotMeasuredError("no QEMU"), False), (RuntimeError("it broke"), True)])
def test_one_failure_does_not_end_the_others(tmp_path: Path, error: Exception, failed: bool) -> None:
    figure = take(measurement(error), tmp_path, tmp_path, wanted=True)

    assert (figure.failed, figure.value) == (failed, None)
    assert str(error) in figure.note
    assert list(tmp_path.iterdir()) == []


def test_a_flash_is_measured_to_the_last_mapped_byte(tmp_path: Path) -> None:
    """The peer's file holds exactly the mapped bytes, in order."""
    manifest = sample.build(tmp_path / "picket-sample.json")
    blocks = manifest.verify_files()

    flashing.gather(manifest.image_path, blocks, tmp_path / "mapped")

    image = manifest.image_path.read_bytes()
    spans = [blocks.span(one) for one in blocks.ranges]
    assert (tmp_path / "mapped").read_bytes() == b"".join(image[start : start + length] for start, length in spans)
