"""Every verb over a real byte stream, and every refusal."""

import base64
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from firmware_agent import topics, wire
from firmware_agent.pins import LgpioPins
from firmware_agent.wire import PROOF_CONTEXT
from tests.firmware_agent.support import (
    BOARD,
    SERIAL,
    Broker,
    Ca,
    FaultError,
    Station,
    Unit,
    burn_in_params,
    free_port,
    pem,
    provision,
)

Connect = Callable[[Unit], Station]


def enrolled(station: Station) -> ec.EllipticCurvePublicKey:
    csr = x509.load_pem_x509_csr(station.ask("enrol", serial=SERIAL)["csr"].encode())
    key = csr.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def test_a_session_silences_the_banner(unit: Unit, station: Station) -> None:
    station.ask("identify")

    assert unit.settings.paths.answered.exists()


def test_identify_says_what_the_board_is(station: Station) -> None:
    identity = station.ask("identify")

    assert identity["board"] == BOARD
    assert identity["macs"] == {"eth0": "b8:27:eb:00:00:01"}
    assert identity["medium"] == {"cid": "1b534d3030303030", "bytes": 8_000_000_000}
    assert identity["tpm"] == {"present": False, "ek_sha256": None}
    assert identity["key_store"] == "file"
    assert identity["image"] == {"name": "picket", "version": "0.1.0"}


def test_enrol_makes_a_csr_that_names_unit_and_board(station: Station) -> None:
    answer = station.ask("enrol", serial=SERIAL)

    csr = x509.load_pem_x509_csr(answer["csr"].encode())
    subject = {attribute.oid: attribute.value for attribute in csr.subject}
    assert answer["key"] == "file"
    assert csr.is_signature_valid
    assert isinstance(csr.public_key(), ec.EllipticCurvePublicKey)
    assert subject == {
        NameOID.ORGANIZATION_NAME: "Picket",
        NameOID.COMMON_NAME: SERIAL,
        NameOID.SERIAL_NUMBER: BOARD,
    }


def test_enrol_asked_again_gives_the_same_key(unit: Unit, station: Station, connect: Connect) -> None:
    assert enrolled(station) == enrolled(station) == enrolled(connect(unit))


def test_the_private_key_is_readable_by_the_agent_alone(unit: Unit, station: Station) -> None:
    enrolled(station)

    assert unit.settings.paths.key_file.stat().st_mode & 0o777 == 0o600


def test_what_is_burnt_in_can_be_read_back(station: Station, ca: Ca) -> None:
    leaf = ca.leaf(enrolled(station))
    params = burn_in_params(ca, leaf, pem(ca.certificate))

    answer = station.ask("burn-in", **params)

    installed = station.ask("installed")
    digest = hashes.Hash(hashes.SHA256())
    digest.update(params["trust"].encode())
    assert answer == {"certificate_sha256": leaf.fingerprint(hashes.SHA256()).hex()}
    assert installed == {
        "chain": params["chain"],
        "trust_sha256": digest.finalize().hex(),
        "endpoint": params["endpoint"],
        "batch": "WO-7",
    }


def test_burn_in_may_be_repeated_and_replaced(unit: Unit, station: Station, ca: Ca) -> None:
    key = enrolled(station)
    first = burn_in_params(ca, ca.leaf(key), pem(ca.certificate))
    second = burn_in_params(ca, ca.leaf(key), pem(ca.certificate), 443)

    for params in (first, first, second):
        station.ask("burn-in", **params)

    assert station.ask("installed")["endpoint"]["port"] == 443
    assert len(list(unit.settings.paths.identity.resolve().parent.iterdir())) == 1


def other_key() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP256R1()).public_key()


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("key-mismatch", lambda ca, _, params: {**params, "chain": pem(ca.leaf(other_key())) + pem(ca.certificate)}),
        (
            "wrong-subject",
            lambda ca, key, params: {**params, "chain": pem(ca.leaf(key, "PK-000002")) + pem(ca.certificate)},
        ),
        (
            "wrong-subject",
            lambda ca, key, params: {
                **params,
                "chain": pem(ca.leaf(key, SERIAL, "10000000deadbeef")) + pem(ca.certificate),
            },
        ),
        ("bad-certificate", lambda ca, key, params: {**params, "chain": pem(ca.leaf(key))}),
        (
            "bad-certificate",
            lambda ca, key, params: {**params, "chain": pem(ca.leaf(key)) + pem(Ca("Another").certificate)},
        ),
        (  # the issuer's name is right, its key is not
            "bad-certificate",
            lambda ca, key, params: {**params, "chain": pem(ca.leaf(key)) + pem(Ca().certificate)},
        ),
        ("bad-certificate", lambda ca, key, params: {**params, "chain": "no PEM"}),
        ("bad-certificate", lambda ca, key, params: {**params, "trust": "no PEM"}),
        ("bad-request", lambda ca, key, params: {**params, "serial": "pk 1"}),
        ("bad-request", lambda ca, key, params: {**params, "endpoint": {"host": "localhost"}}),
        ("bad-request", lambda ca, key, params: {**params, "endpoint": {"host": "h", "port": 1, "path": "/"}}),
        ("bad-request", lambda ca, key, params: {**params, "endpoint": {"host": "h", "port": 0}}),
        ("bad-request", lambda ca, key, params: {**params, "batch": ""}),
        ("bad-request", lambda ca, key, params: {**params, "surprise": 1}),
        ("bad-request", lambda ca, key, params: {name: params[name] for name in params if name != "chain"}),
    ],
)
def test_burn_in_refuses_what_is_not_this_units(
    station: Station, ca: Ca, code: str, change: Callable[[Ca, Any, dict[str, Any]], dict[str, Any]]
) -> None:
    key = enrolled(station)
    good = burn_in_params(ca, ca.leaf(key), pem(ca.certificate))
    station.ask("burn-in", **good)

    with pytest.raises(FaultError) as fault:
        station.ask("burn-in", **change(ca, key, good))

    assert fault.value.code == code
    assert station.ask("installed")["chain"] == good["chain"]  # what was in force still is


def test_burn_in_comes_after_enrol(station: Station, ca: Ca) -> None:
    with pytest.raises(FaultError) as fault:
        station.ask("burn-in", **burn_in_params(ca, ca.leaf(other_key()), pem(ca.certificate)))

    assert fault.value.code == "wrong-state"


@pytest.mark.parametrize("verb", ["installed", "seal", "connect", "prove"])
def test_a_fresh_unit_has_nothing_to_show(station: Station, verb: str) -> None:
    params: dict[str, dict[str, Any]] = {
        "connect": {"nonce": "n", "attempts": 1, "wait_seconds": 0},
        "prove": {"nonce": base64.b64encode(bytes(32)).decode()},
    }

    with pytest.raises(FaultError) as fault:
        station.ask(verb, **params.get(verb, {}))

    assert fault.value.code == "wrong-state"


def test_prove_signs_the_nonce_behind_its_context(station: Station) -> None:
    key = enrolled(station)
    nonce = secrets.token_bytes(32)

    answer = station.ask("prove", nonce=base64.b64encode(nonce).decode())

    key.verify(base64.b64decode(answer["signature"]), PROOF_CONTEXT + nonce, ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("nonce", ["", "%%%", base64.b64encode(bytes(31)).decode(), 7, None])
def test_prove_signs_nothing_but_a_nonce(station: Station, nonce: Any) -> None:
    enrolled(station)

    with pytest.raises(FaultError) as fault:
        station.ask("prove", nonce=nonce)

    assert fault.value.code == "bad-request"


def test_self_test_reports_values_and_judges_nothing(unit: Unit, station: Station) -> None:
    unit.board.quality = "estimated"

    values = station.ask("self-test")

    assert set(values) == {
        "temperature_c",
        "throttled",
        "disk_free_bytes",
        "memory_free_bytes",
        "disk_wear_percent",
        "radio_dbm",
        "pir_level",
        "clock",
        "clock_synchronised",
    }
    assert values["temperature_c"] == 45.2
    assert values["pir_level"] == 0
    assert values["clock_synchronised"] is False
    assert abs(datetime.fromisoformat(values["clock"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_watch_pir_tells_each_edge_as_it_happens(unit: Unit, station: Station) -> None:
    def wave(event: dict[str, Any]) -> None:
        if "watching" in event:
            unit.pir.drive_high()
        elif event["edge"] == "rising":
            unit.pir.drive_low()

    result = station.ask("watch-pir", wave, seconds=60, until="falling")

    assert result == {"edges": 2, "level": 0}
    assert station.events[0] == {"watching": True, "level": 0}
    assert [event["edge"] for event in station.events[1:]] == ["rising", "falling"]
    assert station.events[1]["at"] <= station.events[2]["at"]


def test_watch_pir_ends_after_its_time_when_nothing_moves(station: Station) -> None:
    assert station.ask("watch-pir", seconds=0.05, until="falling") == {"edges": 0, "level": 0}


def test_watch_pir_to_the_end_goes_on_past_a_falling_edge(unit: Unit, station: Station) -> None:
    def wave(event: dict[str, Any]) -> None:
        if "watching" in event:
            for _ in range(2):
                unit.pir.drive_high()
                unit.pir.drive_low()

    assert station.ask("watch-pir", wave, seconds=0.5, until="end") == {"edges": 4, "level": 0}


@pytest.mark.parametrize(
    "params",
    [
        {"seconds": 0, "until": "end"},
        {"seconds": 121, "until": "end"},
        {"seconds": True, "until": "end"},
        {"seconds": 1, "until": "dawn"},
        {"seconds": 1, "until": []},
        {"seconds": 1},
    ],
)
def test_watch_pir_refuses_what_it_cannot_do(station: Station, params: dict[str, Any]) -> None:
    with pytest.raises(FaultError) as fault:
        station.ask("watch-pir", **params)

    assert fault.value.code == "bad-request"


def test_a_unit_without_the_pirs_chip_says_which_it_looked_for(unit: Unit, connect: Connect) -> None:
    deaf = replace(unit, pins=LgpioPins({"no-such-chip": 1}))

    with pytest.raises(FaultError, match="no-such-chip") as fault:
        connect(deaf).ask("self-test")

    assert fault.value.code == "no-pir"


def test_a_unit_configured_for_a_tpm_never_falls_back_to_a_file(tmp_path: Any, connect: Connect) -> None:
    unit = Unit.make(tmp_path, store="tpm", tcti=f"swtpm:host=127.0.0.1,port={free_port()}")
    station = connect(unit)

    with pytest.raises(FaultError) as fault:
        station.ask("enrol", serial=SERIAL)

    assert fault.value.code == "no-tpm"
    assert station.ask("identify")["key_store"] == "tpm"
    assert not unit.settings.paths.key_file.exists()


def test_probing_is_done_once_and_for_ever(tmp_path: Any, connect: Connect) -> None:
    unit = Unit.make(tmp_path, store="probe-once")

    assert connect(unit).ask("identify")["key_store"] == "file"
    assert unit.settings.paths.key_store.read_text() == "file\n"

    unit.settings.paths.key_store.write_text("tpm\n")
    with pytest.raises(FaultError) as fault:
        connect(unit).ask("enrol", serial=SERIAL)
    assert fault.value.code == "no-tpm"


def test_a_tpm_that_may_not_be_opened_is_not_taken_for_none(tmp_path: Any, connect: Connect) -> None:
    device = tmp_path / "tpmrm0"
    device.mkdir()  # opening it for writing fails, whoever asks
    unit = Unit.make(tmp_path, store="probe-once", tcti=f"device:{device}")

    with pytest.raises(FaultError, match="group tss") as fault:
        connect(unit).ask("identify")

    assert fault.value.code == "no-tpm"
    assert not unit.settings.paths.key_store.exists()


def test_a_damaged_finding_is_not_looked_for_again(tmp_path: Any, connect: Connect) -> None:
    unit = Unit.make(tmp_path, store="probe-once")
    unit.settings.paths.state.mkdir()
    unit.settings.paths.key_store.write_text("")

    with pytest.raises(FaultError) as fault:
        connect(unit).ask("enrol", serial=SERIAL)

    assert fault.value.code == "key-store"


# --- connect and seal ---------------------------------------------------------------------------------------------


def test_connect_holds_and_says_hello_with_the_nonce(unit: Unit, connect: Connect, ca: Ca, broker: Broker) -> None:
    broker.start()
    provision(unit, ca, broker.port)

    result = connect(unit).ask("connect", nonce="n-1", attempts=3, wait_seconds=0)

    hello = broker.next("hello")
    assert result["held"] is True
    assert [attempt["outcome"] for attempt in result["attempts"]] == ["held"]
    assert (hello["mode"], hello["nonce"], hello["board"], hello["batch"]) == ("factory", "n-1", BOARD, "WO-7")
    assert hello["key"] == "file"


def test_each_attempt_to_connect_is_seen_by_itself(unit: Unit, connect: Connect, ca: Ca) -> None:
    provision(unit, ca, free_port())
    station = connect(unit)

    result = station.ask("connect", nonce="n", attempts=3, wait_seconds=0)

    assert result["held"] is False
    assert [attempt["outcome"] for attempt in result["attempts"]] == ["unreachable"] * 3
    assert [event["attempt"] for event in station.events] == [1, 2, 3]
    with pytest.raises(FaultError) as fault:
        station.ask("seal")
    assert fault.value.code == "wrong-state"


def test_tls_is_not_tried_with_a_clock_before_the_certificate(unit: Unit, connect: Connect, ca: Ca) -> None:
    provision(unit, ca, free_port())
    unit.board.clock_offset = -40 * 365 * 86400

    (attempt,) = connect(unit).ask("connect", nonce="n", attempts=1, wait_seconds=0)["attempts"]

    assert attempt["outcome"] == "tls"
    assert "clock" in attempt["detail"]


def test_seal_asks_for_the_end_of_factory_mode_and_ends_the_session(unit: Unit, ca: Ca, broker: Broker) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    station = Station(unit)
    station.ask("connect", nonce="n", attempts=1, wait_seconds=0)

    assert station.ask("seal") == {"sealing": True}
    assert station.stream.readline() == b""
    station.close()
    assert unit.settings.paths.seal_request.exists()


def test_a_new_certificate_must_connect_before_it_is_sealed(
    unit: Unit, connect: Connect, ca: Ca, broker: Broker
) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    station = connect(unit)
    station.ask("connect", nonce="n", attempts=1, wait_seconds=0)
    provision(unit, ca, broker.port)

    with pytest.raises(FaultError) as fault:
        station.ask("seal")

    assert fault.value.code == "wrong-state"


def test_a_sealed_unit_takes_no_new_identity(unit: Unit, connect: Connect, ca: Ca) -> None:
    provision(unit, ca)
    unit.settings.paths.sealed.touch()

    with pytest.raises(FaultError, match="sealed") as fault:
        connect(unit).ask("enrol", serial=SERIAL)

    assert fault.value.code == "wrong-state"


# --- the session --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"\xff\xfe\n",
        b"[]\n",
        b'{"verb": "identify"}\n',
        b'{"id": true, "verb": "identify"}\n',
        b'{"id": 1, "verb": "identify", "params": []}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (3 * wire.MAX_LINE) + b"\n",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_bad_line_is_answered_and_the_session_goes_on(station: Station, line: bytes) -> None:
    station.send(line)

    reply = station.reply()
    assert isinstance(reply, wire.Fault)
    assert (reply.id, reply.code) == (0, "bad-request")
    assert station.ask("identify")["board"] == BOARD


def test_an_unknown_verb_is_answered_under_its_id(station: Station) -> None:
    station.send(json.dumps({"id": 7, "verb": "reboot"}).encode() + b"\n")

    reply = station.reply()

    assert isinstance(reply, wire.Fault)
    assert (reply.id, reply.code) == (7, "bad-request")
    assert "identify" in reply.message


def test_a_bug_in_a_verb_is_told_and_ends_nothing(unit: Unit, station: Station) -> None:
    unit.board.facts = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]

    with pytest.raises(FaultError, match="ZeroDivisionError") as fault:
        station.ask("identify")

    assert fault.value.code == "internal"
    assert station.ask("self-test")["pir_level"] == 0


def test_a_link_that_breaks_inside_a_line_ends_the_session(station: Station) -> None:
    station.send(b'{"id": 1, "verb": "ident')

    station.close()  # joins the agent's thread: it has ended by itself


def test_the_public_key_of_the_csr_is_a_p256_key(station: Station) -> None:
    csr = x509.load_pem_x509_csr(station.ask("enrol", serial=SERIAL)["csr"].encode())
    key = csr.public_key()

    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert csr.public_bytes(Encoding.PEM).startswith(b"-----BEGIN CERTIFICATE REQUEST")
    assert topics.valid_serial(SERIAL)
