"""The verbs. Each may be cut off anywhere and be called again.

    install   nothing of the other slot counts (slots.json) ─▶ its boot sector is zeros ─▶ root ─▶ boot but for its
              first sector ─▶ that sector ─▶ read back ─▶ it counts (slots.json)
    try       on trial (slots.json) ─▶ aimed at, or chosen where boots are counted ─▶ the next boot is a try
    keep      chosen ─▶ no trial any more (slots.json) ─▶ the floor rises
    go-back   the slot before is chosen ─▶ no trial any more

    check     early in every boot: counts it, ends a trial that is over, finishes what was cut off
    end-trial twenty minutes after a boot: one that is still on trial is given up

What each boot may find is listed in docs/adr/0082.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from . import bundle as bundles
from . import control, medium, signature
from . import state as states
from .board import SLOTS, Board, Partition, Places
from .faults import Fault
from .state import Held, State, Trial

#: Boots that a slot has to prove itself where they are counted.
ATTEMPTS: Final = 3
#: How long a second caller waits for the first.
WAIT_SECONDS: Final = 30.0

FSCK: Final = "/usr/sbin/fsck.fat"
#: A pass may leave something for the next one; none is known that leaves anything for the third.
_PASSES: Final = 3
#: How fsck.fat ends when it came to its end.
_COUNTED: Final = re.compile(r": \d+ files, \d+/\d+ clusters$")
#: What it makes of clusters that belonged to no file.
_SALVAGED: Final = re.compile(r"fsck[0-9]{4}\.rec", re.IGNORECASE)

Progress = Callable[[float], None]


class Slots:
    """The slots of this unit.

    Args:
        places: where things lie.
        board: what runs.
        place, one_try: boot control.
        mounted: makes a FAT partition a directory for a while; only with control "os-prefix".
        mended: makes a FAT sound that a power cut may have left in disorder; likewise.
        attempts: boots on trial where they are counted.

    Raises:
        Fault: io; this boot was not one from a slot.
    """

    def __init__(
        self,
        places: Places,
        board: Board,
        place: control.Place,
        one_try: control.OneTry,
        mounted: "Callable[[Partition], AbstractContextManager[Path]] | None" = None,
        mended: Callable[[Partition], None] | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._places = places
        self._board = board
        self._place = place
        self._try = one_try
        self._mounted = mounted or partial(mount, places.mount)
        self._mended = mended or mend
        self._attempts = attempts

    @classmethod
    def of_this_unit(cls, places: Places) -> "Slots":
        """What runs here."""
        board = Board.read(places)
        return cls(places, board, *control.pick(board, places))

    # --- looking

    def status(self) -> dict[str, Any]:
        """Everything that there is to know, as JSON."""
        state, layout = self._state(), self._board.layout
        return {
            "booted": self._board.slot,
            "kept": self._place.kept(),
            "on_trial": self._on_trial(state),
            "trial": None if state.trial is None else vars(state.trial).copy(),
            "slots": {slot: vars(state.slots[slot]).copy() if slot in state.slots else None for slot in SLOTS},
            "product": layout.name,
            "version": layout.version,
            "security_version": layout.security_version,
            "floor": self._floor(),
            "control": layout.control,
            "one_try": self._try.name,
            "ended": state.ended,
        }

    # --- changing

    def install(self, handle: int, progress: Progress) -> dict[str, Any]:
        """Write the bundle in an open file into the other slot.

        Returns:
            slot and version.

        Raises:
            Fault: any of them; the running slot is untouched, and the other one counts for nothing unless it is whole.
            OSError: the same, where the boot files are a file system's.
        """
        with self._alone():
            self._may_install()
            read = partial(_pread, handle)
            found, manifest = self._believe(handle, read)
            slot = self._board.other
            self._give_up_pending()
            state = self._state()
            others = {name: held for name, held in state.slots.items() if name != slot}
            self._save(replace(state, slots=MappingProxyType(others), previous=None, ended=""))
            told = _Told(progress, 2 * (manifest.root.size + manifest.boot.size))
            root = self._board.partition(f"root-{slot}")
            if self._board.layout.control == "autoboot":
                boot = self._board.partition(f"boot-{slot}")
                _unboot(boot)
                _write(root, read, found.root, manifest.root, told)
                _write(boot, read, found.boot, manifest.boot, told, first_last=True)
            else:
                _write(root, read, found.root, manifest.root, told)
                self._write_files(slot, read, found.boot, manifest.boot, told)
            digest = hashlib.sha256(found.manifest).hexdigest()
            held = Held(manifest.version, manifest.security_version, digest)
            self._save(replace(self._state(), slots=MappingProxyType({**others, slot: held})))
            return {"slot": slot, "version": manifest.version}

    def try_other(self) -> dict[str, Any]:
        """The other slot is booted next, and only once unless it is kept.

        Raises:
            Fault: wrong-state, downgrade, control, io.
        """
        with self._alone():
            state, slot = self._state(), self._board.other
            if self._on_trial(state):
                raise Fault("wrong-state", "this image is itself on trial: keep it, or go back first")
            self._bootable(state, slot)
            trial = Trial(slot, self._board.slot, 0, self._attempts, self._try.counted)
            self._save(replace(state, trial=trial, ended=""))
            if self._try.counted:
                self._place.keep(slot)
            else:
                self._place.keep(self._board.slot)
                self._place.aim(slot)
                self._try.arm()
            return {"slot": slot, "one_try": self._try.name}

    def keep(self) -> dict[str, Any]:
        """The running slot is the one to boot from now on. Also twice.

        Raises:
            Fault: wrong-state, control, io.
        """
        with self._alone():
            state = self._state()
            if state.trial is not None and state.trial.slot != self._board.slot:
                raise Fault("wrong-state", f"slot {state.trial.slot} is to be tried, and {self._board.slot} runs")
            kept = self._place.kept()
            if state.trial is None and kept not in {None, self._board.slot}:
                raise Fault("wrong-state", f"this image was given up, and slot {kept} boots next")
            self._keep(state)
            return {"slot": self._board.slot}

    def go_back(self) -> dict[str, Any]:
        """The slot before is the one to boot from now on: a trial is given up, or the last `keep` is undone.

        Nothing happens if neither is there to be undone.

        Raises:
            Fault: downgrade, control, io.
        """
        with self._alone():
            state = self._state()
            if state.trial is not None:
                self._end(state, "it was given up")
                return {"slot": state.trial.before}
            before = state.previous
            if before is None or self._place.kept() != self._board.slot:
                return {"slot": self._place.kept() or self._board.slot}
            self._bootable(state, before)
            self._place.keep(before)
            self._save(replace(state, previous=None, ended=f"{self._board.layout.version} was taken back"))
            return {"slot": before}

    # --- by root's own units

    def check(self) -> bool:
        """Look at this boot; whether the board has to restart because its trial is over.

        Raises:
            Fault: control, io.
        """
        with self._alone():
            state = self._state()
            if state.trial is None:
                if self._place.kept() == self._board.slot:
                    self._raise_floor()
                return False
            if state.trial.slot != self._board.slot:
                self._end(state, "it was started and did not stay up, or was never started")
                return False
            if not state.trial.counted and self._place.kept() == self._board.slot:
                self._keep(state)  # which was cut off
                return False
            attempts = state.trial.attempts + 1
            if state.trial.counted and attempts > state.trial.limit:
                self._leave(state, state.trial, f"it was started {state.trial.limit} times and not kept")
                return True
            self._save(replace(state, trial=replace(state.trial, attempts=attempts)))
            return False

    def end_trial(self) -> bool:
        """Give up what is on trial and runs; whether the board has to restart.

        Raises:
            Fault: control, io; a restart would lead back here.
        """
        with self._alone():
            state = self._state()
            if state.trial is not None and self._on_trial(state):
                self._leave(state, state.trial, "it was not kept in time")
                return True
            # Without the data partition there are no notes; what runs and is not the chosen slot is a try all the same.
            return (self._places.booted / "no-data").exists() and self._place.kept() == self._board.other

    # --- within

    def _may_install(self) -> None:
        if self._on_trial(self._state()):
            raise Fault("wrong-state", "this image is on trial, and the other slot is what comes back")
        state, kept = self._state(), self._place.kept()
        if state.trial is None and kept not in {None, self._board.slot}:
            raise Fault("wrong-state", f"slot {kept} is the one to boot next: restart first")

    def _believe(self, handle: int, read: bundles.Read) -> tuple[bundles.Bundle, bundles.Manifest]:
        """The bundle, if it was signed for this unit."""
        details = os.fstat(handle)
        if not stat.S_ISREG(details.st_mode):
            raise Fault("bad-request", "a bundle is a file")
        found = bundles.read_bundle(read, details.st_size)
        signature.verify(found.manifest, found.signature, bundles.NAMESPACE, self._places.signers)
        manifest = bundles.parse_manifest(found.manifest)
        board, other = self._board, self._board.other
        autoboot = board.layout.control == "autoboot"
        unit = bundles.Unit(
            product=board.layout.name,
            control=board.layout.control,
            disk=board.layout.disk,
            compatible=board.compatible,
            floor=self._floor(),
            boot_size=board.partition(f"boot-{other}").size if autoboot else 0,
            root_size=board.partition(f"root-{other}").size,
        )
        bundles.judge(found, manifest, unit)
        return found, manifest

    def _floor(self) -> int:
        return max(states.load_floor(self._places.data), self._board.layout.security_version)

    def _state(self) -> State:
        """The state, with what runs in its slot: that one is whole, or it would not run."""
        state, layout = states.load(self._places.data), self._board.layout
        held = state.slots.get(self._board.slot)
        if held is not None and (held.version, held.security_version) == (layout.version, layout.security_version):
            return state
        running = Held(layout.version, layout.security_version)
        return replace(state, slots=MappingProxyType({**state.slots, self._board.slot: running}))

    def _save(self, state: State) -> None:
        try:
            states.save(self._places.data, state)
        except OSError as error:
            raise Fault("io", f"what the slots hold cannot be noted: {error}") from error

    def _raise_floor(self) -> None:
        with contextlib.suppress(OSError):  # what runs is a floor of its own, and the next boot tries again
            states.raise_floor(self._places.data, self._board.layout.security_version)

    def _on_trial(self, state: State) -> bool:
        return state.trial is not None and state.trial.slot == self._board.slot

    def _bootable(self, state: State, slot: str) -> None:
        held = state.slots.get(slot)
        if held is None:
            raise Fault("wrong-state", f"nothing whole is installed in slot {slot}")
        floor = states.load_floor(self._places.data)
        if held.security_version < floor:
            raise Fault("downgrade", f"slot {slot} has security version {held.security_version}, the floor is {floor}")

    def _keep(self, state: State) -> None:
        self._place.keep(self._board.slot)
        if state.trial is not None:
            self._save(replace(state, trial=None, previous=state.trial.before))
        self._raise_floor()

    def _end(self, state: State, why: str) -> None:
        """The trial is over, and the slot before is chosen."""
        if state.trial is None:
            return
        self._choose_before(state.trial)
        self._note_end(state, state.trial, why)

    def _leave(self, state: State, trial: Trial, why: str) -> None:
        """The trial of what runs is over, and the board is about to restart.

        The image on trial may be what broke the data partition: what cannot be noted must not hold it. `check` makes
        the note good in the slot that comes back.

        Raises:
            Fault, OSError: control, io; the next boot would take this slot again.
        """
        try:
            self._choose_before(trial)
        except (Fault, OSError) as error:
            if trial.counted or self._place.kept() == self._board.slot:
                raise
            log(f"slot {trial.before} cannot be chosen, and an ordinary boot takes it as it is: {error}")
        try:
            self._note_end(state, trial, why)
        except Fault as fault:
            log(f"the end of the trial is left to the next boot: {fault.detail}")

    def _choose_before(self, trial: Trial) -> None:
        self._try.disarm()
        self._place.keep(trial.before)

    def _note_end(self, state: State, trial: Trial, why: str) -> None:
        held = state.slots.get(trial.slot)
        self._save(replace(state, trial=None, ended=f"{held.version if held else 'the other slot'}: {why}"))

    def _give_up_pending(self) -> None:
        """Whatever the other slot was to do next, it will not: it is about to be written."""
        state = self._state()
        if state.trial is not None:
            self._end(state, "something else was installed instead")

    def _write_files(
        self, slot: str, read: bundles.Read, span: tuple[int, int], part: bundles.Part, told: "_Told"
    ) -> None:
        """The slot's boot files, into its directory beside the firmware's own files."""
        if medium.copy(read, span, lambda _piece, _offset: None, lambda: None, lambda _: None) != part.sha256:
            raise Fault("bad-bundle", "the boot files are not what was signed")
        files = bundles.read_files(read, *span)
        boot = self._board.partition("boot")
        self._mended(boot)
        with self._mounted(boot) as top:
            folder = top / slot
            medium.remove_tree(folder)
            for left in sorted(top.iterdir()):
                if _SALVAGED.fullmatch(left.name):
                    medium.remove_file(left)
            # The names are gone before anything else is made durable: an fsync of any file writes the whole FAT, and a
            # name that leads to clusters which are free there is what the driver stops at, for good.
            medium.sync_directory(top)
            medium.make_directory(folder)
            for name, start, size in files:
                path = folder / name
                if not path.parent.is_dir():
                    medium.make_directory(path.parent)
                medium.create_file(path, _pieces(read, start, size, told), 0o644)
            for parent in sorted({(folder / name).parent for name, _, _ in files} | {folder, top}):
                medium.sync_directory(parent)
        with self._mounted(boot) as top:
            if _digest_of_files(top / slot, [name for name, _, _ in files]) != part.sha256:
                raise Fault("io", f"{boot.path} does not give back the boot files that were written")
        told(2 * part.size - sum(size for _, _, size in files))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes anything meanwhile.

        Raises:
            Fault: busy.
        """
        handle = os.open(self._places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + WAIT_SECONDS
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise Fault("busy", "another request is being worked on") from None
                    time.sleep(0.1)
            yield
        finally:
            os.close(handle)


def log(text: str) -> None:
    """For the journal."""
    sys.stderr.write(f"{text}\n")


class _Told:
    """Adds up what was done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._progress(min(1.0, self._done / self._total))


def _pread(handle: int, size: int, offset: int) -> bytes:
    """Up to so many bytes of the bundle; less only at its end.

    Raises:
        Fault: io.
    """
    data = b""
    try:
        while len(data) < size and (piece := os.pread(handle, size - len(data), offset + len(data))):
            data += piece
    except OSError as error:
        raise Fault("io", f"the bundle cannot be read: {error}") from error
    return data


def _unboot(boot: Partition) -> None:
    """No firmware takes this partition for one to boot from until it is whole."""
    with medium.opened(boot, alone=True) as target:
        target.write(bytes(medium.SECTOR), 0)
        target.sync()


def _write(
    partition: Partition,
    read: bundles.Read,
    span: tuple[int, int],
    part: bundles.Part,
    told: _Told,
    *,
    first_last: bool = False,
) -> None:
    """A member into a partition, checked on its way and on the medium.

    Args:
        partition: where to.
        read: of the bundle.
        span: where the member is.
        part: what it must be.
        told: of the progress.
        first_last: its first sector is written when everything else is right and durable.
    """
    first = b""

    def write(piece: bytes, offset: int) -> None:
        nonlocal first
        if first_last and not offset:
            first, piece, offset = piece[: medium.SECTOR], piece[medium.SECTOR :], medium.SECTOR
        target.write(piece, offset)

    with medium.opened(partition, alone=True) as target:
        if medium.copy(read, span, write, target.sync, told) != part.sha256:
            raise Fault("bad-bundle", "a member is not what was signed")
        if first:
            target.write(first, 0)
            target.sync()
        if target.digest(part.size, told) != part.sha256:
            raise Fault("io", f"{partition.path} does not give back what was written")


def _pieces(read: bundles.Read, start: int, size: int, told: _Told) -> Iterator[bytes]:
    for offset in range(0, size, medium.PIECE):
        piece = read(min(medium.PIECE, size - offset), start + offset)
        told(len(piece))
        yield piece


def _digest_of_files(folder: Path, names: list[str]) -> str:
    """The digest of the tar that these files would make: there is only one."""
    found = hashlib.sha256()
    for name in names:
        path = folder / name
        size = path.stat().st_size
        found.update(bundles.header(name, size))
        with path.open("rb") as file:
            for piece in iter(partial(file.read, medium.PIECE), b""):
                found.update(piece)
        found.update(bytes(bundles.padding(size)))
    found.update(bundles.END)
    return found.hexdigest()


def mend(partition: Partition) -> None:
    """Make a FAT sound: the driver frees clusters and removes names in no order, and a power cut parts the two.

    fsck.fat -a ends by 0 if it changed nothing, by 1 if it did, and also by 1 if it gave up: then its last line does
    not count clusters. A name whose clusters are free becomes one without clusters, and the next pass removes it. What
    belongs to no name becomes a file `FSCK0000.REC`, which is ours to remove (fsck.fat(8), dosfstools 4.2). That the
    file system was not unmounted (its dirty flag) is something that it mends.

    Raises:
        Fault: busy, the partition is in use; io.
    """
    with medium.opened(partition, alone=True) as target:
        for _ in range(_PASSES):
            if not _fsck(partition.path):
                break
        target.sync()


def _fsck(path: Path) -> bool:
    """One pass; whether it changed something."""
    try:
        words = (FSCK, "-a", str(path))
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise Fault("io", f"{FSCK}: {error}") from error
    said, complaint = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
    if done.returncode not in {0, 1} or not _COUNTED.search(said):
        last = (complaint or said).rpartition("\n")[2]
        raise Fault("io", f"{path} cannot be mended: {last} ({done.returncode})")
    return done.returncode == 1


@contextmanager
def mount(where: Path, partition: Partition) -> Iterator[Path]:
    """A FAT partition as a directory, in this process's own mount namespace; after a new mount the cache is cold.

    At the first thing that is wrong with it, the driver writes no more: both slots lie there, and going on could cost
    the one that runs. The next attempt mends it first.

    Raises:
        Fault: io.
    """
    where.mkdir(mode=0o700, exist_ok=True)
    options = "rw,nosuid,nodev,noexec,noatime,errors=remount-ro"
    _run("/usr/bin/mount", "-t", "vfat", "-o", options, str(partition.path), str(where))
    try:
        yield where
    finally:
        _run("/usr/bin/umount", str(where))


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise Fault("io", f"{words[0]}: {error}") from error
