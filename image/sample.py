"""The simulated board's image: small, and shaped like the real one, so that the line flashes it in the same way.

An MBR with one FAT-typed partition that holds a tar of `etc/picket/agent.toml`; around it, blocks that are mapped but
scattered, so that a flash has holes to skip.
"""

import io
import random
import struct
import tarfile
from pathlib import Path

from image import bmap
from image.manifest import ImageManifest, Package, Partition, digest

NAME, VERSION = "picket-sample", "1"
SIZE = 16 * 2**20
PARTITION_START = 2**20
PARTITION_SIZE = 2**20
SECTOR = 512

SETTINGS = """\
[image]
name = "{name}"
version = "{version}"
[pir]
warm_up_seconds = 1
[tuning]
heartbeat_seconds = 5
"""


def settings_tar(name: str, version: str) -> bytes:
    """What the simulated board finds on its boot partition."""
    settings = SETTINGS.format(name=name, version=version).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo("etc/picket/agent.toml")
        entry.size = len(settings)
        archive.addfile(entry, io.BytesIO(settings))
    return packed.getvalue()


def master_boot_record() -> bytes:
    """A partition table with the one partition (type 0x0C, FAT32 LBA)."""
    record = bytearray(SECTOR)
    entry = struct.pack(
        "<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x0C, b"\xfe\xff\xff", PARTITION_START // SECTOR, PARTITION_SIZE // SECTOR
    )
    record[446:462] = entry
    record[510:512] = b"\x55\xaa"
    return bytes(record)


def build(description: Path) -> ImageManifest:
    """Write the sample image, its block map and its description beside each other; the same bytes each time."""
    folder = description.parent
    folder.mkdir(parents=True, exist_ok=True)
    image, block_map = folder / f"{NAME}.img", folder / f"{NAME}.bmap"
    scatter = random.Random(NAME)  # noqa: S311  (the same blocks each time is what is wanted)
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.write(master_boot_record())
        file.seek(PARTITION_START)
        file.write(settings_tar(NAME, VERSION))
        for start in range(PARTITION_START + PARTITION_SIZE, SIZE, 2**20):
            file.seek(start)
            file.write(scatter.randbytes(scatter.randrange(1, 2**19)))
    block_map.write_text(bmap.write(bmap.create(image)))
    manifest = ImageManifest(
        name=NAME,
        version=VERSION,
        agent="-",
        image=image.name,
        sha256=digest(image),
        size=SIZE,
        compressed=None,
        compressed_sha256=None,
        bmap=block_map.name,
        bmap_sha256=digest(block_map),
        kernel="-",
        partitions=(Partition(1, "tar", "SETTINGS", PARTITION_START, PARTITION_SIZE, "-", "-"),),
        packages=(Package("sample", NAME, VERSION),),
        directory=folder,
    )
    description.write_text(manifest.dump())
    return manifest
