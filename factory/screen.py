"""What the operator sees: the line as a live table, then one large verdict. And the same as JSON, line by line."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from factory.line import STEPS
from factory.record import Outcome, RunView, StepView

_COLOURS = {
    Outcome.PASS: "green",
    Outcome.FAIL: "red",
    Outcome.ERROR: "yellow",
    Outcome.ABORTED: "magenta",
}
_WORDS = {
    Outcome.PASS: "PASS",
    Outcome.FAIL: "FAIL: the unit",
    Outcome.ERROR: "ERROR: the station",
    Outcome.ABORTED: "ABORTED",
}
_MARKS = {Outcome.PASS: "✔", Outcome.FAIL: "✘", Outcome.ERROR: "!", Outcome.ABORTED: "-"}


class LiveTable:
    """The steps of a run as they happen. Use as a context manager around the run."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._ended: dict[str, StepView] = {}
        self._current: str | None = None
        self._progress: tuple[int, int, str] = (0, 0, "")
        self._began = 0.0
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    @contextmanager
    def shown(self) -> Iterator["LiveTable"]:
        """Show the table while the context lasts."""
        with self._live:
            yield self

    def step_began(self, name: str) -> None:
        """A step began."""
        self._current, self._progress, self._began = name, (0, 0, ""), time.monotonic()

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """The step in hand moved on."""
        if name == self._current:
            self._progress = (done, total, text)

    def step_ended(self, step: StepView) -> None:
        """A step ended."""
        self._ended[step.name], self._current = step, None

    def _render(self) -> RenderableType:
        table = _step_table(self._title)
        for name in STEPS:
            if name in self._ended:
                table.add_row(*_step_row(self._ended[name]))
            elif name == self._current:
                done, total, text = self._progress
                moving: RenderableType = Text(text, overflow="ellipsis", no_wrap=True)
                if total:
                    beside = Table.grid(padding=(0, 1))
                    beside.add_row(ProgressBar(total=total, completed=done, width=20), moving)
                    moving = beside
                table.add_row(
                    Spinner("dots"), Text(name, style="bold"), f"{time.monotonic() - self._began:.0f}", moving
                )
            else:
                table.add_row("", Text(name, style="dim"), "", "")
        return table


class JsonLines:
    """The steps of a run as one JSON object per line."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out

    def step_began(self, name: str) -> None:
        """A step began."""
        self._write({"step": name, "began": True})

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """Nothing: a script asks for results."""

    def step_ended(self, step: StepView) -> None:
        """A step ended."""
        self._write({"step": step.name, "outcome": step.outcome, "seconds": step.seconds, "reason": step.reason})

    def _write(self, message: dict[str, Any]) -> None:
        print(json.dumps(message, ensure_ascii=False), file=self._out, flush=True)


def _step_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", expand=True)
    table.add_column("", width=1)
    table.add_column("step", no_wrap=True, min_width=9)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("what was seen", ratio=1)
    return table


def _step_row(step: StepView) -> tuple[RenderableType, ...]:
    outcome = Outcome(step.outcome) if step.outcome else Outcome.ABORTED
    colour = _COLOURS[outcome]
    seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
    return Text(_MARKS[outcome], style=f"bold {colour}"), Text(step.name), seconds, _seen(step, colour)


_SHOWN_NOTES = {
    "flash": ("medium", "mapped_bytes"),
    "boot": ("seconds_to_banner", "image"),
    "identify": ("model", "board", "key_store"),
    "enrol": ("key",),
    "certify": ("certificate", "retired"),
    "burn-in": ("endpoint", "proved_key"),
    "self-test": (),
    "connect": ("certificate_status",),
    "seal": ("connected_again", "factory_access"),
    "label": ("label",),
}


def _seen(step: StepView, colour: str) -> Text:
    if step.reason:
        return Text(step.reason, style=colour)
    parts = [f"{_words(m.name, m.unit)} {_figure(m.value)} {m.unit}" for m in step.measurements]
    for name in _SHOWN_NOTES.get(step.name, ()):
        value = step.notes.get(name)
        if value is not None:
            parts.append(_short(value) if name == step.name else f"{_words(name)} {_short(value)}")
    return Text(" · ".join(parts), overflow="fold")


def _words(name: str, unit: str = "") -> str:
    """A measurement's name as people say it: without the unit of measure that stands behind its value."""
    *words, last = name.split("_")
    text = " ".join(words if words and last in {"s", "c", "mib", unit} else [*words, last])
    return text.replace("pir", "PIR")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value > 9999:
        return f"{value:,}"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def run_table(run: RunView) -> Group:
    """A run as a table with its facts above and its verdict below."""
    table = _step_table(f"{run.serial} · run {run.id} · {run.started[:19].replace('T', ' ')} UTC")
    for step in run.steps:
        table.add_row(*_step_row(step))
    facts = Text(
        f"batch {run.batch} · station {run.station} · bench {run.bench} · image {run.image} "
        f"({run.image_sha256[:12]}…) · code {run.code_version}",
        style="dim",
    )
    return Group(table, facts, verdict(run))


def verdict(run: RunView) -> Panel:
    """The one thing that an operator must see: PASS or not, and what to do next."""
    outcome = Outcome(run.outcome) if run.outcome else Outcome.ABORTED
    body = Text(f"{_MARKS[outcome]} {_WORDS[outcome]}", style=f"bold {_COLOURS[outcome]}", justify="center")
    body.append(f"  {run.serial}", style="bold")
    if run.reason:
        body.append(f"\n{run.reason}", style="not bold")
    if run.advice:
        body.append(f"\nNext: {run.advice}", style="italic")
    return Panel(body, border_style=_COLOURS[outcome], padding=(0, 2))


def record_json(runs: Iterable[RunView]) -> str:
    """A record as JSON."""
    return json.dumps([run.as_json() for run in runs], ensure_ascii=False, indent=2)
