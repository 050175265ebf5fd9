"""Are key and certificates this unit's, and do they belong together? Asked at each start, in a process of its own.

`python -m firmware_agent.vetting` answers for the settings on its standard input. The library that does this needs
ten megabytes, which a running agent would never give back; the process that has them ends. A unit whose key is in a
TPM needs that library anyway, and asks itself.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from os import environ, pathsep
from pathlib import Path
from typing import IO, Any, Final, Protocol, cast

from firmware_agent import errors, identity, keys
from firmware_agent.errors import AgentFault, UnitFault, WrongState
from firmware_agent.settings import Image, Key, Paths, Settings, Tpm

_log = logging.getLogger(__name__)

_SECONDS: Final = 60.0  # a slow board under load


class Verdict(Protocol):
    """What came of it; waits for it if need be."""

    def __call__(self) -> None:
        """Nothing, when all is well.

        Raises:
            NoTpm, KeyFault, WrongState, BadCertificate, KeyMismatch, WrongSubject: what is not.
        """
        ...


def judge(settings: Settings, board: str) -> None:
    """Look at key and certificates here and now.

    Args:
        settings: where they are.
        board: the SoC's serial, which the certificate may name.

    Raises:
        NoTpm, KeyFault, WrongState, BadCertificate, KeyMismatch, WrongSubject: what is wrong.
    """
    with closing(keys.open_store(settings)) as store:
        try:
            found = identity.load(settings.paths.identity)
        except WrongState:
            store.load()  # without a key, or a usable store, that is what is wrong
            raise
        identity.check(found, store.load(found.slot).public_key(), board)


@contextmanager
def begun(settings: Settings, board: str) -> Iterator[Verdict]:
    """Have another process look, beside what is done meanwhile."""
    if keys.grade(settings) == "tpm":
        yield lambda: judge(settings, board)
        return
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environ, "PYTHONPATH": pathsep.join(filter(None, sys.path))},
        )
    except OSError as error:
        _log.warning("key and certificates are looked at by the agent itself: %s", error)
        yield lambda: judge(settings, board)
        return
    with process:
        try:
            with suppress(BrokenPipeError), closing(cast("IO[bytes]", process.stdin)) as ear:
                ear.write(_question(settings, board))
            process.stdin = None
            yield lambda: _answer(process, settings, board)
        finally:
            process.kill()


def _answer(process: "subprocess.Popen[bytes]", settings: Settings, board: str) -> None:
    try:
        said, _ = process.communicate(timeout=_SECONDS)
        fault = json.loads(said)["fault"]
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        _log.warning("key and certificates are looked at by the agent itself: %s", error)
        judge(settings, board)
        return
    if fault is not None:
        raise _fault(**fault)


def _fault(code: str, message: str) -> AgentFault:
    """The fault with this code, as it was raised in the other process."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, AgentFault) and kind.code == code:
            return kind(message)
    return UnitFault(message)


def _question(settings: Settings, board: str) -> bytes:
    tables = {"key": asdict(settings.key), "tpm": asdict(settings.tpm), "paths": asdict(settings.paths)}
    return json.dumps({**tables, "board": board}, default=str).encode()


def _parse(question: bytes) -> tuple[Settings, str]:
    asked: dict[str, Any] = json.loads(question)
    tpm = {**asked["tpm"], "module": Path(asked["tpm"]["module"])}
    paths = Paths(**{name: Path(value) for name, value in asked["paths"].items()})
    return Settings(Image("", ""), key=Key(**asked["key"]), tpm=Tpm(**tpm), paths=paths), asked["board"]


def main() -> None:
    """Answer one question."""
    fault = None
    try:
        judge(*_parse(sys.stdin.buffer.read()))
    except AgentFault as found:
        fault = {"code": found.code, "message": str(found)}
    print(json.dumps({"fault": fault}))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
