"""Starts the release in force; the one part of the agent that is never updated over the air.

    python3 -I -S launcher.py [--releases DIR] [--state DIR] [--run DIR] [--library DIR] [--no-wait] -- run

It is one file, needs the standard library alone, and imports nothing of the agent that it starts: the image installs
it where the agent cannot write. It reads two symbolic links and one small file, decides (`decide`, a pure function),
writes the decision down, and becomes the agent by exec. It loads no more than that takes: the modules argparse and
dataclasses were half of its time, before each start of the agent.

- A release on trial is started only after the attempt was counted durably: a release that dies at once cannot be
  started more often than its limit, whatever dies with it. When the attempt cannot be counted (disk full, read-only),
  the release before it is started.
- A committed release is started whatever happens to the disk: counting its starts is of second rank.
- A trial runs against a timer that only its commit stops: a release that starts, feeds the watchdog and never comes to
  its health gate is ended by the kernel, as often as it takes to go back.
- An unreadable boot.json is taken for an empty one.

`boot.json` in the state directory, replaced as a whole by rename:

    {"format": 1,
     "trial": null | {"release": name, "from": name, "attempts": n, "limit": n, "job": id},
     "rolled_back": null | {"release": name, "to": name, "reason": words, "attempts": n, "job": id},
     "unsteady": n}

The release named in `rolled_back` was given up: while `current` still points to it (the power failed between the
writing and the switch), the switch is done now. `unsteady` counts the starts of a committed release since the agent
last called itself steady; over 5, the agent is told to start in safe mode (`PICKET_SAFE_MODE=1`).

Because old launchers meet new agents, every agent writes format 1, for ever, and may only add keys that a launcher
can do without.
"""

import contextlib
import getopt
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

FORMAT: Final = 1

#: Over this many starts without a steady run, the agent starts in safe mode.
STEADY_STARTS: Final = 5

#: Seconds to wait before the second, third, … start of a committed release that never came to be steady; then the last
#: one each time. The service manager starts it again at once, since an update is a restart, and never gives up.
PAUSES: Final = (0.0, 0.0, 1.0, 3.0, 10.0, 20.0)

#: Seconds that one start of a trial has. Its health gate, once it is there, sets the timer anew by what it may take.
TRIAL_SECONDS: Final = 1800

#: The exit code when an option is not known.
WRONG_ARGUMENTS: Final = 2

#: The exit code when there is nothing to start (EX_CONFIG of sysexits.h).
NOTHING_TO_START: Final = 78

#: A release: its version and the first 8 hex digits of its tar's sha256.
NAME: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){1,3}-[0-9a-f]{8}")


class Trial(NamedTuple):
    """A release that was begun and is not committed. `origin` ("from" in the file) is the one to go back to."""

    release: str
    origin: str
    attempts: int
    limit: int
    job: str


class RolledBack(NamedTuple):
    """A release that was given up, why, and after how many starts."""

    release: str
    to: str
    reason: str
    attempts: int
    job: str


class Boot(NamedTuple):
    """What boot.json holds."""

    trial: Trial | None = None
    rolled_back: RolledBack | None = None
    unsteady: int = 0

    @classmethod
    def parse(cls, data: bytes) -> "Boot":
        """The content of a boot.json.

        Raises:
            ValueError: it is none, or one of another format.
        """
        value = _parse(data)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("not a boot.json of format 1")
        return cls(_trial(value.get("trial")), _rolled_back(value.get("rolled_back")), _count(value, "unsteady"))

    def to_bytes(self) -> bytes:
        """The file's content."""
        trial = self.trial and {
            "release": self.trial.release,
            "from": self.trial.origin,
            "attempts": self.trial.attempts,
            "limit": self.trial.limit,
            "job": self.trial.job,
        }
        rolled_back = self.rolled_back and {
            "release": self.rolled_back.release,
            "to": self.rolled_back.to,
            "reason": self.rolled_back.reason,
            "attempts": self.rolled_back.attempts,
            "job": self.rolled_back.job,
        }
        value = {"format": FORMAT, "trial": trial, "rolled_back": rolled_back, "unsteady": self.unsteady}
        return json.dumps(value).encode() + b"\n"


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _trial(table: Any) -> Trial | None:
    if table is None:
        return None
    return Trial(
        _name(table, "release"),
        _name(table, "from"),
        _count(table, "attempts"),
        _count(table, "limit"),
        _text(table, "job"),
    )


def _rolled_back(table: Any) -> RolledBack | None:
    if table is None:
        return None
    return RolledBack(
        _name(table, "release"),
        _name(table, "to"),
        _text(table, "reason"),
        _count(table, "attempts"),
        _text(table, "job"),
    )


def _member(table: Any, key: str, kind: type) -> Any:
    if not isinstance(table, dict) or type(table.get(key)) is not kind:
        raise ValueError(f"boot.json: {key} is no {kind.__name__}")
    return table[key]


def _text(table: Any, key: str) -> str:
    text: str = _member(table, key, str)
    return text


def _name(table: Any, key: str) -> str:
    name = _text(table, key)
    if not NAME.fullmatch(name):
        raise ValueError(f"boot.json: {key} names no release")
    return name


def _count(table: Any, key: str) -> int:
    count: int = _member(table, key, int)
    if count < 0:
        raise ValueError(f"boot.json: {key} is negative")
    return count


# --- the decision -------------------------------------------------------------------------------------------------


def pause(boot: Boot) -> float:
    """Seconds to wait before a start, so that a release that dies at once does not wear the unit out.

    A trial never waits: its starts are counted, and soon over.
    """
    return 0.0 if boot.trial else PAUSES[min(max(boot.unsteady - 1, 0), len(PAUSES) - 1)]


class Plan(NamedTuple):
    """What to start, what to write down before, and what to start instead if that cannot be written."""

    release: str
    boot: Boot
    instead: str
    words: str = ""
    safe_mode: bool = False


def age(name: str) -> tuple[list[int], str]:
    """Sorts the names of releases by version."""
    version, _, _ = name.partition("-")
    return [int(number) for number in version.split(".")], name


def decide(
    boot: Boot,
    current: str | None,
    previous: str | None,
    names: Iterable[str],
    intact: Callable[[str], bool],
) -> Plan | None:
    """Which release to start; None when there is none that could be.

    Args:
        boot: the content of boot.json.
        current: the release that the link `current` names, whether it exists or not.
        previous: ... the link `previous`.
        names: all releases there are.
        intact: whether a release looks as if it could be started.
    """
    trial, given_up = boot.trial, boot.rolled_back
    newest = sorted(names, key=age, reverse=True)

    def first(*wanted: str | None, but: str | None = None) -> str | None:
        return next((name for name in (*wanted, *newest) if name and name != but and intact(name)), None)

    if trial and current == trial.release:
        back = first(trial.origin, previous, but=trial.release)
        whole = intact(trial.release)
        if whole and (trial.attempts < trial.limit or not back):
            counted = trial._replace(attempts=trial.attempts + 1)
            words = f"attempt {counted.attempts} of {trial.limit} at the release on trial"
            return Plan(trial.release, boot._replace(trial=counted), back or trial.release, words)
        if back:
            reason = f"did not prove itself in {trial.attempts} starts" if whole else "is not whole on the disk"
            report = RolledBack(trial.release, back, reason, trial.attempts, trial.job)
            words = f"{trial.release} {reason}: back to {back}"
            return _committed(back, boot._replace(trial=None, rolled_back=report), words)
        return None

    if given_up and current == given_up.release and (back := first(given_up.to, previous, but=current)):
        return _committed(back, boot, f"finishing the way back from {current}")

    chosen = first(current, trial.origin if trial else None, previous, but=given_up.release if given_up else None)
    chosen = chosen or first(current)
    if not chosen:
        return None
    words = "" if chosen == current else f"current is {current or 'missing'}, and that cannot be started: {chosen} can"
    return _committed(chosen, boot, words)


def _committed(release: str, boot: Boot, words: str) -> Plan:
    starts = min(boot.unsteady + 1, STEADY_STARTS + 1)  # counted no further, to spare the disk in an endless loop
    return Plan(release, boot._replace(unsteady=starts), release, words, safe_mode=starts > STEADY_STARTS)


# --- the disk -----------------------------------------------------------------------------------------------------


def read_boot(path: Path) -> Boot:
    """The content of boot.json; an empty one when it cannot be read."""
    try:
        return Boot.parse(path.read_bytes())
    except FileNotFoundError:
        return Boot()
    except (OSError, ValueError) as error:
        say(f"{path} is taken for empty: {error}")
        return Boot()


def linked(link: Path) -> str | None:
    """The name of the release that a link points to, whether that is there or not."""
    try:
        folder, _, name = os.readlink(link).rpartition("/")  # noqa: PTH115 - the family of calls below
    except OSError:
        return None
    return name if folder == "releases" and NAME.fullmatch(name) else None


def names(directory: Path) -> list[str]:
    """The releases in a directory, whatever they look like inside."""
    try:
        return [name for name in os.listdir(directory / "releases") if NAME.fullmatch(name)]  # noqa: PTH208
    except OSError:
        return []


def looks_intact(release: Path) -> bool:
    """Whether a release has its two ends: the manifest, which was written first, and the program."""
    try:
        manifest = _parse((release / "manifest.json").read_bytes())
        return isinstance(manifest, dict) and (release / "firmware_agent/__main__.py").is_file()
    except (OSError, ValueError):
        return False


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file: afterwards, whenever the power fails, there is the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # noqa: PTH108
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)  # noqa: PTH105
    sync_directory(path.parent)


def point_durably(link: Path, target: str) -> None:
    """Make a link point elsewhere, in one step."""
    temporary = link.with_name(f".{link.name}.new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # noqa: PTH108
    os.symlink(target, temporary)  # noqa: PTH211
    os.replace(temporary, link)  # noqa: PTH105
    sync_directory(link.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def say(words: str) -> None:
    """One line for the journal; that nobody listens is no reason not to start."""
    with contextlib.suppress(OSError):
        print(f"launcher: {words}", file=sys.stderr, flush=True)  # noqa: T201 - stderr is the journal


def prepare(directory: Path, state: Path) -> Plan | None:
    """Decide, and write down what has to be known before the start; the plan's `release` is then to be started."""
    current = linked(directory / "current")
    boot = read_boot(state / "boot.json")
    plan = decide(
        boot,
        current,
        linked(directory / "previous"),
        names(directory),
        lambda name: looks_intact(directory / "releases" / name),
    )
    if not plan:
        return None
    if plan.words:
        say(plan.words)
    try:
        if plan.boot != boot:
            write_durably(state / "boot.json", plan.boot.to_bytes())
    except OSError as error:
        say(f"cannot write {state / 'boot.json'}: {error}; starting {plan.instead}")
        return plan._replace(release=plan.instead)
    try:
        if plan.release != current:
            point_durably(directory / "current", f"releases/{plan.release}")
    except OSError as error:
        say(f"cannot point {directory / 'current'} to {plan.release}: {error}")
    return plan


def environment(release: Path, library: Path | None, *, safe_mode: bool) -> dict[str, str]:
    """The environment of a release: its own packages come before any other."""
    places = [release, release / "lib", *([library] if library else [])]
    variables = {key: value for key, value in os.environ.items() if key != "PICKET_SAFE_MODE"}
    variables |= {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PICKET_RELEASE": release.name,
    }
    return variables | ({"PICKET_SAFE_MODE": "1"} if safe_mode else {})


def first_of_this_boot(run: Path) -> bool:
    """Whether nothing was started since power-on; to be asked once.

    What was started before then may have ended with the power, and whoever puts the plug back wants no pause.

    Args:
        run: a directory that does not outlive the power.
    """
    try:
        os.close(os.open(run / "launched", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError:  # it is there, or cannot be: then better slowly
        return False
    return True


def start(plan: Plan, directory: Path, library: Path | None, arguments: list[str]) -> NoReturn:
    """Become the agent of the planned release."""
    if plan.safe_mode:
        say(f"{plan.release} was not steady in {STEADY_STARTS} starts: safe mode")
    command = [sys.executable, "-P", "-m", "firmware_agent", *arguments]
    variables = environment(directory / "releases" / plan.release, library, safe_mode=plan.safe_mode)
    if plan.instead != plan.release:  # on trial, and there is one to go back to
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TRIAL_SECONDS)  # it goes on counting over exec
    os.execve(sys.executable, command, variables)  # noqa: S606


class Options(NamedTuple):
    """How the launcher is told where things are.

    Attributes:
        releases, state: directories.
        run: a directory that ends with the power.
        library: packages for releases that bring none themselves.
        no_wait: whoever starts this waits by itself after failures.
    """

    releases: Path = Path("/opt/picket")
    state: Path = Path("/var/lib/picket")
    run: Path = Path("/run/picket")
    library: Path | None = None
    no_wait: bool = False


def _parse_options(arguments: list[str]) -> tuple[Options, list[str]]:
    """The launcher's options, and behind `--` the agent's arguments.

    Raises:
        getopt.GetoptError: one is not known, or lacks its value.
    """
    given, rest = getopt.getopt(arguments, "", ["releases=", "state=", "run=", "library=", "no-wait"])
    places = {name[2:]: Path(value) for name, value in given if value}
    return Options(**places, no_wait=("--no-wait", "") in given), rest


def main(arguments: list[str]) -> int:
    """Start the release in force; returns only if there is none."""
    try:
        options, rest = _parse_options(arguments)
    except getopt.GetoptError as error:
        say(str(error))
        return WRONG_ARGUMENTS
    directory = options.releases.absolute()

    plan = prepare(directory, options.state)
    if plan:
        wait = 0.0 if options.no_wait or first_of_this_boot(options.run) else pause(plan.boot)
        if wait:
            say(f"{plan.release} was not steady: {wait:g} s until it is started again")
            time.sleep(wait)
        start(plan, directory, options.library, rest)
    say(f"there is no whole release in {directory / 'releases'}: write the image anew")
    if not options.no_wait:
        time.sleep(PAUSES[-1])  # a disk that could not be read may be readable then
    return NOTHING_TO_START


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
