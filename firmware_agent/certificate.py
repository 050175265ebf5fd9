"""The little that the running agent must know of its own certificate, without the library that knows everything.

`cryptography` costs a connected agent ten megabytes, a quarter of what it may have. Whether certificate, chain and key
are good is judged with it, in a process of its own (`vetting`); what is asked again and again, the first and the last
day and the id, is read here from a certificate that was judged before.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from firmware_agent.digests import digest
from firmware_agent.errors import BadCertificate

_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)

#: DER tags (X.690) as they occur on the way to a certificate's validity (RFC 5280, 4.1).
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18


@dataclass(frozen=True)
class Validity:
    """When a certificate is good; named as in `cryptography.x509.Certificate`."""

    not_valid_before_utc: datetime
    not_valid_after_utc: datetime


def der(pem: str) -> bytes:
    """The first certificate of a PEM text.

    Raises:
        BadCertificate: there is none.
    """
    found = _PEM.search(pem)
    if found is None:
        raise BadCertificate("there is no certificate in the PEM text")
    try:
        return base64.b64decode("".join(found[1].split()), validate=True)
    except binascii.Error as error:
        raise BadCertificate(f"the certificate's PEM is damaged: {error}") from error


def sha256(pem: str) -> str:
    """Hex digest of the first certificate's DER, which is its id in AWS IoT."""
    return digest(der(pem))


def validity(pem: str) -> Validity:
    """When the first certificate of a PEM text is good.

    Raises:
        BadCertificate: it is no X.509 certificate.
    """
    try:
        [(_, certificate)] = _parts(der(pem))
        (_, signed), *_ = _parts(certificate)
        fields = [one for one in _parts(signed) if one[0] != _VERSION]
        _serial, _algorithm, _issuer, (tag, dates), *_ = fields
        first, last = (_time(*one) for one in _parts(dates))
    except (ValueError, IndexError, OverflowError) as error:
        raise BadCertificate(f"the certificate is damaged: {error}") from error
    if tag != _SEQUENCE:
        raise BadCertificate("the certificate is damaged: it has no validity")
    return Validity(first, last)


def _parts(data: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element in a row of DER."""
    found = []
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[at : at + size], "big")
            at += size
        if at + length > len(data):
            raise ValueError("it ends too early")
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _time(tag: int, text: bytes) -> datetime:
    """RFC 5280, 4.1.2.5: always in UTC, always with seconds; two digits of a year mean 1950 to 2049."""
    words = text.decode("ascii")
    if tag == _UTC_TIME:
        words = ("19" if words[:2] >= "50" else "20") + words
    elif tag != _GENERALIZED_TIME:
        raise ValueError("it has no dates")
    return datetime.strptime(words, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
