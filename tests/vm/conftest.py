"""What the tests of the built image share: the image, and a virtual Pi that booted it."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from factory.bench import Agent
from factory.drivers.console import SerialConsole
from factory.drivers.ssh import SshShell
from factory.drivers.virtual_pi import VirtualPi
from firmware_agent.wire import Banner, parse_banner
from image.errors import ManifestError
from image.manifest import ImageManifest
from tests.vm.shipping import Fielded

DESCRIPTION = Path("build/image/picket.json")
KEY = Path("build/keys/factory")

#: Generous: other work may go on beside an emulated machine, a second one at least.
BANNER_SECONDS = 240.0
CONNECTED_SECONDS = 600.0


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """The line's own limits are for boards that have a processor of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factory.seal.CONNECTED_SECONDS", CONNECTED_SECONDS)
        yield


@pytest.fixture(scope="session")
def image() -> ImageManifest:
    try:
        return ImageManifest.load(DESCRIPTION)
    except ManifestError as error:
        pytest.fail(f"{error}")


def put_in(image: ImageManifest, board: VirtualPi) -> None:
    """A medium with the image on it."""
    subprocess.run(["cp", "--sparse=always", image.image_path, board.medium], check=True)
    os.truncate(board.medium, board.medium_bytes)


def await_banner(url: str, *, with_address: bool = True) -> Banner:
    """The next banner on a console."""
    said = []
    for line in SerialConsole(lambda: url).lines(BANNER_SECONDS):
        banner = parse_banner(line)
        if banner is not None and (banner.addresses or not with_address):
            return banner
        said.append(line)
    pytest.fail("no banner; the console said:\n" + "\n".join(said[-30:]))


class Booted:
    """A virtual Pi in factory mode."""

    def __init__(self, board: VirtualPi) -> None:
        self.board = board
        self.banner = await_banner(board.console_url())

    def ask(self, verb: str, **params: object) -> dict[str, object]:
        with SshShell(KEY, self.board.ssh_address).open(self.banner) as agent:
            return self._ask(agent, verb, params)

    @staticmethod
    def _ask(agent: Agent, verb: str, params: dict[str, object]) -> dict[str, object]:
        return agent.ask(verb, params, seconds=120)


@pytest.fixture(scope="module")
def pi(image: ImageManifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """One virtual Pi for all tests of a file that leave it as it was; it does not idle through the next file's."""
    with VirtualPi(tmp_path_factory.mktemp("pi"), hosts={"cloud.picket.test": "10.0.2.2"}) as board:
        put_in(image, board)
        board.on()
        yield Booted(board)


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fielded]:
    """A unit in the field for the updates of one file."""
    with Fielded.made(tmp_path_factory.mktemp("site")) as made:
        yield made


def partition(image: ImageManifest, label: str, folder: Path) -> Path:
    """A partition of the image as a file of its own."""
    path = folder / label
    if not path.exists():
        (part,) = (part for part in image.partitions if part.label == label)
        subprocess.run(
            ["dd", f"if={image.image_path}", f"of={path}", "bs=1M", f"skip={part.start >> 20}", "conv=sparse",
             f"count={part.size >> 20}"], check=True, capture_output=True,
        )  # fmt: skip
    return path


@dataclass(frozen=True)
class Entry:
    """A file of the image's root as `ls -ln` shows it; `target` is that of a symbolic link."""

    mode: str
    owner: str
    target: str


class Root:
    """The image's root, read out of its squashfs without mounting it."""

    def __init__(self, image: ImageManifest, folder: Path) -> None:
        self.file = partition(image, "picket-root", folder)
        said = subprocess.run(
            ["unsquashfs", "-lln", "-d", "", self.file], check=True, capture_output=True, text=True
        ).stdout
        self.entries: dict[str, Entry] = {}
        for line in said.splitlines():
            if found := re.fullmatch(r"(\S{10}) (\d+/\d+) +\d.*? \d\d:\d\d (/.*?)(?: -> (.*))?", line):
                self.entries[found[3]] = Entry(found[1], found[2], found[4] or "")

    def read(self, path: str) -> bytes:
        """A file's content."""
        return subprocess.run(["unsquashfs", "-cat", self.file, path], check=True, capture_output=True).stdout

    def text(self, path: str) -> str:
        """... as text."""
        return self.read(path).decode()

    def names(self, path: str) -> set[str]:
        """What is in a directory."""
        inside = f"{path.rstrip('/')}/"
        below = (name.removeprefix(inside) for name in self.entries if name.startswith(inside))
        return {name for name in below if "/" not in name}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("image")


@pytest.fixture(scope="session")
def root(image: ImageManifest, folder: Path) -> Root:
    return Root(image, folder)
