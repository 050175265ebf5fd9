"""From the tar of one release to that of another: zstd with the old tar as its dictionary ("patch-from").

A change of one line costs about a kilobyte, a new version of a native package about a tenth of the full archive. The
base is the canonical tar of an installed release, rebuilt from its files; what comes out is checked like any archive,
by the digest that was signed. Whatever does not fit raises BadDelta or BadArchive: the caller then takes the full
archive.

A delta is one zstd frame within another. The inner one spends a dozen bytes on each 128 KiB that did not change, and
these dozens are all alike: the outer frame makes 0.7 kB of 7 kB (measured on tars of 70 MB).

Memory on the unit: the old tar, and the new one, which zstd keeps as its window.
"""

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from firmware_agent.update import BadArchive, BadDelta
from firmware_agent.update.archive import MAX_TAR_BYTES, Digest, Frame, write_tree

if TYPE_CHECKING:
    import zstandard

LEVEL: Final = 19

#: zstd keeps the dictionary in reach only while the window covers all that was written since the start.
_MAX_WINDOW_LOG: Final = MAX_TAR_BYTES.bit_length() - 1

_MIN_WINDOW_LOG: Final = 17

#: The inner frame is unpacked in memory; a larger one would be no use as a delta.
_MAX_INNER_BYTES: Final = 32 << 20


def _dictionary(old: bytes) -> "zstandard.ZstdCompressionDict":
    import zstandard  # noqa: PLC0415 - only while an update runs

    return zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def make(old: bytes, new: bytes) -> bytes:
    """The delta from the tar `old` to the tar `new`: the same bytes for the same tars and the same version of zstd.

    Raises:
        ValueError: a tar is larger than a unit would take.
    """
    import zstandard  # noqa: PLC0415

    if max(len(old), len(new)) > MAX_TAR_BYTES:
        raise ValueError(f"a tar of more than {MAX_TAR_BYTES} bytes")
    window_log = min(_MAX_WINDOW_LOG, max(_MIN_WINDOW_LOG, max(len(old), len(new)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL,
        window_log=window_log,
        # Tables as large as the window: zstd silently forgets what is further back in a dictionary than 8 << hash_log.
        chain_log=window_log + 1,  # a binary tree of two entries each
        hash_log=window_log - 2,
        write_checksum=False,
        write_content_size=True,
        threads=0,
    )
    inner = zstandard.ZstdCompressor(dict_data=_dictionary(old), compression_params=parameters).compress(new)
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False, threads=0).compress(inner)


def base(release: Path, expected_sha256: str) -> bytes:
    """The tar of an installed release, as the base of a delta.

    Raises:
        BadDelta: the release on the disk is not the one that the delta starts from.
        OSError: it cannot be read.
    """
    tar = io.BytesIO()
    try:
        found = write_tree(release, tar)
    except BadArchive as error:
        raise BadDelta(f"the running release is damaged: {error}") from None
    if found.sha256 != expected_sha256:
        raise BadDelta(f"the running release is {found.sha256}, the delta starts from {expected_sha256}")
    return tar.getvalue()


def apply(old: bytes, patch: bytes, expected: Digest) -> IO[bytes]:
    """The new tar as a stream, for `Releases.install`, which checks it against `expected`.

    Args:
        old: the base's tar, from `base`.
        patch: the delta.
        expected: what the new tar will be; its size bounds the memory.

    Raises:
        BadDelta: the delta is damaged or is one to another size; reading from the stream raises it too.
    """
    import zstandard  # noqa: PLC0415

    try:
        outer = zstandard.get_frame_parameters(patch)
        if not 0 < outer.content_size <= _MAX_INNER_BYTES:
            raise BadDelta("the delta is larger than any that is of use")
        inner = zstandard.ZstdDecompressor(max_window_size=1 << _MAX_WINDOW_LOG).decompress(patch)
        frame = zstandard.get_frame_parameters(inner)
    except zstandard.ZstdError as error:
        raise BadDelta(f"the delta is damaged: {error}") from None
    if frame.content_size != expected.size or expected.size > MAX_TAR_BYTES:
        raise BadDelta(f"the delta leads to {frame.content_size} bytes, not to {expected.size}")
    decompressor = zstandard.ZstdDecompressor(dict_data=_dictionary(old), max_window_size=1 << _MAX_WINDOW_LOG)
    return Frame(decompressor.stream_reader(inner), BadDelta)
