"""The bills of materials of an image, as SPDX 2.3 and CycloneDX 1.6: what is in it, in which version, made from what.

debsbom reads dpkg's own list, so nobody guesses from file names, and no network is asked. What dpkg did not install is
added here: the agent, its Python packages, and the files that only the boot partition has. The same image gives the
same bytes. Licences have a text of their own (`image.licences`).
"""

import io
import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import ParseResult
from uuid import NAMESPACE_URL, UUID, uuid5

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.bom_ref import BomRef
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.dependency import Dependency
from cyclonedx.output.json import JsonV1Dot6
from debsbom.generate import Debsbom, SBOMType
from packageurl import PackageURL
from spdx_tools.common.spdx_licensing import spdx_licensing
from spdx_tools.spdx.model.checksum import Checksum, ChecksumAlgorithm
from spdx_tools.spdx.model.document import Document
from spdx_tools.spdx.model.extracted_licensing_info import ExtractedLicensingInfo
from spdx_tools.spdx.model.package import ExternalPackageRef, ExternalPackageRefCategory, Package, PackagePurpose
from spdx_tools.spdx.model.relationship import Relationship, RelationshipType
from spdx_tools.spdx.model.spdx_no_assertion import SpdxNoAssertion
from spdx_tools.spdx.writer.json.json_writer import write_document_to_stream

from image import wheels
from image.errors import ImageError
from image.manifest import digest
from image.release import agent_version

_LOCK = Path(__file__).parent.parent / "requirements/device.lock"

#: Begins the name of every document; nothing has to be there.
_NAMESPACE = "/spdxdocs/"
_HOST = "picket.invalid"

#: Files of the boot tree that are programs, by kind.
GPU_FIRMWARE = re.compile(r"bootcode\.bin|start.*\.elf|fixup.*\.dat")
_KERNEL = re.compile(r"vmlinuz.*|kernel.*\.img")

_BROADCOM = "LicenseRef-LICENCE.broadcom"
_DEBSBOM_LOGGER = logging.getLogger("debsbom")


@dataclass(frozen=True)
class Counts:
    """How many of a kind the documents name: Debian's packages and their sources, wheels, boot files."""

    debian: int
    sources: int
    python: int
    firmware: int
    kernels: int


@dataclass(frozen=True)
class _Part:
    """Something that dpkg did not install.

    Attributes:
        kind: `agent`, `python`, `firmware` or `kernel`.
        name: of the package, or the file's path in the boot tree.
        version: of the package that it is or comes from.
        sha256: of a file.
        origin: the Debian package that a file comes from.
    """

    kind: str
    name: str
    version: str
    sha256: str | None = None
    origin: str | None = None

    @property
    def reference(self) -> str:
        return f"{self.kind}-{re.sub(r'[^A-Za-z0-9.-]', '-', self.name)}"

    @property
    def purl(self) -> str | None:
        return PackageURL("pypi", name=self.name, version=self.version).to_string() if self.kind == "python" else None


_PURPOSES = {
    "agent": (PackagePurpose.APPLICATION, ComponentType.APPLICATION),
    "python": (PackagePurpose.LIBRARY, ComponentType.LIBRARY),
    "firmware": (PackagePurpose.FIRMWARE, ComponentType.FIRMWARE),
    "kernel": (PackagePurpose.FILE, ComponentType.FILE),
}


def write(root: Path, boot: Path, name: str, version: str, epoch: int, spdx: Path, cdx: Path) -> Counts:
    """Write both documents about an image.

    Args:
        root: the root tree; dpkg's list in it is read, nothing is run.
        boot: the tree that the boot partition holds.
        name: of the image.
        version: of the image.
        epoch: what the documents say as the time of their making, in seconds.
        spdx: the SPDX file to write.
        cdx: the CycloneDX file to write.

    Raises:
        ImageError: the root has no list of packages.
    """
    debian = _scan(root, name, version, epoch)
    installed = {package.name: package for package in debian.packages if package.is_binary()}
    parts = _parts(boot, {name: str(package.version) for name, package in installed.items()})

    document = debian.generate(SBOMType.SPDX)
    _add_to_spdx(document, parts, f"SPDXRef-{name}", _broadcom_text(root, boot))
    text = io.StringIO()
    write_document_to_stream(document, text, validate=False)
    spdx.write_text(text.getvalue() + "\n")

    bom = debian.generate(SBOMType.CycloneDX)
    _add_to_cdx(bom, parts)
    cdx.write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n")

    kinds = [part.kind for part in parts]
    sources = sum(package.is_source() for package in debian.packages)
    counted = (kinds.count(kind) for kind in ("python", "firmware", "kernel"))
    return Counts(len(installed), sources, *counted)


def _scan(root: Path, name: str, version: str, epoch: int) -> Debsbom:
    """What dpkg's list says, and nothing else: apt's lists, if a root has them, cost seconds and change by the day."""
    status = root / "var/lib/dpkg/status"
    if not status.is_file():
        raise ImageError(f"{status} is missing: the bill of materials is made from it")
    _DEBSBOM_LOGGER.setLevel(logging.ERROR)  # it warns of each source package whose maintainer dpkg does not list
    with tempfile.TemporaryDirectory() as alone:
        place = Path(alone, "var/lib/dpkg")
        place.mkdir(parents=True)
        for path in (status, status.with_name("arch-native")):
            if path.is_file():
                shutil.copyfile(path, place / path.name)
        debian = Debsbom(
            distro_name=name,
            distro_version=version,
            root=alone,
            timestamp=datetime.fromtimestamp(epoch, UTC),
            spdx_namespace=ParseResult("https", _HOST, f"{_NAMESPACE}{name}-{_identity(name, version)}", "", "", ""),
            cdx_serialnumber=_identity(name, version),
        )
        debian.scan()
    return debian


def _identity(name: str, version: str) -> UUID:
    return uuid5(NAMESPACE_URL, f"https://{_HOST}/sbom/{name}/{version}")


def _parts(boot: Path, installed: dict[str, str]) -> list[_Part]:
    """All that dpkg's list lacks; `installed` is that list, version by name."""
    parts = [_Part("agent", "picket-agent", agent_version())]
    parts += [_Part("python", *item) for item in sorted(wheels.versions(_LOCK.read_text()).items())]
    for path in sorted(path for path in boot.rglob("*") if path.is_file()):
        if GPU_FIRMWARE.fullmatch(path.name):
            kind, origin = "firmware", "raspi-firmware" if "raspi-firmware" in installed else None
        elif _KERNEL.fullmatch(path.name):
            kind, origin = "kernel", _kernel_package(path.name, installed)
        else:
            continue
        version = installed[origin] if origin else "unknown"
        parts.append(_Part(kind, str(path.relative_to(boot)), version, digest(path), origin))
    return parts


def _kernel_package(file: str, installed: dict[str, str]) -> str | None:
    """The package of a kernel; Raspberry Pi OS has two, and the one for the Pi 5 has 2712 in its names."""
    kernels = sorted(name for name in installed if re.match(r"linux-image-\d", name))
    fitting = [name for name in kernels if ("2712" in name) == ("2712" in file)]
    return next(reversed(fitting or kernels), None)


def _broadcom_text(root: Path, boot: Path) -> str | None:
    """The licence of the GPU's firmware, which lies beside the blobs or in the copyright file of their package."""
    for path in (boot / "LICENCE.broadcom", root / "usr/share/doc/raspi-firmware/copyright"):
        if path.is_file():
            return path.read_text(errors="replace")
    return None


def _add_to_spdx(document: Document, parts: list[_Part], image: str, broadcom: str | None) -> None:
    """Add the parts, and sort all: debsbom lists packages in the order of a set."""
    packages: dict[str, str] = {}
    for package in document.packages:
        if not package.spdx_id.endswith("-srcpkg"):
            packages[package.name] = package.spdx_id
    for part in parts:
        own = f"SPDXRef-{part.reference}"
        document.packages.append(_spdx_package(part, own, licensed=broadcom is not None))
        document.relationships.append(Relationship(own, RelationshipType.PACKAGE_OF, image))
        if part.origin:
            made_from = packages[part.origin]
            document.relationships.append(Relationship(own, RelationshipType.GENERATED_FROM, made_from))
    if broadcom is not None and any(part.kind == "firmware" for part in parts):
        document.extracted_licensing_info.append(
            ExtractedLicensingInfo(_BROADCOM, broadcom, license_name="Licence of the Raspberry Pi's GPU firmware")
        )
    document.packages.sort(key=lambda package: package.spdx_id)
    document.relationships.sort(
        key=lambda one: (one.spdx_element_id, one.relationship_type.name, str(one.related_spdx_element_id))
    )


def _spdx_package(part: _Part, identifier: str, *, licensed: bool) -> Package:
    unsaid = SpdxNoAssertion()
    declared = unsaid
    if part.kind == "agent":
        declared = spdx_licensing.parse("Apache-2.0")
    elif part.kind == "firmware" and licensed:
        declared = spdx_licensing.parse(_BROADCOM)
    named = ExternalPackageRefCategory.PACKAGE_MANAGER
    return Package(
        spdx_id=identifier,
        name=part.name,
        version=part.version,
        download_location=unsaid,
        files_analyzed=False,
        checksums=[Checksum(ChecksumAlgorithm.SHA256, part.sha256)] if part.sha256 else [],
        license_concluded=unsaid,
        license_declared=declared,
        copyright_text=unsaid,
        external_references=[ExternalPackageRef(named, "purl", part.purl)] if part.purl else [],
        primary_package_purpose=_PURPOSES[part.kind][0],
    )


def _add_to_cdx(bom: Bom, parts: list[_Part]) -> None:
    by_name = {
        component.name: component
        for component in bom.components
        if component.purl and component.purl.qualifiers.get("arch") != "source"
    }
    added = []
    for part in parts:
        component = Component(
            name=part.name,
            version=part.version,
            type=_PURPOSES[part.kind][1],
            bom_ref=BomRef(part.reference),
            purl=PackageURL.from_string(part.purl) if part.purl else None,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=part.sha256)] if part.sha256 else [],
        )
        bom.components.add(component)
        bom.register_dependency(component, [by_name[part.origin]] if part.origin else [])
        added.append(Dependency(component.bom_ref))
    described = bom.metadata.component
    if described is not None:
        next(one for one in bom.dependencies if one.ref == described.bom_ref).dependencies.update(added)
