"""Releases on the disk: what may happen to them, and what may not."""

import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from firmware_agent import files, launcher
from firmware_agent.launcher import Boot, RolledBack, Trial
from firmware_agent.update import BadArchive, InstallFault, NoSpace, archive
from firmware_agent.update.archive import Manifest
from firmware_agent.update.releases import RESERVE_BYTES, Expected, Releases, check_room, room_needed


def pack(root: Path, version: str, *, claim: str | None = None) -> tuple[bytes, Expected]:
    """The tar of a release, and what the metadata say about it."""
    tree = root / f"tree-{version}"
    (tree / "firmware_agent").mkdir(parents=True)
    (tree / "manifest.json").write_bytes(Manifest("picket", version, 1, ("picket,simulated",)).to_bytes())
    (tree / "firmware_agent/__main__.py").write_text(f"print('{version}')")
    tar = io.BytesIO()
    digest = archive.write_tree(tree, tar)
    return tar.getvalue(), Expected(claim or version, digest)


def install(releases: Releases, root: Path, version: str) -> str:
    tar, expected = pack(root, version)
    return releases.install(io.BytesIO(tar), expected)


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    """A unit with one release, in force."""
    (tmp_path / "opt/releases").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    releases = Releases(tmp_path / "opt", tmp_path / "state")
    files.point(tmp_path / "opt/current", f"releases/{install(releases, tmp_path, '1.0.0')}")
    return releases


def on_the_disk(releases: Releases) -> set[str]:
    return {path.name for path in (releases.directory / "releases").iterdir()}


def start(releases: Releases) -> str:
    """What the launcher would start."""
    plan = launcher.prepare(releases.directory, releases.directory.parent / "state")
    assert plan
    return plan.release


# --- installing ---------------------------------------------------------------------------------------------------


def test_a_release_is_installed_under_its_version_and_digest_and_not_in_force(
    releases: Releases, tmp_path: Path
) -> None:
    before = releases.current()
    tar, expected = pack(tmp_path, "1.1.0")

    name = releases.install(io.BytesIO(tar), expected)

    assert name == f"1.1.0-{expected.tar.sha256[:8]}" == expected.name
    assert releases.names() == [before, name]
    assert (releases.current(), releases.previous(), releases.trial()) == (before, None, None)
    assert releases.digest(name) == expected.tar
    assert releases.manifest(name).version == "1.1.0"


def test_installing_what_is_there_reads_nothing(releases: Releases, tmp_path: Path) -> None:
    tar, expected = pack(tmp_path, "1.1.0")
    releases.install(io.BytesIO(tar), expected)

    assert releases.install(io.BytesIO(b""), expected) == expected.name


def test_a_damaged_release_that_is_not_in_use_is_installed_anew(releases: Releases, tmp_path: Path) -> None:
    tar, expected = pack(tmp_path, "1.1.0")
    program = releases.path(releases.install(io.BytesIO(tar), expected)) / "firmware_agent/__main__.py"
    program.chmod(0o644)
    program.write_text("rotten")

    releases.install(io.BytesIO(tar), expected)

    assert releases.digest(expected.name) == expected.tar
    assert on_the_disk(releases) == set(releases.names())


def test_a_damaged_release_that_is_in_use_is_not_touched(releases: Releases, tmp_path: Path) -> None:
    current = releases.current()
    assert current
    program = releases.path(current) / "firmware_agent/__main__.py"
    program.chmod(0o644)
    program.write_text("rotten")
    shutil.rmtree(tmp_path / "tree-1.0.0")
    tar, expected = pack(tmp_path, "1.0.0")

    with pytest.raises(InstallFault, match="in use and damaged"):
        releases.install(io.BytesIO(tar), expected)
    assert program.read_text() == "rotten"


@pytest.mark.parametrize("spoilt", ["cut", "another", "version"])
def test_a_refused_archive_leaves_nothing_behind(releases: Releases, tmp_path: Path, spoilt: str) -> None:
    before = on_the_disk(releases)
    tar, expected = pack(tmp_path, "1.1.0", claim="1.2.0" if spoilt == "version" else None)
    tar = {"cut": tar[:-100], "another": pack(tmp_path, "1.3.0")[0], "version": tar}[spoilt]

    with pytest.raises(BadArchive):
        releases.install(io.BytesIO(tar), expected)
    assert on_the_disk(releases) == before


@pytest.mark.parametrize(("number", "fault"), [(errno.ENOSPC, NoSpace), (errno.EIO, InstallFault)])
def test_a_disk_that_is_full_or_broken_leaves_nothing_behind(
    releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fault: type[Exception]
) -> None:
    tar, expected = pack(tmp_path, "1.1.0")
    before = on_the_disk(releases)
    original = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(number, os.strerror(number))
        return original(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(fault, match=f"cannot install {expected.name}: {os.strerror(number)}"):
        releases.install(io.BytesIO(tar), expected)
    assert on_the_disk(releases) == before


def test_what_an_interrupted_installation_left_is_replaced(releases: Releases, tmp_path: Path) -> None:
    tar, expected = pack(tmp_path, "1.1.0")
    leftover = releases.path(f".tmp-{expected.name}")
    (leftover / "firmware_agent").mkdir(parents=True)
    (leftover / "firmware_agent/extra.py").write_text("from an earlier attempt")

    releases.install(io.BytesIO(tar), expected)

    assert releases.digest(expected.name) == expected.tar
    assert on_the_disk(releases) == set(releases.names())


def test_room_is_asked_for_before_anything_is_fetched(tmp_path: Path) -> None:
    assert room_needed(16 << 20, 4 << 20) == (24 << 20) + RESERVE_BYTES
    check_room(tmp_path, 1)
    with pytest.raises(NoSpace, match=r"1073741824 MiB are needed in .*, [0-9]+ MiB are free"):
        check_room(tmp_path, 1 << 50)


# --- trial, commit, roll back -------------------------------------------------------------------------------------


def test_a_good_release_goes_its_way(releases: Releases, tmp_path: Path) -> None:
    old, new = releases.current(), install(releases, tmp_path, "1.1.0")
    assert old

    assert releases.begin_trial(new, job="job-1", limit=2) == Trial(new, old, 0, 2, "job-1")
    assert start(releases) == old
    releases.switch()
    assert releases.current() == new
    assert start(releases) == new
    assert releases.trial() == Trial(new, old, 1, 2, "job-1")
    releases.commit()
    assert (releases.current(), releases.previous(), releases.trial()) == (new, old, None)
    assert [start(releases) for _ in range(9)] == [new] * 9


def test_a_release_that_rolls_back_says_why_until_it_was_reported(releases: Releases, tmp_path: Path) -> None:
    old, new = releases.current(), install(releases, tmp_path, "1.1.0")
    releases.begin_trial(new, job="job-1")
    releases.switch()
    start(releases)

    assert releases.roll_back("no sensor") == old

    assert (releases.current(), releases.previous(), releases.trial()) == (old, None, None)
    assert releases.rolled_back() == RolledBack(new, str(old), "no sensor", 1, "job-1")
    assert start(releases) == old
    releases.forget_rolled_back()
    assert releases.rolled_back() is None


def test_a_roll_back_cut_in_its_middle_is_finished_before_it_is_forgotten(releases: Releases, tmp_path: Path) -> None:
    old, new = releases.current(), install(releases, tmp_path, "1.1.0")
    releases.begin_trial(new, job="job-1")
    releases.switch()
    releases.roll_back("no sensor")
    files.point(releases.directory / "current", f"releases/{new}")  # as if the switch had been lost

    releases.forget_rolled_back()

    assert releases.current() == old


def test_the_same_release_can_be_tried_again_after_a_roll_back(releases: Releases, tmp_path: Path) -> None:
    new = install(releases, tmp_path, "1.1.0")
    releases.begin_trial(new, job="job-1")
    releases.switch()
    releases.roll_back("no sensor")

    releases.begin_trial(new, job="job-2")
    releases.switch()

    assert releases.rolled_back() is None
    assert start(releases) == new


def test_a_rollback_keeps_the_previous_release(releases: Releases, tmp_path: Path) -> None:
    first, second = releases.current(), install(releases, tmp_path, "1.1.0")
    releases.begin_trial(second, job="job-1")
    releases.switch()
    releases.commit()
    third = install(releases, tmp_path, "1.2.0")
    releases.begin_trial(third, job="job-2")
    releases.switch()
    releases.roll_back("no sensor")

    assert (releases.current(), releases.previous()) == (second, first)


def test_each_step_can_be_repeated(releases: Releases, tmp_path: Path) -> None:
    """As a job does that was interrupted just after the step, and just before it had noted so."""
    new = install(releases, tmp_path, "1.1.0")
    first = releases.begin_trial(new, job="job-1")
    assert releases.begin_trial(new, job="job-1") == first
    releases.switch()
    releases.switch()
    releases.commit()
    releases.commit()
    releases.forget_rolled_back()
    releases.discard_trial()
    releases.steady()
    releases.steady()

    assert (releases.current(), releases.trial()) == (new, None)


def nothing(releases: Releases, _old: str, _new: str) -> None:
    pass


def begin(releases: Releases, _old: str, new: str) -> None:
    releases.begin_trial(new, job="job-1")


def begin_and_switch(releases: Releases, old: str, new: str) -> None:
    begin(releases, old, new)
    releases.switch()


def lose_the_old_release(releases: Releases, old: str, new: str) -> None:
    begin_and_switch(releases, old, new)
    shutil.rmtree(releases.path(old))


def lose_the_link(releases: Releases, _old: str, _new: str) -> None:
    (releases.directory / "current").unlink()


Step = Callable[[Releases, str, str], object]
WRONG_STEPS: list[tuple[Step, Step, str]] = [
    (nothing, lambda releases, _old, _new: releases.switch(), "no release is on trial"),
    (nothing, lambda releases, _old, _new: releases.roll_back("x"), "no release is on trial"),
    (nothing, lambda releases, old, _new: releases.begin_trial(old, job="j"), "cannot be tried"),
    (nothing, lambda releases, _old, _new: releases.begin_trial("9.9.9-00000000", job="j"), "not installed"),
    (lose_the_link, begin, "cannot be tried"),
    (begin, lambda releases, _old, _new: releases.commit(), "is current"),
    (begin, lambda releases, old, _new: releases.begin_trial(old, job="k"), "on trial already"),
    (begin_and_switch, lambda releases, _old, _new: releases.discard_trial(), "only be rolled back"),
    (lose_the_old_release, lambda releases, _old, _new: releases.roll_back("x"), "no way back"),
]


@pytest.mark.parametrize(("before", "step", "words"), WRONG_STEPS)
def test_a_step_out_of_turn_is_refused(
    releases: Releases, tmp_path: Path, before: Step, step: Step, words: str
) -> None:
    old, new = releases.current(), install(releases, tmp_path, "1.1.0")
    assert old
    before(releases, old, new)
    trial = releases.trial()

    with pytest.raises(InstallFault, match=words):
        step(releases, old, new)
    assert releases.trial() == trial


def test_a_trial_can_be_discarded_before_the_switch(releases: Releases, tmp_path: Path) -> None:
    old, new = releases.current(), install(releases, tmp_path, "1.1.0")
    releases.begin_trial(new, job="job-1")
    releases.discard_trial()

    assert (releases.current(), releases.trial()) == (old, None)
    assert releases.garbage_collect() == [new]


def test_a_steady_agent_starts_from_zero_again(releases: Releases) -> None:
    for _ in range(4):
        start(releases)
    releases.steady()

    assert launcher.read_boot(releases.directory.parent / "state/boot.json").unsteady == 0


def test_a_word_of_being_steady_neither_loses_a_trial_nor_brings_one_back(
    releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The house says it on a thread of its own, in the middle of whatever the jobs do."""
    new, state = install(releases, tmp_path, "1.1.0"), tmp_path / "state"
    start(releases)
    read, spoken = launcher.read_boot, threading.Event()

    def slow_read(path: Path) -> Boot:
        boot = read(path)
        if threading.current_thread() is not threading.main_thread():
            spoken.set()
            time.sleep(0.1)  # between reading and writing
        return boot

    monkeypatch.setattr(launcher, "read_boot", slow_read)
    for step, trial in ((lambda: releases.begin_trial(new, job="job-1"), True), (releases.commit, False)):
        launcher.write_durably(state / "boot.json", read(state / "boot.json")._replace(unsteady=2).to_bytes())
        house = threading.Thread(target=Releases(releases.directory, state).steady)
        spoken.clear()
        house.start()
        assert spoken.wait(20)
        step()
        house.join()
        assert (releases.trial() is not None) is trial
        releases.switch() if trial else None


# --- garbage ------------------------------------------------------------------------------------------------------


def test_only_what_may_be_needed_is_kept(releases: Releases, tmp_path: Path) -> None:
    first, second = releases.current(), install(releases, tmp_path, "1.1.0")
    releases.begin_trial(second, job="job-1")
    releases.switch()
    releases.commit()
    third, fourth = install(releases, tmp_path, "1.2.0"), install(releases, tmp_path, "1.10.0")
    releases.begin_trial(fourth, job="job-2")
    for leftover in ("opt/releases/.tmp-1.3.0-00000000/lib", "opt/releases/.tmp-removed-x"):
        (tmp_path / leftover).mkdir(parents=True)
    for leftover in ("opt/.current.new", "opt/.previous.ab12.new", "state/.boot.json.new", "state/.boot.json.0a.new"):
        (tmp_path / leftover).symlink_to("nowhere")
    (tmp_path / "state/.other.new").touch()

    assert releases.garbage_collect() == [third]

    assert releases.names() == [first, second, fourth]
    assert on_the_disk(releases) == {first, second, fourth}
    assert {path.name for path in (tmp_path / "opt").iterdir()} == {"releases", "current", "previous"}
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"boot.json", ".other.new"}


def test_the_release_to_go_back_to_is_kept_while_a_roll_back_is_unfinished(releases: Releases, tmp_path: Path) -> None:
    old, new = releases.current(), install(releases, tmp_path, "1.1.0")
    releases.begin_trial(new, job="job-1")
    releases.switch()
    releases.roll_back("no sensor")
    files.point(releases.directory / "current", f"releases/{new}")

    assert releases.garbage_collect() == []
    assert start(releases) == old


def test_links_that_lead_elsewhere_are_no_releases(releases: Releases, tmp_path: Path) -> None:
    for target in ("/etc", "../../etc", "releases/../releases", "releases/.tmp-x", "releases/9.9.9-00000000"):
        (releases.directory / "current").unlink()
        (releases.directory / "current").symlink_to(target)

        assert releases.current() is None
