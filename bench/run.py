"""Measure how fast Picket is, each time against a peer that is measured in the same run.

Prints a table and writes `build/bench.json`: a list of {name, value, unit, peer, peer_value, ratio, target, met, note}.
What this machine cannot measure is null there, and `note` says why.

Exit codes: 0 measured (a target that was missed is shown), 1 a measurement failed, 2 a mistake in the command. With
--strict, 1 also when a target was missed.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file: what we import lies in the folder above

from bench.figures import Figure, Measurement, NotMeasuredError, Place  # noqa: E402  (needs the path)
from bench.table import MEASUREMENTS  # noqa: E402
from factory.errors import UserMistake  # noqa: E402
from factory.files import write_whole  # noqa: E402

OK, FAILED, MISTAKE = 0, 1, 2

out = Console()
err = Console(stderr=True)

app = typer.Typer(
    add_completion=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command(help=__doc__, epilog="Example:  make bench ONLY=flash   or   .venv/bin/python bench/run.py --only flash")
def bench(
    only: Annotated[list[str] | None, typer.Option(help="Measure only this; may be given several times.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also what takes minutes and downloads.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show what can be measured, and do nothing.")] = False,
    strict: Annotated[bool, typer.Option(help="Exit with 1 when a target was missed.")] = False,
    image: Annotated[Path, typer.Option(help="The image to flash and boot.")] = Path("build/image/picket.json"),
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("build/bench.json"),
) -> None:
    """Measure; what the user reads as help is this file's docstring."""
    if show:
        out.print(listed())
        return
    chosen = choose(only or [])
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone(output.with_suffix("")) as scratch:
        figures = [take(one, scratch, image.absolute(), wanted=bool(only) or everything) for one in chosen]
        write_whole(output, (json.dumps([one.as_json() for one in figures], indent=1) + "\n").encode(), mode=0o644)
    show_figures(figures, output)
    raise typer.Exit(exit_code(figures, strict=strict))


def exit_code(figures: Sequence[Figure], *, strict: bool) -> int:
    """What to tell the shell."""
    missed = any(one.met is False for one in figures)
    return FAILED if any(one.failed for one in figures) or (strict and missed) else OK


def choose(names: Sequence[str]) -> Sequence[Measurement]:
    """The measurements of these names; all where there are none.

    Raises:
        UserMistake: one is unknown.
    """
    known = {one.name: one for one in MEASUREMENTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserMistake(f"there is no measurement {', '.join(unknown)}", advice=f"There are: {', '.join(known)}.")
    return [known[name] for name in names] or MEASUREMENTS


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """A folder for what measurements leave about, and no other measuring beside us.

    Raises:
        UserMistake: another run measures.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserMistake("another run is measuring", advice="Two at once would measure each other.") from error
        yield folder


def take(measurement: Measurement, folder: Path, image: Path, *, wanted: bool) -> Figure:
    """Take one measurement; whatever goes wrong in it becomes its line of the result."""
    if measurement.slow and not wanted:
        why = f"takes minutes and downloads everything anew; make bench ONLY={measurement.name}"
        return Figure.without(measurement, why)
    scratch = (folder / measurement.name).absolute()
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    with err.status(f"{measurement.name}: {measurement.what}") as status:
        place = Place(scratch, image, lambda text: status.update(f"{measurement.name}: {text}"))
        try:
            figure = Figure.of(measurement, measurement.run(place))
        except NotMeasuredError as error:
            figure = Figure.without(measurement, str(error))
        except Exception as error:  # noqa: BLE001  (the other measurements still count)
            err.print_exception()
            figure = Figure.without(measurement, f"{type(error).__name__}: {error}", failed=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    err.print(f"{figure.name}: {plain(figure)}", highlight=False, markup=False)
    return figure


# --- what is shown --------------------------------------------------------------------------------------------------


def plain(figure: Figure) -> str:
    """One line for whoever waits."""
    if figure.value is None:
        return figure.note
    return f"{figure.value} {figure.unit}, peer {figure.peer_value} {figure.unit}"


def listed() -> Table:
    """What can be measured."""
    table = Table("name", "what", "peer", "target")
    for one in MEASUREMENTS:
        limit = f"{one.target.limit:g} times the peer" if one.target.of_peer else f"{one.target.limit:g} {one.unit}"
        table.add_row(one.name, one.what + (" (only by name, or --all)" if one.slow else ""), one.peer, f"≤ {limit}")
    return table


def show_figures(figures: Sequence[Figure], output: Path) -> None:
    """The table, and below it who the peers are and where the time goes."""
    table = Table("name", "ours", "peer", "ratio", "target", "")
    for one in figures:
        table.add_row(
            one.name,
            number(one.value, one.unit),
            number(one.peer_value, one.unit),
            number(one.ratio, ""),
            f"≤ {number(one.target, one.unit)}" if one.target is not None else "",
            verdict(one),
        )
    out.print(table)
    for one in figures:
        out.print(f"  {one.name} (peer: {one.peer}): {one.note}", highlight=False, markup=False)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    out.print(f"{os.cpu_count()} cores, load {load} at the end. Written to {output}.", highlight=False)


def verdict(figure: Figure) -> Text:
    """The target's fate, in a word."""
    if figure.failed:
        return Text("failed", style="bold red")
    if figure.met is None:
        return Text("not measured", style="dim")
    return Text("met", style="green") if figure.met else Text("missed", style="bold yellow")


def number(value: float | None, unit: str) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    return f"{value:.3g} {unit}".rstrip() if value < 100 else f"{value:.0f} {unit}".rstrip()


def main() -> int:
    """Run, and turn what happened into an exit code."""
    try:
        app()
    except UserMistake as error:
        err.print(f"{error}. {error.advice}", style="red", markup=False, highlight=False)
        return MISTAKE
    return OK


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
