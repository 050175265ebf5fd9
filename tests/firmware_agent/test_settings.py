"""The image's settings are taken whole or refused by name."""

import dataclasses
from pathlib import Path

import pytest

from firmware_agent.errors import SettingsFault
from firmware_agent.settings import load, parse

IMAGE = '[image]\nname = "picket"\nversion = "1"\n'


def test_what_a_file_leaves_out_has_its_documented_value() -> None:
    settings = parse(IMAGE)

    assert settings.key.store == "probe-once"
    assert settings.paths.state == Path("/var/lib/picket")
    assert settings.pir.lines["pinctrl-bcm2711"] == 17
    assert settings.pir.lines["9030000.pl061"] == 5


def test_every_setting_can_be_set() -> None:
    settings = parse(
        IMAGE + '[key]\nstore = "tpm"\n'
        '[tpm]\nmodule = "/m.so"\ntcti = "device:/dev/tpmrm0"\ntoken = "t"\nkey = "k"\n'
        '[pir]\nwarm_up_seconds = 0.5\n[pir.lines]\n"chip" = 4\n'
        '[mqtt]\nkeep_alive_seconds = 60\n[tuning]\nheartbeat_seconds = 10\nsensitivity = "low"\n'
        '[paths]\nstate = "/s"\nrun = "/r"\nhost_key = "/h"\nsealed = "/p"\n'
    )

    assert settings.tpm.module == Path("/m.so")
    assert dict(settings.pir.lines) == {"chip": 4}
    assert settings.pir.warm_up_seconds == 0.5
    assert settings.tuning.sensitivity == "low"
    assert settings.paths.sealed == Path("/p")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[image", "TOML"),
        ("", "image"),
        ('[image]\nname = "picket"\n', "version"),
        (IMAGE + "[kye]\n", "[kye]"),
        (IMAGE + '[key]\nstor = "tpm"\n', "key.stor"),
        (IMAGE + '[key]\nstore = "auto"\n', "key.store"),
        (IMAGE + "[key]\nstore = []\n", "key.store"),
        (IMAGE + "[pir]\nwarm_up_seconds = -1\n", "pir.warm_up_seconds"),
        (IMAGE + "[pir]\nwarm_up_seconds = nan\n", "pir.warm_up_seconds"),
        (IMAGE + "[pir]\nlines = {}\n", "pir.lines"),
        (IMAGE + '[pir.lines]\nchip = "17"\n', "pir.lines"),
        (IMAGE + "[mqtt]\nkeep_alive_seconds = true\n", "mqtt.keep_alive_seconds"),
        (IMAGE + "[mqtt]\nkeep_alive_seconds = 5\n", "mqtt.keep_alive_seconds"),
        (IMAGE + '[paths]\nstate = "relative"\n', "paths.state"),
        ("image = 3\n", "[image]"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(SettingsFault) as refusal:
        parse(text)

    assert named in str(refusal.value)


def test_a_missing_file_says_who_must_bring_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsFault, match="the image must bring this file"):
        load(tmp_path / "agent.toml")


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(IMAGE).key.store = "file"  # type: ignore[misc]
