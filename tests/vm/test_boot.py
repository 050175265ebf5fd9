"""The built image on QEMU, as a virtual Pi in factory mode."""

import gzip
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from factory.drivers.ssh import SshShell
from factory.drivers.virtual_pi import VirtualPi
from image.firmware import Started
from image.initramfs import cpio, file
from image.manifest import ImageManifest
from tests.machine import alive
from tests.vm.conftest import BANNER_SECONDS, KEY, Booted, put_in

pytestmark = pytest.mark.vm


def test_the_banner_says_which_board_and_which_image(pi: Booted, image: ImageManifest) -> None:
    assert pi.banner.board == pi.board.serial
    assert pi.banner.image == str(image)
    assert pi.banner.agent == image.agent
    assert pi.banner.host_key.startswith("ssh-ed25519 ")


def test_the_factory_key_opens_the_agent(pi: Booted, image: ImageManifest) -> None:
    identity = pi.ask("identify")

    assert identity["board"] == pi.board.serial
    assert identity["macs"] == {"eth0": pi.board.mac}
    assert identity["image"] == {"name": image.name, "version": image.version}
    assert identity["kernel"] == image.kernel


def test_the_unit_has_a_name_of_its_own(pi: Booted) -> None:
    status = pi.ask("status")["status"]

    assert isinstance(status, dict)
    assert re.fullmatch(r"picket-[0-9a-f]{4}", status["host"])


def test_the_tpm_is_found_and_becomes_the_units_key_store(pi: Booted) -> None:
    identity = pi.ask("identify")

    assert identity["tpm"]["present"] is True  # type: ignore[index]
    assert re.fullmatch(r"[0-9a-f]{64}", identity["tpm"]["ek_sha256"])  # type: ignore[index]
    assert identity["key_store"] == "tpm"


def test_the_tpm_makes_one_key(pi: Booted) -> None:
    first, again = pi.ask("enrol", serial="PKT-VM-1"), pi.ask("enrol", serial="PKT-VM-1")

    assert first["key"] == again["key"] == "tpm"


def test_the_pir_arrives_as_edges(pi: Booted) -> None:
    seen: list[object] = []
    armed = threading.Event()

    def on_event(event: dict[str, object]) -> None:
        seen.append(event.get("edge", "armed"))
        armed.set()

    def wave() -> None:
        armed.wait(60)
        pi.board.drive_pir(high=True)
        time.sleep(0.5)
        pi.board.drive_pir(high=False)

    hand = threading.Thread(target=wave)
    hand.start()
    with SshShell(KEY, pi.board.ssh_address).open(pi.banner) as agent:
        result = agent.ask("watch-pir", {"seconds": 60, "until": "falling"}, seconds=120, on_event=on_event)
    hand.join()

    assert seen == ["armed", "rising", "falling"]
    assert result == {"edges": 2, "level": 0}


def transport(pi: Booted) -> paramiko.Transport:
    connection = paramiko.Transport(socket.create_connection(pi.board.ssh_address(), 30))
    connection.start_client(timeout=60)
    return connection


def test_no_other_key_opens_it(pi: Booted) -> None:
    other = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    connection = transport(pi)
    with pytest.raises(paramiko.AuthenticationException):
        connection.auth_publickey("picket", paramiko.Ed25519Key.from_private_key(io.StringIO(other.decode())))
    connection.close()


@pytest.mark.parametrize("user", ["picket", "root"])
def test_no_password_is_even_asked_for(pi: Booted, user: str) -> None:
    connection = transport(pi)
    with pytest.raises(paramiko.BadAuthenticationType) as refused:
        connection.auth_password(user, "raspberry")
    connection.close()

    assert refused.value.allowed_types == ["publickey"]


def test_the_key_opens_no_shell_and_no_tunnel(pi: Booted) -> None:
    connection = transport(pi)
    connection.auth_publickey("picket", paramiko.Ed25519Key.from_private_key_file(str(KEY)))
    with pytest.raises(paramiko.ChannelException):
        connection.open_channel("direct-tcpip", ("127.0.0.1", 22), ("127.0.0.1", 1), timeout=60)
    channel = connection.open_session(timeout=60)
    channel.exec_command("id; cat /etc/shadow")
    channel.sendall(b'{"id":1,"verb":"identify","params":{}}\n')
    channel.settimeout(120)
    answer = channel.makefile("r").readline()
    connection.close()

    assert '"board"' in str(answer)


def test_a_power_cut_keeps_who_the_unit_is(image: ImageManifest, tmp_path: Path) -> None:
    with VirtualPi(tmp_path, tpm=False) as board:
        put_in(image, board)
        board.on()
        first = Booted(board)
        assert first.ask("identify")["key_store"] == "file"
        key = public_key(first.ask("enrol", serial="PKT-VM-2")["csr"])
        board.cycle()
        again = Booted(board)

        assert public_key(again.ask("enrol", serial="PKT-VM-2")["csr"]) == key
        assert again.banner.board == first.banner.board
        assert again.banner.boot_id != first.banner.boot_id


def public_key(csr: object) -> bytes:
    loaded = x509.load_pem_x509_csr(str(csr).encode())
    return loaded.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_an_empty_medium_does_not_boot_and_says_so(tmp_path: Path) -> None:
    with VirtualPi(tmp_path) as board:
        board.medium.write_bytes(bytes(2**20))

        board.on()

        assert board.powered
        assert not board.running
    assert b"no bootable medium" in (tmp_path / "console.log").read_bytes()


def test_a_station_that_is_killed_leaves_nothing_running(image: ImageManifest, tmp_path: Path) -> None:
    with VirtualPi(tmp_path / "board") as board:
        put_in(image, board)
    code = (
        "import sys, time; from pathlib import Path; from factory.drivers.virtual_pi import VirtualPi\n"
        "board = VirtualPi(Path(sys.argv[1])); board.on(); print(*board.child_pids, flush=True); time.sleep(600)"
    )
    station = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "board")], stdout=subprocess.PIPE, text=True)
    assert station.stdout is not None
    children = [int(word) for word in station.stdout.readline().split()]
    assert len(children) == 2

    station.send_signal(signal.SIGKILL)
    station.wait()
    station.stdout.close()

    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "QEMU or swtpm outlived the station"
        time.sleep(0.1)


#: Ends the kernel when systemd has fed the watchdog for a while. By then nothing of the initramfs is left but what is
#: open.
DIES = r"""
$b mkfifo /never
exec 7<>/never 9>/proc/sysrq-trigger
(
	cd /sys
	until [ -e class/watchdog/watchdog0 ]; do
		read -r -t 2 nothing <&7
	done
	read -r -t 30 nothing <&7
	echo c >&9
) 2>/dev/null &
exec 7>&- 9>&-
"""
MOVE = "$b mount --move /dev /root/dev"


class Hanging(VirtualPi):
    """A board whose kernel dies when it is up, and is left as it is by everybody but the watchdog."""

    def _command_line(self, started: Started) -> str:
        return f"{super()._command_line(started)} panic=0"

    def _start(self, started: Started) -> None:
        assert started.initramfs is not None
        init = Path("image/init").read_text().replace(MOVE, f"{DIES}{MOVE}")
        assert DIES in init
        packed = started.initramfs.read_bytes()
        longer = started.initramfs.with_name("longer.img")
        own = gzip.compress(cpio([file("init", init.encode(), executable=True)]))
        longer.write_bytes(packed.ljust(-(-len(packed) // 4) * 4, b"\0") + own)
        super()._start(replace(started, initramfs=longer))


def test_a_board_that_hangs_is_reset_by_its_watchdog(image: ImageManifest, tmp_path: Path) -> None:
    with Hanging(tmp_path, tpm=False) as board:
        put_in(image, board)
        board.on()
        deadline = time.monotonic() + 2 * BANNER_SECONDS
        while not board.reboots:
            assert time.monotonic() < deadline, "nobody reset the board"
            time.sleep(1)

    assert "Kernel panic" in (tmp_path / "console.log").read_text(errors="replace")
    assert "Rebooting in" not in (tmp_path / "console.log").read_text(errors="replace")
