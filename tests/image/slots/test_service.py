"""The helper as systemd runs it: a process of its own, Python without anything of ours, a socket as its input."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.image.slots.world import AUTOBOOT, DISK, HARDWARE, PRODUCT, Kit

SLOTS = Path(__file__).parents[3] / "image/files/usr/lib/picket/slots"


@pytest.fixture
def unit(tmp_path: Path, kit: Kit) -> Path:
    """The root of a unit, with files for device nodes."""
    root = tmp_path / "unit"
    for folder in ("usr/lib/picket", "usr/share/picket", "run/picket-system", "data/system", "proc/device-tree", "dev"):
        (root / folder).mkdir(parents=True)
    partitions = {"control": 1, "boot-a": 2, "boot-b": 3, "root-a": 5, "root-b": 6, "data": 7}
    layout = {"format": 1, "name": PRODUCT, "version": "1.0.0", "security_version": 1, "control": "autoboot"}
    layout |= {"disk": DISK, "hardware": [HARDWARE], "partitions": partitions}
    (root / "usr/lib/picket/layout.json").write_text(json.dumps(layout))
    shutil.copy(kit.keys.signers, root / "usr/share/picket/os-signers")
    (root / "proc/device-tree/compatible").write_bytes(f"{HARDWARE}\0brcm,bcm2711\0".encode())
    (root / "run/picket-system/slot").write_text("a\n")
    (root / "run/picket-system/disk").write_text(f"{root}/dev/mmcblk0\n")
    for name, size in AUTOBOOT.items():
        (root / f"dev/mmcblk0p{partitions[name]}").write_bytes(bytes(size))
    (root / "dev/mmcblk0p1").write_bytes(kit.controls["autoboot"])
    return root


def start(unit: Path, *words: str, **options: Any) -> "subprocess.Popen[bytes]":
    environment = {"PICKET_ROOT": str(unit), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-B", "-I", "-S", str(SLOTS), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ask(unit: Path, question: object, *files: Path) -> list[Mapping[str, Any]]:
    """All lines of an answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handles = [os.open(path, os.O_RDONLY) for path in files]
        socket.send_fds(ours, [json.dumps(question).encode() + b"\n"], handles)
        for handle in handles:
            os.close(handle)
        with start(unit, "serve", stdin=theirs) as process:
            theirs.close()
            with ours.makefile("rb") as lines:
                found = [json.loads(line) for line in lines]
            process.communicate()
            assert process.returncode == 0
    return found


def test_a_bundle_comes_through_the_socket_and_is_chosen(unit: Path, kit: Kit, tmp_path: Path) -> None:
    image = kit.images["autoboot", "1.1.0"]
    (tmp_path / "bundle").write_bytes(image.bundle)

    assert ask(unit, {"verb": "status"})[-1]["ok"]["booted"] == "a"
    lines = ask(unit, {"verb": "install"}, tmp_path / "bundle")

    assert lines[-1] == {"ok": {"slot": "b", "version": "1.1.0"}}
    assert all(set(line) == {"progress"} for line in lines[:-1])
    assert (unit / "dev/mmcblk0p3").read_bytes().startswith(image.boot[: image.manifest.boot.size])
    assert (unit / "dev/mmcblk0p6").read_bytes().startswith(image.root)
    assert ask(unit, {"verb": "try"}) == [{"ok": {"slot": "b", "one_try": "counting"}}]


def test_questions_that_make_no_sense_are_answered_so(unit: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    questions: tuple[object, ...] = (
        {"verb": "format"},
        {"verb": ["keep"]},
        {"verb": "install"},
        {"verb": "keep", "slot": "b"},
        [],
        1,
    )
    for question in questions:
        assert ask(unit, question)[-1]["error"]["code"] == "bad-request"
    assert ask(unit, {"verb": "install"}, tmp_path / "file", tmp_path / "file")[-1]["error"]["code"] == "bad-request"
    assert ask(unit, {"verb": "install"}, tmp_path / "file")[-1]["error"]["code"] == "bad-bundle"


def test_a_board_that_was_not_booted_from_a_slot_says_so(unit: Path) -> None:
    (unit / "run/picket-system/slot").unlink()

    assert ask(unit, {"verb": "status"})[-1]["error"]["code"] == "io"


def test_a_person_is_told_in_words_and_a_script_in_json(unit: Path) -> None:
    with start(unit, "status") as process:
        words = process.communicate()[0].decode()
    with start(unit, "status", "--json") as process:
        value = json.loads(process.communicate()[0])
    with start(unit, "formatted") as process:
        usage = process.communicate()[1].decode()

    assert words.splitlines()[0] == "a  picket 1.0.0: runs, is booted by default"
    assert words.splitlines()[1] == "b  empty"
    assert (value["kept"], value["one_try"], value["slots"]["b"]) == ("a", "counting", None)
    assert process.returncode == 2
    assert usage.startswith("usage: slots status")


def test_roots_check_of_an_ordinary_boot_changes_nothing_and_wants_no_restart(unit: Path) -> None:
    for verb in ("check", "end-trial"):
        with start(unit, verb) as process:
            assert process.communicate() == (b"", b"")
        assert process.returncode == 0
    assert (unit / "data/system/os-floor").read_text() == "1\n"
