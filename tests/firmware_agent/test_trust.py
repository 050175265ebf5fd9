"""Trust in releases: every attack that TUF is about, made by a repository that the test corrupts."""

import contextlib
import gzip
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from firmware_agent import files
from firmware_agent.update.floor import read_floor
from firmware_agent.update.target import (
    BadSignature,
    BadTarget,
    ClockNotTrusted,
    Downgrade,
    Expired,
    NotListed,
    Running,
    TooOldToUpdate,
    TrustFault,
    Unreachable,
    WrongHardware,
    WrongProduct,
    WrongRing,
    check_path,
    parse_delta,
    parse_target,
    version_key,
)
from firmware_agent.update.trust import Trust
from tests.updates import CHUNK, World, serve, sha256, signer

SERIAL = "PK-000001"
OLD = "agent/picket-agent-1.2.0.tar.zst"
NEW = "agent/picket-agent-1.3.0.tar.zst"
ROLES = ("2.root.json", "timestamp.json", "2.snapshot.json", "1.targets.json", "2.picket.json")


@dataclass
class Device:
    """A unit as far as trust goes."""

    world: World
    base: Path
    running: Running = field(default=Running("1.1.0", 1, ("raspberrypi,3-model-b-plus", "raspberrypi,3-model-b")))
    product: str = "picket"
    serial: str = SERIAL

    @property
    def metadata(self) -> Path:
        return self.base / "tuf"

    @property
    def floor(self) -> Path:
        return self.base / "floor.json"

    def trust(self, **changes: Any) -> Trust:
        details: dict[str, Any] = {
            "root": self.base / "root.json",
            "metadata": self.metadata,
            "floor": self.floor,
            "product": self.product,
            "serial": self.serial,
            "now": lambda: self.world.now,
            "allow_files": True,
        }
        return Trust(**(details | changes))

    def check(self, path: str = NEW, url: str = "") -> Any:
        return self.trust().check(path, url or self.world.url, self.running)

    def lose_metadata(self) -> None:
        shutil.rmtree(self.metadata, ignore_errors=True)

    def lose_floor(self) -> None:
        self.floor.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    world.release("1.2.0")
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    return made.copy(tmp_path)


@pytest.fixture
def device(world: World, tmp_path: Path) -> Device:
    return make_device(world, tmp_path)


def make_device(world: World, base: Path) -> Device:
    base = base / "device"
    base.mkdir()
    shutil.copy(world.root, base / "root.json")
    return Device(world, base)


# --- the attacker's tools -----------------------------------------------------------------------------------------


def keep(world: World) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in world.metadata.iterdir()}


def bring_back(world: World, kept: dict[str, bytes]) -> None:
    shutil.rmtree(world.metadata)
    world.metadata.mkdir()
    for name, data in kept.items():
        (world.metadata / name).write_bytes(data)


def forge(world: World, source: str, target: str, change: Callable[[Any], object], keys: list[CryptoSigner]) -> None:
    """Change metadata and sign them with the keys that were stolen."""
    metadata = Metadata[Any].from_file(str(world.metadata / source))
    change(metadata.signed)
    metadata.signatures.clear()
    for key in keys:
        metadata.sign(key, append=True)
    metadata.to_file(str(world.metadata / target))


def online(world: World) -> list[CryptoSigner]:
    return [*world.keys["snapshot"], *world.keys["timestamp"]]


def point_to(world: World, snapshot: int, *, version: int | None = None) -> None:
    """What a thief of the timestamp's key does."""

    def change(signed: Any) -> None:
        signed.version = signed.version + 1 if version is None else version
        signed.snapshot_meta = MetaFile(snapshot)

    forge(world, "timestamp.json", "timestamp.json", change, world.keys["timestamp"])


def list_roles(world: World, **versions: int) -> None:
    """What a thief of both online keys does: a new snapshot with versions of his choice."""
    current = Metadata[Any].from_file(str(world.metadata / "timestamp.json")).signed.snapshot_meta.version

    def change(signed: Any) -> None:
        signed.version = current + 1
        for role, number in versions.items():
            signed.meta[f"{role.replace('_', '-')}.json"] = MetaFile(number)

    forge(world, f"{current}.snapshot.json", f"{current + 1}.snapshot.json", change, world.keys["snapshot"])
    point_to(world, current + 1)


# --- what is right is taken ---------------------------------------------------------------------------------------


def test_a_signed_release_is_described_in_full(world: World, device: Device) -> None:
    source = sha256(b"tar of 1.1.0")
    content = b"x" * (CHUNK + 5)
    world.release("1.3.0", content=content, security_version=4, min_from="1.0", deltas_from={source: b"patch"})
    device.running = Running("1.1.0", 1, device.running.hardware, source[:8])

    target = device.check()

    assert (target.kind, target.product, target.version, target.security_version) == ("agent", "picket", "1.3.0", 4)
    assert (target.min_from, target.tar_sha256, target.tar_size) == ("1.0", sha256(b"tar " + content), len(content) * 3)
    assert (target.full.path, target.full.length, target.full.sha256) == (NEW, len(content), sha256(content))
    assert target.full.chunks == (sha256(content[:CHUNK]), sha256(content[CHUNK:]))
    assert target.delta is not None
    assert target.delta.path == f"agent/picket-agent-1.3.0.from-{source[:8]}.zpatch"
    assert (target.delta.length, target.delta.chunks) == (5, (sha256(b"patch"),))
    assert target.release == f"1.3.0-{target.tar_sha256[:8]}"


def test_a_unit_that_runs_something_else_gets_no_delta(world: World, device: Device) -> None:
    world.release("1.3.0", deltas_from={sha256(b"tar of 1.1.0"): b"patch"})

    for tar in ("", sha256(b"another tar"), sha256(b"tar of 1.1.0")[:7]):
        device.running = Running("1.1.0", 1, device.running.hardware, tar)
        assert device.check().delta is None


def test_a_second_look_fetches_the_timestamp_only(world: World, device: Device) -> None:
    with serve(world.directory) as web:
        device.check(OLD, f"{web.url}/metadata")
        first = len(web.asked)
        device.check(OLD, f"{web.url}/metadata")

        assert first == 4
        assert [path for path, _ in web.asked[first:]] == ["/metadata/timestamp.json"]


def test_an_older_release_may_come_back_while_it_is_listed(world: World, device: Device) -> None:
    world.release("1.3.0")
    device.running = Running("1.3.0", 1, device.running.hardware)

    assert device.check(OLD).version == "1.2.0"


def test_the_root_may_be_replaced_twice_while_a_unit_sleeps(world: World, device: Device) -> None:
    device.check(OLD)
    for holder in (0, 1):
        old = world.keys["root"][holder]
        world.keys["root"][holder] = signer("new")
        world.repository.replace_key("root", old.public_key.keyid, world.keys["root"][holder].public_key)
        world.publish()
    world.pass_days(60)
    world.release("1.3.0")

    assert device.check().version == "1.3.0"
    assert read_floor(device.floor).metadata["root"].version == 3


def test_a_unit_that_slept_past_a_timestamp_takes_the_renewed_one(world: World, device: Device) -> None:
    device.check(OLD)
    world.pass_days(20)
    world.publish()

    assert device.check(OLD).version == "1.2.0"


def test_all_metadata_are_durable_before_the_floor_rises(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    before: list[list[str]] = []
    real_sync, real_write = os.fsync, files.write_atomic

    def fsync(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real_sync(handle)

    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        if path == device.floor:
            before.append(list(synced))
        real_write(path, data, mode)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "write_atomic", write)
    device.check(OLD)

    expected = {path for path in device.metadata.rglob("*") if path.is_dir() or path.is_file()}
    assert {str(path.resolve()) for path in (*expected, device.metadata)} <= set(before[0])
    assert {"timestamp.json", "snapshot.json", "targets.json", "picket.json"} <= {path.name for path in expected}


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 400])
def test_metadata_that_a_power_cut_spoilt_are_fetched_again(world: World, device: Device, damage: bytes) -> None:
    device.check(OLD)
    (device.metadata / "tmpabcdef").write_bytes(b"left over")
    for path in device.metadata.rglob("*.json"):
        path.write_bytes(damage)
    world.release("1.3.0")

    assert device.check().version == "1.3.0"
    assert list(device.metadata.glob("tmp*")) == []


# --- rollback -----------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Device], None]] = {
    "nothing lost": lambda device: None,
    "metadata lost": Device.lose_metadata,
    "floor lost": Device.lose_floor,
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_rolled_back_timestamp_is_refused(world: World, device: Device, lose: Callable[[Device], None]) -> None:
    old = keep(world)
    world.release("1.3.0", security_version=1)
    device.check(NEW)
    lose(device)
    bring_back(world, old)

    with pytest.raises(Downgrade):
        device.check(OLD)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_rolled_back_snapshot_is_refused(world: World, device: Device, lose: Callable[[Device], None]) -> None:
    """The timestamp's key is stolen: the newest timestamp names an old snapshot."""
    world.release("1.3.0")
    device.check(NEW)
    lose(device)
    point_to(world, 2)

    with pytest.raises(Downgrade):
        device.check(OLD)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_rolled_back_targets_are_refused(world: World, device: Device, lose: Callable[[Device], None]) -> None:
    """Both online keys are stolen: the newest snapshot lists old metadata of the product."""
    world.release("1.3.0")
    device.check(NEW)
    lose(device)
    list_roles(world, picket=2)

    with pytest.raises(Downgrade):
        device.check(OLD)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_rolled_back_root_is_refused(world: World, device: Device, lose: Callable[[Device], None]) -> None:
    """A stolen timestamp key was replaced; the thief hides the root that says so."""
    stolen = world.keys["timestamp"]
    old = keep(world)
    world.keys["timestamp"] = [signer("server")]
    keys = [pair[0].public_key for pair in (stolen, world.keys["timestamp"])]
    world.repository.replace_key("timestamp", keys[0].keyid, keys[1])
    world.publish()
    device.check(OLD)
    lose(device)
    bring_back(world, old)

    forge(world, "timestamp.json", "timestamp.json", lambda signed: setattr(signed, "version", 99), stolen)

    with pytest.raises((Downgrade, BadSignature)):
        device.check(OLD)


def test_with_all_state_lost_the_running_release_is_the_floor(world: World, device: Device) -> None:
    old = keep(world)
    world.release("1.3.0", security_version=2)
    device.check(NEW)
    device.running = Running("1.3.0", 2, device.running.hardware)
    device.lose_metadata()
    device.lose_floor()
    bring_back(world, old)

    with pytest.raises(Downgrade, match=r"1\.2\.0 has security version 1, the floor is 2"):
        device.check(OLD)


def test_a_commit_raises_the_security_floor_for_good(world: World, device: Device) -> None:
    world.release("1.3.0", security_version=3)
    device.check(NEW)

    assert device.trust().security_floor() == 0
    device.trust().commit(3)
    device.trust().commit(2)

    assert device.trust().security_floor() == 3
    with pytest.raises(Downgrade, match="the floor is 3"):
        device.check(OLD)
    assert device.check(NEW).version == "1.3.0"


def test_the_floors_of_agent_and_system_are_apart(device: Device) -> None:
    device.trust().commit(7, "os")

    assert device.trust().security_floor() == 0
    assert device.check(OLD).version == "1.2.0"


def test_a_damaged_floor_begins_anew_and_does_not_stop_updates(device: Device) -> None:
    device.check(OLD)
    for damage in (b"", b"{}", b"[]", b'{"format": 2}', b'{"format":1,"security":{"agent":-1},"metadata":{}}', b"\xff"):
        device.floor.write_bytes(damage)

        assert device.check(OLD).version == "1.2.0"
        assert read_floor(device.floor).metadata["timestamp"].version > 0


def test_a_withdrawn_release_stays_withdrawn_when_the_metadata_are_lost(world: World, device: Device) -> None:
    listed = keep(world)
    world.repository.withdraw("1.2.0")
    world.publish()
    with pytest.raises(NotListed):
        device.check(OLD)

    device.lose_metadata()
    bring_back(world, listed)

    with pytest.raises(Downgrade):
        device.check(OLD)


# --- freeze -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "role"), [(8, "timestamp"), (31, "snapshot"), (91, "targets"), (91, "picket"), (366, "root")]
)
def test_expired_metadata_are_refused(world: World, device: Device, days: float, role: str) -> None:
    """A mirror that stands still; what expires later is kept fresh, so that each role is judged by itself."""
    world.now += timedelta(days=days)
    for name in set(ROLE_FILES) - {role}:
        forge(world, ROLE_FILES[name], ROLE_FILES[name], lambda signed: later(world, signed), world.keys[name])

    with pytest.raises(Expired) as caught:
        device.check(OLD)

    assert caught.value.retry
    assert caught.value.code == "bad-signature"
    assert role in str(caught.value)


ROLE_FILES = {
    "timestamp": "timestamp.json",
    "snapshot": "2.snapshot.json",
    "targets": "1.targets.json",
    "picket": "2.picket.json",
}


def later(world: World, signed: Any) -> None:
    signed.expires = world.now + timedelta(days=5)


def test_without_a_trusted_clock_nobody_is_asked(world: World, device: Device) -> None:
    with serve(world.directory) as web, pytest.raises(ClockNotTrusted) as caught:
        device.trust(now=lambda: None).check(OLD, f"{web.url}/metadata", device.running)

    assert caught.value.retry
    assert web.asked == []


def test_expiry_is_judged_by_the_time_that_was_given_not_by_the_systems(device: Device) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=8)

    with pytest.raises(Expired):
        device.trust(now=lambda: tomorrow).check(OLD, device.world.url, device.running)


# --- files that do not belong together ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["3.snapshot.json", "3.picket.json"])
def test_files_of_different_times_do_not_mix(world: World, device: Device, name: str) -> None:
    world.release("1.3.0")
    number, _, role = name.partition(".")
    (world.metadata / name).write_bytes((world.metadata / f"{int(number) - 1}.{role}").read_bytes())

    with pytest.raises((Downgrade, BadSignature)):
        device.check(NEW)


def test_metadata_with_a_wrong_hash_are_refused(world: World, device: Device) -> None:
    def change(signed: Any) -> None:
        signed.version = 3
        signed.meta["picket.json"] = MetaFile(2, hashes={"sha256": sha256(b"something else")})

    forge(world, "2.snapshot.json", "3.snapshot.json", change, world.keys["snapshot"])
    point_to(world, 3)

    with pytest.raises(BadSignature):
        device.check(OLD)


@pytest.mark.parametrize("name", ROLES[1:])
def test_one_changed_byte_is_noticed(world: World, device: Device, name: str) -> None:
    data = (world.metadata / name).read_bytes()
    at = data.index(b'"expires":"20') + len(b'"expires":"20')
    (world.metadata / name).write_bytes(data[:at] + b"9" + data[at + 1 :])

    with pytest.raises(BadSignature):
        device.check(OLD)


@pytest.mark.parametrize("name", ROLES[1:])
def test_metadata_of_another_role_in_its_place_are_refused(world: World, device: Device, name: str) -> None:
    other = "2.snapshot.json" if name == "1.targets.json" else "1.targets.json"
    (world.metadata / name).write_bytes((world.metadata / other).read_bytes())

    with pytest.raises(TrustFault):
        device.check(OLD)


# --- stolen keys --------------------------------------------------------------------------------------------------


def test_a_stolen_timestamp_key_can_do_no_more_than_stand_still(world: World, device: Device) -> None:
    world.release("1.3.0")
    device.check(NEW)

    def held(signed: Any) -> None:
        signed.version += 1
        signed.expires = world.now + timedelta(days=3650)

    forge(world, "timestamp.json", "timestamp.json", held, world.keys["timestamp"])
    assert device.check(NEW).version == "1.3.0"

    for attempt in (4, 2):  # a snapshot that was never signed, one that is older
        forge(
            world, "3.snapshot.json", "4.snapshot.json", lambda signed: setattr(signed, "version", 4), [signer("thief")]
        )
        point_to(world, attempt)
        with pytest.raises((BadSignature, Downgrade)):
            device.check(NEW)


def evil_release(signed: Any) -> None:
    signed.version += 1
    listed = next(iter(signed.targets.values()))
    custom = {**listed.custom, "version": "6.6.6", "deltas": []}
    path = "agent/picket-agent-6.6.6.tar.zst"
    signed.targets[path] = TargetFile(listed.length, listed.hashes, path, {"custom": custom})


EVIL = "agent/picket-agent-6.6.6.tar.zst"


def test_the_products_stolen_key_is_below_the_threshold(world: World, device: Device) -> None:
    """Even together with both online keys; and one key twice is still one key."""
    forge(world, "2.picket.json", "3.picket.json", evil_release, world.keys["picket"][:1])
    list_roles(world, picket=3)

    with pytest.raises(BadSignature, match="picket was signed by 1/2 keys"):
        device.check(EVIL)


def test_the_products_keys_together_would_do(world: World, device: Device) -> None:
    """The same forgery with one key more is a release: the test above fails for the right reason."""
    forge(world, "2.picket.json", "3.picket.json", evil_release, world.keys["picket"][:2])
    list_roles(world, picket=3)

    assert device.check(EVIL).version == "6.6.6"


def test_the_targets_stolen_key_is_below_the_threshold(world: World, device: Device) -> None:
    def hand_over(signed: Any) -> None:
        signed.version += 1
        signed.add_key(thief.public_key, "picket")
        signed.delegations.roles["picket"].threshold = 1

    thief = signer("thief")
    forge(world, "1.targets.json", "2.targets.json", hand_over, world.keys["targets"][:1])
    forge(world, "2.picket.json", "3.picket.json", evil_release, [thief])
    list_roles(world, picket=3, targets=2)

    with pytest.raises(BadSignature, match="targets was signed by 1/2 keys"):
        device.check(EVIL)


@pytest.mark.parametrize("asleep", [True, False])
def test_one_stolen_root_key_makes_no_root(world: World, device: Device, asleep: bool) -> None:
    if not asleep:
        device.check(OLD)
    thief = signer("thief")

    def take_over(signed: Any) -> None:
        signed.version += 1
        for role in signed.roles:
            signed.add_key(thief.public_key, role)
            signed.roles[role].threshold = 1

    forge(world, "1.root.json", "2.root.json", take_over, [world.keys["root"][0], thief])

    with pytest.raises(BadSignature, match="root was signed by 1/2 keys"):
        device.check(OLD)
    assert not (device.metadata / "root_history" / "2.root.json").exists()


def test_two_old_keys_cannot_skip_a_root(world: World, device: Device) -> None:
    forge(world, "1.root.json", "2.root.json", lambda signed: setattr(signed, "version", 3), world.keys["root"])

    with pytest.raises(Downgrade):
        device.check(OLD)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_units_follow_again_after_a_thief_raised_the_numbers_and_lost_the_keys(
    world: World, device: Device, lose: Callable[[Device], None]
) -> None:
    """Fast-forward (TUF 5.3.11): versions as high as they go, until the root replaces the stolen keys."""
    huge = 2**31 - 1
    kept = keep(world)
    forge(world, "2.snapshot.json", f"{huge}.snapshot.json", lambda s: setattr(s, "version", huge), online(world)[:1])
    point_to(world, huge, version=huge)
    device.check(OLD)
    bring_back(world, kept)
    with pytest.raises(Downgrade):
        device.check(OLD)

    for role in ("snapshot", "timestamp"):
        stolen = world.keys[role][0]
        world.keys[role] = [signer("server")]
        world.repository.replace_key(role, stolen.public_key.keyid, world.keys[role][0].public_key)
    world.publish()
    lose(device)

    assert device.check(OLD).version == "1.2.0"


# --- delegations --------------------------------------------------------------------------------------------------


def test_the_canarys_key_signs_nothing_for_all_units(world: World, device: Device) -> None:
    """Its metadata may say what they like: units ask the product's role about the product's paths."""
    world.release("1.3.0", "canary")

    def escape(signed: Any) -> None:
        evil_release(signed)
        signed.targets[OLD] = signed.targets[EVIL]

    number = versions(world)["picket-canary.json"]
    name = "picket-canary.json"
    forge(world, f"{number}.{name}", f"{number + 1}.{name}", escape, world.keys["picket-canary"])
    list_roles(world, picket_canary=number + 1)

    with pytest.raises(NotListed):
        device.check(EVIL)
    assert device.check(OLD).version == "1.2.0"


def versions(world: World) -> dict[str, int]:
    metadata = world.repository.in_force("snapshot")
    assert metadata is not None
    return {name: entry.version for name, entry in metadata.signed.meta.items()}


def test_a_canarys_release_is_for_the_units_that_targets_names(tmp_path: Path) -> None:
    world = World(tmp_path, canaries=("PK-000001",))
    path = world.release("1.3.0", "canary")
    device = make_device(world, tmp_path)

    assert device.check(path).version == "1.3.0"

    device.serial = "PK-000002"
    with pytest.raises(WrongRing, match="PK-000002 is none"):
        device.check(path)


def test_without_canaries_nobody_takes_their_releases(world: World, device: Device) -> None:
    path = world.release("1.3.0", "canary")

    with pytest.raises(WrongRing):
        device.check(path)


# --- a release for somebody else ----------------------------------------------------------------------------------


def test_another_products_release_is_refused(device: Device) -> None:
    device.product = "kettle"

    with pytest.raises(WrongProduct, match="is for picket, and this unit is a kettle"):
        device.check(OLD)


@pytest.mark.parametrize("board", [(), ("raspberrypi,5-model-b", "brcm,bcm2712")])
def test_a_release_for_other_boards_is_refused(device: Device, board: tuple[str, ...]) -> None:
    device.running = Running("1.1.0", 1, board)

    with pytest.raises(WrongHardware):
        device.check(OLD)


def test_a_release_that_cannot_be_reached_at_once_says_from_where(world: World, device: Device) -> None:
    world.release("1.3.0", min_from="1.2")

    with pytest.raises(TooOldToUpdate) as caught:
        device.check(NEW)

    assert caught.value.min_from == "1.2"
    device.running = Running("1.2.0", 1, device.running.hardware)
    assert device.check(NEW).version == "1.3.0"


@pytest.mark.parametrize("path", ["", "agent", "../agent/x", "agent/../x", "/agent/x", "agent//x", "x/y", "agent/\n"])
def test_a_path_that_is_none_is_refused_before_anybody_is_asked(device: Device, path: str) -> None:
    with pytest.raises(BadTarget):
        device.trust(now=lambda: pytest.fail("asked")).check(path, "http://127.0.0.1:1/", device.running)


# --- what was signed makes no sense -------------------------------------------------------------------------------

CUSTOM: dict[str, Any] = {
    "product": "picket",
    "version": "1.2.0",
    "security_version": 1,
    "hardware": ["picket,simulated"],
    "min_from": None,
    "tar_sha256": "a" * 64,
    "tar_size": 100,
    "chunk_bytes": CHUNK,
    "chunks": ["b" * 64],
    "deltas": [],
}


WRONG: tuple[Any, ...] = (..., "", [], {}, -1, 1.5, True, "x" * 100000, [None], [{}], ["\n"], 2**80)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in CUSTOM for value in WRONG if (key, value) != ("deltas", [])],
    ids=lambda value: repr(value)[:12],
)
def test_a_signed_description_with_a_wrong_field_is_refused(key: str, value: Any) -> None:
    custom = {**CUSTOM, key: value}
    if value is ...:
        del custom[key]
    with pytest.raises(BadTarget, match=key):
        parse_target(OLD, 100, "c" * 64, custom)


def test_a_field_that_this_agent_does_not_know_is_passed_over() -> None:
    assert parse_target(OLD, 100, "c" * 64, {**CUSTOM, "mood": "good"}).version == "1.2.0"


@pytest.mark.parametrize(
    ("length", "digest", "chunks"),
    [(0, "c" * 64, 0), (2**31, "c" * 64, 1), (100, "", 1), (CHUNK + 1, "c" * 64, 1), (100, "c" * 64, 2)],
)
def test_a_length_that_fits_no_chunks_is_refused(length: int, digest: str, chunks: int) -> None:
    with pytest.raises(BadTarget):
        parse_target(OLD, length, digest, {**CUSTOM, "chunks": ["b" * 64] * chunks})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(CUSTOM)), inner),
    max_leaves=12,
)


@given(JSON, st.integers(), st.text(max_size=70))
def test_any_description_is_a_release_or_a_fault(custom: Any, length: int, digest: str) -> None:
    with contextlib.suppress(BadTarget):
        parse_target(OLD, length, digest, custom)


@given(st.dictionaries(st.sampled_from(list(CUSTOM)), JSON))
def test_any_wrong_field_in_a_right_description_is_a_fault(changes: Any) -> None:
    try:
        parse_target(OLD, 100, "c" * 64, CUSTOM | changes)
    except BadTarget:
        assert changes


@given(JSON)
def test_any_delta_is_one_or_a_fault(custom: Any) -> None:
    with pytest.raises(BadTarget):
        parse_delta("agent/x.zpatch", 10, "c" * 64, custom, "a" * 64, "b" * 64)


@given(st.text(max_size=40))
def test_any_path_is_one_or_a_fault(path: str) -> None:
    try:
        assert check_path(path) in {"agent", "os"}
    except BadTarget:
        return
    assert ".." not in path.split("/")


def test_versions_compare_by_number() -> None:
    assert version_key("1.9.0") < version_key("1.10")
    assert version_key("1.2") == version_key("1.2.0.0")
    for text in ("", "1", "1.02", "1.2.3.4.5", "1.x", "\u0661.2"):
        with pytest.raises(BadTarget):
            version_key(text)


@pytest.mark.parametrize("custom", [None, [], {"version": "1.2.0"}, {"huge": "x" * 200_000}])
def test_a_malformed_description_that_was_signed_is_refused(world: World, device: Device, custom: Any) -> None:
    def change(signed: Any) -> None:
        signed.version = 3
        signed.targets[OLD].unrecognized_fields["custom"] = custom

    forge(world, "2.picket.json", "3.picket.json", change, world.keys["picket"])
    list_roles(world, picket=3)

    with pytest.raises(BadTarget):
        device.check(OLD)


@pytest.mark.parametrize("bad", ["unsigned", "elsewhere"])
def test_a_bad_delta_costs_the_delta_only(world: World, device: Device, bad: str) -> None:
    source = sha256(b"tar of 1.1.0")
    world.release("1.3.0", deltas_from={source: b"patch"})
    device.running = Running("1.1.0", 1, device.running.hardware, source)

    def change(signed: Any) -> None:
        signed.version += 1
        path = f"agent/picket-agent-1.3.0.from-{source[:8]}.zpatch"
        if bad == "unsigned":
            del signed.targets[path]
        else:
            signed.targets[path].unrecognized_fields["custom"]["to"] = "0" * 64

    forge(world, "3.picket.json", "4.picket.json", change, world.keys["picket"])
    list_roles(world, picket=4)

    target = device.check()

    assert (target.version, target.delta) == ("1.3.0", None)


# --- the network --------------------------------------------------------------------------------------------------


def misbehaving(name: str, behave: Callable[[SimpleHTTPRequestHandler], None]) -> type[SimpleHTTPRequestHandler]:
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(f"/{name}"):
                self.close_connection = True
                try:
                    behave(self)
                except OSError:
                    return  # the unit has hung up, as it should
            else:
                super().do_GET()

    return Handler


def endless(handler: SimpleHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def drip(handler: SimpleHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.01)


def drip_chunks(handler: SimpleHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"0")
        time.sleep(0.01)


def drip_headers(handler: SimpleHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.01)


def bomb(handler: SimpleHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(gzip.compress(b" " * (64 << 20), 9))


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("behave", [endless, bomb])
def test_endless_metadata_are_cut_off(
    world: World, device: Device, name: str, behave: Callable[[SimpleHTTPRequestHandler], None]
) -> None:
    with (
        serve(world.directory, misbehaving(name, behave)) as web,
        pytest.raises(Unreachable, match="more than the"),
    ):
        device.check(OLD, f"{web.url}/metadata")


@pytest.mark.parametrize(
    ("name", "behave"), [*((name, drip) for name in ROLES), (ROLES[1], drip_chunks), (ROLES[1], drip_headers)]
)
def test_a_slow_drip_of_metadata_is_cut_off(
    world: World, device: Device, name: str, behave: Callable[[SimpleHTTPRequestHandler], None]
) -> None:
    with (
        serve(world.directory, misbehaving(name, behave)) as web,
        pytest.raises(Unreachable, match=r"not done after 0\.3 s"),
    ):
        device.trust(seconds=0.3).check(OLD, f"{web.url}/metadata", device.running)


def answer(status: int, body: bytes = b"", **headers: str) -> Callable[[SimpleHTTPRequestHandler], None]:
    def behave(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return behave


@pytest.mark.parametrize(
    "behave",
    [
        answer(302, Location="http://portal.invalid/"),
        answer(200, b"<html>Please log in</html>"),
        answer(500),
        answer(404),
        answer(206, b"{}"),
    ],
    ids=["redirect", "portal", "broken", "missing", "partial"],
)
@pytest.mark.parametrize("name", ROLES[1:])
def test_an_answer_that_is_no_metadata_is_no_verdict_on_the_release(
    world: World, device: Device, name: str, behave: Callable[[SimpleHTTPRequestHandler], None]
) -> None:
    with serve(world.directory, misbehaving(name, behave)) as web, pytest.raises(Unreachable) as caught:
        device.check(OLD, f"{web.url}/metadata")

    assert caught.value.retry
    assert device.check(OLD).version == "1.2.0"


def test_gzip_saves_bytes_and_changes_nothing(world: World, device: Device) -> None:
    class Gzip(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            if not path.is_file() or "gzip" not in self.headers["Accept-Encoding"]:
                return self.send_error(404)
            return answer(200, gzip.compress(path.read_bytes()), **{"Content-Encoding": "gzip"})(self)

    with serve(world.directory, Gzip) as web:
        assert device.check(OLD, f"{web.url}/metadata").version == "1.2.0"


def test_an_update_of_the_agent_alone_costs_less_than_four_kilobytes_of_metadata(world: World, device: Device) -> None:
    """As the bucket serves them, three releases of nine chunks listed; an idle look costs the timestamp."""
    for version in ("1.3.0", "1.4.0", "1.5.0"):
        device.check(OLD if version == "1.3.0" else NEW)
        content = random.Random(version).randbytes(9 * CHUNK)
        world.release(version, content=content, deltas_from={sha256(version.encode()): b"patch"})
    bodies = {f"/{file.name}": file.body() for file in world.repository.files_to_publish()}
    sent: list[int] = []

    class Bucket(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in bodies:
                return self.send_error(404)
            body, encoding = bodies[self.path]
            sent.append(len(body))
            return answer(200, body, **({"Content-Encoding": encoding} if encoding else {}))(self)

    with serve(world.directory, Bucket) as web:
        device.check("agent/picket-agent-1.5.0.tar.zst", f"{web.url}/metadata")
        update = sum(sent)
        device.check("agent/picket-agent-1.5.0.tar.zst", f"{web.url}/metadata")

    assert len(sent) == 4  # timestamp, snapshot, the product's; and the timestamp again
    assert update < 4096
    assert sent[-1] < 512


def test_an_agent_that_has_nothing_to_update_carries_none_of_it_in_memory() -> None:
    code = "import sys, firmware_agent.update.trust; print({'tuf', 'urllib3', 'zstandard'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "set()"


def test_nobody_there_is_unreachable(device: Device) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    with pytest.raises(Unreachable, match="refused"):
        device.check(OLD, f"http://127.0.0.1:{port}/metadata")
    with pytest.raises(Unreachable):
        device.check(OLD, "https://releases.invalid/metadata")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/metadata",
        "http://203.0.113.1/metadata",
        "https://user:secret@example.org/",
        "https://example.org/?X-Amz-Signature=secret",
        "https://example.org/#x",
        "https:///metadata",
        "https://example.org:99999/",
        "ftp://example.org/",
        "file://host/share",
        "metadata",
        "",
        "https://[::1",
    ],
)
def test_a_url_that_must_not_be_asked_is_refused_without_its_secrets(device: Device, url: str) -> None:
    with pytest.raises(Unreachable) as caught:
        device.trust().check(OLD, url, device.running)

    assert "secret" not in str(caught.value)


def test_files_are_a_way_only_where_that_was_said(device: Device) -> None:
    with pytest.raises(Unreachable):
        device.trust(allow_files=False).check(OLD, device.world.url, device.running)


def test_an_image_without_a_root_trusts_nobody(device: Device) -> None:
    with pytest.raises(BadSignature, match="brings no root"):
        device.trust(root=device.base / "missing").check(OLD, device.world.url, device.running)


def test_the_root_of_another_factory_trusts_nobody_here(device: Device, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")

    with pytest.raises(BadSignature):
        device.trust(root=other.root).check(OLD, device.world.url, device.running)
