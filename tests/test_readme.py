"""The README is true: its commands exist, its links lead somewhere, and `make demo` does what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from PIL import Image

from factory.label import scan
from factory.line import STEPS
from firmware_agent import __version__
from tests.site import as_a_user, fresh_checkout

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def make_targets() -> set[str]:
    """The targets that `make help` lists."""
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(re.findall(r"^  make ([a-z-]+) ", shown, re.MULTILINE))


def test_every_make_target_of_the_documents_exists() -> None:
    said = {
        target
        for path in DOCUMENTS
        for code in re.findall(r"```sh\n(.*?)```|`([^`\n]*)`", path.read_text(), re.DOTALL)
        for target in re.findall(r"^make ([a-z-]+)", "\n".join(code), re.MULTILINE)
    }

    assert said
    assert said <= make_targets()


def test_plain_make_prints_help() -> None:
    assert "make demo " in subprocess.run(["make"], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", path.read_text()) if "://" not in link]

    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("command", ["", "run", "record", "demo", "ca init", "cloud register"])
def test_every_command_of_the_station_has_help_with_an_example(command: str) -> None:
    shown = subprocess.run(
        [sys.executable, "station.py", *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )

    assert shown.returncode == 0
    assert not command or "Example:" in shown.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh checkout with this environment's Python packages already there."""
    return fresh_checkout(tmp_path_factory.mktemp("clone") / "picket")


def demo(clone: Path) -> tuple[str, dict]:  # type: ignore[type-arg]
    ran = as_a_user(clone, "make", "demo")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, json.loads((clone / "build/demo/summary.json").read_text())


def test_make_demo_tells_the_whole_story_and_then_makes_the_next_unit(clone: Path) -> None:
    text, first = demo(clone)
    _, second = demo(clone)

    assert (first["serial"], second["serial"]) == ("PK-S00001", "PK-S00003")
    assert first["outcome"] == "pass"
    assert [(step["name"], step["outcome"]) for step in first["steps"]] == [(name, "pass") for name in STEPS]
    assert all(step["seconds"] >= 0 for step in first["steps"])
    assert first["thing"] == first["serial"]
    certificate = x509.load_pem_x509_certificate(first["certificate"]["pem"].encode())
    assert first["certificate"]["not_after"] == certificate.not_valid_after_utc.isoformat()
    assert first["certificate"]["issuer"] == certificate.issuer.rfc4514_string()
    assert first["key"] in {"file", "tpm"}
    assert first["sms"]["text"].startswith("Your security system just detected motion at: ")
    assert first["sms"]["text"] in text
    assert first["edge_to_sms_seconds"] > 0
    for number, told in ((1, first), (3, second)):
        with Image.open(clone / f"build/demo/labels/PK-S0000{number}.png") as label:
            assert scan(label) == f"PK-S0000{number}"
        fielded = told["update"]
        assert (fielded["canary"], fielded["others"]) == (f"PK-S0000{number + 1}", [f"PK-S0000{number}"])
        assert fielded["before"] == __version__
        assert fielded["after"] == dict.fromkeys([fielded["canary"], *fielded["others"]], fielded["good"])
        assert fielded["code"] == "unhealthy"
        assert "an alarm could not be kept" in fielded["reason"]
        assert fielded["alarm"]["text"].startswith("Your security system just detected motion at: ")
        assert fielded["delta_bytes"] < fielded["archive_bytes"] / 10
    assert (first["update"]["good"], first["update"]["bad"]) == ("0.2.0", "0.3.0")
    assert (second["update"]["good"], second["update"]["bad"]) == ("0.4.0", "0.5.0")
    assert not (clone / "build/cloud/endpoint.json").exists(), "the demo left its cloud running"


@pytest.mark.parametrize(
    ("fault", "step"),
    [("wrong-key", "burn-in"), ("pir-cut", "self-test"), ("flipped-bit", "flash")],
)
def test_a_demo_broken_on_purpose_fails_in_the_step_where_it_should(clone: Path, fault: str, step: str) -> None:
    bench = clone / "benches/simulated.toml"
    whole = bench.read_text()
    bench.write_text(whole.replace('# faults = ["pir-cut"]', f'faults = ["{fault}"]'))
    try:
        ran = as_a_user(clone, "make", "demo")
    finally:
        bench.write_text(whole)

    summary = json.loads((clone / "build/demo/summary.json").read_text())
    assert ran.returncode == 2, "make's own code for a recipe that failed"
    assert "Error 1" in ran.stderr, "the unit's fault"
    assert summary["outcome"] == "fail"
    assert summary["steps"][-1] == {**summary["steps"][-1], "name": step, "outcome": "fail"}
    assert summary["sms"] is None


def test_a_demo_without_the_alarm_rule_says_that_no_sms_came(clone: Path) -> None:
    template = clone / "cloud/template.yaml"
    story = clone / "cloud/showcase.py"
    whole, code = template.read_text(), story.read_text()
    assert "dt/picket/+/alarm" in whole
    template.write_text(whole.replace("dt/picket/+/alarm", "dt/picket/+/nothing"))
    story.write_text(code.replace("ALARM_SECONDS: Final = 120.0", "ALARM_SECONDS: Final = 6.0"))
    try:
        ran = as_a_user(clone, "make", "demo")
    finally:
        template.write_text(whole)
        story.write_text(code)

    assert "Error 3" in ran.stderr
    assert "no SMS within 6 s" in " ".join(ran.stderr.split())
    assert json.loads((clone / "build/demo/summary.json").read_text())["sms"] is None


def test_a_demo_whose_bad_release_is_good_says_that_it_is(clone: Path) -> None:
    story = clone / "cloud/showcase.py"
    code = story.read_text()
    assert "BEGIN IMEDIATE" in code
    story.write_text(code.replace("BEGIN IMEDIATE", "BEGIN IMMEDIATE"))
    try:
        ran = as_a_user(clone, "make", "demo")
    finally:
        story.write_text(code)

    assert "Error 3" in ran.stderr
    assert "has a slip in it, and no unit failed" in " ".join(ran.stderr.replace("│", " ").split())
    assert "update" not in json.loads((clone / "build/demo/summary.json").read_text())
