"""autoboot.txt and config.txt: lines and filters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image.firmware import BOARDS, NoBootError, boards
from image.firmware.config import Autoboot, Circumstances, parse_autoboot, parse_config

AB = b"[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"


def kernel(text: str, circumstances: Circumstances) -> str | None:
    return parse_config(text.encode(), circumstances).values.get("kernel")


def at(board: boards.Board = boards.PI_3, **others: object) -> Circumstances:
    return Circumstances(board, **others)  # type: ignore[arg-type]


# --- autoboot.txt


def test_the_example_of_the_documentation() -> None:
    assert parse_autoboot(AB, tryboot=False) == Autoboot(2, True)
    assert parse_autoboot(AB, tryboot=True) == Autoboot(3, True)


def test_padding_to_a_sector_changes_nothing() -> None:
    assert parse_autoboot(AB.ljust(512, b"\n"), tryboot=True) == Autoboot(3, True)
    assert parse_autoboot(AB.ljust(512, b"\0"), tryboot=True) == Autoboot(3, True)


@pytest.mark.parametrize(
    "data", [None, b"", bytes(512), AB.ljust(513, b"\n"), b"boot_partition\n[none]\nboot_partition=4"]
)
def test_what_says_nothing_leaves_the_default(data: bytes | None) -> None:
    assert parse_autoboot(data, tryboot=False) == Autoboot()


@pytest.mark.parametrize("name", ["pi4", "0x12345678", "boot_partition=1", "gpio4=0", ""])
def test_other_filters_are_not_known_in_autoboot_txt(name: str) -> None:
    assert parse_autoboot(f"[{name}]\nboot_partition=2\n".encode(), tryboot=True) == Autoboot()


def test_tryboot_a_b_counts_where_it_stands() -> None:
    data = b"boot_partition=2\n[tryboot]\ntryboot_a_b=1\n"

    assert parse_autoboot(data, tryboot=False) == Autoboot(2, False)
    assert parse_autoboot(data, tryboot=True) == Autoboot(2, True)


@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_are_an_autoboot_txt(data: bytes, tryboot: bool) -> None:
    assert parse_autoboot(data, tryboot=tryboot).boot_partition >= 0


# --- filters

#: Which boards meet which filter, as the documentation's table has it.
TABLE = {
    "pi3": {"PI_3", "PI_3_B_PLUS", "PI_3_A_PLUS", "CM_3"},
    "pi3+": {"PI_3_B_PLUS", "PI_3_A_PLUS"},
    "pi0": {"ZERO_2_W"},
    "pi0w": {"ZERO_2_W"},
    "pi02": {"ZERO_2_W"},
    "pi4": {"PI_4", "PI_400", "CM_4", "CM_4_S", "VIRT"},
    "pi400": {"PI_400"},
    "cm4": {"CM_4"},
    "cm4s": {"CM_4_S"},
    "pi5": {"PI_5", "CM_5", "PI_500"},
    "cm5": {"CM_5"},
    "pi500": {"PI_500"},
    "pi1": set[str](),
    "pi2": set[str](),
    "all": {"all"},
    "none": set[str](),
    "board-type=0x08": {"PI_3"},
    "board-type=0x0d": {"PI_3_B_PLUS"},
    "board-type=0x12": {"ZERO_2_W"},
    "board-type=0x14": {"CM_4"},
    "board-type=20": {"CM_4"},
    "board-type=0x17": {"PI_5"},
    "PI3": set[str](),
    "gpio4=1": set[str](),
    "gpio4=0": {"all"},
    "EDID=VSC-TD2220": set[str](),
    "HDMI:0": set[str](),
    "tryboot": set[str](),
    "partition=0": set[str](),
}
MODELS = [name for name in vars(boards) if isinstance(getattr(boards, name), boards.Board)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TABLE)
def test_boards_and_filters(model: str, name: str) -> None:
    met = kernel(f"[{name}]\nkernel=met\n", at(getattr(boards, model))) == "met"

    assert met == (model in TABLE[name] or "all" in TABLE[name])


def test_every_board_can_be_named_by_its_device_tree() -> None:
    assert BOARDS["bcm2711-rpi-4-b"] is boards.PI_4
    assert BOARDS["bcm2837-rpi-3-b-plus"] is BOARDS["bcm2710-rpi-3-b-plus"] is boards.PI_3_B_PLUS
    assert set(map(id, BOARDS.values())) == {id(getattr(boards, name)) for name in MODELS}


@pytest.mark.parametrize(
    ("serial", "name", "met"),
    [
        ("100000001234abcd", "0x1234abcd", True),
        ("100000001234abcd", "0x1234ABCD", True),
        ("100000001234abcd", "0x100000001234abcd", True),
        ("100000001234abcd", "0x1234abce", False),
        ("", "0x0", False),
    ],
)
def test_the_last_eight_digits_of_the_serial_count(serial: str, name: str, met: bool) -> None:
    assert (kernel(f"[{name}]\nkernel=met\n", at(serial=serial)) == "met") is met


@pytest.mark.parametrize(
    ("name", "met"),
    [
        ("boot_partition=2", True),
        ("boot_partition=3", False),
        ("boot_partition&2", True),
        ("boot_partition&1", False),
        ("boot_partition&3=2", True),
        ("boot_partition&3=3", False),
        ("boot_partition<3", True),
        ("boot_partition>2", False),
        ("boot_partition=0x2", True),
        ("boot_count=0", True),
        ("boot_partition<3=1", False),
        ("boot_partition =2", False),
    ],
)
def test_expressions(name: str, met: bool) -> None:
    assert (kernel(f"[{name}]\nkernel=met\n", at(partition=2)) == "met") is met


def test_the_tryboot_filter_asks_for_the_flag() -> None:
    text = "kernel=a\n[tryboot]\nkernel=b\n"

    assert kernel(text, at(tryboot=True)) == "b"
    assert kernel(text, at()) == "a"


def test_a_filter_replaces_one_of_its_type() -> None:
    text = "[pi4]\nkernel=four\n[pi3]\nkernel=three\n[board-type=0x11]\nkernel=also four\n"

    assert kernel(text, at()) == "three"
    assert kernel(text, at(boards.PI_4)) == "also four"


def test_filters_of_different_types_must_all_be_met() -> None:
    text = "[tryboot]\n[pi3]\nkernel=a\n[boot_partition=2]\nkernel=b\n[all]\ncmdline=c\n"

    assert kernel(text, at(tryboot=True)) == "a"
    assert kernel(text, at(tryboot=True, partition=2)) == "b"
    assert kernel(text, at(boards.PI_4, tryboot=True, partition=2)) is None
    assert kernel(text, at(partition=2)) is None
    assert parse_config(text.encode(), at()).values["cmdline"] == "c"


@pytest.mark.parametrize("name", ["none", "something else"])
def test_none_and_what_is_not_known_hold_until_all(name: str) -> None:
    assert kernel(f"[{name}]\n[pi3]\nkernel=a\n[all]\n[pi3]\nkernel=b\n", at()) == "b"
    assert kernel(f"[{name}]\n[pi3]\nkernel=a\n", at()) is None


# --- lines


def test_a_later_line_overrules_and_comments_do_not_count() -> None:
    text = b"kernel=a\r\n  kernel=b  \n# kernel=c\n#kernel=c\ninitramfs i.img followkernel\nno sign\n"

    assert parse_config(text, at()).values == {"kernel": "b", "initramfs": "i.img followkernel"}


def test_spaces_beside_the_equals_sign_are_part_of_what_they_stand_in() -> None:
    assert parse_config(b"kernel = a\n", at()).values == {"kernel ": " a"}


def test_what_lies_behind_98_characters_is_not_read() -> None:
    assert parse_config(b"cmdline=" + b"x" * 100, at()).values["cmdline"] == "x" * 90


def test_flags_are_numbers() -> None:
    config = parse_config(b"a=1\nb=0x2\nc=0\nd=yes\ne=\n", at())

    assert [config.flag(name) for name in "abcdef"] == [True, True, False, False, False, False]
    assert config.flag("f", default=True)


def test_overlays_are_kept_in_order() -> None:
    assert parse_config(b"dtoverlay=a\ndtoverlay=b,c=1\n", at()).overlays == ["a", "b,c=1"]


# --- include


def test_an_included_file_stands_where_the_line_is() -> None:
    files = {"slot.txt": b"os_prefix=a/\n[pi4]\nkernel=four\n"}
    text = b"[pi3]\nkernel=x\ninclude slot.txt\nkernel=y\n[all]\ncmdline=z\n"

    config = parse_config(text, at(), files.get)

    # The filter that the included file ends with holds on behind it.
    assert config.values == {"kernel": "x", "os_prefix": "a/", "cmdline": "z"}
    assert config.includes == ["slot.txt"]


def test_an_include_behind_a_filter_that_is_not_met_is_not_read() -> None:
    config = parse_config(b"[pi4]\ninclude slot.txt\n", at(), {"slot.txt": b"kernel=a\n"}.get)

    assert (config.values, config.includes) == ({}, [])


def test_an_include_that_is_not_there_is_passed_over() -> None:
    assert kernel("include none.txt\nkernel=a\n", at()) == "a"
    assert parse_config(b"include none.txt\nkernel=a\n", at(), dict[str, bytes]().get).values == {"kernel": "a"}


def test_files_that_include_themselves_do_not_boot() -> None:
    with pytest.raises(NoBootError, match=r"config\.txt includes"):
        parse_config(b"include config.txt\n", at(), lambda _name: b"include config.txt\n")


PIECES = st.sampled_from(
    ["[all]", "[none]", "[pi3]", "[pi4]", "[tryboot]", "[0x12]", "[boot_partition=2]", "[x]", "kernel=a", "initramfs b",
     "include c", "os_prefix=d/", "#", "", "[", "=", "dtoverlay=e,f"]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=120)), st.booleans())
def test_any_text_is_a_config(lines: list[str], tryboot: bool) -> None:
    text = "\n".join(lines).encode("utf-8", errors="replace")

    config = parse_config(text, at(tryboot=tryboot), lambda name: b"[pi4]\nkernel=c\n" if name == "c" else None)

    assert all(isinstance(value, str) for value in config.values.values())


@given(st.lists(PIECES))
def test_whatever_stood_before_all_makes_what_follows_count(lines: list[str]) -> None:
    assert kernel("\n".join([*lines, "[all]", "kernel=last"]), at()) == "last"
