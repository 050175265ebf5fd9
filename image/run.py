"""The one way in which this package starts other programs."""

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from image.errors import CommandFailedError, ToolMissingError

#: Where Debian keeps the tools of the administrator; not on every user's PATH.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def tool(name: str) -> str:
    """The full path of a program.

    Raises:
        ToolMissingError: it is not installed.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    found = shutil.which(name, path=path)
    if found is None:
        raise ToolMissingError(f"{name} is not installed; `make setup` installs the system packages")
    return found


def multiarch() -> str:
    """This machine's multiarch triplet, under which Debian keeps its libraries."""
    return {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[run("dpkg", "--print-architecture").strip()]


def run(
    *command: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    log: Path | None = None,
) -> str:
    """Run a program to its end and return what it printed on stdout.

    Args:
        command: program and arguments, as text; the program is looked up in the administrator's directories too.
        env: variables to set on top of the present environment.
        cwd: directory to run in.
        stdin: bytes to feed; nothing by default.
        log: file that collects both output streams; then the returned text is empty.

    Raises:
        ToolMissingError: the program is not installed.
        CommandFailedError: it ended with anything but 0.
    """
    arguments = [tool(str(command[0])), *map(str, command[1:])]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    if log is None:
        done = subprocess.run(arguments, env=environment, cwd=cwd, input=stdin or b"", capture_output=True, check=False)
        said = (done.stdout + done.stderr).decode(errors="replace")
    else:
        with log.open("wb") as sink:
            done = subprocess.run(
                arguments, env=environment, cwd=cwd, input=stdin or b"", stdout=sink, stderr=sink, check=False
            )
        said = log.read_text(errors="replace")
    if done.returncode:
        raise CommandFailedError(_failure(arguments, done.returncode, said, log))
    return "" if log else done.stdout.decode(errors="replace")


def _failure(arguments: list[str], code: int, said: str, log: Path | None) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with {code}"
    tail = "\n".join(said.strip().splitlines()[-15:])
    where = f"\n(all of it: {log})" if log else ""
    return f"{arguments[0].rpartition('/')[2]} {how}:\n    {shlex.join(arguments)}\n{tail}{where}"
