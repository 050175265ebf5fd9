"""The update repository on disk: which releases there are, signed so that units can believe it (TUF).

    <repository>/metadata/   what units fetch: N.root.json, N.<role>.json, timestamp.json      (served)
    <repository>/targets/    what they download, named by digest: agent/<sha256>.<file>         (served)
    <repository>/staged/     new metadata that wait for signatures                              (not served)
    <repository>/root.json   the newest root, for the next image                                (not served)

Roles, for a product called `picket`:

    root            2 of 3 holders, offline   says which keys the others have
    targets         2 of 3 holders, offline   delegates; says which units are canaries
    picket          2 of 3 holders, offline   agent/picket-*, os/picket-*                 what all units may run
    picket-canary   1 key, where releases are built   agent/canary/picket-*, os/canary/picket-*   for canaries only
    snapshot, timestamp   online              say what is newest

A change is staged, signed by as many as it takes (each brings a key, nobody needs two), and published. Publishing
writes what is referred to before what refers to it, `timestamp.json` last; cut anywhere, the repository is the old one
or the new one, and publishing again completes it.
"""

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from cloud.errors import RepositoryFault
from cloud.roles import (
    DAYS,
    DELEGATED_DAYS,
    KEEP,
    KINDS,
    ONLINE,
    RINGS,
    UNITS_FIELD,
    Release,
    RoleStatus,
    Signing,
    canary_role,
    delegations,
    describe,
    expiry,
    holder_of,
    keep_newest,
    listed,
    new_root,
    new_targets,
    role_and_keys,
    stored_name,
    unlist,
    version_key,
)

__all__ = ["Published", "Release", "Repository", "RoleStatus", "Signing", "canary_role", "version_key"]

_S = TypeVar("_S", bound=Signed)

#: What units take for a version and for a digest (`firmware_agent.update.target`).
_VERSION = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.(?:0|[1-9][0-9]{0,5})){1,3}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Published:
    """A file that units fetch.

    Attributes:
        name: path under the repository, and under the base URL.
        file: where it lies.
        immutable: its content never changes under this name; all but `metadata/timestamp.json`.
    """

    name: str
    file: Path
    immutable: bool

    def body(self) -> tuple[bytes, str | None]:
        """What a server should send, and its `Content-Encoding`: packed metadata are half as long, digests and all.

        The timestamp is too short to gain, and archives are compressed already. The same file gives the same bytes.
        """
        content = self.file.read_bytes()
        if not self.immutable or not self.name.startswith("metadata/"):
            return content, None
        return gzip.compress(content, mtime=0), "gzip"


# --- the repository on disk ---------------------------------------------------------------------------------------


class Repository:
    """An update repository in a directory.

    Raises:
        RepositoryFault: there is none in that directory.
    """

    def __init__(self, directory: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.directory = directory
        self._clock = clock
        if not any(self._staged_or_served("root")):
            raise RepositoryFault(f"{directory} holds no update repository; `python -m cloud keys init` makes one")

    @classmethod
    def create(
        cls,
        directory: Path,
        product: str,
        keys: Mapping[str, Sequence[Key]],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> "Repository":
        """A new repository whose first metadata are staged; they want signatures, and `publish`.

        Args:
            directory: must not hold a repository.
            product: whose releases it is for.
            keys: public keys of `root`, `targets`, `snapshot`, `timestamp`, the product and its canaries.
            clock: what time it is.

        Raises:
            RepositoryFault: there is one already.
        """
        if (directory / "metadata").exists() or (directory / "staged").exists():
            raise RepositoryFault(
                f"there is an update repository in {directory} already: `python -m cloud keys status` shows it;"
                " keys are replaced by `python -m cloud keys rotate`"
            )
        now = clock()
        (directory / "staged").mkdir(parents=True)
        targets = new_targets(product, keys, now)
        for name in delegations(product):
            _write(directory / "staged" / f"{name}.json", Metadata(Targets(version=1, expires=expiry(name, now))))
        _write(directory / "staged" / "targets.json", Metadata(targets))
        _write(directory / "staged" / "root.json", Metadata(new_root(keys, now)))
        return cls(directory, clock)

    # --- reading

    @property
    def product(self) -> str:
        """The product that the repository is for."""
        canary = next(name for name in self._delegated() if name.endswith("-canary"))
        return canary.removesuffix("-canary")

    def in_force(self, role: str) -> Metadata[Any] | None:
        """A role's metadata as units see them, or None before they were first published."""
        if role == "root":
            names = [path.name.partition(".")[0] for path in self._metadata.glob("*.root.json")]
            numbers = [int(name) for name in names if name.isdecimal()]
            return _read(self._metadata / f"{max(numbers)}.root.json") if numbers else None
        timestamp = _read_maybe(self._metadata / "timestamp.json")
        if timestamp is None or role == "timestamp":
            return timestamp
        snapshot = _read(self._metadata / f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        if role == "snapshot":
            return snapshot
        entry = snapshot.signed.meta.get(f"{role}.json")
        return _read(self._metadata / f"{entry.version}.{role}.json") if entry else None

    def staged(self, role: str) -> Metadata[Any] | None:
        """A role's metadata that wait for signatures, or None."""
        return _read_maybe(self.directory / "staged" / f"{role}.json")

    def staged_roles(self) -> tuple[str, ...]:
        """The roles with something staged, in the order in which they depend on each other."""
        return tuple(role for role in ("root", "targets", *self._delegated()) if self.staged(role) is not None)

    def signing(self, role: str) -> Signing:
        """How far the signatures of what is staged for a role are.

        Raises:
            RepositoryFault: nothing is staged for it.
        """
        metadata = self._must_be_staged(role)
        missing, waiting = 0, dict[str, Key]()
        for delegator in self._delegators(role):
            result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
            missing = max(missing, result.threshold - len(result.signed))
            waiting |= result.unsigned
        names = tuple(sorted({holder_of(key) for key in waiting.values()}))
        return Signing(role, metadata.signed.version, max(missing, 0), names if missing > 0 else ())

    def status(self) -> list[RoleStatus]:
        """All roles in force; none before the first publication."""
        root, targets = self.in_force("root"), self.in_force("targets")
        if root is None or targets is None:
            return []
        found = []
        for role in ("root", "targets", *self._delegated(), *ONLINE):
            metadata = self.in_force(role)
            if metadata is None:
                continue
            delegator: Root | Targets = root.signed if role in root.signed.roles else targets.signed
            entry, keys = role_and_keys(delegator, role)
            holders = tuple(sorted(holder_of(key) for key in keys))
            found.append(RoleStatus(role, metadata.signed.version, metadata.signed.expires, entry.threshold, holders))
        return found

    def due(self) -> tuple[str, ...]:
        """The roles whose metadata have spent half of their time."""
        return tuple(
            status.role
            for status in self.status()
            if self._is_half_spent(cast("Metadata[Any]", self.in_force(status.role)).signed, status.role)
        )

    def keys_of(self, role: str) -> list[tuple[str, Key]]:
        """Holder and public key of whoever may sign for a role; empty if there is no such role."""
        parent = self._newest("targets" if role in self._delegated() else "root").signed
        if isinstance(parent, Root) and role not in parent.roles:
            return []
        return [(holder_of(key), key) for key in role_and_keys(parent, role)[1]]

    def releases(self, ring: str | None = None, kind: str | None = None) -> list[Release]:
        """The releases that units can be sent, the newest first; `ring` and `kind` leave the others out."""
        found = []
        for name in RINGS if ring is None else (ring,):
            metadata = self.in_force(self._role_of(name))
            if metadata is not None:
                found += [each for each in listed(metadata.signed, name) if kind in {None, each.kind}]
        return sorted(found, key=lambda release: version_key(release.version), reverse=True)

    def canaries(self) -> tuple[str, ...]:
        """The serials that the canaries' releases are for, as they will be after what is staged."""
        units = role_and_keys(self._newest("targets").signed, canary_role(self.product))[0].unrecognized_fields
        return tuple(units.get(UNITS_FIELD, ()))

    def files_to_publish(self) -> list[Published]:
        """All that units need, in the order in which it can safely be copied to where they fetch it.

        Every file but the last is immutable, so a copy that ends early leaves units with what they had.

        Raises:
            RepositoryFault: nothing was published yet.
        """
        timestamp, snapshot = self.in_force("timestamp"), self.in_force("snapshot")
        if timestamp is None or snapshot is None:
            raise RepositoryFault("nothing is published yet: sign what is staged, then `python -m cloud keys publish`")
        names = [stored for release in self.releases() for stored in release.files.values()]
        roles = sorted(snapshot.signed.meta, key=lambda file: file == "targets.json")
        names += [f"metadata/{snapshot.signed.meta[file].version}.{file}" for file in roles]
        names.append(f"metadata/{snapshot.signed.version}.snapshot.json")
        roots = [path for path in self._metadata.glob("*.root.json") if path.name.partition(".")[0].isdecimal()]
        roots.sort(key=lambda path: int(path.name.partition(".")[0]))
        names += [f"metadata/{path.name}" for path in roots]
        unique = dict.fromkeys(names)
        return [
            *(Published(name, self.directory / name, immutable=True) for name in unique),
            Published("metadata/timestamp.json", self._metadata / "timestamp.json", immutable=False),
        ]

    # --- changing; everything is staged first

    def add(
        self, description: Path, ring: str, keep: int = KEEP, *, version: str | None = None, kind: str | None = None
    ) -> str:
        """Copy a built release into the repository and stage its listing.

        Args:
            description: `release.json` of `python -m image release`, or of an image's bundle; its files lie beside it.
            ring: `canary` or `main`.
            keep: how many releases the ring lists afterwards; the oldest others leave with their deltas.
            version: what the description must say, if that is known.
            kind: the same.

        Returns:
            Its target path.

        Raises:
            RepositoryFault: the description or its files are not what they should be, or it is another product's.
        """
        try:
            release = _description(description)
            if release["product"] != self.product:
                raise RepositoryFault(f"{description} is a release of {release['product']}, not of {self.product}")
            _check_fields(release)
            if version is not None and release["version"] != version:
                raise RepositoryFault(f"{description} describes {release['version']}, not {version}; build it again")
            if kind is not None and release["kind"] != kind:
                option = "say --os" if release["kind"] == "os" else "leave --os out"
                raise RepositoryFault(f"{description} describes the kind {release['kind']}, not {kind}: {option}")
            targets = describe(release, ring)
        except (KeyError, TypeError) as error:
            raise RepositoryFault(f"{description} describes no release: {error} is missing or malformed") from error
        role = self._role_of(ring)
        with self._locked():
            for path, (entry, _) in targets.items():
                _copy(description.parent / entry["file"], self.directory / stored_name(path, entry["sha256"]), entry)
            with self._edit(role, Targets) as signed:
                unlist(signed, release["version"], release["kind"])
                for path, (entry, custom) in targets.items():
                    extra = {"custom": custom}
                    signed.targets[path] = TargetFile(entry["length"], {"sha256": entry["sha256"]}, path, extra)
                keep_newest(signed, release["version"], keep, release["kind"])
        return next(iter(targets))

    def promote(self, version: str, kind: str = "agent") -> str:
        """Stage the canaries' release for all units: the same bits, listed by the product's role.

        Returns:
            Its target path.

        Raises:
            RepositoryFault: the canaries have no such release.
        """
        source = next((release for release in self.releases("canary", kind) if release.version == version), None)
        canary = self.in_force(canary_role(self.product))
        if source is None or canary is None:
            others = ", ".join(release.version for release in self.releases("canary", kind)) or "none"
            option = " --os" if kind == "os" else ""
            raise RepositoryFault(
                f"the canaries have no {'image' if option else 'release'} {version} (they have: {others}):"
                f" `python -m cloud fleet release {version}{option}` with the builder's and the online keys comes first"
            )
        with self._locked(), self._edit(self.product, Targets) as signed:
            unlist(signed, version, kind)
            for path, stored in source.files.items():
                target = canary.signed.targets[path]
                to = path.replace("/canary/", "/", 1)
                entry = {"length": target.length, "sha256": target.hashes["sha256"]}
                _copy(self.directory / stored, self.directory / stored_name(to, entry["sha256"]), entry)
                custom = json.loads(json.dumps(target.custom))
                for hint in custom.get("deltas", ()):
                    hint["target"] = hint["target"].replace("/canary/", "/", 1)
                signed.targets[to] = TargetFile(target.length, dict(target.hashes), to, {"custom": custom})
            keep_newest(signed, version, KEEP, kind)
        return source.path.replace("/canary/", "/", 1)

    def withdraw(self, version: str, kind: str = "agent") -> tuple[str, ...]:
        """Stage that a release is listed no more; units refuse it as soon as that is published.

        Returns:
            The roles that want signatures.

        Raises:
            RepositoryFault: no ring lists it.
        """
        rings = {release.ring for release in self.releases(kind=kind) if release.version == version}
        if not rings:
            raise RepositoryFault(f"no ring has a release {version}")
        roles = tuple(self._role_of(ring) for ring in sorted(rings))
        with self._locked():
            for role in roles:
                with self._edit(role, Targets) as signed:
                    unlist(signed, version, kind)
        return roles

    def set_canaries(self, serials: Iterable[str]) -> None:
        """Stage which units the canaries' releases are for."""
        with self._locked(), self._edit("targets", Targets) as signed:
            role = role_and_keys(signed, canary_role(self.product))[0]
            role.unrecognized_fields[UNITS_FIELD] = sorted(set(serials))

    def replace_key(self, role: str, old: str, new: Key) -> tuple[str, ...]:
        """Stage that a role's key is another from now on.

        Args:
            role: whose key.
            old: key id of the one that goes.
            new: public key of the one that comes.

        Returns:
            The offline roles that want signatures; online ones are signed anew by `publish`.

        Raises:
            RepositoryFault: the role has no such key.
        """
        parent = "targets" if role in self._delegated() else "root"
        kind: type[Root | Targets] = Targets if parent == "targets" else Root
        with self._locked():
            with self._edit(parent, kind) as signed:
                try:
                    signed.revoke_key(old, role)
                except ValueError:
                    raise RepositoryFault(f"{role} has no key {old[:8]}") from None
                signed.add_key(new, role)
            if role in {"root", *ONLINE}:
                return (parent,)
            with self._edit(role, Targets):
                pass  # the same content, to be signed by the new set of keys
        return parent, role

    def refresh(self, role: str) -> None:
        """Stage an offline role's metadata once more, with a later date."""
        with self._locked(), self._edit(role, Root if role == "root" else Targets):
            pass

    def sign(self, role: str, signers: Iterable[Signer]) -> Signing:
        """Add the signatures of those signers whose key counts for what is staged; the others are passed over.

        Raises:
            RepositoryFault: nothing is staged for the role.
        """
        with self._locked():
            metadata = self._must_be_staged(role)
            accepted = {key.keyid for parent in self._delegators(role) for key in role_and_keys(parent, role)[1]}
            for signer in signers:
                if signer.public_key.keyid in accepted:
                    metadata.sign(signer, append=True)
            _write(self.directory / "staged" / f"{role}.json", metadata)
        return self.signing(role)

    def publish(self, signers: Iterable[Signer]) -> tuple[str, ...]:
        """Put in force what is staged and fully signed, under a new snapshot and timestamp.

        Args:
            signers: the online keys, among others.

        Returns:
            The roles whose new metadata are in force now.

        Raises:
            RepositoryFault: an online key is missing, or something that is staged depends on what is not signed yet.
        """
        with self._locked():
            ready = tuple(role for role in self.staged_roles() if not self.signing(role).missing)
            root = self._effective("root", ready)
            targets = self._effective("targets", ready)
            self._check_whole(root, targets, ready)
            by_id = {signer.public_key.keyid: signer for signer in signers}
            snapshot = self._next_snapshot(ready, root)
            timestamp = self._next_timestamp(snapshot.signed.version)
            _sign_online(snapshot, root, "snapshot", by_id)
            _sign_online(timestamp, root, "timestamp", by_id)
            for role in (*(role for role in ready if role != "root"), *(("root",) if "root" in ready else ())):
                metadata = self._must_be_staged(role)
                _write(self._metadata / f"{metadata.signed.version}.{role}.json", metadata)
            _write(self._metadata / f"{snapshot.signed.version}.snapshot.json", snapshot)
            _write(self._metadata / "timestamp.json", timestamp)
            _write(self.directory / "root.json", root)
            for role in ready:
                (self.directory / "staged" / f"{role}.json").unlink()
        return ready

    # --- within

    @property
    def _metadata(self) -> Path:
        return self.directory / "metadata"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _staged_or_served(self, role: str) -> tuple[bool, bool]:
        served = any(self._metadata.glob(f"*.{role}.json"))
        return (self.directory / "staged" / f"{role}.json").exists(), served

    def _newest(self, role: str) -> Metadata[Any]:
        metadata = self.staged(role) or self.in_force(role)
        if metadata is None:
            raise RepositoryFault(f"the repository in {self.directory} has no {role}")
        return metadata

    def _must_be_staged(self, role: str) -> Metadata[Any]:
        metadata = self.staged(role)
        if metadata is None:
            waiting = ", ".join(self.staged_roles()) or "nothing"
            raise RepositoryFault(f"nothing of {role} waits for signatures (waiting: {waiting})")
        return metadata

    def _delegated(self) -> tuple[str, ...]:
        return tuple(self._newest("targets").signed.delegations.roles)

    def _role_of(self, ring: str) -> str:
        if ring not in RINGS:
            raise RepositoryFault(f"there is no ring {ring!r}: say {' or '.join(RINGS)}")
        return canary_role(self.product) if ring == "canary" else self.product

    def _delegators(self, role: str) -> list[Root | Targets]:
        """Who says which keys count for what is staged: a new root must satisfy the old one as well (TUF 5.3.4)."""
        if role == "root":
            old = self.in_force("root")
            return [*([old.signed] if old else []), self._must_be_staged("root").signed]
        return [self._newest("targets" if role in self._delegated() else "root").signed]

    def _effective(self, role: str, ready: tuple[str, ...]) -> Metadata[Any]:
        metadata = self.staged(role) if role in ready else self.in_force(role)
        if metadata is None:
            raise RepositoryFault(f"{self.signing(role)}; nothing can be published before")
        return metadata

    def _check_whole(self, root: Metadata[Any], targets: Metadata[Any], ready: tuple[str, ...]) -> None:
        """Refuse to publish what units would refuse.

        Raises:
            RepositoryFault: as it says.
        """
        for role in ("targets", *self._delegated()):
            delegator = root if role == "targets" else targets
            try:
                metadata = self._effective(role, ready)
                delegator.verify_delegate(role, metadata)
            except (RepositoryError, ValueError) as error:
                raise RepositoryFault(f"units would refuse this: {error}; see `python -m cloud keys status`") from error

    @contextmanager
    def _edit(self, role: str, kind: type[_S]) -> Iterator[_S]:
        """The next version of a role, to be changed and staged without signatures."""
        metadata = self._newest(role)
        signed = cast("_S", metadata.signed)
        if not isinstance(signed, kind):
            raise TypeError(f"{role} is no {kind.type}")
        yield signed
        signed.version = self._next_version(role)
        signed.expires = expiry(role, self._clock())
        _write(self.directory / "staged" / f"{role}.json", Metadata(signed))

    def _next_version(self, role: str) -> int:
        current = self.in_force(role)
        return current.signed.version + 1 if current else 1

    def _next_snapshot(self, ready: tuple[str, ...], root: Metadata[Any]) -> Metadata[Any]:
        """The snapshot in force if it can stay, so that units need not fetch it again; else a new one."""
        current = self.in_force("snapshot")
        if current and not set(ready) - {"root"} and not self._is_half_spent(current.signed, "snapshot"):
            try:
                root.verify_delegate("snapshot", current)
            except RepositoryError:
                pass  # its key was replaced
            else:
                return current
        meta = dict(current.signed.meta) if current else {}
        for role in ready:
            if role != "root":
                meta[f"{role}.json"] = MetaFile(self._must_be_staged(role).signed.version)
        expires = expiry("snapshot", self._clock())
        return Metadata(Snapshot(version=self._next_version("snapshot"), expires=expires, meta=meta))

    def _next_timestamp(self, snapshot: int) -> Metadata[Any]:
        expires = expiry("timestamp", self._clock())
        version = self._next_version("timestamp")
        return Metadata(Timestamp(version=version, expires=expires, snapshot_meta=MetaFile(snapshot)))

    def _is_half_spent(self, signed: Signed, role: str) -> bool:
        return signed.expires - self._clock() < timedelta(days=DAYS.get(role, DELEGATED_DAYS)) / 2


def _sign_online(metadata: Metadata[Any], root: Metadata[Any], role: str, signers: Mapping[str, Signer]) -> None:
    entry, _ = role_and_keys(root.signed, role)
    if len(set(entry.keyids) & set(metadata.signatures)) >= entry.threshold:
        return  # it was taken over as it is
    ours = [signers[keyid] for keyid in entry.keyids if keyid in signers]
    if len(ours) < entry.threshold:
        raise RepositoryFault(f"publishing needs the {role} key; give the directory that holds it")
    metadata.signatures.clear()
    for signer in ours:
        metadata.sign(signer, append=True)


def _description(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise RepositoryFault(
            f"there is no {path}: `make release` with that VERSION builds it, or `make image` an image's (--os)"
        ) from None
    except (OSError, ValueError) as error:
        raise RepositoryFault(f"{path} is no description of a release: {error}; build the release again") from error
    if not isinstance(value, dict) or value.get("format") != 1 or not {"kind", "archive", "deltas"} <= set(value):
        raise RepositoryFault(f"{path} is no description of a release; `python -m image release` writes one")
    return value


def _check_fields(release: Mapping[str, Any]) -> None:
    """Refuse what units would refuse, before it is signed; the files themselves are checked by `_copy`.

    Raises:
        KeyError, TypeError: it is missing or malformed.
    """
    archive, deltas = release["archive"], release["deltas"]
    files = [archive, *deltas]
    digests = [archive["tar_sha256"], *(each[end] for each in deltas for end in ("from", "to"))]
    checks = {
        "kind": release["kind"] in KINDS,
        "version": isinstance(release["version"], str) and _VERSION.fullmatch(release["version"]),
        "security_version": _is_count(release["security_version"], 0),
        "hardware": isinstance(release["hardware"], list)
        and all(isinstance(each, str) for each in release["hardware"]),
        "tar_size": _is_count(archive["tar_size"], 1),
        "chunk_bytes": all(_is_count(each["chunk_bytes"], 1) for each in files),
        "digest": all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in digests),
    }
    for name, right in checks.items():
        if not right:
            raise TypeError(repr(name))


def _is_count(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 1 << 31


def _copy(source: Path, target: Path, entry: Mapping[str, Any]) -> None:
    """Copy a file whose length and digest are known, durably; the same file twice is no work."""
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = source.stat().st_size
        chunks = _chunks(source, entry["chunk_bytes"]) if "chunks" in entry else None
    except OSError as error:
        raise RepositoryFault(f"{source} cannot be read: {error.strerror}") from error
    if (digest, size, chunks) != (entry["sha256"], entry["length"], entry.get("chunks")):
        raise RepositoryFault(f"{source} is not the file that its description names; build the release again")
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, new)
    _settle(new, target)


def _chunks(path: Path, length: int) -> list[str]:
    """SHA-256 of each piece of a file."""
    with path.open("rb") as file:
        return [hashlib.sha256(piece).hexdigest() for piece in iter(partial(file.read, length), b"")]


def _read(path: Path) -> Metadata[Any]:
    try:
        metadata = Metadata[Any].from_bytes(path.read_bytes())
    except (OSError, RepositoryError) as error:
        raise RepositoryFault(f"{path} cannot be read: {error}; fetch it from a backup or from the bucket") from error
    role = path.name.removesuffix(".json").rpartition(".")[2]
    if metadata.signed.type != (role if role in {"root", *ONLINE} else "targets"):
        raise RepositoryFault(f"{path} is of another role; fetch it from a backup or from the bucket")
    return metadata


def _read_maybe(path: Path) -> Metadata[Any] | None:
    return _read(path) if path.exists() else None


def _write(path: Path, metadata: Metadata[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(metadata.to_bytes(JSONSerializer(compact=True)))
    _settle(new, path)


def _settle(new: Path, path: Path) -> None:
    """Give a complete file its name, durably."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
