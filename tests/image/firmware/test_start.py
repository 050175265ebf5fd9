"""From power to kernel: which partition, which files, or why not."""

import gzip
import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from image.firmware import PI_3, PI_4, PI_5, VIRT, BytesMedium, NoBootError, Reset, boards, boot, look, read_file
from image.firmware.boards import Board
from image.firmware.start import Choice, Property
from tests.image.firmware.cards import FAT32, LINUX, SYSTEM, autoboot, disk, fat, needs_mtools

pytestmark = needs_mtools

AB = autoboot("[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n")
TRY = Reset(tryboot=True)
MODELS = [value for value in vars(boards).values() if isinstance(value, Board)]
EEPROM = [board for board in MODELS if board.eeprom]


def one(files: dict[str, bytes]) -> bytearray:
    """A card with one partition."""
    return disk([(FAT32, fat(files))])


def ab(control: dict[str, bytes] | None = None, **slots: dict[str, bytes]) -> bytearray:
    """A card as the product lays it out: control, boot-A, boot-B, and two roots as logical partitions."""
    slot = {name: fat(slots.get(name, SYSTEM)) for name in ("a", "b")}
    control = {"autoboot.txt": AB, "bootcode.bin": b""} if control is None else control
    return disk(
        [(FAT32, fat(control)), (FAT32, slot["a"]), (FAT32, slot["b"])], [(LINUX, bytes(512)), (LINUX, bytes(512))]
    )


def at(card: bytes | bytearray, board: Board = VIRT, reset: Reset | None = None, **others: object) -> Choice:
    return look(BytesMedium(card), board, reset, **others)  # type: ignore[arg-type]


def system(config: str = "", **files: bytes) -> dict[str, bytes]:
    """A bootable partition with more lines in its config.txt, and other files."""
    return {**SYSTEM, "config.txt": SYSTEM["config.txt"] + config.encode(), **files}


# --- one partition


@pytest.mark.parametrize("board", MODELS, ids=lambda board: board.upstream or board.name)
def test_every_board_starts_a_card_with_one_partition(board: Board) -> None:
    choice = at(one(SYSTEM), board)

    assert choice.partition == 1
    assert choice.kernel == "vmlinuz"
    assert choice.initramfs == ("initrd.img",)
    assert choice.device_tree == (board.upstream or None)
    assert choice.command_line == "root=/dev/x quiet"
    assert not choice.tryboot
    assert not choice.ramdisk


def test_the_files_are_copied_off_the_card(tmp_path: Path) -> None:
    card = tmp_path / "card.img"
    card.write_bytes(one(system("[all]\ninitramfs initrd.img,more.img followkernel\n", **{"more.img": b"more"})))

    started = boot(card, tmp_path, PI_3)

    assert started.kernel.read_bytes() == b"vmlinuz"
    assert started.initramfs is not None
    assert started.initramfs.read_bytes() == b"initrd.imgmore"
    assert started.device_tree is not None
    assert started.device_tree.read_bytes() == b"bcm2837-rpi-3-b.dtb"
    assert started.command_line == "root=/dev/x quiet"
    assert read_file(card, "more.img") == b"more"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    card = tmp_path / "card.img"
    card.write_bytes(one(SYSTEM))

    with pytest.raises(NoBootError, match="other"):
        read_file(card, "other")
    with pytest.raises(NoBootError, match="no such"):
        read_file(card, "vmlinuz", 2)


@pytest.mark.parametrize(
    "missing", ["vmlinuz", "initrd.img", "bcm2837-rpi-3-b.dtb", "cmdline.txt", "start.elf", "bootcode.bin"]
)
def test_a_pi_3_says_what_is_missing(missing: str) -> None:
    with pytest.raises(NoBootError, match=missing):
        at(one({name: data for name, data in SYSTEM.items() if name != missing}), PI_3)


@pytest.mark.parametrize(
    ("board", "missing"),
    [
        (PI_4, "start4.elf"),
        (PI_5, "config.txt"),
        (PI_5, "bcm2712-rpi-5-b.dtb"),
        (VIRT, "config.txt"),
        (VIRT, "vmlinuz"),
    ],
)
def test_other_boards_say_what_is_missing(board: Board, missing: str) -> None:
    with pytest.raises(NoBootError, match=missing):
        at(one({name: data for name, data in SYSTEM.items() if name != missing}), board)


@pytest.mark.parametrize("name", ["../etc/passwd", "a b", "-x", "", "folder"])
def test_a_kernel_that_cannot_be_is_not_started(name: str) -> None:
    with pytest.raises(NoBootError):
        at(one({**system(f"kernel={name}\n"), "folder/inside": b""}))


@pytest.mark.parametrize("name", ["vmlinuz", "initrd.img", "bcm2837-rpi-3-b.dtb"])
def test_a_file_with_a_damaged_chain_is_not_started(name: str) -> None:
    files = fat({**SYSTEM, name: bytes(4096)})
    table = bytearray(files)
    for at_byte in range(512 + 3, 512 + 6 * 512):  # FAT12: 1 in each twelve bits ends no chain and is no cluster
        table[at_byte] = 0 if table[at_byte] != 0xFF else 0xFF
    card = disk([(FAT32, bytes(table))])

    with pytest.raises(NoBootError):
        at(card, PI_3)


@pytest.mark.parametrize(
    ("board", "bits", "kernel"),
    [
        (PI_3, "", "kernel7.img"),
        (PI_3, "arm_64bit=1", "kernel8.img"),
        (PI_4, "", "kernel8.img"),
        (PI_4, "arm_64bit=0", "kernel7l.img"),
        (PI_5, "", "kernel_2712.img"),
        (PI_5, "arm_64bit=0", "kernel_2712.img"),
        (VIRT, "", "kernel8.img"),
    ],
)
def test_kernels_by_default(board: Board, bits: str, kernel: str) -> None:
    kernels = dict.fromkeys(("kernel.img", "kernel7.img", "kernel7l.img", "kernel8.img", "kernel_2712.img"), b"")
    files = {**SYSTEM, **kernels, "config.txt": f"upstream_kernel=1\n{bits}\n".encode()}

    assert at(one(files), board).kernel == kernel


def test_a_pi_5_takes_the_common_kernel_where_it_has_no_own() -> None:
    assert at(one({**SYSTEM, "config.txt": b"\n", "kernel8.img": b""}), PI_5).kernel == "kernel8.img"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_64_bit_kernel_needs_a_processor_with_64_bits(pack: type[bytes]) -> None:
    kernel = pack(bytes(56) + b"ARM\x64" + bytes(5000))
    files = system(vmlinuz=kernel)

    assert at(one(files), PI_3).kernel == "vmlinuz"
    with pytest.raises(NoBootError, match="arm_64bit=1"):
        at(one({**files, "config.txt": b"kernel=vmlinuz\nupstream_kernel=1\n"}), PI_3)
    assert at(one({**files, "config.txt": b"kernel=vmlinuz\n"}), PI_4).kernel == "vmlinuz"


def test_a_packed_kernel_that_is_damaged_is_not_started() -> None:
    with pytest.raises(NoBootError, match="vmlinuz is damaged"):
        at(one(system(vmlinuz=b"\x1f\x8b" + b"\xff" * 100)))


@pytest.mark.parametrize(
    ("line", "kernel", "initramfs"),
    [
        ("auto_initramfs=1", "kernel8.img", ("initramfs8",)),
        ("auto_initramfs=1", "kernel7.img", ()),
        ("auto_initramfs=0", "kernel8.img", ()),
        ("", "kernel8.img", ()),
        ("ramfsfile=initrd.img", "kernel8.img", ("initrd.img",)),
        ("initramfs initrd.img 0x00800000", "kernel8.img", ("initrd.img",)),
        ("initramfs initrd.img", "kernel8.img", ("initrd.img",)),
        ("auto_initramfs=1\ninitramfs initrd.img followkernel", "kernel8.img", ("initrd.img",)),
    ],
)
def test_the_initramfs(line: str, kernel: str, initramfs: tuple[str, ...]) -> None:
    files = {**SYSTEM, "kernel8.img": b"", "kernel7.img": b"", "initramfs8": b""}

    choice = at(one({**files, "config.txt": f"upstream_kernel=1\nkernel={kernel}\n{line}\n".encode()}), PI_4)

    assert choice.initramfs == initramfs


def test_raspberry_pis_names_of_device_trees_come_first_unless_linux_is_asked_for() -> None:
    files = {**SYSTEM, "bcm2710-rpi-3-b.dtb": b""}

    assert at(one(files), PI_3).device_tree == "bcm2837-rpi-3-b.dtb"
    assert at(one({**files, "config.txt": b"kernel=vmlinuz\n"}), PI_3).device_tree == "bcm2710-rpi-3-b.dtb"
    assert at(one(system("device_tree=own.dtb\n", **{"own.dtb": b""})), PI_3).device_tree == "own.dtb"
    assert at(one(system("device_tree=\n")), PI_3).device_tree is None
    del files["bcm2837-rpi-3-b.dtb"]
    assert at(one(files), PI_3).device_tree == "bcm2710-rpi-3-b.dtb"


def test_start_files_of_other_names() -> None:
    files = {name: data for name, data in SYSTEM.items() if name != "start4.elf"}
    files["config.txt"] += b"gpu_mem=16\n"

    assert at(one({**files, "start4cd.elf": b""}), PI_4)
    with pytest.raises(NoBootError, match=r"start4\.elf"):
        at(one(files), PI_4)
    with pytest.raises(NoBootError, match=r"own\.elf"):
        at(one(system("start_file=own.elf\n")), PI_4)


# --- os_prefix and overlays


def prefixed(config: str, **others: bytes) -> dict[str, bytes]:
    slot = {f"a/{name}": data for name, data in SYSTEM.items() if not name.endswith((".elf", ".bin", "config.txt"))}
    slot |= {"a/cmdline.txt": b"in a\n"}
    return {**system(config), **slot, **others}


def test_a_prefix_stands_before_every_file_of_the_system() -> None:
    choice = at(one(prefixed("os_prefix=a/\n")), PI_3)

    assert choice.os_prefix == "a/"
    assert (choice.kernel, choice.initramfs) == ("a/vmlinuz", ("a/initrd.img",))
    assert (choice.device_tree, choice.command_line) == ("a/bcm2837-rpi-3-b.dtb", "in a")
    assert Property("/chosen", "os_prefix", "a/") in choice.properties


@pytest.mark.parametrize("missing", ["a/vmlinuz", "a/bcm2837-rpi-3-b.dtb"])
def test_a_prefix_without_kernel_or_device_tree_is_ignored(missing: str) -> None:
    files = prefixed("os_prefix=a/\n")
    del files[missing]

    choice = at(one(files), PI_3)

    assert (choice.os_prefix, choice.kernel, choice.command_line) == ("", "vmlinuz", "root=/dev/x quiet")
    assert "os_prefix=a/" in choice.notes[0]
    assert Property("/chosen", "os_prefix", "") in choice.properties


def test_a_machine_that_makes_its_own_device_tree_asks_for_the_kernel_alone() -> None:
    files = {name: data for name, data in prefixed("os_prefix=a/\n").items() if not name.endswith(".dtb")}

    assert at(one(files), VIRT).os_prefix == "a/"


def test_a_viable_prefix_whose_other_files_are_missing_does_not_start() -> None:
    files = prefixed("os_prefix=a/\n")
    del files["a/initrd.img"]

    with pytest.raises(NoBootError, match=r"a/initrd\.img"):
        at(one(files), PI_3)


def test_an_absolute_name_bypasses_the_prefix() -> None:
    choice = at(one(prefixed("os_prefix=a/\nkernel=/vmlinuz\ncmdline=/cmdline.txt\n")), PI_3)

    assert (choice.os_prefix, choice.kernel, choice.command_line) == ("a/", "vmlinuz", "root=/dev/x quiet")


def test_a_prefix_may_be_the_beginning_of_a_name() -> None:
    files = {f"test-{name}": SYSTEM[name] for name in ("vmlinuz", "initrd.img", "cmdline.txt", "bcm2837-rpi-3-b.dtb")}

    assert at(one({**system("os_prefix=test-\n"), **files}), PI_3).kernel == "test-vmlinuz"


def test_the_slot_file_names_the_prefix() -> None:
    files = prefixed("include slot.txt\n", **{"slot.txt": b"os_prefix=a/\n".ljust(512, b"\n")})

    assert at(one(files), PI_3).os_prefix == "a/"


@pytest.mark.parametrize("readme", [False, True])
def test_overlays_are_shared_unless_a_readme_says_otherwise(readme: bool) -> None:
    files = prefixed("os_prefix=a/\ndtoverlay=x,p=1\ndtoverlay=none\ndtoverlay=\n")
    files |= {"overlays/x.dtbo": b"", "a/overlays/x.dtbo": b""} | ({"a/overlays/README": b""} if readme else {})

    choice = at(one(files), PI_3)

    assert [(one.name, one.path, one.parameters) for one in choice.overlays] == [
        ("x", "a/overlays/x.dtbo" if readme else "overlays/x.dtbo", "p=1"),
        ("none", None, ""),
    ]


def test_overlays_may_lie_elsewhere() -> None:
    choice = at(one(system("overlay_prefix=more/\ndtoverlay=x\n", **{"more/x.dtbo": b""})), PI_3)

    assert choice.overlays[0].path == "more/x.dtbo"
    assert Property("/chosen", "overlay_prefix", "more/") in choice.properties


# --- autoboot.txt and the walk


@pytest.mark.parametrize("board", EEPROM, ids=lambda board: board.upstream or board.name)
def test_slots_by_autoboot_txt(board: Board) -> None:
    card = ab()

    assert at(card, board).partition == 2
    tried = at(card, board, TRY)
    assert tried.partition == 3
    assert tried.tryboot
    assert {(one.name, one.value) for one in tried.properties if one.node == "/chosen/bootloader"} == {
        ("partition", 3),
        ("tryboot", 1),
        ("boot-mode", 1),
    }


def test_an_older_board_follows_autoboot_txt_and_does_not_walk() -> None:
    assert at(ab(), PI_3).partition == 2
    assert at(ab(), PI_3, TRY).partition == 3
    with pytest.raises(NoBootError, match="2: "):
        at(ab(a={}), PI_3)


def test_a_partition_given_to_reboot_overrules_autoboot_txt() -> None:
    assert at(ab(), VIRT, Reset(3)).partition == 3
    assert at(ab(), VIRT, Reset(2, tryboot=True)).partition == 2


@pytest.mark.parametrize("number", [-1, 32, 62])
def test_a_partition_that_no_register_holds_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="0 to 31"):
        Reset(number)


@pytest.mark.parametrize(
    "control",
    [
        {},
        {"autoboot.txt": b""},
        {"autoboot.txt": bytes(512)},
        {"autoboot.txt": b"\xff" * 512},
        {"autoboot.txt": AB.replace(b"=2", b"=3") + b"\n"},  # 513 bytes
        {"autoboot.txt": autoboot("boot_partition=0\n")},
        {"autoboot.txt": autoboot("[pi4]\nboot_partition=3\n")},
    ],
)
def test_without_a_valid_autoboot_txt_the_first_bootable_partition_is_started(control: dict[str, bytes]) -> None:
    assert at(ab(control)).partition == 2


def test_a_damaged_control_partition_leaves_the_walk() -> None:
    card = ab()
    card[512 : 512 + 512] = bytes(512)

    choice = at(card)

    assert choice.partition == 2
    assert choice.notes
    with pytest.raises(NoBootError):
        at(card, PI_3)


def test_a_dead_slot_leads_to_the_next_that_boots() -> None:
    assert at(ab(a={})).partition == 3
    assert at(ab(b={}), VIRT, TRY).partition == 2
    assert at(ab(b={}), VIRT, Reset(3)).partition == 2


def test_the_walk_goes_up_to_8_and_then_begins_at_1() -> None:
    boot = fat(SYSTEM)
    card = disk([(FAT32, boot), (LINUX, bytes(512)), (FAT32, bytes(512))], [(FAT32, boot), (LINUX, bytes(512))])

    assert at(card, VIRT, Reset(3)).partition == 5
    assert at(card, VIRT, Reset(7)).partition == 1
    assert at(card, VIRT, Reset(2)).partition == 5


def test_the_walk_reads_no_autoboot_txt() -> None:
    second = fat({**SYSTEM, "autoboot.txt": autoboot("boot_partition=3\n")})
    card = disk([(FAT32, fat({"autoboot.txt": autoboot("boot_partition=4\n")})), (FAT32, second), (FAT32, fat(SYSTEM))])

    assert at(card).partition == 2


def test_autoboot_txt_of_another_partition_is_not_read() -> None:
    card = ab({}, a={**SYSTEM, "autoboot.txt": autoboot("boot_partition=3\n")})

    assert at(card).partition == 2


def test_a_slot_that_is_bootable_and_lacks_its_kernel_stops_the_start() -> None:
    files = {name: data for name, data in SYSTEM.items() if name != "vmlinuz"}

    with pytest.raises(NoBootError, match="vmlinuz"):
        at(ab(a=files))


def test_where_nothing_boots_each_partition_says_why() -> None:
    with pytest.raises(NoBootError, match=r"2: .*3: .*1: "):
        at(ab(a={}, b={}))


def test_logical_partitions_boot_too() -> None:
    card = disk(
        [(FAT32, fat({"autoboot.txt": autoboot("boot_partition=6\n")}))], [(LINUX, bytes(512)), (FAT32, fat(SYSTEM))]
    )

    assert at(card).partition == 6


def test_one_boot_image_serves_two_slots_by_the_filter() -> None:
    files = system("[boot_partition=3]\ncmdline=b.txt\n", **{"b.txt": b"in b"})
    card = ab(a=files, b=files)

    assert at(card).command_line == "root=/dev/x quiet"
    assert at(card, VIRT, TRY).command_line == "in b"


# --- tryboot by file


def test_without_tryboot_a_b_the_try_reads_tryboot_txt() -> None:
    files = prefixed("include slot.txt\n", **{"slot.txt": b"", "tryslot.txt": b"os_prefix=a/\n"})
    files["tryboot.txt"] = SYSTEM["config.txt"] + b"include tryslot.txt\n"
    card = one(files)

    assert at(card, PI_3).os_prefix == ""
    tried = at(card, PI_3, TRY)
    assert (tried.os_prefix, tried.tryboot, tried.partition) == ("a/", True, 1)


@pytest.mark.parametrize("board", [PI_3, PI_4, PI_5, VIRT])
def test_one_try_without_tryboot_txt_does_not_start(board: Board) -> None:
    with pytest.raises(NoBootError, match=r"tryboot\.txt"):
        at(one(SYSTEM), board, TRY)


# --- boot.img


KEY = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
PUBLIC = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
RAMDISK = b"boot_ramdisk=1\n"


def sign(image: bytes, key: rsa.RSAPrivateKey = KEY) -> bytes:
    """As rpi-eeprom-digest does."""
    signature = key.sign(image, padding.PKCS1v15(), hashes.SHA256())
    return f"{hashlib.sha256(image).hexdigest()}\nts: 1700000000\nrsa2048: {signature.hex()}\n".encode()


def packed(files: dict[str, bytes] | None = None, config: bytes = RAMDISK, name: str = "boot") -> dict[str, bytes]:
    image = fat(files or SYSTEM, kibibytes=256)
    return {"config.txt": config, f"{name}.img": image, f"{name}.sig": sign(image), "bootcode.bin": b""}


@pytest.mark.parametrize("board", MODELS, ids=lambda board: board.upstream or board.name)
def test_everything_is_read_from_boot_img(board: Board) -> None:
    choice = at(one(packed()), board)

    assert choice.ramdisk
    assert not choice.signed
    assert choice.kernel == "vmlinuz"


def test_boot_img_may_have_a_partition_table(tmp_path: Path) -> None:
    files = packed()
    files["boot.img"] = bytes(disk([(FAT32, fat(SYSTEM, kibibytes=256))]))
    card = tmp_path / "card"
    card.write_bytes(disk([(FAT32, fat(files, kibibytes=1024))]))

    assert boot(card, tmp_path, PI_4).kernel.read_bytes() == b"vmlinuz"


def test_an_unfused_board_asks_for_no_signature() -> None:
    files = packed()
    del files["boot.sig"]

    assert at(one(files)).ramdisk


def test_a_fused_board_starts_what_its_owner_signed_and_says_so() -> None:
    files = packed()
    del files["config.txt"]  # "No other files are required."

    choice = at(one(files), PI_4, customer_key=PUBLIC)

    assert choice.ramdisk
    assert choice.signed
    assert Property("/chosen/bootloader", "signed", 9) in choice.properties


@pytest.mark.parametrize(
    ("sig", "says"),
    [
        (None, "not signed"),
        (b"", "is not what"),
        (sign(b"other"), "is not what"),
        (b"digest", "no signature"),
        (b"digest\nrsa2048: 00\n", "no signature"),
        (b"digest\nrsa2048: " + b"zz" * 256, "no signature"),
        (b"other key", "another key"),
    ],
)
def test_a_fused_board_refuses_everything_else(sig: bytes | None, says: str) -> None:
    files = packed()
    image = files.pop("boot.img")
    digest = hashlib.sha256(image).hexdigest().encode()
    files |= {"boot.img": image, "boot.sig": (sig or b"").replace(b"digest", digest)}
    if sig is None:
        del files["boot.sig"]
    if sig == b"other key":
        files["boot.sig"] = sign(image, OTHER)

    with pytest.raises(NoBootError, match=says):
        at(one(files), customer_key=PUBLIC)


def test_a_changed_byte_in_boot_img_is_refused() -> None:
    files = packed()
    files["boot.img"] = files["boot.img"][:-1] + b"\x01"

    with pytest.raises(NoBootError, match="is not what"):
        at(one(files), customer_key=PUBLIC)


def test_a_fused_board_does_not_start_plain_files() -> None:
    with pytest.raises(NoBootError, match=r"boot\.img"):
        at(one(SYSTEM), customer_key=PUBLIC)


def test_a_missing_boot_img_is_walked_over_and_a_wrong_one_is_not() -> None:
    files = packed()
    wrong = {**files, "boot.sig": sign(files["boot.img"], OTHER)}

    assert at(ab(a={}, b=files), customer_key=PUBLIC).partition == 3
    with pytest.raises(NoBootError, match="another key"):
        at(ab(a=wrong, b=files), customer_key=PUBLIC)


def test_the_partition_is_that_of_boot_img_and_its_config_may_ask_for_it() -> None:
    files = packed(system("[boot_partition=3]\ncmdline=b.txt\n", **{"b.txt": b"in b"}))

    choice = at(ab(a=files, b=files), VIRT, TRY)

    assert (choice.partition, choice.command_line) == (3, "in b")


def test_a_try_without_tryboot_a_b_takes_tryboot_img_and_its_config_txt() -> None:
    files = packed() | {"tryboot.txt": RAMDISK}
    image = fat({**SYSTEM, "cmdline.txt": b"one try"}, kibibytes=256)
    card = disk([(FAT32, fat({**files, "tryboot.img": image, "tryboot.sig": sign(image)}, kibibytes=1024))])

    assert at(card, VIRT, TRY).command_line == "one try"
    assert at(card, VIRT, TRY, customer_key=PUBLIC).command_line == "one try"
    assert at(card, VIRT, customer_key=PUBLIC).command_line == "root=/dev/x quiet"


def test_the_boot_loader_does_not_see_an_included_boot_ramdisk() -> None:
    files = {**system("include more.txt\n"), "more.txt": RAMDISK, "boot.img": b""}

    assert not at(one(files)).ramdisk


def test_a_boot_img_above_96_mib_is_refused() -> None:
    image = bytearray(fat({"config.txt": RAMDISK, "boot.img": b"x"}))
    entry = image.index(b"BOOT    IMG")
    image[entry + 28 : entry + 32] = (96 * 2**20 + 1).to_bytes(4, "little")

    with pytest.raises(NoBootError, match="96 MiB"):
        at(disk([(FAT32, bytes(image))]))


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"no key",
        rsa.generate_private_key(65537, 3072).public_key(),
        ec.generate_private_key(ec.SECP256R1()).public_key(),
    ],
)
def test_only_an_rsa_key_of_2048_bits_can_be_fused(pem: object) -> None:
    if not isinstance(pem, bytes):
        pem = pem.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]

    with pytest.raises(ValueError):  # noqa: PT011 - cryptography words the first two
        at(one(SYSTEM), customer_key=pem)
