"""A release that does not stay up, or settings that are broken: the unit still watches, alarms, and takes an update."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import arming, status, tuning
from firmware_agent.arming import Arming
from firmware_agent.assembly import _gate
from firmware_agent.errors import SettingsFault
from firmware_agent.settings import load, salvage
from firmware_agent.update import releases
from tests.firmware_agent.support import Broker, Ca, Unit, provision, settings_text, wait_for

ROOT = Path(__file__).parent.parent.parent

#: `picket-agent run` on a board whose PIR is driven by signals.
RUN = """
import signal, sys
from gpiozero.pins.mock import MockFactory
from firmware_agent import __main__, pins
from tests.firmware_agent.support import TestBoard
factory = MockFactory()
pins.open_pins = lambda settings: pins.FactoryPins(factory, 17)
__main__.RaspberryPi = lambda root: TestBoard()
def wave(number, frame):
    factory.pin("GPIO17").drive_high()
    factory.pin("GPIO17").drive_low()
signal.signal(signal.SIGUSR1, wave)
sys.exit(__main__.main(["--settings", sys.argv[1], "run"]))
"""


@contextmanager
def agent(settings: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(settings)],
        cwd=ROOT,
        env={**os.environ, "LG_WD": str(settings.parent), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        _, complaints = process.communicate(timeout=30)
        assert process.returncode == 0, complaints


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(settings_text(tmp_path))
    return path


def parts(unit: Unit) -> Any:
    wait_for(unit.settings.paths.status.exists)
    return json.loads(unit.settings.paths.status.read_text())


def test_an_agent_that_did_not_stay_up_does_only_what_is_most_needed(
    unit: Unit, ca: Ca, broker: Broker, settings: Path
) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    tuning.save(unit.settings.paths.tuning, tuning.Tuning(quiet_seconds=3000.0), unit.settings.tuning)

    with agent(settings, PICKET_SAFE_MODE="1", PICKET_RELEASE="0.1.0-00000000") as process:
        hello = broker.next("hello")
        said = parts(unit)
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            alarm = broker.next("alarm")
        words = status.words(said)

    assert (hello["safe_mode"], hello["release"]) == ("the agent did not stay up", "0.1.0-00000000")
    assert set(said["parts"]) == {"jobs", "house"}
    assert alarm["sequence"] == 2  # the owner's quiet time is not in force
    assert "safe mode:   the agent did not stay up" in words


def test_ordinary_times_say_nothing_of_safe_mode(unit: Unit, ca: Ca, broker: Broker, settings: Path) -> None:
    broker.start()
    provision(unit, ca, broker.port)

    with agent(settings):
        assert "safe_mode" not in broker.next("hello")


@pytest.mark.parametrize("broken", ["[nonsense]\n", '[mqtt]\nkeep_alive_seconds = "x"\n'])
def test_with_a_wrong_line_in_the_settings_the_unit_still_alarms(
    unit: Unit, ca: Ca, broker: Broker, settings: Path, broken: str
) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    settings.write_text(settings.read_text().replace("[mqtt]\nkeep_alive_seconds = 45\n", "") + broken)

    with agent(settings) as process:
        hello = broker.next("hello")
        process.send_signal(signal.SIGUSR1)
        assert broker.next("alarm")["kind"] == "motion"

    assert str(settings) in hello["safe_mode"]


def test_settings_that_say_nothing_of_the_units_own_places_end_the_agent_with_their_own_code(settings: Path) -> None:
    settings.write_text("[image\n")

    done = subprocess.run(
        [sys.executable, "-m", "firmware_agent", "--settings", str(settings), "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 78
    assert "the settings are no TOML" in done.stderr


def test_what_parses_of_broken_settings_is_used(settings: Path, tmp_path: Path) -> None:
    settings.write_text(settings_text(tmp_path) + "[update]\nattempts = 99\n")
    with pytest.raises(SettingsFault):
        load(settings)

    saved = salvage(settings)

    assert saved.image.name == "picket"
    assert saved.paths.state == tmp_path / "state"
    assert saved.update.attempts == 3


@pytest.mark.parametrize(("left", "store"), [("key.pem", "file"), ("tpm2_pkcs11", "tpm"), ("key-store", "probe-once")])
def test_where_the_key_lives_is_never_guessed_anew(tmp_path: Path, left: str, store: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / left).touch()
    settings = tmp_path / "agent.toml"
    settings.write_text(f'[key]\nstore = "nowhere"\n[paths]\nstate = "{tmp_path}/state"\n')

    assert salvage(settings).key.store == store


def test_safe_mode_keeps_the_unit_armed_or_not_as_it_was(unit: Unit, ca: Ca, broker: Broker, settings: Path) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    arming.save(unit.settings.paths.arming, Arming(armed=False, by="cloud"))

    with agent(settings, PICKET_SAFE_MODE="1") as process:
        broker.next("hello")
        process.send_signal(signal.SIGUSR1)
        assert broker.next("event")["kind"] == "motion"


def test_a_release_on_trial_that_comes_up_in_safe_mode_is_not_kept() -> None:
    well = {name: (lambda: "fine") for name in ("pir", "key", "spool")}

    assert _gate(well, None)() is None
    assert _gate(well, "unknown section [x]")() == "safe mode: unknown section [x]"


def test_a_release_that_has_run_for_a_while_calls_itself_steady(
    unit: Unit, ca: Ca, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firmware_agent.product import Product  # noqa: PLC0415

    monkeypatch.setattr("firmware_agent.product.STEADY_SECONDS", 0.1)
    provision(unit, ca, 1)
    unit.settings.paths.boot.write_text(json.dumps({"format": 1, "trial": None, "rolled_back": None, "unsteady": 4}))
    product = Product(unit.settings, unit.board, unit.pins, release="0.1.0-00000000")
    product.start()
    try:
        wait_for(lambda: json.loads(unit.settings.paths.boot.read_text())["unsteady"] == 0)
    finally:
        product.stop()
        product.join()
    assert releases.Releases(unit.root, unit.settings.paths.state).trial() is None
