"""One unit with its releases, a jobs service, a server of payloads, and a plug to pull: what the matrix is played on.

Real are the runner, the kinds, the journal, the releases, the launcher's decision, the download over HTTP and the
deltas. Ours are the jobs service (tests/firmware_agent/jobs_service.py) and what the signed metadata say.

A process of the agent is a call of `Unit.process`. `Plug` stands in for `os` in every module that changes the disk: it
can end the process at any of these changes, and after that nothing reaches the disk any more, whatever `finally` and
`except` would like. For a power cut, what was not fsynced is gone, too (tests/firmware_agent/disk.py).
"""

import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import files, launcher
from firmware_agent.jobs.kind import Context, Kind, Orphan, Phase, Result
from firmware_agent.jobs.runner import Link, Runner
from firmware_agent.jobs.update import Limits, Update
from firmware_agent.update import archive, delta, download
from firmware_agent.update.archive import Manifest
from firmware_agent.update.floor import read_floor, write_floor
from firmware_agent.update.releases import Expected, Releases
from firmware_agent.update.target import DeltaHint, Payload, Running, Target, judge
from tests.firmware_agent.disk import Disk, Recorder, materialise

SERIAL = "PK-000001"
HARDWARE = "picket,simulated"
CHUNK = 1024
FULL = "agent/picket-agent-1.1.0.tar.zst"
DELTA = "agent/picket-agent-1.1.0.from-old.zpatch"

#: Prints which release was started.
PROGRAM = "import os, sys\nprint(os.environ['PICKET_RELEASE'], *sys.argv[1:])\n"


class Cut(BaseException):
    """The process ends here; nothing may catch it."""


class Plug(Recorder):
    """`os`, which dies at the call that `left` counts down to."""

    def __init__(self, root: Path, die: Callable[[], None] | None = None) -> None:
        super().__init__(root)
        self.dead = False
        self.left: int | None = None
        self.count = 0
        self._die = die

    def pull(self) -> None:
        """Now."""
        self.dead = True
        if self._die is not None:
            self._die()
        raise Cut

    def _gate(self) -> None:
        if self.dead:
            raise Cut
        self.count += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.pull()

    def open(self, path: Path | str, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            self._gate()
        return super().open(path, flags, mode)

    def fsync(self, handle: int) -> None:
        self._gate()
        self.calls.append(("fsync", handle))  # the model knows; the real disk need not be waited for


def _gated(name: str) -> Callable[..., Any]:
    def call(self: Plug, *arguments: Any) -> Any:
        self._gate()
        return getattr(Recorder, name)(self, *arguments)

    return call


for _name in ("write", "pwrite", "ftruncate", "fchmod", "mkdir", "symlink", "rename", "replace", "unlink", "rmdir"):
    setattr(Plug, _name, _gated(_name))


# --- what is served -----------------------------------------------------------------------------------------------


class Web:
    """Serves payloads on loopback, by path; a query of `?stale` is answered by 403."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.asked: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                web.asked.append(path)
                data = web.content.get(path)
                status = 404 if data is None else 403 if query == "stale" else 200
                data = data if status == 200 and data is not None else b""
                headers = {}
                if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                    start, end = int(wanted[1]), int(wanted[2])
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                    status, data = 206, data[start : end + 1]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_PUT(self) -> None:
                path, _, query = self.path.partition("?")
                data = self.rfile.read(int(self.headers["Content-Length"]))
                status = 403 if query == "stale" else 200
                if status == 200:
                    web.content[path] = data
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass(frozen=True)
class Goods:
    """Two releases, and what leads from one to the other; made once."""

    old_tar: bytes
    old: Expected
    full: bytes
    delta: bytes
    target: Target

    @property
    def new(self) -> str:
        return self.target.release


def _tar(tree: Path, version: str, security: int) -> tuple[bytes, Expected]:
    (tree / "firmware_agent").mkdir(parents=True)
    (tree / "lib").mkdir()
    (tree / "manifest.json").write_bytes(Manifest("picket", version, security, (HARDWARE,)).to_bytes())
    (tree / "firmware_agent/__main__.py").write_text(f"# {version}\n{PROGRAM}")
    (tree / "lib/native.so").write_bytes(random.Random(1).randbytes(2500) + version.encode())
    tar = io.BytesIO()
    digest = archive.write_tree(tree, tar)
    return tar.getvalue(), Expected(version, digest)


def _signed(path: str, content: bytes) -> Payload:
    chunks = tuple(hashlib.sha256(content[at : at + CHUNK]).hexdigest() for at in range(0, len(content), CHUNK))
    return Payload(path, len(content), hashlib.sha256(content).hexdigest(), CHUNK, chunks)


def make_goods(place: Path) -> Goods:
    old_tar, old = _tar(place / "old", "1.0.0", 1)
    new_tar, new = _tar(place / "new", "1.1.0", 2)
    packed = io.BytesIO()
    archive.compress(io.BytesIO(new_tar), packed, len(new_tar))
    patch = delta.make(old_tar, new_tar)
    target = Target(
        kind="agent",
        product="picket",
        version="1.1.0",
        security_version=2,
        hardware=(HARDWARE,),
        min_from=None,
        tar_sha256=new.tar.sha256,
        tar_size=new.tar.size,
        full=_signed(FULL, packed.getvalue()),
        deltas=(DeltaHint(old.tar.sha256, DELTA),),
        delta=_signed(DELTA, patch),
    )
    return Goods(old_tar, old, packed.getvalue(), patch, target)


class SignedTargets:
    """What signed metadata would say, with the real judgement and the real floor."""

    def __init__(self, targets: Mapping[str, Target], floor: Path) -> None:
        self._targets = targets
        self._floor = floor

    def check(self, path: str, metadata_url: str, running: Running) -> Target:
        target = self._targets[path]
        judge(target, running, "picket", read_floor(self._floor).security.get("agent", 0))
        known = target.delta if target.deltas and target.deltas[0].source.startswith(running.tar) else None
        return replace(target, delta=known)

    def commit(self, security_version: int, kind: str = "agent") -> None:
        write_floor(self._floor, read_floor(self._floor).committed(kind, security_version))

    def security_floor(self, kind: str = "agent") -> int:
        return read_floor(self._floor).security.get(kind, 0)


# --- what happens to it -------------------------------------------------------------------------------------------

Hook = Callable[[str, str], None]


class Watched:
    """A kind whose phases can be met at their beginning and their end."""

    def __init__(self, kind: Kind, hook: Hook) -> None:
        self.operation = kind.operation
        self.phases = [self._watched(phase, hook) for phase in kind.phases]
        self.undo = [self._watched(phase, hook) for phase in kind.undo]
        self._kind = kind
        self._hook = hook

    def _watched(self, phase: Phase, hook: Hook) -> Phase:
        def run(context: Context) -> Result:
            hook("begin", phase.name)
            try:
                result = phase.run(context)
            except Exception:
                hook("end", phase.name)
                raise
            hook("end", phase.name)
            return result

        return replace(phase, run=run)

    def clean_up(self, context: Context) -> None:
        self._hook("begin", "clean-up")
        self._kind.clean_up(context)
        self._hook("end", "clean-up")

    def orphan(self) -> Orphan | None:
        return self._kind.orphan()


@dataclass
class Unit:
    """The unit: its disk under `root`, and what a process on it is made of."""

    root: Path
    link: Link
    target: Target
    hook: Hook = lambda _moment, _phase: None
    healthy: bool = True
    limits: Limits = field(default_factory=lambda: Limits(0.0, 0.0, 3))
    kinds: Callable[[str], list[Kind]] | None = None
    runner: Runner | None = None
    deadlines: list[int] = field(default_factory=list)

    @property
    def opt(self) -> Path:
        return self.root / "opt"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def releases(self) -> Releases:
        return Releases(self.opt, self.state)

    @classmethod
    def make(cls, root: Path, goods: Goods, link: Link) -> "Unit":
        unit = cls(root, link, goods.target)
        (unit.opt / "releases").mkdir(parents=True)
        unit.state.mkdir()
        unit.releases.install(io.BytesIO(goods.old_tar), goods.old)
        files.point(unit.opt / "current", f"releases/{goods.old.name}")
        return unit

    def start(self) -> str:
        """What the launcher would start now, after it has written down that it does."""
        plan = launcher.prepare(self.opt, self.state)
        assert plan is not None
        return plan.release

    def update(self, name: str) -> Kind:
        well = self.healthy or name != self.target.release
        return Update(
            self.releases,
            name,
            [HARDWARE],
            SignedTargets({FULL: self.target}, self.state / "floor.json"),
            self.link,
            lambda: None if well else "the sensor's line does not open",
            self.limits,
            get=functools.partial(
                download.download, delay=lambda _: 0.0, limits=download.Limits(attempts=2, chunk_attempts=2)
            ),
            deadline=self.deadlines.append,
        )

    def process(self, name: str, stop: threading.Event) -> bool:
        """One process of the release `name`, until it has nothing to do (False) or is to be started anew (True)."""
        left: list[bool] = []
        kinds = self.kinds(name) if self.kinds else [self.update(name)]
        self.runner = Runner(
            self.link,
            self.state / "jobs",
            [Watched(kind, self.hook) for kind in kinds],
            product="picket",
            leave=lambda: left.append(True),
        )
        self.runner.run(stop)
        return bool(left)

    def orphans(self) -> set[str]:
        """What lies about that belongs to nothing."""
        kept = {self.releases.current(), self.releases.previous()}
        if (trial := self.releases.trial()) is not None:
            kept |= {trial.release, trial.origin}
        wanted = {"opt/releases", "opt/current", "opt/previous", "state/boot.json", "state/floor.json"}
        wanted |= {"state/jobs", "state/jobs/journal.json"} | {f"opt/releases/{name}" for name in kept}
        found = {path.relative_to(self.root).as_posix() for path in self.root.glob("*/*")}
        found |= {path.relative_to(self.root).as_posix() for path in self.root.glob("opt/releases/*")}
        found |= {path.relative_to(self.root).as_posix() for path in self.root.glob("state/jobs/**/*")}
        return found - wanted

    def journal(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.state / "jobs/journal.json").read_bytes())
        return document


class Disks:
    """The unit's disk as the model knows it, so that a power cut can take what was not fsynced."""

    def __init__(self, root: Path, plug: Plug) -> None:
        self._root = root
        self._plug = plug
        self._begin()

    def _begin(self) -> None:
        self._plug.calls.clear()
        self._disk = Disk(self._root)

    def lose(self) -> None:
        """All that may be lost is."""
        for call in self._plug.calls:
            self._disk.apply(call)
        tree = next(self._disk.remains(random.Random(0), 2))
        shutil.rmtree(self._root)
        self._root.mkdir()
        materialise(tree, self._root)
        self._begin()


@contextmanager
def plugged(root: Path, monkeypatch: pytest.MonkeyPatch, die: Callable[[], None] | None = None) -> Iterator[Plug]:
    """Every module that changes the disk gets the plug instead of `os`."""
    plug = Plug(root, die)
    with monkeypatch.context() as patch:
        for module in (files, launcher, download):
            patch.setattr(module, "os", plug)
        yield plug
