"""The local cloud's process: binds its two sockets, puts the overlay in place, serves until it is told to stop.

Started by `launcher` as `python -m cloud.local.server SETTINGS.json`. It owns its state directory by a lock held for
its whole life, and says that it is ready by writing `endpoint.json` there.
"""

import asyncio
import contextlib
import fcntl
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from cloud.errors import LocalCloudError
from cloud.local import jobs, overlay
from cloud.local.endpoint import (
    ACCESS_KEY,
    ACCOUNT,
    DEVICE_DOMAIN,
    REGION,
    SECRET_KEY,
    LocalEndpoint,
    Settings,
    write_atomically,
)

LOOPBACK = "127.0.0.1"

#: What the stack needs. Everything else of ministack stays off, with its listeners.
SERVICES = "cloudformation,cloudwatch,dynamodb,iam,iot,iot-data,lambda,logs,monitoring,s3,sns,sqs,sts"

#: How often warm instances are looked after and the state is written down.
TEND_SECONDS, SAVE_SECONDS = 0.5, 10.0

log = logging.getLogger("picket.local")


def main(arguments: list[str], amend: Callable[[overlay.Behaviour, socket.socket], None] = overlay.install) -> int:
    """Serve the local cloud that the settings file describes; the exit code is 0, or 3 with the reason on stderr."""
    settings = Settings(**json.loads(Path(arguments[0]).read_text()))
    try:
        with _owned(Path(settings.state)), _bound(settings.port) as http, _bound(settings.mqtt_port) as mqtt:
            _configure(settings, http.getsockname()[1])
            overlay.check_pinned()
            amend(overlay.Behaviour(settings.jitp_delay, settings.minute_seconds), mqtt)
            asyncio.run(_serve(settings, http, mqtt))
    except LocalCloudError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the launcher reads it from the log
        return 3
    return 0


@contextlib.contextmanager
def _owned(state: Path) -> Any:
    """Hold the state directory's lock. Whoever holds it is the one local cloud of that directory."""
    with (state / "lock").open("a+") as lock:
        _lock(lock, state)
        _write_pid(lock)
        (state / "endpoint.json").unlink(missing_ok=True)  # what a killed local cloud left behind
        shutil.rmtree(state / "tmp", ignore_errors=True)
        try:
            yield
        finally:
            (state / "endpoint.json").unlink(missing_ok=True)


def _lock(lock: IO[str], state: Path) -> None:
    """Take the lock; a launcher that looks whether it is free holds it for a moment, so look more than once."""
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return
    raise LocalCloudError(f"a local cloud already runs on {state}: stop it by `python -m cloud down`")


def _write_pid(lock: IO[str]) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def _bound(port: int) -> socket.socket:
    """A listening socket on loopback.

    Raises:
        LocalCloudError: somebody else has the port.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise LocalCloudError(f"port {port} is in use: stop what listens there, or choose another port") from error
    return listener


def _configure(settings: Settings, port: int) -> None:
    """Ministack reads its settings from the environment when it is imported, so this comes first."""
    state = Path(settings.state)
    temporary = state / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ.update(
        AUTH="true",
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        BIND_HOST=LOOPBACK,
        DOCKER_HOST="unix:///nonexistent",  # a developer's Docker is not ours to sweep
        GATEWAY_PORT=str(port),
        IOT_MTLS_ENABLED="1",
        LAMBDA_ASYNC_RETRY_BASE_SECONDS=str(settings.retry_seconds),
        LAMBDA_ASYNC_RETRY_MAX_SECONDS=str(settings.retry_seconds * 5),
        LAMBDA_EXECUTOR="local",
        LOG_LEVEL=settings.log_level,
        MINISTACK_ACCOUNT_ID=ACCOUNT,
        MINISTACK_HOST=DEVICE_DOMAIN,
        MINISTACK_REGION=REGION,
        AWS_DEFAULT_REGION=REGION,
        PERSIST_STATE="1",
        S3_DATA_DIR=str(state / "s3"),
        S3_PERSIST="1",
        SERVICES=SERVICES,
        SFTP_ENABLED="0",
        STATE_DIR=str(state / "services"),
        TMPDIR=str(temporary),
    )


async def _serve(settings: Settings, http: socket.socket, mqtt: socket.socket) -> None:
    hypercorn = importlib.import_module("hypercorn.asyncio")
    app = importlib.import_module("ministack.app")
    config = importlib.import_module("hypercorn.config").Config()
    port = http.getsockname()[1]
    config.bind = [f"fd://{http.detach()}"]  # hypercorn closes it
    config.loglevel = settings.log_level
    config.keep_alive_timeout = 75
    config.graceful_timeout = 0.5
    logging.getLogger("persistence").setLevel(logging.WARNING)  # it names every file, every time
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if settings.follow is not None:  # the launcher's end of this pipe closes when the launcher dies
        loop.add_reader(settings.follow, stop.set)
    tending = asyncio.create_task(_tend(settings, port, mqtt.getsockname()[1]))
    tending.add_done_callback(lambda task: None if task.cancelled() else stop.set())
    await hypercorn.serve(app.app, config, shutdown_trigger=stop.wait)
    tending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tending


async def _tend(settings: Settings, port: int, mqtt_port: int) -> None:
    """Say when everything listens; then keep functions warm and the state on disk."""
    iot = importlib.import_module("ministack.services.iot")
    while not (iot.mtls_is_listening() and await _answers(port)):  # noqa: ASYNC110 - no event to wait for
        await asyncio.sleep(0.02)
    await iot._mtls_context()  # noqa: SLF001 - makes the server's key now rather than in the first handshake
    endpoint = LocalEndpoint(
        url=f"http://{LOOPBACK}:{port}",
        mqtt_host="localhost",
        mqtt_port=mqtt_port,
        device_host=f"{iot._endpoint_prefix(ACCOUNT)}-ats.iot.{REGION}.{DEVICE_DOMAIN}",  # noqa: SLF001
        region=REGION,
        pid=os.getpid(),
    )
    write_atomically(Path(settings.state) / "endpoint.json", json.dumps(asdict(endpoint), indent=2))
    log.info("ready: %s, MQTT on port %d", endpoint.url, mqtt_port)
    saved = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(TEND_SECONDS)
        await jobs.sweep()
        await asyncio.to_thread(overlay.keep_functions_warm)
        if asyncio.get_running_loop().time() - saved > SAVE_SECONDS:
            overlay.save_state()
            saved = asyncio.get_running_loop().time()


async def _answers(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    try:
        writer.write(b"GET /_ministack/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await writer.drain()
        return b" 200 " in await asyncio.wait_for(reader.readline(), 1)
    except (TimeoutError, OSError):
        return False
    finally:
        writer.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
