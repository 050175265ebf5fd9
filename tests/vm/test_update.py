"""Updates on the virtual Pi: the real image, the real fleet commands, and a plug that is pulled."""

import pytest

from cloud.rollout import Status
from cloud.showcase import SLIP
from tests.vm.shipping import CUTS, MOMENTS, Fielded

pytestmark = pytest.mark.vm


def test_a_release_reaches_the_unit_as_a_delta_and_is_committed(unit: Fielded) -> None:
    (first,) = unit.archives
    unit.build("0.1.1", first)

    assert unit.update("0.1.1") == (Status.SUCCEEDED, "")

    unit.runs("0.1.1")


def test_a_release_that_cannot_do_its_work_comes_back_by_itself_and_says_why(unit: Fielded) -> None:
    unit.shipping.build("0.1.2", unit.archives["0.1.1"], change=SLIP)
    unit.shipping.publish("0.1.2")

    status, said = unit.update("0.1.2")

    assert status is Status.FAILED
    assert "unhealthy" in said
    unit.runs("0.1.1")


def test_the_plug_pulled_at_half_of_twenty_moments_leaves_the_old_release_or_the_new(unit: Fielded) -> None:
    unit.build("0.1.3", "0.1.1")
    unit.build("0.1.4", "0.1.3", "0.1.1")

    ended = unit.cut_updates("0.1.3", "0.1.4", MOMENTS[: CUTS // 2])

    assert len(ended) == CUTS // 2
    assert set(ended) <= {Status.SUCCEEDED, Status.FAILED}
