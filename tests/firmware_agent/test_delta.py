"""Deltas are small, lead to the very archive that was signed, and anything else is noticed."""

import compileall
import hashlib
import io
import py_compile
import random
import shutil
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_agent.update import BadDelta, InstallFault, archive, delta
from firmware_agent.update.archive import Digest, Manifest
from firmware_agent.update.releases import Expected, Releases

ROOT = Path(__file__).parent.parent.parent


def build(tree: Path, version: str, *, line: str = "") -> tuple[bytes, Digest]:
    """A release of the real agent, compiled as releases are, beside some hundreds of kilobytes of packages."""
    shutil.copytree(ROOT / "firmware_agent", tree / "firmware_agent", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "lib").mkdir()
    (tree / "lib/native.so").write_bytes(random.Random(1).randbytes(600_000))
    (tree / "manifest.json").write_bytes(Manifest("picket", version, 1, ("picket,simulated",)).to_bytes())
    main = tree / "firmware_agent/__main__.py"
    main.write_text(main.read_text() + line)
    assert compileall.compile_dir(
        tree, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, stripdir=str(tree)
    )
    tar = io.BytesIO()
    digest = archive.write_tree(tree, tar)
    return tar.getvalue(), digest


def read(stream: io.RawIOBase) -> bytes:
    collected = b""
    while piece := stream.read(1 << 16):
        collected += piece
    return collected


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest(), len(data))


def test_a_change_of_one_line_costs_less_than_six_kilobytes(tmp_path: Path) -> None:
    """From the installed release, to an installed release."""
    old_tar, old = build(tmp_path / "old", "1.0.0")
    new_tar, new = build(tmp_path / "new", "1.0.1", line="\nANSWER = 42\n")
    (tmp_path / "opt/releases").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    releases = Releases(tmp_path / "opt", tmp_path / "state")
    name = releases.install(io.BytesIO(old_tar), Expected("1.0.0", old))

    patch = delta.make(old_tar, new_tar)
    assert patch == delta.make(old_tar, new_tar)
    assert len(patch) < 6_000

    base = delta.base(releases.path(name), old.sha256)
    newer = releases.install(delta.apply(base, patch, new), Expected("1.0.1", new))
    assert releases.digest(newer) == new


@settings(max_examples=40, deadline=None)
@given(
    old=st.binary(max_size=2000),
    new=st.binary(min_size=1, max_size=2000),
    repeat=st.integers(1, 200),
)
def test_a_delta_leads_from_anything_to_anything(old: bytes, new: bytes, repeat: int) -> None:
    old, new = old * repeat, (new + old[:100]) * repeat

    assert read(delta.apply(old, delta.make(old, new), digest_of(new))) == new  # type: ignore[arg-type]


def test_all_of_a_large_base_is_within_reach() -> None:
    """zstd looks back no further than 8 << hash_log into a dictionary; with its own tables this delta is a megabyte."""
    start = random.Random(1).randbytes(1 << 20)
    old = start + bytes(40 << 20)

    assert len(delta.make(old, start)) < 1000


def test_a_release_that_is_not_the_base_is_refused(tmp_path: Path) -> None:
    _, old = build(tmp_path / "old", "1.0.0")

    with pytest.raises(BadDelta, match="starts from"):
        delta.base(tmp_path / "old", "0" * 64)
    (tmp_path / "old/firmware_agent/__pycache__/stray.pyc").write_bytes(b"left by something")
    with pytest.raises(BadDelta, match="starts from"):
        delta.base(tmp_path / "old", old.sha256)
    (tmp_path / "old/link").symlink_to("lib")
    with pytest.raises(BadDelta, match="damaged"):
        delta.base(tmp_path / "old", old.sha256)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_spoilt_delta_is_noticed(data: st.DataObject) -> None:
    """By the delta itself or by the digest; never by a crash, and never with more bytes than were signed."""
    old, new = random.Random(1).randbytes(5000), random.Random(1).randbytes(4000) + b"changed" + bytes(2000)
    patch = bytearray(delta.make(old, new))
    for _ in range(data.draw(st.integers(1, 3))):
        patch[data.draw(st.integers(0, len(patch) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(patch)))
    try:
        result = read(delta.apply(old, bytes(patch[:cut]), digest_of(new)))  # type: ignore[arg-type]
    except BadDelta:
        return
    assert len(result) <= len(new)


def test_a_delta_that_unpacks_to_more_than_was_signed_is_refused() -> None:
    old = bytes(1000)
    patch = delta.make(old, bytes(5 << 20))

    with pytest.raises(BadDelta, match="leads to 5242880 bytes"):
        delta.apply(old, patch, Digest("0" * 64, 1 << 20))


@pytest.mark.parametrize(
    "patch",
    [
        b"",
        b"no zstd",
        zstandard.ZstdCompressor(write_content_size=False).compressobj().flush(),
        zstandard.compress(b""),
        zstandard.compress(b"no zstd either"),
        zstandard.compress(bytes((32 << 20) + 1)),
    ],
)
def test_what_is_no_delta_is_refused(patch: bytes) -> None:
    with pytest.raises(BadDelta):
        delta.apply(b"old", patch, digest_of(b"new"))


def test_the_wrong_base_gives_no_release(tmp_path: Path) -> None:
    old_tar, _ = build(tmp_path / "old", "1.0.0")
    new_tar, new = build(tmp_path / "new", "1.0.1", line="\nANSWER = 42\n")
    (tmp_path / "opt/releases").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    releases = Releases(tmp_path / "opt", tmp_path / "state")
    wrong = bytearray(old_tar)
    wrong[100_000:200_000] = bytes(100_000)

    with pytest.raises(InstallFault):
        releases.install(delta.apply(bytes(wrong), delta.make(old_tar, new_tar), new), Expected("1.0.1", new))
    assert releases.names() == []


def test_a_tar_that_no_unit_takes_gets_no_delta() -> None:
    with pytest.raises(ValueError, match="more than"):
        delta.make(b"", bytes(archive.MAX_TAR_BYTES + 1))
