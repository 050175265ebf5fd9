"""The power goes at any moment of an update: afterwards the old release starts or the new one, whole, never neither.

What the installer and the launcher do to files is recorded once, then replayed call by call on a model of a disk that
loses whatever was not fsynced (tests/firmware_agent/disk.py). From everything that may remain, the launcher starts.
"""

import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import files, launcher
from firmware_agent.update import BadArchive, archive
from firmware_agent.update.archive import Digest, Manifest
from firmware_agent.update.releases import Expected, Releases
from tests.firmware_agent.disk import Disk, Recorder, Tree, materialise

LIMIT = 3

#: A sample of this many where more trees may remain of one moment.
MOST = 120


class Quick:
    """`os` without fsync: for judging, where only the result counts."""

    def __getattr__(self, name: str) -> Any:
        return (lambda handle: None) if name == "fsync" else getattr(os, name)


@dataclass
class World:
    """Three releases: one committed long ago, one in force, one to be installed."""

    root: Path
    tars: dict[str, tuple[bytes, Expected]] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path) -> "World":
        world = cls(root / "disk")
        (world.root / "opt/releases").mkdir(parents=True)
        (world.root / "state").mkdir()
        for version in ("0.9.0", "1.0.0", "1.1.0"):
            world.tars[version] = pack(root / version, version)
        releases = world.releases()
        for version in ("0.9.0", "1.0.0"):
            releases.install(io.BytesIO(world.tars[version][0]), world.tars[version][1])
        files.point(world.root / "opt/previous", f"releases/{world.name('0.9.0')}")
        files.point(world.root / "opt/current", f"releases/{world.name('1.0.0')}")
        (world.root / "opt/releases/.tmp-left-by-an-older-cut").mkdir()
        return world

    def releases(self) -> Releases:
        return Releases(self.root / "opt", self.root / "state")

    def name(self, version: str) -> str:
        return self.tars[version][1].name

    @property
    def digests(self) -> dict[str, Digest]:
        return {expected.name: expected.tar for _, expected in self.tars.values()}

    def start(self) -> str:
        plan = launcher.prepare(self.root / "opt", self.root / "state")
        assert plan
        return plan.release


def pack(tree: Path, version: str) -> tuple[bytes, Expected]:
    (tree / "firmware_agent").mkdir(parents=True)
    (tree / "lib/deep").mkdir(parents=True)
    (tree / "manifest.json").write_bytes(Manifest("picket", version, 1, ("picket,simulated",)).to_bytes())
    (tree / "firmware_agent/__main__.py").write_text(f"print('{version}')\n" * 40)
    (tree / "lib/deep/native.so").write_bytes(random.Random(version).randbytes(3000))
    (tree / "lib/deep/native.so").chmod(0o755)
    tar = io.BytesIO()
    digest = archive.write_tree(tree, tar)
    return tar.getvalue(), Expected(version, digest)


# --- what is done -------------------------------------------------------------------------------------------------

Story = Callable[[World, Recorder], None]


def install(world: World, recorder: Recorder) -> Releases:
    releases = world.releases()
    tar, expected = world.tars["1.1.0"]
    releases.install(io.BytesIO(tar), expected)
    recorder.mark("installed")
    releases.begin_trial(expected.name, job="job-1", limit=LIMIT)
    recorder.mark("on trial")
    releases.switch()
    recorder.mark("switched")
    return releases


def good_release(world: World, recorder: Recorder) -> None:
    """It comes, proves itself, is committed; the one before the last is removed."""
    releases = install(world, recorder)
    world.start()
    recorder.mark("started 1")
    recorder.mark("committing")
    releases.commit()
    recorder.mark("committed")
    world.start()
    releases.steady()
    releases.garbage_collect()


def given_up_by_itself(world: World, recorder: Recorder) -> None:
    """It starts, finds itself unhealthy, and rolls back."""
    releases = install(world, recorder)
    world.start()
    recorder.mark("started 1")
    recorder.mark("giving up")
    releases.roll_back("the sensor's line does not open")
    recorder.mark("given up")
    world.start()
    releases.forget_rolled_back()
    releases.garbage_collect()


def given_up_by_the_launcher(world: World, recorder: Recorder) -> None:
    """It dies at every start, until the launcher has enough."""
    releases = install(world, recorder)
    for attempt in range(LIMIT):
        world.start()
        recorder.mark(f"started {attempt + 1}")
    recorder.mark("giving up")
    world.start()
    recorder.mark("given up")
    releases.forget_rolled_back()
    releases.garbage_collect()


def cancelled(world: World, recorder: Recorder) -> None:
    """The job is cancelled between the installation and the switch."""
    releases = world.releases()
    tar, expected = world.tars["1.1.0"]
    releases.install(io.BytesIO(tar), expected)
    releases.begin_trial(expected.name, job="job-1", limit=LIMIT)
    releases.discard_trial()
    releases.garbage_collect()


STORIES: list[Story] = [good_release, given_up_by_itself, given_up_by_the_launcher, cancelled]


def record(world: World, story: Story, monkeypatch: pytest.MonkeyPatch) -> tuple[Disk, list[Any]]:
    """The disk before the story, and what the story did to it."""
    disk, recorder = Disk(world.root), Recorder(world.root)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", recorder)
        patch.setattr(launcher, "os", recorder)
        story(world, recorder)
    return disk, recorder.calls


def remains(disk: Disk, calls: list[Any], seed: str) -> Iterator[tuple[str, int, Tree]]:
    """Everything that may be left, with the last mark before it; each pair of mark and tree once."""
    draw, mark, seen = random.Random(seed), "begun", set()
    for position, call in enumerate([("mark", "begun"), *calls]):
        disk.apply(call)
        mark = call[1] if call[0] == "mark" else mark
        for tree in disk.remains(draw, MOST):
            key = (mark, tuple(sorted(tree.items())))
            if key not in seen:
                seen.add(key)
                yield mark, position, tree


# --- what must hold -----------------------------------------------------------------------------------------------

#: What may start after each mark. Nothing here says "neither".
MAY_START = {
    "begun": {"1.0.0"},
    "installed": {"1.0.0"},
    "on trial": {"1.0.0", "1.1.0"},
    "switched": {"1.1.0"},
    "started 1": {"1.1.0"},
    "started 2": {"1.0.0", "1.1.0"},  # the third attempt may be counted already
    "started 3": {"1.0.0"},
    "committing": {"1.1.0"},
    "committed": {"1.1.0"},
    "giving up": {"1.0.0", "1.1.0"},
    "given up": {"1.0.0"},
}


def judge(world: World, mark: str) -> list[str]:
    """What is wrong with the disk that is in `world.root` now, as the launcher and the next agent find it."""
    wrong = []
    versions = {world.name(version): version for version in world.tars}
    releases = world.releases()
    for name in releases.names():
        try:
            whole = releases.digest(name) == world.digests[name]
        except (BadArchive, OSError):
            whole = False
        if not whole:
            wrong.append(f"{name} has its name, but is not whole")
    if releases.current() is None:
        wrong.append("current leads nowhere")
    before = releases.trial()
    plan = launcher.prepare(world.root / "opt", world.root / "state")
    if not plan:
        return [*wrong, "nothing starts"]
    version, trial = versions[plan.release], releases.trial()
    if version not in MAY_START[mark]:
        wrong.append(f"{version} starts after {mark!r}")
    if version == "1.1.0" and mark not in {"committing", "committed"} and not (trial and trial.attempts):
        wrong.append("the release on trial starts uncounted")
    if mark.startswith("started") and before and before.attempts < int(mark.split()[1]):
        wrong.append("an attempt is forgotten")
    wrong += crash_on(world, plan.release)
    return wrong or tidy_up(world)


def crash_on(world: World, first: str) -> list[str]:
    """The agent dies at every start from now on: a trial must end, and anything else must stay as it is."""
    ran = [first]
    for _ in range(LIMIT + 1):
        plan = launcher.prepare(world.root / "opt", world.root / "state")
        if not plan:
            return ["nothing starts after some starts"]
        ran.append(plan.release)
    trial = world.releases().trial()
    if trial and world.releases().current() == trial.release:
        return [f"a trial does not end: {ran}"]
    if ran != sorted(ran, reverse=True):
        return [f"the releases alternate: {ran}"]
    return []


def tidy_up(world: World) -> list[str]:
    """What the next agent does: nothing may be left but releases, links and boot.json."""
    releases = world.releases()
    releases.forget_rolled_back()
    if releases.trial():
        releases.discard_trial()
    releases.garbage_collect()
    kept = {releases.current(), releases.previous()} - {None}
    found = {
        "releases": {path.name for path in (world.root / "opt/releases").iterdir()},
        "links": {path.name for path in (world.root / "opt").iterdir()},
        "state": {path.name for path in (world.root / "state").iterdir()},
    }
    expected = {"releases": kept, "links": {"releases", "current", "previous"}, "state": {"boot.json"}}
    return [] if found == expected else [f"orphans: {found}"]


def judge_all(world: World, story: Story, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is wrong with each disk that a power cut may leave, in turn."""
    disk, calls = record(world, story, monkeypatch)
    monkeypatch.setattr(files, "os", Quick())
    monkeypatch.setattr(launcher, "os", Quick())
    monkeypatch.setattr(launcher, "say", lambda words: None)
    for mark, position, tree in remains(disk, calls, story.__name__):
        shutil.rmtree(world.root)
        world.root.mkdir()
        materialise(tree, world.root)
        yield [f"cut after call {position} of {len(calls)} ({mark}): {words}" for words in judge(world, mark)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """In memory where there is such a place: hundreds of disks are put together per test."""
    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own within
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as root:
        yield World.make(Path(root))


@pytest.mark.parametrize("story", STORIES)
def test_whenever_the_power_goes_the_old_release_starts_or_the_new(
    world: World,
    story: Story,
    monkeypatch: pytest.MonkeyPatch,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    judged = list(judge_all(world, story, monkeypatch))

    count = len(judged)
    assert [words for wrong in judged for words in wrong] == []
    assert count > 200  # the model does lose things
    record_testsuite_property(f"disks after a power cut, {story.__name__}", count)
    sys.stdout.write(f"{story.__name__}: {count} disks after a power cut\n")


# --- the model itself: it must catch those who do it wrong --------------------------------------------------------


def no_sync(_handle_or_path: object) -> None:
    """What a careless programmer calls instead of fsync."""


def point_by_removal(link: Path, target: str) -> None:
    """`rm` and `ln -s`, as launchers of others do it."""
    files.os.unlink(link)  # type: ignore[attr-defined]
    files.os.symlink(target, link)  # type: ignore[attr-defined]
    files.sync_directory(link.parent)


def write_in_place(path: Path, data: bytes, mode: int = 0o644) -> None:
    """The old file is gone before the new one is there."""
    files.remove(path)
    files.create(path, [data], mode, durable=True)
    files.sync_directory(path.parent)


def write_without_sync(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Renamed, but its content may still be on its way."""
    temporary = path.with_name(f".{path.name}.new")
    files.remove(temporary)
    files.create(temporary, [data], mode)
    files.move(temporary, path)


def remove_in_place(releases: Releases, name: str) -> None:
    """A release keeps its name while it is taken apart."""
    files.remove(releases.path(name))


def switch_before_trial(releases: Releases, name: str, *, job: str, limit: int) -> None:
    """The link is switched before it is written down that this is a trial."""
    current = releases.current()
    assert current
    files.point(releases.directory / "current", f"releases/{name}")
    files.write_atomic(releases._boot, launcher.Boot(launcher.Trial(name, current, 0, limit, job)).to_bytes())


@pytest.mark.parametrize(
    ("where", "name", "careless", "story", "caught"),
    [
        (files, "sync_tree", no_sync, good_release, "not whole"),
        (files, "sync_directory", no_sync, good_release, "not whole"),
        (files, "point", point_by_removal, good_release, "current leads nowhere"),
        (files, "write_atomic", write_in_place, given_up_by_itself, "uncounted"),
        (files, "write_atomic", write_without_sync, good_release, "uncounted"),
        (launcher, "write_durably", write_without_sync, given_up_by_the_launcher, "uncounted"),
        (Releases, "_remove", remove_in_place, good_release, "not whole"),
        (Releases, "begin_trial", switch_before_trial, good_release, "uncounted"),
    ],
)
def test_the_model_catches_an_installer_that_is_careless(
    world: World, monkeypatch: pytest.MonkeyPatch, where: object, name: str, careless: object, story: Story, caught: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, name, careless)

        assert any(caught in words for wrong in judge_all(world, story, patch) for words in wrong)
