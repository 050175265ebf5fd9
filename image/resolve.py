"""From a recipe to its lock: what apt would install today, and whether the archive still has what was locked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from image import debs, lock, twins
from image.errors import ArchiveError, LockError, RecipeError
from image.lock import Lock, Move, Pin
from image.recipe import Recipe

#: Not needed on the unit, and what building needs beside it: Python's headers.
HEADERS: Final = "libpython3.13-dev"

#: Architectures of the machines that images are built on.
_HOSTS: Final = ("amd64", "arm64")


def wanted(recipe: Recipe) -> Mapping[str, tuple[str, ...]]:
    """What the recipe's lock must be resolved for."""
    return lock.wanted_by(recipe, twins.PACKAGES, HEADERS)


def locked(recipe: Recipe) -> Lock:
    """The recipe's lock, if it is the recipe's.

    Raises:
        LockError: there is none, it is damaged, or it was made for something else.
    """
    return lock.load(recipe, wanted(recipe))


def resolve(recipe: Recipe) -> Lock:
    """What the archive has today for a recipe.

    Raises:
        RecipeError: a package does not exist, or the packages do not go together.
        CommandFailedError: the archive cannot be reached or its signature is wrong.
    """
    sets: dict[str, tuple[Pin, ...]] = {}
    for architecture in dict.fromkeys((recipe.base.architecture, *_HOSTS)):
        with debs.opened(recipe.base, architecture) as archive:
            if architecture == recipe.base.architecture:
                sets[lock.TARGET] = tuple(_target(recipe, archive))
                sets[lock.HEADERS] = tuple(archive.single(HEADERS))
            if architecture in _HOSTS:
                sets[f"twin-{architecture}"] = tuple(archive.closure(twins.PACKAGES))
    return Lock(wanted(recipe), {key: sets[key] for key in lock.SETS})


def _target(recipe: Recipe, archive: debs.Archive) -> list[Pin]:
    """What the root is made of; an opened image brings all of it."""
    if recipe.base.kind == "image":
        return []
    try:
        return archive.closure(["?essential", *sorted(set(recipe.packages))])
    except ArchiveError as error:
        raise RecipeError(f"{recipe.file}: packages: {error}") from error


def lacking(found: Lock, recipe: Recipe, cache: Path) -> list[Pin]:
    """Pins that neither the archive nor the cache has any more."""
    absent = [pin for pin in found.pins() if not debs.cached(pin, cache).exists()]
    gone: list[Pin] = []
    for architecture in sorted({debs.fetched_as(pin, recipe.base) for pin in absent}):
        with debs.opened(recipe.base, architecture) as archive:
            gone += archive.lacking([pin for pin in absent if debs.fetched_as(pin, recipe.base) == architecture])
    return gone


def renew(recipe: Recipe, cache: Path, *, missing_only: bool = False) -> list[Move]:
    """Write the recipe's lock anew; what moved.

    Args:
        recipe: whose lock.
        cache: what is in it needs no archive.
        missing_only: leave the lock as it is while everything that it pins can be had.
    """
    if missing_only and not lacking(locked(recipe), recipe, cache):
        return []
    try:
        before = lock.parse(recipe.lock.read_text(), str(recipe.lock))
    except (OSError, UnicodeDecodeError, LockError):
        before = None
    after = resolve(recipe)
    if before is None or before.dump() != after.dump():
        lock.write(after, recipe.lock)
    return lock.moves(before, after)
