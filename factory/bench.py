"""The abilities of one slot, and the cloud as the line sees it: small protocols, no implementation.

Nothing above these seams knows whether a board is real, virtual or simulated. `factory.benches` picks the
implementations by URI scheme.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from firmware_agent.wire import Banner
from image.manifest import ImageManifest


class Medium(Protocol):
    """The unit's storage as raw bytes, while it is attached to the station."""

    @property
    def name(self) -> str:
        """What an operator would call it, e.g. `/dev/sdb (SanDisk, 32 GB)`."""
        ...

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        ...

    def discard(self) -> None:
        """Forget everything: afterwards every byte reads as zero."""
        ...

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `offset`."""
        ...

    def flush(self) -> None:
        """Wait until all that was written is on the medium, and forget cached reads."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at byte `offset` from the medium itself, not from a cache, once flushed."""
        ...


class Storage(Protocol):
    """Where the unit's medium is attached to the station."""

    def attach(self) -> AbstractContextManager[Medium]:
        """The medium, exclusively ours until the context ends.

        Raises:
            UserMistake: the target is mounted, the system disk, or not removable.
            StationFault: there is no such medium.
        """
        ...


class Power(Protocol):
    """The unit's supply."""

    def on(self) -> None:
        """Supply the unit; from here its boot counts."""
        ...

    def off(self) -> None:
        """Cut the supply; safe when it is off already."""
        ...


class Console(Protocol):
    """The unit's serial console."""

    def lines(self, seconds: float) -> Iterator[str]:
        """Every line from now on, for at most `seconds`."""
        ...


class Agent(Protocol):
    """An open session with the firmware agent on the unit."""

    def ask(
        self,
        verb: str,
        params: Mapping[str, Any] | None = None,
        *,
        seconds: float = 30.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Ask one verb and wait for its result; events on the way go to `on_event`.

        Raises:
            UnitFault: the agent answered with a fault of the unit.
            LinkFault: no answer within `seconds`, or the link broke.
        """
        ...


class Shell(Protocol):
    """The way into a unit in factory mode."""

    def open(self, banner: Banner) -> AbstractContextManager[Agent]:
        """A session, pinned to the SSH host key that the banner carries.

        Raises:
            UnitFault: the unit shows another host key, or refuses the factory key.
            LinkFault: nobody answers.
        """
        ...

    def closed(self, banner: Banner) -> bool:
        """Whether the way in is shut: nobody answers, or the factory key is refused."""
        ...


class Stimulus(Protocol):
    """Something that moves in front of the PIR."""

    @property
    def settle_seconds(self) -> float:
        """How long the sensor may fire by itself after its supply came; the quiet baseline begins after that."""
        ...

    @property
    def reaction_seconds(self) -> float:
        """How long after `wave` the movement may begin: nothing for a machine, a few seconds for an operator."""
        ...

    def wave(self) -> None:
        """Move once, or have somebody move."""
        ...


@dataclass(frozen=True)
class Bench:
    """One slot: the drivers of everything that is wired to one unit."""

    name: str
    storage: Storage
    power: Power
    console: Console
    shell: Shell
    stimulus: Stimulus


# --- the cloud, as the line sees it -------------------------------------------------------------------------------


class Endpoint(Protocol):
    """Where devices connect."""

    @property
    def host(self) -> str:
        """Host name, also the TLS server name."""
        ...

    @property
    def port(self) -> int:
        """TCP port."""
        ...


class CloudCertificate(Protocol):
    """A certificate as the cloud knows it."""

    @property
    def status(self) -> str:
        """`ACTIVE`, `INACTIVE`, `REVOKED`, `PENDING_ACTIVATION`..."""
        ...


class CloudThing(Protocol):
    """A thing in the registry."""

    @property
    def attributes(self) -> Mapping[str, str]:
        """Its attributes."""
        ...

    @property
    def certificate_ids(self) -> tuple[str, ...]:
        """The certificates attached to it."""
        ...


class CloudDevice(Protocol):
    """What the device's own messages wrote into the fleet's table."""

    @property
    def certificate_id(self) -> str | None:
        """Certificate of the connection that spoke last."""
        ...

    @property
    def boot_id(self) -> str:
        """Boot of its last hello."""
        ...

    @property
    def mode(self) -> str:
        """`factory` or `product`."""
        ...

    @property
    def nonce(self) -> str | None:
        """The station's nonce that the last hello in factory mode carried."""
        ...


class Cloud(Protocol):
    """The fleet's side, seen from the station."""

    def trust_bundle(self) -> str:
        """PEM certificates that the endpoint's server certificate chains to."""
        ...

    def signing_ca_active(self, certificate_pem: str) -> bool:
        """Whether this signing CA is registered and may register devices by itself."""
        ...

    def announce(self, serial: str, certificate_id: str, certificate_pem: str, batch: str) -> None:
        """Tell the fleet's table that the factory issued this certificate to this unit."""
        ...

    def certificate(self, certificate_id: str) -> CloudCertificate | None:
        """The certificate, or None if it never connected."""
        ...

    def thing(self, serial: str) -> CloudThing | None:
        """The thing, or None."""
        ...

    def device(self, serial: str) -> CloudDevice | None:
        """The device's row, or None."""
        ...

    def retire(self, certificate_pem: str, certificate_id: str) -> None:
        """Make sure that this certificate can never connect again, known to the cloud or not."""
        ...

    def diagnose(self, certificate_pem: str) -> str | None:
        """Why a certificate stays pending, in words, or None if nothing looks wrong."""
        ...


@dataclass(frozen=True)
class Unit:
    """One device being made, as the label and the work order name it."""

    serial: str
    batch: str


@dataclass(frozen=True)
class Image:
    """The image that a unit gets: its files, and what the record says of it."""

    name: str
    version: str
    sha256: str
    size: int
    path: Path
    block_map: Path

    @classmethod
    def of(cls, manifest: ImageManifest) -> "Image":
        """The image that a description describes."""
        return cls(
            name=manifest.name,
            version=manifest.version,
            sha256=manifest.image.sha256,
            size=manifest.image.size,
            path=manifest.image_path,
            block_map=manifest.bmap_path,
        )
