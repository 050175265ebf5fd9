"""A small factory for measurements: a local cloud of its own, an authority, bench files.

The local cloud has AWS's delay in just-in-time provisioning (one to three seconds), so a unit takes as long as it will.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import station
from bench.bare import BareDevice, make_device
from bench.figures import NotMeasuredError
from cloud.local import launcher
from cloud.local.endpoint import LocalEndpoint
from cloud.registry import Registry
from cloud.target import local_target
from factory import authority
from factory.authority import CertificateAuthority
from factory.benches import load_bench_file
from factory.record import RunView

BATCH = "WO-0001"

_BENCH = """\
name = {name}
station = "bench"
product = "Picket motion alarm"
batch = "{batch}"
image = {image}
records = {records}
labels = {labels}
factory_key = {key}
[board]
uri = {board}
[authority]
directory = {authority}
passphrase_file = {passphrase}
[cloud]
target = "local"
state = {cloud}
guest = {guest}
"""


class UnitFailedError(Exception):
    """A unit did not pass, so there is nothing to time."""


@dataclass(frozen=True)
class Shop:
    """The factory. Units are made one at a time."""

    folder: Path
    bench: Path
    cloud: LocalEndpoint
    registry: Registry
    signing: CertificateAuthority

    @contextmanager
    def unit(self, serial: str) -> Iterator[tuple[station.Station, RunView]]:
        """A unit that has just passed, with its bench still open: sealed, connected, in product mode.

        Raises:
            UnitFailedError: it did not pass.
        """
        with station.Station.opened(self.bench, serial) as opened:
            opened.run(as_json=False)
            last = opened.records.runs(serial)[-1]
            if last.outcome != "pass":
                raise UnitFailedError(f"{serial} ended with {last.outcome}: {last.reason}")
            yield opened, last

    def bare_device(self, serial: str) -> BareDevice:
        """A device without an agent, that the cloud has not seen yet."""
        folder = self.folder / "bare" / serial
        return make_device(serial, BATCH, self.signing, self.registry, self.registry.endpoint(), folder)


@contextmanager
def open_shop(folder: Path, scheme: str, *, image: Path | None = None, key: Path | None = None) -> Iterator[Shop]:
    """Set a factory up for boards of a kind, and tear its cloud down.

    Args:
        folder: where all of it lives.
        scheme: `simulated` or `virtual`.
        image: description of the image; the simulated board's is made here.
        key: the factory's SSH key that the image knows; made here where no image comes from outside.

    Raises:
        NotMeasuredError: the factory's key is not there.
    """
    if key is not None and not key.exists():
        raise NotMeasuredError(f"the factory key {key} of the image is not here; `make image` makes both")
    places = {
        "name": f"bench-{folder.name}",
        "image": image or folder / "image" / "picket-sample.json",
        "records": f"sqlite:///{folder}/records.db",
        "labels": folder / "labels",
        "key": key or folder / "keys" / "factory",
        "board": f"{scheme}:{folder}/boards/{{serial}}",
        "authority": folder / "ca",
        "passphrase": folder / "ca.passphrase",
        "cloud": folder / "cloud",
    }
    path = folder / "bench.toml"
    quoted = {name: json.dumps(str(place)) for name, place in places.items()}
    path.write_text(_BENCH.format(**quoted, batch=BATCH, guest=str(scheme == "virtual").lower()))
    file = load_bench_file(path)
    with _silent_station(), launcher.running(file.cloud.state) as endpoint:
        station.prepare(file)
        passphrase = station.read_passphrase(file.authority.passphrase_file)
        signing = authority.load_signing(file.authority.directory, passphrase)
        yield Shop(folder, path, endpoint, Registry(local_target(file.cloud.state)), signing)


@contextmanager
def _silent_station() -> Iterator[None]:
    """What the station says on its screen is not what is wanted here."""
    before, station.out.file = station.out.file, io.StringIO()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        station.out.file = before
