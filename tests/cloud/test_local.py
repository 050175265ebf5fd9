"""The local cloud's life: started, found, stopped, killed, started again; and what it refuses to be."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloud import doctor, stack
from cloud.doctor import ThrowAwayAuthority
from cloud.errors import CloudUnreachable, LocalCloudError, StackMissingError
from cloud.local import launcher, overlay
from cloud.registry import Registry
from cloud.target import local_target
from tests.cloud.conftest import Fleet, alarm, eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory whose local cloud, if a test leaves one running, is stopped."""
    yield tmp_path / "state"
    launcher.down(tmp_path / "state")


def _listeners(pid: int) -> set[str]:
    """The addresses that a process listens on, from /proc (proc(5): net/tcp, state 0A)."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = str(descriptor.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


def test_up_twice_is_one_local_cloud(state: Path) -> None:
    first = launcher.up(state, port=0, mqtt_port=0)

    assert launcher.up(state, port=0, mqtt_port=0) == first
    assert launcher.find(state) == first


def test_two_commands_that_start_it_at_once_are_one_local_cloud(state: Path) -> None:
    command = [sys.executable, "-m", "cloud", "up", "--state", str(state), "--port", "0", "--mqtt-port", "0", "--json"]
    starting = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in starting]

    found = launcher.find(state)
    assert found is not None
    assert [json.loads(text)["pid"] for text in said] == [found.pid, found.pid]


def test_down_stops_it_and_down_again_is_no_error(state: Path) -> None:
    endpoint = launcher.up(state, port=0, mqtt_port=0)

    assert [launcher.down(state), launcher.down(state)] == [True, False]
    assert launcher.find(state) is None
    with pytest.raises(CloudUnreachable, match="up"):
        launcher.sms(endpoint)


def test_it_listens_on_loopback_only(fleet: Fleet) -> None:
    assert _listeners(fleet.cloud.pid) == {"0100007F"}


def test_it_outlives_the_command_that_started_it_and_another_command_stops_it(state: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cloud", *arguments, "--state", str(state)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    started = run("up", "--port", "0", "--mqtt-port", "0", "--json")
    found = launcher.find(state)
    stopped = run("down")

    assert (started.returncode, stopped.returncode) == (0, 0)
    assert found is not None
    assert json.loads(started.stdout)["pid"] == found.pid
    assert launcher.find(state) is None


def test_a_local_cloud_that_was_killed_is_no_obstacle_to_the_next(state: Path) -> None:
    killed = launcher.up(state, port=0, mqtt_port=0)
    os.kill(killed.pid, signal.SIGKILL)
    os.waitpid(killed.pid, 0)
    assert launcher.find(state) is None

    again = launcher.up(state, port=0, mqtt_port=0)

    assert again.pid != killed.pid
    assert launcher.find(state) == again


def test_a_stale_pid_of_somebody_elses_process_is_left_alone(state: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        state.mkdir()
        (state / "lock").write_text(str(bystander.pid))

        assert launcher.down(state) is False
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n", timeout=10)


def test_it_ends_with_the_process_that_wanted_it_for_a_while(state: Path) -> None:
    script = (
        "import os, pathlib, sys\nfrom cloud.local import launcher\n"
        f"with launcher.running(pathlib.Path({str(state)!r})):\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)

    eventually(lambda: launcher._owner(state) is None)


@pytest.mark.parametrize("which", ["port", "mqtt_port"])
def test_a_port_in_use_is_named(state: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]

        with pytest.raises(LocalCloudError, match=f"port {number} is in use"):
            launcher.up(state, **{"port": 0, "mqtt_port": 0, which: number})


def test_two_local_clouds_never_share_a_state_directory(fleet: Fleet) -> None:
    with pytest.raises(LocalCloudError, match="already runs"), launcher.running(fleet.state):
        pass


def test_what_it_knows_survives_a_stop_and_a_start(state: Path, tmp_path: Path) -> None:
    authority = ThrowAwayAuthority("Picket test CA, persistent")
    leaf = authority.leaf("PK-KEPT")
    with launcher.running(state, jitp_delay=(0, 0.1)):
        target = local_target(state)
        stack.deploy(target, build=tmp_path / "code")
        registry = Registry(target)
        registry.register_signing_ca(authority.pem, authority.verification)
        registry.owner("PK-KEPT", "+491701234567", "Europe/Berlin")
        trust = registry.trust_bundle()
        doctor.attempt(registry.endpoint(), trust, "PK-KEPT", leaf)
        eventually(lambda: registry.thing("PK-KEPT"))

    with launcher.running(state) as endpoint:
        target = local_target(state)
        registry = Registry(target)
        assert registry.trust_bundle() == trust
        with doctor.connection(registry.endpoint(), trust, "PK-KEPT", leaf) as (link, result):
            assert result.accepted
            assert link.publish("dt/picket/PK-KEPT/alarm", json.dumps(alarm()))
        text = eventually(lambda: launcher.sms(endpoint))[0]
        assert (text.to, stack.deploy(target, build=tmp_path / "code").changed) == ("+491701234567", False)


def test_the_outbox_can_be_read_from_a_moment_on(fleet: Fleet) -> None:
    assert launcher.sms(fleet.cloud, since=datetime.now(UTC)) == []


def test_the_users_own_aws_credentials_never_reach_the_local_cloud(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAREALREALREALREAL")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "real")
    monkeypatch.setenv("AWS_PROFILE", "does-not-exist")

    credentials = local_target(fleet.state).session.get_credentials()

    assert credentials is not None
    assert credentials.access_key == "picketlocal"
    assert not [name for name in launcher._environment() if name.startswith("AWS")]


def test_another_version_of_ministack_is_refused() -> None:
    with pytest.raises(LocalCloudError, match=r"written against ministack 1\.5\.33, installed is 1\.5\.34"):
        overlay.check_pinned(version="1.5.34")


@pytest.mark.parametrize(
    ("name", "signature", "complaint"),
    [("_mtls_gone", "()", "is gone"), ("_mtls_build_ssl_context", "(context) -> None", "has the signature")],
)
def test_a_name_that_the_overlay_needs_must_be_there_and_look_as_it_did(
    name: str, signature: str, complaint: str
) -> None:
    with pytest.raises(LocalCloudError, match=complaint):
        overlay.check_pinned(wrapped=[{"ministack.services.iot": {name: signature}}])


def test_no_stack_is_said_to_be_missing_with_the_command_that_deploys_it(state: Path) -> None:
    with launcher.running(state), pytest.raises(StackMissingError, match="python -m cloud deploy --target local"):
        stack.outputs(local_target(state))
