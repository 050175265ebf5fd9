"""Whole images on the virtual Pi: from the rollout to the kept slot, and from a bad slot back."""

import time

import pytest

from cloud.rollout import Kind, Status
from cloud.showcase import SLIP
from tests.vm.shipping import Fielded

pytestmark = pytest.mark.vm

#: The kernel finds no first program, and panics; whoever is on trial is not given another one.
DEAD = 'cmdline.add = ["rdinit=/nothing"]'


#: Some seconds into an update, which takes a minute and more.
DOWNLOADED_OR_INSTALLED = 25.0


def test_an_image_reaches_the_unit_and_stays(unit: Fielded) -> None:
    unit.build_image("0.2.0")

    assert unit.update_image("0.2.0") == (Status.SUCCEEDED, "")

    unit.boots("0.2.0")
    before = unit.boot_id()
    unit.power_cycle()
    unit.comes_back(before)
    unit.boots("0.2.0")


def test_an_image_whose_agent_cannot_do_its_work_is_taken_back_and_says_why(unit: Fielded) -> None:
    unit.build_image("0.2.1", change=SLIP)

    status, said = unit.update_image("0.2.1")

    assert status is Status.FAILED
    assert "unhealthy" in said
    unit.boots("0.2.0")


def test_an_image_that_does_not_come_up_is_tried_once(unit: Fielded) -> None:
    unit.build_image("0.2.2", DEAD)

    status, said = unit.update_image("0.2.2")

    assert status is Status.FAILED
    assert "crashed" in said
    unit.boots("0.2.0")


def test_the_plug_pulled_during_an_update_leaves_an_image_that_works(unit: Fielded) -> None:
    unit.build_image("0.2.3")

    job = unit.shipping.start("0.2.3", Kind.OS)
    time.sleep(DOWNLOADED_OR_INSTALLED)
    unit.power_cycle()
    status, said = unit.image_ended(job)

    assert status in {Status.SUCCEEDED, Status.FAILED}, said
    unit.boots("0.2.3" if status is Status.SUCCEEDED else "0.2.0")
