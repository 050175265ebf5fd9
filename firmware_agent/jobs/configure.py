"""The kind `configure`: change settings that the owner's shadow may change, too, by the same rules (`tuning`).

    apply     what the job names is changed and kept, the rest stays; twice is as good as once

A value that no unit takes is REJECTED by name, and nothing is changed then.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from firmware_agent import tuning
from firmware_agent.jobs import document
from firmware_agent.jobs.kind import Context, Done, Phase, Rejected, Result
from firmware_agent.jobs.single import Single
from firmware_agent.tuning import BadTuning, Tuning

_log = logging.getLogger(__name__)


class Configure(Single):
    """Change the tuning.

    Args:
        path: where it is kept (settings: `paths.tuning`).
        defaults: the image's.
        apply: makes the running agent use it, and tells the shadow.
    """

    operation = "configure"

    def __init__(self, path: Path, defaults: Tuning, apply: Callable[[Tuning], None]) -> None:
        self._path = path
        self._defaults = defaults
        self._apply = apply
        self.phases = (Phase("apply", self._run, code="install"),)

    def _run(self, context: Context) -> Result:
        if not isinstance(context.document, document.Configure):
            raise TypeError(f"no document to configure by: {context.document!r}")
        wanted = context.document.tuning
        try:
            new = tuning.parse({**self._kept(), **wanted}, self._defaults)
        except BadTuning as bad:
            return Rejected("bad-document", str(bad))
        tuning.save(self._path, new, self._defaults)
        self._apply(new)
        return Done({name: str(getattr(new, name)) for name in wanted})

    def _kept(self) -> Mapping[str, object]:
        try:
            return tuning.changes(tuning.load(self._path, self._defaults), self._defaults)
        except BadTuning as bad:
            _log.warning("the job begins from the image's settings: %s", bad)
            return {}
