"""Whose releases this unit takes: The Update Framework's metadata, and floors that outlive them.

The job document and the servers are hints; a release is what signed metadata say it is. python-tuf fetches and checks
the metadata, from the root that the image brought. It is used for metadata only: the payload has a download of its own
(`firmware_agent.update.download`), because python-tuf's keeps it all in a temporary file and cannot resume.

python-tuf alone forgets what it has seen when its directory is lost, and then takes old metadata for new. The floor
file lies apart from that directory and holds the newest versions seen and the security version committed to; what runs
is a floor of its own.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firmware_agent import files
from firmware_agent.digests import digest
from firmware_agent.settings import Settings
from firmware_agent.update.floor import Mark, read_floor, write_floor
from firmware_agent.update.target import (
    BadSignature,
    BadTarget,
    ClockNotTrusted,
    Downgrade,
    Expired,
    NotListed,
    Payload,
    Running,
    Target,
    Unreachable,
    WrongRing,
    check_path,
    judge,
    parse_delta,
    parse_target,
)

if TYPE_CHECKING:
    from tuf.api.metadata import DelegatedRole, Role
    from tuf.ngclient import Updater

_LOG: Final = logging.getLogger(__name__)

#: Field of a delegation, signed by the offline targets role: the serials of the only units that it is for.
UNITS_FIELD: Final = "x-picket-units"

#: What no honest repository of ours comes near, in bytes.
_ROOT_LIMIT: Final = 64 << 10
_TIMESTAMP_LIMIT: Final = 8 << 10
_SNAPSHOT_LIMIT: Final = 64 << 10
_TARGETS_LIMIT: Final = 1 << 20
_ROTATIONS: Final = 64

#: Digits of a release's digest that its directory's name holds.
_PREFIX: Final = 8


class Trust:
    """The unit's trust in releases. For one thread at a time.

    Args:
        root: the root metadata that the image brought, version 1 or whichever was current when it was made.
        metadata: directory of python-tuf's own; made if it is not there, and may be lost.
        floor: the floor file; in another directory.
        product: whose releases are taken.
        serial: of this unit, for releases that are for canaries only.
        now: the time if it can be trusted for judging expiry, else None.
        authorities: PEM certificates that HTTPS servers may chain to, beside the system's.
        allow_files: take `file://` URLs too: for a mirror on a disk, that only somebody at the unit can name.
        seconds: the longest that one metadata file may take.
    """

    def __init__(
        self,
        *,
        root: Path,
        metadata: Path,
        floor: Path,
        product: str,
        serial: str,
        now: Callable[[], datetime | None],
        authorities: str = "",
        allow_files: bool = False,
        seconds: float = 60.0,
    ) -> None:
        self._root = root
        self._metadata = metadata
        self._floor = floor
        self._product = product
        self._serial = serial
        self._now = now
        self._authorities = authorities
        self._allow_files = allow_files
        self._seconds = seconds

    @classmethod
    def of(cls, settings: Settings, serial: str, now: Callable[[], datetime | None], authorities: str = "") -> "Trust":
        """The trust that a unit's settings describe."""
        return cls(
            root=settings.update.root,
            metadata=settings.paths.tuf,
            floor=settings.paths.floor,
            product=settings.update.product,
            serial=serial,
            now=now,
            authorities=authorities,
        )

    def check(self, path: str, metadata_url: str, running: Running) -> Target:
        """Fetch the newest metadata, and say what release the target path is, if this unit may run it.

        Afterwards the versions of the metadata are durable and are the new floor for metadata. The security floor does
        not move before `commit`.

        Args:
            path: target path, for example `agent/picket-agent-1.2.0.tar.zst`; may come from a job document.
            metadata_url: base URL of the metadata; may come from a job document, and gives no authority.
            running: what runs now; decides about the hardware, `min_from` and which delta is of use.

        Returns:
            The release; `delta` is set where a delta from the running release was signed.

        Raises:
            TrustFault: one of the faults of `firmware_agent.update.target`, by reason.
            OSError: the state directory cannot be written.
        """
        check_path(path)
        now = self._now()
        if now is None:
            raise ClockNotTrusted("the clock is not set yet, so nobody can say which metadata has expired")
        with _told_in_words(), self._session(metadata_url, now) as updater:
            updater.refresh()
            found = updater.get_targetinfo(path)
            self._raise_floor(self._seen(path))
            self._check_ring(path)
            if found is None:
                raise NotListed(f"the signed metadata do not name {path}: never released, or withdrawn")
            target = parse_target(path, found.length, found.hashes.get("sha256", ""), found.custom)
            judge(target, running, self._product, self.security_floor(target.kind))
            return replace(target, delta=self._delta(updater, target, running))

    def commit(self, security_version: int, kind: str = "agent") -> None:
        """Raise the security floor to that of a release that has proved itself; a lower one changes nothing.

        Raises:
            OSError: the floor cannot be written; the old one holds.
        """
        floor = read_floor(self._floor)
        if (raised := floor.committed(kind, security_version)) != floor:
            write_floor(self._floor, raised)

    def security_floor(self, kind: str = "agent") -> int:
        """The security version that releases of this kind must have; 0 before anything was committed to."""
        return read_floor(self._floor).security.get(kind, 0)

    @contextmanager
    def _session(self, url: str, now: datetime) -> "Iterator[Updater]":
        """python-tuf over our fetcher, our directory and our time."""
        from tuf.ngclient import Updater, UpdaterConfig  # noqa: PLC0415 - 8 MB that an idle agent goes without

        from firmware_agent.update.fetch import Fetcher  # noqa: PLC0415

        try:
            bootstrap = self._root.read_bytes()
        except OSError as error:
            raise BadSignature(f"this image brings no root of trust for updates: {error}") from error
        self._metadata.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._metadata.glob("tmp*"):
            left.unlink()  # python-tuf's, of a write that a power cut ended
        config = UpdaterConfig(
            max_root_rotations=_ROTATIONS,
            max_delegations=8,
            root_max_length=_ROOT_LIMIT,
            timestamp_max_length=_TIMESTAMP_LIMIT,
            snapshot_max_length=_SNAPSHOT_LIMIT,
            targets_max_length=_TARGETS_LIMIT,
        )
        fetcher = Fetcher(url, authorities=self._authorities, allow_files=self._allow_files, seconds=self._seconds)
        with closing(fetcher):
            updater = Updater(str(self._metadata), url, fetcher=fetcher, config=config, bootstrap=bootstrap)
            # python-tuf takes the system's time; ours comes from whoever knows whether that can be trusted.
            updater._trusted_set.reference_time = now  # noqa: SLF001
            yield updater

    def _raise_floor(self, seen: Mapping[str, Mark]) -> None:
        """Refuse metadata older than the floor; make newer ones durable, and then the floor.

        Raises:
            Downgrade: some role's metadata are older than what this unit has seen.
        """
        floor = read_floor(self._floor)
        floor.check(seen)
        if (raised := floor.raised(seen)) != floor:
            _sync_tree(self._metadata)
            write_floor(self._floor, raised)

    def _delta(self, updater: "Updater", target: Target, running: Running) -> Payload | None:
        """The delta from the running release; a delta is a convenience, so a bad one is passed over."""
        if len(running.tar) < _PREFIX:
            return None
        for hint in target.deltas:
            if not hint.source.startswith(running.tar):
                continue
            found = updater.get_targetinfo(hint.path)
            if found is None:
                _LOG.warning("the delta %s is announced, but nobody signed it", hint.path)
                continue
            try:
                digest = found.hashes.get("sha256", "")
                return parse_delta(hint.path, found.length, digest, found.custom, hint.source, target.tar_sha256)
            except BadTarget as error:
                _LOG.warning("the delta is passed over: %s", error)
        return None

    def _seen(self, path: str) -> dict[str, Mark]:
        """How new the metadata on disk are that a path depends on, all of which python-tuf has just checked."""
        from tuf.api.metadata import Metadata, Root, Snapshot, Timestamp  # noqa: PLC0415

        root = Metadata[Root].from_file(str(self._metadata / "root.json")).signed
        timestamp = Metadata[Timestamp].from_file(str(self._metadata / "timestamp.json")).signed
        snapshot = Metadata[Snapshot].from_file(str(self._metadata / "snapshot.json")).signed
        seen = {"root": Mark(root.version, "")}
        for name, version in (
            ("timestamp", timestamp.version),
            ("snapshot", snapshot.version),
            ("targets", snapshot.meta["targets.json"].version),
        ):
            seen[name] = Mark(version, _keys(root.roles[name]))
        for role in self._delegations(path):
            if (entry := snapshot.meta.get(f"{role.name}.json")) is not None:
                seen[role.name] = Mark(entry.version, _keys(role))
        return seen

    def _delegations(self, path: str) -> "list[DelegatedRole]":
        """The roles that the offline targets role trusts with a path."""
        from tuf.api.metadata import Metadata, Targets  # noqa: PLC0415

        delegations = Metadata[Targets].from_file(str(self._metadata / "targets.json")).signed.delegations
        roles = delegations.roles if delegations else None
        return [role for role in roles.values() if role.is_delegated_path(path)] if roles else []

    def _check_ring(self, path: str) -> None:
        """Keep what is delegated for some units only away from all others."""
        for role in self._delegations(path):
            units = role.unrecognized_fields.get(UNITS_FIELD)
            if units is not None and (not isinstance(units, list) or self._serial not in units):
                raise WrongRing(f"{path} is for canaries only, and {self._serial} is none of them")


def _keys(role: "Role") -> str:
    """What tells one set of a role's keys from another."""
    return digest(f"{role.threshold} {sorted(role.keyids)}".encode())[:16]


def _sync_tree(top: Path) -> None:
    """Make files durable that somebody else wrote, before anything relies on them."""
    for folder, _, names in os.walk(top):
        for name in names:
            handle = os.open(Path(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        files.sync_directory(Path(folder))


@contextmanager
def _told_in_words() -> Iterator[None]:
    """python-tuf's errors as faults of ours."""
    from tuf.api import exceptions as tuf  # noqa: PLC0415
    from tuf.api.serialization import DeserializationError  # noqa: PLC0415

    try:
        yield
    except tuf.DownloadError as error:
        raise Unreachable(f"the update's metadata cannot be fetched: {error}") from error
    except DeserializationError as error:
        raise Unreachable("the answer is no metadata; is somebody else answering, as a captive portal does?") from error
    except tuf.ExpiredMetadataError as error:
        raise Expired(f"{error}; the fleet's operator renews it, or somebody holds back newer metadata") from error
    except tuf.BadVersionNumberError as error:
        raise Downgrade(f"{error}: a rollback, or files that do not belong together") from error
    except tuf.RepositoryError as error:
        raise BadSignature(str(error) or type(error).__name__) from error
