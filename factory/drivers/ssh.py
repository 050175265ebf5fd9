"""The way into a unit: SSH with Fabric, pinned to the host key that the unit's banner carried over the console.

The factory key opens one thing only, the agent's provisioning wire (a forced command on the unit).
"""

import base64
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import fabric
import paramiko
from paramiko.pkey import PKey

from factory.errors import LinkFault, StationFault, UnitFault
from firmware_agent.wire import (
    Banner,
    Event,
    Fault,
    LinkLostError,
    MalformedError,
    Request,
    Result,
    decode_reply,
    encode_request,
)

# What paramiko logs it also raises, and what it raises is told in the line's own words.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

USER = "picket"
CONNECT_SECONDS = 30.0

Locate = Callable[[Banner], tuple[str, int]]


def first_address(banner: Banner) -> tuple[str, int]:
    """Where a unit on the factory's own network is: the first address of its banner."""
    if not banner.addresses:
        raise UnitFault(
            f"board {banner.board} has no network address", advice="Check its network cable, then run the unit again."
        )
    return banner.addresses[0], 22


class SshShell:
    """SSH into units in factory mode. `locate` tells from the banner where a unit's SSH is."""

    def __init__(self, key: Path, locate: Locate = first_address, user: str = USER) -> None:
        self._key = key
        self._locate = locate
        self._user = user

    @contextmanager
    def open(self, banner: Banner) -> Iterator["SshAgent"]:
        """A session with the agent, on a connection that is pinned to the banner's host key.

        Raises:
            UnitFault: another host key, or the factory key is refused.
            LinkFault: nobody answers.
        """
        host, port = self._locate(banner)
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                connection = self._connect(banner, host, port)
                break
            except (OSError, EOFError, paramiko.SSHException) as error:
                self._judge(error, banner, host, port)
                if time.monotonic() > deadline:
                    raise LinkFault(
                        f"board {banner.board} does not answer SSH at {host}:{port}: {error}",
                        advice="Check the unit's network cable; then run it again.",
                    ) from error
                time.sleep(0.5)
        with connection:
            try:
                channel = connection.transport.open_session(timeout=CONNECT_SECONDS)
                channel.exec_command("provision")
            except (OSError, EOFError, paramiko.SSHException) as error:
                raise LinkFault(
                    f"the link to board {banner.board} broke before the agent answered: {error or 'it was closed'}",
                    advice="Check the unit's power and network cable; then run it again.",
                ) from error
            with channel:
                yield SshAgent(channel)

    def closed(self, banner: Banner) -> bool:
        """Whether the way in is shut: nobody answers at its port, or the factory key is refused."""
        host, port = self._locate(banner)
        try:
            connection = self._connect(banner, host, port)
        except (OSError, EOFError, paramiko.SSHException):
            return True
        connection.close()
        return False

    def _connect(self, banner: Banner, host: str, port: int) -> Any:
        if not self._key.exists():
            raise StationFault(
                f"the factory key {self._key} is missing",
                advice="It is made together with the image: build the image again, or restore the key.",
            )
        connection = fabric.Connection(
            host,
            user=self._user,
            port=port,
            config=fabric.Config(lazy=True),
            connect_timeout=10,
            connect_kwargs={
                "key_filename": str(self._key),
                "allow_agent": False,
                "look_for_keys": False,
                "banner_timeout": 30,
                "auth_timeout": 30,
            },
        )
        client = connection.client
        client._system_host_keys.clear()  # noqa: SLF001  (paramiko has no public way to forget the user's own)
        client.get_host_keys().clear()
        kind, _, material = banner.host_key.partition(" ")
        name = host if port == 22 else f"[{host}]:{port}"
        client.get_host_keys().add(name, kind, PKey.from_type_string(kind, base64.b64decode(material.split()[0])))
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        try:
            connection.open()
        except BaseException:
            connection.close()
            raise
        return connection

    def _judge(self, error: Exception, banner: Banner, host: str, port: int) -> None:
        """Raise what no second try can mend."""
        if isinstance(error, paramiko.BadHostKeyException):
            raise UnitFault(
                f"the unit at {host}:{port} shows another SSH host key than board {banner.board} printed on its "
                "console",
                advice="Two units are crossed, or somebody is in between: check the cables; do not go on.",
            ) from error
        if isinstance(error, paramiko.AuthenticationException):
            raise UnitFault(
                f"board {banner.board} refuses the factory key",
                advice="Its image was built for another factory key. Build the image at this station.",
            ) from error


class SshAgent:
    """The agent's wire over one SSH channel."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._rest = b""
        self._numbers = count(1)

    def ask(
        self,
        verb: str,
        params: Mapping[str, Any] | None = None,
        *,
        seconds: float = 30.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Ask one verb and wait for its result.

        Raises:
            UnitFault: the agent answered with a fault, or with something that is no answer.
            StationFault: the agent says that the station asked wrongly.
            LinkFault: no answer within `seconds`, or the link broke.
        """
        number = next(self._numbers)
        deadline = time.monotonic() + seconds
        try:
            self._channel.sendall(encode_request(Request(number, verb, dict(params or {}))))
            while True:
                match decode_reply(self._readline(verb, deadline)):
                    case Event(id=id_, event=event) if id_ == number:
                        if on_event is not None:
                            on_event(event)
                    case Result(id=id_, result=result) if id_ == number:
                        return result
                    case Fault(code="bad-request", message=message):
                        raise StationFault(
                            f"the unit does not understand {verb!r}: {message}",
                            advice="Image and station are of different releases: flash the image of this release.",
                        )
                    case Fault(id=id_, code=code, message=message) if id_ == number:
                        raise UnitFault(
                            f"the unit failed at {verb!r} ({code}): {message}",
                            advice="Run the unit again; if it fails in the same way, put it on the repair shelf.",
                        )
                    case _:
                        continue  # an answer to a question that timed out before
        except (LinkLostError, OSError, EOFError) as error:
            raise LinkFault(
                f"the link to the unit broke while it worked on {verb!r}",
                advice="Check the unit's power and network cable; then run it again.",
            ) from error
        except MalformedError as error:
            raise UnitFault(f"the unit answered {verb!r} with something that is no answer: {error}") from error

    def _readline(self, verb: str, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LinkFault(
                    f"the unit did not answer {verb!r} in time",
                    advice="Look at its console; then run it again.",
                )
            self._channel.settimeout(min(left, 1.0))
            try:
                data = self._channel.recv(65536)
            except (TimeoutError, socket.timeout):  # noqa: UP041  (paramiko raises its own alias on 3.11)
                continue
            if not data:
                raise LinkLostError("the unit closed the session")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line + b"\n"
