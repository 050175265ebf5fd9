"""The kind `collect-logs`: put the log, the unit's state in words and its versions where the job says, redacted.

    collect   text ──▶ redacted ──▶ gzip, in the scratch directory
    upload    PUT to the presigned URL; a URL that has expired is asked for anew

What is uploaded is bounded in lines and bytes, newest last. The URL is a secret: no message holds more than its host.
"""

import gzip
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from firmware_agent.errors import AgentFault
from firmware_agent.jobs import document
from firmware_agent.jobs.kind import Context, Done, Next, Phase, Result
from firmware_agent.jobs.redact import redact
from firmware_agent.jobs.single import Single

_log = logging.getLogger(__name__)

#: How much of the log is taken, newest last.
MAX_LINES: Final = 5000
MAX_BYTES: Final = 4 << 20

_UPLOADS: Final = 3
_EXPIRED: Final = frozenset({400, 401, 403, 410})
_SECONDS: Final = 30.0

#: The unit's log as text, newest last; bounded.
LogSource = Callable[[], str]


class UploadFault(AgentFault):
    """Nobody takes the log."""

    code = "upload"


class _Expired(UploadFault):
    """The URL is not taken (any more)."""


def journal() -> str:
    """What systemd's journal has of our units: this boot's and earlier ones'.

    Raises:
        OSError: there is no journalctl.
        UploadFault: it says nothing but an error.
    """
    command = ["journalctl", "--unit=picket-*", "--no-pager", "--quiet", "--output=short-iso-precise", "--utc"]
    done = subprocess.run(
        [*command, f"--lines={MAX_LINES}"], capture_output=True, check=False, timeout=120, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise UploadFault(f"journalctl ended with {done.returncode}: {done.stderr.decode(errors='replace')[:200]}")
    return tail(done.stdout)


def tail(data: bytes) -> str:
    """The last lines of a log, whole ones, within the bounds."""
    if len(data) > MAX_BYTES:
        data = data[-MAX_BYTES:].partition(b"\n")[2]
    lines = data.decode(errors="replace").splitlines()[-MAX_LINES:]
    return "\n".join(lines) + "\n" if lines else ""


def log_file(path: Path) -> LogSource:
    """The end of a log file, where there is no journal."""

    def read() -> str:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MAX_BYTES - 1))
            return tail(file.read())

    return read


class CollectLogs(Single):
    """Upload the log.

    Args:
        source: the log.
        status: the unit's state and versions, in words.
        authorities: PEM certificates that the server may chain to, beside the system's.
    """

    operation = "collect-logs"

    def __init__(self, source: LogSource, status: Callable[[], str], *, authorities: str = "") -> None:
        self._source = source
        self._status = status
        self._authorities = authorities
        self.phases = (
            Phase("collect", self._collect, code="upload"),
            Phase("upload", self._upload, code="upload"),
        )

    def _collect(self, context: Context) -> Result:
        parts = []
        for title, part in (("status", self._status), ("log", self._source)):
            try:
                text = part()
            except (AgentFault, OSError, subprocess.SubprocessError) as error:
                text = f"(not to be had: {error})\n"  # half of the truth is better than none
            parts.append(f"==== {title} ====\n{text}")
        # mtime 0: the same text makes the same bytes, so that an upload that was repeated is the same object.
        packed = gzip.compress(redact("\n".join(parts)).encode(), mtime=0)
        self._file(context).write_bytes(packed)
        return Next()

    def _upload(self, context: Context) -> Result:
        if not self._file(context).exists():
            self._collect(context)  # a power cut took it: it was never made durable
        data = self._file(context).read_bytes()
        wanted = context.document
        for left in reversed(range(_UPLOADS)):
            if not isinstance(wanted, document.CollectLogs):
                raise TypeError(f"no document to collect logs by: {wanted!r}")
            try:
                put(wanted.upload, data, authorities=self._authorities)
            except UploadFault as fault:
                if not left:
                    raise
                _log.info("%s; once more", fault)
                context.wait(0.0 if isinstance(fault, _Expired) else 1.0)
                wanted = context.refresh()
            else:
                return Done({"bytes": str(len(data))})
        raise AssertionError  # the last attempt returns or raises

    def _file(self, context: Context) -> Path:
        return context.scratch / "log.gz"


def put(url: str, data: bytes, *, authorities: str = "") -> None:
    """Upload `data`.

    Raises:
        UploadFault: the server does not take it, or nobody answers.
    """
    import ssl  # noqa: PLC0415 - only while there is something to upload

    import urllib3  # noqa: PLC0415

    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs URLs, and these are secrets
    host = urlsplit(url).hostname
    context = ssl.create_default_context()
    if authorities:
        context.load_verify_locations(cadata=authorities)
    with urllib3.PoolManager(ssl_context=context, retries=False, timeout=_SECONDS) as pool:
        try:
            status = pool.request("PUT", url, body=data, redirect=False).status
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UploadFault(f"{host} does not take the log: {type(error).__name__}") from None
    if status in _EXPIRED:
        raise _Expired(f"{host} does not take this URL: {status}")
    if status not in {200, 201, 204}:
        raise UploadFault(f"{host} does not take the log: {status}")
