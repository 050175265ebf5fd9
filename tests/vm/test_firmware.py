"""The virtual Pi's firmware as Linux sees it: Debian's kernel with a dozen lines of shell for a system.

Two slots, of which each is a boot partition with the image's own kernel and initramfs; a second initramfs, which the
firmware joins to it, brings the other /init. The whole image's way of using all this is tested where it is installed.
"""

import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest

from factory.drivers.virtual_pi import VirtualPi
from image.firmware import VIRT, boot
from image.initramfs import cpio, file
from image.manifest import ImageManifest
from tests.factory.wire import Wire
from tests.image.firmware.cards import FAT32, autoboot, disk, fat
from tests.vm.conftest import Root

pytestmark = pytest.mark.vm

SECONDS = 120.0
INIT = r"""#!/bin/busybox sh
for pair in dev:devtmpfs proc:proc sys:sysfs; do
	/bin/busybox mount -t "${pair#*:}" none "/${pair%:*}"
done
exec </dev/console >/dev/console 2>&1
while read -r module; do /bin/busybox insmod "/modules/$module" 2>/dev/null; done </modules/order

number() { /bin/busybox hexdump -e '4/1 "%02x"' "/proc/device-tree/chosen/bootloader/$1"; }
echo "chosen partition=$(number partition) tryboot=$(number tryboot) mode=$(number boot-mode)" \
	"prefix=$(/bin/busybox hexdump -e '1/1 "%02x"' /proc/device-tree/chosen/os_prefix)"
for port in /sys/class/virtio-ports/*; do
	[ "$(/bin/busybox cat "$port/name")" = picket.firmware ] && mailbox=/dev/${port##*/}
done
exec 3<>"$mailbox"

while read -r word rest; do
	case $word in
	ask) echo "$rest" >&3; read -r answer <&3; echo "answer $answer" ;;
	reset) /bin/busybox reboot -f ;;
	off) /bin/busybox poweroff -f ;;
	starve)
		/bin/busybox insmod /watchdog.ko heartbeat=2 && exec 4>/dev/watchdog && echo "answer starving"
		;;
	esac
done
"""


@pytest.fixture(scope="module")
def card(image: ImageManifest, root: Root, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Control partition and two slots, of which the second has a prefix."""
    place = tmp_path_factory.mktemp("card")
    started = boot(image.image_path, place, VIRT)
    assert started.initramfs is not None
    module = f"/usr/lib/modules/{image.kernel}/kernel/drivers/watchdog/i6300esb.ko.xz"
    watchdog = lzma.decompress(root.read(module))
    own = gzip.compress(cpio([file("init", INIT.encode(), executable=True), file("watchdog.ko", watchdog)]))
    files = {
        "vmlinuz": started.kernel.read_bytes(),
        "initrd.img": started.initramfs.read_bytes().ljust(-(-started.initramfs.stat().st_size // 4) * 4, b"\0"),
        "own.img": own,
        "cmdline.txt": b"console=ttyAMA0 quiet loglevel=3 panic=1",
    }
    config = b"kernel=vmlinuz\ninitramfs initrd.img,own.img followkernel\n"
    slots = [
        fat({"config.txt": config, **files}, kibibytes=65536, bits=16, cluster=4),
        fat({"config.txt": config + b"os_prefix=b/\n", **{f"b/{name}": data for name, data in files.items()}},
            kibibytes=65536, bits=16, cluster=4),
    ]  # fmt: skip
    control = autoboot("[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n")
    return bytes(disk([(FAT32, fat({"autoboot.txt": control})), *((FAT32, slot) for slot in slots)]))


@pytest.fixture
def guest(card: bytes, tmp_path: Path) -> Iterator[Wire]:
    with VirtualPi(tmp_path, tpm=False) as board:
        board.medium.write_bytes(card)
        wire = Wire(board, SECONDS)
        board.on()
        yield wire
        wire.close()


A = "chosen partition=00000002 tryboot=00000000 mode=00000001 prefix=00"
B = "chosen partition=00000003 tryboot=00000001 mode=00000001 prefix=622f00"


def test_linux_sees_what_was_booted_and_asks_for_one_try(guest: Wire) -> None:
    assert guest.hear("chosen") == A
    guest.say("ask nonsense\n")
    assert "error" in guest.hear("answer")
    guest.say("ask tryboot 1\n")
    assert guest.hear("answer") == "answer ok"
    guest.say("reset\n")
    assert guest.hear("chosen") == B
    guest.say("reset\n")
    assert guest.hear("chosen") == A


def test_a_watchdog_that_starves_resets_the_board_and_the_try_is_over(guest: Wire) -> None:
    guest.hear("chosen")
    guest.say("ask tryboot 1\n")
    guest.hear("answer ok")
    guest.say("reset\n")
    assert guest.hear("chosen") == B
    guest.say("starve\n")
    guest.hear("answer starving")
    assert guest.hear("chosen") == A
