"""The product's limits, from TOML: what the line expects of a good unit. The device only reports values."""

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from factory.errors import UserMistake
from factory.record import Limits


@dataclass(frozen=True)
class ProductLimits:
    """Limits of every measurement that the line takes."""

    temperature_c: Limits
    disk_free_mib: Limits
    memory_free_mib: Limits
    pir_baseline_edges: Limits
    pir_latency_s: Limits
    pir_hold_s: Limits
    connect_attempts: Limits


DEFAULT = Path(__file__).with_name("limits.toml")


def load_limits(path: Path = DEFAULT) -> ProductLimits:
    """The limits in a TOML file: one table per measurement, `low` or `high` or both.

    Raises:
        UserMistake: a measurement has no limits, a table is unknown, or a limit is no number, or nothing can be within.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserMistake(f"the limits in {path} cannot be read: {error}") from error
    names = {field.name for field in fields(ProductLimits)}
    if set(tables) != names:
        raise UserMistake(
            f"{path}: "
            + "; ".join(
                [f"no limits for {name}" for name in sorted(names - set(tables))]
                + [f"unknown measurement {name}" for name in sorted(set(tables) - names)]
            )
        )
    return ProductLimits(**{name: _limits(path, name, table) for name, table in tables.items()})


def _limits(path: Path, name: str, table: object) -> Limits:
    if (
        not isinstance(table, dict)
        or not table
        or not set(table) <= {"low", "high"}
        or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in table.values()
        )
    ):
        raise UserMistake(f"{path}: {name} needs `low` or `high` or both, as numbers")
    limits = Limits(table.get("low"), table.get("high"))
    if limits.low is not None and limits.high is not None and limits.low > limits.high:
        raise UserMistake(f"{path}: {name} has `low` above `high`: no unit would pass")
    return limits
