"""Templates to text; a value that is missing stops the build."""

from pathlib import Path

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    autoescape=False,  # noqa: S701 - configuration files, no markup
)


def render(template: str, **values: object) -> str:
    """The template `<template>.j2` with its values.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    return _ENVIRONMENT.get_template(f"{template}.j2").render(**values)
