"""The whole line on a simulated board with a real local cloud: a good unit, and every bad input in its step."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from PIL import Image

from factory.drivers.simulated_medium import unpack
from factory.drivers.software_tpm import missing
from factory.errors import CloudFault, ExitCode, SignerFault, StationFault, UserMistake
from factory.label import scan
from factory.line import STEPS
from factory.record import RunView
from tests.site import ROOT, Site, last_json


def failed_in(run: RunView) -> str:
    """The step that a run ended in."""
    return next(step.name for step in run.steps if step.outcome != "pass")


def test_a_good_unit_passes_every_step(site: Site) -> None:
    serial = site.serial()

    attempt, run = site.run(serial)

    assert attempt.code is ExitCode.PASS
    assert attempt.made is not None
    assert [(step.name, step.outcome) for step in run.steps] == [(name, "pass") for name in STEPS]
    assert {m.name for step in run.steps for m in step.measurements} >= {
        "pir_baseline_edges", "pir_latency_s", "pir_hold_s", "temperature_c", "connect_attempts",
    }  # fmt: skip
    assert run.steps[STEPS.index("connect")].notes["attempts"].startswith("dropped")
    thing = site.registry.thing(serial)
    assert thing is not None
    assert thing.certificate_ids == (attempt.made.certificate.id,)
    assert thing.attributes["batch"] == "WO-0001"
    assert site.live_certificates(serial) == [attempt.made.certificate.id]
    with Image.open(attempt.made.label) as label:
        assert scan(label) == serial


def test_the_certificate_names_serial_board_and_batch(site: Site) -> None:
    serial = site.serial()

    attempt, run = site.run(serial)

    assert attempt.made is not None
    subject = attempt.made.certificate.certificate.subject
    board = run.steps[STEPS.index("identify")].notes["board"]
    assert [subject.get_attributes_for_oid(oid)[0].value for oid in (
        NameOID.COMMON_NAME, NameOID.SERIAL_NUMBER, NameOID.ORGANIZATIONAL_UNIT_NAME,
    )] == [serial, board, "WO-0001"]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "step", "says"),
    [
        ("small-medium", "flash", "too small"),
        ("flipped-bit", "flash", "read back differently"),
        ("wrong-host-key", "boot", "another SSH host key"),
        ("csr-unsigned", "enrol", "not signed by its own key"),
        ("csr-rsa-1024", "enrol", "RSA-1024"),
        ("csr-other-subject", "enrol", "speaks for another unit"),
        ("wrong-key", "burn-in", "key-mismatch"),
        ("pir-noisy", "self-test", "fired in the quiet baseline"),
        ("pir-stuck", "self-test", "stuck high"),
        ("hot", "self-test", "temperature_c 97"),
    ],
)
def test_a_fault_of_the_unit_fails_it_in_its_step(site: Site, fault: str, step: str, says: str) -> None:
    serial = site.serial()

    attempt, run = site.run(serial, fault)

    assert (attempt.code, attempt.made) == (ExitCode.UNIT_FAILED, None)
    assert (run.outcome, failed_in(run)) == ("fail", step)
    assert says in (run.reason or "")
    assert run.advice
    assert not (site.base / "labels" / f"{serial}.png").exists()


def test_a_silent_console_fails_the_unit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.boot.boot.__wrapped__.__defaults__", (1.0,))

    attempt, run = site.run(site.serial(), "no-banner")

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "boot"
    assert "no factory banner within 1 s" in (run.reason or "")


def test_a_pir_that_never_fires_fails_the_unit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.self_test.MOTION_SECONDS", 1.0)

    attempt, run = site.run(site.serial(), "pir-cut")

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "self-test"
    assert "never fired" in (run.reason or "")


def test_a_board_with_a_tpm_keeps_its_key_there(site: Site) -> None:
    if missing():
        pytest.skip(f"{', '.join(missing())} is not installed: make setup")
    serial = site.serial()

    attempt, run = site.run(serial, options="tpm = true")

    assert attempt.made is not None, run.reason
    assert attempt.made.key == "tpm"
    assert run.steps[STEPS.index("identify")].notes["ek_sha256"]
    state = site.base / "boards" / serial / "root/var/lib/picket"
    assert not (state / "key.pem").exists()
    device = site.registry.device(serial)
    assert device is not None
    assert device.key == "tpm"


def test_a_unit_that_failed_passes_once_it_is_mended(site: Site) -> None:
    serial = site.serial()
    site.run(serial, "hot")

    attempt, _ = site.run(serial)

    assert attempt.code is ExitCode.PASS
    assert [run.outcome for run in site.record(serial)] == ["fail", "pass"]
    assert len(site.live_certificates(serial)) == 1


def test_a_unit_that_passed_is_refused(site: Site) -> None:
    serial = site.serial()
    site.run(serial)

    with pytest.raises(UserMistake, match="already passed"):
        site.run(serial)

    assert len(site.record(serial)) == 1


def test_rework_retires_the_old_certificate(site: Site) -> None:
    serial = site.serial()
    first, _ = site.run(serial)

    second, run = site.rework(serial)

    assert first.made is not None
    assert second.made is not None
    assert site.live_certificates(serial) == [second.made.certificate.id]
    old = site.registry.certificate(first.made.certificate.id)
    assert old is not None
    assert old.status == "REVOKED"
    assert run.steps[STEPS.index("certify")].notes["retired"] == first.made.certificate.id


def test_a_board_that_is_already_a_unit_is_named(site: Site) -> None:
    first, second = site.serial(), site.serial()
    _, run = site.run(first)
    board = str(run.steps[STEPS.index("identify")].notes["board"])
    place = site.base / "boards" / second
    place.mkdir(parents=True)
    (place / "soc-serial").write_text(board)

    attempt, run = site.run(second)

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "identify"
    assert f"already made into {first}" in (run.reason or "")


def test_a_key_that_was_issued_to_another_unit_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloned medium brings its key along; here the clone appears between flash and enrolment."""
    first, second = site.serial(), site.serial()
    site.run(first)
    stolen = site.base / "boards" / first / "root/var/lib/picket/key.pem"

    def with_clone(image: Path, root: Path) -> None:
        unpack(image, root)
        (root / "var/lib/picket").mkdir(parents=True, mode=0o700, exist_ok=True)
        shutil.copy(stolen, root / "var/lib/picket/key.pem")

    monkeypatch.setattr("factory.drivers.simulated.unpack", with_clone)

    attempt, run = site.run(second)

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "certify"
    assert f"already issued to {first}" in (run.reason or "")


# --- the station's own faults --------------------------------------------------------------------------------------


def test_a_wrong_passphrase_is_refused_before_a_unit_is_touched(site: Site, tmp_path: Path) -> None:
    wrong = tmp_path / "passphrase"
    wrong.write_text("not this one at all")
    wrong.chmod(0o600)
    serial = site.serial()

    with pytest.raises(UserMistake, match="passphrase does not open"):
        site.run(serial, passphrase=str(wrong))

    assert site.record(serial) == ()


def test_a_passphrase_that_others_can_read_is_refused(site: Site, tmp_path: Path) -> None:
    open_to_all = tmp_path / "passphrase"
    open_to_all.write_text("x")
    open_to_all.chmod(0o644)

    with pytest.raises(UserMistake, match="can be read by others"):
        site.run(site.serial(), passphrase=str(open_to_all))


def test_a_signing_ca_that_the_cloud_does_not_know_stops_the_line(site: Site, tmp_path: Path) -> None:
    from factory import authority  # noqa: PLC0415
    from tests.site import PASSPHRASE  # noqa: PLC0415

    authority.create_authority(tmp_path / "ca", PASSPHRASE)

    with pytest.raises(CloudFault, match="not registered") as caught:
        site.run(site.serial(), authority=str(tmp_path / "ca"))

    assert "cloud register" in caught.value.advice


def test_an_expired_signing_ca_stops_the_line(site: Site, tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415

    from factory import authority  # noqa: PLC0415
    from tests.site import PASSPHRASE  # noqa: PLC0415

    start = datetime.now(UTC) - timedelta(days=400)
    old = authority.make_signing(authority.make_root(start), start, years=1)
    (tmp_path / "signing.pem").write_text(old.pem)
    (tmp_path / "signing.key").write_bytes(authority._encrypted(old.key, PASSPHRASE))

    with pytest.raises(SignerFault, match="expired"):
        site.run(site.serial(), authority=str(tmp_path))


def test_an_image_that_is_not_what_its_description_says_stops_the_line(site: Site, tmp_path: Path) -> None:
    from image import sample  # noqa: PLC0415

    sample.build(tmp_path / "image.json")
    (tmp_path / "picket-sample.bmap").write_text("<bmap/>")

    with pytest.raises(StationFault, match="digest"):
        site.run(site.serial(), image=str(tmp_path / "image.json"))


def test_a_damaged_image_stops_the_line_in_flash(site: Site, tmp_path: Path) -> None:
    from image import sample  # noqa: PLC0415

    sample.build(tmp_path / "image.json")
    with (tmp_path / "picket-sample.img").open("r+b") as file:
        file.seek(2**20 + 100)
        file.write(b"\xff")

    attempt, run = site.run(site.serial(), image=str(tmp_path / "image.json"))

    assert attempt.code is ExitCode.STATION_FAULT
    assert (run.outcome, failed_in(run)) == ("error", "flash")


def test_a_cloud_that_does_not_answer_stops_the_line(site: Site, tmp_path: Path) -> None:
    ran = site.command("run", "--bench", str(site.bench(cloud=str(tmp_path / "nowhere"))), "--serial", site.serial())

    assert ran.returncode == ExitCode.STATION_FAULT
    assert "no local cloud" in " ".join(ran.stderr.split())


def test_a_template_that_asks_for_what_the_leaf_lacks_is_diagnosed_by_name(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic of JITP: the certificate stays PENDING_ACTIVATION, and nobody says why."""
    from factory import authority  # noqa: PLC0415

    monkeypatch.setattr("factory.connect.ATTEMPTS", 2)
    real = authority._name

    def without_unit(common_name: str, **more: str) -> x509.Name:
        more.pop("unit", None)
        return real(common_name, **more)

    monkeypatch.setattr(authority, "_name", without_unit)

    attempt, run = site.run(site.serial())

    assert attempt.code is ExitCode.STATION_FAULT
    assert (run.outcome, failed_in(run)) == ("error", "connect")
    assert "OrganizationalUnit" in (run.reason or "")


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_speaks_json_and_passes_with_0(site: Site) -> None:
    serial = site.serial()

    ran = site.command("run", "--bench", str(site.bench()), "--serial", serial, "--json")

    assert ran.returncode == ExitCode.PASS, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["step"] for line in lines if "outcome" in line and "step" in line] == list(STEPS)
    assert (lines[-1]["serial"], lines[-1]["outcome"]) == (serial, "pass")


def test_the_command_fails_with_1_for_a_bad_unit(site: Site) -> None:
    ran = site.command("run", "--bench", str(site.bench("hot")), "--serial", site.serial(), "--json")

    assert ran.returncode == ExitCode.UNIT_FAILED
    assert last_json(ran.stdout)["outcome"] == "fail"


@pytest.mark.parametrize("serial", ["", "pk-1", "PK", "PK 000001", "PK-000001-", "Ж" * 8, "A" * 33, "../../etc"])
def test_a_serial_that_is_none_is_the_users_mistake(site: Site, serial: str) -> None:
    ran = site.command("run", "--bench", str(site.bench()), "--serial", serial)

    assert ran.returncode == ExitCode.USER_MISTAKE
    assert "is no serial" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "[authority] is missing"),
        ("name = 3", "is missing"),
        ("name = ", "cannot be read"),
        (b"\xff\xfe".decode("latin-1"), "cannot be read"),
    ],
)
def test_a_bench_file_that_is_wrong_is_the_users_mistake(site: Site, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(text)

    ran = site.command("run", "--bench", str(path), "--serial", "PK-000001")

    assert ran.returncode == ExitCode.USER_MISTAKE
    assert says in " ".join(ran.stderr.replace("│", " ").split())


def test_a_missing_bench_file_is_the_users_mistake(site: Site) -> None:
    ran = site.command("run", "--bench", "benches/none.toml", "--serial", "PK-000001")

    assert ran.returncode == ExitCode.USER_MISTAKE
    assert "there is no bench file" in ran.stderr


def test_an_unknown_fault_is_the_users_mistake(site: Site) -> None:
    ran = site.command("run", "--bench", str(site.bench("gremlins")), "--serial", "PK-900001")

    assert ran.returncode == ExitCode.USER_MISTAKE
    assert "gremlins" in ran.stderr


def test_the_record_of_a_unit_is_shown(site: Site) -> None:
    serial = site.serial()
    site.run(serial, "hot")
    bench = str(site.bench())

    shown = site.command("record", serial, "--bench", bench)
    parsed = json.loads(site.command("record", serial, "--bench", bench, "--json").stdout)

    assert "FAIL" in shown.stdout
    assert "temperature_c 97" in " ".join(shown.stdout.split())
    (run,) = parsed
    assert run["outcome"] == "fail"
    hot = next(m for step in run["steps"] for m in step["measurements"] if m["name"] == "temperature_c")
    assert (hot["value"], hot["unit"], hot["ok"], hot["limits"]) == (97.0, "°C", False, {"low": 0, "high": 75})


def test_a_unit_that_was_never_tried_has_no_record(site: Site) -> None:
    ran = site.command("record", "PK-999999", "--bench", str(site.bench()))

    assert ran.returncode == ExitCode.USER_MISTAKE
    assert "no unit PK-999999" in ran.stderr


# --- kill -9 -------------------------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from factory.record import Step
import factory.record, station
from pathlib import Path

serial, bench, victim, moment = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
real = factory.record.Journal.step
from contextlib import contextmanager

@contextmanager
def step(self, name):
    with real(self, name) as inner:
        if name == victim and moment == "begin":
            os.kill(os.getpid(), signal.SIGKILL)
        yield inner
        if name == victim and moment == "end":
            os.kill(os.getpid(), signal.SIGKILL)

factory.record.Journal.step = step
with station.Station.opened(bench, serial) as opened:
    opened.run(as_json=True)
"""


@pytest.mark.parametrize("moment", ["begin", "end"])
@pytest.mark.parametrize("step", STEPS)
def test_a_station_killed_in_any_step_ends_with_one_certificate(site: Site, step: str, moment: str) -> None:
    serial, bench = site.serial(), site.bench()
    killed = subprocess.run(
        [sys.executable, "-c", KILL, serial, str(bench), step, moment],
        check=False,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    attempt, _ = site.run(serial)

    assert attempt.code is ExitCode.PASS
    assert attempt.made is not None
    first, second = site.record(serial)
    assert (first.outcome, first.reason) == ("aborted", f"the station stopped in step {step}")
    assert [one.outcome for one in first.steps] == ["pass"] * STEPS.index(step) + ["aborted"]
    assert second.outcome == "pass"
    assert site.live_certificates(serial) == [attempt.made.certificate.id]


def test_ctrl_c_closes_the_run_as_aborted(site: Site) -> None:
    serial = site.serial()
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "station.py"), "run", "--bench", str(site.bench()), "--serial", serial, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if json.loads(line).get("step") == "self-test":
            time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            break
    rest, _ = running.communicate(timeout=60)

    assert running.returncode == ExitCode.ABORTED
    run = site.record(serial)[-1]
    assert (run.outcome, run.reason) == ("aborted", "stopped by the operator")
    assert last_json(rest)["outcome"] == "aborted"
