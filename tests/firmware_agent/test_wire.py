"""The wire takes anything that a broken cable can send."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import wire

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_named_as_none(line: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        with contextlib.suppress(wire.LinkLostError, wire.MalformedError):
            decode(line)
        with contextlib.suppress(wire.MalformedError):
            decode(line.replace(b"\n", b"") + b"\n")


@given(json_values)
def test_any_json_is_a_message_or_named_as_none(value: Any) -> None:
    line = json.dumps(value).encode() + b"\n"
    for decode in (wire.decode_request, wire.decode_reply):
        with contextlib.suppress(wire.MalformedError):
            decode(line)


@given(st.integers(), st.text(), objects)
def test_a_request_arrives_as_it_was_sent(number: int, verb: str, params: dict[str, Any]) -> None:
    request = wire.Request(number, verb, params)

    assert request == wire.decode_request(wire.encode_request(request))


@given(st.integers(), objects, st.text(), st.text())
def test_a_reply_arrives_as_it_was_sent(number: int, body: dict[str, Any], code: str, message: str) -> None:
    replies: list[wire.Reply] = [
        wire.Event(number, body),
        wire.Result(number, body),
        wire.Fault(number, code, message),
    ]

    assert replies == [wire.decode_reply(wire.encode_reply(reply)) for reply in replies]


@given(st.text(), st.lists(st.text(), max_size=3), st.text(), st.text())
def test_a_banner_arrives_behind_whatever_the_kernel_was_saying(
    board: str, addresses: list[str], image: str, noise: str
) -> None:
    banner = wire.Banner(board, tuple(addresses), "ssh-ed25519 AAAA", "0.1.0", image, "boot")
    noise = noise.replace(wire.BANNER_PREFIX, "")

    assert banner == wire.parse_banner(noise + banner.line())


@given(st.text())
def test_any_console_line_is_a_banner_or_not(text: str) -> None:
    for line in (text, wire.BANNER_PREFIX + text):
        with contextlib.suppress(wire.MalformedError):
            wire.parse_banner(line)


def test_a_line_that_broke_off_is_no_answer() -> None:
    with pytest.raises(wire.LinkLostError):
        wire.decode_reply(b'{"id": 1, "result": {}}')
