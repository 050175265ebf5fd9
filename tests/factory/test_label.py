"""The label: what a scanner reads off it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import factory.label
from factory.bench import Unit
from factory.errors import StationFault
from factory.label import draw, label, scan
from factory.record import NoWatcher, Step


@settings(max_examples=30, deadline=None)
@given(st.from_regex(r"[A-Z0-9][A-Z0-9-]{2,30}[A-Z0-9]", fullmatch=True))
def test_any_serial_scans_back(serial: str) -> None:
    assert scan(draw(Unit(serial, "WO-1"), "Picket motion alarm")) == serial


def test_the_printed_label_scans_back(tmp_path: Path) -> None:
    path = label(Unit("PK-000042", "WO-1"), "Picket motion alarm", tmp_path, Step("label", NoWatcher()))

    with Image.open(path) as printed:
        assert scan(printed) == "PK-000042"
        assert printed.info["dpi"][0] == pytest.approx(300, abs=1)


def test_a_label_that_reads_otherwise_is_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = draw(Unit("PK-000043", "WO-1"), "Picket motion alarm")
    monkeypatch.setattr(factory.label, "draw", lambda _unit, _product: wrong)

    with pytest.raises(StationFault, match="reads 'PK-000043'"):
        label(Unit("PK-000042", "WO-1"), "Picket motion alarm", tmp_path, Step("label", NoWatcher()))

    assert list(tmp_path.iterdir()) == []
