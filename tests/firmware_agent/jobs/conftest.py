"""Fixtures of the jobs' tests; what they are made of is in world.py."""

from collections.abc import Iterator

import pytest

from tests.firmware_agent.jobs.world import DELTA, FULL, Goods, Web, make_goods


@pytest.fixture(scope="session")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Goods:
    return make_goods(tmp_path_factory.mktemp("goods"))


@pytest.fixture(scope="session")
def web(goods: Goods) -> Iterator[Web]:
    web = Web()
    web.content = {f"/{FULL}": goods.full, f"/{DELTA}": goods.delta}
    yield web
    web.close()
