"""SHA-256 at the price that each use is worth.

OpenSSL's is the faster one by far on a board whose processor has instructions for it, and costs four megabytes from its
first use on: right for an archive, too dear for a name of a few hundred bytes in an agent that has forty in all.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hashlib


def digest(data: bytes) -> str:
    """SHA-256 of little data, in hex, by Python's own code where it has some."""
    for module in ("_sha2", "_sha256", "hashlib"):  # of Python 3.12, of 3.11, of all
        try:
            return str(importlib.import_module(module).sha256(data).hexdigest())
        except ImportError:
            continue
    raise ImportError("this Python has no SHA-256")


def sha256(data: bytes = b"") -> "hashlib._Hash":
    """SHA-256 of much data, begun."""
    import hashlib  # noqa: PLC0415 - see above

    return hashlib.sha256(data)
