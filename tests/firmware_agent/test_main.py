"""The command: banner, help, exit codes, and what it is allowed to import."""

import ast
import importlib.metadata
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_agent import __version__, banner, wire
from firmware_agent.__main__ import EXIT_SETTINGS, main
from tests.firmware_agent.support import BOARD, Ca, Unit, free_port, provision, settings_text

ROOT = Path(__file__).parent.parent.parent
AGENT = ROOT / "firmware_agent"

#: What runs before the station has answered may use the standard library alone.
EARLY = ("__init__", "__main__", "banner", "board", "errors", "settings", "wire")


def agent(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "firmware_agent", *arguments],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


# --- banner -------------------------------------------------------------------------------------------------------


def test_the_banner_is_said_until_the_station_has_answered(unit: Unit) -> None:
    unit.settings.paths.run.mkdir()
    unit.settings.paths.host_key.write_text("ssh-ed25519 AAAAC3Nz root@picket\n")
    console = io.StringIO()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            unit.settings.paths.answered.touch()

    banner.repeat(unit.settings, unit.board, console, sleep=sleep)

    said = [wire.parse_banner(line) for line in console.getvalue().splitlines()]
    banners = [found for found in said if found]
    assert len(banners) == 3
    assert banners[0].board == BOARD
    assert banners[0].host_key == "ssh-ed25519 AAAAC3Nz"
    assert banners[0].image == "picket 0.1.0"
    assert waits == [2.0] * 3


def test_no_banner_is_said_before_there_is_a_host_key(unit: Unit) -> None:
    console = io.StringIO()

    def sleep(_: float) -> None:
        unit.settings.paths.run.mkdir()
        unit.settings.paths.answered.touch()

    banner.repeat(unit.settings, unit.board, console, sleep=sleep)

    assert console.getvalue() == ""


# --- the command --------------------------------------------------------------------------------------------------


def test_provision_answers_on_standard_output(tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path))

    done = agent("--settings", str(settings), "provision", stdin='{"id": 1, "verb": "identify"}\n')

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["agent"] == __version__


def test_run_halts_with_its_own_code_when_the_tpm_is_gone(tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path, store="tpm", tcti=f"swtpm:host=127.0.0.1,port={free_port()}"))

    done = agent("--settings", str(settings), "run")

    assert done.returncode == 4
    assert "halted: no-tpm: this unit is configured for a TPM" in done.stderr


def test_a_unit_that_was_never_provisioned_says_so(tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path))

    done = agent("--settings", str(settings), "run")

    assert done.returncode == 1
    assert "run enrol first" in done.stderr


def test_wrong_settings_have_their_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text("[kye]\n")

    assert main(["--settings", str(settings), "banner"]) == EXIT_SETTINGS
    assert "unknown section [kye]" in capsys.readouterr().err


def test_version_and_help_need_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "picket-agent provision" in capsys.readouterr().out


#: `picket-agent run` on a board with gpiozero's mock instead of lgpio.
RUN = """
import sys
from gpiozero.pins.mock import MockFactory
from firmware_agent import pins
pins.open_pins = lambda settings: pins.FactoryPins(MockFactory(), 17)
from tests.firmware_agent.support import TestBoard
from firmware_agent import __main__
__main__.RaspberryPi = lambda root: TestBoard()
sys.exit(__main__.main(["--settings", sys.argv[1], "run"]))
"""


def test_run_is_ready_until_systemd_stops_it(tmp_path: Path, ca: Ca) -> None:
    unit = Unit.make(tmp_path)
    provision(unit, ca, free_port())
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        with subprocess.Popen(
            [sys.executable, "-c", RUN, str(settings)],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "LG_WD": str(tmp_path)},
            stderr=subprocess.PIPE,
        ) as process:
            while systemd.recv(4096) != b"READY=1":
                pass
            process.terminate()
            _, complaints = process.communicate(timeout=20)

    assert process.returncode == 0, complaints.decode()


# --- imports ------------------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Top-level names of what a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def device_packages() -> set[str]:
    """Importable names of what requirements/device.lock installs."""
    lock = (ROOT / "requirements/device.lock").read_text()
    locked = {match.lower().replace("_", "-") for match in re.findall(r"^([A-Za-z0-9_.-]+)==", lock, re.MULTILINE)}
    names = {"lgpio"}  # for aarch64 only, so perhaps not installed here
    for module, distributions in importlib.metadata.packages_distributions().items():
        if any(name.lower().replace("_", "-") in locked for name in distributions):
            names.add(module)
    return names


def test_nothing_beyond_the_devices_lock_is_imported() -> None:
    allowed = device_packages() | set(sys.stdlib_module_names) | {"firmware_agent"}

    beyond = {str(path.relative_to(ROOT)): imported(path) - allowed for path in AGENT.rglob("*.py")}

    assert {path: names for path, names in beyond.items() if names} == {}


BLOCKER = """
import importlib.abc, sys

allowed = set(sys.argv[1].split(",")) | set(sys.stdlib_module_names) | {"firmware_agent"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and not top.startswith("_"):
            raise ImportError(f"{name} is not on the device")
        return None

sys.meta_path.insert(0, Blocker())
for module in sys.argv[2].split(","):
    __import__(module)
print(",".join(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_every_module_loads_where_only_the_devices_packages_are() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(AGENT.rglob("*.py"))
    ]

    loaded = subprocess.run(
        [sys.executable, "-c", BLOCKER, ",".join(device_packages()), ",".join(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert loaded.returncode == 0, loaded.stderr


def test_the_banner_loads_the_standard_library_alone() -> None:
    early = [f"firmware_agent.{name}" for name in EARLY if not name.startswith("__")]

    loaded = subprocess.run(
        [sys.executable, "-c", BLOCKER, "firmware_agent", ",".join(["firmware_agent.__main__", *early])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert loaded.returncode == 0, loaded.stderr
