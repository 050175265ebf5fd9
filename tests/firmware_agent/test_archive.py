"""The archive has one form, and nothing else is let on to the disk."""

import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_agent.update import BadArchive, archive
from firmware_agent.update.archive import Digest, Manifest, Member

MANIFEST = Manifest("picket", "1.2.0", 3, ("raspberrypi,3-model-b", "brcm,bcm2837"), "3.13", "1.0.0")


def plant(tree: Path, contents: dict[str, bytes] | None = None) -> Path:
    """A tree with a manifest."""
    tree.mkdir(parents=True)
    members = {"manifest.json": MANIFEST.to_bytes(), "firmware_agent/__main__.py": b"print(1)\n"} | (contents or {})
    for name, data in members.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    return tree


def write(tree: Path) -> tuple[bytes, Digest]:
    tar = io.BytesIO()
    digest = archive.write_tree(tree, tar)
    return tar.getvalue(), digest


def unpack(tar: bytes, into: Path, expected: Digest | None = None) -> Manifest:
    digest = expected or Digest(hashlib.sha256(tar).hexdigest(), len(tar))
    return archive.unpack(io.BytesIO(tar), into, digest)


def raw(*members: tuple[Member | bytes, bytes], end: bytes = bytes(1024)) -> bytes:
    """A tar put together by hand, after a proper manifest."""
    data = MANIFEST.to_bytes()
    parts = [Member("manifest.json", len(data), executable=False).header(), data, bytes(-len(data) % 512)]
    for head, content in members:
        parts += [head if isinstance(head, bytes) else head.header(), content, bytes(-len(content) % 512)]
    return b"".join(parts) + end


# --- one form -----------------------------------------------------------------------------------------------------


def test_the_same_files_make_the_same_archive_whatever_else_they_are(tmp_path: Path) -> None:
    names = ["lib/b.py", "lib/a/b.py", "lib/a.py", "lib/a-b.py"]
    first = plant(tmp_path / "first", {name: name.encode() for name in names})
    second = plant(tmp_path / "second", {name: name.encode() for name in reversed(names)})
    for number, path in enumerate(second.rglob("*")):
        os.utime(path, (number, number))
        path.chmod(0o700 if path.is_dir() else 0o640)
    (second / "lib/empty").mkdir()

    assert write(first) == write(second)


def test_an_archive_is_a_tar_like_any_other(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", {"lib/native.so": b"\x7fELF", "lib/" + "long/" * 30 + "name.py": b"x"})
    (tree / "lib/native.so").chmod(0o755)
    tar, digest = write(tree)

    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        members = opened.getmembers()
        found = {member.name: (member.mode, member.size) for member in members}
        assert all((m.uid, m.gid, m.mtime, m.uname, m.gname, m.type) == (0, 0, 0, "", "", b"0") for m in members)
    first, *others = found
    assert first == "manifest.json"
    assert others == sorted(others)
    assert found["lib/native.so"] == (0o555, 4)
    assert found["manifest.json"] == (0o444, len(MANIFEST.to_bytes()))
    assert digest == Digest(hashlib.sha256(tar).hexdigest(), len(tar))
    (tmp_path / "tar").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "tar"], input=tar, check=True)
    assert write(tmp_path / "tar") == (tar, digest)


def test_the_form_never_changes(tmp_path: Path) -> None:
    """Releases in the field are known by these bytes: if this digest changes, no delta fits them any more."""
    tree = plant(tmp_path / "tree", {"lib/" + "d/" * 60 + "f": b"\0" * 513})
    (tree / "firmware_agent/__main__.py").chmod(0o755)

    assert write(tree)[1] == Digest("666f2a301aa8db4859fc952307bdd22aa8ac1e1667a985590cea7b9e21a906aa", 4608)


letters = st.sampled_from(["a", "b", "-", ".x", "manifest.json", "Z" * 90, "ü", "con sole"])
contents = st.dictionaries(
    st.lists(letters, min_size=1, max_size=4).map("/".join),
    st.tuples(st.binary(max_size=1200), st.booleans()),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(files=contents)
def test_an_installed_release_yields_the_archive_it_came_from(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, tuple[bytes, bool]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    tree = plant(root / "tree")
    for name, (data, executable) in files.items():
        path = tree / "lib" / name
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if executable else 0o600)
    try:
        tar, digest = write(tree)
    except BadArchive:
        assert any("ü" in name or len(name) > 150 for name in files)
        return

    assert unpack(tar, root / "installed") == MANIFEST
    assert write(root / "installed") == (tar, digest)
    assert archive.digest(root / "installed") == digest
    assert {path.stat().st_mode & 0o222 for path in (root / "installed").rglob("*") if path.is_file()} == {0}
    shutil.rmtree(root)


@pytest.mark.parametrize("spoil", ["link", "dangling", "pipe", "no manifest", "name"])
def test_a_tree_that_cannot_be_an_archive_is_refused(tmp_path: Path, spoil: str) -> None:
    tree = plant(tmp_path / "tree")
    match spoil:
        case "link":
            (tree / "lib").symlink_to("firmware_agent")
        case "dangling":
            (tree / "firmware_agent/x").symlink_to("nowhere")
        case "pipe":
            os.mkfifo(tree / "pipe")
        case "no manifest":
            (tree / "manifest.json").unlink()
        case _:
            (tree / "new\nline").touch()

    with pytest.raises(BadArchive):
        write(tree)


# --- the manifest -------------------------------------------------------------------------------------------------


def test_a_manifest_is_canonical_json() -> None:
    assert MANIFEST.to_bytes() == (
        b'{"format":1,"hardware":["raspberrypi,3-model-b","brcm,bcm2837"],"min_from":"1.0.0","product":"picket",'
        b'"python":"3.13","security_version":3,"version":"1.2.0"}'
    )
    assert Manifest.parse(MANIFEST.to_bytes()) == MANIFEST
    plain = Manifest("picket", "0.1", 0, ("picket,simulated",))
    assert Manifest.parse(plain.to_bytes()) == plain


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"format":1', b'"format":2'),
        (b'"format":1', b'"format":1.0'),
        (b'"format":1', b'"format":true'),
        (b'"format":1,', b""),
        (b'"format":1', b'"extra":1,"format":1'),
        (b'"version":"1.2.0"', b'"version":"../../etc"'),
        (b'"version":"1.2.0"', b'"version":"01.2.0"'),
        (b'"version":"1.2.0"', b'"version":1.2'),
        (b'"security_version":3', b'"security_version":-1'),
        (b'"security_version":3', b'"security_version":true'),
        (b'"security_version":3', b'"security_version":3.0'),
        (b'"python":"3.13"', b'"python":"2.7"'),
        (b'"python":"3.13"', b'"python":3.13'),
        (b'"min_from":"1.0.0"', b'"min_from":"x"'),
        (b'"min_from":"1.0.0"', b'"min_from":[]'),
        (b'"hardware":["raspberrypi,3-model-b","brcm,bcm2837"]', b'"hardware":[]'),
        (b'"hardware":["raspberrypi,3-model-b","brcm,bcm2837"]', b'"hardware":[1]'),
        (b'"hardware":["raspberrypi,3-model-b","brcm,bcm2837"]', b'"hardware":"x"'),
        (b'"product":"picket"', b'"product":"a b"'),
        (b'"product":"picket"', b'"product": "picket"'),
        (b'"product":"picket"', b'"product":"picket","product":"picket"'),
        (b"}", b"}\n"),
        (b"{", b"[" * 5000),
    ],
)
def test_a_manifest_that_is_not_exactly_right_is_refused(old: bytes, new: bytes) -> None:
    spoilt = MANIFEST.to_bytes().replace(old, new)

    assert spoilt != MANIFEST.to_bytes()
    with pytest.raises(BadArchive):
        Manifest.parse(spoilt)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(BadArchive):
        assert Manifest.parse(data).to_bytes() == data


# --- what is refused ----------------------------------------------------------------------------------------------


def altered(change: Callable[[bytearray], None]) -> bytes:
    """A header of a plain file, spoilt, with a checksum that is right again."""
    block = bytearray(Member("lib/x", 1, executable=False).header())
    change(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def put(start: int, data: bytes) -> Callable[[bytearray], None]:
    def change(block: bytearray) -> None:
        block[start : start + len(data)] = data

    return change


HEADERS = {
    "absolute": altered(put(0, b"/etc/x")),
    "above": altered(put(0, b"lib/../../x")),
    "above in the prefix": altered(put(345, b"..")),
    "dot": altered(put(0, b"lib/./x")),
    "double slash": altered(put(0, b"lib//x")),
    "directory": altered(put(0, b"lib/x/")),
    "empty name": altered(put(0, bytes(100))),
    "zero within the name": altered(put(0, b"lib/x\0y")),
    "symbolic link": altered(put(156, b"2")),
    "hard link": altered(put(156, b"1")),
    "device": altered(put(156, b"3")),
    "pipe": altered(put(156, b"6")),
    "directory entry": altered(put(156, b"5")),
    "pax header": altered(put(156, b"x")),
    "global pax header": altered(put(156, b"g")),
    "long name of GNU": altered(put(156, b"L")),
    "sparse": altered(put(156, b"S")),
    "old regular file": altered(put(156, b"\0")),
    "set-uid": altered(put(100, b"0004755")),
    "writable": altered(put(100, b"0000644")),
    "owner": altered(put(108, b"0001750")),
    "name of the owner": altered(put(265, b"root")),
    "time": altered(put(136, b"00000000001")),
    "base-256 size": altered(put(124, b"\x80" + bytes(10) + b"\1")),
    "negative size": altered(put(124, b"-0000000001")),
    "spaces in the size": altered(put(124, b"          1")),
    "link name": altered(put(157, b"x")),
    "GNU magic": altered(put(257, b"ustar  \0")),
    "no magic": altered(put(257, bytes(8))),
    "wrong checksum": bytes(
        put(148, b"0000000")(block := bytearray(Member("lib/x", 1, executable=False).header())) or block
    ),
    "long prefix for a short name": altered(
        lambda block: (put(0, b"x".ljust(100, b"\0"))(block), put(345, b"lib")(block))[0]
    ),
}


@pytest.mark.parametrize("spoilt", HEADERS)
def test_a_header_that_is_not_canonical_is_refused(tmp_path: Path, spoilt: str) -> None:
    with pytest.raises(BadArchive):
        unpack(raw((HEADERS[spoilt], b"x")), tmp_path / "into")


FILE = Member("lib/x", 1, executable=False)
BODIES = {
    "twice": raw((FILE, b"x"), (FILE, b"x")),
    "out of order": raw((FILE, b"x"), (dataclasses.replace(FILE, name="lib/a"), b"x")),
    "second manifest": raw((dataclasses.replace(FILE, name="manifest.json"), b"x")),
    "file below a file": raw((FILE, b"x"), (dataclasses.replace(FILE, name="lib/x/y"), b"x")),
    "file below the manifest": raw((dataclasses.replace(FILE, name="manifest.json/x"), b"x")),
    "no end": raw((FILE, b"x"), end=b""),
    "half an end": raw((FILE, b"x"), end=bytes(512)),
    "end that goes on": raw((FILE, b"x"), end=bytes(512) + b"x" * 512),
    "longer end": raw((FILE, b"x"), end=bytes(2048)),
    "cut off": raw((FILE, b"x"))[:-1500],
    "no manifest": raw((FILE, b"x"))[1024:],
    "nothing": b"",
    "only an end": bytes(1024),
    "padding that is not empty": raw((FILE, b"xy")),
}


@pytest.mark.parametrize("spoilt", BODIES)
def test_an_archive_that_is_not_canonical_is_refused(tmp_path: Path, spoilt: str) -> None:
    with pytest.raises(BadArchive):
        unpack(BODIES[spoilt], tmp_path / "into")


def test_an_archive_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    tar, digest = write(plant(tmp_path / "tree"))

    for number, wrong in enumerate(
        [
            dataclasses.replace(digest, sha256="0" * 64),
            dataclasses.replace(digest, size=digest.size + 512),
            dataclasses.replace(digest, size=digest.size - 512),
            dataclasses.replace(digest, size=archive.MAX_TAR_BYTES + 1),
        ]
    ):
        with pytest.raises(BadArchive):
            unpack(tar, tmp_path / f"into{number}", wrong)


def test_an_archive_with_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_FILES", 2)

    with pytest.raises(BadArchive, match="more than 2 files"):
        unpack(raw((FILE, b"x"), (dataclasses.replace(FILE, name="lib/y"), b"y")), tmp_path / "into")


def test_endless_content_ends_at_the_signed_size(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return bytes(size)

    head = raw((Member("lib/x", 8**11 - 1, executable=False), b""), end=b"")
    endless = Endless()

    class Joined(io.RawIOBase):
        start = io.BytesIO(head)

        def read(self, size: int = -1) -> bytes:
            return self.start.read(size) or endless.read(size)

    with pytest.raises(BadArchive, match="longer than was signed"):
        archive.unpack(Joined(), tmp_path / "into", Digest("0" * 64, 1 << 20))  # type: ignore[arg-type]
    assert endless.given <= 1 << 20


def test_nothing_is_unpacked_over_what_is_there(tmp_path: Path) -> None:
    tar, digest = write(plant(tmp_path / "tree"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "into").symlink_to("elsewhere")

    with pytest.raises(FileExistsError):
        unpack(tar, tmp_path / "into", digest)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_archive_spoilt_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Even when the digest is that of the spoilt archive: what is accepted is canonical, or it is not accepted."""
    tar = bytearray(raw((FILE, b"x"), (dataclasses.replace(FILE, name="lib/y"), b"y")))
    for _ in range(data.draw(st.integers(1, 3))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    into = tmp_path_factory.mktemp("into") / "release"
    try:
        unpack(bytes(tar), into)
    except BadArchive:
        return

    assert write(into)[0] == tar


# --- compressed ---------------------------------------------------------------------------------------------------


def pack(tar: bytes) -> bytes:
    packed = io.BytesIO()
    archive.compress(io.BytesIO(tar), packed, len(tar))
    return packed.getvalue()


def test_compressing_twice_gives_the_same_bytes_and_any_zstd_reads_them(tmp_path: Path) -> None:
    tar, digest = write(plant(tmp_path / "tree", {"lib/x": random.Random(1).randbytes(300_000)}))

    packed = pack(tar)

    assert packed == pack(tar)
    assert zstandard.get_frame_parameters(packed).content_size == len(tar)
    assert not zstandard.get_frame_parameters(packed).has_checksum
    assert archive.unpack(archive.decompress(io.BytesIO(packed)), tmp_path / "into", digest) == MANIFEST
    if shutil.which("zstd"):
        assert subprocess.run(["zstd", "-dc"], input=packed, capture_output=True, check=True).stdout == tar


def test_a_tar_of_another_size_is_not_compressed() -> None:
    with pytest.raises(ValueError, match="has not 11 bytes"):
        archive.compress(io.BytesIO(b"ten bytes!"), io.BytesIO(), 11)


def test_damaged_or_greedy_frames_are_refused(tmp_path: Path) -> None:
    tar, digest = write(plant(tmp_path / "tree", {"lib/x": random.Random(1).randbytes(300_000)}))
    packed = pack(tar)
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    greedy = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    for number, spoilt in enumerate(
        [
            b"",
            b"no zstd",
            packed[:1000],
            packed[:1000] + bytes(100) + packed[1100:],
            packed + b"behind",
            greedy.compress(tar) + greedy.flush(),
        ]
    ):
        with pytest.raises(BadArchive):
            archive.unpack(archive.decompress(io.BytesIO(spoilt)), tmp_path / f"into{number}", digest)


def test_chunks_are_hashed_one_by_one() -> None:
    payload = b"a" * 10 + b"b" * 10 + b"c"

    assert archive.chunk_digests(io.BytesIO(payload), 10) == [
        hashlib.sha256(chunk).hexdigest() for chunk in (b"a" * 10, b"b" * 10, b"c")
    ]
    assert archive.chunk_digests(io.BytesIO(b"")) == []
