"""Who signed: OpenSSH's signatures (PROTOCOL.sshsig), checked by ssh-keygen against the image's own list of signers."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .faults import Fault

PROGRAM: Final = "/usr/bin/ssh-keygen"
_SECONDS: Final = 30


def verify(data: bytes, signature: bytes, namespace: str, signers: Path) -> str:
    """The principal, among those in `signers` (allowed signers of ssh-keygen(1)), who signed `data`.

    Raises:
        Fault: bad-signature; io if it cannot be checked.
    """
    if not signers.is_file():
        raise Fault("bad-signature", f"this image knows nobody who may sign images: {signers} is not there")
    held = os.memfd_create("signature", os.MFD_CLOEXEC)
    try:
        os.write(held, signature)  # at most 16 KiB, into memory: never short
        options = ["-s", f"/proc/self/fd/{held}", "-f", str(signers)]
        found = _ask(["-Y", "find-principals", *options], held, b"")
        principal = found.partition("\n")[0].partition(",")[0].strip()
        if not principal or principal.startswith("-"):
            raise Fault("bad-signature", "nobody whom this image knows has signed it")
        _ask(["-Y", "verify", "-I", principal, "-n", namespace, *options], held, data)
    finally:
        os.close(held)
    return principal


def _ask(words: Sequence[str], held: int, data: bytes) -> str:
    os.lseek(held, 0, os.SEEK_SET)
    try:
        done = subprocess.run(
            [PROGRAM, *words],
            input=data,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            pass_fds=[held],
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault("io", f"the signature cannot be checked: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-200:]
        raise Fault("bad-signature", f"the signature does not hold: {said}")
    return done.stdout.decode(errors="replace")
