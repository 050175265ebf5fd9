"""The simulated board's image: small, and shaped like the real one, so that the line flashes it in the same way.

An MBR with one FAT-typed partition that holds a tar of the root file system: the agent's settings, the launcher, the
first release with the links to it, and the TUF root that updates are trusted by. Around it lie blocks that are mapped
but scattered, so that a flash has holes to skip.
"""

import io
import random
import struct
import tarfile
import tempfile
from pathlib import Path

from image import bmap
from image.manifest import ImageManifest, Package, Partition, Support, shipped
from image.recipe import load
from image.release import SIMULATED_HARDWARE, agent_version, simulated_release

NAME, VERSION = "picket-sample", "1"
SIZE = 16 * 2**20
PARTITION_START = 2**20
PARTITION_SIZE = 4 * 2**20
SECTOR = 512

AGENT = Path(__file__).parent.parent / "firmware_agent"
RECIPE = Path(__file__).parent / "recipes" / "picket.toml"

SETTINGS = """\
[image]
name = "{name}"
version = "{version}"
[pir]
warm_up_seconds = 0.5
[tamper.lines]
"pinctrl-bcm2835" = 27
[tuning]
heartbeat_seconds = 5
[update]
health_seconds = 5
soft_seconds = 30
"""


def system_tar(name: str, version: str, trust: Path | None) -> bytes:
    """What the simulated board finds in its first partition; the same bytes each time.

    Args:
        name: of the image.
        version: of the image.
        trust: the TUF root that updates are trusted by; without one the unit takes none.
    """
    packed = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        release = simulated_release(Path(folder), load(RECIPE))
        _add(archive, "etc/picket/agent.toml", SETTINGS.format(name=name, version=version).encode())
        _add(archive, "usr/lib/picket/launcher.py", (AGENT / "launcher.py").read_bytes())
        if trust is not None:
            _add(archive, "usr/share/picket/root.json", trust.read_bytes())
        for path in sorted(path for path in release.rglob("*") if path.is_file()):
            _add(archive, f"opt/picket/releases/{path.relative_to(folder)}", path.read_bytes(), 0o444)
        link = tarfile.TarInfo("opt/picket/current")
        link.type, link.linkname = tarfile.SYMTYPE, f"releases/{release.name}"
        archive.addfile(link)
    return packed.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def master_boot_record() -> bytes:
    """A partition table with the one partition (type 0x0C, FAT32 LBA)."""
    record = bytearray(SECTOR)
    entry = struct.pack(
        "<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x0C, b"\xfe\xff\xff", PARTITION_START // SECTOR, PARTITION_SIZE // SECTOR
    )
    record[446:462] = entry
    record[510:512] = b"\x55\xaa"
    return bytes(record)


def build(description: Path, trust: Path | None = None) -> ImageManifest:
    """Write the sample image, its block map and its description beside each other; the same bytes each time.

    Args:
        description: where the description goes.
        trust: the TUF root for the image; without one its units take no updates.
    """
    folder = description.parent
    folder.mkdir(parents=True, exist_ok=True)
    image, block_map = folder / f"{NAME}.img", folder / f"{NAME}.bmap"
    scatter = random.Random(NAME)  # noqa: S311  (the same blocks each time is what is wanted)
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.write(master_boot_record())
        file.seek(PARTITION_START)
        file.write(system_tar(NAME, VERSION, trust))
        for start in range(PARTITION_START + PARTITION_SIZE, SIZE, 2**20):
            file.seek(start)
            file.write(scatter.randbytes(scatter.randrange(1, 2**19)))
    block_map.write_text(bmap.write(bmap.create(image)))
    manifest = ImageManifest(
        name=NAME,
        version=VERSION,
        agent=agent_version(),
        kernel="-",
        security_version=load(RECIPE).security_version,
        epoch=0,
        base=None,
        boards=("simulated",),
        hardware=SIMULATED_HARDWARE,
        control=None,
        verity=None,
        support=Support(None, None),
        factory_key=None,
        image=shipped(image),
        compressed=None,
        bmap=shipped(block_map),
        bundle=None,
        partitions=(Partition(1, "tar", "SETTINGS", PARTITION_START, PARTITION_SIZE, "-", "-"),),
        packages=(Package("sample", NAME, VERSION),),
        directory=folder,
    )
    description.write_text(manifest.dump())
    return manifest
