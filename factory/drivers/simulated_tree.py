"""What the simulated board's kernel shows of itself: a /proc, /sys and /run with the few files that the agent reads.

The same files that a Pi's kernel has (`firmware_agent.board.RaspberryPi` names them), so that the agent runs there with
no case of its own.
"""

import os
import shutil
import time
import uuid
from pathlib import Path

COMPATIBLE = "picket,simulated"
MODEL = "Simulated Raspberry Pi 3 Model B"
_REVISION = "00a02082"
_MEMORY_KIB = 2**20
_MEMORY_FREE_KIB = 2**19


def boot(tree: Path, serial: str, *, medium_bytes: int, celsius: float) -> None:
    """Write what a freshly booted kernel shows; process 1 begins now.

    Args:
        tree: where it hangs; what an earlier boot left there goes.
        serial: the SoC's, 16 hex digits.
        medium_bytes: capacity of the medium.
        celsius: temperature of the SoC in degrees Celsius.
    """
    shutil.rmtree(tree, ignore_errors=True)
    ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    mac = "b8:27:eb:" + ":".join(serial[-6:][i : i + 2] for i in (0, 2, 4))
    contents: dict[str, str | bytes] = {
        "proc/device-tree/serial-number": f"{serial}\0",
        "proc/device-tree/model": f"{MODEL}\0",
        "proc/device-tree/compatible": f"{COMPATIBLE}\0",
        "proc/device-tree/system/linux,revision": bytes.fromhex(_REVISION),
        "proc/sys/kernel/random/boot_id": f"{uuid.uuid4()}\n",
        "proc/sys/kernel/osrelease": f"{os.uname().release}\n",
        "proc/meminfo": f"MemTotal: {_MEMORY_KIB} kB\nMemAvailable: {_MEMORY_FREE_KIB} kB\n",
        "proc/1/stat": f"1 (init) S {'0 ' * 18}{ticks}\n",
        "proc/self/mountinfo": "22 1 7:1 / / rw - ext4 /dev/root rw\n",
        "sys/dev/block/7:1/size": f"{medium_bytes // 512}\n",
        "sys/class/thermal/thermal_zone0/temp": f"{celsius * 1000:.0f}\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
        "sys/class/net/eth0/address": f"{mac}\n",
        "sys/class/net/eth0/addr_assign_type": "0\n",
        "sys/class/net/eth0/device/uevent": "",
        "run/systemd/timesync/synchronized": "",
    }
    for name, content in contents.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
