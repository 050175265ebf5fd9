"""Secure boot as Raspberry Pi's bootloader defines it: `boot.img`, a FAT image in memory, and its `boot.sig`.

A signature file is text: the SHA-256 of the image in hexadecimal, `ts:` with a time in seconds, and `rsa2048:` with the
RSA-2048 signature (PKCS#1 v1.5, SHA-256) over the image, in hexadecimal (rpi-eeprom's `rpi-eeprom-digest`). The public
key's digest is in the board's fuses; burning those is no business of a build.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from image import disk
from image.boot_key import BootSigner, open_boot_signer
from image.errors import ImageError, RecipeError, SigningError
from image.firmware import BOARDS
from image.layout import AUTOBOOT
from image.recipe import Recipe

#: "The maximum size for a ramdisk file is 96MB" (raspberrypi.com/documentation/computers/config_txt.html,
#: boot_ramdisk).
MAX_IMAGE: Final = 96 * disk.MEBIBYTE

#: Below, mkfs.vfat makes no FAT32.
_MIN_IMAGE: Final = 36 * disk.MEBIBYTE

#: The outer partition's config.txt: everything else is read from inside boot.img.
OUTER_CONFIG: Final = "# Everything else is in boot.img, which boot.sig signs.\n[all]\nboot_ramdisk=1\n"

_SIGNATURE = re.compile(r"(?P<digest>[0-9a-f]{64})\nts: (?P<time>[0-9]{1,19})\nrsa2048: (?P<raw>[0-9a-f]{512})\n")


def signer_of(recipe: Recipe) -> BootSigner | None:
    """What signs the boot files of a recipe; None where it wants no secure boot.

    Raises:
        RecipeError: one of its boards has none.
        SigningError: the key cannot be used.
    """
    key = recipe.boot.secure_boot_key
    if not key:
        return None
    for conflict in conflicts(recipe):
        raise RecipeError(conflict)
    return open_boot_signer(key if key.startswith("pkcs11:") else f"file:{quote(key)}")


def conflicts(recipe: Recipe) -> Iterator[str]:
    """Why a recipe's boards cannot have the secure boot that it wants; a line each. Pure."""
    if not recipe.boot.secure_boot_key:
        return
    where = f"{recipe.file}: boot.secure_boot_key"
    if recipe.boot.control != AUTOBOOT:
        yield f'{where}: secure boot needs boot.control = "{AUTOBOOT}"; write that, or take the key out'
    for board in recipe.boards:
        if board in BOARDS and not BOARDS[board].eeprom:
            yield f"{where}: {board} has no boot loader that checks signatures; take it out of boards"


def sign(image: bytes, signer: BootSigner, epoch: int) -> str:
    """The text of `boot.sig` for an image."""
    digest = hashlib.sha256(image).digest()
    return f"{digest.hex()}\nts: {epoch}\nrsa2048: {signer.raw(digest).hex()}\n"


def verify(image: bytes, signature: str, public: rsa.RSAPublicKey) -> None:
    """What the bootloader checks.

    Raises:
        SigningError: the signature is malformed, of another image, or by another key.
    """
    match = _SIGNATURE.fullmatch(signature)
    if match is None:
        raise SigningError("boot.sig does not have its three lines: digest, ts: and rsa2048:")
    digest = hashlib.sha256(image).digest()
    if match["digest"] != digest.hex():
        raise SigningError("boot.sig is of another boot.img: the digests differ")
    try:
        public.verify(bytes.fromhex(match["raw"]), digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
    except InvalidSignature as error:
        raise SigningError("boot.sig was not made by this key") from error


def make_boot_files(tree: Path, output: Path, serial: int, signer: BootSigner, epoch: int) -> None:
    """Fill `output` with what the outer partition of a secure boot holds: boot.img, boot.sig and config.txt.

    Args:
        tree: the boot files as they would lie in an open boot partition.
        output: directory that is made.
        serial: of its file system.
        signer: who signs it.
        epoch: time of the files and of the signature.

    Raises:
        ImageError: the image would be larger than the bootloader loads.
    """
    size = max(_MIN_IMAGE, -(-disk.fat_size(tree) // disk.MEBIBYTE) * disk.MEBIBYTE)
    if size > MAX_IMAGE:
        raise ImageError(
            f"boot.img would have {size >> 20} MiB, and the boot loader takes {MAX_IMAGE >> 20}: take boards out of the"
            " recipe"
        )
    output.mkdir()
    image = output / "boot.img"
    disk.make_fat(tree, image, size, "PICKETBOOT", serial, epoch)
    (output / "boot.sig").write_text(sign(image.read_bytes(), signer, epoch))
    (output / "config.txt").write_text(OUTER_CONFIG)
    for path in output.iterdir():
        os.utime(path, (epoch, epoch))
