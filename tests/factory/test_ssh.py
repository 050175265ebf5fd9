"""The way to the agent over SSH, where the other end is not as it should be."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from factory.drivers.ssh import SshShell
from factory.errors import LinkFault
from firmware_agent.wire import Banner
from image import factory_key


class HangsUp(paramiko.ServerInterface):
    """A board whose power goes as soon as somebody has logged in."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.common.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        self._transport.close()
        return paramiko.common.OPEN_FAILED_CONNECT_FAILED


@pytest.fixture
def board() -> Iterator[tuple[Banner, tuple[str, int]]]:
    """The banner and the address of such a board."""
    host_key = paramiko.ECDSAKey.generate()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            transport = paramiko.Transport(listening.accept()[0])
            transport.add_server_key(host_key)
            transport.start_server(server=HangsUp(transport))
            transport.join(10)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        name = f"{host_key.get_name()} {host_key.get_base64()}"
        yield Banner("1" * 16, ("127.0.0.1",), name, "0.1.0", "picket 0.1.0", "boot"), listening.getsockname()
        thread.join(10)


def test_a_board_that_goes_away_after_the_login_is_a_broken_link(
    board: tuple[Banner, tuple[str, int]], tmp_path: Path
) -> None:
    banner, address = board
    key = factory_key.ensure(tmp_path / "factory")

    with (
        pytest.raises(LinkFault, match=f"link to board {banner.board} broke before the agent answered"),
        SshShell(key, lambda _: address).open(banner),
    ):
        pytest.fail("nobody is there")
