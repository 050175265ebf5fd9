"""The jobs' journal: one small file that says which execution is in hand and how far it is.

Written by rename, with fsyncs, before each phase; so after a crash at any instruction it holds the state before or the
state after. The finished execution stays in it until the next one begins, because its report may have to be repeated.

Format 1. Every later format keeps `format`, `job`, `execution` and `operation`, so that a release that comes back after
a failed update knows at least whose job the newer one was at, and can undo and report it. A file that is damaged is
moved aside and counts as none; an update on trial is then still found by what the launcher knows (`Kind.orphan`).
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from firmware_agent import files
from firmware_agent.jobs.kind import Key
from firmware_agent.jobs.machine import Execution, Outcome, Stage

FORMAT: Final = 1

_log = logging.getLogger(__name__)


def to_json(execution: Execution) -> dict[str, Any]:
    """As it lies in the file."""
    outcome = execution.outcome
    return {
        "format": FORMAT,
        "job": execution.key.job,
        "execution": execution.key.number,
        "operation": execution.operation,
        "stage": execution.stage.value,
        "phase": execution.phase,
        "entered": execution.entered,
        "bound": execution.bound,
        "gone": execution.gone,
        "outcome": outcome
        and {
            "status": outcome.status,
            "code": outcome.code,
            "reason": outcome.reason,
            "details": dict(outcome.details),
        },
        "memo": dict(execution.memo),
        "stores": execution.stores,
    }


def from_json(document: object) -> Execution:
    """What lay in the file.

    Raises:
        ValueError: it is no journal.
    """
    fields = _Fields(document)
    key = Key(fields.take("job", str), fields.take("execution", int))
    operation = fields.take("operation", str)
    if fields.take("format", int) > FORMAT:
        # A newer release has written this and is gone: whatever it was at is undone. No phase has this name.
        return Execution(key, operation, Stage.FORWARD, "newer", bound=True)
    return Execution(
        key=key,
        operation=operation,
        stage=Stage(fields.take("stage", str)),
        phase=fields.take("phase", str),
        entered=fields.take("entered", int),
        bound=fields.take("bound", bool),
        gone=fields.take("gone", bool),
        outcome=_outcome(fields.take("outcome", dict, type(None))),
        memo=fields.take("memo", dict),
        stores=fields.take("stores", int),
    )


class _Fields:
    def __init__(self, document: object) -> None:
        if not isinstance(document, dict):
            raise ValueError("it is no object")  # noqa: TRY004 - one kind of error for one damaged file
        self._document: Mapping[str, Any] = document

    def take(self, name: str, *kinds: type) -> Any:
        value = self._document.get(name)
        if type(value) not in kinds:
            raise ValueError(f"{name} is missing or wrong")
        return value


def _outcome(value: dict[str, Any] | None) -> Outcome | None:
    if value is None:
        return None
    fields = _Fields(value)
    status = fields.take("status", str)
    if status not in {"SUCCEEDED", "FAILED", "REJECTED"}:
        raise ValueError(f"no status: {status:.20}")
    return Outcome(
        status,
        fields.take("code", str, type(None)),
        fields.take("reason", str, type(None)),
        fields.take("details", dict),
    )


class Journal:
    """The file.

    Args:
        path: where it is; its directory is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Execution | None:
        """The execution in hand or the last one; None when there is none. Never raises over what lies there."""
        self._sweep()
        try:
            return from_json(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.error("the jobs' journal cannot be read: %s", error)
            return None
        except (ValueError, RecursionError) as error:
            aside = self.path.with_name(self.path.name + ".damaged")
            _log.error("the jobs' journal is damaged (%s); it is kept as %s", error, aside.name)
            try:
                files.move(self.path, aside)
            except OSError:
                _log.exception("it cannot even be moved")
            return None

    def store(self, execution: Execution) -> None:
        """Note it, durably.

        Raises:
            OSError: the disk is full or read-only; what was noted before still is.
        """
        if not self.path.parent.is_dir():
            files.make_directory(self.path.parent, 0o700)
            files.sync_directory(self.path.parent.parent)  # else a power cut takes it, with all that is in it
        files.write_atomic(self.path, json.dumps(to_json(execution), separators=(",", ":")).encode(), 0o600)

    def _sweep(self) -> None:
        """What a kill in the middle of `store` has left."""
        for leftover in self.path.parent.glob(f".{self.path.name}.*.new"):
            try:
                files.remove(leftover)
            except OSError as error:
                _log.warning("%s stays behind: %s", leftover, error)
