#!/usr/bin/env python3
"""The station's command line: the only file that reads its arguments and sets its exit codes.

Exit codes: 0 the unit passed, 1 the unit failed, 2 a mistake in the command, 3 the station is at fault, 130 stopped.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from sqlalchemy.exc import DBAPIError

import cloud.errors
from cloud import stack
from cloud.local import launcher
from cloud.local.endpoint import LocalEndpoint
from cloud.registry import Registry
from cloud.showcase import Alarm, Build, Powered, SecondAct, Updates, raise_alarm
from cloud.target import local_target, open_target
from factory import authority
from factory.authority import CertificateAuthority
from factory.bench import Bench, Image, Unit
from factory.benches import BenchFile, load_bench_file, open_bench
from factory.drivers.blockdev import BlockStorage
from factory.errors import CloudFault, ExitCode, FactoryError, StationFault, UserMistake
from factory.files import write_whole
from factory.limits import load_limits
from factory.line import Made, Product, produce
from factory.record import Journal, NoWatcher, Records, RunFacts, Watcher, open_run, refuse_passed
from factory.screen import JsonLines, LiveTable, record_json, run_table
from firmware_agent.topics import valid_serial
from image import authorisation, factory_key, sample, signing, tryout
from image.errors import ImageError, ManifestError, MediumError, SigningError, ToolMissingError
from image.manifest import ImageManifest

P = ParamSpec("P")

app = typer.Typer(
    help="Picket's factory station: takes blank Raspberry Pis to sealed, certificate-bearing products.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
ca_app = typer.Typer(no_args_is_help=True, help="The line's own certificate authority.")
cloud_app = typer.Typer(no_args_is_help=True, help="What the line needs of the cloud.")
app.add_typer(ca_app, name="ca")
app.add_typer(cloud_app, name="cloud")

#: What `make image` builds.
DESCRIPTION = Path("build/image/picket.json")

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
        except DBAPIError as error:
            complain(f"the records cannot be read or written: {error.orig}", "Check the disk that they are on.")
            code = ExitCode.STATION_FAULT
        except OSError as error:
            complain(str(error), "Check the disk and the permissions there.")
            code = ExitCode.STATION_FAULT
        except KeyboardInterrupt:
            complain("stopped by the operator", "Run the unit again: the line starts it over.")
            code = ExitCode.ABORTED
        except Exception:  # noqa: BLE001  (a defect of ours must not pass for a bad unit)
            err.print_exception()
            complain("this is a defect of the station's program", "Report it with the text above.")
            code = ExitCode.STATION_FAULT
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
    with Station.opened(bench, serial, rework=rework) as station:
        attempt = station.run(as_json=as_json)
    return attempt.code


@app.command(epilog="Example:  ./station.py record PK-000001 --bench benches/virtual.toml")
@command
def record(
    serial: Annotated[str, typer.Argument(help="The unit's serial.")],
    bench: BenchOption = Path("benches/simulated.toml"),
    as_json: JsonOption = False,
) -> ExitCode:
    """Show everything that happened to a unit."""
    with closing(open_records(load_bench_file(bench))) as records:
        runs, known = records.runs(checked_serial(serial)), records.serials()
    if not runs:
        raise UserMistake(
            f"no unit {serial} is on record",
            advice=f"The latest is {known[-1]}." if known else "No unit was ever made with these records.",
        )
    if as_json:
        print(record_json(runs))  # noqa: T201  (plain, for scripts)
    else:
        for one in runs:
            out.print(run_table(one))
    return ExitCode.PASS


@app.command(
    epilog="Example:  ./station.py authorise --board 10000000abcdef01 --medium /dev/disk/by-path/... "
    "--signing-key file:build/keys/image"
)
@command
def authorise(
    board: Annotated[str, typer.Option(help="The board's serial, from its banner or record: 16 hex digits.")],
    medium: Annotated[Path, typer.Option(help="The unit's medium in a card reader, or a raw image of it.")],
    signing_key: Annotated[str, typer.Option(help="The key that the unit's image knows: file:PATH or pkcs11:...")],
    image: Annotated[Path, typer.Option(help="Description of the image that the unit runs.")] = DESCRIPTION,
    days: Annotated[int, typer.Option(min=1, max=90, help="How long it may take until the unit starts with it.")] = 7,
    medium_again: Annotated[
        Path | None, typer.Option(help="The medium once more, where it is a disk that does not look removable.")
    ] = None,
) -> ExitCode:
    """Let one sealed unit start in factory mode, once: its next start, with this medium."""
    if not re.fullmatch("[0-9a-f]{16}", board):
        raise UserMistake(f"{board!r} is no board's serial", advice="It has 16 of 0-9 and a-f; the record shows it.")
    if medium_again not in {None, medium}:
        raise UserMistake(
            f"--medium-again is {medium_again}, but --medium is {medium}",
            advice="Write the same text twice, or leave --medium-again out.",
        )
    if medium.is_block_device():
        again = f"--medium-again {medium}"
        BlockStorage(str(medium), named_again=medium_again is not None, how_again=again).check()
    try:
        described, signer = ImageManifest.load(image), signing.open_signer(signing_key)
        authorisation.check_key(signer, described)
        content = authorisation.compose(described.name, board, int(time.time()), days, signer)
        authorisation.put_on(medium, content, described)
    except ImageError as error:
        raise not_authorised(error) from error
    out.print(f"The medium now authorises the board {board} to start in factory mode, once, within {days} days.")
    out.print("Next: put it back and switch the unit on. Its start after that one is in product mode again.")
    return ExitCode.PASS


def not_authorised(error: ImageError) -> FactoryError:
    """Who must act where no authorisation came about, and how."""
    said = f"no authorisation was written: {error}"
    match error:
        case SigningError():
            return UserMistake(said, advice="Name the key that signed the unit's image, as file:PATH or pkcs11:...")
        case ManifestError():
            return UserMistake(said, advice="Name by --image the description (JSON) of the image that the unit runs.")
        case MediumError():
            advice = "Name the whole disk in the reader, or a raw image of all of it (not packed), and its --image."
            return UserMistake(said, advice=advice)
        case ToolMissingError():
            return StationFault(said, advice="Install what is missing, then say it again.")
        case _:
            advice = "Try another reader. If it says the same, the medium is damaged: make the unit again on a new one."
            return StationFault(said, advice=advice)


# --- authority and cloud --------------------------------------------------------------------------------------------


@ca_app.command("init", epilog="Example:  ./station.py ca init --directory ca --passphrase-file ca.pass")
@command
def ca_init(
    directory: Annotated[Path, typer.Option(help="Where root and signing CA go.")],
    passphrase_file: Annotated[Path, typer.Option(help="File with the passphrase that encrypts both keys.")],
) -> ExitCode:
    """Make a root CA and a signing CA below it, keys encrypted."""
    signing = authority.create_authority(directory, read_passphrase(passphrase_file))
    out.print(f"Made a root and a signing CA in {directory}.", markup=False)
    out.print(f"The signing CA is valid until {signing.certificate.not_valid_after_utc:%Y-%m-%d}.")
    out.print("Next: take root.key off the station and lock it away; then ./station.py cloud register --bench ...")
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
        raise UserMistake(
            f"there is no passphrase file {path}",
            advice=f"Make one, for your eyes only: (umask 077; openssl rand -base64 24 > {path})",
        ) from error
    except OSError as error:
        raise UserMistake(f"the passphrase file {path} cannot be read: {error.strerror}") from error


def registry_of(file: BenchFile) -> Registry:
    """The cloud of a bench file."""
    return Registry(open_target(file.cloud.target, file.cloud.state))


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
    unit: Unit
    bench: Bench
    product: Product
    image: Image
    signing: CertificateAuthority
    registry: Registry
    records: Records

    @classmethod
    @contextmanager
    def opened(cls, path: Path, serial: str, *, rework: bool = False, slot: str = "") -> Iterator[Station]:
        """Open the station of a bench file for one unit, and fail at once for what would fail every unit.

        Args:
            path: the bench file.
            serial: the unit's.
            rework: make it again although it has passed.
            slot: another slot of the same bench, so that two units can be on it at once.

        Raises:
            UserMistake: the bench file or the passphrase is wrong, or the unit has passed and is not to be reworked.
            StationFault: image, signing CA, cloud, factory key, a folder or a driver is not ready.
        """
        file = load_bench_file(path)
        file = replace(file, name=f"{file.name}{slot}")
        unit = Unit(checked_serial(serial), file.batch)
        if not rework:
            with closing(open_records(file)) as records:
                refuse_passed(records, unit.serial)
        make_folder(file.labels, "labels")
        check_factory_key(file.factory_key)
        image = load_image(file.image)
        signing = authority.load_signing(file.authority.directory, read_passphrase(file.authority.passphrase_file))
        registry = registry_of(file)
        with translated():
            if not registry.signing_ca_active(signing.pem):
                raise CloudFault(
                    "the signing CA is not registered with the cloud",
                    advice=f"./station.py cloud register --bench {path}",
                )
            endpoint = registry.guest_endpoint() if file.cloud.guest else registry.endpoint()
        product = Product(file.product, load_limits(), file.labels, endpoint)
        with closing(open_records(file)) as records, open_bench(file, unit.serial, endpoint.host) as bench:
            yield cls(file, unit, bench, product, image, signing, registry, records)

    def run(self, *, as_json: bool) -> Attempt:
        """Take the unit through the line, shown as it happens."""
        unit = self.unit
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
            except BaseException:
                self._tell_end(as_json=as_json)
                raise
        self._tell_end(as_json=as_json)
        return Attempt(code, made)

    def _tell_end(self, *, as_json: bool) -> None:
        last = self.records.runs(self.unit.serial)[-1]
        if as_json:
            ended = {"serial": last.serial, "outcome": last.outcome, "reason": last.reason, "run": last.id}
            print(json.dumps(ended), flush=True)  # noqa: T201  (plain, for scripts)
        else:
            out.print(run_table(last))

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


def open_records(file: BenchFile) -> Records:
    """The records of a bench file, made when they are not there."""
    if file.records.startswith("sqlite:///"):
        make_folder(Path(file.records.removeprefix("sqlite:///")).parent, "records")
    return Records(file.records)


def make_folder(path: Path, setting: str) -> None:
    """Make a folder that the bench file names, where it is not there.

    Raises:
        StationFault: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StationFault(
            f"the folder {path} cannot be made: {error.strerror}", advice=f"Check `{setting}` in the bench file."
        ) from error


def load_image(description: Path) -> Image:
    """The image that a description names.

    Raises:
        StationFault: it is missing, or its files are not what it says.
    """
    try:
        manifest = ImageManifest.load(description)
        manifest.verify_files()
    except ManifestError as error:
        raise StationFault(
            str(error), advice="Build it: make image. The simulated bench's comes with make demo."
        ) from error
    return Image.of(manifest)


def check_factory_key(path: Path) -> None:
    """See that the factory's SSH key can be used.

    Raises:
        StationFault: it cannot; the message says why.
    """
    try:
        factory_key.public_line(path)
    except (OSError, ImageError) as error:
        raise StationFault(
            f"the factory key cannot be used: {error}",
            advice="It is made together with the image: make image, or make demo for the simulated bench.",
        ) from error


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


# --- demo -----------------------------------------------------------------------------------------------------------

DEMO_PHONE = "+15555550100"  # 555-0100 to 555-0199 are kept for fiction
DEMO_ZONE = "America/New_York"


@app.command(epilog="Example:  ./station.py demo --bench benches/simulated.toml")
@command
def demo(
    bench: BenchOption = Path("benches/simulated.toml"),
    summary: Annotated[Path | None, typer.Option(help="Where the summary goes; beside the records by default.")] = None,
) -> ExitCode:
    """Make the next unit on a simulated or virtual bench, wave at its PIR, and show the SMS that its owner gets."""
    file = load_bench_file(bench)
    if file.cloud.target != "local" or file.board.scheme not in SERIAL_PREFIXES:
        raise UserMistake("the demo is for boards and clouds that are not real", advice="Use: ./station.py run")
    told: dict[str, Any] = {}
    path = summary or file.labels.parent / "summary.json"
    with running_cloud(file) as endpoint:
        prepare(file)
        try:
            code = play(bench, file, endpoint, told)
        finally:
            write_whole(path, json.dumps(told, indent=2).encode(), mode=0o644)
    if code is ExitCode.PASS:
        show_next_steps(file, told["serial"], path)
    return code


def play(bench: Path, file: BenchFile, endpoint: LocalEndpoint, told: dict[str, Any]) -> ExitCode:
    """Both acts; `told` gets what happened, as plain data."""
    with ExitStack() as powered:
        first = powered.enter_context(Station.opened(bench, next_unit(file)))
        say(f"The line makes {first.unit.serial} on bench {first.file.name}.")
        attempt, alarm = make_unit(first), None
        try:
            if attempt.made is not None:
                alarm = raise_alarm(first.unit.serial, first.bench.stimulus, endpoint, out)
        finally:
            told.update(summarise(first, attempt, alarm))
        if attempt.made is None or alarm is None:
            return attempt.code
        show_unit(attempt.made, alarm)
        say("Second act: two units in the field, and two releases for them.")
        second = powered.enter_context(Station.opened(bench, next_unit(file), slot="-2"))
        say(f"The line makes {second.unit.serial} in another slot.")
        attempt = make_unit(second)
        if attempt.made is None:
            return attempt.code
        units = [Powered(one.unit.serial, one.bench.stimulus) for one in (second, first)]
        fielded = SecondAct(updates_of(file), builder_of(file), endpoint, units[0], units[1:], out).play()
        told["update"] = asdict(fielded)
        show_alarm(fielded.alarm)
    forget_older_boards(file, {first.unit.serial, second.unit.serial})
    return ExitCode.PASS


def next_unit(file: BenchFile) -> str:
    """The serial of the next unit that the demo makes on a bench."""
    with closing(open_records(file)) as records:
        return next_serial(records, file.board.scheme)


def make_unit(station: Station) -> Attempt:
    """Take the demo's unit through the line; its owner has a telephone."""
    station.registry.owner(station.unit.serial, DEMO_PHONE, DEMO_ZONE)
    return station.run(as_json=False)


def updates_of(file: BenchFile) -> Updates:
    """The update repository that goes with a bench's cloud."""
    beside = file.cloud.state.parent
    return Updates(beside / "updates", file.cloud.state, file.labels.parent / "releases")


def builder_of(file: BenchFile) -> Build:
    """What builds releases for a bench's boards."""
    releases = updates_of(file).releases
    return lambda version, older, slip: tryout.build(file.board.scheme, releases / version, version, older, slip)


def forget_older_boards(file: BenchFile, serials: set[str]) -> None:
    """Of the demo's boards that passed, keep these: a virtual Pi's medium takes some hundred megabytes."""
    boards = Path(file.board.place.replace("{serial}", "-")).parent
    with closing(open_records(file)) as records:
        for other in boards.glob(f"{SERIAL_PREFIXES[file.board.scheme]}[0-9]*"):
            if other.name not in serials and records.passed(other.name):
                shutil.rmtree(other)


def say(text: str) -> None:
    """One line of the demo's story."""
    out.print(Text("» ", style="bold cyan").append(text, style="not bold default"))


@contextmanager
def running_cloud(file: BenchFile) -> Iterator[LocalEndpoint]:
    """The local cloud of a bench file: the one that runs, or one for as long as the context lasts."""
    found = launcher.find(file.cloud.state)
    if found is not None:
        say(f"The local cloud runs at {found.url}.")
        yield found
        return
    say("Starting the local cloud.")
    with launcher.running(file.cloud.state) as endpoint:
        yield endpoint


def prepare(file: BenchFile) -> None:
    """Whatever a line needs before its first unit: stack, authority, image, factory key."""
    target = local_target(file.cloud.state)
    with out.status("Deploying the cloud stack") as status:
        done = stack.deploy(target, status.update)
    say("The cloud stack is deployed." if done.changed else "The cloud stack is up to date.")
    passphrase = file.authority.passphrase_file
    if not passphrase.exists():
        write_whole(passphrase, secrets.token_urlsafe(24).encode())
    if not (file.authority.directory / "signing.pem").exists():
        authority.create_authority(file.authority.directory, read_passphrase(passphrase))
        say(f"Made a root CA and a signing CA in {file.authority.directory}.")
    signing = authority.load_signing(file.authority.directory, read_passphrase(passphrase))
    register(Registry(target), signing)
    if file.board.scheme == "simulated":
        factory_key.ensure(file.factory_key)
        updates = updates_of(file)
        if updates.prepare():
            say(f"Made the keys of updates in {updates.directory}.")
        sample.build(file.image, updates.root)


#: The demos share a cloud, so their serials must not meet.
SERIAL_PREFIXES = {"simulated": "PK-S", "virtual": "PK-V"}


def next_serial(records: Records, scheme: str) -> str:
    """The serial after the last one that the demo made on this kind of board."""
    pattern = re.compile(re.escape(SERIAL_PREFIXES[scheme]) + "([0-9]{5})")
    numbers = [int(found[1]) for found in map(pattern.fullmatch, records.serials()) if found]
    return f"{SERIAL_PREFIXES[scheme]}{max(numbers, default=0) + 1:05}"


def summarise(station: Station, attempt: Attempt, alarm: Alarm | None) -> dict[str, Any]:
    """The demo as plain data."""
    last = station.records.runs(station.unit.serial)[-1]
    made = attempt.made
    return {
        "serial": last.serial,
        "outcome": last.outcome,
        "steps": [{"name": step.name, "outcome": step.outcome, "seconds": step.seconds} for step in last.steps],
        "thing": made.unit.serial if made else None,
        "certificate": {
            "sha256": made.certificate.id,
            "not_after": made.certificate.certificate.not_valid_after_utc.isoformat(),
            "issuer": made.certificate.certificate.issuer.rfc4514_string(),
            "pem": made.certificate.pem,
        }
        if made
        else None,
        "key": made.key if made else None,
        "sms": {"to": alarm.to, "text": alarm.text} if alarm else None,
        "edge_to_sms_seconds": round(alarm.seconds, 3) if alarm else None,
    }


def show_unit(made: Made, alarm: Alarm) -> None:
    """The end of the first act: what came of the unit."""
    if made.key == "file":
        say("Key grade: file. No TPM emulator is installed here, and the record says so; make demo-vm brings one.")
    say(f"Label: {made.label}")
    show_alarm(alarm)


def show_alarm(alarm: Alarm) -> None:
    """What the owner reads."""
    title = f"SMS to {alarm.to}, {alarm.seconds * 1000:.0f} ms after the movement"
    out.print(
        Panel(Text(alarm.text, style="bold"), title=title, title_align="left", border_style="green", expand=False)
    )


def show_next_steps(file: BenchFile, serial: str, summary: Path) -> None:
    """What to try next."""
    say(f"Summary: {summary}")
    python = ".venv/bin/python"
    again, other = ("demo", "demo-vm") if file.board.scheme == "simulated" else ("demo-vm", "demo")
    out.print("What to try next:", style="bold")
    for line, why in (
        (f"{python} station.py record {serial} --bench {file.path}", "all that happened to this unit"),
        (f"{python} station.py run --bench {file.path} --serial {serial}", "it has passed: the line refuses it"),
        (f"make {again}", "the next unit"),
        (f"make {other}", "the same story on the " + ("real image" if other == "demo-vm" else "simulated board")),
        ("make cloud doctor", "what the local cloud refuses"),
    ):
        out.print(Text(f"  {why}:", style="dim"))
        out.print(Text(f"    {line}", style="cyan"), soft_wrap=True)


def stop_on_signals() -> None:
    """Let SIGTERM end a run as Ctrl-C does, so that it is closed in the record and the unit's power is cut."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    stop_on_signals()
    app()
