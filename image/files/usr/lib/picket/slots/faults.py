"""What can go wrong, in short words for the job that asked."""

from typing import Final

#: Code → what it means. The agent decides by it whether the same job could end better another time.
CODES: Final = {
    "bad-request": "the question makes no sense",
    "bad-bundle": "it is not what a bundle looks like, or it is cut off",
    "bad-signature": "nobody whom this image knows has signed it",
    "wrong-product": "it is for another product",
    "wrong-hardware": "it is for other boards",
    "wrong-control": "it is for units whose slots are told apart in another way",
    "wrong-disk": "it looks for a medium with another signature",
    "downgrade": "its security version is below the floor",
    "too-large": "it does not fit into the slot",
    "used": "it counted once, and that is over",
    "expired": "it counted until a time that has passed",
    "wrong-state": "not now: something is on trial, or nothing is installed",
    "busy": "somebody else is at it",
    "control": "the choice of the slot cannot be read or written",
    "io": "the medium does not do what it should",
}


class Fault(Exception):
    """`code` is one of `CODES`; `detail` is for people."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        if code not in CODES:
            raise ValueError(code)
        self.code = code
        self.detail = detail


class Gone(Exception):
    """Whoever asked has gone away. No fault of anything here, and no OSError, which would be the medium's."""
