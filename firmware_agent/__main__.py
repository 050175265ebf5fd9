"""`picket-agent`: the one place where the agent reads arguments, the environment and signals, and sets exit codes.

Exit codes:
    0   done (provision: the station closed its session; run: stopped by systemd)
    1   a fault of the unit; the message says which (run: it halts here when its TPM is gone, see `Restart` of its unit)
    2   wrong arguments
    3   a mistake in this program: a traceback precedes it
    78  the settings cannot be used (EX_CONFIG of sysexits.h)
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from firmware_agent import __version__
from firmware_agent.board import RaspberryPi
from firmware_agent.errors import AgentFault, SettingsFault
from firmware_agent.settings import DEFAULT_PATH, Settings, load

EXIT_FAULT = 1
EXIT_BUG = 3
EXIT_SETTINGS = 78

EXAMPLES = """\
examples:
  picket-agent banner > /dev/ttyAMA0   say who this unit is until the station answers
  picket-agent provision               answer the station on standard input and output
  echo '{"id":1,"verb":"identify"}' | picket-agent provision
  picket-agent run                     product mode: watch the PIR, raise alarms
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
    verbs.add_parser("version", help="print the agent's version")
    return parser


def _prepare(settings: Settings) -> None:
    """What C libraries read from the environment, set before any of them is loaded."""
    from firmware_agent.keys.tpm_key import environment  # noqa: PLC0415 - not for the banner

    for name, value in environment(settings).items():
        os.environ.setdefault(name, value)
    # lgpio makes its notification pipe here; the current directory may be read-only.
    os.environ.setdefault("LG_WD", str(settings.paths.run))


def _provision(settings: Settings) -> None:
    from firmware_agent.pins import LgpioPins  # noqa: PLC0415 - not for the banner
    from firmware_agent.provisioning import Provisioning  # noqa: PLC0415

    _prepare(settings)
    Provisioning(settings, RaspberryPi(), LgpioPins(settings.pir.lines)).serve(_StandardStreams())


def _banner(settings: Settings) -> None:
    from firmware_agent.banner import repeat  # noqa: PLC0415 - each verb loads its own part

    repeat(settings, RaspberryPi(), sys.stdout)


def _run(settings: Settings) -> None:
    from firmware_agent.pins import LgpioPins  # noqa: PLC0415 - not for the banner
    from firmware_agent.product import Product  # noqa: PLC0415
    from firmware_agent.systemd import Systemd  # noqa: PLC0415

    _prepare(settings)
    systemd = Systemd.from_environment(os.environ)
    product = Product(settings, RaspberryPi(), LgpioPins(settings.pir.lines), notify=systemd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: product.stop())
    try:
        product.start()
        product.join()
    except AgentFault as fault:
        systemd.status(f"halted: {fault}")
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and give its exit code."""
    options = _parser().parse_args(arguments)
    if options.verb == "version":
        print(__version__)  # noqa: T201 - its whole purpose
        return 0
    verb = {"provision": _provision, "banner": _banner, "run": _run}[options.verb]
    try:
        verb(load(options.settings))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SettingsFault as fault:
        print(f"picket-agent: {fault}", file=sys.stderr)  # noqa: T201 - the journal reads standard error
        return EXIT_SETTINGS
    except AgentFault as fault:
        print(f"picket-agent: {fault.code}: {fault}", file=sys.stderr)  # noqa: T201
        return EXIT_FAULT
    except Exception:  # noqa: BLE001 - the last stop
        traceback.print_exc()
        return EXIT_BUG
    return 0


if __name__ == "__main__":
    sys.exit(main())
