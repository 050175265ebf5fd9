"""Byte code for the device, compiled here by the same release of Python that the device has."""

from pathlib import Path

from image.run import multiarch, run

#: The device's Python, as wheels and extension modules name it.
PYTHON = "3.13"

#: Runs in the twin's Python 3.13 and writes the .pyc files that the device's Python would write, before it has to.
_COMPILE = """
import os, py_compile, sys
top, seen = sys.argv[1:]
for folder, folders, names in os.walk(top):
    folders.sort()  # what was compiled before can change a bit or two of what comes after
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name.endswith('.py') and not os.path.islink(path):
            try:
                py_compile.compile(path, dfile=seen + path[len(top):], doraise=True,
                                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            except py_compile.PyCompileError:
                pass
"""


def compile_python(twin: Path, tree: Path, seen_as: str) -> None:
    """Byte-compile a tree with the device's version of Python; files that are not for it are passed over.

    The .pyc files are unchecked: nobody edits an installed release, and the device saves the comparison.

    Args:
        twin: a root of this machine's architecture with the device's release of Python.
        tree: the files, where they are now.
        seen_as: their place on the device, for tracebacks.
    """
    usr = twin / "usr"
    libraries = usr / "lib" / multiarch()
    loader = next(libraries.glob("ld-linux-*.so.*"))
    run(loader, "--library-path", libraries, usr / f"bin/python{PYTHON}", "-S", "-c", _COMPILE,
        tree, seen_as, env={"PYTHONHOME": str(usr), "PYTHONPATH": "", "PYTHONHASHSEED": "0"})  # fmt: skip
