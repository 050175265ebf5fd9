"""The one way in which the benchmarks start other programs, and what they find out about this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.figures import NotMeasuredError
from factory.bench import Image
from image.bmap import Bmap
from image.manifest import ImageManifest

ROOT = Path(__file__).resolve().parent.parent
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class ProgramFailedError(Exception):
    """A program that a measurement needs ended with an error; its last words are in the message."""


def program(name: str) -> str | None:
    """The path of a program, or None."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def need(*names: str) -> None:
    """Go on only where these programs are.

    Raises:
        NotMeasuredError: one is missing.
    """
    missing = [name for name in names if program(name) is None]
    if missing:
        raise NotMeasuredError(f"{', '.join(missing)} is not installed; `make setup` installs it")


def need_root() -> None:
    """Go on only as root.

    Raises:
        NotMeasuredError: somebody else.
    """
    if os.geteuid() != 0:
        raise NotMeasuredError("needs root")


def run(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; what it printed.

    Raises:
        ProgramFailedError: it failed.
    """
    name, *arguments = map(str, command)
    done = subprocess.run(
        [program(name) or name, *arguments],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-5:])
        raise ProgramFailedError(f"{name} failed with {done.returncode}: {tail}")
    return done.stdout


def python(*arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run this very Python.

    Raises:
        ProgramFailedError: it failed.
    """
    return run(sys.executable, *arguments, cwd=cwd, env=env)


def built_image(description: Path) -> tuple[Image, ImageManifest, Bmap]:
    """The image to work with: as the line takes it, its description and its block map.

    Raises:
        NotMeasuredError: no image was built.
        ManifestError: it is not what its description says.
    """
    if not description.exists():
        raise NotMeasuredError(f"there is no image {description}; `make image` builds it")
    manifest = ImageManifest.load(description)
    blocks = manifest.verify_files()
    image = Image.of(manifest)
    return image, manifest, blocks
