"""What the tests of the built image share: the image, and a virtual Pi that booted it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from factory.bench import Agent
from factory.drivers.console import SerialConsole
from factory.drivers.ssh import SshShell
from factory.drivers.virtual_pi import VirtualPi
from firmware_agent.wire import Banner, parse_banner
from image.errors import ManifestError
from image.manifest import ImageManifest

DESCRIPTION = Path("build/image/picket.json")
KEY = Path("build/keys/factory")

#: Generous: other work may go on beside an emulated machine.
BANNER_SECONDS = 240.0


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


@pytest.fixture(scope="session")
def pi(image: ImageManifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """One virtual Pi for all tests that leave it as they found it."""
    with VirtualPi(tmp_path_factory.mktemp("pi"), hosts={"cloud.picket.test": "10.0.2.2"}) as board:
        put_in(image, board)
        board.on()
        yield Booted(board)


def debugfs(image: ImageManifest, folder: Path, request: str) -> str:
    """Ask debugfs about the image's root file system."""
    root = folder / "root.ext4"
    if not root.exists():
        part = image.partitions[1]
        subprocess.run(
            ["dd", f"if={image.image_path}", f"of={root}", "bs=1M", f"skip={part.start >> 20}", "conv=sparse",
             f"count={part.size >> 20}"], check=True, capture_output=True,
        )  # fmt: skip
    done = subprocess.run(["/usr/sbin/debugfs", "-R", request, root], check=True, capture_output=True, text=True)
    return done.stdout
