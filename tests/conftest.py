"""Fixtures for all."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.site import Site, open_site

#: Files that take minutes, the longest first: they begin first, so that no worker is left with one at the end.
LONG_FILES = (
    "vm/test_update.py",
    "vm/test_update_cuts.py",
    "vm/test_os_update.py",
    "vm/test_line_on_the_virtual_pi.py",
    "vm/test_boot.py",
    "tests/test_line.py",
    "tests/test_readme.py",
)

#: Temporary files lie in memory where there is enough: what we write to stay is fsynced, and a test cuts no real power.
MEMORY = Path("/dev/shm")  # noqa: S108
ENOUGH = 4 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Tests write to memory; the media of virtual Pis are too large for it."""
    if config.option.markexpr != "vm" and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A factory site with a local cloud."""
    with open_site(tmp_path_factory.mktemp("site")) as opened:
        yield opened


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means here: two workers a processor, as tests wait half of the time; a virtual Pi does not."""
    return (os.cpu_count() or 1) * (1 if config.option.markexpr == "vm" else 2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files come first; hardware tests run only when they are asked for by name."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(f"{item.path.parent.name}/{item.path.name}", len(order)))
    if "hardware" not in (config.option.markexpr or ""):
        skip = pytest.mark.skip(reason="needs a real board: pytest -m hardware")
        for item in items:
            if "hardware" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing may be skipped because a system part is missing."""
    if os.environ.get("CI") and (reporter := session.config.pluginmanager.get_plugin("terminalreporter")):
        missing = [report for report in reporter.stats.get("skipped", []) if "not installed" in str(report.longrepr)]
        if missing:
            session.exitstatus = 1
            reporter.write_line(f"CI skips nothing for want of a system part, but skipped {len(missing)}:", red=True)
            for report in missing:
                reporter.write_line(f"  {report.nodeid}: {report.longrepr[-1]}")
