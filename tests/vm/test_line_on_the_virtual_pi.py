"""The whole line on the real image in a virtual Pi: the units that pass, and those that must not."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloud.local import launcher
from factory.errors import ExitCode
from factory.line import STEPS
from station import Station
from tests.site import ROOT, Site
from tests.test_line import failed_in

pytestmark = pytest.mark.vm

#: The image ignores its PIR for a minute after power-up, as an HC-SR501 demands.
WARM_UP_SECONDS = 60.0


@pytest.fixture(autouse=True)
def _image_is_built() -> None:
    if not (ROOT / "build/image/picket.json").exists():
        pytest.fail("the image is not built: make image")


def test_a_unit_becomes_a_product_that_texts_its_owner(site: Site) -> None:
    serial, phone = site.serial(), "+15555550123"
    site.registry.owner(serial, phone, "Europe/Berlin")

    with Station.opened(site.bench(**site.virtual()), serial) as station:
        attempt = station.run(as_json=False)
        assert attempt.code is ExitCode.PASS, site.record(serial)[-1].reason
        texts = wave_until_text(station, site, phone)

    run = site.record(serial)[-1]
    assert [(step.name, step.outcome) for step in run.steps] == [(name, "pass") for name in STEPS]
    assert attempt.made is not None
    assert attempt.made.key == "tpm"
    assert site.live_certificates(serial) == [attempt.made.certificate.id]
    assert texts[0].text.startswith("Your security system just detected motion at: ")
    device = site.registry.device(serial)
    assert device is not None
    assert (device.mode, device.key) == ("product", "tpm")
    assert keys_on(site.base / "boards" / serial / "medium.img") == set(), "the key is in the TPM, SSH's in memory"


def wave_until_text(station: Station, site: Site, phone: str) -> list[launcher.Sms]:
    """Wave as a person would who waits for the SMS."""
    deadline = time.monotonic() + WARM_UP_SECONDS + 60
    while time.monotonic() < deadline:
        since = datetime.now(UTC)
        station.bench.stimulus.wave()
        time.sleep(3)
        if texts := [one for one in launcher.sms(site.cloud, since) if one.to == phone]:
            return texts
    pytest.fail("no SMS came")


def keys_on(medium: Path) -> set[bytes]:
    """The kinds of private keys in PEM that lie on the raw medium; code that speaks of PEM does not count."""
    key, found, rest = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----\n[A-Za-z0-9+/=]{40}"), set(), b""
    with medium.open("rb") as file:
        while chunk := file.read(2**22):
            found |= set(key.findall(rest + chunk))
            rest = chunk[-128:]
    return found


def test_a_cut_pir_wire_fails_the_unit_in_the_self_test(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.self_test.MOTION_SECONDS", 3.0)

    attempt, run = site.run(site.serial(), "pir-cut", **site.virtual())

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "self-test"
    assert "never fired" in (run.reason or "")


def test_another_key_than_the_enrolled_one_fails_the_unit_in_burn_in(site: Site) -> None:
    attempt, run = site.run(site.serial(), "wrong-key", **site.virtual())

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "burn-in"
    assert "key-mismatch" in (run.reason or "")


def test_a_board_without_a_tpm_gets_a_file_key_and_the_record_says_so(site: Site) -> None:
    attempt, run = site.run(site.serial(), "pir-stuck", **{**site.virtual(), "options": "tpm = false"})

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "self-test"
    assert "stuck high" in (run.reason or "")
    assert run.steps[STEPS.index("enrol")].notes["key"] == "file"


def test_another_factory_key_is_refused_by_the_unit(site: Site) -> None:
    attempt, run = site.run(site.serial(), **{**site.virtual(), "key": str(site.base / "keys/factory")})

    assert attempt.code is ExitCode.UNIT_FAILED
    assert failed_in(run) == "boot"
    assert "refuses the factory key" in (run.reason or "")
