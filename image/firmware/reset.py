"""What a board keeps from one start to the next: the argument of `reboot`, in a register that a reset leaves alone.

A Pi keeps partition and tryboot flag in PM_RSTS, a register of the SoC; a loss of power clears it (raspberrypi.com
documentation, "Fail-safe OS updates (tryboot)": boards that reset their supply keep the flag in the EEPROM instead,
because the supply's reset would lose it). The flag is cleared before the kernel starts.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: PM_RSTS has room for six bits; from 32 on a number has no partition's meaning.
LAST_PARTITION = 31


@dataclass(frozen=True)
class Reset:
    """How a board was told to start: the partition (0: the default one) and whether it is one try.

    Raises:
        ValueError: there is no such partition number.
    """

    partition: int = 0
    tryboot: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.partition <= LAST_PARTITION:
            raise ValueError(f"a partition to reboot to is one of 0 to {LAST_PARTITION}, not {self.partition}")


class ResetRegister:
    """The register, in a small file that is written whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Reset:
        """What it holds; a file that is absent or damaged is a register after a loss of power."""
        try:
            value = json.loads(self._path.read_bytes())
            return Reset(int(value["partition"]), value["tryboot"] is True)
        except (OSError, ValueError, KeyError, TypeError):
            return Reset()

    def set(self, reset: Reset) -> None:
        """Keep it; durable when this returns."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        with temporary.open("w") as file:
            json.dump({"partition": reset.partition, "tryboot": reset.tryboot}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._sync()

    def take(self) -> Reset:
        """What it holds; then it is empty: a start that goes wrong leads back to the default."""
        reset = self.read()
        self.clear()
        return reset

    def clear(self) -> None:
        """As after a loss of power."""
        with suppress(FileNotFoundError):
            self._path.unlink()
            self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
