"""A neighbour on the virtual Pi's cable, who tries every port: whole Ethernet frames, past QEMU's address translation.

Frames go out in handfuls, each followed by an ARP request. The board answers it behind all that came before, so
an answer proves that the handful was taken from the cable; what is silent then was silent on purpose.
"""

import ipaddress
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from factory.drivers.virtual_pi import VirtualPi

#: We, and where QEMU's DHCP server puts its first guest.
MAC = bytes.fromhex("020000000099")
HERE, THERE = ipaddress.ip_address("10.0.2.99"), ipaddress.ip_address("10.0.2.15")
HERE_6 = ipaddress.ip_address("fe80::99")

ALL_PORTS = range(1, 65536)
#: What listens on UDP where something does: DNS, DHCP, TFTP, NTP, NetBIOS, SNMP, IKE, syslog, RIP, DHCPv6, SSDP, STUN,
#: IPsec, mDNS, LLMNR, CoAP, WireGuard, and traceroute's.
UDP_PORTS = (53, 67, 68, 69, 123, 137, 138, 161, 500, 514, 520, 546, 547, 1194, 1900, 3478, 4500, 5353, 5355, 5683,
             33434, 51820)  # fmt: skip

_BROADCAST = b"\xff" * 6
_ARP, _IP, _IP_6 = 0x0806, 0x0800, 0x86DD
_ICMP, _TCP, _UDP, _ICMP_6 = 1, 6, 17, 58
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_OUR_PORT = 40999
#: Far fewer than QEMU keeps for a board that is slow to take them (10,000).
_HANDFUL = 1000
_PATIENCE = 60.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass
class Heard:
    """What a board says to whoever knocks, as `tcp 22` or `tcp6 22`: that it is open, or that nobody is there."""

    opened: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)


class Neighbour:
    """On the cable of a tapped virtual Pi that has power, while the context lasts."""

    def __init__(self, pi: VirtualPi) -> None:
        self._to, self._from = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in pi.tap())
        for end, path in zip((self._to, self._from), pi.tap(), strict=True):
            end.connect(str(path))
        self._to.settimeout(_PATIENCE)
        self._rest = b""
        self._board = b""
        self._heard = Heard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._to.close()
        self._from.close()

    def knock(self, tcp: Iterable[int] = ALL_PORTS, udp: Iterable[int] = UDP_PORTS) -> Heard:
        """Try these ports over IPv4 and IPv6, and ping; what came back."""
        self._heard = Heard()
        self._settled()
        there_6 = _link_local(self._board)
        for here, there in ((HERE, THERE), (HERE_6, there_6)):
            self._send_and_settle(self._frames(here, there, tcp, udp))
        time.sleep(1.0)  # for a server that thinks
        self._settled()
        return self._heard

    def _frames(self, here: Address, there: Address, tcp: Iterable[int], udp: Iterable[int]) -> Iterator[bytes]:
        echo = _ICMP if there.version == 4 else _ICMP_6
        kind = 8 if there.version == 4 else 128
        yield self._packet(here, there, echo, struct.pack(">BBHHH", kind, 0, 0, 1, 1), checksum=2)
        for port in tcp:
            segment = struct.pack(">HHIIBBHHH", _OUR_PORT, port, port, 0, 5 << 4, _SYN, 64240, 0, 0)
            yield self._packet(here, there, _TCP, segment, checksum=16)
        for port in udp:
            yield self._packet(here, there, _UDP, struct.pack(">HHHH", _OUR_PORT, port, 8 + 12, 0) + bytes(12), 6)

    def _packet(self, here: Address, there: Address, protocol: int, data: bytes, checksum: int) -> bytes:
        """An Ethernet frame; `checksum` is where the payload's own lies."""
        covered = struct.pack(">II", len(data), protocol) if protocol != _ICMP else b""
        addresses = here.packed + there.packed if protocol != _ICMP else b""
        data = data[:checksum] + struct.pack(">H", _checksum(addresses + covered + data)) + data[checksum + 2 :]
        if there.version == 6:
            header = struct.pack(">IHBB", 6 << 28, len(data), protocol, 64) + here.packed + there.packed
            return self._board + MAC + struct.pack(">H", _IP_6) + header + data
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(data), 1, 0, 64, protocol, 0) + here.packed + there.packed
        header = header[:10] + struct.pack(">H", _checksum(header)) + header[12:]
        return self._board + MAC + struct.pack(">H", _IP) + header + data

    def _send_and_settle(self, frames: Iterable[bytes]) -> None:
        for number, frame in enumerate(frames, 1):
            self._send(frame)
            if number % _HANDFUL == 0:
                self._settled()
        self._settled()

    def _send(self, frame: bytes) -> None:
        frame = frame.ljust(60, b"\0")
        self._to.sendall(struct.pack(">I", len(frame)) + frame)

    def _settled(self) -> None:
        """Until the board has answered an ARP request, and with it has seen all before."""
        give_up = time.monotonic() + _PATIENCE
        while time.monotonic() < give_up:
            request = struct.pack(">HHBBH", 1, _IP, 6, 4, 1) + MAC + HERE.packed + bytes(6) + THERE.packed
            self._send(_BROADCAST + MAC + struct.pack(">H", _ARP) + request)
            if self._answered(time.monotonic() + 2.0):
                return
        raise AssertionError("the board does not answer on its cable")

    def _answered(self, until: float) -> bool:
        while (left := until - time.monotonic()) > 0:
            while (frame := self._next()) is not None:
                if self._take(frame):
                    return True
            self._from.settimeout(left)
            try:
                data = self._from.recv(1 << 20)
            except TimeoutError:
                return False
            assert data, "the board's power was cut"
            self._rest += data
        return False

    def _next(self) -> bytes | None:
        """A frame that has come."""
        end = 4 + int.from_bytes(self._rest[:4], "big")
        if len(self._rest) < max(end, 4):
            return None
        frame, self._rest = self._rest[4:end], self._rest[end:]
        return frame

    def _take(self, frame: bytes) -> bool:
        """Look at a frame; whether it is the board's answer to our ARP request."""
        (kind,) = struct.unpack(">H", frame[12:14])
        body = frame[14:]
        if kind == _ARP and body[14:18] == THERE.packed:
            if body[7] == 2 and body[18:24] == MAC:
                self._board = body[8:14]
                return True
            if body[7] == 1 and body[24:28] == HERE.packed:
                answer = struct.pack(">HHBBH", 1, _IP, 6, 4, 2) + MAC + HERE.packed + body[8:18]
                self._send(body[8:14] + MAC + struct.pack(">H", _ARP) + answer)
        elif kind == _IP and body[16:20] == HERE.packed:
            self._hear(body[9], body[(body[0] & 15) * 4 :], "")
        elif kind == _IP_6 and body[24:40] == HERE_6.packed:
            self._hear(body[6], body[40:], "6")
        elif kind == _IP_6 and body[6] == _ICMP_6 and body[40] == 135 and body[48:64] == HERE_6.packed:
            advert = struct.pack(">BBHI", 136, 0, 0, 0x60000000) + HERE_6.packed + b"\x02\x01" + MAC
            self._advertise(ipaddress.IPv6Address(body[8:24]), advert)
        return False

    def _advertise(self, there: Address, advert: bytes) -> None:
        """Who we are (RFC 4861: only from a neighbour, so with a hop limit of 255)."""
        packet = bytearray(self._packet(HERE_6, there, _ICMP_6, advert, checksum=2))
        packet[14 + 7] = 255
        self._send(bytes(packet))

    def _hear(self, protocol: int, data: bytes, version: str) -> None:
        (port,) = struct.unpack(">H", data[:2])
        if protocol == _TCP and data[13] & (_SYN | _ACK) == _SYN | _ACK:
            self._heard.opened.add(f"tcp{version} {port}")
        elif protocol == _TCP and data[13] & _RST:
            self._heard.refused.add(f"tcp{version} {port}")
        elif protocol == _UDP:
            self._heard.opened.add(f"udp{version} {port}")
        elif protocol in {_ICMP, _ICMP_6} and data[0] in {0, 129}:
            self._heard.opened.add(f"ping{version}")
        elif protocol in {_ICMP, _ICMP_6} and data[0] in {1, 3}:
            self._heard.refused.add(f"icmp{version}")


def knock(pi: VirtualPi) -> Heard:
    """Sit down on a tapped board's cable, try all ports, and get up: the board waits for who does not listen."""
    with Neighbour(pi) as neighbour:
        return neighbour.knock()


def _link_local(mac: bytes) -> ipaddress.IPv6Address:
    """What an interface calls itself (RFC 4291, appendix A)."""
    return ipaddress.IPv6Address(
        b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:6]
    )  # fmt: skip


def _checksum(data: bytes) -> int:
    """RFC 1071, of data whose own checksum is 0."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total) ^ 0xFFFF
