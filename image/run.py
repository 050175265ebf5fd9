"""The one way in which this package starts other programs, and the log of what they say."""

import os
import shlex
import shutil
import signal
import subprocess
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from image.errors import CommandFailedError, ImageError, LockError, RecipeError, SigningError, ToolMissingError

#: Where Debian keeps the tools of the administrator; not on every user's PATH.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_UMASK = 0o022


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


#: Where everything that is run, and what it says, is written down; see `logged`.
_log: ContextVar[IO[bytes] | None] = ContextVar("log", default=None)

#: So many last lines of what a program said are in the message of its failure.
TAIL = 15


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write down in a file every program that runs meanwhile, and what it says; a failure names the file.

    What was in the file is gone; somebody who still writes to it keeps the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("x+b", buffering=0) as file:
        token = _log.set(file)
        try:
            yield
        except (ImageError, OSError) as error:
            note(f"\n{error}")
            if not isinstance(error, RecipeError | LockError | SigningError):  # which say all that there is to say
                error.add_note(f"The whole log: {path}")
            raise
        except BaseException as error:
            note(f"\nended by {error!r}\n{traceback.format_exc()}")
            raise
        finally:
            _log.reset(token)


def note(text: str) -> None:
    """Write a line into the log, if there is one."""
    if (file := _log.get()) is not None:
        with suppress(OSError):  # a full disk: what it stops says so itself
            file.write(f"{text}\n".encode(errors="replace"))


def run(
    *command: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    log: Path | None = None,
) -> str:
    """Run a program to its end and return what it printed on stdout.

    It runs in one language, one time zone and with one umask, wherever it is called: what it makes is the same. It
    inherits the lock of the cache, and no other file of ours: Python opens all others for itself alone.

    Args:
        command: program and arguments, as text; the program is looked up in the administrator's directories too.
        env: variables to set on top of the present environment.
        cwd: directory to run in.
        stdin: bytes to feed; nothing by default.
        log: file that collects both output streams as they come, where there is no `logged` one; then the returned text
            is empty.

    Raises:
        ToolMissingError: the program is not installed.
        CommandFailedError: it ended with anything but 0.
    """
    arguments = [tool(str(command[0])), *map(str, command[1:])]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC", **(env or {})}
    note(f"$ {shlex.join(arguments)}")
    if log is not None:
        _run_into(log, arguments, environment, cwd, stdin)
        return ""
    done = subprocess.run(arguments, env=environment, cwd=cwd, input=stdin or b"", capture_output=True, check=False,
                          umask=_UMASK, close_fds=False)  # fmt: skip
    said = (done.stdout + done.stderr).decode(errors="replace")
    if said.strip():
        note(said.rstrip() if len(said) < _LONG else f"{said[:_LONG]}\n... {len(said) - _LONG} characters more")
    if done.returncode:
        raise CommandFailedError(_failure(arguments, done.returncode, said))
    return done.stdout.decode(errors="replace")


#: What a program says beyond this is data, and no help in a log.
_LONG = 20_000


def _run_into(
    log: Path, arguments: list[str], environment: Mapping[str, str], cwd: Path | None, stdin: bytes | None
) -> None:
    """Run a program whose words go straight into a file: what it said is there even if this machine goes down."""
    whole = _log.get()
    with log.open("w+b") if whole is None else nullcontext(whole) as sink:
        began = os.fstat(sink.fileno()).st_size
        done = subprocess.run(arguments, env=environment, cwd=cwd, input=stdin or b"", stdout=sink, stderr=sink,
                              check=False, umask=_UMASK, close_fds=False)  # fmt: skip
        said = os.pread(sink.fileno(), os.fstat(sink.fileno()).st_size - began, began).decode(errors="replace")
    if done.returncode:
        where = f"\n(all of it: {log})" if whole is None else ""
        raise CommandFailedError(_failure(arguments, done.returncode, said) + where)


def _failure(arguments: list[str], code: int, said: str) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with {code}"
    tail = "\n".join(said.strip().splitlines()[-TAIL:])
    return f"{arguments[0].rpartition('/')[2]} {how}:\n    {shlex.join(arguments)}\n{tail}"
