"""Back into factory mode for one boot: by whoever holds the medium and a signed authorisation for this very board.

The initramfs asks before it decides a sealed unit's mode, when `factory.authorisation` lies on the control partition:

    {"format": 1, "product": "picket", "board": "10000000abcdef01", "issued": 1795000000, "expires": 1795604800}
    -----BEGIN SSH SIGNATURE-----
    ...

The first line, with its line end, is what is signed, in the namespace picket-factory-mode. An authorisation opens one
boot: the last one's moment of issue is kept in /data/system, and only a later one counts. So none comes back, and
nothing piles up. Moments are seconds since 1970; a unit without a clock compares with the last time that it knows of.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import medium
from .board import Places, parse_layout
from .faults import Fault
from .signature import verify

NAMESPACE: Final = "picket-factory-mode"
FORMAT: Final = 1

#: More than any authorisation has.
LIMIT: Final = 8192

_USED: Final = "factory-mode-used"


@dataclass(frozen=True)
class Authorisation:
    """For which board of which product, when it was issued and until when it counts; in seconds since 1970."""

    product: str
    board: str
    issued: int
    expires: int


def parse(data: bytes) -> tuple[Authorisation, bytes, bytes]:
    """What it says, and as bytes what was signed and the signature.

    Raises:
        Fault: bad-request; it is none.
    """
    line, end, signature = data.partition(b"\n")
    try:
        value = json.loads(line)
        if len(data) > LIMIT or not end or value["format"] != FORMAT:
            raise ValueError
        for name, kind in (("product", str), ("board", str), ("issued", int), ("expires", int)):
            if type(value[name]) is not kind:
                raise TypeError
        said = Authorisation(value["product"], value["board"], value["issued"], value["expires"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Fault("bad-request", "it is no authorisation of format 1") from None
    return said, line + end, signature


def judge(said: Authorisation, product: str, board: str, used: int, now: float) -> None:
    """Whether an authorisation is for this unit, and its time has come and is not over.

    Args:
        said: what it says; that it was signed is known.
        product: the image's name.
        board: the board's serial.
        used: when the last one that opened factory mode was issued; 0 if there was none.
        now: the time, or the last that is known to have passed.

    Raises:
        Fault: wrong-product, wrong-hardware, used, expired.
    """
    if said.product != product:
        raise Fault("wrong-product", f"it is for {said.product[:40]!r}, and this is {product!r}")
    if said.board != board:
        raise Fault("wrong-hardware", f"it is for the board {said.board[:40]!r}, and this is {board}")
    if said.issued <= used:
        raise Fault("used", "it, or one that was issued after it, was used before")
    if not said.issued < said.expires:
        raise Fault("expired", "it never counted: it ends before it begins")
    if said.expires < now:
        raise Fault("expired", "its time is over")


def enter(data: bytes, places: Places) -> Authorisation:
    """Judge an authorisation, and note durably that it is used: the caller may then open factory mode, this once.

    Raises:
        Fault: as `judge`; bad-request, bad-signature; io, where nothing can be noted.
    """
    said, signed, signature = parse(data)
    used = _used(places.data / _USED)
    judge(said, parse_layout(places.layout.read_bytes()).name, _serial(places.device_tree), used, _known(places.clocks))
    verify(signed, signature, NAMESPACE, places.signers)
    try:
        medium.write_file(places.data / _USED, b"%d\n" % said.issued)
    except OSError as error:
        raise Fault("io", f"that it is used cannot be noted: {error}") from error
    return said


def _used(path: Path) -> int:
    """... and nothing that is issued counts any more, where what was noted cannot be read."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise Fault("io", f"what was used before cannot be read: {error}") from error


def _serial(tree: Path) -> str:
    """The board's serial as the banner says it."""
    return (tree / "serial-number").read_text().strip("\0 \n").lower().rjust(16, "0")


def _known(clocks: Iterable[Path]) -> float:
    """The latest of the clock and the files whose time of change is a time that has passed."""
    moments = [time.time()]
    for path in clocks:
        try:
            moments.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(moments)
