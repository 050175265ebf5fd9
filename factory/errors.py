"""What can go wrong on the line, by who must act.

    FactoryError
      +- UnitFault      the unit's: repair it or scrap it           outcome fail    exit 1
      +- StationFault   the station's: stop the line, mend it       outcome error   exit 3
      |    +- LinkFault     a cable, a port, a unit that went silent
      |    +- SignerFault   the signing CA: missing, expired, not the one registered
      |    +- CloudFault    the cloud: unreachable or set up wrongly
      +- UserMistake    the command's: ask for something else       no run opened   exit 2

Every error says what happened, and in `advice` what to do next. Which unit it was, the journal knows.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command of the station returns to the shell."""

    PASS = 0
    UNIT_FAILED = 1
    USER_MISTAKE = 2
    STATION_FAULT = 3
    ABORTED = 130


class FactoryError(Exception):
    """Anything that ends a run or keeps it from starting."""

    exit_code = ExitCode.STATION_FAULT

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class UnitFault(FactoryError):
    """The unit is at fault; the next unit may well pass."""

    exit_code = ExitCode.UNIT_FAILED


class StationFault(FactoryError):
    """The station is at fault; no unit will pass until it is mended."""


class LinkFault(StationFault):
    """The way to the unit is broken: a cable, a port, or a unit that went silent in the middle."""


class SignerFault(StationFault):
    """The signing CA cannot sign: missing, expired, or not the one that the cloud trusts."""


class CloudFault(StationFault):
    """The cloud cannot be reached, or is not set up as the line needs it."""


class UserMistake(FactoryError):
    """What was asked cannot be done as asked; nothing was touched."""

    exit_code = ExitCode.USER_MISTAKE
