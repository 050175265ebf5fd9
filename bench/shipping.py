"""What an update costs on the wire: signed metadata and a delta, against the full archive."""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Self

from bench.figures import NotMeasuredError, Place, Reading
from bench.meter import Meter
from bench.tools import ROOT, ProgramFailedError, program, python, run
from firmware_agent.update import archive, delta, download
from firmware_agent.update.archive import Digest
from firmware_agent.update.releases import Expected, Releases
from firmware_agent.update.target import Running
from firmware_agent.update.trust import Trust
from image.base import Base, base_root
from image.build import LOCK
from image.cache import held
from image.python import PYTHON, compile_python
from image.recipe import Recipe, load
from image.release import Built, device_release, pack, simulated_release
from image.wheels import device_library
from tests.updates import World

RECIPE = ROOT / "image/recipes/picket.toml"
CACHE = ROOT / "build/cache"
#: Before these, the lock's own versions come: what a bump of the SDK with its native code costs.
OLDER = {"awsiotsdk": "1.30.0", "awscrt": "0.36.0"}
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

#: A dozen lines more in one module, beside the version: what most releases are like.
CHANGED = "keeper.py"
CHANGE = '''

def in_words(seconds: float) -> str:
    """How long something took, for the log."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
'''


# --- releases -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maker:
    """Builds releases of the agent as it stands here.

    Attributes:
        recipe: for whose boards.
        base: what compiles for the device; None for the simulated board's releases, which bring no packages.
    """

    recipe: Recipe
    base: Base | None

    def archive(self, output: Path, version: str, *older: Path, changed: bool = False, lock: Path = LOCK) -> Built:
        """A release of this version with deltas from older archives."""
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            if self.base is None:
                tree = simulated_release(Path(folder), self.recipe, version)
            else:
                library = device_library(lock, self.base, CACHE)
                tree = device_release(Path(folder), self.base, library, self.recipe, version)
            if changed:
                self._change(tree / "firmware_agent")
            return pack(tree, output, older)

    def _change(self, agent: Path) -> None:
        source = agent / CHANGED
        source.chmod(0o644)
        source.write_text(source.read_text() + CHANGE)
        source.chmod(0o444)
        if self.base is not None:
            compile_python(self.base.twin, agent, f"/opt/picket/current/{agent.name}")


@contextlib.contextmanager
def device_maker(place: Place) -> Iterator[Maker]:
    """A maker of releases with packages and byte code, from the parts that `make image` has put into the cache.

    Raises:
        NotMeasuredError: there are none.
    """
    if not place.image.exists():
        raise NotMeasuredError(f"there is no image {place.image}; `make image` builds it, and releases of its parts")
    recipe = load(RECIPE)
    place.say("waiting for the cache")
    with held(CACHE):
        yield Maker(recipe, base_root(recipe, CACHE))


@contextlib.contextmanager
def best_maker(place: Place) -> Iterator[Maker]:
    """A maker of releases for the device, or without packages where no image was ever built."""
    if place.image.exists():
        with device_maker(place) as maker:
            yield maker
    else:
        yield Maker(load(RECIPE), None)


def the_archive(built: Built) -> Path:
    (found,) = built.description.parent.glob("*.tar.zst")
    return found


# --- a server -----------------------------------------------------------------------------------------------------


class Shelf:
    """Serves a published repository over HTTP, as the bucket does; a context manager."""

    def __init__(self, world: World) -> None:
        files = {f"/{file.name}": file.body() for file in world.repository.files_to_publish()}
        #: Path and length of each body that was sent.
        self.sent: list[tuple[str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, files, self.sent))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(
        self, files: Mapping[str, tuple[bytes, str | None]], sent: list[tuple[str, int]], *arguments: object
    ) -> None:
        self._files = files
        self._sent = sent
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The file, or 404 without a body."""
        body, encoding = self._files.get(self.path, (b"", None))
        self.send_response(200 if self.path in self._files else 404)
        if body:
            self.send_header("ETag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self._sent.append((self.path, len(body)))


# --- a unit -------------------------------------------------------------------------------------------------------


class Unit:
    """The part of a unit that takes updates: its releases, and whom it trusts."""

    def __init__(self, folder: Path, world: World, running: Built, version: str) -> None:
        (folder / "opt/releases").mkdir(parents=True)
        (folder / "state").mkdir()
        (folder / "scratch").mkdir()
        self._folder = folder
        self._releases = Releases(folder / "opt", folder / "state")
        with the_archive(running).open("rb") as file:
            expected = Expected(version, Digest(running.tar_sha256, running.tar_size))
            self._name = self._releases.install(archive.decompress(file), expected)
        self._tar = running.tar_sha256
        manifest = self._releases.manifest(self._name)
        self._running = Running(version, manifest.security_version, manifest.hardware, self._tar)
        self._trust = Trust(
            root=world.root,
            metadata=folder / "state/tuf",
            floor=folder / "state/floor.json",
            product=manifest.product,
            serial="PK-000001",
            now=lambda: world.now,
        )

    def look(self, path: str, port: int) -> None:
        """Fetch the metadata about a release, and no more."""
        self._trust.check(path, f"http://127.0.0.1:{port}/metadata/", self._running)

    def update(self, path: str, port: int, files: Mapping[str, str]) -> str:
        """Fetch metadata and delta, and install the release; its name.

        Raises:
            RuntimeError: no delta is offered from what runs here.
        """
        target = self._trust.check(path, f"http://127.0.0.1:{port}/metadata/", self._running)
        if target.delta is None:
            raise RuntimeError("the signed metadata offer no delta from the running release")
        found = target.delta
        payload = download.Payload(found.path, found.length, found.chunks, found.chunk_bytes)
        patch = download.download(payload, f"http://127.0.0.1:{port}/{files[found.path]}", self._folder / "scratch")
        expected = Expected(target.version, Digest(target.tar_sha256, target.tar_size))
        old = delta.base(self._releases.path(self._name), self._tar)
        return self._releases.install(delta.apply(old, patch.read_bytes(), expected.tar), expected)


# --- what is measured ---------------------------------------------------------------------------------------------


def application(place: Place) -> Reading:
    """All bytes, both ways, of an update to a release with a dozen lines more in one module."""
    folder = place.scratch
    with best_maker(place) as maker:
        place.say("three releases")
        old = maker.archive(folder / "1.0.0", "1.0.0")
        now = maker.archive(folder / "1.1.0", "1.1.0", the_archive(old))
        new = maker.archive(folder / "1.2.0", "1.2.0", the_archive(now), changed=True)
    place.say("signing")
    world = World(folder / "world")
    before = [world.repository.add(built.description, "main") for built in (old, now)][-1]
    world.publish()
    unit = Unit(folder / "unit", world, now, "1.1.0")
    with Shelf(world) as shelf:
        unit.look(before, shelf.port)  # it came to what runs here by an update, and knows the metadata of that day
    path = world.repository.add(new.description, "main")
    world.publish()
    files = next(one for one in world.repository.releases() if one.path == path).files
    place.say("updating")
    with Shelf(world) as shelf, Meter(shelf.port) as meter:
        unit.update(path, meter.port, files)
        wire = sum(chunk.size for chunk in meter.chunks())
        bodies = {kind: sum(size for name, size in shelf.sent if kind in name) for kind in ("/metadata/", "/targets/")}
    around = wire - sum(bodies.values())
    what = "with its packages" if maker.base else "without packages, as no image was built"
    note = (
        f"of the agent {what}: metadata {bodies['/metadata/']} B, delta {bodies['/targets/']} B, HTTP's heads of "
        f"{len(shelf.sent)} requests {around} B; TLS's handshakes and a presigned URL's length come on top"
    )
    return Reading(wire / 1000, new.archive_size / 1000, note)


def dependencies(place: Place) -> Reading:
    """The delta of a bump of AWS's SDK with its native code, as a share of the full archive."""
    folder = place.scratch
    with device_maker(place) as maker:
        older = folder / "device.lock"
        older.write_text(older_lock(LOCK.read_text(), _wheels(place)))
        place.say("a release with the SDK before, and one with today's")
        old = maker.archive(folder / "1.0.0", "1.0.0", lock=older)
        new = maker.archive(folder / "1.1.0", "1.1.0", the_archive(old))
    (ours,) = new.delta_sizes.values()
    full = new.archive_size
    peer, how = full, "zstd is not installed, so the peer is the full archive"
    if program("zstd") is not None:
        place.say("the same by zstd's command")
        peer = patch_from(the_archive(old), the_archive(new), folder)
        how = f"zstd -19 --long=27 --patch-from makes {peer / 1000:.0f} kB"
    bump = ", ".join(f"{name} {version}" for name, version in OLDER.items())
    note = f"from {bump} to the lock's: {ours / 1000:.0f} kB of {full / 1000:.0f} kB; {how}"
    return Reading(ours / full * 100, peer / full * 100, note)


def patch_from(old: Path, new: Path, folder: Path) -> int:
    """Size in bytes of the delta that zstd's own command makes between two archives' tars."""
    for name, packed in (("old", old), ("new", new)):
        run("zstd", "--decompress", "--force", "--long=27", "-o", folder / f"{name}.tar", packed)
    run("zstd", "-19", "--long=27", f"--patch-from={folder}/old.tar", "-o", folder / "zpatch", folder / "new.tar")
    return (folder / "zpatch").stat().st_size


def older_lock(lock: str, digests: Mapping[str, str]) -> str:
    """The lock with OLDER in the place of its own versions; `digests` are the sha256 of their wheels.

    Raises:
        NotMeasuredError: the lock is not newer.
    """
    for name, version in OLDER.items():
        pinned = re.compile(rf"^{name}==(\S+)[^\n]*(?:\n[ \t]+[^\n]*)*\n?", re.MULTILINE)
        found = pinned.search(lock)
        if found is None or found[1] == version:
            raise NotMeasuredError(f"the lock does not bring {name} newer than {version}: name an older one in OLDER")
        lock = pinned.sub(f"{name}=={version} --hash=sha256:{digests[name]}\n", lock)
    return lock


def _wheels(place: Place) -> dict[str, str]:
    """The digests of OLDER's wheels for the device, downloaded once."""
    folder = CACHE / "bench-wheels"
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for tag in PLATFORMS for word in ("--platform", tag)]
    found = {}
    for name, version in OLDER.items():
        pattern = f"{name}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            place.say(f"{name} {version} from the package index")
            try:
                python("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *platforms,
                       "--python-version", PYTHON, "--dest", folder, f"{name}=={version}")  # fmt: skip
            except ProgramFailedError as error:
                raise NotMeasuredError(f"{name} {version} does not come from the package index: {error}") from error
        (wheel,) = folder.glob(pattern)
        found[name] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return found
