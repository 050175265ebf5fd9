"""The boards, as far as their firmware tells them apart: filters, start files, kernels and device trees.

Filters: raspberrypi.com/documentation/computers/config_txt.html, "Model filters"; types: "Raspberry Pi revision codes";
kernels: "kernel" and "arm_64bit" of the same page; device trees: the names in raspberrypi/linux and in Linux.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Board:
    """One model.

    Attributes:
        name: the narrowest of config.txt's model filters that it meets.
        filters: all model filters that it meets.
        type: its number for `[board-type=...]`.
        start: the file that makes a partition bootable; None where that is config.txt (Pi 5).
        eeprom: whether its boot loader lies in an EEPROM: only such a one walks over the partitions.
        kernels: what is looked for where config.txt names no kernel: in 64-bit mode.
        kernel32: the same in 32-bit mode; "" where there is none.
        arm_64bit: the default of that setting.
        tree: Raspberry Pi's device tree; "" on a machine that makes its own.
        upstream: Linux's own, taken first with `upstream_kernel=1`.
    """

    name: str
    filters: frozenset[str]
    type: int
    start: str | None
    eeprom: bool
    kernels: tuple[str, ...]
    kernel32: str
    arm_64bit: bool
    tree: str
    upstream: str


def _old(name: str, filters: str, kind: int, tree: str, upstream: str) -> Board:
    """A model without EEPROM whose processor can do 64 bits."""
    return Board(
        name,
        frozenset(filters.split()),
        kind,
        "start.elf",
        eeprom=False,
        kernels=("kernel8.img",),
        kernel32="kernel7.img",
        arm_64bit=False,
        tree=tree,
        upstream=upstream,
    )


def _four(name: str, filters: str, kind: int, tree: str) -> Board:
    return Board(
        name,
        frozenset(filters.split()),
        kind,
        "start4.elf",
        eeprom=True,
        kernels=("kernel8.img",),
        kernel32="kernel7l.img",
        arm_64bit=True,
        tree=tree,
        upstream=tree,
    )


def _five(name: str, filters: str, kind: int, tree: str) -> Board:
    return Board(
        name,
        frozenset(filters.split()),
        kind,
        None,
        eeprom=True,
        kernels=("kernel_2712.img", "kernel8.img"),
        kernel32="",
        arm_64bit=True,
        tree=tree,
        upstream=tree,
    )


PI_3 = _old("pi3", "pi3", 0x08, "bcm2710-rpi-3-b.dtb", "bcm2837-rpi-3-b.dtb")
PI_3_B_PLUS = _old("pi3+", "pi3 pi3+", 0x0D, "bcm2710-rpi-3-b-plus.dtb", "bcm2837-rpi-3-b-plus.dtb")
PI_3_A_PLUS = _old("pi3+", "pi3 pi3+", 0x0E, "bcm2710-rpi-3-b-plus.dtb", "bcm2837-rpi-3-a-plus.dtb")
CM_3 = _old("pi3", "pi3", 0x0A, "bcm2710-rpi-cm3.dtb", "bcm2837-rpi-cm3-io3.dtb")
ZERO_2_W = _old("pi02", "pi0 pi0w pi02", 0x12, "bcm2710-rpi-zero-2-w.dtb", "bcm2837-rpi-zero-2-w.dtb")
PI_4 = _four("pi4", "pi4", 0x11, "bcm2711-rpi-4-b.dtb")
PI_400 = _four("pi400", "pi4 pi400", 0x13, "bcm2711-rpi-400.dtb")
CM_4 = _four("cm4", "pi4 cm4", 0x14, "bcm2711-rpi-cm4.dtb")
CM_4_S = _four("cm4s", "pi4 cm4s", 0x15, "bcm2711-rpi-cm4s.dtb")
PI_5 = _five("pi5", "pi5", 0x17, "bcm2712-rpi-5-b.dtb")
CM_5 = _five("cm5", "pi5 cm5", 0x18, "bcm2712-rpi-cm5-cm5io.dtb")
PI_500 = _five("pi500", "pi5 pi500", 0x19, "bcm2712-rpi-500.dtb")

#: QEMU's `virt`, started as a Pi 4 is, but by a loader that needs no start4.elf (as a Pi 5's): it makes its own tree.
VIRT = Board("virt", frozenset({"pi4"}), 0x11, None, True, ("kernel8.img",), "", True, "", "")

#: By the name of the device tree that this project's recipes call a board by, and by filter.
BOARDS = {
    **{
        tree.removesuffix(".dtb"): board
        for board in (PI_3, PI_3_B_PLUS, PI_3_A_PLUS, CM_3, ZERO_2_W, PI_4, PI_400, CM_4, CM_4_S, PI_5, CM_5, PI_500)
        for tree in (board.upstream, board.tree)
    },
    "bcm2710-rpi-3-b-plus": PI_3_B_PLUS,
    "virt": VIRT,
}
