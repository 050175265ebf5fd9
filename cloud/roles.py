"""What the metadata of the update repository are like: roles, delegations, and the releases that they list. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Root, Targets

#: How long each kind of metadata is good for, in days. A unit that was off for longer than the timestamp's just
#: fetches a new one; the period is how long a thief of the mirror can hide a new release from a unit.
DAYS: Final[Mapping[str, int]] = MappingProxyType({"root": 365, "targets": 90, "snapshot": 30, "timestamp": 7})
DELEGATED_DAYS: Final = 90

#: Which of their keys are kept offline by the holders, and how many must sign.
HOLDERS: Final = 3
THRESHOLD: Final = 2

ONLINE: Final = ("snapshot", "timestamp")

#: Field of the canaries' delegation: the serials that it is for. Units know it by this name.
UNITS_FIELD: Final = "x-picket-units"
#: Field of a key: who holds it.
HOLDER_FIELD: Final = "x-picket-holder"

RINGS: Final = ("canary", "main")

#: What releases there are: of the agent, and of the whole image. Each has versions of its own.
KINDS: Final = ("agent", "os")

#: Releases that a ring keeps listed: the newest, and some to go back to. Each costs every unit about a kilobyte.
KEEP: Final = 3


@dataclass(frozen=True)
class Signing:
    """How far the signatures of staged metadata are.

    Attributes:
        role: whose metadata.
        version: that waits.
        missing: signatures that are still needed; 0 means ready to be published.
        waiting_for: holders whose key could sign and has not.
    """

    role: str
    version: int
    missing: int
    waiting_for: tuple[str, ...]

    def __str__(self) -> str:
        if not self.missing:
            return f"{self.role} {self.version}: all signatures are there"
        return f"{self.role} {self.version}: {self.missing} more of {', '.join(self.waiting_for)}"


@dataclass(frozen=True)
class RoleStatus:
    """A role as it is in force."""

    role: str
    version: int
    expires: datetime
    threshold: int
    holders: tuple[str, ...]

    def days_left(self, now: datetime) -> float:
        """Until it expires; negative afterwards."""
        return (self.expires - now) / timedelta(days=1)


@dataclass(frozen=True)
class Release:
    """A release that a ring lists.

    Attributes:
        path: its target path, for the job document.
        ring: `canary` or `main`.
        product: for which it is.
        version: its own.
        security_version: the floor that units take from it.
        length: of the archive, in bytes.
        tar_sha256: its identity.
        deltas: target paths of the deltas that lead to it, by the tar digest that they start from.
        files: target path to the file's place under the repository, the archive and the deltas.
    """

    path: str
    ring: str
    product: str
    version: str
    security_version: int
    length: int
    tar_sha256: str
    deltas: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def kind(self) -> str:
        """`agent` or `os`."""
        return self.path.partition("/")[0]


def delegations(product: str) -> dict[str, tuple[str, ...]]:
    """The roles of a product, and the paths that each may sign. A `*` never matches a slash, so none overlap."""
    return {
        product: (f"agent/{product}-*", f"os/{product}-*"),
        canary_role(product): (f"agent/canary/{product}-*", f"os/canary/{product}-*"),
    }


def canary_role(product: str) -> str:
    """The role that signs for a product's canaries."""
    return f"{product}-canary"


def expiry(role: str, now: datetime) -> datetime:
    """When metadata that are signed now expire."""
    return (now + timedelta(days=DAYS.get(role, DELEGATED_DAYS))).replace(microsecond=0)


def new_root(keys: Mapping[str, Sequence[Key]], now: datetime) -> Root:
    """The first root: `keys` has one entry for each of the four top-level roles."""
    root = Root(version=1, expires=expiry("root", now), consistent_snapshot=True)
    for role in ("root", "targets", *ONLINE):
        for key in keys[role]:
            root.add_key(key, role)
        root.roles[role].threshold = min(THRESHOLD, len(keys[role]))
    return root


def new_targets(product: str, keys: Mapping[str, Sequence[Key]], now: datetime) -> Targets:
    """The first targets: no files, only the delegations of a product."""
    roles = {}
    for name, paths in delegations(product).items():
        extra: dict[str, Any] = {UNITS_FIELD: []} if name == canary_role(product) else {}
        threshold = min(THRESHOLD, len(keys[name]))
        roles[name] = DelegatedRole(name, [], threshold, terminating=True, paths=list(paths), unrecognized_fields=extra)
    targets = Targets(version=1, expires=expiry("targets", now), delegations=Delegations({}, roles))
    for name in roles:
        for key in keys[name]:
            targets.add_key(key, name)
    return targets


def target_path(kind: str, ring: str, file: str) -> str:
    """Where a file of a release is in a ring."""
    return f"{kind}/canary/{file}" if ring == "canary" else f"{kind}/{file}"


def stored_name(path: str, sha256: str) -> str:
    """Where a target's file is under the repository: named by its digest, so that it never changes (TUF 6.2)."""
    folder, _, name = path.rpartition("/")
    return f"targets/{folder}/{sha256}.{name}"


def describe(release: Mapping[str, Any], ring: str) -> dict[str, tuple[Mapping[str, Any], dict[str, Any]]]:
    """What is signed about a release: target path to (file entry of the description, `custom`)."""
    kind, archive = release["kind"], release["archive"]
    path = target_path(kind, ring, archive["file"])
    found = {}
    hints = []
    for delta in release["deltas"]:
        delta_path = target_path(kind, ring, delta["file"])
        hints.append({"from": delta["from"], "target": delta_path})
        found[delta_path] = (delta, {key: delta[key] for key in ("from", "to", "chunk_bytes", "chunks")})
    custom = {key: release[key] for key in ("product", "version", "security_version", "hardware", "min_from")}
    custom |= {key: archive[key] for key in ("tar_sha256", "tar_size", "chunk_bytes", "chunks")}
    return {path: (archive, {**custom, "deltas": hints}), **found}


def version_key(version: str) -> tuple[int, ...]:
    """A version as numbers to sort by."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def role_and_keys(delegator: Root | Targets, role: str) -> tuple[Any, list[Key]]:
    """What a delegator says about a role (key ids, threshold, extra fields), and the role's keys."""
    if isinstance(delegator, Root):
        entry: Any = delegator.roles[role]
        keys = delegator.keys
    else:
        assert delegator.delegations is not None  # noqa: S101 - ours always delegate
        assert delegator.delegations.roles is not None  # noqa: S101
        entry = delegator.delegations.roles[role]
        keys = delegator.delegations.keys
    return entry, [keys[keyid] for keyid in entry.keyids]


def holder_of(key: Key) -> str:
    """Who holds a key, as far as that was said; else the beginning of its id."""
    return str(key.unrecognized_fields.get(HOLDER_FIELD, key.keyid[:8]))


def listed(signed: Targets, ring: str) -> list[Release]:
    """The releases of a role, the newest first."""
    found = []
    for path, target in signed.targets.items():
        custom = target.custom or {}
        if "tar_sha256" not in custom:
            continue  # a delta
        deltas = {hint["from"]: hint["target"] for hint in custom["deltas"]}
        files = {
            name: stored_name(name, signed.targets[name].hashes["sha256"])
            for name in (path, *deltas.values())
            if name in signed.targets
        }
        found.append(
            Release(
                path,
                ring,
                custom["product"],
                custom["version"],
                custom["security_version"],
                target.length,
                custom["tar_sha256"],
                MappingProxyType(deltas),
                MappingProxyType(files),
            )
        )
    return sorted(found, key=lambda release: version_key(release.version), reverse=True)


def keep_newest(signed: Targets, version: str, count: int, kind: str) -> None:
    """List `version` and the newest others of its kind, `count` together."""
    found = listed(signed, "")
    others = [release.version for release in found if release.kind == kind and release.version != version]
    for old in others[max(count - 1, 0) :]:
        unlist(signed, old, kind)


def unlist(signed: Targets, version: str, kind: str) -> None:
    """List a version of a kind no more, nor the deltas that lead to it."""
    for release in listed(signed, ""):
        if (release.kind, release.version) == (kind, version):
            for path in release.files:
                del signed.targets[path]
