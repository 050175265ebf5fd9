"""A TPM for the simulated board: swtpm on loopback, reached by the same PKCS#11 module that a unit uses.

No resource manager stands between: one board has one process and one key, which a bare TPM has room for. It starts
anew with each power-on, as a TPM does, and keeps its state in the board's folder.
"""

import os
import platform
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from factory.drivers.qemu import Child
from firmware_agent.keys import tpm

_LIBRARIES = Path("/usr/lib") / f"{platform.machine()}-linux-gnu"
_MODULES = (_LIBRARIES / "libtpm2_pkcs11.so.1", _LIBRARIES / "pkcs11/libtpm2_pkcs11.so.1")
_TCTIS = (_LIBRARIES / "libtss2-tcti-swtpm.so.0",)


def missing() -> list[str]:
    """What this machine lacks for a software TPM, as Debian calls the packages; empty when it lacks nothing."""
    return [
        package
        for package, there in (
            ("swtpm", shutil.which("swtpm") is not None and shutil.which("setpriv") is not None),
            ("libtpm2-pkcs11-1", any(path.exists() for path in _MODULES)),
            ("libtss2-tcti-swtpm0", any(path.exists() for path in _TCTIS)),
        )
        if not there
    ]


class SoftwareTpm:
    """A TPM whose state lies in a folder."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._child: Child | None = None
        self._tcti = ""

    def on(self) -> None:
        """Power it.

        Raises:
            StationFault: swtpm does not start.
        """
        if self._child is None:
            state = self._place / "tpm"
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            port = _free_pair()
            # The TSS reports each broken connection on stderr, inside the table; what matters it also returns.
            os.environ.setdefault("TSS2_LOG", "all+NONE")
            self._tcti = f"swtpm:host=127.0.0.1,port={port}"
            self._child = Child(
                "swtpm",
                ["socket", "--tpm2", "--tpmstate", f"dir={state.absolute()}",
                 "--server", f"type=tcp,port={port},bindaddr=127.0.0.1",
                 "--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1",
                 "--flags", "not-need-init,startup-clear"],
                self._place / "swtpm.log",
            )  # fmt: skip
            self._child.wait_for(lambda: tpm.present(self._tcti))

    def off(self) -> None:
        """Cut its power."""
        child, self._child = self._child, None
        if child is not None:
            child.stop(politely=True)

    def wiring(self) -> dict[str, str]:
        """The settings by which a board's agent finds this TPM."""
        return {"module": str(next(path for path in _MODULES if path.exists())), "tcti": self._tcti}


def _free_pair() -> int:
    """The lower of two neighbouring free ports: tpm2-tss takes swtpm's control port to be the data port plus one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            with suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
                return port
