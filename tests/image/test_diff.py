"""What changed between two images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from image import diff
from image.__main__ import app
from image.inside import File
from image.manifest import Package
from tests.image import small

pytestmark = small.needs_tools

A = File("/a", "-", 0o644, 0, 0, 3, "1" * 64)


def shown(changes: diff.Changes, *, whole: bool = False) -> str:
    console = Console(width=100, record=True)
    console.print(diff.show(changes, whole=whole))
    return console.export_text()


@pytest.mark.parametrize(
    ("now", "aspects"),
    [
        (A, None),
        (replace(A, sha256="2" * 64), ("content",)),
        (replace(A, mode=0o4755), ("mode",)),
        (replace(A, owner=900), ("owner",)),
        (replace(A, kind="l", sha256="", size=0, target="b"), ("kind", "content", "target")),
    ],
)
def test_what_differs_about_a_file_is_said(now: File, aspects: tuple[str, ...] | None) -> None:
    found = list(diff.compare_files({"/a": A}, {"/a": now}))

    assert [change.aspects for change in found] == ([] if aspects is None else [aspects])


def test_packages_come_go_and_move() -> None:
    old = (Package("debian", "a", "1"), Package("debian", "b", "1"), Package("python", "a", "1"))
    new = (Package("debian", "a", "2"), Package("debian", "c", "1"), Package("python", "a", "1"))

    found = [(change.kind, change.name, change.old, change.new) for change in diff.compare_packages(old, new)]

    assert found == [("debian", "a", "1", "2"), ("debian", "b", "1", None), ("debian", "c", None, "1")]


def tree(*paths: str) -> dict[str, File]:
    """Files by path, with the folders that they are in; a file's content is its name."""
    found = {"/": File("/", "d", 0o755, 0, 0)}
    for path in paths:
        parts = path.split("/")
        for depth in range(2, len(parts)):
            folder = "/".join(parts[:depth])
            found[folder] = File(folder, "d", 0o755, 0, 0)
        found[path] = File(path, "-", 0o644, 0, 0, 1, parts[-1])
    return found


def test_a_folder_that_is_named_after_a_version_is_followed() -> None:
    same = [f"/m{number}" for number in range(8)]
    old = tree(*(f"/lib/6.1{name}" for name in (*same, "/b", "/sub-1/c", "/sub-1/d")), "/lib/other/x")
    new = tree(*(f"/lib/6.2{name}" for name in (*same, "/b", "/sub-2/c", "/sub-2/d", "/e")), "/lib/another/y")
    new["/lib/6.2/b"] = replace(new["/lib/6.2/b"], sha256="changed")

    followed, moves = diff.follow_moves(old, new)

    assert moves == [diff.Move("/lib/6.1", "/lib/6.2"), diff.Move("/lib/6.2/sub-1", "/lib/6.2/sub-2")]
    assert [(change.path, change.aspects) for change in diff.compare_files(followed, new)] == [
        ("/lib/6.2/b", ("content",)), ("/lib/6.2/e", ()), ("/lib/another", ()), ("/lib/another/y", ()),
        ("/lib/other", ()), ("/lib/other/x", ()),
    ]  # fmt: skip


def another_root(root: Path) -> None:
    (root / "etc/hostname").write_text("larger\n")
    (root / "usr/bin/agent").chmod(0o700)
    (root / "usr/bin/more").write_text("more")
    (root / "usr/lib/libkeys.so").unlink()
    (root / "bin").unlink()
    (root / "bin").symlink_to("usr/sbin")


def test_two_images_are_told_apart_down_to_their_files(tmp_path: Path) -> None:
    old = small.build(tmp_path / "old")
    packages = (Package("debian", "systemd", "258-1"), Package("debian", "nano", "8"))
    new = small.build(
        tmp_path / "new", root=another_root, version="1.1", packages=packages,
        boot=lambda boot: (boot / "config.txt").write_bytes((boot / "config.txt").read_bytes() + b"gpu_mem=16\n"),
    )  # fmt: skip

    found = diff.changes(old, new)

    assert {change.path: change.aspects for change in found.files if change.old and change.new} == {
        "/bin": ("target",),
        "/etc/hostname": ("content",),
        "/usr/bin/agent": ("mode",),
        "BOOT:/cmdline.txt": ("content",),
        "BOOT:/config.txt": ("content",),
    }
    assert [change.path for change in found.files if not change.old] == ["/usr/bin/more"]
    assert [change.path for change in found.files if not change.new] == ["/usr/lib/libkeys.so"]
    assert {field.name for field in found.fields} == {"version", "root hash"}
    said = shown(found)
    assert "packages: 1 added, 1 removed, 1 changed" in said
    assert "files: 1 added, 1 removed, 5 changed" in said
    assert "debian systemd 257.9-1 -> 258-1" in said
    assert "+ debian nano 8" in said
    assert "/usr/bin/agent: mode 0755 -> 0700" in said
    assert "BOOT:/config.txt: content (+11 bytes)" in said
    assert "/bin: target usr/bin -> usr/sbin" in said


def test_of_a_list_what_came_and_went_is_said() -> None:
    fields = (diff.Field("boards", "a b c", "b c d"), diff.Field("hardware", "a b", "b a"))

    said = shown(diff.Changes("a 1", "a 2", fields, (), (), (), ()))

    assert "boards: +d -a\n" in said
    assert "hardware: in another order\n" in said


def test_the_same_image_twice_is_no_change(tmp_path: Path) -> None:
    one = small.build(tmp_path / "one")
    two = small.build(tmp_path / "two")

    found = diff.changes(one, two)

    assert found.nothing
    assert "nothing changed" in shown(found)


def test_long_lists_are_cut_unless_all_is_asked_for() -> None:
    files = tuple(diff.FileChange(f"/{number}", None, A, ()) for number in range(diff.SHORT + 5))
    found = diff.Changes("a 1", "a 2", (), (), (), files, ())

    assert "and 5 more: --all" in shown(found)
    assert f"/{diff.SHORT + 4} " not in shown(found)
    assert f"/{diff.SHORT + 4} " in shown(found, whole=True)


def test_a_files_name_steers_no_terminal() -> None:
    found = diff.Changes("a 1", "a 2", (), (), (), (diff.FileChange("/\x1b[2J[bold]x", None, A, ()),), ())

    assert "+ /?[2J[bold]x (3 bytes)" in shown(found)


def test_the_command_cuts_no_line_where_it_is_not_read_on_a_terminal(tmp_path: Path) -> None:
    small.build(tmp_path / "old")
    small.build(tmp_path / "new", root=lambda root: (root / "etc" / ("long" * 40)).write_text("x"))

    done = CliRunner().invoke(app, ["diff", str(tmp_path / "old"), str(tmp_path / "new")])

    assert f"  + /etc/{'long' * 40} (1 bytes)\n" in done.output


def test_the_command_takes_directories_and_prints_json(tmp_path: Path) -> None:
    small.build(tmp_path / "old")
    small.build(tmp_path / "new", version="1.1", root=lambda root: (root / "etc/more").write_text("x"))

    done = CliRunner().invoke(app, ["diff", str(tmp_path / "old"), str(tmp_path / "new/small-1.1.json"), "--json"])

    value = json.loads(done.output)
    (added,) = (change for change in value["files"] if change["old"] is None)
    assert (added["path"], added["new"]["mode"], added["new"]["size"]) == ("/etc/more", "0644", 1)
    assert {size["name"] for size in value["sizes"]} == {"image", "root", "files of the root", "BOOT", "CONTROL"}
