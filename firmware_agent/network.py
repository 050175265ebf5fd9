"""The network, as the kernel tells it: what is open, who is connected, how much went through.

Only the standard library is imported: `picket-agent status` asks here, whether the agent runs or not.
"""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: The kernel's tables.
TABLES: Final = Path("/proc/net")

# States in /proc/net/tcp and udp (include/net/tcp_states.h).
_ESTABLISHED: Final = "01"
_UNCONNECTED: Final = "07"
_LISTEN: Final = "0A"


@dataclass(frozen=True)
class Traffic:
    """What went through all interfaces but the loop, since they came up."""

    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int

    def since(self, before: "Traffic") -> "Traffic | None":
        """The difference; None when a counter has begun anew."""
        parts = [new - old for new, old in zip(vars(self).values(), vars(before).values(), strict=True)]
        return None if min(parts) < 0 else Traffic(*parts)


@dataclass(frozen=True)
class Network:
    """What is open.

    Attributes:
        tcp, udp: ports that somebody may reach.
        connections: local port and remote address with port, of established TCP connections.
        traffic: None when the kernel does not tell.
    """

    tcp: tuple[int, ...] = ()
    udp: tuple[int, ...] = ()
    connections: tuple[tuple[int, str], ...] = ()
    traffic: Traffic | None = None


def network(net: Path = TABLES) -> Network:
    """What is open now."""
    sockets = [*_sockets(net / "tcp"), *_sockets(net / "tcp6")]
    datagrams = [*_sockets(net / "udp"), *_sockets(net / "udp6")]
    return Network(
        tcp=tuple(sorted({port for _, port, _, state in sockets if state == _LISTEN})),
        udp=tuple(sorted({port for _, port, _, state in datagrams if state == _UNCONNECTED})),
        connections=tuple((port, remote) for _, port, remote, state in sockets if state == _ESTABLISHED),
        traffic=_traffic(net / "dev"),
    )


def listening(net: Path = TABLES) -> list[str]:
    """Sockets that something on the network could reach, as `ss -tulw` has them: `tcp 0.0.0.0:22`, `raw :::58`.

    A packet filter may still stand before them. What is bound to the loop is left out.
    """
    return sorted(set(_open_to_others(net)))


def _open_to_others(net: Path) -> Iterator[str]:
    for kind, open_state in (("tcp", _LISTEN), ("udp", _UNCONNECTED), ("raw", _UNCONNECTED)):
        for table in (kind, f"{kind}6"):
            for address, port, _, state in _sockets(net / table):
                if state == open_state and not ipaddress.ip_address(address).is_loopback:
                    yield f"{kind} {address}:{port}"


def _sockets(table: Path) -> list[tuple[str, int, str, str]]:
    """Local address and port, remote address with port, and state, of each socket."""
    found = []
    for line in _lines(table)[1:]:
        words = line.split()
        try:
            local, remote, state = words[1:4]
            address, port = _address(local)
            there, its_port = _address(remote)
        except (ValueError, IndexError):
            continue
        host = f"[{there}]" if ":" in there else there
        found.append((address, port, f"{host}:{its_port}", state))
    return found


def _address(text: str) -> tuple[str, int]:
    """`0100007F:1F90`: 32-bit words in the machine's order, which is little-endian on every Pi."""
    words, port = text.split(":")
    raw = bytes.fromhex(words)
    packed = b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4))
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address), int(port, 16)


def _traffic(table: Path) -> Traffic | None:
    sums = [0, 0, 0, 0]
    seen = False
    for line in _lines(table)[2:]:
        name, _, rest = line.partition(":")
        columns = rest.split()
        if name.strip() == "lo" or len(columns) < 10:
            continue
        seen = True
        for index, column in enumerate((0, 8, 1, 9)):  # bytes in and out, packets in and out
            sums[index] += int(columns[column])
    return Traffic(*sums) if seen else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
