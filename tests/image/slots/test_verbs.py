"""Install, try, keep, go back: on each kind of boot control, with a firmware that does what the medium says."""

import errno
import os
import pty
import threading
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from image.files.usr.lib.picket.slots import control, fat, medium
from image.files.usr.lib.picket.slots import slots as verbs
from image.files.usr.lib.picket.slots import state as states
from image.files.usr.lib.picket.slots.board import Places
from image.files.usr.lib.picket.slots.faults import Fault, Gone
from tests.image.slots.world import SECTOR, Flag, Kit, World
from tests.image.slots.world import fat as make_fat

KINDS = [(how, counted) for how in ("autoboot", "os-prefix") for counted in (False, True)]


@pytest.fixture(params=KINDS, ids=[f"{how}, {'counted' if counted else 'one try'}" for how, counted in KINDS])
def world(request: pytest.FixtureRequest, tmp_path: Path, kit: Kit) -> World:
    how, counted = request.param
    return World.make(tmp_path / "disk", kit, how, counted=counted)


@pytest.fixture
def plain(tmp_path: Path, kit: Kit) -> World:
    return World.make(tmp_path / "disk", kit, "autoboot", counted=False)


def fails(code: str) -> Any:
    return pytest.raises(Fault, check=lambda fault: fault.code == code)


def tried(world: World, version: str = "1.1.0") -> None:
    world.install(version)
    world.slots().try_other()
    assert not world.boot()
    assert world.running().version == version


def test_an_image_is_installed_tried_and_kept(world: World) -> None:
    told: list[float] = []
    assert world.install("1.1.0", told.append) == {"slot": "b", "version": "1.1.0"}
    assert world.holds("b") == world.image("1.1.0")
    assert (told == sorted(told), told[-1]) == (True, 1.0)
    assert world.slots().status()["slots"]["b"]["version"] == "1.1.0"
    assert world.chosen() == "a"

    world.slots().try_other()
    assert world.firmware_says(tryboot=not world.flag.counted) == "b"
    assert not world.boot()
    assert world.slots().status()["on_trial"]

    world.slots().keep()
    world.slots().keep()
    status = world.slots().status()
    assert (world.chosen(), status["on_trial"], status["floor"]) == ("b", False, 2)
    assert not world.boot()
    assert world.booted == "b"


def test_a_slot_on_trial_that_is_not_kept_goes_back(world: World) -> None:
    tried(world)
    starts = 1
    while (over := world.boot()) or world.booted == "b":
        starts += not over
        assert starts < 9

    assert starts == (3 if world.flag.counted else 1)
    assert (world.booted, world.chosen()) == ("a", "a")
    status = world.slots().status()
    assert status["trial"] is None
    assert status["ended"].startswith("1.1.0: it was started")
    assert status["floor"] == 1


def test_a_trial_that_takes_too_long_is_given_up(world: World) -> None:
    assert not world.slots().end_trial()
    tried(world)

    assert world.slots().end_trial()
    with fails("wrong-state"):  # too late
        world.slots().keep()

    assert not world.boot()
    assert world.booted == "a"
    assert not world.slots().end_trial()


def read_only(*_: object) -> None:
    """What ext4 says after an error (errors=remount-ro)."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_an_image_that_broke_the_data_partition_is_left_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried(world)
    with monkeypatch.context() as patch:
        patch.setattr(medium, "write_file", read_only)
        assert world.slots().end_trial()
        assert world.chosen() == "a"
        assert "left to the next boot" in capsys.readouterr().err

    assert not world.boot()
    status = world.slots().status()
    assert (world.booted, status["trial"]) == ("a", None)
    assert status["ended"].startswith("1.1.0: it was started")


@pytest.mark.parametrize("how", ["autoboot", "os-prefix"])
def test_boots_above_the_limit_end_a_trial_whose_end_cannot_be_noted(
    tmp_path: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    world = World.make(tmp_path / "disk", kit, how, counted=True)
    tried(world)
    for _ in range(2):
        assert not world.boot()
    with monkeypatch.context() as patch:
        patch.setattr(medium, "write_file", read_only)
        assert world.boot()
        assert world.chosen() == "a"

    assert not world.boot()
    assert (world.booted, world.slots().status()["trial"]) == ("a", None)


def broken(*_: object) -> bytes:
    """What a card says that is at its end."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_try_ends_by_a_restart_even_if_the_medium_is_at_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried(world)
    slots = world.slots()
    for name in ("write_file", "write_sector", "read"):
        monkeypatch.setattr(medium, name, broken)

    if world.flag.counted:
        with fails("control"):  # a restart would lead back here
            slots.end_trial()
    else:
        assert slots.end_trial()
        assert world.chosen() == "a"


def test_a_keep_that_was_cut_off_is_not_left_by_a_restart_that_leads_back(
    plain: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried(plain)
    plain.slots()._place.keep("b")
    monkeypatch.setattr(medium, "write_sector", broken)

    with pytest.raises(OSError, match="Input/output"):
        plain.slots().end_trial()


def test_an_install_over_a_pending_try_does_not_begin_if_its_end_cannot_be_noted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.install("1.1.0")
    world.slots().try_other()
    monkeypatch.setattr(medium, "write_file", read_only)

    with fails("io"):
        world.install("1.2.0")

    assert world.holds("b") == world.image("1.1.0")


def test_a_try_without_a_data_partition_is_given_up(world: World) -> None:
    tried(world)
    for path in world.places.data.iterdir():
        path.unlink()
    world.places.booted.mkdir(parents=True, exist_ok=True)
    assert not world.slots().end_trial(), "lost notes alone are no reason"

    (world.places.booted / "no-data").touch()

    assert world.slots().end_trial() is not world.flag.counted
    world.boot()
    if not world.flag.counted:
        assert world.booted == "a"
        assert not world.slots().end_trial(), "the slot that came back stays"


def test_going_back_gives_a_trial_up_and_then_has_nothing_to_do(world: World) -> None:
    tried(world)

    assert world.slots().go_back() == {"slot": "a"}
    assert world.slots().go_back() == {"slot": "a"}
    world.boot()

    assert world.booted == "a"
    assert world.slots().go_back() == {"slot": "a"}
    assert world.chosen() == "a"


def test_a_keep_is_taken_back_as_long_as_the_floor_allows(world: World) -> None:
    tried(world)
    world.slots().keep()
    with fails("downgrade"):  # 1.1.0 has raised the security version from 1 to 2
        world.slots().go_back()

    tried(world, "1.2.0")
    world.slots().keep()
    assert world.slots().go_back() == {"slot": "b"}
    world.boot()
    assert world.running().version == "1.1.0"


def test_the_slot_that_would_come_back_is_never_written(world: World) -> None:
    tried(world)
    with fails("wrong-state"):
        world.install("1.2.0")

    world.slots().go_back()
    if world.booted == "b":
        with fails("wrong-state"):  # slot a boots next
            world.install("1.2.0")

    assert world.holds("a") == world.image("1.0.0")


def test_a_try_that_was_not_made_yet_is_forgotten_when_something_else_is_installed(world: World) -> None:
    world.install("1.1.0")
    world.slots().try_other()
    world.install("1.2.0")

    world.boot()

    assert world.booted == "a"
    assert world.holds("b") == world.image("1.2.0")


def test_nothing_is_tried_that_is_not_installed_whole(world: World) -> None:
    with fails("wrong-state"):
        world.slots().try_other()

    def pulled(fraction: float) -> None:
        if fraction > 0.3:
            raise Gone

    with pytest.raises(Gone):
        world.install("1.1.0", pulled)
    with fails("wrong-state"):
        world.slots().try_other()
    world.install("1.1.0")
    world.slots().try_other()


def test_what_was_kept_is_a_floor_even_after_all_notes_were_lost(world: World) -> None:
    tried(world)
    world.slots().keep()
    for path in (world.root / "data/system").iterdir():
        path.unlink()
    world.boot()

    with fails("downgrade"):
        world.install("1.0.0")
    assert states.load_floor(world.places.data) == 2


def test_a_keep_that_was_cut_off_is_finished_by_the_next_boot(plain: World) -> None:
    tried(plain)
    control.pick(plain.slots()._board, plain.places)[0].keep("b")

    assert not plain.boot(power_cut=True)

    assert plain.booted == "b"
    status = plain.slots().status()
    assert (status["trial"], status["floor"], status["kept"]) == (None, 2, "b")


def test_somebody_who_is_too_late_is_told(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "WAIT_SECONDS", 0.0)
    with plain.slots()._alone(), fails("busy"):
        plain.install("1.1.0")


def test_a_medium_that_does_not_give_back_what_was_written_is_named(
    plain: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weak(target: medium.Target, data: bytes, offset: int) -> None:
        original(target, bytes([data[0] ^ 1]) + data[1:] if offset == 0 and len(data) > SECTOR else data, offset)

    original = medium.Target.write
    monkeypatch.setattr(medium.Target, "write", weak)

    with fails("io"):
        plain.install("1.1.0")
    assert plain.slots().status()["slots"]["b"] is None


def test_a_card_that_changes_a_boot_file_is_named_and_not_the_bundle(
    tmp_path: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with a bundle is wrong for ever, what is wrong with a card may pass."""
    world = World.make(tmp_path / "disk", kit, "os-prefix", counted=True)

    def weak(path: Path, pieces: Iterator[bytes], mode: int) -> None:
        original(path, [bytes(len(piece)) for piece in pieces] if path.name == "vmlinuz" else pieces, mode)

    original = medium.create_file
    monkeypatch.setattr(medium, "create_file", weak)

    with pytest.raises(Fault, match="does not give back", check=lambda fault: fault.code == "io"):
        world.install("1.1.0")
    assert world.slots().status()["slots"]["b"] is None


def test_boot_files_that_were_not_signed_are_a_bad_bundle_and_touch_no_boot_files(tmp_path: Path, kit: Kit) -> None:
    world = World.make(tmp_path / "disk", kit, "os-prefix", counted=True)
    image, path = world.image("1.1.0"), tmp_path / "bundle"
    data = image.bundle.replace(b"picket.verity=1.1.0", b"picket.verity=6.6.6", 1)
    assert data != image.bundle
    path.write_bytes(data)
    before = (world.root / "fat/b/cmdline.txt").read_bytes()

    with path.open("rb") as file, pytest.raises(Fault, check=lambda fault: fault.code == "bad-bundle"):
        world.slots().install(file.fileno(), lambda _: None)

    assert (world.root / "fat/b/cmdline.txt").read_bytes() == before


@pytest.mark.parametrize("how", ["autoboot", "os-prefix"])
def test_a_bundle_that_cannot_be_read_is_named_and_not_the_slots_partition(
    tmp_path: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    world, bundles = World.make(tmp_path / "disk", kit, how, counted=True), list[int]()

    class Worn:
        """The data partition has a bad sector in the middle of the bundle."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def pread(self, handle: int, size: int, offset: int) -> bytes:
            if size > 4096:
                bundles.append(handle)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.pread(handle, size, offset)

    monkeypatch.setattr(verbs, "os", Worn())

    with pytest.raises(Fault, match="the bundle cannot be read", check=lambda fault: fault.code == "io"):
        world.install("1.1.0")
    assert bundles


def test_damaged_notes_cost_the_other_slot_and_nothing_else(plain: World) -> None:
    plain.install("1.1.0")
    (plain.root / "data/system/slots.json").write_text("{")

    status = plain.slots().status()

    assert (status["slots"]["a"]["version"], status["slots"]["b"], status["booted"]) == ("1.0.0", None, "a")


# --- boot control ---------------------------------------------------------------------------------------------------


def test_control_files_fill_their_sector() -> None:
    assert len(control.autoboot_text(2, 3)) == len(control.prefix_text("a")) == SECTOR
    assert control.autoboot_text(2, 3).startswith(
        b"[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"
    )


@pytest.mark.parametrize(("bits", "size"), [(12, 1 << 20), (16, 8 << 20), (32, 36 << 20)])
def test_a_small_file_is_found_in_every_kind_of_fat(tmp_path: Path, bits: int, size: int) -> None:
    files = {f"filler{number}.txt": b"x" * 700 for number in range(40)} | {"autoboot.txt": b"A" * SECTOR}
    content = make_fat(tmp_path / "fat", size, files, bits, 128)

    at = fat.find(lambda length, offset: content[offset : offset + length], "autoboot.txt")

    assert content[at : at + SECTOR] == b"A" * SECTOR


@pytest.mark.parametrize("files", [{}, {"autoboot.txt": b"short"}, {"autoboot.txt": b"A" * 513}])
def test_a_file_that_is_not_one_sector_is_not_changed(tmp_path: Path, files: dict[str, bytes]) -> None:
    content = make_fat(tmp_path / "fat", 1 << 20, files)

    with fails("control"):
        fat.find(lambda length, offset: content[offset : offset + length], "autoboot.txt")
    with fails("control"):
        fat.find(lambda length, _: bytes(length), "autoboot.txt")


def test_how_a_try_is_made_is_seen_from_the_board(tmp_path: Path) -> None:
    places = Places.under(tmp_path)
    assert control.one_try(places, autoboot=True).name == "counting"

    places.devices.mkdir()
    (places.devices / "vcio").touch()
    assert control.one_try(places, autoboot=True).name == "counting"  # a bootloader that does not say how old it is
    assert control.one_try(places, autoboot=False).name == "reboot argument"
    (places.device_tree / "chosen/bootloader").mkdir(parents=True)
    stamp = places.device_tree / "chosen/bootloader/build-timestamp"
    stamp.write_bytes((1_650_000_000).to_bytes(4, "big"))
    assert control.one_try(places, autoboot=True).name == "counting"  # older than tryboot_a_b
    stamp.write_bytes((1_700_000_000).to_bytes(4, "big"))
    assert control.one_try(places, autoboot=True).name == "reboot argument"

    (places.ports / "vport1p1").mkdir(parents=True)
    (places.ports / "vport1p1/name").write_text("picket.firmware\n")
    assert control.one_try(places, autoboot=True).name == "emulator's mailbox"


def test_the_reboots_argument_is_left_where_systemd_passes_it_on(tmp_path: Path) -> None:
    places = Places.under(tmp_path)
    arms = control.RebootArgument(places.reboot)

    arms.arm()
    assert (tmp_path / "run/systemd/reboot-param").read_text() == "0 tryboot"
    arms.disarm()
    arms.disarm()
    assert not places.reboot.exists()


@pytest.mark.parametrize(("answer", "code"), [(b"ok\n", None), (b"error: no\n", "control")])
def test_the_emulators_mailbox_is_a_line_for_a_line(answer: bytes, code: str | None) -> None:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    heard: list[bytes] = []

    def emulate() -> None:
        for _ in range(2 if code is None else 1):
            heard.append(os.read(ours, 64))
            os.write(ours, answer)

    thread = threading.Thread(target=emulate)
    thread.start()
    mailbox = control.Mailbox(Path(os.ttyname(theirs)))
    if code is None:
        mailbox.arm()
        mailbox.disarm()
        thread.join()
        assert heard == [b"tryboot 1\n", b"tryboot 0\n"]
    else:
        with fails(code):
            mailbox.arm()
        thread.join()
    os.close(theirs)
    os.close(ours)
    with fails("control"):
        control.Mailbox(Path("/dev/vport-that-is-not-there")).arm()


def test_an_armed_try_is_taken_once(plain: World) -> None:
    assert isinstance(plain.flag, Flag)
    plain.install("1.1.0")
    plain.slots().try_other()

    assert not plain.boot(power_cut=True)  # the flag does not survive that
    assert plain.booted == "a"
    assert plain.slots().status()["trial"] is None
