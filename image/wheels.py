"""The agent's Python packages for the device, from the hash-pinned lock, without running anything of the device.

Every package but one has a wheel for the device's Python. `lgpio` publishes none for Python 3.13, so its source (pinned
by the same lock) is compiled here with Debian's cross compiler. The result is cached by the lock.
"""

import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from image.base import Base
from image.errors import ImageError
from image.run import multiarch, run

#: The device's Python, as wheels and extension modules name it.
PYTHON = "3.13"
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

#: Runs in the twin's Python 3.13 and writes the .pyc files that the device's Python would write, before it has to.
_COMPILE = """
import os, py_compile, sys
top, seen = sys.argv[1:]
for folder, folders, names in os.walk(top):
    folders.sort()  # what was compiled before can change a bit or two of what comes after
    for name in sorted(names):
        if name.endswith('.py'):
            path = os.path.join(folder, name)
            try:
                py_compile.compile(path, dfile=seen + path[len(top):], doraise=True,
                                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            except py_compile.PyCompileError:
                pass
"""


def versions(lock: str) -> dict[str, str]:
    """Name and version of every package of a lock that goes on to the device."""
    found = {match["name"]: match["version"] for match in _REQUIREMENT.finditer(lock)}
    return {name: version for name, version in found.items() if name not in _LEFT_OUT}


def device_library(lock: Path, base: Base, cache: Path) -> Path:
    """The directory with all packages of the lock, installed and byte-compiled for the device."""
    text = lock.read_text()
    digest = hashlib.sha256(text.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    finished = cache / f"wheels-{digest}"
    if finished.exists():
        return finished
    with tempfile.TemporaryDirectory(dir=cache, prefix="wheels-") as name:
        working = Path(name)
        library = working / "lib"
        own = [match for match in _REQUIREMENT.finditer(text) if match["name"] == "lgpio"]
        others = _REQUIREMENT.sub(lambda match: "" if match["name"] in {"lgpio", *_LEFT_OUT} else match[0], text)
        _install(others, library, working)
        for match in own:
            _compile_lgpio(match[0], base, library, working)
        _trim(library)
        compile_python(base, library, f"/opt/picket/current/{library.name}")
        library.rename(finished)
    return finished


def compile_python(base: Base, tree: Path, seen_as: str) -> None:
    """Byte-compile a tree with the device's version of Python; files that are not for it are passed over.

    The .pyc files are unchecked: nobody edits an installed release, and the device saves the comparison.

    Args:
        base: whose twin carries the interpreter.
        tree: the files, where they are now.
        seen_as: their place on the device, for tracebacks.
    """
    usr = base.twin / "usr"
    libraries = usr / "lib" / multiarch()
    loader = next(libraries.glob("ld-linux-*.so.*"))
    run(loader, "--library-path", libraries, usr / f"bin/python{PYTHON}", "-S", "-c", _COMPILE,
        tree, seen_as, env={"PYTHONHOME": str(usr), "PYTHONPATH": "", "PYTHONHASHSEED": "0"})  # fmt: skip


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


def _install(requirements: str, library: Path, working: Path) -> None:
    listed = working / "requirements.txt"
    listed.write_text(requirements)
    platforms = [option for tag in _PLATFORMS for option in ("--platform", tag)]
    run(sys.executable, "-m", "pip", "install", "--target", library, *platforms, "--implementation", "cp",
        "--python-version", PYTHON, "--only-binary", ":all:", "--require-hashes", "--no-deps", "--no-compile",
        "--requirement", listed)  # fmt: skip


def _compile_lgpio(requirement: str, base: Base, library: Path, working: Path) -> None:
    """Compile lgpio as its own setup.py does for a self-contained module (PYPI=1): C library and wrapper in one."""
    listed = working / "lgpio.txt"
    listed.write_text(re.sub(r";[^\\\n]*", "", requirement, count=1))
    run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
        "--require-hashes", "--requirement", listed, "--dest", working)  # fmt: skip
    archive = next(working.glob("lgpio-*.tar.gz"), None)
    if archive is None:
        raise ImageError("the source of lgpio was not downloaded")
    with tarfile.open(archive) as tar:
        tar.extractall(working, filter="data")
    source = working / archive.name.removesuffix(".tar.gz")
    include = base.headers / "usr/include"
    run("swig", "-python", "-o", "lgpio_wrap.c", "lgpio.i", cwd=source)
    run(_COMPILER, "-shared", "-fPIC", "-O2", "-pthread", "-Isrc", f"-I{include}/python{PYTHON}", f"-I{include}",
        "-o", library / f"_lgpio{_EXTENSION_SUFFIX}", "lgpio_wrap.c", "src/rgpiod.c",
        *(path.relative_to(source) for path in sorted(source.glob("src/lg*.c"))), "-lrt", "-ldl",
        cwd=source)  # fmt: skip
    shutil.copy2(source / "lgpio.py", library / "lgpio.py")
