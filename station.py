#!/usr/bin/env python3
"""The station's command line: the only file that reads its arguments and sets its exit codes.

    0  the unit passed        1  the unit failed        2  a mistake in the command        3  the station is at fault
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

import cloud.errors
from cloud.local import launcher
from cloud.registry import Registry
from cloud.target import Target
from factory import authority
from factory.authority import CertificateAuthority
from factory.bench import Bench, Image, Unit
from factory.benches import BenchFile, load_bench_file, open_bench
from factory.connect import wait_until
from factory.errors import CloudFault, ExitCode, FactoryError, StationFault, UserMistake
from factory.files import write_whole
from factory.limits import load_limits
from factory.line import Made, Product, produce
from factory.record import Journal, NoWatcher, Outcome, Records, RunFacts, Watcher, open_run, refuse_passed
from factory.screen import JsonLines, LiveTable, record_json, run_table
from firmware_agent.topics import valid_serial
from image.manifest import ImageManifest, ManifestError

P = ParamSpec("P")

app = typer.Typer(
    help="Picket's factory station: takes blank Raspberry Pis to sealed, certificate-bearing products.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
ca_app = typer.Typer(no_args_is_help=True, help="The line's own certificate authority.")
cloud_app = typer.Typer(no_args_is_help=True, help="What the line needs of the cloud.")
app.add_typer(ca_app, name="ca")
app.add_typer(cloud_app, name="cloud")

out = Console()
err = Console(stderr=True)

BenchOption = Annotated[Path, typer.Option("--bench", help="The bench file, e.g. benches/virtual.toml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Speak JSON, for scripts.")]


def command(function: Callable[P, ExitCode]) -> Callable[P, None]:
    """Turn what a command returns or raises into an exit code: the one place where that is done."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = function(*args, **kwargs)
        except FactoryError as error:
            complain(str(error), error.advice)
            code = error.exit_code
        except cloud.errors.CloudError as error:
            complain(str(error), "")
            code = ExitCode.STATION_FAULT
        except KeyboardInterrupt:
            complain("stopped by the operator", "Run the unit again: the line starts it over.")
            code = ExitCode.ABORTED
        raise typer.Exit(code)

    return wrapped


def complain(message: str, advice: str) -> None:
    """Say what happened and what to do next, on stderr."""
    text = Text(message)
    if advice:
        text.append(f"\nNext: {advice}", style="italic")
    err.print(Panel(text, border_style="red", title="stopped", title_align="left"))


# --- run ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  ./station.py run --bench benches/virtual.toml --serial PK-000001")
@command
def run(
    bench: BenchOption,
    serial: Annotated[str, typer.Option(help="The unit's serial, from its label.")],
    as_json: JsonOption = False,
    rework: Annotated[bool, typer.Option(help="Make a unit again that has already passed.")] = False,
) -> ExitCode:
    """Take one unit through the line."""
    with Station.opened(bench) as station:
        attempt = station.run(serial, rework=rework, as_json=as_json)
    return attempt.code


@app.command(epilog="Example:  ./station.py record PK-000001 --bench benches/virtual.toml")
@command
def record(
    serial: Annotated[str, typer.Argument(help="The unit's serial.")],
    bench: BenchOption = Path("benches/simulated.toml"),
    as_json: JsonOption = False,
) -> ExitCode:
    """Show everything that happened to a unit."""
    records = Records(load_bench_file(bench).records)
    runs = records.runs(checked_serial(serial))
    if not runs:
        known = records.serials()
        raise UserMistake(
            f"no unit {serial} is on record",
            advice=f"The latest is {known[-1]}." if known else "No unit was ever made with these records.",
        )
    if as_json:
        print(record_json(runs))
    else:
        for one in runs:
            out.print(run_table(one))
    return ExitCode.PASS


# --- authority and cloud --------------------------------------------------------------------------------------------


@ca_app.command("init", epilog="Example:  ./station.py ca init --directory ca --passphrase-file ca.pass")
@command
def ca_init(
    directory: Annotated[Path, typer.Option(help="Where root and signing CA go.")],
    passphrase_file: Annotated[Path, typer.Option(help="File with the passphrase that encrypts both keys.")],
) -> ExitCode:
    """Make a root CA and a signing CA below it, keys encrypted."""
    signing = authority.create_authority(directory, read_passphrase(passphrase_file))
    out.print(f"Made a root and a signing CA in {directory}.")
    out.print(f"The signing CA is valid until {signing.certificate.not_valid_after_utc:%Y-%m-%d}.")
    out.print("Next: take root.key off the station and lock it away; then ./station.py cloud register")
    return ExitCode.PASS


@cloud_app.command("register", epilog="Example:  ./station.py cloud register --bench benches/virtual.toml")
@command
def cloud_register(bench: BenchOption) -> ExitCode:
    """Register the signing CA with the cloud, so that its devices are provisioned just in time."""
    file = load_bench_file(bench)
    signing = authority.load_signing(file.authority.directory, read_passphrase(file.authority.passphrase_file))
    identifier = register(registry_of(file), signing)
    out.print(f"The signing CA is registered with the {file.cloud.target} cloud as {identifier}.")
    return ExitCode.PASS


def register(registry: Registry, signing: CertificateAuthority) -> str:
    """Register the signing CA; the same call again changes nothing."""
    return registry.register_signing_ca(
        signing.pem, lambda code: authority.to_pem(authority.make_verification(signing, code))
    )


def read_passphrase(path: Path) -> bytes:
    """The passphrase in a file, without its line end.

    Raises:
        UserMistake: there is no such file, or others can read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise UserMistake(f"the passphrase file {path} can be read by others", advice=f"chmod 600 {path}")
        return path.read_bytes().rstrip(b"\r\n")
    except FileNotFoundError as error:
        raise UserMistake(f"there is no passphrase file {path}") from error
    except OSError as error:
        raise UserMistake(f"the passphrase file {path} cannot be read: {error.strerror}") from error


def registry_of(file: BenchFile) -> Registry:
    """The cloud of a bench file."""
    target = Target.aws() if file.cloud.target == "aws" else Target.local(file.cloud.state)
    return Registry(target, endpoint=file.cloud.endpoint)


# --- the station ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """How a run ended."""

    code: ExitCode
    made: Made | None


@dataclass(frozen=True)
class Station:
    """Everything that a run needs, opened and checked before a unit is touched."""

    file: BenchFile
    bench: Bench
    product: Product
    image: Image
    signing: CertificateAuthority
    registry: Registry
    records: Records

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Station]:
        """Open the station of a bench file, and fail at once for what would fail every unit.

        Raises:
            UserMistake: the bench file or the passphrase is wrong.
            StationFault: image, signing CA, cloud or a driver is not ready.
        """
        file = load_bench_file(path)
        product = Product(file.product, load_limits(), file.labels)
        image = load_image(file.image)
        signing = authority.load_signing(file.authority.directory, read_passphrase(file.authority.passphrase_file))
        registry = registry_of(file)
        with translated():
            if not registry.signing_ca_active(signing.pem):
                raise CloudFault(
                    "the signing CA is not registered with the cloud",
                    advice=f"./station.py cloud register --bench {path}",
                )
        if file.records.startswith("sqlite:///"):
            Path(file.records.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        records = Records(file.records)
        with open_bench(file) as bench:
            yield cls(file, bench, product, image, signing, registry, records)
        records.close()

    def run(self, serial: str, *, rework: bool, as_json: bool) -> Attempt:
        """Take one unit through the line, shown as it happens."""
        unit = Unit(checked_serial(serial), self.file.batch)
        if not rework:
            refuse_passed(self.records, unit.serial)
        facts = RunFacts(
            serial=unit.serial,
            batch=unit.batch,
            station=self.file.station,
            bench=self.file.name,
            image=f"{self.image.name} {self.image.version}",
            image_sha256=self.image.sha256,
            code_version=code_version(),
        )
        watcher, shown = self._watcher(unit, as_json=as_json)
        code, made = ExitCode.PASS, None
        with shown:
            try:
                with open_run(self.records, facts, watcher) as journal, translated():
                    made = self._produce(unit, journal)
            except FactoryError as error:
                code = error.exit_code
        last = self.records.runs(unit.serial)[-1]
        if as_json:
            print(json.dumps({"serial": unit.serial, "outcome": last.outcome, "reason": last.reason, "run": last.id}))
        else:
            out.print(run_table(last))
        return Attempt(code, made)

    def _produce(self, unit: Unit, journal: Journal) -> Made:
        return produce(unit, self.product, self.image, self.bench, self.signing, self.registry, journal)

    def _watcher(self, unit: Unit, *, as_json: bool) -> tuple[Watcher, AbstractContextManager[object]]:
        if as_json:
            return JsonLines(), nullcontext()
        if not out.is_terminal:
            return NoWatcher(), nullcontext()
        table = LiveTable(out, f"{unit.serial} on bench {self.bench.name}")
        return table, table.shown()


@contextmanager
def translated() -> Iterator[None]:
    """Errors of the cloud, as errors of the line."""
    try:
        yield
    except cloud.errors.CloudError as error:
        raise CloudFault(str(error), advice="Mend the cloud, then run the unit again.") from error


def load_image(description: Path) -> Image:
    """The image that a description names.

    Raises:
        StationFault: it is missing, or its files are not what it says.
    """
    try:
        manifest = ImageManifest.load(description)
        manifest.verify_files(description.parent)
    except ManifestError as error:
        raise StationFault(str(error), advice="Build the image again: make image") from error
    return Image(
        name=manifest.name,
        version=manifest.version,
        sha256=manifest.sha256,
        size=manifest.size,
        path=description.parent / manifest.image,
        block_map=description.parent / manifest.bmap,
    )


def checked_serial(text: str) -> str:
    """A serial, or the user's mistake."""
    if not valid_serial(text):
        raise UserMistake(
            f"{text!r} is no serial",
            advice="A serial is 4 to 32 of A-Z, 0-9 and inner hyphens, e.g. PK-000001. Scan the label again.",
        )
    return text


def code_version() -> str:
    """The version of this code: the commit where there is one, with + if it was changed since."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def stop_on_signals() -> None:
    """Let SIGTERM end a run as Ctrl-C does, so that it is closed in the record and the unit's power is cut."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    os.chdir(Path(__file__).parent) if not Path("benches").exists() else None
    stop_on_signals()
    app()
