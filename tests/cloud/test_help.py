"""Whoever asks a command for help is shown how to type it."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from cloud.cli import app as cloud_app
from image.__main__ import app as image_app


def commands(name: str, group: Any) -> Iterator[Any]:
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(f"{name} {word}", command)
        else:
            yield pytest.param(f"{name} {word}", command, id=f"{name} {word}")


ALL = [
    *commands("python -m cloud", typer.main.get_command(cloud_app)),
    *commands("python -m image", typer.main.get_command(image_app)),
]


@pytest.mark.parametrize(("name", "command"), ALL)
def test_every_command_shows_an_example_that_it_would_take(name: str, command: Any) -> None:
    shown = " ".join(filter(None, (command.help, command.epilog)))
    assert f"{name} " in f"{shown} "
    typed = shown.partition(f"{name}")[2].split("  ")[0].split("`")[0].split()

    command.make_context(name, [word.strip('"') for word in typed], resilient_parsing=False)
