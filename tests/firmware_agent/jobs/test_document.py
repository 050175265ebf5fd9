"""Job documents and the redactor: what comes from outside, and what goes there."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent.jobs import document
from firmware_agent.jobs.document import BadDocument, CollectLogs, Configure, Reboot, Update
from firmware_agent.jobs.redact import redact

COMMON = {"picket": 1, "product": "picket"}
UPDATE: dict[str, Any] = COMMON | {
    "operation": "update",
    "target": "agent/picket-agent-1.2.0.tar.zst",
    "version": "1.2.0",
    "metadata": "https://u.example/metadata/",
    "urls": {"agent/picket-agent-1.2.0.tar.zst": "https://u.example/a?X-Amz-Signature=s3cret"},
}


def test_every_operation_is_parsed_into_its_own_type() -> None:
    own: dict[str, dict[str, Any]] = {
        "update": {key: UPDATE[key] for key in ("target", "version", "metadata", "urls")},
        "reboot": {},
        "collect-logs": {"upload": "https://u.example/l?sig=1"},
        "configure": {"tuning": {"sensitivity": "low"}},
    }

    parsed = {name: document.parse(COMMON | {"operation": name} | more, "picket")[1] for name, more in own.items()}

    assert isinstance(parsed["update"], Update)
    assert parsed["update"].urls == UPDATE["urls"]
    assert parsed["reboot"] == Reboot()
    assert parsed["collect-logs"] == CollectLogs("https://u.example/l?sig=1")
    assert parsed["configure"] == Configure({"sensitivity": "low"})


def test_no_secret_is_in_what_is_printed_of_a_document() -> None:
    _, update = document.parse(UPDATE, "picket")
    _, logs = document.parse(
        COMMON | {"operation": "collect-logs", "upload": "https://u.example/l?sig=s3cret"}, "picket"
    )

    assert "s3cret" not in f"{update!r} {logs!r}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"urls": {}}, "at least one"),
        ({"urls": []}, "at least one"),
        ({"urls": {"../../etc/passwd": "https://u.example/"}}, "not usable"),
        ({"target": "os/image.img"}, "begin with agent/"),
        ({"target": 3}, "not usable"),
        ({"version": ""}, "not usable"),
        ({"metadata": "http://u.example/"}, "must be https: http://u.example/"),
        ({"metadata": "ftp://10.0.0.1/"}, "must be https"),
        ({"metadata": "https://user:pw@u.example/"}, "no URL"),
        ({"metadata": "https://u.example:99999/"}, "no URL"),
        ({"metadata": None}, "must be a URL"),
        ({"picket": 2}, '"picket": 1'),
        ({"picket": True}, '"picket": 1'),
        ({"extra": 1}, "knows no 'extra'"),
    ],
)
def test_a_bad_document_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadDocument) as refused:
        document.parse(UPDATE | change, "picket")

    assert refused.value.code == "bad-document"
    assert words in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "192.168.1.5", "10.1.2.3", "[fd00::1]", "[::1]:81"])
def test_plain_http_is_for_the_neighbourhood(host: str) -> None:
    assert document.url("upload", f"http://{host}/x") == f"http://{host}/x"


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "example.com", "localhost.example.com", "[2001:db9::1]", "127.0.0.1.nip.io"]
)
def test_plain_http_is_not_for_the_world(host: str) -> None:
    with pytest.raises(BadDocument):
        document.url("upload", f"http://{host}/x?sig=s3cret")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@given(JSON, st.sampled_from([*UPDATE, "upload", "tuning", "more"]), st.sampled_from(document.OPERATIONS))
def test_any_document_is_parsed_or_refused(value: object, key: str, operation: str) -> None:
    wrong = UPDATE | {"operation": operation, key: value}
    for tried in (value, wrong, {name: wrong[name] for name in ("picket", "product", "operation") if name in wrong}):
        with contextlib.suppress(BadDocument):
            document.parse(json.loads(json.dumps(tried)), "picket")


# --- what goes outside --------------------------------------------------------------------------------------------

PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIBa5\nAwEHoUQDQgAE\n-----END EC PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("GET https://b.example/k/a.gz?X-Amz-Signature=abc&x=1 HTTP", "GET https://b.example/k/a.gz?[query] HTTP"),
        ("mqtts://user:pass@broker:8883/x", "mqtts://[user]@broker:8883/x"),
        (f"loaded {PEM} from disk", "loaded [PEM] from disk"),
        (f"cut {PEM[:50]}", "cut [PEM]"),
        ("user_pin=1234, slot 0", "user_pin=[secret], slot 0"),
        ('{"sopin": "abc"}', '{"sopin": [secret]}'),
        ('{"pin": "ab\\"c", "slot": 1}', '{"pin": [secret], "slot": 1}'),
        ("Authorization: Bearer abc.def", "Authorization: [secret]"),
        ("the password is hunter2", "the password is [secret]"),
        ("AKIAIOSFODNN7EXAMPLE used", "[key] used"),
        ("token eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJ", "token [token]"),
        ("texted +49 151 2345678 and 0049-151-2345678.", "texted [number] and [number]."),
        *(
            (harmless, harmless)
            for harmless in (
                "2026-11-21T10:35:14.123Z PK-000001 boot 7d3f0d4e took 12345678901 ns",
                "pir: pinctrl-bcm2835 line 17, spinning: 3",
            )
        ),
    ],
)
def test_secrets_are_taken_out_and_the_rest_stays(text: str, wanted: str) -> None:
    assert redact(text) == wanted


@given(st.text(max_size=200))
def test_redacting_twice_is_as_good_as_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@given(
    st.from_regex(r"[A-Za-z0-9]{12,40}", fullmatch=True),
    st.sampled_from(["https://h.example/p?sig={}", "password={}", '"token": "{}"', "http://{}@h.example/", "pin: {} "]),
    st.text(max_size=20),
)
def test_a_secret_in_any_surroundings_is_taken_out(secret: str, frame: str, around: str) -> None:
    assert secret not in redact(f"{around} {frame.format(secret)} ")
