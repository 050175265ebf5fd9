"""`python -m cloud fleet`: ship a release, watch it, stop it, take it back; and ask single things of units.

    fleet release [VERSION]    sign what `make release` built for the canaries; upload the update repository
    fleet ring RING SERIAL...  which units are canaries
    fleet canary VERSION       bring it to the canaries
    fleet promote VERSION      stage it for all units, for two holders to sign
    fleet rollout VERSION      bring it to all units, slowly, once the canaries have run it for long enough
    fleet status               how far it is, and why units failed
    fleet abort                stop it
    fleet rollback VERSION     bring an older release to the ring
    fleet units                who has what
    fleet job OPERATION        self-test, collect-logs, reboot, rotate-certificate, configure
    fleet logs SERIAL          what a unit has uploaded

What ships releases of the agent ships whole images with --os: release, canary, promote, rollout, rollback, units.

Every command takes --json, and does the same again when it is run twice.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from cloud import fleet_screen, rollout
from cloud.ceremony import DEFAULT_REPOSITORY, PassphraseFile, RepositoryPath, load_signers
from cloud.errors import NotYet
from cloud.fleet import Fleet, Started
from cloud.fleet_screen import count
from cloud.local.endpoint import DEFAULT_STATE
from cloud.repository import Release, Repository, canary_role
from cloud.rollout import Abort, Kind, Operation, Plan, Rate, Ring
from cloud.target import open_target

app = typer.Typer(
    help="The fleet: ship releases, watch them, stop them, take them back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

#: Where `make release` puts a release.
RELEASES = Path("build/releases")

#: Where `make image` puts an image and its bundle.
IMAGES = Path("build/image")

#: How often --watch looks.
WATCH_SECONDS = 2.0


def _target(name: str) -> str:
    if name not in {"local", "aws"}:
        raise typer.BadParameter(f"no cloud is called {name!r}: say local or aws")
    return name


TargetName = Annotated[str, typer.Option("--target", help="local or aws.", callback=_target)]
State = Annotated[Path, typer.Option("--state", help="Where the local cloud keeps its state.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for scripts.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: this reaches units in people's homes.")]
Version = Annotated[str, typer.Argument(help="The release's version, e.g. 1.2.0.")]
Os = Annotated[bool, typer.Option("--os", help="An image's, for units with two slots; not the agent's.")]
Windows = Annotated[
    list[str] | None,
    typer.Option("--window", help="Only then, UTC: 02:00-05:00, or Mon-Fri 22:30-04:00. May be repeated."),
]
Timeout = Annotated[str, typer.Option(help="A unit that is at it for longer has failed, e.g. 12h.")]
Retries = Annotated[int, typer.Option(help="How often a unit whose update failed tries again.", min=0, max=10)]
AbortPercent = Annotated[
    float | None, typer.Option(help="Stop when this share of the finished units failed.", min=0.1, max=100)
]
AbortAfter = Annotated[int | None, typer.Option(help="Judge that after so many finished units.", min=1)]


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def _parsed(parse: Callable[[str], Any], text: str, option: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _open(target: str, state: Path) -> Fleet:
    return Fleet(open_target(target, state))


def _sure(question: str, *, yes: bool) -> None:
    """Ask before something reaches the main ring.

    Raises:
        typer.Exit: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to be asked: say --yes", param_hint="--yes")
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)


def _now() -> datetime:
    return datetime.now(UTC)


# --- releases ------------------------------------------------------------------------------------------------------


@app.command()
def release(
    version: Annotated[
        str | None, typer.Argument(help="What `make release` or `make image` built; leave out to upload only.")
    ] = None,
    keys: Annotated[
        list[Path] | None, typer.Option("--keys", help="Directories of the builder's and the online keys.")
    ] = None,
    releases: Annotated[
        Path | None,
        typer.Option(help=f"Where they lie by version; else {RELEASES}, with --os {IMAGES}.", show_default=False),
    ] = None,
    description: Annotated[
        Path | None, typer.Option(help="The release.json itself, if it lies elsewhere.", show_default=False)
    ] = None,
    passphrase_file: PassphraseFile = None,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    image: Os = False,
    as_json: AsJson = False,
) -> None:
    """Sign a release for the canaries, and upload the update repository to where units fetch it.

    Example: python -m cloud fleet release 1.2.0 --keys build/updates/keys/builder --keys build/updates/keys/online
    """
    fleet, repo, kind = _open(target, state), Repository(repository), _kind(image=image)
    if description is not None and version is None:
        raise typer.BadParameter("say the VERSION that it describes, too", param_hint="--description")
    if version is not None and version not in _listed(repo, kind)[Ring.CANARY]:
        folder = f"{repo.product}-{version}" if image else version
        found = description or (releases or (IMAGES if image else RELEASES)) / folder / "release.json"
        repo.add(found, Ring.CANARY, version=version, kind=kind)
    if keys:
        _sign_and_publish(repo, keys, passphrase_file)
    if version is not None and version not in _listed(repo, kind)[Ring.CANARY]:
        missing = "; ".join(str(repo.signing(role)) for role in repo.staged_roles())
        raise NotYet(
            f"{version} is staged but not in force: {missing}. Give the builder's and the online keys by --keys, or"
            " `python -m cloud keys sign`, then `python -m cloud keys publish`"
        )
    done = fleet.upload(repo)
    if as_json:
        _print(
            {
                "new": done.new,
                "kept": done.kept,
                "releases": _listed(repo, Kind.AGENT),
                "images": _listed(repo, Kind.OS),
            }
        )
        return
    _say(f"{count(len(done.new), 'file')} uploaded, {done.kept} were there.")
    for each in Kind:
        if each is Kind.AGENT or repo.releases(kind=each):
            what = "Images signed" if each is Kind.OS else "Signed"
            canaries, all_units = (", ".join(_listed(repo, each)[ring]) or "none" for ring in (Ring.CANARY, Ring.MAIN))
            _say(f"{what} for canaries: {canaries}; for all units: {all_units}.")


def _sign_and_publish(repo: Repository, keys: Sequence[Path], passphrase_file: Path | None) -> None:
    """Put in force what these keys, with the signatures that are there, suffice for."""
    signers = load_signers(keys, passphrase_file)
    for role in repo.staged_roles():
        if role == canary_role(repo.product):  # what holders sign, they sign knowingly, by `keys sign`
            repo.sign(role, signers)
    if any(not repo.signing(role).missing for role in repo.staged_roles()):
        repo.publish(signers)


def _listed(repo: Repository, kind: Kind) -> dict[str, list[str]]:
    return {ring: [each.version for each in repo.releases(ring, kind)] for ring in Ring}


def _kind(*, image: bool) -> Kind:
    return Kind.OS if image else Kind.AGENT


@app.command(epilog="Example:  python -m cloud fleet promote 1.2.0")
def promote(
    version: Version,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    *,
    image: Os = False,
    as_json: AsJson = False,
) -> None:
    """Stage the canaries' release for all units: the same bits. Two holders sign it, then it is in force."""
    repo, kind = Repository(repository), _kind(image=image)
    if version not in _listed(repo, kind)[Ring.MAIN]:
        repo.promote(version, kind)
    waiting = [repo.signing(role) for role in repo.staged_roles()]
    if as_json:
        _print({"version": version, "staged": [asdict(each) for each in waiting]})
        return
    for each in waiting:
        _say(f"staged: {each}")
    if waiting:
        _say("Next: two holders `python -m cloud keys sign --keys DIR`; then, with the online keys,")
        _say("`python -m cloud keys publish --keys DIR` and `python -m cloud fleet release`.")
    else:
        _say(f"{version} is signed for all units.")


# --- rings ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  python -m cloud fleet ring canary PK-000001 PK-000002")
def ring(
    which: Annotated[Ring, typer.Argument(help="canary or main.")],
    serials: Annotated[list[str], typer.Argument(help="The units that it shall have.")],
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    as_json: AsJson = False,
) -> None:
    """Move units into a ring. A canary is one for the fleet by this, and for itself by what two holders signed."""
    fleet = _open(target, state)
    fleet.move(which, serials)
    members = fleet.members(Ring.CANARY)
    unsigned = _unsigned(repository, members)
    if as_json:
        _print({"ring": which, "moved": serials, "canaries": members, "unsigned": unsigned})
        return
    _say(f"{', '.join(serials)}: now in the {which} ring.")
    if unsigned:
        _say(f"{', '.join(unsigned)} will refuse canaries' releases until two holders have signed that:")
        _say(f"`python -m cloud keys canaries {' '.join(members)}`, `keys sign`, `keys publish`, `fleet release`.")


def _unsigned(repository: Path, members: Sequence[str]) -> list[str]:
    """The canaries that the signed metadata does not name."""
    if not (repository / "metadata").exists():
        return list(members)
    return sorted(set(members) - set(Repository(repository).canaries()))


@app.command(epilog="Example:  python -m cloud fleet units --ring canary")
def units(
    which: Annotated[Ring | None, typer.Option("--ring", help="Only this ring.")] = None,
    version: Annotated[str | None, typer.Option(help="Only units that report this version.")] = None,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    image: Os = False,
    as_json: AsJson = False,
) -> None:
    """Who is in which ring, and what each said on its last connection."""
    found = _open(target, state).units(Ring if which is None else (which,))
    found = [unit for unit in found if version is None or unit.runs(_kind(image=image)) == version]
    if as_json:
        _print([asdict(unit) for unit in found])
    else:
        Console().print(fleet_screen.units(found))


# --- rollouts ------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  python -m cloud fleet canary 1.2.0")
def canary(
    version: Version,
    timeout: Timeout = "12h",
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    image: Os = False,
    as_json: AsJson = False,
) -> None:
    """Bring a release to the canaries, all at once; it stops at the first failure."""
    fleet, repo = _open(target, state), Repository(repository)
    found = fleet.release(repo, Ring.CANARY, version, _kind(image=image))
    members = fleet.members(Ring.CANARY)
    if not members:
        raise NotYet("nobody is in the canary ring: `python -m cloud fleet ring canary SERIAL`")
    if unsigned := _unsigned(repository, members):
        raise NotYet(
            f"{', '.join(unsigned)} would refuse it, as nobody signed that they are canaries:"
            f" `python -m cloud keys canaries {' '.join(members)}`, `keys sign`, `keys publish`, `fleet release`"
        )
    plan = Plan(
        rate=None,
        abort=rollout.default_abort(Ring.CANARY, len(members)),
        retries=0,
        timeout=_parsed(rollout.parse_duration, timeout, "--timeout"),
    )
    _start(fleet, Ring.CANARY, found, plan, as_json=as_json)


@app.command("rollout", epilog="Example:  python -m cloud fleet rollout 1.2.0 --soak 24h")
def roll_out(
    version: Version,
    soak: Annotated[str, typer.Option(help="How long the canaries must have run it, e.g. 24h.")] = "24h",
    base: Annotated[int | None, typer.Option(help="Units in the first minute.", min=1, max=1000)] = None,
    factor: Annotated[float, typer.Option(help="How the rate grows.", min=1.1, max=5)] = 2.0,
    step: Annotated[int | None, typer.Option(help="Successes after which it grows.", min=1)] = None,
    maximum: Annotated[int | None, typer.Option(help="Units a minute at most.", min=1, max=1000)] = None,
    abort_percent: AbortPercent = None,
    abort_after: AbortAfter = None,
    retries: Retries = 1,
    timeout: Timeout = "12h",
    window: Windows = None,
    start: Annotated[
        datetime | None, typer.Option(help="Not before this moment, half an hour from now at least.")
    ] = None,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    image: Os = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Bring a release to all units, slowly at first; it stops by itself when too many fail.

    It refuses a release that the canaries have not run for --soak.
    """
    fleet, repo = _open(target, state), Repository(repository)
    kind = _kind(image=image)
    found = fleet.release(repo, Ring.MAIN, version, kind)
    verdict = fleet.soak(repo, version, _parsed(rollout.parse_duration, soak, "--soak"), _now(), kind)
    if not verdict.ready:
        raise NotYet(
            f"{version} must not go to all units yet: {verdict.sentence}."
            " See `python -m cloud fleet status`; what brings it to the canaries is"
            f" `python -m cloud fleet canary {version}{' --os' if image else ''}`"
        )
    members = fleet.members(Ring.MAIN)
    usual = rollout.default_rate(len(members))
    stop = rollout.default_abort(Ring.MAIN, len(members))
    first = base or usual.base
    rate = Rate(first, factor, step or 2 * first, max(maximum or usual.maximum, first))
    plan = Plan(
        rate=rate,
        abort=Abort(abort_percent or stop.percent, abort_after or stop.after),
        retries=retries,
        timeout=_parsed(rollout.parse_duration, timeout, "--timeout"),
        windows=tuple(_parsed(rollout.parse_window, each, "--window") for each in window or ()),
        start=None if start is None else start.astimezone(UTC),
    )
    _say(f"{verdict.sentence}.")
    _say(_explain(plan, rate, len(members)))
    _sure(f"Bring {version} to {count(len(members), 'unit')}?", yes=yes)
    _start(fleet, Ring.MAIN, found, plan, as_json=as_json)


def _explain(plan: Plan, rate: Rate, members: int) -> str:
    if not members:
        return "Nobody is in the main ring now; units that join it later get the release."
    return (
        f"{count(rate.base, 'unit')} in the first minute, {rate.factor} times as many after each {rate.step} successes,"
        f" at most {rate.maximum}: all {members} in {count(rate.minutes(members), 'minute')} at the soonest."
        f" It stops at {plan.abort.percent:g} % failures, once {plan.abort.after} are finished."
    )


@app.command(epilog="Example:  python -m cloud fleet rollback 1.1.0 --ring main")
def rollback(
    version: Version,
    which: Annotated[Ring, typer.Option("--ring", help="The ring that goes back.")] = Ring.MAIN,
    timeout: Timeout = "12h",
    retries: Retries = 1,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    image: Os = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Bring an older release to a ring, as fast as AWS can. It must still be listed, and not be below the floor."""
    fleet, repo = _open(target, state), Repository(repository)
    kind = _kind(image=image)
    found = fleet.release(repo, which, version, kind)
    lowest = fleet.lowest(repo, which, kind)
    if found.security_version < lowest:
        raise NotYet(
            f"units refuse {version}: its security version is {found.security_version}, and units that run what the"
            f" {which} ring runs never go below {lowest}. Build a release with the old behaviour and a new version"
        )
    members = fleet.members(which)
    plan = Plan(
        rate=None,
        abort=rollout.default_abort(Ring.MAIN, len(members)),
        retries=retries,
        timeout=_parsed(rollout.parse_duration, timeout, "--timeout"),
    )
    if which is Ring.MAIN:
        _sure(f"Bring {count(len(members), 'unit')} back to {version}?", yes=yes)
    _start(fleet, which, found, plan, as_json=as_json)


def _start(fleet: Fleet, which: Ring, found: Release, plan: Plan, *, as_json: bool) -> None:
    try:
        started = fleet.start_update(which, found, plan, _now())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _tell(
        started, f"{'image ' if found.kind == Kind.OS else ''}{found.version} goes to the {which} ring", as_json=as_json
    )


def _tell(started: Started, what: str, *, as_json: bool) -> None:
    if as_json:
        _print(asdict(started))
        return
    if started.found:
        _say(f"{what} already, as {started.job} says; nothing was changed.")
    else:
        _say(f"{what}: {started.job}.")
    for job in started.replaced:
        _say(f"It takes the place of {job}.")
    _say("Watch it: `python -m cloud fleet status --watch`. Stop it: `python -m cloud fleet abort`.")


@app.command(epilog="Example:  python -m cloud fleet status --watch")
def status(
    job: Annotated[str | None, typer.Argument(help="Only this job.")] = None,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until everything rests.")] = False,
    as_json: AsJson = False,
) -> None:
    """How far the rollouts are, why units failed, and what the rings run."""
    fleet = _open(target, state)
    look = functools.partial(_look, fleet, job)
    if watch:
        _watch(look, as_json=as_json)
        return
    shown, value, _ = look()
    if as_json:
        _print(value)
    else:
        Console().print(shown)


def _look(fleet: Fleet, job: str | None) -> tuple[Any, Any, bool]:
    """What to show, the same for scripts, and whether more is to come."""
    if job is not None:
        found = fleet.progress(job)
        return fleet_screen.progress(found), asdict(found), found.status in rollout.ACTIVE and found.summary.open > 0
    rings = fleet.status()
    going = any(each.status in rollout.ACTIVE and each.summary.open for ring in rings for each in ring.updates)
    return fleet_screen.rings(rings), {"rings": [asdict(ring) for ring in rings]}, going


def _watch(look: Callable[[], tuple[Any, Any, bool]], *, as_json: bool) -> None:
    shown, value, going = look()
    if as_json:
        _print(value)
        while going:
            time.sleep(WATCH_SECONDS)
            _, value, going = look()
            _print(value)
        return
    with Live(shown, auto_refresh=False) as live:
        while going:
            time.sleep(WATCH_SECONDS)
            shown, _, going = look()
            live.update(shown, refresh=True)


@app.command(epilog="Example:  python -m cloud fleet abort --ring main")
def abort(
    which: Annotated[Ring | None, typer.Option("--ring", help="Only this ring's.")] = None,
    job: Annotated[str | None, typer.Option(help="Only this job, of whatever kind.")] = None,
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also for units that are at work on it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop rollouts at once. Units that have the release keep it; see `fleet rollback`."""
    fleet = _open(target, state)
    if job is not None:
        jobs = [job]
    else:
        jobs = [each.name for one in (Ring if which is None else (which,)) for each in fleet.active_updates(one)]
    for each in jobs:
        fleet.cancel(each, force=force)
    if as_json:
        _print({"aborted": jobs})
    elif jobs:
        _say(f"Stopped: {', '.join(jobs)}.")
        if not force:
            _say("Units that are at work on it finish; --force stops them too.")
    else:
        _say("No rollout is at work.")


# --- single things -------------------------------------------------------------------------------------------------


@app.command("job", epilog="Example:  python -m cloud fleet job collect-logs --unit PK-000001")
def operation(
    what: Annotated[Operation, typer.Argument(help="What the units shall do.")],
    unit: Annotated[str | None, typer.Option(help="The unit's serial.")] = None,
    which: Annotated[Ring | None, typer.Option("--ring", help="All units of a ring, as it is now.")] = None,
    tuning: Annotated[
        str | None, typer.Option(help="For configure: the settings as JSON, '{\"quiet_seconds\": 60}'.")
    ] = None,
    timeout: Timeout = "1h",
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Ask a unit, or all of a ring, for a self-test, its logs, a restart, a new key, or other settings."""
    if (unit is None) == (which is None):
        raise typer.BadParameter("say --unit SERIAL or --ring RING", param_hint="--unit")
    settings = _settings(what, tuning)
    fleet = _open(target, state)
    where: Ring | str = which or str(unit)
    members = len(fleet.members(which)) if which else 1
    plan = Plan(
        rate=rollout.default_rate(members) if which else None,
        abort=rollout.default_abort(Ring.MAIN, members),
        retries=0,
        timeout=_parsed(rollout.parse_duration, timeout, "--timeout"),
    )
    if which is Ring.MAIN:
        _sure(f"Ask {count(members, 'unit')} for {what}?", yes=yes)
    try:
        started = fleet.start_operation(what, where, plan, _now(), settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        _print(asdict(started))
        return
    _say(f"{what}, {where}: {'asked already, ' if started.found else ''}{started.job}.")
    _say(f"How it went: `python -m cloud fleet status {started.job}`.")
    if what == "collect-logs" and unit:
        _say(f"The logs, when it is done: `python -m cloud fleet logs {unit}`.")


def _settings(what: str, tuning: str | None) -> dict[str, Any] | None:
    if (what == "configure") != (tuning is not None):
        raise typer.BadParameter("--tuning goes with configure, and configure with --tuning", param_hint="--tuning")
    if tuning is None:
        return None
    try:
        found = json.loads(tuning)
    except ValueError as error:
        raise typer.BadParameter(f"no JSON: {error}", param_hint="--tuning") from None
    if not isinstance(found, dict) or not found:
        raise typer.BadParameter("name at least one setting in a JSON object", param_hint="--tuning")
    return found


@app.command(epilog="Example:  python -m cloud fleet logs PK-000001")
def logs(
    serial: Annotated[str, typer.Argument(help="The unit's serial.")],
    into: Annotated[Path, typer.Option(help="Where they are put.")] = Path("build/logs"),
    target: TargetName = "local",
    state: State = DEFAULT_STATE,
    *,
    as_json: AsJson = False,
) -> None:
    """Fetch what a unit has uploaded for collect-logs."""
    found = _open(target, state).logs(serial, into)
    if as_json:
        _print([str(path) for path in found])
        return
    for path in found:
        sys.stdout.write(f"{path}\n")
    if not found:
        _say(f"{serial} has uploaded nothing: `python -m cloud fleet job collect-logs --unit {serial}`.")
