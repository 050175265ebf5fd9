"""Imports go one way: this is the picture of the architecture that cannot drift from the code."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"image", "factory", "firmware_agent", "cloud", "station"}

#: Who may import what, beside its own package. A name is a package or one module of it.
ARROWS = {
    "firmware_agent": set[str](),
    "image": {"firmware_agent.update.archive", "firmware_agent.update.delta", "firmware_agent.update.BadArchive"},
    "cloud": {"firmware_agent.topics"},
    "factory": {
        "image.manifest",
        "image.bmap",
        "image.errors",
        "image.firmware",
        "firmware_agent.wire",
        "firmware_agent.topics",
    },
    "factory/drivers/simulated.py": {"firmware_agent"},
    "factory/drivers/software_tpm.py": {"firmware_agent"},
}


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "files" not in path.parts)


def imported(path: Path) -> set[str]:
    """Full dotted names of what a module imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def allowed(name: str, arrows: set[str]) -> bool:
    return any(name == arrow or name.startswith(f"{arrow}.") for arrow in arrows)


@pytest.mark.parametrize("package", ["firmware_agent", "image", "cloud", "factory"])
def test_a_package_imports_only_where_its_arrows_point(package: str) -> None:
    wrong = []
    for path in modules(package):
        where = str(path.relative_to(ROOT))
        arrows = ARROWS[package] | ARROWS.get(where, set()) | {package}
        wrong += [
            f"{where} imports {name}"
            for name in sorted(imported(path))
            if name.split(".")[0] in OURS and not allowed(name, arrows)
        ]

    assert wrong == []


def test_only_the_table_of_benches_picks_drivers() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("factory")
        if path.parent.name != "drivers" and path.name != "benches.py"
        for name in imported(path)
        if name.startswith("factory.drivers")
    ]

    assert wrong == []


def test_the_steps_do_not_import_each_others_line() -> None:
    assert [
        str(path.relative_to(ROOT))
        for path in modules("factory")
        if path.name not in {"line.py", "screen.py"} and any(name.startswith("factory.line") for name in imported(path))
    ] == []


def test_the_agent_imports_nothing_of_the_station() -> None:
    """The device has the packages of device.lock, and no others."""
    device = {"awscrt", "awsiot", "cryptography", "gpiozero", "lgpio", "pkcs11", "firmware_agent"}
    device |= {"securesystemslib", "tuf", "urllib3", "zstandard"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("firmware_agent")
        for name in imported(path)
        if name.split(".")[0] not in device | sys.stdlib_module_names
    ]

    assert wrong == []
