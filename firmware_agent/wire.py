"""The factory's wire: one JSON object per line, used by both ends.

The station writes a request line, the unit answers with any number of event lines and exactly one answer line:

    {"id": 1, "verb": "identify", "params": {}}
    {"id": 1, "event": {"edge": "rising", "at": 12.5}}
    {"id": 1, "result": {...}}            or            {"id": 1, "fault": {"code": "no-tpm", "message": "..."}}

The wire runs over anything with `readline`, `write` and `flush`: an SSH channel, a socket, a pty. A line is at most
`MAX_LINE` bytes; a line without its newline is a broken link, never an answer.
"""

import json
import zlib
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_LINE = 256 * 1024

#: A unit proves its key by signing this and the station's nonce, so it can never be made to sign anything else.
PROOF_CONTEXT = b"picket-prove-v1\0"

#: Behind this prefix stands the factory banner on the serial console: a CRC-32 in hex, a space, one JSON object. A
#: console loses and garbles characters, and what the banner carries is trusted, so a line that came through damaged
#: must not be taken for one that did not.
BANNER_PREFIX = "PICKET-FACTORY "


class Stream(Protocol):
    """A byte stream with lines."""

    def readline(self, limit: int = -1, /) -> bytes:
        """The next line with its newline; shorter or empty when the link is gone."""
        ...

    def write(self, data: bytes, /) -> Any:
        """Send bytes."""
        ...

    def flush(self) -> None:
        """Push what was written on its way."""
        ...


class LinkLostError(Exception):
    """The other end is gone, or a line broke off in the middle."""


class MalformedError(ValueError):
    """A line that is no message of this wire."""


@dataclass(frozen=True)
class Request:
    """What the station asks: a verb with its parameters."""

    id: int
    verb: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that the unit saw while a verb runs."""

    id: int
    event: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A verb that succeeded."""

    id: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A verb that failed on the unit: `code` for programs, `message` for people."""

    id: int
    code: str
    message: str


Reply = Event | Result | Fault


@dataclass(frozen=True)
class Banner:
    """What a unit in factory mode says on its console.

    `board` is the SoC serial (16 hex digits), `addresses` are where SSH listens, `host_key` is the SSH host key in
    OpenSSH's one-line form (`ssh-ed25519 AAAA...`), to which the station pins its connection.
    """

    board: str
    addresses: tuple[str, ...]
    host_key: str
    agent: str
    image: str
    boot_id: str

    def line(self) -> str:
        """The console line, prefix included, without a newline."""
        body = {
            "board": self.board,
            "addresses": list(self.addresses),
            "host_key": self.host_key,
            "agent": self.agent,
            "image": self.image,
            "boot_id": self.boot_id,
        }
        text = json.dumps(body, separators=(",", ":"))
        return f"{BANNER_PREFIX}{_checksum(text)} {text}"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def parse_banner(line: str) -> Banner | None:
    """The banner in a console line, or None: consoles carry other text too, and lines cut by a late start.

    Raises:
        MalformedError: behind the prefix stands a JSON object, whole by its checksum, that is no banner.
    """
    _, prefix, rest = line.partition(BANNER_PREFIX)
    checksum, _, body = rest.strip().partition(" ")
    if not prefix or checksum != _checksum(body):
        return None
    try:
        value = json.loads(body)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    texts = {name: value.get(name) for name in ("board", "host_key", "agent", "image", "boot_id")}
    addresses = value.get("addresses")
    if (
        not all(isinstance(text, str) for text in texts.values())
        or not isinstance(addresses, list)
        or not all(isinstance(address, str) for address in addresses)
    ):
        msg = f"a factory banner lacks a field: {body.strip()[:200]}"
        raise MalformedError(msg)
    return Banner(addresses=tuple(addresses), **{name: str(text) for name, text in texts.items()})


def _encode(message: dict[str, Any]) -> bytes:
    line = json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    if len(line) > MAX_LINE:
        msg = f"a message of {len(line)} bytes is longer than a line may be ({MAX_LINE})"
        raise MalformedError(msg)
    return line


def encode_request(request: Request) -> bytes:
    """The request as one line."""
    return _encode({"id": request.id, "verb": request.verb, "params": request.params})


def encode_reply(reply: Reply) -> bytes:
    """The event, result or fault as one line."""
    match reply:
        case Event():
            return _encode({"id": reply.id, "event": reply.event})
        case Result():
            return _encode({"id": reply.id, "result": reply.result})
        case Fault():
            return _encode({"id": reply.id, "fault": {"code": reply.code, "message": reply.message}})


def _decode(line: bytes) -> tuple[int, dict[str, Any]]:
    if not line.endswith(b"\n"):
        raise LinkLostError("the link broke off" + (" inside a line" if line else ""))
    try:
        message = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"a line that is not JSON: {line[:80]!r}"
        raise MalformedError(msg) from error
    if not isinstance(message, dict) or type(message.get("id")) is not int:
        msg = f"a message without an id: {line[:80]!r}"
        raise MalformedError(msg)
    return message["id"], message


def decode_request(line: bytes) -> Request:
    """The request in a line.

    Raises:
        LinkLostError: the line has no newline.
        MalformedError: it is no request.
    """
    number, message = _decode(line)
    verb, params = message.get("verb"), message.get("params", {})
    if not isinstance(verb, str) or not isinstance(params, dict):
        msg = f"a request without a verb: {line[:80]!r}"
        raise MalformedError(msg)
    return Request(number, verb, params)


def decode_reply(line: bytes) -> Reply:
    """The event, result or fault in a line.

    Raises:
        LinkLostError: the line has no newline.
        MalformedError: it is none of the three.
    """
    number, message = _decode(line)
    match message:
        case {"event": dict(event)}:
            return Event(number, event)
        case {"result": dict(result)}:
            return Result(number, result)
        case {"fault": {"code": str(code), "message": str(text)}}:
            return Fault(number, code, text)
        case _:
            msg = f"a reply that is neither event, result nor fault: {line[:80]!r}"
            raise MalformedError(msg)
