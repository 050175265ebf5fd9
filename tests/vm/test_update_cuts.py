"""The other half of the moments at which the plug is pulled in an update (test_update.py), on a unit of its own."""

import pytest

from cloud.rollout import Status
from tests.vm.shipping import CUTS, MOMENTS, Fielded

pytestmark = pytest.mark.vm


def test_the_plug_pulled_at_the_other_half_leaves_the_old_release_or_the_new(unit: Fielded) -> None:
    (first,) = unit.archives
    unit.build("0.1.3", first)
    unit.build("0.1.4", "0.1.3", first)

    ended = unit.cut_updates("0.1.3", "0.1.4", MOMENTS[CUTS // 2 :])

    assert len(ended) == CUTS - CUTS // 2
    assert set(ended) <= {Status.SUCCEEDED, Status.FAILED}
