"""The frame of kinds that change nothing lasting: one phase, nothing to undo, nothing to find again."""

from collections.abc import Sequence

from firmware_agent.jobs.kind import Context, Orphan, Phase


class Single:
    """A kind with nothing to undo; its phases are given by who derives from it."""

    phases: Sequence[Phase] = ()
    undo: Sequence[Phase] = ()

    def clean_up(self, context: Context) -> None:
        """Nothing lies about outside of the scratch directory."""

    def orphan(self) -> Orphan | None:
        """Nothing can be under way without its journal."""
        return None
