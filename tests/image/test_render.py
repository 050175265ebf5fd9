import jinja2
import pytest

from firmware_agent import settings
from image.render import render


def test_a_missing_value_stops_the_build() -> None:
    with pytest.raises(jinja2.UndefinedError, match="version"):
        render("config.txt", name="picket")


def test_the_agent_understands_its_settings() -> None:
    text = render("agent.toml", name="picket", version="1.2", key_store="probe-once")

    found = settings.parse(text)

    assert str(found.image) == "picket 1.2"
    assert found.key.store == "probe-once"


def test_the_factory_key_opens_the_agent_and_nothing_else() -> None:
    line = render("factory_authorized_keys", factory_key="ssh-ed25519 AAAA factory")

    assert line == 'restrict,command="/usr/bin/picket-agent provision" ssh-ed25519 AAAA factory\n'


def test_the_command_line_is_one_line_and_names_no_console() -> None:
    text = render("cmdline.txt", root_partuuid="01234567-02")

    assert text.count("\n") == 1
    assert "root=PARTUUID=01234567-02" in text
    assert "console=" not in text  # the board's device tree says where its console is
