"""What can go wrong while an image is made.

ImageError
├── RecipeError         the recipe says something impossible; edit the recipe
├── LockError           the lock is not the recipe's; run `make image-lock`
├── ArchiveError        the archive does not have what is wanted, or not as it is pinned
├── SourceError         an image that was given as a base is not usable; fetch it again or name another
├── ToolMissingError    a program of the host is absent; run `make setup`
├── CommandFailedError  a program failed; its command line and last words are in the message
├── DiskFullError       a file system has no room; make some, or name another place
├── SigningError        a key is none or cannot sign, or a signature does not hold; the message says which
├── MediumError         a medium is none of a unit's with this image, or a part of one; name another
└── ManifestError       an image is not what its description says; build or download it again
"""


class ImageError(Exception):
    """Root of everything that this package raises on purpose."""


class RecipeError(ImageError, ValueError):
    """The recipe cannot be followed as it is written."""


class LockError(ImageError, ValueError):
    """The lock is missing, damaged or made for another recipe."""


class ArchiveError(ImageError):
    """A package is not to be had, or is not the one that the lock pins."""


class SourceError(ImageError, ValueError):
    """An image that was given as a base is truncated, damaged, of another layout, or another one."""


class ToolMissingError(ImageError, FileNotFoundError):
    """A program that the build needs is not on this machine."""


class CommandFailedError(ImageError):
    """A program of the host did not succeed."""


class DiskFullError(ImageError):
    """A file system has not the room that a build needs."""


class ManifestError(ImageError, ValueError):
    """An image and its description, or its block map, do not agree."""


class MediumError(ImageError, ValueError):
    """What was named as a unit's medium is none, is not all of one, or is one of another product's."""


class SigningError(ImageError, ValueError):
    """A key cannot be used as it was named, or a signature is not what it should be."""
