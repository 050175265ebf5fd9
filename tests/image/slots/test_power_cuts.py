"""The power goes at any moment of an OS update: afterwards the old image boots or the new one, whole, never neither.

What the helper does to the medium, to its notes and to the boot files is recorded once, then replayed call by call on a
model that loses whatever was not fsynced (tests/firmware_agent/disk.py), sector by sector on the medium. Each remainder
is judged: which slot would boot, is it whole, do the notes tell the truth, and does going on from there end well?
"""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from image.files.usr.lib.picket.slots import medium, signature
from image.files.usr.lib.picket.slots import slots as verbs
from image.files.usr.lib.picket.slots import state as states
from image.files.usr.lib.picket.slots.faults import Fault
from image.firmware import NoBootError
from tests.firmware_agent.disk import Disk, Recorder, materialise
from tests.image.slots.world import SECTOR, Flag, Kit, World

#: A sample of this many where more may remain of one moment.
MOST = 24

KINDS = [(how, counted) for how in ("autoboot", "os-prefix") for counted in (False, True)]
NAMES = [f"{how}, {'counted' if counted else 'one try'}" for how, counted in KINDS]


class Quick:
    """`os` without fsync: for judging, where only the result counts."""

    def __getattr__(self, name: str) -> Any:
        return (lambda handle: None) if name == "fsync" else getattr(os, name)


# --- what is done -------------------------------------------------------------------------------------------------

Mark = Callable[[str], None]
Story = Callable[[World, Mark], None]


def on_trial(world: World, mark: Mark) -> None:
    mark("installing")
    world.install("1.1.0")
    mark("installed")
    mark("arming")
    world.slots().try_other()
    mark("armed")
    world.boot()
    mark("on trial")


def kept(world: World, mark: Mark) -> None:
    """It proves itself, and the next one goes where the old one was."""
    on_trial(world, mark)
    mark("keeping")
    world.slots().keep()
    mark("kept")
    world.boot()
    world.install("1.2.0")


def given_up(world: World, mark: Mark) -> None:
    """It finds itself unwell."""
    on_trial(world, mark)
    mark("giving up")
    world.slots().go_back()
    mark("given up")
    world.boot()
    world.install("1.2.0")


def given_up_by_root(world: World, mark: Mark) -> None:
    """Nobody keeps it, and it stays up."""
    on_trial(world, mark)
    mark("giving up")
    assert world.slots().end_trial()
    mark("given up")
    world.boot()


def dies(world: World, mark: Mark) -> None:
    """It dies in each of its boots."""
    on_trial(world, mark)
    for _ in range(2 if world.flag.counted else 0):
        world.boot()
    mark("giving up")
    world.boot()
    mark("given up")
    world.boot()


def another_one_instead(world: World, mark: Mark) -> None:
    """A try is asked for, and then something else is installed over it."""
    mark("installing")
    world.install("1.1.0")
    mark("arming")
    world.slots().try_other()
    mark("giving up")
    world.install("1.2.0")
    mark("given up")


STORIES = [kept, given_up, given_up_by_root, dies, another_one_instead]


def may_boot(mark: str, *, counted: bool) -> set[str]:
    """Which slots may boot after a power cut that follows a mark. Nothing here says "neither"."""
    match mark:
        case "begun" | "installing" | "installed" | "given up":
            return {"a"}
        case "kept":
            return {"b"}
        case "arming" | "giving up":
            return {"a", "b"} if counted else {"a"}
        case "armed" | "on trial":
            return {"b"} if counted else {"a"}
        case "keeping":
            return {"b"} if counted else {"a", "b"}
    raise AssertionError(mark)


# --- what must hold -----------------------------------------------------------------------------------------------


def record(world: World, story: Story, monkeypatch: pytest.MonkeyPatch) -> tuple[Disk, list[Any]]:
    """The disk before the story, and what the story did to it."""
    disk, recorder = Disk(world.root, ["medium"]), Recorder(world.root)
    with monkeypatch.context() as patch:
        patch.setattr(medium, "os", recorder)
        patch.setattr(medium, "PIECE", 4096)
        story(world, recorder.mark)
    return disk, recorder.calls


def judge(world: World, mark: str) -> list[str]:
    """What is wrong with the disk that is in `world.root` now."""
    counted = world.flag.counted
    world.flag.disarm()
    notes = world.places.data / "slots.json"
    try:
        noted = states.parse(notes.read_bytes()) if notes.exists() else states.State()
    except (ValueError, KeyError, TypeError):
        return ["slots.json is damaged"]
    wrong = []
    for slot, held in noted.slots.items():
        found = world.holds(slot)
        if found is None or found.version != held.version:
            wrong.append(f"slot {slot} is noted as {held.version}, and is not whole")
    if world.how == "autoboot":
        bootable = [slot for slot in ("a", "b") if any(world.stretch(f"boot-{slot}")[:SECTOR])]
        wrong += [f"slot {slot} looks bootable, and is not whole" for slot in bootable if world.holds(slot) is None]
    chosen = world.chosen()
    try:
        says = world.firmware_says()
    except NoBootError as error:
        return [*wrong, f"nothing boots: {error}"]
    if says != chosen:
        wrong.append(f"the firmware boots slot {says}, and the files say {chosen}")
    if chosen not in may_boot(mark, counted=counted):
        wrong.append(f"slot {chosen} boots")
    if world.holds(chosen) is None:
        return [*wrong, f"slot {chosen} boots, and is not whole"]
    in_doubt = mark in {"arming", "armed", "on trial", "giving up"}
    if counted and chosen == "b" and in_doubt and (noted.trial is None or noted.trial.slot != "b"):
        wrong.append("slot b boots uncounted")
    return wrong or go_on(world)


def go_on(world: World) -> list[str]:
    """What the next boots do: keep what runs, then bring another image to its end."""
    try:
        for _ in range(2):
            if not world.boot(power_cut=True):
                break
        else:
            return ["the board restarts again and again"]
        status = world.slots().status()
        if status["trial"] is not None and not world.flag.counted:
            return ["a trial stays open"]
        world.slots().keep()
        before = world.booted
        world.install("1.2.0")
        world.slots().try_other()
        world.boot()
        world.slots().keep()
        world.boot(power_cut=True)
    except (Fault, AssertionError) as error:
        return [f"it does not go on: {error!r}"]
    status = world.slots().status()
    if (world.booted, status["trial"], status["floor"]) != (status["kept"], None, 2) or world.booted == before:
        return [f"going on leads to {status}"]
    left = {path.name for path in world.places.data.iterdir()} - {"slots.json", "os-floor"}
    return [f"left over: {left}"] if left else []


def judge_all(world: World, story: Story, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is wrong with each disk that a power cut may leave, in turn."""
    monkeypatch.setattr(signature, "verify", lambda *_: "image")
    disk, calls = record(world, story, monkeypatch)
    monkeypatch.setattr(medium, "os", Quick())
    draw, mark, seen = random.Random(story.__name__), "begun", set()
    for position, call in enumerate([("mark", "begun"), *calls]):
        disk.apply(call)
        mark = call[1] if call[0] == "mark" else mark
        for tree in disk.remains(draw, MOST):
            key = hash((mark, tuple(sorted(tree.items()))))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(world.root)
            world.root.mkdir()
            materialise(tree, world.root)
            yield [f"cut after call {position} of {len(calls)} ({mark}): {words}" for words in judge(world, mark)]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: hundreds of disks are put together per test."""
    shared = Path("/dev/shm")  # noqa: S108 - a directory of our own within
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as root:
        yield Path(root)


@pytest.mark.parametrize(("how", "counted"), KINDS, ids=NAMES)
@pytest.mark.parametrize("story", STORIES)
def test_whenever_the_power_goes_the_old_image_boots_or_the_new(
    memory: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch, how: str, counted: bool, story: Story
) -> None:
    world = World.make(memory / "disk", kit, how, counted=counted)

    judged = list(judge_all(world, story, monkeypatch))

    assert [words for wrong in judged for words in wrong] == []
    assert len(judged) > 50  # the model does lose things
    sys.stdout.write(f"{story.__name__}: {len(judged)} disks after a power cut\n")


def test_the_old_boot_files_names_are_gone_before_anything_else_is_made_durable(
    memory: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FAT's driver writes the whole FAT with any file: a name may not outlive its clusters (no part of the model)."""
    world = World.make(memory / "disk", kit, "os-prefix", counted=True)

    def install(world: World, _: Mark) -> None:
        world.install("1.1.0")

    _, calls = record(world, install, monkeypatch)

    removed = max(at for at, call in enumerate(calls) if call[0] == "unlink" and call[1].startswith("fat/b"))
    opened = {}
    for call in calls[removed:]:
        if call[0] == "open":
            opened[call[1]] = call[2]
        if call[0] == "fsync":
            assert opened[call[1]] == "fat"
            break
    else:
        raise AssertionError("nothing is made durable")


# --- the model itself: it must catch those who do it wrong --------------------------------------------------------


def no_sync(_self: object) -> None:
    """What a careless programmer calls instead of fsync."""


def in_order(*args: Any, **_: Any) -> None:
    """The boot sector is written first, because it comes first."""
    original_write(*args, first_last=False)


def as_it_was(_boot: object) -> None:
    """The old boot sector stays while the new slot is written."""


def system() -> Any:
    """`os` as the helper has it at the moment."""
    return vars(medium)["os"]


def notes_in_place(path: Path, data: bytes, mode: int = 0o600) -> None:
    """The old notes are gone before the new ones are there."""
    if path.exists():
        system().unlink(path)
    medium.create_file(path, [data], mode)
    medium.sync_directory(path.parent)


def notes_without_sync(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Renamed, but the content may still be on its way."""
    new = path.with_name(f".{path.name}.new")
    handle = system().open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    system().write(handle, data)
    system().close(handle)
    system().replace(new, path)
    medium.sync_directory(path.parent)


def chosen_without_sync(partition: Any, data: bytes, offset: int) -> None:
    """One sector, and nobody waits for it."""
    with medium.opened(partition, alone=False) as target:
        target.write(data, offset)


def chosen_before_noted(slots: verbs.Slots) -> None:
    """The other slot is made the chosen one before anybody notes that this is a trial."""
    slots._place.keep(slots._board.other)
    original_try(slots)


def forgets_nothing(slots: verbs.Slots, state: states.State) -> None:
    """Whatever is being written, both slots stay noted as they were."""
    old = states.load(slots._places.data)
    merged = {**old.slots, **state.slots}
    original_save(slots, states.State(merged, state.trial, state.previous, state.ended))


original_write, original_try, original_save = verbs._write, verbs.Slots.try_other, verbs.Slots._save


@pytest.mark.parametrize(
    ("where", "name", "careless", "how", "counted", "story", "caught"),
    [
        (medium.Target, "sync", no_sync, "autoboot", False, kept, "not whole"),
        (verbs, "_write", in_order, "autoboot", False, kept, "looks bootable"),
        (verbs, "_unboot", as_it_was, "autoboot", False, kept, "looks bootable"),
        (medium, "sync_directory", no_sync, "os-prefix", False, kept, "not whole"),
        (medium, "write_file", notes_in_place, "autoboot", True, dies, "uncounted"),
        (medium, "write_file", notes_without_sync, "autoboot", False, kept, "damaged"),
        (medium, "write_sector", chosen_without_sync, "autoboot", False, kept, "slot a boots"),
        (medium, "write_sector", chosen_without_sync, "os-prefix", True, given_up, "slot b boots"),
        (verbs.Slots, "try_other", chosen_before_noted, "os-prefix", True, kept, "uncounted"),
        (verbs.Slots, "_save", forgets_nothing, "autoboot", False, kept, "not whole"),
    ],
)
def test_the_model_catches_a_helper_that_is_careless(
    memory: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch, where: object, name: str, careless: object, how: str,
    counted: bool, story: Story, caught: str,
) -> None:  # fmt: skip
    world = World.make(memory / "disk", kit, how, counted=counted)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, careless)

        assert any(caught in words for wrong in judge_all(world, story, patch) for words in wrong)


def test_a_flag_of_the_firmware_is_no_part_of_the_disk(memory: Path, kit: Kit) -> None:
    world = World.make(memory / "disk", kit, "autoboot", counted=False)

    assert isinstance(world.flag, Flag)
    assert sorted(path.name for path in world.root.iterdir()) == ["data", "fat", "medium"]
