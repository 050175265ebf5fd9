"""An update repository for tests: real metadata, real signatures, keys in memory, and a clock to turn.

world = World(tmp_path)                       # made, signed and published
path = world.release("1.2.0")                 # built, listed for all units, published
world.url                                     # file:// of the metadata; or serve(world.directory)
"""

import copy
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner

from cloud.repository import Repository
from cloud.roles import HOLDER_FIELD

CHUNK = 65536
HOLDERS = ("alice", "bob", "carol")
HARDWARE = ("raspberrypi,3-model-b", "picket,simulated")


def signer(holder: str) -> CryptoSigner:
    made = CryptoSigner.generate_ed25519()
    made.public_key.unrecognized_fields[HOLDER_FIELD] = holder
    return made


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def payload(file: Path, content: bytes) -> dict[str, Any]:
    """A file of a release and its entry in the description."""
    file.write_bytes(content)
    chunks = [sha256(content[at : at + CHUNK]) for at in range(0, len(content), CHUNK)]
    return {
        "file": file.name,
        "length": len(content),
        "sha256": sha256(content),
        "chunk_bytes": CHUNK,
        "chunks": chunks,
    }


def build(
    folder: Path,
    version: str,
    *,
    content: bytes | None = None,
    security_version: int = 1,
    product: str = "picket",
    hardware: tuple[str, ...] = HARDWARE,
    min_from: str | None = None,
    deltas_from: Mapping[str, bytes] | None = None,
    kind: str = "agent",
) -> Path:
    """A description as `python -m image release` writes it, beside files with any content."""
    folder.mkdir(parents=True, exist_ok=True)
    content = content if content is not None else f"archive {version} ".encode() * 8192
    name = f"{product}-agent-{version}.tar.zst" if kind == "agent" else f"{product}-{version}.os.tar"
    archive = payload(folder / name, content)
    tar = sha256(b"tar " + content)
    deltas = []
    for source, patch in (deltas_from or {}).items():
        entry = payload(folder / f"{product}-agent-{version}.from-{source[:8]}.zpatch", patch)
        deltas.append({**entry, "from": source, "to": tar})
    value = {
        "format": 1,
        "kind": kind,
        "product": product,
        "version": version,
        "security_version": security_version,
        "hardware": list(hardware),
        "min_from": min_from,
        "python": None,
        "archive": {**archive, "tar_sha256": tar, "tar_size": len(content) * 3},
        "deltas": deltas,
    }
    description = folder / "release.json"
    description.write_text(json.dumps(value))
    return description


class World:
    """A repository and everybody who has a key to it."""

    def __init__(self, base: Path, *, canaries: tuple[str, ...] = ()) -> None:
        self.base = base
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.directory = base / "repository"
        self.keys: dict[str, list[CryptoSigner]] = {
            "root": [signer(name) for name in HOLDERS],
            "targets": [signer(name) for name in HOLDERS],
            "picket": [signer(name) for name in HOLDERS],
            "picket-canary": [signer("builder")],
            "snapshot": [signer("server")],
            "timestamp": [signer("server")],
        }
        public = {role: [key.public_key for key in keys] for role, keys in self.keys.items()}
        self.repository = Repository.create(self.directory, "picket", public, lambda: self.now)
        if canaries:
            self.repository.set_canaries(canaries)
        self.publish()

    def copy(self, base: Path) -> "World":
        """The same world in another directory; making one anew waits for the disk fifty times."""
        made = copy.copy(self)
        made.base, made.directory = base, base / "repository"
        made.keys = {role: list(keys) for role, keys in self.keys.items()}
        shutil.copytree(self.directory, made.directory)
        made.repository = Repository(made.directory, lambda: made.now)
        return made

    @property
    def metadata(self) -> Path:
        return self.directory / "metadata"

    @property
    def url(self) -> str:
        return self.metadata.as_uri()

    @property
    def signers(self) -> list[CryptoSigner]:
        return [key for keys in self.keys.values() for key in keys]

    @property
    def root(self) -> Path:
        """What an image made at the beginning carries."""
        return self.metadata / "1.root.json"

    def publish(self) -> None:
        """Everybody signs, and it is published."""
        for role in self.repository.staged_roles():
            self.repository.sign(role, self.signers)
        self.repository.publish(self.signers)

    def release(self, version: str, ring: str = "main", **details: Any) -> str:
        """Build, list and publish a release; its target path."""
        path = self.repository.add(build(self.base / "built" / version, version, **details), ring)
        self.publish()
        return path

    def pass_days(self, days: float) -> None:
        self.now += timedelta(days=days)


@dataclass
class Web:
    """A directory on HTTP, and what was asked of it."""

    url: str
    asked: list[tuple[str, int]]


@contextmanager
def serve(directory: Path, handler: type[SimpleHTTPRequestHandler] | None = None) -> Iterator[Web]:
    """Serve a directory on loopback, counting the bytes of bodies."""
    asked: list[tuple[str, int]] = []

    class Handler(handler or SimpleHTTPRequestHandler):  # type: ignore[misc]
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            data = source.read()
            asked.append((self.path, len(data)))
            outputfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Web(f"http://127.0.0.1:{server.server_address[1]}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
