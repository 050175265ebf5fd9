"""The demo's story after the line: an alarm becomes an SMS, and releases reach the fleet.

The second act is told in the very commands that a fleet operator types, each shown before it runs. Two units are
powered. A good release goes to the canary, soaks for some seconds, and goes to the other unit. Then one with a slip
in it goes to the canary, which finds that it cannot do its work, comes back by itself, and says why; the rollout stops,
and the slip reaches nobody else.
"""

import contextlib
import io
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cloud import fleet_screen, rollout
from cloud.cli import app as cloud_app
from cloud.errors import DidNotHappen, NotYet
from cloud.fleet import Fleet, Progress
from cloud.local import launcher
from cloud.local.endpoint import LocalEndpoint, write_atomically
from cloud.repository import Repository, version_key
from cloud.rollout import Ring, Status
from cloud.target import local_target

WAVE_SECONDS: Final = 4.0
ALARM_SECONDS: Final = 120.0
#: How long a ring may take to have a release, or to come back from one: an emulated Pi takes some minutes.
ROLLOUT_SECONDS: Final = 900.0
#: How long the canary runs the good release before all others get it; a day, outside of demos.
SOAK: Final = "3s"

_LOOK_SECONDS: Final = 0.2
_HOLDERS: Final = ("holder-1", "holder-2")

#: The slip: a letter is missing where alarms are made durable. The agent starts, connects, and could keep no alarm.
SLIP: Final = ("firmware_agent/spool.py", 'execute("BEGIN IMMEDIATE")', 'execute("BEGIN IMEDIATE")')


class Stimulus(Protocol):
    """Whatever moves in front of a unit's PIR."""

    def wave(self) -> None:
        """Move."""
        ...


#: Builds a release for the demo's boards and gives its archive: its version, the archives of releases that units run,
#: and a slip to make in it (a file, and what is replaced in it by what).
Build = Callable[[str, Sequence[Path], tuple[str, str, str] | None], Path]


# --- an alarm ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """The SMS that a movement became, and how long that took."""

    to: str
    text: str
    seconds: float


def raise_alarm(serial: str, stimulus: Stimulus, endpoint: LocalEndpoint, out: Console) -> Alarm:
    """Wave at a unit's PIR until its owner gets an SMS: the unit ignores its PIR for a minute after power-up.

    Raises:
        DidNotHappen: no SMS came.
    """
    begun = time.monotonic()
    with out.status("Waving at the PIR") as status:
        while time.monotonic() - begun < ALARM_SECONDS:
            since, waved = datetime.now(UTC), time.monotonic()
            stimulus.wave()
            while time.monotonic() - waved < WAVE_SECONDS:
                for message in launcher.sms(endpoint, since):
                    return Alarm(message.to, message.text, time.monotonic() - waved)
                time.sleep(0.01)
            status.update("Waving at the PIR again: the unit ignores it for a minute after power-up")
    raise DidNotHappen(
        f"no SMS within {ALARM_SECONDS:.0f} s of waving at the PIR of {serial}, which has passed the line: the alarm"
        " rule or process_alarm is missing in the cloud; deploy the stack again (make cloud)"
    )


# --- updates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """The update repository of the demos, with all of its keys in one hand.

    Attributes:
        directory: of the repository and its keys. The demos share a cloud, so they share this too.
        cloud: where the local cloud keeps its state.
        releases: where releases are built.
    """

    directory: Path
    cloud: Path
    releases: Path

    @property
    def repository(self) -> Path:
        """The repository itself."""
        return self.directory / "repository"

    @property
    def root(self) -> Path:
        """What goes into an image, so that its units trust the releases of this repository."""
        return self.repository / "root.json"

    @property
    def passphrase(self) -> Path:
        """File with the passphrase of all its keys."""
        return self.directory / "passphrase"

    def keys(self, holder: str) -> Path:
        """Where a holder's keys are."""
        return self.directory / "keys" / holder

    def prepare(self) -> bool:
        """Make keys and repository; whether there were none."""
        if self.root.exists():
            return False
        if not self.passphrase.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.passphrase, secrets.token_urlsafe(24), 0o600)
        with contextlib.redirect_stderr(io.StringIO()):  # what it says is for holders in different places
            self.command("keys", "init", "--keys", self.directory / "keys")
        return True

    def command(self, *words: str | Path) -> None:
        """Run `python -m cloud ...` on this repository and this cloud.

        Raises:
            CloudError: what the command says.
        """
        arguments = [str(word) for word in words]
        arguments += self._places(*arguments[:2])
        cloud_app(arguments, standalone_mode=False)

    def _places(self, group: str, verb: str) -> list[str]:
        """The options that say where things are, of those that this command takes."""
        options = {
            "--repository": self.repository,
            "--passphrase-file": self.passphrase,
            "--state": self.cloud,
            "--releases": self.releases,
        }
        commands: Any = typer.main.get_command(cloud_app)
        known = {name for option in commands.commands[group].commands[verb].params for name in option.opts}
        return [word for name, place in options.items() if name in known for word in (name, str(place))]


@dataclass(frozen=True)
class Powered:
    """A unit that has passed the line, on its bench."""

    serial: str
    stimulus: Stimulus


@dataclass(frozen=True)
class Fielded:
    """What came of the second act."""

    canary: str
    others: tuple[str, ...]
    before: str
    good: str
    bad: str
    code: str
    reason: str
    after: dict[str, str]
    archive_bytes: int
    delta_bytes: int
    alarm: Alarm


class SecondAct:
    """Two releases on their way to two units."""

    def __init__(
        self,
        updates: Updates,
        build: Build,
        endpoint: LocalEndpoint,
        canary: Powered,
        others: Sequence[Powered],
        out: Console,
    ) -> None:
        self._updates = updates
        self._build = build
        self._endpoint = endpoint
        self._canary = canary
        self._others = tuple(others)
        self._out = out
        self._fleet = Fleet(local_target(updates.cloud))

    def play(self) -> Fielded:
        """All of it.

        Raises:
            DidNotHappen: something of it did not happen.
            CloudError: a command was refused that should not have been.
        """
        units = [self._canary, *self._others]
        self._clear_rings([unit.serial for unit in units])
        before = self._versions()
        first = before[self._canary.serial]
        good, bad = self._next_versions(first)
        self._name_canary()

        self._say(f"A release for both: {good}.")
        base = self._build(first, [], None)
        archive = self._build(good, [base], None)
        self._ship(good)
        self._expect_success(Ring.CANARY, good, [self._canary])
        self._promote(good)
        self._roll_out(good)
        self._expect_success(Ring.MAIN, good, self._others)

        self._say(f"A release with a slip in it: {bad} says {SLIP[2]} in {SLIP[0]}.")
        self._build(bad, [archive], SLIP)
        self._ship(bad)
        code, reason = self._expect_return(bad, good)
        self._expect_refusal(bad)
        self._command("fleet", "status")
        self._command("fleet", "abort")

        self._say(f"{self._canary.serial} still guards:")
        alarm = raise_alarm(self._canary.serial, self._canary.stimulus, self._endpoint, self._out)
        delta = next(archive.parent.glob("*.zpatch"))
        return Fielded(
            canary=self._canary.serial,
            others=tuple(unit.serial for unit in self._others),
            before=before[self._canary.serial],
            good=good,
            bad=bad,
            code=code,
            reason=reason,
            after=self._versions(),
            archive_bytes=archive.stat().st_size,
            delta_bytes=delta.stat().st_size,
            alarm=alarm,
        )

    # --- what is said ----------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._out.print(Text("» ", style="bold cyan").append(text, style="not bold default"))

    def _command(self, *words: str | Path) -> None:
        """Show a command as one types it, where the demo's places are the usual ones, and run it."""
        shown = shlex.join(["python", "-m", "cloud", *map(str, words)])
        self._out.print(Text(f"$ {shown}", style="dim cyan"), soft_wrap=True)
        self._updates.command(*words)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _clear_rings(self, powered: Sequence[str]) -> None:
        """Units of earlier demos have no power any more: they leave the rings, or rollouts would wait for them."""
        for ring in Ring:
            for serial in set(self._fleet.members(ring)) - set(powered):
                self._fleet.target.iot.remove_thing_from_thing_group(
                    thingName=serial, thingGroupName=self._fleet.group(ring)
                )

    def _versions(self) -> dict[str, str]:
        """What each unit says that it runs."""
        return {unit.serial: unit.version or "" for unit in self._fleet.units()}

    def _next_versions(self, first: str) -> tuple[str, str]:
        """The next two that nobody has seen."""
        known = [first, *(each.version for each in Repository(self._updates.repository).releases())]
        major, minor, *_ = *version_key(max(known, key=version_key)), 0
        return f"{major}.{minor + 1}.0", f"{major}.{minor + 2}.0"

    def _name_canary(self) -> None:
        self._say(f"{self._canary.serial} shall be the canary. Two holders sign that.")
        self._command("keys", "canaries", self._canary.serial)
        self._sign()
        self._command("fleet", "ring", "canary", self._canary.serial)
        self._command("fleet", "ring", "main", *(unit.serial for unit in self._others))

    def _sign(self) -> None:
        for holder in _HOLDERS:
            self._command("keys", "sign", "--keys", self._updates.keys(holder))

    def _ship(self, version: str) -> None:
        """Sign a release for the canaries, upload it, and tell them."""
        keys = [word for name in ("builder", "online") for word in ("--keys", self._updates.keys(name))]
        self._command("fleet", "release", version, *keys)
        self._command("fleet", "canary", version)

    def _promote(self, version: str) -> None:
        self._say(f"The canary runs {version}. Two holders sign it for all units.")
        self._command("fleet", "promote", version)
        self._sign()
        self._command("keys", "publish", "--keys", self._updates.keys("online"))
        self._command("fleet", "release")

    def _roll_out(self, version: str) -> None:
        """Bring a release to all units, once it has soaked; before, the command refuses."""
        refused = ""
        deadline = time.monotonic() + ROLLOUT_SECONDS
        while True:
            try:
                self._command("fleet", "rollout", version, "--soak", SOAK, "--yes")
            except NotYet as error:
                if refused or time.monotonic() > deadline:
                    raise
                refused = str(error)
                self._say(refused)
                time.sleep(rollout.parse_duration(SOAK).total_seconds())
            else:
                return

    def _expect_success(self, ring: Ring, version: str, units: Sequence[Powered]) -> None:
        progress = self._follow(ring, version, units)
        if progress.summary.counts.get(Status.SUCCEEDED) != len(units):
            raise DidNotHappen(f"{version} did not reach the {ring} ring: {fleet_screen.words(progress.summary)}")
        for unit in units:
            self._wait_for_version(unit.serial, version)

    def _expect_return(self, bad: str, good: str) -> tuple[str, str]:
        """Code and reason that the canary gives for having left a release again."""
        progress = self._follow(Ring.CANARY, bad, [self._canary])
        if not progress.summary.failures:
            raise DidNotHappen(f"{bad} has a slip in it, and no unit failed: {fleet_screen.words(progress.summary)}")
        failure = progress.summary.failures[0]
        self._wait_for_version(self._canary.serial, good)
        self._say(f"{self._canary.serial} went back to {good} by itself: {failure.reason}")
        return failure.code, failure.reason

    def _expect_refusal(self, version: str) -> None:
        try:
            self._command("fleet", "rollout", version, "--soak", "0", "--yes")
        except NotYet as error:
            self._say(f"It goes to nobody else: {error}")
            return
        raise DidNotHappen(f"{version} failed on the canary, and the rollout to all units was not refused")

    def _wait_for_version(self, serial: str, version: str) -> None:
        deadline = time.monotonic() + ROLLOUT_SECONDS
        while (runs := self._versions().get(serial)) != version:
            if time.monotonic() > deadline:
                raise DidNotHappen(f"{serial} should run {version}, and says that it runs {runs}")
            time.sleep(_LOOK_SECONDS)

    # --- live ------------------------------------------------------------------------------------------------------

    def _follow(self, ring: Ring, version: str, units: Sequence[Powered]) -> Progress:
        """Show a rollout until no more comes from its units."""
        serials = [unit.serial for unit in units]
        job = next(job.name for job in self._fleet.active_updates(ring))
        began = {serial: self._versions().get(serial, "") for serial in serials}
        deadline = time.monotonic() + ROLLOUT_SECONDS
        with self._live() as show:
            while True:
                progress = self._fleet.progress(job, serials)
                show(Group(self._table(job, began, version), fleet_screen.progress(progress)))
                if not progress.summary.open:
                    return progress
                if time.monotonic() > deadline:
                    raise DidNotHappen(f"{job} is not over within {ROLLOUT_SECONDS:.0f} s")
                time.sleep(_LOOK_SECONDS)

    @contextlib.contextmanager
    def _live(self) -> Iterator[Callable[[Group], None]]:
        """Something that shows its argument in the place of the one before; in a log, only the last."""
        if self._out.is_terminal:
            with Live(console=self._out, auto_refresh=False) as live:
                yield lambda shown: live.update(shown, refresh=True)
            return
        last: list[Group] = []
        try:
            yield lambda shown: last.__setitem__(slice(None), [shown])
        finally:
            for shown in last:
                self._out.print(shown)

    def _table(self, job: str, began: dict[str, str], version: str) -> Table:
        table = Table("unit", "ran", "shall run", "runs", "phase", box=None)
        runs = self._versions()
        for serial, before in began.items():
            table.add_row(serial, before, version, runs.get(serial, ""), self._phase(job, serial))
        return table

    def _phase(self, job: str, serial: str) -> str:
        """What a unit says about its job."""
        iot = self._fleet.target.iot
        try:
            answer = iot.describe_job_execution(jobId=job, thingName=serial)
        except iot.exceptions.ResourceNotFoundException:
            return "not told yet"
        execution = answer["execution"]
        said = execution.get("statusDetails", {}).get("detailsMap", {})
        return " ".join(filter(None, (execution["status"].lower(), said.get("phase"), said.get("progress"))))
