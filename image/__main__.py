"""`python -m image`: build an image, or check one."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from image.build import Clock, Stage, build_image
from image.errors import ImageError, ManifestError, RecipeError
from image.factory_key import DEFAULT_PATH
from image.manifest import ImageManifest
from image.recipe import load

_RECIPE = Path(__file__).parent / "recipes" / "picket.toml"
_OUTPUT = Path("build/image")
_UPDATE_ROOT = Path("build/keys/update/root.json")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
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
    if not no_updates and not update_root.is_file():
        raise RecipeError(
            f"there is no update root at {update_root}, without which units could never trust a release: make the keys"
            " by `python -m cloud keys init`, name another file by --update-root, or say --no-updates"
        )
    clock = Clock()
    trusted = None if no_updates else update_root
    with _shown(clock, quiet=json_output) as stage:
        manifest = build_image(load(recipe), output.resolve(), cache.resolve(), key, trusted, stage)
    if json_output:
        print(json.dumps({"manifest": str(output / "picket.json"), "sha256": manifest.sha256,  # noqa: T201
                          "size": manifest.size, "seconds": clock.seconds}))  # fmt: skip
    else:
        Console().print(f"{manifest} is in {output}: {manifest.size // 1024**2} MiB, agent {manifest.agent}, "
                        f"{sum(clock.seconds.values()):.0f} s")  # fmt: skip


@app.command()
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
    except (RecipeError, ManifestError) as error:
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
