"""What a Raspberry Pi's firmware does between power and kernel, as Raspberry Pi documents it.

The virtual Pi starts by it, so the boot files of an image are tested as they lie on the card; and whoever changes them
(an update of a slot, a build, a power-cut test) can ask what every board would make of the result, without a board.
"""

from image.firmware.boards import BOARDS, PI_3, PI_4, PI_5, VIRT, ZERO_2_W, Board
from image.firmware.errors import NoBootError
from image.firmware.medium import BytesMedium, FileMedium, Medium, Partition, partitions
from image.firmware.reset import Reset, ResetRegister
from image.firmware.start import Choice, Overlay, Property, Started, boot, look, read_file

__all__ = [
    "BOARDS",
    "PI_3",
    "PI_4",
    "PI_5",
    "VIRT",
    "ZERO_2_W",
    "Board",
    "BytesMedium",
    "Choice",
    "FileMedium",
    "Medium",
    "NoBootError",
    "Overlay",
    "Partition",
    "Property",
    "Reset",
    "ResetRegister",
    "Started",
    "boot",
    "look",
    "partitions",
    "read_file",
]
