from dataclasses import replace
from pathlib import Path

import jinja2
import pytest

from firmware_agent import settings
from image import boot
from image.disk import Verity
from image.layout import autoboot_txt
from image.recipe import load
from image.render import render

RECIPE = replace(load(Path("image/recipes/picket.toml")), wifi_country="GB", cmdline=("a=b",), config=("dtoverlay=x",))


def test_a_missing_value_stops_the_build() -> None:
    with pytest.raises(jinja2.UndefinedError, match="version"):
        render("config.txt", name="picket")


def test_the_agent_understands_its_settings() -> None:
    text = render("agent.toml", name="picket", version="1.2", key_store="probe-once", pir_line=4, endpoint="")

    found = settings.parse(text)

    assert str(found.image) == "picket 1.2"
    assert found.key.store == "probe-once"
    assert found.pir.lines["pinctrl-bcm2711"] == 4


def test_the_factory_key_opens_the_agent_and_nothing_else() -> None:
    line = render("factory_authorized_keys", factory_key="ssh-ed25519 AAAA factory")

    assert line == 'restrict,command="/usr/bin/picket-agent provision" ssh-ed25519 AAAA factory\n'


def test_the_command_line_is_one_line_and_names_neither_console_nor_slot() -> None:
    text = boot.cmdline_txt(0x12AB, Verity("ab" * 32, "cd" * 32, 100), RECIPE)

    assert text.count("\n") == 1
    assert f"picket.disk=000012ab picket.verity={'ab' * 32}:{'cd' * 32}:100 ro " in text
    assert "console=" not in text  # the board's device tree says where its console is
    assert text.endswith(" cfg80211.ieee80211_regdom=GB a=b\n")
    assert "slot" not in text  # both slots have the same


def test_autoboot_txt_is_one_sector_whichever_slot_it_names() -> None:
    assert len(autoboot_txt(2, 3)) == len(autoboot_txt(3, 2)) == 512
    assert autoboot_txt(3, 2).decode().split() == [
        "[all]", "tryboot_a_b=1", "boot_partition=3", "[tryboot]", "boot_partition=2",
    ]  # fmt: skip


def test_the_recipes_lines_come_behind_what_every_image_has() -> None:
    lines = boot.config_txt(RECIPE).splitlines()

    assert lines[-2:] == ["[all]", "dtoverlay=x"]
    assert "kernel=vmlinuz" in lines
    assert "dtoverlay" not in boot.config_txt(replace(RECIPE, config=()))
