"""What can go wrong while an image is made.

ImageError
├── RecipeError         the recipe says something impossible; edit the recipe
├── ToolMissingError    a program of the host is absent; run `make setup`
├── CommandFailedError  a program failed; its command line and last words are in the message
└── ManifestError       an image is not what its description says; build or download it again
"""


class ImageError(Exception):
    """Root of everything that this package raises on purpose."""


class RecipeError(ImageError, ValueError):
    """The recipe cannot be followed as it is written."""


class ToolMissingError(ImageError, FileNotFoundError):
    """A program that the build needs is not on this machine."""


class CommandFailedError(ImageError):
    """A program of the host did not succeed."""


class ManifestError(ImageError, ValueError):
    """An image and its description, or its block map, do not agree."""
