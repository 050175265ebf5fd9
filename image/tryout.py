"""Releases for the demo's boards: the tree as it stands under another version, and one with a slip in it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from image import recipe
from image.base import base_root
from image.build import LOCK
from image.cache import held
from image.release import device_release, pack, simulated_release
from image.wheels import device_library

_RECIPE: Final = Path(__file__).parent / "recipes" / "picket.toml"
_CACHE: Final = Path("build/cache")


def build(
    board: str, output: Path, version: str, older: Sequence[Path] = (), slip: tuple[str, str, str] | None = None
) -> Path:
    """Build a release of the agent; its archive.

    Args:
        board: whose, as in a board's URI: `simulated` or `virtual`.
        output: the directory for its files.
        version: what it calls itself.
        older: archives of releases that units run.
        slip: a file, and what is replaced in it by what.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = _TREES[board](Path(folder), version)
        if slip is not None:
            _make(slip, tree)
        built = pack(tree, output, older)
    (archive,) = built.description.parent.glob("*.tar.zst")
    return archive


def _make(slip: tuple[str, str, str], tree: Path) -> None:
    name, right, wrong = slip
    source = tree / name
    text = source.read_text()
    if text.count(right) != 1:
        raise AssertionError(f"{name} has no {right!r} any more: the slip is out of date")
    source.chmod(0o644)
    source.write_text(text.replace(right, wrong))
    source.chmod(0o444)
    for compiled in source.parent.glob(f"__pycache__/{source.stem}.*"):
        compiled.unlink()


def _simulated_tree(folder: Path, version: str) -> Path:
    return simulated_release(folder, recipe.load(_RECIPE), version)


def _device_tree(folder: Path, version: str) -> Path:
    """With the packages that `make image` has put into the cache."""
    wanted, cache = recipe.load(_RECIPE), _CACHE.resolve()
    with held(cache):
        base = base_root(wanted, cache)
        return device_release(folder, base, device_library(LOCK, base, cache), wanted, version)


_TREES: Final[Mapping[str, Callable[[Path, str], Path]]] = MappingProxyType(
    {"simulated": _simulated_tree, "virtual": _device_tree}
)
