"""The kind `reboot`: restart the board, and prove that it did.

    note      the kernel's boot_id goes into the journal
    request   `reboot-request` is written; a root service on the unit watches for it, for the agent may not reboot
    (the board restarts; the journal brings the job back to `request`, which now sees another boot_id)

No clock is asked: a board without a battery does not know how long it was away. A board that does not restart in time
is FAILED; the request is withdrawn.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from firmware_agent import files
from firmware_agent.jobs.kind import Context, Done, Failed, Next, Phase, Result
from firmware_agent.jobs.single import Single

#: How long systemd may take to stop everything before it pulls the plug, and then some. In seconds.
WAIT_SECONDS: Final = 300.0

#: Time for the restart, a file system check and setting the clock. In minutes.
MINUTES: Final = 20


class Reboot(Single):
    """Restart the board.

    Args:
        request: the file that root watches for (settings: `paths.reboot_request`).
        boot_id: of the kernel that runs now.
        wait_seconds: until the board has to be down.
        clock: monotonic seconds.
    """

    operation = "reboot"

    def __init__(
        self,
        request: Path,
        boot_id: Callable[[], str],
        *,
        wait_seconds: float = WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = request
        self._boot_id = boot_id
        self._wait_seconds = wait_seconds
        self._clock = clock
        self.phases = (
            Phase("note", self._note, code="interrupted"),
            Phase("request", self._ask, code="interrupted", bound=True, minutes=MINUTES),
        )

    def _note(self, _: Context) -> Result:
        return Next({"boot_id": self._boot_id()})

    def _ask(self, context: Context) -> Result:
        before = context.memo["boot_id"]
        if self._boot_id() != before:
            return Done({"boot": self._boot_id()})
        files.write_atomic(self._request, f"{context.key}\n".encode())
        end = self._clock() + self._wait_seconds
        while self._clock() < end:
            context.wait(min(1.0, self._wait_seconds))
        return Failed("interrupted", f"the board did not restart within {self._wait_seconds:g} s")

    def clean_up(self, context: Context) -> None:
        """Withdraw the request."""
        del context
        for left in (self._request, *self._request.parent.glob(f".{self._request.name}.*.new")):
            files.remove(left)
        files.sync_directory(self._request.parent)
