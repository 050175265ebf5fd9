"""Records: every attempt at every unit, kept for ever.

A record is all runs of a unit; a run is one attempt, made of steps; a step holds measurements with limits. Steps are
written when they begin and when they end, each in a transaction of its own, so a station that is killed loses no more
than the step in hand, and the next run finds what was left open and closes it as aborted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from sqlalchemy import JSON, ForeignKey, create_engine, event, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from factory.errors import FactoryError, StationFault, UnitFault, UserMistake


class Outcome(StrEnum):
    """How a step or a run ended."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    ERROR = "error"
    ABORTED = "aborted"


@dataclass(frozen=True)
class Limits:
    """What a measurement may be: `low` to `high`, both included; None is open."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is None and self.high is None:
            return "any"
        if self.low is None:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Measurement:
    """A value that the station measured, with its unit of measure and its limits."""

    name: str
    value: float
    unit: str
    limits: Limits

    @property
    def ok(self) -> bool:
        """Whether the value is within its limits."""
        return self.value in self.limits

    def __str__(self) -> str:
        return f"{self.name} {self.value:g} {self.unit} (limits: {self.limits})"


# --- tables -------------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    """The schema of the records."""

    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012  (SQLAlchemy's own form)


class UnitRow(Base):
    """A unit that was ever tried."""

    __tablename__ = "units"
    serial: Mapped[str] = mapped_column(primary_key=True)
    board: Mapped[str | None] = mapped_column(unique=True)


class RunRow(Base):
    """One attempt at a unit."""

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    serial: Mapped[str] = mapped_column(ForeignKey("units.serial"), index=True)
    batch: Mapped[str]
    station: Mapped[str]
    bench: Mapped[str]
    image: Mapped[str]
    image_sha256: Mapped[str]
    code_version: Mapped[str]
    started: Mapped[str]
    finished: Mapped[str | None]
    outcome: Mapped[str | None]
    reason: Mapped[str | None]
    advice: Mapped[str | None]
    steps: Mapped[list["StepRow"]] = relationship(order_by="StepRow.position", cascade="all, delete-orphan")


class StepRow(Base):
    """One step of a run."""

    __tablename__ = "steps"
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), index=True)
    position: Mapped[int]
    name: Mapped[str]
    started: Mapped[str]
    finished: Mapped[str | None]
    seconds: Mapped[float | None]
    outcome: Mapped[str | None]
    reason: Mapped[str | None]
    notes: Mapped[dict[str, Any]]
    measurements: Mapped[list["MeasurementRow"]] = relationship(
        order_by="MeasurementRow.id", cascade="all, delete-orphan"
    )


class MeasurementRow(Base):
    """One measurement of a step."""

    __tablename__ = "measurements"
    id: Mapped[int] = mapped_column(primary_key=True)
    step_id: Mapped[int] = mapped_column(ForeignKey("steps.id"), index=True)
    name: Mapped[str]
    value: Mapped[float]
    unit: Mapped[str]
    low: Mapped[float | None]
    high: Mapped[float | None]


class CertificateRow(Base):
    """A device certificate that the authority issued. The row is written before the certificate leaves the station."""

    __tablename__ = "certificates"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    serial: Mapped[str] = mapped_column(ForeignKey("units.serial"), index=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    public_key_sha256: Mapped[str] = mapped_column(unique=True)
    pem: Mapped[str]
    issued: Mapped[str]
    retired: Mapped[str | None]


# --- what others read ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepView:
    """A step as the record tells it."""

    name: str
    started: str
    seconds: float | None
    outcome: str | None
    reason: str | None
    notes: Mapping[str, Any]
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class RunView:
    """A run as the record tells it."""

    id: int
    serial: str
    batch: str
    station: str
    bench: str
    image: str
    image_sha256: str
    code_version: str
    started: str
    finished: str | None
    outcome: str | None
    reason: str | None
    advice: str | None
    steps: tuple[StepView, ...]

    def as_json(self) -> dict[str, Any]:
        """The run as plain data, with the verdict on each measurement."""
        plain = asdict(self)
        for step, shown in zip(self.steps, plain["steps"], strict=True):
            for measurement, entry in zip(step.measurements, shown["measurements"], strict=True):
                entry["ok"] = measurement.ok
        return plain


@dataclass(frozen=True)
class IssuedCertificate:
    """A device certificate on record."""

    sha256: str
    serial: str
    public_key_sha256: str
    pem: str
    issued: str
    retired: str | None


def now() -> str:
    """The time for the record: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Records:
    """The station's database."""

    def __init__(self, url: str) -> None:
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _durable)
            Base.metadata.create_all(self._engine)
        except (ArgumentError, DBAPIError, ModuleNotFoundError) as error:
            detail = str(error.orig) if isinstance(error, DBAPIError) else str(error)
            raise StationFault(
                f"the records cannot be opened: {detail}", advice="Check `records` in the bench file."
            ) from error

    @property
    def engine(self) -> Engine:
        """The database itself, for reports."""
        return self._engine

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def runs(self, serial: str) -> tuple[RunView, ...]:
        """The record of a unit: its runs, oldest first; empty for a serial never tried."""
        with Session(self._engine) as session:
            rows = session.scalars(select(RunRow).where(RunRow.serial == serial).order_by(RunRow.id))
            return tuple(_view(row) for row in rows)

    def serials(self) -> tuple[str, ...]:
        """Every serial ever tried, in order."""
        with Session(self._engine) as session:
            return tuple(session.scalars(select(UnitRow.serial).order_by(UnitRow.serial)))

    def passed(self, serial: str) -> bool:
        """Whether a run of this unit passed, and no later run opened it up again."""
        runs = self.runs(serial)
        return bool(runs) and runs[-1].outcome == Outcome.PASS

    def unit_of_board(self, board: str) -> str | None:
        """The serial that this board was made into, if any."""
        with Session(self._engine) as session:
            return session.scalar(select(UnitRow.serial).where(UnitRow.board == board))

    def board_of(self, serial: str) -> str | None:
        """The board that this unit was made from, if known."""
        with Session(self._engine) as session:
            return session.scalar(select(UnitRow.board).where(UnitRow.serial == serial))

    def bind_board(self, serial: str, board: str) -> None:
        """Remember which board a unit is made from."""
        with Session(self._engine) as session, session.begin():
            session.get_one(UnitRow, serial).board = board

    def certificates(self, serial: str) -> tuple[IssuedCertificate, ...]:
        """Every certificate ever issued to a unit, oldest first."""
        with Session(self._engine) as session:
            rows = session.scalars(
                select(CertificateRow).where(CertificateRow.serial == serial).order_by(CertificateRow.issued)
            )
            return tuple(_issued(row) for row in rows)

    def certificate_of_key(self, public_key_sha256: str) -> IssuedCertificate | None:
        """The certificate that was issued to this public key, if any."""
        with Session(self._engine) as session:
            row = session.scalar(select(CertificateRow).where(CertificateRow.public_key_sha256 == public_key_sha256))
            return None if row is None else _issued(row)

    def issue(self, run_id: int, serial: str, *, sha256: str, public_key_sha256: str, pem: str) -> None:
        """Write an issued certificate down, before it is handed out."""
        with Session(self._engine) as session, session.begin():
            session.add(
                CertificateRow(
                    sha256=sha256,
                    serial=serial,
                    run_id=run_id,
                    public_key_sha256=public_key_sha256,
                    pem=pem,
                    issued=now(),
                )
            )

    def retire(self, sha256: str) -> None:
        """Write down that a certificate was retired in the cloud."""
        with Session(self._engine) as session, session.begin():
            session.get_one(CertificateRow, sha256).retired = now()


def _durable(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _issued(row: CertificateRow) -> IssuedCertificate:
    return IssuedCertificate(row.sha256, row.serial, row.public_key_sha256, row.pem, row.issued, row.retired)


def _view(row: RunRow) -> RunView:
    steps = tuple(
        StepView(
            name=step.name,
            started=step.started,
            seconds=step.seconds,
            outcome=step.outcome,
            reason=step.reason,
            notes=step.notes,
            measurements=tuple(Measurement(m.name, m.value, m.unit, Limits(m.low, m.high)) for m in step.measurements),
        )
        for step in row.steps
    )
    return RunView(
        id=row.id,
        serial=row.serial,
        batch=row.batch,
        station=row.station,
        bench=row.bench,
        image=row.image,
        image_sha256=row.image_sha256,
        code_version=row.code_version,
        started=row.started,
        finished=row.finished,
        outcome=row.outcome,
        reason=row.reason,
        advice=row.advice,
        steps=steps,
    )


# --- what the line writes -----------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Somebody who watches a run: the table on the screen, a stream of JSON."""

    def step_began(self, name: str) -> None:
        """A step began."""
        ...

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """The step in hand moved on."""
        ...

    def step_ended(self, step: StepView) -> None:
        """A step ended."""
        ...


class NoWatcher:
    """Nobody looks."""

    def step_began(self, name: str) -> None:
        """Nothing."""

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """Nothing."""

    def step_ended(self, step: StepView) -> None:
        """Nothing."""


@dataclass
class Step:
    """The step in hand: what it measured and what it has to say. Judged when it ends."""

    name: str
    watcher: Watcher
    notes: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    def measure(self, name: str, value: float, unit: str, limits: Limits) -> None:
        """Collect a measurement. It is judged at the end of the step, so that all that is out of limits is seen."""
        self.measurements.append(Measurement(name, float(value), unit, limits))

    def note(self, name: str, value: str | float | bool | None) -> None:
        """Write down something observed that has no limits."""
        self.notes[name] = value

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Tell whoever watches how far the step is."""
        self.watcher.progress(self.name, done, total, text)


class Journal:
    """One run, being written."""

    def __init__(self, records: Records, run_id: int, serial: str, watcher: Watcher) -> None:
        self.records = records
        self.run_id = run_id
        self.serial = serial
        self._watcher = watcher
        self._steps = 0

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Write a step: its beginning, then its end with outcome and measurements, whatever happens inside.

        Raises:
            UnitFault: a measurement is out of its limits.
        """
        self._steps += 1
        started = datetime.now(UTC)
        with Session(self.records.engine) as session, session.begin():
            row = StepRow(run_id=self.run_id, position=self._steps, name=name, started=now(), notes={})
            session.add(row)
            session.flush()
            row_id = row.id
        self._watcher.step_began(name)
        step = Step(name, self._watcher)
        outcome, reason = Outcome.PASS, None
        try:
            yield step
            bad = [str(measurement) for measurement in step.measurements if not measurement.ok]
            if bad:
                raise UnitFault(
                    f"out of limits: {'; '.join(bad)}",
                    advice="Put the unit on the repair shelf; the record holds all readings.",
                )
        except BaseException as error:
            outcome, reason = outcome_of(error), reason_of(error)
            raise
        finally:
            seconds = (datetime.now(UTC) - started).total_seconds()
            with Session(self.records.engine) as session, session.begin():
                row = session.get_one(StepRow, row_id)
                row.finished, row.seconds, row.outcome, row.reason = now(), seconds, outcome, reason
                row.notes = step.notes
                row.measurements = [
                    MeasurementRow(name=m.name, value=m.value, unit=m.unit, low=m.limits.low, high=m.limits.high)
                    for m in step.measurements
                ]
            self._watcher.step_ended(
                StepView(name, started.isoformat(), seconds, outcome, reason, step.notes, tuple(step.measurements))
            )


def outcome_of(error: BaseException) -> Outcome:
    """Whose fault an exception is, as an outcome: whatever is not the unit's is the station's."""
    if isinstance(error, UnitFault):
        return Outcome.FAIL
    if isinstance(error, FactoryError | Exception):
        return Outcome.ERROR
    return Outcome.ABORTED


def reason_of(error: BaseException) -> str:
    """Why a step or a run ended, in words."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the operator"
    return str(error) or type(error).__name__


_AGAIN = "Run the unit again; nothing of it was lost."


@dataclass(frozen=True)
class RunFacts:
    """What the record says of a run beside its steps."""

    serial: str
    batch: str
    station: str
    bench: str
    image: str
    image_sha256: str
    code_version: str


@contextmanager
def open_run(records: Records, facts: RunFacts, watcher: Watcher) -> Iterator[Journal]:
    """Open a run, and close it with its outcome, whatever happens inside.

    A run that an earlier station left open (it was killed, or lost power) is closed as aborted first.
    """
    with Session(records.engine) as session, session.begin():
        if session.get(UnitRow, facts.serial) is None:
            session.add(UnitRow(serial=facts.serial))
            session.flush()
        _close_abandoned(session, facts.serial)
        row = RunRow(started=now(), **asdict(facts))
        session.add(row)
        session.flush()
        run_id = row.id
    outcome, reason, advice = Outcome.PASS, None, None
    try:
        yield Journal(records, run_id, facts.serial, watcher)
    except BaseException as error:
        outcome, reason = outcome_of(error), reason_of(error)
        advice = error.advice if isinstance(error, FactoryError) else _AGAIN
        raise
    finally:
        with Session(records.engine) as session, session.begin():
            row = session.get_one(RunRow, run_id)
            row.finished, row.outcome, row.reason, row.advice = now(), outcome, reason, advice


def _close_abandoned(session: Session, serial: str) -> None:
    for run in session.scalars(select(RunRow).where(RunRow.serial == serial, RunRow.outcome.is_(None))):
        where = "before its first step"
        for step in run.steps:
            where = f"after step {step.name}"
            if step.outcome is None:
                where = f"in step {step.name}"
                step.finished, step.outcome, step.reason = now(), Outcome.ABORTED, "the station stopped here"
        run.finished, run.outcome = now(), Outcome.ABORTED
        run.reason = f"the station stopped {where}"
        run.advice = _AGAIN


def refuse_passed(records: Records, serial: str) -> None:
    """Refuse a unit that passed already.

    Raises:
        UserMistake: it did.
    """
    if records.passed(serial):
        raise UserMistake(
            f"{serial} has already passed",
            advice=f"Look at `station.py record {serial}`. To make it again on purpose, add --rework: "
            "its certificate is retired and it gets a new one.",
        )
