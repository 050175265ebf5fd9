"""The agent's Python packages for the device, from the hash-pinned lock, without running anything of the device.

Every package but one has a wheel for the device's Python. `lgpio` publishes none for Python 3.13, so its source (pinned
by the same lock) is compiled here with Debian's cross compiler. The result is cached by the lock, and what was
downloaded is kept beside it:

    <cache>/downloads/*.whl, lgpio-*.tar.gz
"""

import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from image import python
from image.base import Base
from image.debs import Shown
from image.errors import CommandFailedError, ImageError
from image.python import PYTHON, compile_python
from image.run import run

_EXTENSION_SUFFIX = ".cpython-313-aarch64-linux-gnu.so"
_COMPILER = "aarch64-linux-gnu-gcc"
_STRIP = "aarch64-linux-gnu-strip"
#: Tags of wheels whose glibc is not newer than Debian trixie's, the best first.
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

#: Packages that others name and nobody imports: setuptools (colorzero's setup.py), pycparser (cffi's, to parse C).
_LEFT_OUT = frozenset({"setuptools", "pycparser"})

#: Files of packages that a unit has no use for: type stubs, sources in Cython, lists of what pip installed where, a
#: command line, and a second binary of zstandard for other Pythons.
_NOT_TAKEN = ("**/*.pyi", "**/*.pyx", "**/*.pxd", "*.dist-info/RECORD", "gpiozerocli", "zstandard/_cffi.*.so")

#: One requirement of a lock with its hashes.
_REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)[^\n]*(?:\n[ \t]+[^\n]*)*\n?", re.MULTILINE
)


def versions(lock: str) -> dict[str, str]:
    """Name and version of every package of a lock that goes on to the device."""
    found = {match["name"]: match["version"] for match in _REQUIREMENT.finditer(lock)}
    return {name: version for name, version in found.items() if name not in _LEFT_OUT}


def device_library(lock: Path, base: Base, cache: Path, shown: Shown = lambda _: None) -> Path:
    """The directory with all packages of the lock, installed and byte-compiled for the device; `shown` is told how."""
    text = lock.read_text()
    finished = cache / f"wheels-{_digest(text, base)}"
    if finished.exists():
        shown("cached")
        return finished
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-wheels-") as name:
        working = Path(name)
        library = working / "lib"
        own = [match for match in _REQUIREMENT.finditer(text) if match["name"] == "lgpio"]
        others = _REQUIREMENT.sub(lambda match: "" if match["name"] in {"lgpio", *_LEFT_OUT} else match[0], text)
        shown("installing")
        _install(others, library, working, cache)
        shown("compiling")
        for match in own:
            _compile_lgpio(match[0], base, library, working, cache)
        _trim(library)
        compile_python(base.twin, library, f"/opt/picket/current/{library.name}")
        run("sync", "--file-system", library)  # what has its name is whole, and is never looked at again
        library.rename(finished)
    shown("made")
    return finished


def _digest(lock: str, base: Base) -> str:
    """What a library depends on: the lock, how it is made, and the Python that compiles it."""
    digest = hashlib.sha256(lock.encode())
    compiler = base.twin / f"usr/bin/python{PYTHON}", base.headers / f"usr/include/python{PYTHON}/patchlevel.h"
    for path in (Path(__file__), Path(python.__file__), *compiler):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _trim(library: Path) -> None:
    """Take away what a unit has no use for: two thirds of it, which updates and their memory would pay for each time.

    Scripts of the packages start with this machine's interpreter, and symbols are for debuggers.
    """
    for pattern in ("bin", *_NOT_TAKEN):
        for path in library.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    for path in sorted(library.rglob("*.so")):
        run(_STRIP, "--strip-unneeded", path)


def _install(requirements: str, library: Path, working: Path, cache: Path) -> None:
    listed = working / "requirements.txt"
    listed.write_text(requirements)
    platforms = [option for tag in _PLATFORMS for option in ("--platform", tag)]
    kind = [*platforms, "--implementation", "cp", "--python-version", PYTHON, "--only-binary", ":all:"]
    downloads = _downloaded(listed, kind, cache)
    run(sys.executable, "-m", "pip", "install", "--target", library, *kind, "--require-hashes", "--no-deps",
        "--no-compile", "--no-index", "--find-links", downloads, "--requirement", listed)  # fmt: skip


def _downloaded(listed: Path, kind: list[str], cache: Path) -> Path:
    """The directory of downloads, with all that is listed in it; pip compares each with the lock's hashes."""
    downloads = cache / "downloads"
    downloads.mkdir(exist_ok=True)
    command = (sys.executable, "-m", "pip", "download", *kind, "--require-hashes", "--no-deps",
               "--requirement", listed, "--dest", downloads)  # fmt: skip
    try:
        run(*command, "--no-index", "--find-links", downloads)
    except CommandFailedError:
        run(*command)
    return downloads


def _compile_lgpio(requirement: str, base: Base, library: Path, working: Path, cache: Path) -> None:
    """Compile lgpio as its own setup.py does for a self-contained module (PYPI=1): C library and wrapper in one.

    Neither the place where it is compiled nor that of the headers is in the result.
    """
    listed = working / "lgpio.txt"
    listed.write_text(re.sub(r";[^\\\n]*", "", requirement, count=1))
    downloads = _downloaded(listed, ["--no-binary", ":all:", "--no-build-isolation"], cache)
    version = versions(requirement)["lgpio"]
    archive = downloads / f"lgpio-{version}.tar.gz"
    if not archive.exists():
        raise ImageError(f"the source of lgpio {version} was not downloaded")
    with tarfile.open(archive) as tar:
        tar.extractall(working, filter="data")
    source = working / archive.name.removesuffix(".tar.gz")
    include = base.headers / "usr/include"
    run("swig", "-python", "-o", "lgpio_wrap.c", "lgpio.i", cwd=source)
    placeless = (
        f"-ffile-prefix-map={source}=lgpio",
        f"-ffile-prefix-map={base.headers}=headers",
        "-Wl,--build-id=none",
    )
    run(_COMPILER, "-shared", "-fPIC", "-O2", "-pthread", *placeless,
        "-Isrc", f"-I{include}/python{PYTHON}", f"-I{include}",
        "-o", library / f"_lgpio{_EXTENSION_SUFFIX}", "lgpio_wrap.c", "src/rgpiod.c",
        *(path.relative_to(source) for path in sorted(source.glob("src/lg*.c"))), "-lrt", "-ldl",
        cwd=source)  # fmt: skip
    shutil.copy2(source / "lgpio.py", library / "lgpio.py")
