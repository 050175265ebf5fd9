"""What is shown of a build while it runs: a line for each finished step, and one bar over all of them."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from image.run import note

#: Shows and times a block of work; what it yields takes a few words about where the block stands. The last of them stay
#: beside it: "cached", say.
Stage = Callable[[str], AbstractContextManager[Callable[[str], None]]]

#: Seconds of a first build's long steps, for the bar; later builds go by the one before them.
TYPICAL: Final[Mapping[str, float]] = MappingProxyType(
    {
        "base root file system": 80, "device packages": 20, "unpack": 3, "agent and settings": 1, "boot files": 2,
        "root": 3, "partitions": 1, "disk": 1, "compress": 3, "bundle": 1, "describe": 3, "sign": 1,
    }
)  # fmt: skip

#: The stage of whoever waits for another build.
WAIT: Final = "wait"

_TITLE_WIDTH: Final = 24


@dataclass
class Clock:
    """Seconds per stage, in the order in which they ran, and the last words that each one said."""

    seconds: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str, shown: Callable[[str], None] = lambda _: None) -> Iterator[Callable[[str], None]]:
        """Time a block of work.

        Args:
            title: of the block.
            shown: told what the block says of itself.
        """
        note(f"\n--- {title}")
        began = time.monotonic()

        def say(words: str) -> None:
            self.words[title] = words
            shown(words)

        yield say
        self.seconds[title] = round(time.monotonic() - began, 2)
        note(f"--- {title}: {self.seconds[title]:.1f} s {self.words.get(title, '')}".rstrip())


@contextmanager
def shown(clock: Clock, console: Console, expected: Mapping[str, float] = TYPICAL) -> Iterator[Stage]:
    """Stages that are timed, and shown as they run.

    Args:
        clock: takes the times.
        console: where they are shown; what is no terminal gets a line for each finished stage.
        expected: seconds of each stage, for the bar.
    """
    with _Overall(expected, console) as progress:

        @contextmanager
        def stage(title: str) -> Iterator[Callable[[str], None]]:
            progress.begin(title)
            try:
                with clock.stage(title, lambda words: progress.begin(title, words)) as say:
                    yield say
            except BaseException:
                console.print(Text(f"  {title:<{_TITLE_WIDTH}}  failed", style="red"))
                raise
            progress.end(title)
            console.print(_line(title, clock))

        yield stage


class _Overall(Progress):
    """One bar over all stages; within one it moves as the clock does, and stops short of what was expected."""

    def __init__(self, expected: Mapping[str, float], console: Console) -> None:
        self._expected = expected
        self._done = 0.0
        self._title, self._began = "", time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        off = not console.is_terminal
        super().__init__(*columns, TimeElapsedColumn(), console=console, transient=True, disable=off)
        self._bar = self.add_task("", total=sum(expected.values()) or None)

    def begin(self, title: str, words: str = "") -> None:
        """Show what goes on."""
        if title != self._title:
            self._title, self._began = title, time.monotonic()
        self.update(self._bar, description=f"{title}: {words}" if words else title)
        if words and title == WAIT and not self.console.is_terminal:
            self.console.print(f"  {words}")  # which may take minutes

    def end(self, title: str) -> None:
        """Count a stage as done."""
        self._done += self._expected.get(title, 0.0)
        self._title = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, ten times a second."""
        spent = min(time.monotonic() - self._began, 0.95 * self._expected.get(self._title, 0.0))
        for task in self.tasks:
            task.completed = self._done + spent
        return super().get_renderables()


def _line(title: str, clock: Clock) -> Text:
    words = clock.words.get(title, "")
    text = Text(f"  {title:<{_TITLE_WIDTH}}{clock.seconds[title]:6.1f} s")
    return text.append(f"  {words}", style="green" if words == "cached" else "dim") if words else text


def expected(cache: Path) -> Mapping[str, float]:
    """Seconds of each stage as the last build of a cache took them; typical ones where there was none."""
    try:
        value = json.loads((cache / "stages.json").read_text())
        return {str(title): float(seconds) for title, seconds in value.items()} or TYPICAL
    except (OSError, ValueError, AttributeError, TypeError):
        return TYPICAL


def remember(cache: Path, clock: Clock) -> None:
    """Keep the times of a build for the next one's bar."""
    with suppress(OSError):  # a bar is worth no failure
        new = cache / ".stages.json.new"
        new.write_text(json.dumps({title: seconds for title, seconds in clock.seconds.items() if title != WAIT}))
        new.replace(cache / "stages.json")


def results(directory: Path) -> Table:
    """The files of a directory and their sizes."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for path in sorted(directory.iterdir()):
        table.add_row(f"  {path.name}", _size(path.stat().st_size))
    return table


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 // 10 else f"{size / 2**10:,.1f} KiB"
