"""The bills of materials: valid by the libraries' own checks, complete, and the same each time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from image import sbom
from image.errors import ImageError
from image.manifest import digest
from image.release import agent_version

ROOT = Path(__file__).parent.parent.parent
EPOCH = 1_735_689_600


def package(name: str, version: str, source: str = "", status: str = "install ok installed", depends: str = "") -> str:
    lines = [f"Package: {name}", f"Status: {status}", "Priority: optional", "Section: misc"]
    lines += ["Maintainer: Somebody <somebody@example.com>", "Architecture: arm64", f"Version: {version}"]
    lines += [f"Source: {source}"] if source else []
    lines += [f"Depends: {depends}"] if depends else []
    return "\n".join([*lines, "Description: a package", " that the test made"])


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    root, boot = tmp_path / "root", tmp_path / "boot"
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/arch-native").write_text("arm64\n")
    status = [
        package("libc6", "2.41-12", source="glibc"),
        package("bash", "5.2.37-2", depends="libc6"),
        package("raspi-firmware", "1.20240424+ds-6"),
        package("linux-image-arm64", "6.12.57-1", source="linux-signed-arm64 (6.12.57+1)"),
        package("linux-image-6.12.57+deb13-arm64", "6.12.57-1", source="linux-signed-arm64 (6.12.57+1)"),
        package("gone", "1.0-1", status="deinstall ok config-files"),
    ]
    (root / "var/lib/dpkg/status").write_text("\n\n".join(status) + "\n")
    boot.mkdir()
    for name in ("bootcode.bin", "start4.elf", "fixup4.dat", "vmlinuz", "config.txt"):
        (boot / name).write_text(f"content of {name}")
    (boot / "LICENCE.broadcom").write_text("Redistribution in binary form is permitted.\n")
    return root, boot


def written(trees: tuple[Path, Path], folder: Path) -> tuple[Path, Path, sbom.Counts]:
    spdx, cdx = folder / "picket.spdx.json", folder / "picket.cdx.json"
    counts = sbom.write(*trees, "picket", "1.2.3", EPOCH, spdx, cdx)
    return spdx, cdx, counts


def by_name(things: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {thing["name"]: thing for thing in things}


def test_both_documents_are_valid_by_their_libraries(trees: tuple[Path, Path], tmp_path: Path) -> None:
    spdx, cdx, _ = written(trees, tmp_path)

    assert validate_full_spdx_document(parse_file(str(spdx)), "SPDX-2.3") == []
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(cdx.read_text()) is None


def test_all_that_is_in_the_image_is_named_with_its_version(trees: tuple[Path, Path], tmp_path: Path) -> None:
    spdx, cdx, counts = written(trees, tmp_path)
    expected = {
        "bash": "5.2.37-2",
        "libc6": "2.41-12",
        "glibc": "2.41-12",
        "linux-image-6.12.57+deb13-arm64": "6.12.57-1",
        "picket-agent": agent_version(),
        "start4.elf": "1.20240424+ds-6",
        "fixup4.dat": "1.20240424+ds-6",
        "bootcode.bin": "1.20240424+ds-6",
        "vmlinuz": "6.12.57-1",
    }

    packages = by_name(json.loads(spdx.read_text())["packages"])
    components = by_name(json.loads(cdx.read_text())["components"])

    assert {name: packages[name]["versionInfo"] for name in expected} == expected
    assert {name: components[name]["version"] for name in expected} == expected
    assert components["cryptography"]["purl"].startswith("pkg:pypi/cryptography@")
    assert packages["picket"]["versionInfo"] == "1.2.3"
    assert (counts.debian, counts.firmware, counts.kernels) == (5, 3, 1)
    assert counts.python == sum(component.get("purl", "").startswith("pkg:pypi/") for component in components.values())
    assert counts.sources == sum("arch=source" in component.get("purl", "") for component in components.values())


def test_a_package_that_was_taken_away_is_not_named(trees: tuple[Path, Path], tmp_path: Path) -> None:
    spdx, cdx, _ = written(trees, tmp_path)

    assert "gone" not in by_name(json.loads(spdx.read_text())["packages"])
    assert "gone" not in by_name(json.loads(cdx.read_text())["components"])


def test_boot_files_have_their_digest_their_licence_and_where_they_come_from(
    trees: tuple[Path, Path], tmp_path: Path
) -> None:
    spdx, cdx, _ = written(trees, tmp_path)
    expected = digest(trees[1] / "start4.elf")

    document, bom = json.loads(spdx.read_text()), json.loads(cdx.read_text())
    packages, components = by_name(document["packages"]), by_name(bom["components"])
    start = packages["start4.elf"]
    depends = {entry["ref"]: entry.get("dependsOn") for entry in bom["dependencies"]}

    assert start["checksums"] == [{"algorithm": "SHA256", "checksumValue": expected}]
    assert components["start4.elf"]["hashes"] == [{"alg": "SHA-256", "content": expected}]
    assert document["hasExtractedLicensingInfos"][0]["licenseId"] == start["licenseDeclared"]
    assert "in binary form" in document["hasExtractedLicensingInfos"][0]["extractedText"]
    assert {
        "spdxElementId": start["SPDXID"],
        "relationshipType": "GENERATED_FROM",
        "relatedSpdxElement": packages["raspi-firmware"]["SPDXID"],
    } in document["relationships"]
    assert depends[components["vmlinuz"]["bom-ref"]] == [components["linux-image-6.12.57+deb13-arm64"]["bom-ref"]]


def test_the_kernel_of_the_pi_5_comes_from_its_own_package(trees: tuple[Path, Path], tmp_path: Path) -> None:
    root, boot = trees
    kernels = {"linux-image-6.12.47+rpt-rpi-v8": "2:6.12.47-1", "linux-image-6.12.47+rpt-rpi-2712": "2:6.12.47-2"}
    status = [package("dpkg", "1.22.21"), *(package(*item) for item in kernels.items())]
    (root / "var/lib/dpkg/status").write_text("\n\n".join(status) + "\n")
    (boot / "vmlinuz").unlink()
    for name in ("kernel8.img", "kernel_2712.img"):
        (boot / name).write_text(name)

    _, cdx, counts = written(trees, tmp_path)
    components = by_name(json.loads(cdx.read_text())["components"])

    assert counts.kernels == 2
    assert components["kernel8.img"]["version"] == "2:6.12.47-1"
    assert components["kernel_2712.img"]["version"] == "2:6.12.47-2"


def test_firmware_without_a_package_and_a_licence_is_named_all_the_same(
    trees: tuple[Path, Path], tmp_path: Path
) -> None:
    root, boot = trees
    (root / "var/lib/dpkg/status").write_text(package("dpkg", "1.22.21") + "\n")
    (boot / "LICENCE.broadcom").unlink()

    spdx, _, _ = written(trees, tmp_path)
    start = by_name(json.loads(spdx.read_text())["packages"])["start4.elf"]

    assert (start["versionInfo"], start["licenseDeclared"]) == ("unknown", "NOASSERTION")
    assert validate_full_spdx_document(parse_file(str(spdx)), "SPDX-2.3") == []


def test_the_same_image_gives_the_same_bytes_in_any_process(trees: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        script = (
            "import sys; from pathlib import Path; from image import sbom; root, boot, out = map(Path, sys.argv[1:]);"
            f"sbom.write(root, boot, 'picket', '1.2.3', {EPOCH}, out / 'spdx', out / 'cdx')"
        )
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": f"UTC+{seed}"}
        subprocess.run([sys.executable, "-c", script, *trees, folder], check=True, cwd=ROOT, env=environment)
        found.append(((folder / "spdx").read_bytes(), (folder / "cdx").read_bytes()))

    assert found[0] == found[1]
    assert b"2025-01-01T00:00:00Z" in found[0][0]


def test_apts_lists_do_not_change_a_document(trees: tuple[Path, Path], tmp_path: Path) -> None:
    before = [path.read_bytes() for path in written(trees, tmp_path)[:2]]
    lists = trees[0] / "var/lib/apt/lists"
    lists.mkdir(parents=True)
    stem = "deb.example.com_debian_dists_trixie"
    (lists / f"{stem}_InRelease").write_text(
        "Origin: Debian\nSuite: stable\nCodename: trixie\nArchitectures: arm64\nComponents: main\n"
    )
    (lists / f"{stem}_main_binary-arm64_Packages").write_text(
        f"{package('bash', '5.2.37-2')}\nHomepage: https://example.com\nSHA256: {'ab' * 32}\n"
    )

    assert [path.read_bytes() for path in written(trees, tmp_path)[:2]] == before


def test_another_version_is_another_document(trees: tuple[Path, Path], tmp_path: Path) -> None:
    spdx, cdx, _ = written(trees, tmp_path)
    names = {json.loads(spdx.read_text())["documentNamespace"], json.loads(cdx.read_text())["serialNumber"]}

    sbom.write(*trees, "picket", "1.2.4", EPOCH, spdx, cdx)

    assert names.isdisjoint(
        {json.loads(spdx.read_text())["documentNamespace"], json.loads(cdx.read_text())["serialNumber"]}
    )


def test_a_root_without_dpkgs_list_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="dpkg/status is missing"):
        sbom.write(tmp_path, tmp_path, "picket", "1", EPOCH, tmp_path / "spdx", tmp_path / "cdx")
