"""What the local cloud's process and its launcher tell each other through the state directory."""

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

ACCOUNT = "000000000000"
REGION = "us-east-1"

#: Sent to the local cloud so that nobody's real keys are. It checks roles and policies, not signatures.
ACCESS_KEY = SECRET_KEY = "picketlocal"  # noqa: S105 - opens nothing

#: Under this name a device outside this machine's network namespace (the virtual Pi) knows the local cloud.
DEVICE_DOMAIN = "picket.test"

#: And at this address: where QEMU's user network has its host's loopback. A unit takes URLs without TLS from private
#: addresses only, so a job's URLs cannot use the name.
DEVICE_ADDRESS = "10.0.2.2"

DEFAULT_STATE = Path("build/cloud")
DEFAULT_PORT, DEFAULT_MQTT_PORT = 4566, 8883


@dataclass(frozen=True)
class Settings:
    """How a local cloud runs. Ports of 0 mean any free one.

    `retry_seconds` is AWS's first wait before it calls a failed function again, `minute_seconds` a minute of its jobs.
    """

    state: str
    port: int
    mqtt_port: int
    jitp_delay: tuple[float, float] = (1.0, 3.0)
    retry_seconds: float = 60.0
    minute_seconds: float = 60.0
    log_level: str = "INFO"
    follow: int | None = None


@dataclass(frozen=True)
class LocalEndpoint:
    """Where a running local cloud listens.

    `mqtt_host` is the name for devices on this machine. `device_host` is an AWS-shaped name for devices elsewhere (the
    virtual Pi's guest), which they resolve to wherever they see this machine; the server's certificate has both.
    """

    url: str
    mqtt_host: str
    mqtt_port: int
    device_host: str
    region: str
    pid: int


def read_endpoint(state: Path) -> LocalEndpoint | None:
    """The endpoint that the local cloud of this state directory wrote, or None."""
    try:
        return LocalEndpoint(**json.loads((state / "endpoint.json").read_text()))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, TypeError):
        return None


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file that is either the old one or the new one, whatever happens."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
