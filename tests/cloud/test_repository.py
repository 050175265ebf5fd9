"""The update repository: what is staged, who must sign, what is published and in which order."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Metadata, Targets
from tuf.ngclient import Updater

from cloud.errors import RepositoryFault
from cloud.repository import Repository
from cloud.roles import delegations
from firmware_agent.update.fetch import Fetcher
from tests.updates import World, build, sha256, signer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    return made.copy(tmp_path)


def as_any_client_sees(world: World, path: str, folder: Path) -> bytes | None:
    """Through python-tuf alone, downloads included: the layout is TUF's own."""
    folder.mkdir()
    targets = (world.directory / "targets").as_uri()
    updater = Updater(
        str(folder), world.url, str(folder), targets, fetcher=_fetcher(world), bootstrap=world.root.read_bytes()
    )
    found = updater.get_targetinfo(path)
    return Path(updater.download_target(found)).read_bytes() if found else None


def _fetcher(world: World) -> Fetcher:
    return Fetcher(world.url, allow_files=True)


def test_a_release_is_found_by_any_tuf_client(world: World, tmp_path: Path) -> None:
    path = world.release("1.2.0", content=b"the archive")

    assert path == "agent/picket-agent-1.2.0.tar.zst"
    assert as_any_client_sees(world, path, tmp_path / "client") == b"the archive"


def test_a_canarys_release_is_listed_elsewhere_and_promoted_with_the_same_bits(world: World, tmp_path: Path) -> None:
    source = sha256(b"tar of 1.1.0")
    canary = world.release("1.2.0", "canary", content=b"bits", deltas_from={source: b"patch"})

    assert canary == "agent/canary/picket-agent-1.2.0.tar.zst"
    assert [release.ring for release in world.repository.releases()] == ["canary"]
    assert world.repository.promote("1.2.0") == "agent/picket-agent-1.2.0.tar.zst"
    assert world.repository.releases("main") == []  # two people have not signed yet

    world.publish()
    main = world.repository.releases("main")[0]

    assert main.deltas == {source: f"agent/picket-agent-1.2.0.from-{source[:8]}.zpatch"}
    assert main.tar_sha256 == world.repository.releases("canary")[0].tar_sha256
    assert as_any_client_sees(world, main.path, tmp_path / "client") == b"bits"
    assert as_any_client_sees(world, main.deltas[source], tmp_path / "client2") == b"patch"


def test_images_and_the_agents_releases_do_not_push_each_other_out(world: World) -> None:
    for version in ("1.0.0", "1.1.0", "1.2.0", "1.3.0"):
        world.release(version)
        world.release(version, kind="os")

    kept = ["1.3.0", "1.2.0", "1.1.0"]
    assert [release.version for release in world.repository.releases("main", "agent")] == kept
    assert [release.version for release in world.repository.releases("main", "os")] == kept
    assert world.repository.releases(kind="os")[0].path == "os/picket-1.3.0.os.tar"

    world.repository.withdraw("1.2.0", "os")
    world.publish()
    assert [release.version for release in world.repository.releases("main", "agent")] == kept
    assert [release.version for release in world.repository.releases("main", "os")] == ["1.3.0", "1.1.0"]


def test_an_image_of_the_canaries_is_promoted_as_an_image(world: World) -> None:
    world.release("1.2.0", "canary", kind="os")

    with pytest.raises(RepositoryFault, match=r"the canaries have no release 1\.2\.0"):
        world.repository.promote("1.2.0")
    assert world.repository.promote("1.2.0", "os") == "os/picket-1.2.0.os.tar"


def test_what_is_added_is_of_the_kind_that_was_said(world: World) -> None:
    description = build(world.base / "built", "1.2.0", kind="os")

    with pytest.raises(RepositoryFault, match="say --os"):
        world.repository.add(description, "canary", kind="agent")
    assert world.repository.add(description, "canary", kind="os") == "os/canary/picket-1.2.0.os.tar"


def test_one_holder_alone_publishes_nothing(world: World) -> None:
    world.repository.add(build(world.base / "built", "1.2.0"), "main")
    alice = [keys[0] for role, keys in world.keys.items() if len(keys) == 3]
    online = [*world.keys["snapshot"], *world.keys["timestamp"]]

    signing = world.repository.sign("picket", alice)
    published = world.repository.publish([*alice, *online])

    assert (signing.missing, signing.waiting_for) == (1, ("bob", "carol"))
    assert published == ()
    assert world.repository.releases() == []
    assert str(signing) == "picket 2: 1 more of bob, carol"


def test_signatures_of_two_holders_are_collected_one_after_the_other(world: World) -> None:
    world.repository.add(build(world.base / "built", "1.2.0"), "main")

    assert world.repository.sign("picket", world.keys["picket"][:1]).missing == 1
    assert world.repository.sign("picket", world.keys["picket"][:1]).missing == 1  # the same person twice is one
    assert world.repository.sign("picket", world.keys["picket"][2:]).missing == 0


def test_a_change_after_a_signature_wants_all_signatures_again(world: World) -> None:
    world.repository.add(build(world.base / "built", "1.2.0"), "main")
    world.repository.sign("picket", world.keys["picket"][:1])

    world.repository.add(build(world.base / "other", "1.3.0"), "main")

    assert world.repository.signing("picket").missing == 2


def test_without_the_online_keys_nothing_changes(world: World) -> None:
    world.repository.add(build(world.base / "built", "1.2.0"), "main")
    world.repository.sign("picket", world.keys["picket"])
    before = {path: path.read_bytes() for path in world.metadata.iterdir()}

    with pytest.raises(RepositoryFault, match="needs the snapshot key"):
        world.repository.publish(world.keys["picket"])

    assert {path: path.read_bytes() for path in world.metadata.iterdir()} == before


def test_withdrawn_releases_leave_with_their_deltas(world: World) -> None:
    source = sha256(b"tar of 1.1.0")
    world.release("1.2.0", deltas_from={source: b"patch"})
    world.release("1.3.0")

    assert world.repository.withdraw("1.2.0") == ("picket",)
    world.publish()

    assert [release.version for release in world.repository.releases()] == ["1.3.0"]
    metadata = world.repository.in_force("picket")
    assert metadata is not None
    assert list(metadata.signed.targets) == ["agent/picket-agent-1.3.0.tar.zst"]
    with pytest.raises(RepositoryFault, match=r"no ring has a release 9\.9"):
        world.repository.withdraw("9.9")


def test_a_ring_lists_the_newest_three(world: World) -> None:
    for version in ("1.8.0", "1.9.0", "1.10.0", "1.11.0"):
        world.release(version)

    assert [release.version for release in world.repository.releases()] == ["1.11.0", "1.10.0", "1.9.0"]

    world.release("1.8.1")  # an old line is mended: the release that was asked for is never the one that goes

    assert [release.version for release in world.repository.releases()] == ["1.11.0", "1.10.0", "1.8.1"]


def test_files_come_in_an_order_that_is_safe_to_copy(world: World, tmp_path: Path) -> None:
    """A unit that looks while the copy runs sees the old state or the new one."""
    old = world.release("1.2.0")
    mirror = World.__new__(World)
    mirror.directory = tmp_path / "mirror"
    for file in world.repository.files_to_publish():
        _copy(file.file, mirror.directory / file.name)
    world.release("1.3.0")
    new = "agent/picket-agent-1.3.0.tar.zst"
    files = world.repository.files_to_publish()
    seen = []

    for number, file in enumerate(files):
        assert file.immutable == (number < len(files) - 1)
        _copy(file.file, mirror.directory / file.name)
        assert as_any_client_sees(mirror, old, tmp_path / f"old-{number}") is not None
        seen.append(as_any_client_sees(mirror, new, tmp_path / f"new-{number}") is not None)

    assert seen == [False] * (len(files) - 1) + [True]
    assert len({file.name for file in files}) == len(files)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def test_metadata_are_served_packed_and_payloads_as_they_are(world: World) -> None:
    world.release("1.2.0")

    for file in world.repository.files_to_publish():
        body, encoding = file.body()
        packed = file.immutable and file.name.startswith("metadata/")
        assert encoding == ("gzip" if packed else None)
        assert (gzip.decompress(body) if packed else body) == file.file.read_bytes()
        assert file.body() == (body, encoding)


class PowerCut(Exception):
    pass


def test_publishing_that_is_cut_anywhere_is_completed_by_publishing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    for cut in range(12):
        base = tmp_path / str(cut)
        base.mkdir()
        world = World(base)
        old = world.release("1.2.0")
        path = world.repository.add(build(world.base / "built" / "new", "1.3.0"), "main")
        world.repository.set_canaries(["PK-000001"])
        for role in world.repository.staged_roles():
            world.repository.sign(role, world.signers)
        left = iter(range(cut))

        def replace(self: Path, target: Path, left: Iterator[int] = left) -> Path:
            if next(left, None) is None:
                raise PowerCut
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        done = True
        try:
            world.repository.publish(world.signers)
        except PowerCut:
            done = False
        monkeypatch.undo()

        assert as_any_client_sees(world, old, base / "before") is not None
        if not done:
            Repository(world.directory).publish(world.signers)
        assert as_any_client_sees(world, path, base / "after") is not None
        assert world.repository.staged_roles() == ()
        if done:
            assert cut == 5  # picket, targets, snapshot, timestamp, the copy of the root
            return
    pytest.fail("publishing never came to its end")


def test_a_key_is_replaced_and_the_old_one_counts_no_more(world: World) -> None:
    path = world.release("1.2.0")
    thief = world.keys["picket"][1]
    world.keys["picket"][1] = replacement = _signer("bob")

    roles = world.repository.replace_key("picket", thief.public_key.keyid, replacement.public_key)
    world.publish()

    assert roles == ("targets", "picket")
    world.repository.withdraw("1.2.0")
    assert world.repository.sign("picket", [thief]).missing == 2
    assert world.repository.sign("picket", [replacement]).missing == 1
    assert world.repository.releases()[0].path == path
    with pytest.raises(RepositoryFault, match="picket has no key"):
        world.repository.replace_key("picket", thief.public_key.keyid, replacement.public_key)


def test_a_new_root_needs_two_of_the_old_keys_and_two_of_the_new(world: World) -> None:
    lost = world.keys["root"][2]
    replacement = _signer("carol")
    world.repository.replace_key("root", lost.public_key.keyid, replacement.public_key)

    assert world.repository.sign("root", [replacement, world.keys["root"][0]]).missing == 1  # one of the old ones
    assert world.repository.sign("root", [world.keys["root"][1]]).missing == 0


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_an_online_key_is_replaced_by_a_new_root(world: World, tmp_path: Path, role: str) -> None:
    path = world.release("1.2.0")
    stolen = world.keys[role][0]
    world.keys[role] = [_signer("server")]
    assert (world.directory / "root.json").read_bytes() == (world.metadata / "1.root.json").read_bytes()

    assert world.repository.replace_key(role, stolen.public_key.keyid, world.keys[role][0].public_key) == ("root",)
    world.publish()

    assert as_any_client_sees(world, path, tmp_path / "client") is not None
    assert (world.directory / "root.json").read_bytes() == (world.metadata / "2.root.json").read_bytes()
    metadata = world.repository.in_force(role)
    assert metadata is not None
    assert set(metadata.signatures) == {world.keys[role][0].public_key.keyid}


def test_targets_keys_cannot_be_replaced_without_signing_targets_anew(world: World) -> None:
    """One holder goes; the targets in force were signed by the two of whom one counts no more."""
    world.repository.refresh("targets")
    world.repository.sign("targets", world.keys["targets"][:2])
    world.repository.publish(world.signers)
    gone = world.keys["targets"][0]
    world.keys["targets"][0] = _signer("dave")
    world.repository.replace_key("targets", gone.public_key.keyid, world.keys["targets"][0].public_key)
    world.repository.sign("root", world.keys["root"])

    with pytest.raises(RepositoryFault, match="units would refuse this"):
        world.repository.publish(world.signers)

    world.publish()
    assert {status.role: status.holders for status in world.repository.status()}["targets"] == ("bob", "carol", "dave")


def test_the_snapshot_stays_when_only_the_timestamp_is_renewed(world: World) -> None:
    world.release("1.2.0")
    before = {status.role: status.version for status in world.repository.status()}

    world.pass_days(4)
    assert world.repository.due() == ("timestamp",)
    world.publish()
    after = {status.role: status.version for status in world.repository.status()}

    assert after == {**before, "timestamp": before["timestamp"] + 1}
    assert world.repository.due() == ()


def test_metadata_are_due_when_half_of_their_time_is_spent(world: World) -> None:
    world.pass_days(46)

    assert set(world.repository.due()) == {"targets", "picket", "picket-canary", "snapshot", "timestamp"}


def test_canaries_are_named_by_the_offline_targets_role(world: World) -> None:
    world.repository.set_canaries(["PK-000002", "PK-000001", "PK-000002"])

    assert world.repository.staged_roles() == ("targets",)
    world.publish()

    assert world.repository.canaries() == ("PK-000001", "PK-000002")


def test_the_roles_of_a_product_never_overlap() -> None:
    roles = delegations("picket")
    paths = ("agent/picket-agent-1.tar.zst", "agent/canary/picket-agent-1.tar.zst", "os/picket-os-1.img")

    for path in paths:
        matching = [
            name
            for name, patterns in roles.items()
            if DelegatedRole(name, [], 1, terminating=True, paths=list(patterns)).is_delegated_path(path)
        ]
        assert matching == ["picket-canary" if "/canary/" in path else "picket"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "picket-agent-1.2.0.tar.zst").write_bytes(b"other"), "not the file that its"),
        (lambda folder: (folder / "picket-agent-1.2.0.tar.zst").unlink(), "cannot be read"),
        (lambda folder: (folder / "release.json").write_text("{"), "no description of a release"),
        (lambda folder: (folder / "release.json").write_text("[]"), "no description of a release"),
        (lambda folder: _without(folder / "release.json", "version"), "describes no release: 'version'"),
        (lambda folder: (folder / "release.json").unlink(), "`make release` with that VERSION builds it"),
        (lambda folder: _with(folder / "release.json", "version", 3), "'version' is missing or malformed"),
        (lambda folder: _with(folder / "release.json", "version", "latest"), "'version' is missing or malformed"),
        (lambda folder: _with(folder / "release.json", "version", "1.3.0"), r"describes 1\.3\.0, not 1\.2\.0"),
        (lambda folder: _with(folder / "release.json", "security_version", "1"), "'security_version' is missing or"),
        (lambda folder: _with(folder / "release.json", "hardware", "board"), "'hardware' is missing or malformed"),
        (lambda folder: _with(folder / "release.json", "archive", []), "describes no release"),
        (lambda folder: _with(folder / "release.json", "archive.chunks", "x"), "not the file that its"),
        (lambda folder: _with(folder / "release.json", "archive.chunk_bytes", "x"), "'chunk_bytes' is missing or"),
        (lambda folder: _with(folder / "release.json", "archive.tar_sha256", "x"), "'digest' is missing or malformed"),
        (lambda folder: _with(folder / "release.json", "deltas", "x"), "describes no release"),
        (lambda folder: _with(folder / "release.json", "deltas", 3), "describes no release"),
    ],
)
def test_a_release_that_is_not_what_it_says_is_not_taken(
    world: World, change: Callable[[Path], object], reason: str
) -> None:
    description = build(world.base / "built", "1.2.0")
    change(description.parent)

    with pytest.raises(RepositoryFault, match=reason):
        world.repository.add(description, "main", version="1.2.0")

    assert world.repository.staged_roles() == ()


def _with(path: Path, keys: str, new: object) -> None:
    value = found = json.loads(path.read_text())
    *outer, last = keys.split(".")
    for key in outer:
        found = found[key]
    found[last] = new
    path.write_text(json.dumps(value))


def _without(path: Path, key: str) -> None:
    value = json.loads(path.read_text())
    del value[key]
    path.write_text(json.dumps(value))


def test_a_release_of_another_product_or_ring_is_not_taken(world: World) -> None:
    with pytest.raises(RepositoryFault, match="a release of kettle, not of picket"):
        world.repository.add(build(world.base / "built", "1.2.0", product="kettle"), "main")
    with pytest.raises(RepositoryFault, match="no ring 'beta'"):
        world.repository.add(build(world.base / "built", "1.2.0"), "beta")
    with pytest.raises(RepositoryFault, match=r"canaries have no release 1\.2\.0"):
        world.repository.promote("1.2.0")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "timestamp.json").write_text("garbage"), "cannot be read"),
        (lambda folder: (folder / "timestamp.json").write_bytes((folder / "1.root.json").read_bytes()), "another role"),
        (lambda folder: (folder / "1.picket.json").unlink(), "No such file"),
        (lambda folder: [(folder / "1.picket.json").unlink(), (folder / "1.picket.json").mkdir()], "Is a directory"),
    ],
)
def test_metadata_that_were_damaged_are_named(world: World, damage: Callable[[Path], object], reason: str) -> None:
    damage(world.directory / "metadata")

    with pytest.raises(RepositoryFault, match=reason):
        world.repository.files_to_publish()


def test_a_file_that_only_looks_like_a_root_is_passed_over(world: World) -> None:
    before = [file.name for file in world.repository.files_to_publish()]
    (world.directory / "metadata" / "copy.root.json").touch()

    assert [file.name for file in world.repository.files_to_publish()] == before
    assert world.repository.status()


def test_a_directory_without_a_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryFault, match="holds no update repository"):
        Repository(tmp_path)


def test_nothing_can_be_published_before_the_first_root_is_signed(tmp_path: Path) -> None:
    world = World(tmp_path)
    public = {role: [key.public_key for key in keys] for role, keys in world.keys.items()}
    repository = Repository.create(tmp_path / "new", "picket", public)

    with pytest.raises(RepositoryFault, match="2 more of alice, bob, carol; nothing can be published before"):
        repository.publish(world.signers)
    with pytest.raises(RepositoryFault, match="nothing is published yet"):
        repository.files_to_publish()
    with pytest.raises(RepositoryFault, match="already"):
        Repository.create(tmp_path / "new", "picket", public)


def test_metadata_on_disk_stay_readable_by_python_tuf(world: World) -> None:
    world.release("1.2.0")

    assert Metadata[Targets].from_file(str(world.metadata / "2.picket.json")).signed.version == 2


def _signer(holder: str) -> CryptoSigner:
    return signer(holder)
