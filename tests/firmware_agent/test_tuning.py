"""What the owner may change: refused by name when it makes no sense, kept when it does."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import tuning
from firmware_agent.errors import SettingsFault
from firmware_agent.settings import parse as parse_settings
from firmware_agent.tuning import BadTuning, Tuning

IMAGE = Tuning(quiet_seconds=20.0)

numbers = {
    "quiet_seconds": st.floats(0, 3600),
    "stuck_seconds": st.floats(10, 86400),
    "silent_hours": st.floats(0, 8760),
    "heartbeat_seconds": st.integers(5, 86400),
    "report_seconds": st.integers(300, 86400),
}
documents = st.fixed_dictionaries(
    {},
    optional={"sensitivity": st.sampled_from(tuning.SENSITIVITIES), **{k: st.none() | v for k, v in numbers.items()}},
)
anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(list(numbers)), inner),
    max_leaves=5,
)


@given(documents)
def test_what_is_asked_for_is_taken_and_the_rest_is_the_images(wanted: dict[str, Any]) -> None:
    taken = asdict(tuning.parse(wanted, IMAGE))

    assert taken == asdict(IMAGE) | {key: value for key, value in wanted.items() if value is not None}


@given(documents)
def test_what_was_kept_comes_back_and_a_default_follows_the_next_image(wanted: dict[str, Any]) -> None:
    import tempfile  # noqa: PLC0415 - hypothesis calls this many times in one tmp_path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tuning.json"
        asked = tuning.parse(wanted, IMAGE)
        tuning.save(path, asked, IMAGE)
        assert tuning.load(path, IMAGE) == asked
        later = Tuning(quiet_seconds=33.0)
        if asked.quiet_seconds == IMAGE.quiet_seconds:
            assert tuning.load(path, later).quiet_seconds == 33.0


@given(anything)
def test_nothing_that_a_cloud_could_say_does_harm(wanted: Any) -> None:
    try:
        taken = tuning.parse(wanted, IMAGE)
    except BadTuning:
        return
    assert taken.sensitivity in tuning.SENSITIVITIES
    for name, value in asdict(taken).items():
        if name != "sensitivity":
            assert 0 <= value <= 86400


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"sensitivity": "max"}, "sensitivity must be one of low, normal, high, not 'max'"),
        ({"sensitivity": ["low"]}, "sensitivity must be one of"),
        ({"quiet_seconds": -1}, "quiet_seconds must be a number from 0 to 3600, not '-1'"),
        ({"quiet_seconds": True}, "quiet_seconds must be a number"),
        ({"quiet_seconds": float("nan")}, "quiet_seconds must be a number"),
        ({"report_seconds": 60}, "report_seconds must be a number from 300 to 86400"),
        ({"volume": 11}, "there is no 'volume' to tune; known are sensitivity, "),
        (["low"], "the tuning must be an object with any of sensitivity, "),
    ],
)
def test_a_refusal_names_the_key_and_what_is_allowed(wanted: Any, message: str) -> None:
    with pytest.raises(BadTuning, match=message):
        tuning.parse(wanted, IMAGE)


def test_without_a_file_the_image_decides(tmp_path: Path) -> None:
    assert tuning.load(tmp_path / "tuning.json", IMAGE) == IMAGE


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"tuning": 1}', '{"tuning": {"quiet_seconds": "x"}}', "\x00" * 64]
)
def test_a_damaged_file_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)

    with pytest.raises(BadTuning, match="is damaged"):
        tuning.load(path, IMAGE)


def test_a_key_of_a_newer_release_does_not_stand_in_the_way_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"format": 1, "tuning": {"volume": 11, "quiet_seconds": 5}}))

    assert tuning.load(path, IMAGE).quiet_seconds == 5


def test_the_images_settings_give_the_defaults_under_the_same_rules() -> None:
    text = '[image]\nname = "x"\nversion = "1"\n[tuning]\n'

    assert parse_settings(text + 'sensitivity = "low"').tuning == Tuning(sensitivity="low")
    with pytest.raises(SettingsFault, match=r"tuning\.report_seconds must be a number from 300 to 86400, not 5"):
        parse_settings(text + "report_seconds = 5")
    assert {one.name for one in fields(Tuning)} >= set(numbers)
