"""Start, find and stop the local cloud.

One local cloud per state directory. Its process holds the lock `<state>/lock` for its whole life and writes its pid
into it, so a lock that is free means that nothing runs, whatever a stale pid says, and a lock that is held means that
the pid in it is the right one to stop.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cloud.errors import CloudUnreachable, LocalCloudError
from cloud.local.endpoint import (
    DEFAULT_MQTT_PORT,
    DEFAULT_PORT,
    DEFAULT_STATE,
    LocalEndpoint,
    Settings,
    read_endpoint,
    write_atomically,
)

START_SECONDS = 30.0
STOP_SECONDS = 15.0

#: How the process is started; tests put a weakened server here to prove that the doctor sees it.
SERVER: Sequence[str] = ("-m", "cloud.local.server")

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sms:
    """A text message in the outbox. Nothing leaves the machine: this is where a phone would have buzzed."""

    to: str
    text: str
    at: datetime
    message_id: str


def up(
    state: Path = DEFAULT_STATE,
    *,
    port: int = DEFAULT_PORT,
    mqtt_port: int = DEFAULT_MQTT_PORT,
    jitp_delay: tuple[float, float] = (1.0, 3.0),
    retry_seconds: float = 60.0,
    minute_seconds: float = 60.0,
    server: Sequence[str] = SERVER,
    follow: int | None = None,
) -> LocalEndpoint:
    """Start the local cloud of a state directory, or find it running; returns when it listens.

    Args:
        state: where its state is kept; made if absent.
        port: the HTTP port for the AWS interfaces, 0 for any free one.
        mqtt_port: the MQTT port for devices, 0 for any free one.
        jitp_delay: seconds, shortest and longest, from JITP's hang-up until the certificate is ACTIVE.
        retry_seconds: the wait before a failed function is called again; AWS's is a minute.
        minute_seconds: how long a minute of the jobs' rates and timers is.
        server: the Python arguments that start the process.
        follow: read end of a pipe; when its other end closes, the local cloud stops.

    Raises:
        LocalCloudError: it did not start; the message carries the reason.
    """
    state = state.resolve()
    owner = _owner(state)
    if owner is not None:
        return _wait_until_ready(state, owner, lambda: None if _owner(state) else 1)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalCloudError(f"no state can be kept in {state}: {error.strerror}") from error
    settings = Settings(
        state=str(state),
        port=port,
        mqtt_port=mqtt_port,
        jitp_delay=jitp_delay,
        retry_seconds=retry_seconds,
        minute_seconds=minute_seconds,
        follow=follow,
    )
    write_atomically(state / "settings.json", json.dumps(asdict(settings)))
    with (state / "log").open("a") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, *server, str(state / "settings.json")],
            cwd=_ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=() if follow is None else (follow,),
        )
    try:
        endpoint = _wait_until_ready(state, process.pid, process.poll, begin)
    except LocalCloudError:
        process.kill()
        process.wait()
        owner = _owner(state)
        if owner is None:
            raise
        return _wait_until_ready(state, owner, lambda: None if _owner(state) else 1)  # another command was quicker
    process.returncode = 0  # it lives on without us: not a child that was forgotten
    return endpoint


def _environment() -> dict[str, str]:
    """The user's AWS settings never reach the local cloud, nor its functions."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONUNBUFFERED": "1"}


def _wait_until_ready(state: Path, pid: int, ended: Callable[[], int | None], log_begin: int = 0) -> LocalEndpoint:
    """The endpoint once the process has written it; `ended` is the process's exit code as soon as it has one."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        endpoint = read_endpoint(state)
        if endpoint is not None and endpoint.pid == pid:
            return endpoint
        code = ended()
        if code is not None:
            raise LocalCloudError(_reason(state, code, log_begin))
        time.sleep(0.02)
    raise LocalCloudError(f"the local cloud did not get ready in {START_SECONDS:.0f} s: see {state / 'log'}")


def _reason(state: Path, code: int, log_begin: int) -> str:
    lines = (state / "log").read_bytes()[log_begin:].decode(errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else f"the local cloud ended with {code}: see {state / 'log'}"


def find(state: Path = DEFAULT_STATE) -> LocalEndpoint | None:
    """The local cloud that runs on this state directory and is ready, or None."""
    return read_endpoint(state) if _owner(state) is not None else None


def _owner(state: Path) -> int | None:
    """The pid that holds the state directory's lock, or None when nobody does."""
    deadline = time.monotonic() + 1
    while True:
        try:
            with (state / "lock").open("r+") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    written = lock.read()
                else:
                    return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        if written or time.monotonic() > deadline:  # between taking the lock and writing lies a moment
            return int(written or 0) or None
        time.sleep(0.01)


def down(state: Path = DEFAULT_STATE) -> bool:
    """Stop the local cloud of this state directory and wait until it is gone; its state stays.

    Returns:
        Whether one was running.

    Raises:
        LocalCloudError: it does not stop.
    """
    state = state.resolve()
    pid = _owner(state)
    if pid is None:
        with contextlib.suppress(NotADirectoryError):
            (state / "endpoint.json").unlink(missing_ok=True)
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _owner(state) is not None:
        if time.monotonic() > deadline:
            raise LocalCloudError(f"the local cloud (pid {pid}) does not stop: see {state / 'log'}")
        time.sleep(0.02)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)  # collect it where it was started by this very process
    return True


@contextlib.contextmanager
def running(
    state: Path,
    *,
    port: int = 0,
    mqtt_port: int = 0,
    jitp_delay: tuple[float, float] = (1.0, 3.0),
    retry_seconds: float = 60.0,
    minute_seconds: float = 60.0,
    server: Sequence[str] = SERVER,
) -> Iterator[LocalEndpoint]:
    """A local cloud for the length of a `with` block, on free ports; it also ends when this process is killed.

    Raises:
        LocalCloudError: it did not start, or another one already runs on this state directory.
    """
    if _owner(state.resolve()) is not None:
        raise LocalCloudError(f"a local cloud already runs on {state}: stop it by `python -m cloud down`")
    follow, ours = os.pipe()
    try:
        endpoint = up(
            state,
            port=port,
            mqtt_port=mqtt_port,
            jitp_delay=jitp_delay,
            retry_seconds=retry_seconds,
            minute_seconds=minute_seconds,
            server=server,
            follow=follow,
        )
        try:
            yield endpoint
        finally:
            down(state)
    finally:
        os.close(follow)
        os.close(ours)


def fetch(endpoint: LocalEndpoint, path: str) -> str:
    """What the local cloud's own interface answers; never by way of a proxy.

    Raises:
        CloudUnreachable: the local cloud does not answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(endpoint.url + path, timeout=5) as answer:
            text: str = answer.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:
        raise CloudUnreachable(f"no local cloud at {endpoint.url}: start it by `python -m cloud up`") from error
    return text


def sms(endpoint: LocalEndpoint, since: datetime | None = None) -> list[Sms]:
    """The text messages in the outbox, oldest first, from `since` (aware, inclusive) on.

    Raises:
        CloudUnreachable: the local cloud does not answer.
    """
    outbox = json.loads(fetch(endpoint, "/_ministack/sns/sms-messages"))
    found = [
        Sms(number, entry["Message"], datetime.fromtimestamp(entry["PublishedAt"], UTC), entry["MessageId"])
        for number, entries in outbox["sms_messages"].items()
        for entry in entries
    ]
    return sorted((message for message in found if since is None or message.at >= since), key=lambda m: m.at)
