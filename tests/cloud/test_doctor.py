"""A doctor that cannot fail is no doctor: each check sees the weakness that it is there for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloud import doctor, stack
from cloud.doctor import Check, ThrowAwayAuthority
from cloud.local import launcher
from cloud.target import Target, local_target
from tests.cloud.conftest import Fleet

SERVER = str(Path(__file__).with_name("weak_server.py"))


def _failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@contextmanager
def _weak(tmp_path: Path, weakness: str) -> Iterator[Target]:
    with launcher.running(tmp_path / "state", jitp_delay=(0, 0.1), server=(SERVER, weakness)):
        target = local_target(tmp_path / "state")
        stack.deploy(target, build=tmp_path / "code")
        yield target


def test_a_healthy_cloud_passes_every_check(fleet: Fleet) -> None:
    checks = doctor.examine(fleet.target)

    assert [(check.name, check.passed) for check in checks] == [
        ("a good unit joins", True),
        ("no client certificate", True),
        ("unknown CA", True),
        ("wrong client id", True),
        ("topic outside the policy", True),
        ("own jobs, shadows, metrics", True),
        ("other units' jobs, shadows, metrics", True),
        ("inactive certificate", True),
    ]


def test_the_doctor_leaves_nothing_behind(fleet: Fleet) -> None:
    iot = fleet.target.iot
    before = len(iot.list_ca_certificates()["certificates"]), len(iot.list_things()["things"])

    doctor.examine(fleet.target)

    after = len(iot.list_ca_certificates()["certificates"]), len(iot.list_things()["things"])
    assert after == before
    assert not [thing for thing in iot.list_things()["things"] if thing["thingName"].startswith("DOCTOR")]


@pytest.mark.parametrize(
    ("weakness", "seen"),
    [
        ("no-client-certificate", {"no client certificate"}),
        ("no-policies", {"wrong client id", "topic outside the policy", "other units' jobs, shadows, metrics"}),
        ("inactive-certificates", {"inactive certificate"}),
    ],
)
def test_a_weakness_fails_the_check_that_is_there_for_it(tmp_path: Path, weakness: str, seen: set[str]) -> None:
    with _weak(tmp_path, weakness) as target:
        assert _failed(doctor.examine(target)) == seen


def test_a_cloud_that_trusts_a_foreign_ca_fails_the_check_for_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ThrowAwayAuthority("a CA that should not be registered")
    fleet.registry.register_signing_ca(foreign.pem, foreign.verification)
    monkeypatch.setattr(doctor, "foreign_authority", lambda: foreign)

    assert _failed(doctor.examine(fleet.target)) == {"unknown CA"}


@pytest.mark.parametrize(
    ("weakness", "sentence"), [("no-jitp", "still PENDING_ACTIVATION"), ("no-hang-up", "first connection was accepted")]
)
def test_without_jitp_nothing_counts_as_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakness: str, sentence: str
) -> None:
    monkeypatch.setattr(doctor, "JITP_SECONDS", 1.0)

    with _weak(tmp_path, weakness) as target:
        checks = doctor.examine(target)

    assert not any(check.passed for check in checks)
    assert sentence in checks[0].sentence
    assert {check.sentence for check in checks[1:]} == {"cannot be judged while a good unit is not let in"}
