"""The cloud's command line: `python -m cloud up|down|deploy|doctor|sms|keys|fleet`.

Exit codes: 0 done, 2 a mistake on the command line, 3 the cloud or the keys cannot be used, a release must not go out
like this, or the doctor found the cloud wanting, 130 stopped by Ctrl-C.
"""

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cloud import ceremony, fleet_commands, stack
from cloud.doctor import examine
from cloud.errors import CloudError, NoSuchName
from cloud.local import launcher
from cloud.local.endpoint import DEFAULT_MQTT_PORT, DEFAULT_PORT, DEFAULT_STATE
from cloud.target import local_target, open_target

app = typer.Typer(
    help="The fleet's side: the local cloud, and the stack in it or in AWS.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(ceremony.app, name="keys")
app.add_typer(fleet_commands.app, name="fleet")

State = Annotated[Path, typer.Option("--state", help="Where the local cloud keeps its state.")]
Port = Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for any free one.", min=0, max=65535)]


def _known(name: str) -> str:
    if name not in {"local", "aws"}:
        raise typer.BadParameter(f"no cloud is called {name!r}: say local or aws")
    return name


TargetName = Annotated[str, typer.Option("--target", help="local or aws.", callback=_known)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for scripts.")]


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)  # commands stay whole, to be copied


@app.command(epilog="Example:  python -m cloud up")
def up(
    state: State = DEFAULT_STATE,
    port: Port = DEFAULT_PORT,
    mqtt_port: Port = DEFAULT_MQTT_PORT,
    *,
    as_json: AsJson = False,
) -> None:
    """Start the local cloud, or say where it runs already."""
    endpoint = launcher.up(state, port=port, mqtt_port=mqtt_port)
    if as_json:
        _print(json.dumps(asdict(endpoint)))
    else:
        _say(f"The local cloud runs: {endpoint.url}, MQTT on {endpoint.mqtt_host}:{endpoint.mqtt_port}.")
        _say(f"Next: `python -m cloud deploy`. Stop it by `python -m cloud down`. Log: {state / 'log'}")


@app.command(epilog="Example:  python -m cloud down")
def down(state: State = DEFAULT_STATE) -> None:
    """Stop the local cloud; its state stays for the next start."""
    _say("The local cloud is stopped." if launcher.down(state) else "No local cloud was running.")


@app.command(epilog="Example:  python -m cloud deploy --target aws")
def deploy(target: TargetName = "local", state: State = DEFAULT_STATE, *, as_json: AsJson = False) -> None:
    """Deploy the stack: rules, functions, table, policies."""
    where = open_target(target, state)
    with Console(stderr=True).status("deploying") as status:

        def progress(sentence: str) -> None:
            status.update(sentence)
            if not status._live.console.is_terminal:  # noqa: SLF001 - a log wants the lines that a terminal animates
                _say(sentence)

        done = stack.deploy(where, progress)
    if as_json:
        _print(json.dumps({"target": target, "changed": done.changed, "outputs": dict(done.outputs)}))
        return
    table = Table("output", "value", title=f"{where.stack} on {target}" + ("" if done.changed else " (unchanged)"))
    for name, value in sorted(done.outputs.items()):
        table.add_row(name, value)
    Console().print(table)


@app.command(epilog="Example:  python -m cloud sms --since 2026-11-21T22:00")
def sms(
    since: Annotated[datetime | None, typer.Option(help="Only texts from this moment on (ISO 8601).")] = None,
    state: State = DEFAULT_STATE,
    *,
    as_json: AsJson = False,
) -> None:
    """The text messages that the local cloud would have sent."""
    endpoint = local_target(state).local
    assert endpoint is not None  # noqa: S101 - the local target has one
    messages = launcher.sms(endpoint, since.astimezone() if since else None)
    if as_json:
        _print(json.dumps([{"to": m.to, "text": m.text, "at": m.at.isoformat()} for m in messages]))
        return
    for message in messages:
        _print(f"{message.at.astimezone():%H:%M:%S}  {message.to}  {message.text}")
    if not messages:
        _say("No text message yet.")


@app.command(epilog="Example:  python -m cloud doctor --json")
def doctor(target: TargetName = "local", state: State = DEFAULT_STATE, *, as_json: AsJson = False) -> None:
    """Prove by real connections that good units get in and nothing else does."""
    where = open_target(target, state)
    with Console(stderr=True).status("examining") as status:
        checks = examine(where, status.update)
    if as_json:
        _print(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            _print(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.sentence}")
    if not all(check.passed for check in checks):
        raise typer.Exit(3)


def main() -> None:
    """Run the command line; the one place where an error of the cloud becomes an exit code."""
    try:
        app()
    except (CloudError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(2 if isinstance(error, NoSuchName) else 3)


if __name__ == "__main__":
    main()
