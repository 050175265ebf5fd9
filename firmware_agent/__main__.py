"""`picket-agent`: the one place where the agent reads arguments, the environment and signals, and sets exit codes.

Exit codes:
    0   done (provision: the station closed its session; run: stopped by systemd)
    1   a fault of the unit; the message says which
    2   wrong arguments
    3   a mistake in this program: a traceback precedes it
    4   run: halted, because the device key is gone (no TPM where one is configured, a key that cannot be used)
    5   run: another release is in force now; to be started again at once
    78  the settings cannot be used (EX_CONFIG of sysexits.h); run: not even in safe mode, with what can be read of them
"""

import argparse
import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from firmware_agent import __version__
from firmware_agent.board import RaspberryPi
from firmware_agent.errors import AgentFault, KeyFault, NoTpm, SettingsFault
from firmware_agent.settings import DEFAULT_PATH, Settings, load, salvage

if TYPE_CHECKING:
    from firmware_agent.product import Product

EXIT_FAULT = 1
EXIT_BUG = 3
EXIT_HALTED = 4
EXIT_RESTART = 5
EXIT_SETTINGS = 78

EXAMPLES = """\
examples:
  picket-agent banner > /dev/ttyAMA0   say who this unit is until the station answers
  picket-agent provision               answer the station on standard input and output
  echo '{"id":1,"verb":"identify"}' | picket-agent provision
  picket-agent run                     product mode: watch the PIR, raise alarms
  picket-agent status                  say how this unit is
"""


class _StandardStreams:
    """Standard input and output as one stream of the wire."""

    def readline(self, limit: int = -1, /) -> bytes:
        return sys.stdin.buffer.readline(limit)

    def write(self, data: bytes, /) -> None:
        sys.stdout.buffer.write(data)

    def flush(self) -> None:
        sys.stdout.buffer.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="picket-agent",
        description="The firmware agent of a Picket unit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--settings", type=Path, default=DEFAULT_PATH, metavar="FILE", help="default: %(default)s")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("provision", help="answer the station's verbs on standard input and output (factory mode)")
    verbs.add_parser("banner", help="say the factory banner on standard output until the station answers")
    verbs.add_parser("run", help="product mode")
    verbs.add_parser("clock", help="set the clock by the cloud's endpoint, if no time server has done so")
    status = verbs.add_parser("status", help="say how this unit is, whether its agent runs or not")
    status.add_argument("--json", action="store_true", help="for programs")
    verbs.add_parser("version", help="print the agent's version")
    return parser


def _prepare(settings: Settings) -> None:
    """What C libraries read from the environment, set before any of them is loaded."""
    from firmware_agent.keys.tpm import environment  # noqa: PLC0415 - not for the banner

    for name, value in environment(settings).items():
        os.environ.setdefault(name, value)
    # lgpio makes its notification pipe here; the current directory may be read-only.
    os.environ.setdefault("LG_WD", str(settings.paths.run))


def _provision(settings: Settings) -> None:
    from firmware_agent.pins import open_pins  # noqa: PLC0415 - not for the banner
    from firmware_agent.provisioning import Provisioning  # noqa: PLC0415

    _prepare(settings)
    Provisioning(settings, RaspberryPi(settings.paths.board), open_pins(settings)).serve(_StandardStreams())


def _banner(settings: Settings) -> None:
    from firmware_agent.banner import repeat  # noqa: PLC0415 - each verb loads its own part

    repeat(settings, RaspberryPi(settings.paths.board), sys.stdout)


def _clock(settings: Settings) -> None:
    from firmware_agent import https_clock  # noqa: PLC0415 - each verb loads its own part

    print(https_clock.run(settings, RaspberryPi(settings.paths.board)))  # noqa: T201 - for the journal


def _run(path: Path) -> int:
    from firmware_agent import log  # noqa: PLC0415 - each verb loads its own part
    from firmware_agent.pins import open_pins  # noqa: PLC0415
    from firmware_agent.product import Product  # noqa: PLC0415
    from firmware_agent.systemd import Systemd  # noqa: PLC0415

    settings, broken = _load_leniently(path)
    safe_mode = None if broken is None else str(broken)
    if safe_mode is None and os.environ.get("PICKET_SAFE_MODE") == "1":
        safe_mode = "the agent did not stay up"
    _prepare(settings)
    board = RaspberryPi(settings.paths.board)
    complaints = log.Complaints(board.uptime)
    log.set_up(sys.stderr, complaints)
    if safe_mode is not None:
        logging.getLogger(__name__).error("safe mode: %s", safe_mode)
    systemd = Systemd.from_environment(os.environ)
    product = Product(
        settings,
        board,
        open_pins(settings),
        notify=systemd,
        release=os.environ.get("PICKET_RELEASE"),
        safe_mode=safe_mode,
        complaints=complaints,
    )
    # A SimpleQueue, because it may be filled from a signal handler; an Event may not (its lock is not re-entrant).
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ended.put(None))
    try:
        product.start()
    except AgentFault as fault:
        systemd.status(f"halted: {fault}")
        if broken is not None:  # what the settings would have said may be what is missing
            raise broken from fault
        raise
    waiter = threading.Thread(target=_end_with, args=(product, ended), daemon=True)
    waiter.start()
    ended.get()
    product.stop()
    waiter.join()
    if product.failure is not None:
        raise product.failure
    return product.exit_code


def _load_leniently(path: Path) -> tuple[Settings, SettingsFault | None]:
    """The settings, or what can be used of them and what is wrong with the rest."""
    try:
        return load(path), None
    except SettingsFault as fault:
        return salvage(path), fault


def _status(path: Path, *, as_json: bool) -> int:
    from firmware_agent import status  # noqa: PLC0415 - each verb loads its own part

    settings, broken = _load_leniently(path)
    if broken is not None:
        _complain(str(broken))
    document = status.collect(settings, RaspberryPi(settings.paths.board))
    print(json.dumps(document) if as_json else status.words(document), end="\n" if as_json else "")  # noqa: T201
    return 0


def _end_with(product: "Product", ended: "queue.SimpleQueue[None]") -> None:
    """Tell when the product has ended by itself."""
    with contextlib.suppress(BaseException):  # the main thread asks for `product.failure`
        product.join()
    ended.put(None)


def _complain(message: str) -> None:
    print(f"picket-agent: {message}", file=sys.stderr)  # noqa: T201 - the journal reads standard error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and give its exit code."""
    options = _parser().parse_args(arguments)
    if options.verb == "version":
        print(__version__)  # noqa: T201 - its whole purpose
        return 0
    code = 0
    try:
        if options.verb == "run":
            code = _run(options.settings)
        elif options.verb == "status":
            code = _status(options.settings, as_json=options.json)
        else:
            verb = {"provision": _provision, "banner": _banner, "clock": _clock}[options.verb]
            verb(load(options.settings))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SettingsFault as fault:
        _complain(str(fault))
        code = EXIT_SETTINGS
    except (NoTpm, KeyFault) as fault:
        _complain(f"halted: {fault.code}: {fault}")
        code = EXIT_HALTED
    except AgentFault as fault:
        _complain(f"{fault.code}: {fault}")
        code = EXIT_FAULT
    except Exception:  # noqa: BLE001 - the last stop
        traceback.print_exc()
        code = EXIT_BUG
    return code


if __name__ == "__main__":
    sys.exit(main())
