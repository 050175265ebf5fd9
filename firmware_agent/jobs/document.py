"""Job documents: what the cloud asks of this unit, parsed once into frozen values.

A document is a hint, never an authority: what an update may install is decided by signed metadata, and whoever can
write jobs can at worst make a unit busy. Unknown keys are refused by name, so that a misspelt one is found at the first
unit and not in the field.

    {"picket": 1, "operation": "update", "product": "picket",
     "target": "agent/picket-agent-1.2.0.tar.zst", "version": "1.2.0",
     "metadata": "https://…/metadata/", "urls": {"agent/picket-agent-1.2.0.tar.zst": "https://…?X-Amz-…"}}
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import urlsplit

FORMAT: Final = 1

_TARGET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)+")
_VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,63}")


class BadDocument(Exception):
    """A document that this unit will not follow; `code` is what the rejection says."""

    def __init__(self, code: Literal["bad-document", "unknown-operation", "wrong-product"], message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Bundle:
    """What `update` and `os-update` ask for.

    Attributes:
        target: path of the full archive among the signed targets.
        version: for people; the signed one counts.
        metadata: base URL of the signed metadata.
        urls: where to get what, by target path; presigned ones are secrets and expire within the hour.
    """

    target: str
    version: str
    metadata: str
    urls: Mapping[str, str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r}, {self.version!r})"  # URLs may be presigned


class Update(Bundle):
    """Install another release of the agent."""


class OsUpdate(Bundle):
    """Install another image."""


@dataclass(frozen=True)
class RotateCertificate:
    """Get a new key and certificate."""


@dataclass(frozen=True)
class SelfTest:
    """Look at yourself and say what you see."""


@dataclass(frozen=True)
class Reboot:
    """Restart the board."""


@dataclass(frozen=True)
class CollectLogs:
    """Put the log, redacted, where `upload` says; a presigned URL, which is a secret."""

    upload: str

    def __repr__(self) -> str:
        return "CollectLogs()"


@dataclass(frozen=True)
class Configure:
    """Change settings; `tuning` is validated by the tuning itself."""

    tuning: Mapping[str, Any]


Document = Update | OsUpdate | RotateCertificate | SelfTest | Reboot | CollectLogs | Configure


def _bad(message: str) -> BadDocument:
    return BadDocument("bad-document", message)


def _text(name: str, value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _bad(f"{name} is not usable: {value!r:.80}")
    return value


def url(name: str, value: object) -> str:
    """An address that may be asked: https, and plain http only on this machine or in the private network.

    Raises:
        BadDocument: anything else. The message leaves out the query, where presigned URLs have their secret.
    """
    if not isinstance(value, str):
        raise _bad(f"{name} must be a URL")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise _bad(f"{name} is no URL") from None
    shown = f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]
    if not host or parts.username is not None or not value.isprintable() or " " in value:
        raise _bad(f"{name} is no URL that can be asked: {shown}")
    if parts.scheme == "https" or (parts.scheme == "http" and _nearby(host)):
        return value
    raise _bad(f"{name} must be https: {shown}")


def _nearby(host: str) -> bool:
    """Whether `host` is this machine or a private address (10/8, 172.16/12, 192.168/16, fc00::/7, link-local)."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private


def _bundle(kind: type[Bundle], prefix: str) -> Callable[[Mapping[str, Any]], Bundle]:
    def parse(body: Mapping[str, Any]) -> Bundle:
        urls = body["urls"]
        if not isinstance(urls, dict) or not urls:
            raise _bad("urls must name at least one target")
        target = _text("target", body["target"], _TARGET)
        if not target.startswith(prefix):
            raise _bad(f"target must begin with {prefix}: {target:.80}")
        return kind(
            target=target,
            version=_text("version", body["version"], _VERSION),
            metadata=url("metadata", body["metadata"]),
            urls=MappingProxyType(
                {_text("a target in urls", path, _TARGET): url(f"urls[{path}]", place) for path, place in urls.items()},
            ),
        )

    return parse


def _collect_logs(body: Mapping[str, Any]) -> CollectLogs:
    return CollectLogs(url("upload", body["upload"]))


def _configure(body: Mapping[str, Any]) -> Configure:
    if not isinstance(body["tuning"], dict):
        raise _bad("tuning must be an object")
    return Configure(MappingProxyType(body["tuning"]))


_COMMON: Final = frozenset({"picket", "operation", "product"})
_BUNDLE_KEYS: Final = frozenset({"target", "version", "metadata", "urls"})

#: operation: its own keys, and what makes the value.
_OPERATIONS: Final[Mapping[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], Any]]]] = MappingProxyType(
    {
        "update": (_BUNDLE_KEYS, _bundle(Update, "agent/")),
        "os-update": (_BUNDLE_KEYS, _bundle(OsUpdate, "os/")),
        "rotate-certificate": (frozenset(), lambda _: RotateCertificate()),
        "self-test": (frozenset(), lambda _: SelfTest()),
        "reboot": (frozenset(), lambda _: Reboot()),
        "collect-logs": (frozenset({"upload"}), _collect_logs),
        "configure": (frozenset({"tuning"}), _configure),
    },
)

OPERATIONS: Final = tuple(_OPERATIONS)


def parse(document: object, product: str) -> tuple[str, Document]:
    """The operation and what it asks for.

    Args:
        document: the job document as JSON gave it.
        product: what this unit is.

    Raises:
        BadDocument: it is for another product, or none that this agent understands; the message says why.
    """
    if not isinstance(document, dict):
        raise _bad("the job document is no object")
    if document.get("picket") != FORMAT or isinstance(document.get("picket"), bool):
        raise _bad(f'the job document needs "picket": {FORMAT}')
    if document.get("product") != product:
        raise BadDocument("wrong-product", f"this unit is a {product}, the job is for {document.get('product')!r:.80}")
    operation = document.get("operation")
    if not isinstance(operation, str) or operation not in _OPERATIONS:
        raise BadDocument("unknown-operation", f"this agent does not know the operation {operation!r:.80}")
    keys, make = _OPERATIONS[operation]
    if unknown := sorted(set(document) - keys - _COMMON):
        raise _bad(f"{operation} knows no {', '.join(map(repr, unknown)):.200}")
    if missing := sorted(keys - set(document)):
        raise _bad(f"{operation} needs {', '.join(missing)}")
    return operation, make(document)
