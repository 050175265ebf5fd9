"""`python -m image`: build an image, check one, or build a release of the agent."""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from image import checksums, imager, inside
from image.base import base_root
from image.build import LOCK, Keys, build_image
from image.cache import held
from image.describe import image_json, image_page, recipe_json, recipe_page
from image.diff import changes, show
from image.errors import ImageError, LockError, ManifestError, RecipeError, SigningError, SourceError
from image.factory_key import DEFAULT_PATH, read_public
from image.ladder import climb
from image.ladder import show as ladder_lines
from image.manifest import ImageManifest
from image.progress import Clock, Stage, expected, remember, results, shown
from image.recipe import explain, lint_recipe, load
from image.release import ReleaseError, device_release, pack, simulated_release
from image.resolve import renew
from image.run import logged
from image.secure_boot import conflicts
from image.signing import fingerprint
from image.wheels import device_library

_RECIPE = Path(__file__).parent / "recipes" / "picket.toml"
_OUTPUT = Path("build/image")
_CACHE = Path("build/cache")
#: Seconds of a release's stages where everything is cached, for its bar.
_RELEASE = {"base root file system": 0.1, "device packages": 0.1, "agent": 2.0, "archive and deltas": 6.0}
_UPDATE_ROOT = Path("build/updates/repository/root.json")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def _address(value: str | None) -> str | None:
    """Refuse at once what would be noticed when all is built."""
    try:
        if value is not None:
            imager.check_address(value)
    except ImageError as error:
        raise typer.BadParameter(str(error)) from error
    return value


@app.command(epilog="Example:  python -m image build")
def build(
    recipe: Annotated[Path, typer.Option(help="What to build.")] = _RECIPE,
    output: Annotated[Path, typer.Option(help="Where the results go.", file_okay=False)] = _OUTPUT,
    cache: Annotated[Path, typer.Option(help="Where parts are kept for the next build.", file_okay=False)] = _CACHE,
    key: Annotated[
        Path | None,
        typer.Option(
            help="The factory's SSH key, where the recipe names none; else build/keys/factory, made if it is missing.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    update_root: Annotated[
        Path, typer.Option(help="The root of the update keys: `python -m cloud keys init` makes it.")
    ] = _UPDATE_ROOT,
    no_updates: Annotated[bool, typer.Option("--no-updates", help="An image whose agent takes no updates.")] = False,
    signing_key: Annotated[
        str,
        typer.Option(
            help="What signs: file:PATH or pkcs11:...; else build/keys/image, made if it is missing. With public:PATH"
            " nothing is signed: the same image, to be compared.",
        ),
    ] = "",
    address: Annotated[
        str | None,
        typer.Option(help="URL of the directory where the files will be, for Imager's list.", callback=_address),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Build the image: raw, zstd, block map and description."""
    wanted = load(recipe)
    if not no_updates and not update_root.is_file():
        raise RecipeError(
            f"there is no update root at {update_root}, without which units could never trust a release: make the keys"
            " by `python -m cloud keys init`, name another file by --update-root, or say --no-updates"
        )
    clock = Clock()
    keys = Keys(key or DEFAULT_PATH, None if no_updates else update_root, signing_key)
    log = output / f"{wanted.name}-{wanted.version}.log"
    with logged(log), _shown(clock, expected(cache), quiet=json_output) as stage:
        manifest = build_image(wanted, output.resolve(), cache.resolve(), keys, stage, address)
    remember(cache, clock)
    if json_output:
        print(json.dumps({"manifest": str(output / f"{wanted.name}.json"), "sha256": manifest.image.sha256,  # noqa: T201
                          "size": manifest.image.size, "seconds": clock.seconds, "said": clock.words,
                          "log": str(log)}))  # fmt: skip
    else:
        say = Console(highlight=False, soft_wrap=True).print
        took = sum(clock.seconds.values())
        say(f"{manifest} with agent {manifest.agent} is made, in {took:.0f} s: {output / manifest.directory.name}")
        say(results(manifest.directory))


@app.command(
    epilog="Example:  python -m image release --version 1.2.0 --from build/releases/1.1.0/picket-agent-1.1.0.tar.zst"
)
def release(
    recipe: Annotated[Path, typer.Option(help="Which boards and which Python.")] = _RECIPE,
    board: Annotated[
        str, typer.Option("--for", help="device, or simulated: without packages, for the simulated board.")
    ] = "device",
    version: Annotated[str | None, typer.Option(help="What it calls itself; else what the source says.")] = None,
    older: Annotated[
        list[Path] | None, typer.Option("--from", help="Archive of a release that units run: a delta is made from it.")
    ] = None,
    min_from: Annotated[str | None, typer.Option(help="The oldest version that can be updated to this one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where it goes; else build/releases/<version>.")] = None,
    cache: Annotated[Path, typer.Option(help="Where parts are kept for the next build.", file_okay=False)] = _CACHE,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Build a release of the agent: archive, deltas and description. The same source gives the same bits."""
    if board not in {"device", "simulated"}:
        raise typer.BadParameter("say device or simulated", param_hint="--for")
    wanted = load(recipe)
    clock = Clock()
    with (
        _shown(clock, _RELEASE, quiet=json_output) as stage,
        tempfile.TemporaryDirectory(prefix="picket-release-") as folder,
    ):
        if board == "simulated":
            with stage("agent"):
                tree = simulated_release(Path(folder), wanted, version, min_from)
        else:
            with held(cache.resolve()):
                with stage("base root file system") as say:
                    root_base = base_root(wanted, cache.resolve(), say)
                with stage("device packages") as say:
                    library = device_library(LOCK, root_base, cache.resolve(), say)
                with stage("agent"):
                    tree = device_release(Path(folder), root_base, library, wanted, version, min_from)
        with stage("archive and deltas"):
            built = pack(tree, output or Path("build/releases") / tree.name.partition("-")[0], older or ())
    if json_output:
        print(json.dumps({**asdict(built), "description": str(built.description), "seconds": clock.seconds}))  # noqa: T201
        return
    sizes = f"{built.archive_size / 1024:.0f} KiB"
    for name, size in sorted(built.delta_sizes.items()):
        sizes += f", {name.partition('.from-')[2].partition('.')[0]}: {size / 1024:.1f} KiB"
    Console().print(f"{built.release} is described by {built.description}: {sizes}", highlight=False, soft_wrap=True)


@app.command(epilog="Example:  python -m image describe build/image/picket.json")
def describe(
    subject: Annotated[
        Path, typer.Argument(help="An image (its .json, or the directory of results) or a recipe (.toml).")
    ] = _OUTPUT / "picket.json",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say on one page what an image is, or what a recipe comes to and which file says what."""
    console = Console(highlight=False, soft_wrap=True)
    if subject.suffix == ".toml":
        wanted, settings = explain(subject)
        value, page = recipe_json(wanted, settings), recipe_page(wanted, settings)
    else:
        manifest = ImageManifest.load(subject)
        value, page = image_json(manifest), image_page(manifest, console.width if console.is_terminal else None)
    if json_output:
        print(json.dumps(value))  # noqa: T201
    else:
        console.print(page)


@app.command(epilog="Example:  python -m image diff build/image/picket-0.1.0 build/image/picket-0.2.0")
def diff(
    old: Annotated[Path, typer.Argument(help="An image: its .json, or the directory of its results.")],
    new: Annotated[Path, typer.Argument(help="Another one.")],
    whole: Annotated[bool, typer.Option("--all", help="Cut no list.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what changed from one image to another: packages, files, sizes."""
    found = changes(ImageManifest.load(old), ImageManifest.load(new))
    if json_output:
        print(json.dumps(found.to_json()))  # noqa: T201
    else:
        Console(highlight=False).print(show(found, whole=whole), crop=False)


@app.command(epilog="Example:  python -m image verify build/image/picket.json --key build/keys/image.pub")
def verify(
    description: Annotated[Path, typer.Argument(help="The JSON file, or the directory of results.")] = _OUTPUT
    / "picket.json",
    key: Annotated[Path | None, typer.Option(help="Public key (OpenSSH) that must have signed.")] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Take it also if nobody has signed.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check an image's files: description, block map, checksums and their signature. `lint` looks into the image."""
    manifest = ImageManifest.load(description)
    with inside.raw(manifest) as image:
        blocks = manifest.verify(image)
        asked = read_public(key) if key else None
        checked = checksums.check(manifest.directory, asked, {manifest.image.file: image})
    if not (checked.signer or unsigned):
        raise SigningError(
            f"{manifest.directory}: all files are what {checksums.SUMS} says, which nobody has signed: build with a"
            " signing key, or say --unsigned"
        )
    if json_output:
        print(json.dumps({"image": str(manifest), "sha256": manifest.image.sha256, "signer": checked.signer,  # noqa: T201
                          "files": checked.files, "unlisted": checked.unlisted}))  # fmt: skip
        return
    say = Console(highlight=False, soft_wrap=True).print
    say(f"{manifest} is what {description} says; {blocks.mapped_bytes // 1024**2} MiB to write")
    by = f"signed by {fingerprint(checked.signer)}" if checked.signer else "which NOBODY has signed"
    say(f"{len(checked.files)} files are what {checksums.SUMS} says, {by}", markup=False)
    if checked.unlisted:
        say(f"nothing is said of {', '.join(checked.unlisted)}", style="yellow", markup=False)


@app.command(epilog="Example:  python -m image lock")
def lock(
    recipe: Annotated[Path, typer.Option(help="Whose packages.")] = _RECIPE,
    cache: Annotated[Path, typer.Option(help="What it has need not be in the archive.", file_okay=False)] = _CACHE,
    missing_only: Annotated[
        bool, typer.Option("--missing-only", help="Only if something that is locked cannot be had any more.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Pin the newest version of every package, and say what moved."""
    wanted = load(recipe)
    if wanted.lock_of:
        wanted = replace(load(wanted.lock_of), lock_of=None)
    first = not wanted.lock.exists()
    moved = renew(wanted, cache.resolve(), missing_only=missing_only)
    if json_output:
        print(json.dumps({"lock": str(wanted.lock), "moves": [asdict(move) for move in moved]}))  # noqa: T201
        return
    for move in () if first else moved:
        Console().print(str(move), highlight=False, soft_wrap=True)
    done = f"{len(moved)} packages pinned" if first else f"{len(moved)} moved" if moved else "nothing moved"
    Console().print(f"{wanted.lock}: {done}", highlight=False, soft_wrap=True)


@app.command(
    epilog="Example:  python -m image lint build/image/picket.json   or, of a recipe:   python -m image lint FILE.toml"
)
def lint(
    subject: Annotated[
        Path, typer.Argument(help="A recipe (.toml), or an image: its .json, or the directory of results.")
    ] = _RECIPE,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Name everything that is wrong with a recipe, or with an image: what is in it, without mounting or booting it."""
    if subject.suffix != ".toml":
        _lint_image(subject, json_output=json_output)
        return
    mistakes = lint_recipe(subject, conflicts)
    if json_output:
        print(json.dumps({"recipe": str(subject), "mistakes": mistakes}))  # noqa: T201
    else:
        for mistake in mistakes:
            Console(stderr=True).print(mistake, markup=False, highlight=False, soft_wrap=True)
    if mistakes:
        raise typer.Exit(2)
    if not json_output:
        Console().print(f"{subject}: nothing to complain about", highlight=False)


def _lint_image(subject: Path, *, json_output: bool) -> None:
    manifest = ImageManifest.load(subject)
    results = []
    for result in climb(manifest):
        results.append(result)
        if not json_output:
            Console(highlight=False, soft_wrap=True).print(ladder_lines(result))
    failed = [result.name for result in results if not result.held]
    if json_output:
        print(json.dumps({"image": str(manifest), "failed": failed, "rungs": [asdict(one) for one in results]}))  # noqa: T201
    elif failed:
        Console(stderr=True).print(f"{manifest}: {len(failed)} of {len(results)} failed", style="red", highlight=False)
    if failed:
        raise typer.Exit(2)


@contextmanager
def _shown(clock: Clock, seconds: Mapping[str, float], *, quiet: bool) -> Iterator[Stage]:
    """Stages that are timed, and shown on stderr as they run."""
    if quiet:
        yield clock.stage
        return
    with shown(clock, Console(stderr=True), seconds) as stage:
        yield stage


def main() -> int:
    """Run, and turn errors into exit codes: 2 for a mistake of the user, 3 for anything else that is in the way."""
    try:
        app()  # which says itself what is wrong with its arguments, and leaves with 2
    except (RecipeError, LockError, SourceError, ManifestError, ReleaseError, SigningError) as error:
        return _told(error, 2)
    except ImageError as error:
        return _told(error, 3)
    except OSError as error:
        return _told(OSError(f"{error.filename}: {error.strerror}") if error.filename else error, 3)
    return 0


def _told(error: Exception, code: int) -> int:
    for words in (str(error), *getattr(error, "__notes__", ())):
        Console(stderr=True).print(words, style="red", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
