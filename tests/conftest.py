"""Fixtures for all."""

import os
from collections.abc import Iterator

import pytest

from tests.site import Site, open_site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A factory site with a local cloud."""
    with open_site(tmp_path_factory.mktemp("site")) as opened:
        yield opened


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Hardware tests run only when they are asked for by name."""
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
