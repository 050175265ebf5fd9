"""The releases on a unit: immutable directories, and two links that say which one is in force.

    <directory>/releases/<version>-<first 8 hex digits of the tar's sha256>/
    <directory>/current  -> releases/…      what the launcher starts
    <directory>/previous -> releases/…      the release committed before, kept to go back to

The way of an update, each step durable before the next begins:

    install      unpack under a name that begins with a dot, check, fsync, rename
    begin_trial  boot.json says: this release is on trial, and that one is to come back if it fails
    switch       `current` points to the new release, by one rename
                 (the agent ends; the launcher counts the attempt and starts the new release)
    commit       `previous` points to the old release; boot.json has no trial any more: this is the moment of truth
    roll_back    boot.json says: given up; then `current` points to the old release again (the launcher finishes this)

At any moment there is a whole release to start: see tests/firmware_agent/test_power_cuts.py.
"""

import functools
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Concatenate, Final, ParamSpec, TypeVar

from firmware_agent import files, launcher
from firmware_agent.launcher import Boot, RolledBack, Trial
from firmware_agent.update import BadArchive, InstallFault, NoSpace, disk_fault
from firmware_agent.update.archive import Digest, Manifest, digest, release_name, unpack

_UNFINISHED: Final = ".tmp-"

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: boot.json is read, changed and written by the jobs' thread and by the house's: one `Releases` each, one file.
_BOOT_LOCK: Final = threading.Lock()


def _alone(
    step: "Callable[Concatenate[Releases, _P], _T]",
) -> "Callable[Concatenate[Releases, _P], _T]":
    """While one thread changes boot.json, no other does: a trial must neither get lost nor come back."""

    @functools.wraps(step)
    def locked(self: "Releases", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _BOOT_LOCK:
            return step(self, *args, **kwargs)

    return locked


#: Room that an update leaves for everything else: alarms come first.
RESERVE_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class Expected:
    """Which release an archive must hold: what the signed metadata say."""

    version: str
    tar: Digest

    @property
    def name(self) -> str:
        """The release's name."""
        return release_name(self.version, self.tar.sha256)


class Releases:
    """The releases directory and boot.json.

    One process at a time works with it. Everything is read from the disk at each call, so that an object may live as
    long as the agent.

    Args:
        directory: holds `releases/`, `current` and `previous` (settings: `paths.releases`).
        state: holds boot.json (settings: `paths.state`).
    """

    def __init__(self, directory: Path, state: Path) -> None:
        self.directory = directory
        self._boot = state / "boot.json"

    # --- what there is ---

    def current(self) -> str | None:
        """The release that the launcher would look at first; None if the link is missing or leads nowhere."""
        return self._linked("current")

    def previous(self) -> str | None:
        """The release committed before the current one, if it is still there."""
        return self._linked("previous")

    def names(self) -> list[str]:
        """All releases, oldest version first."""
        return sorted(launcher.names(self.directory), key=launcher.age)

    def path(self, name: str) -> Path:
        """The directory of a release."""
        return self.directory / "releases" / name

    def manifest(self, name: str) -> Manifest:
        """What a release says about itself.

        Raises:
            BadArchive: its manifest is damaged.
            OSError: it is not there.
        """
        return Manifest.parse((self.path(name) / "manifest.json").read_bytes())

    def digest(self, name: str) -> Digest:
        """The identity of a release, from all of its bytes on the disk.

        Raises:
            BadArchive: there is something in it that no archive has.
            OSError: it cannot be read.
        """
        return digest(self.path(name))

    def trial(self) -> Trial | None:
        """The release on trial, if there is one; it was switched to if `current()` is its release."""
        return self._read().trial

    def rolled_back(self) -> RolledBack | None:
        """Which release was given up, and why, until `forget_rolled_back`."""
        return self._read().rolled_back

    # --- the way of an update ---

    def install(self, tar: IO[bytes], expected: Expected) -> str:
        """Put a release in place, not in force. A release that is there and whole stays as it is.

        Args:
            tar: the uncompressed tar, as a stream.
            expected: what the signed metadata say about it.

        Returns:
            The release's name.

        Raises:
            BadArchive, BadDelta: the tar is not canonical, or not the expected one; nothing is left behind.
            InstallFault: the release is in force and damaged on the disk, or the disk does not do its work.
            NoSpace: the disk is full; nothing is left behind.
        """
        name = expected.name
        if self._is_whole(name, expected.tar):
            return name
        if name in self._kept():
            raise InstallFault(f"{name} is in use and damaged on the disk")
        unfinished = self.path(f"{_UNFINISHED}{name}")
        try:
            self._remove(name)
            files.remove(unfinished)
            manifest = unpack(tar, unfinished, expected.tar)
            if manifest.version != expected.version:
                raise BadArchive(f"the archive holds version {manifest.version}, not {expected.version}")
            files.move(unfinished, self.path(name))
        except OSError as error:
            files.remove(unfinished)
            raise disk_fault(error, f"install {name}", InstallFault) from error
        except BaseException:
            files.remove(unfinished)
            raise
        return name

    @_alone
    def begin_trial(self, name: str, *, job: str, limit: int = 3) -> Trial:
        """Say durably that `name` is on trial, from the current release. It is not switched to yet.

        Args:
            name: an installed release.
            job: whose trial it is; comes back in `rolled_back`.
            limit: how often the launcher may start it.

        Raises:
            InstallFault: it is not there, or it is the current release, or nothing is current, or another release is
                on trial.
        """
        boot, current = self._read(), self.current()
        if not launcher.looks_intact(self.path(name)):
            raise InstallFault(f"{name} is not installed")
        if boot.trial and boot.trial.release != name:
            raise InstallFault(f"{boot.trial.release} is on trial already")
        if boot.trial:
            return boot.trial
        if current is None or current == name:
            raise InstallFault(f"the release in force is {current}: {name} cannot be tried from it")
        trial = Trial(name, current, 0, limit, job)
        self._write(boot._replace(trial=trial, rolled_back=None))
        return trial

    def switch(self) -> None:
        """Make the release on trial the current one; the agent ends with EXIT_RESTART then.

        Raises:
            InstallFault: no release is on trial.
        """
        self._point("current", self._on_trial().release)

    @_alone
    def commit(self) -> None:
        """The current release has proved itself: it is no trial any more. Without a trial, nothing happens.

        Raises:
            InstallFault: the release on trial is not the current one.
        """
        boot = self._read()
        if not boot.trial:
            return
        if self.current() != boot.trial.release:
            raise InstallFault(f"{boot.trial.release} is on trial, but {self.current()} is current")
        self._point("previous", boot.trial.origin)
        self._write(Boot())

    @_alone
    def roll_back(self, reason: str) -> str:
        """Give the release on trial up, and make the one before it current; the agent ends with EXIT_RESTART then.

        Returns:
            The release that is current now.

        Raises:
            InstallFault: no release is on trial, or the one before it is gone.
        """
        trial = self._on_trial()
        if not launcher.looks_intact(self.path(trial.origin)):
            raise InstallFault(f"{trial.origin} is gone: there is no way back from {trial.release}")
        report = RolledBack(trial.release, trial.origin, reason, trial.attempts, trial.job)
        self._write(Boot(rolled_back=report))
        self._point("current", trial.origin)
        return trial.origin

    @_alone
    def discard_trial(self) -> None:
        """Forget a trial that was not switched to (the job was cancelled). Without a trial, nothing happens.

        Raises:
            InstallFault: the release on trial is the current one: roll back instead.
        """
        boot = self._read()
        if not boot.trial:
            return
        if self.current() == boot.trial.release:
            raise InstallFault(f"{boot.trial.release} is on trial and current: it can only be rolled back")
        self._write(boot._replace(trial=None))

    @_alone
    def forget_rolled_back(self) -> None:
        """The roll back was reported. It is finished first, if the power failed in its middle."""
        boot = self._read()
        if not boot.rolled_back:
            return
        if self.current() == boot.rolled_back.release and launcher.looks_intact(self.path(boot.rolled_back.to)):
            self._point("current", boot.rolled_back.to)
        self._write(boot._replace(rolled_back=None))

    @_alone
    def steady(self) -> None:
        """The committed release runs well: its starts are counted from zero again."""
        boot = self._read()
        if boot.unsteady:
            self._write(boot._replace(unsteady=0))

    def garbage_collect(self) -> list[str]:
        """Remove the releases that nothing points to, and what interrupted work has left; returns their names.

        Kept are current, previous and both releases of a trial. Not to be called while an installation is under way.
        """
        removed = [name for name in self.names() if name not in self._kept()]
        for name in removed:
            self._remove(name)
        leftovers = [
            *self.directory.glob(f"releases/{_UNFINISHED}*"),
            *self.directory.glob(".*.new"),
            *self._boot.parent.glob(f".{self._boot.name}*.new"),
        ]
        for path in leftovers:
            files.remove(path)
        if removed or leftovers:  # else a power cut could bring them back after the job is closed
            for folder in (self.directory / "releases", self.directory, self._boot.parent):
                files.sync_directory(folder)
        return removed

    # --- the disk ---

    def _linked(self, link: str) -> str | None:
        name = launcher.linked(self.directory / link)
        return name if name and self.path(name).is_dir() else None

    def _point(self, link: str, name: str) -> None:
        if launcher.linked(self.directory / link) != name:
            files.point(self.directory / link, f"releases/{name}")

    def _read(self) -> Boot:
        return launcher.read_boot(self._boot)

    def _write(self, boot: Boot) -> None:
        files.write_atomic(self._boot, boot.to_bytes())

    def _on_trial(self) -> Trial:
        trial = self._read().trial
        if not trial:
            raise InstallFault("no release is on trial")
        return trial

    def _kept(self) -> set[str]:
        boot = self._read()
        kept = {self.current(), self.previous()}
        if boot.trial:
            kept |= {boot.trial.release, boot.trial.origin}
        if boot.rolled_back:
            kept |= {boot.rolled_back.to}
        return {name for name in kept if name}

    def _is_whole(self, name: str, expected: Digest) -> bool:
        try:
            return self.digest(name) == expected
        except (BadArchive, OSError):
            return False

    def _remove(self, name: str) -> None:
        """Remove a release; it loses its name first, so that half of one is never taken for a release."""
        path = self.path(name)
        if path.exists():
            doomed = self.path(f"{_UNFINISHED}removed-{name}")
            files.remove(doomed)
            files.move(path, doomed)
            files.remove(doomed)


# --- room ---------------------------------------------------------------------------------------------------------


def room_needed(tar_bytes: int, payload_bytes: int) -> int:
    """Bytes that an update needs: the payload, the unpacked release with its last blocks half full, and the reserve."""
    return payload_bytes + tar_bytes + tar_bytes // 4 + RESERVE_BYTES


def check_room(directory: Path, needed: int) -> None:
    """Whether `needed` bytes are free, to everybody, where `directory` lies.

    Raises:
        NoSpace: they are not; the message says how many there are.
    """
    there = shutil.disk_usage(directory).free
    if there < needed:
        raise NoSpace(f"{needed >> 20} MiB are needed in {directory}, {there >> 20} MiB are free")
