"""`python -m image`: build an image, check one, or build a release of the agent."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from image.base import base_root
from image.build import LOCK, Clock, Stage, build_image
from image.cache import held
from image.errors import ImageError, ManifestError, RecipeError
from image.factory_key import DEFAULT_PATH
from image.manifest import ImageManifest
from image.recipe import load
from image.release import ReleaseError, device_release, pack, simulated_release
from image.wheels import device_library

_RECIPE = Path(__file__).parent / "recipes" / "picket.toml"
_OUTPUT = Path("build/image")
_UPDATE_ROOT = Path("build/updates/repository/root.json")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command(epilog="Example:  python -m image build")
def build(
    recipe: Annotated[Path, typer.Option(help="What to build.")] = _RECIPE,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = _OUTPUT,
    cache: Annotated[Path, typer.Option(help="Where parts are kept for the next build.")] = Path("build/cache"),
    key: Annotated[Path, typer.Option(help="The factory's SSH key.")] = DEFAULT_PATH,
    update_root: Annotated[
        Path, typer.Option(help="The root of the update keys: `python -m cloud keys init` makes it.")
    ] = _UPDATE_ROOT,
    no_updates: Annotated[bool, typer.Option("--no-updates", help="An image whose agent takes no updates.")] = False,
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
    trusted = None if no_updates else update_root
    with _shown(clock, quiet=json_output) as stage:
        manifest = build_image(wanted, output.resolve(), cache.resolve(), key, trusted, stage)
    if json_output:
        print(json.dumps({"manifest": str(output / "picket.json"), "sha256": manifest.sha256,  # noqa: T201
                          "size": manifest.size, "seconds": clock.seconds}))  # fmt: skip
    else:
        Console().print(f"{manifest} is in {output}: {manifest.size // 1024**2} MiB, agent {manifest.agent}, "
                        f"{sum(clock.seconds.values()):.0f} s")  # fmt: skip


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
    cache: Annotated[Path, typer.Option(help="Where parts are kept for the next build.")] = Path("build/cache"),
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Build a release of the agent: archive, deltas and description. The same source gives the same bits."""
    if board not in {"device", "simulated"}:
        raise typer.BadParameter("say device or simulated", param_hint="--for")
    wanted = load(recipe)
    clock = Clock()
    with _shown(clock, quiet=json_output) as stage, tempfile.TemporaryDirectory(prefix="picket-release-") as folder:
        if board == "simulated":
            with stage("agent"):
                tree = simulated_release(Path(folder), wanted, version, min_from)
        else:
            with held(cache.resolve()):
                with stage("base root file system"):
                    root_base = base_root(wanted, cache.resolve())
                with stage("device packages"):
                    library = device_library(LOCK, root_base, cache.resolve())
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


@app.command(epilog="Example:  python -m image verify build/image/picket.json")
def verify(description: Annotated[Path, typer.Argument(help="The JSON file.")] = _OUTPUT / "picket.json") -> None:
    """Check an image against its description and block map."""
    manifest = ImageManifest.load(description)
    blocks = manifest.verify()
    Console().print(f"{manifest} is what {description} says; {blocks.mapped_bytes // 1024**2} MiB to write")


@contextmanager
def _shown(clock: Clock, *, quiet: bool) -> Iterator[Stage]:
    """Stages that are timed, and shown on stderr as they run."""
    if quiet:
        yield clock.stage
        return
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:

        @contextmanager
        def stage(title: str) -> Iterator[None]:
            task = progress.add_task(title, total=1)
            with clock.stage(title):
                yield
            progress.update(task, completed=1)
            if not console.is_terminal:
                console.print(f"{title}: {clock.seconds[title]:.1f} s")

        yield stage


def main() -> int:
    """Run, and turn errors into exit codes: 2 for a mistake of the user, 3 for anything else that is in the way."""
    try:
        app()  # which says itself what is wrong with its arguments, and leaves with 2
    except (RecipeError, ManifestError, ReleaseError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return 2
    except ImageError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return 3
    except OSError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
