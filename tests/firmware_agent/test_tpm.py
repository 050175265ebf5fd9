"""The device key in a TPM: swtpm and the real PKCS#11 module, in this process, as the simulated board has it."""

import base64
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from firmware_agent.errors import KeyFault, NoTpm, WrongState
from firmware_agent.keys import open_store, tpm, tpm_key
from firmware_agent.keys.tpm_key import TpmKeys
from firmware_agent.product import Product
from firmware_agent.wire import PROOF_CONTEXT
from tests.firmware_agent.support import (
    PKCS11_MODULES,
    SERIAL,
    Broker,
    Ca,
    Station,
    Unit,
    provision,
    swtpm,
    tpm_parts_missing,
)

pytestmark = pytest.mark.skipif(
    bool(tpm_parts_missing()), reason=f"not installed: {', '.join(tpm_parts_missing()) or 'nothing'}"
)


@pytest.fixture
def tcti(tmp_path: Path) -> Iterator[str]:
    with swtpm(tmp_path / "tpm") as address:
        yield address


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's environment is the process's; `use` changes it, the test's end restores it."""
    for name in ("TPM2_PKCS11_STORE", "TPM2_PKCS11_TCTI", "TPM2_PKCS11_BACKEND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("TSS2_LOG", "all+NONE")


def make(root: Path, tcti: str, store: str = "tpm") -> Unit:
    unit = Unit.make(root, store=store, tcti=tcti, module=str(PKCS11_MODULES[0]))
    unit.settings.paths.state.mkdir(parents=True, exist_ok=True)
    tpm_key.use(unit.settings)
    return unit


@pytest.fixture
def unit(tmp_path: Path, tcti: str) -> Unit:
    return make(tmp_path / "unit", tcti)


def keys_of(unit: Unit) -> TpmKeys:
    store = open_store(unit.settings)
    assert isinstance(store, TpmKeys)
    return store


def test_a_tpm_is_seen_where_one_answers(tcti: str) -> None:
    assert tpm.present(tcti)
    assert not tpm.present("")
    assert not tpm.present("device:/dev/no-such-tpm")
    assert not tpm.present("swtpm:host=127.0.0.1,port=1")
    assert not tpm.present("nonsense")


def test_the_endorsement_key_names_the_tpm_for_ever(tmp_path: Path) -> None:
    with swtpm(tmp_path / "one") as tcti:
        first = [tpm.ek_sha256(tcti) for _ in range(5)]  # five: nothing is left behind in the TPM's three slots
    with swtpm(tmp_path / "one") as tcti:
        again = tpm.ek_sha256(tcti)
    with swtpm(tmp_path / "two") as tcti:
        other = tpm.ek_sha256(tcti)

    assert {*first, again} == {first[0]}
    assert other != again
    assert len(bytes.fromhex(again)) == 32


def test_probe_once_finds_the_tpm_and_stays_with_it(tmp_path: Path) -> None:
    with swtpm(tmp_path / "tpm") as tcti:
        unit = make(tmp_path / "unit", tcti, store="probe-once")
        station = Station(unit)
        identity = station.ask("identify")
        key = station.ask("enrol", serial=SERIAL)["key"]
        station.close()

    assert (identity["key_store"], identity["tpm"]["present"], key) == ("tpm", True, "tpm")
    with pytest.raises(NoTpm):  # its power is gone, as when the module falls out
        open_store(unit.settings).load()


def test_the_key_is_made_once_and_survives_a_power_cycle(tmp_path: Path) -> None:
    with swtpm(tmp_path / "tpm") as tcti:
        unit = make(tmp_path / "unit", tcti)
        keys = keys_of(unit)
        made = keys.ensure().public_key()
        assert keys_of(unit).load().public_key() == made
        keys.close()
    with swtpm(tmp_path / "tpm") as tcti:
        again = make(tmp_path / "unit", tcti)
        keys = keys_of(again)
        signature = keys.ensure().sign(b"data")
        keys.close()

    made.verify(signature, b"data", ec.ECDSA(hashes.SHA256()))


def test_power_cuts_do_not_lock_the_key(tmp_path: Path) -> None:
    """A TPM counts a restart without farewell as a guess, and locks up after a few: a thief's hand on the plug."""
    for _ in range(8):
        with swtpm(tmp_path / "tpm") as tcti:
            keys = keys_of(make(tmp_path / "unit", tcti))
            keys.ensure().sign(b"data")
            keys.close()


def test_a_tpm_that_was_locked_by_power_cuts_is_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without, pytest.raises(KeyFault):
        without.setattr(tpm, "survive_power_cuts", lambda _: None)
        for _ in range(8):
            with swtpm(tmp_path / "tpm") as tcti:
                keys = keys_of(make(tmp_path / "unit", tcti))
                keys.ensure().sign(b"data")
                keys.close()
    with swtpm(tmp_path / "tpm") as tcti:
        keys = keys_of(make(tmp_path / "unit", tcti))
        keys.ensure().sign(b"data")
        keys.close()


def test_there_is_no_key_before_enrol(unit: Unit) -> None:
    with pytest.raises(WrongState):
        keys_of(unit).load()


def test_the_private_key_cannot_be_taken_out(unit: Unit) -> None:
    import pkcs11  # noqa: PLC0415

    keys = keys_of(unit)
    keys.ensure()
    (private,) = keys._session.get_objects(
        {pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY, pkcs11.Attribute.LABEL: "device-1"}
    )

    assert private[pkcs11.Attribute.SENSITIVE] is True
    assert private[pkcs11.Attribute.ALWAYS_SENSITIVE] is True
    assert private[pkcs11.Attribute.NEVER_EXTRACTABLE] is True
    with pytest.raises(pkcs11.PKCS11Error):
        private[pkcs11.Attribute.VALUE]
    keys.close()


def test_a_crash_between_token_and_pin_is_made_good(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    keys = keys_of(unit)
    token = TpmKeys._token
    calls = []

    def crash(self: TpmKeys, library: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first look finds none, the second is on the way to C_InitPIN
            raise Crash
        return token(self, library)

    with monkeypatch.context() as patch:
        patch.setattr(TpmKeys, "_token", crash)
        with pytest.raises(Crash):
            keys.ensure()

    keys = keys_of(unit)
    assert keys.ensure().sign(b"data")
    keys.close()


def test_keys_in_slots_of_their_own_are_found_and_removed_apart(unit: Unit) -> None:
    keys = keys_of(unit)
    first = keys.ensure().public_key()
    keys.close()  # a TPM without a resource manager, as here, holds no two loaded keys
    second = keys.ensure("a1").public_key()
    both = keys.slots()
    keys.close()
    found = (keys.load().public_key(), keys.load("a1").public_key())
    keys.remove("")
    keys.remove("")  # what is gone is gone

    assert (both, found) == (("", "a1"), (first, second))
    assert first != second
    assert keys.slots() == ("a1",)
    signature = keys.load("a1").sign(b"data")
    second.verify(signature, b"data", ec.ECDSA(hashes.SHA256()))
    with pytest.raises(WrongState):
        keys.load()
    keys.close()


def test_what_a_crash_left_of_a_key_is_removed(tmp_path: Path) -> None:
    import pkcs11  # noqa: PLC0415

    with swtpm(tmp_path / "tpm") as tcti:
        keys = keys_of(make(tmp_path / "unit", tcti))
        keys.ensure("a1")
        (public,) = keys._session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY})
        public.destroy()
        keys.close()
    with swtpm(tmp_path / "tpm") as tcti:
        keys = keys_of(make(tmp_path / "unit", tcti))
        with pytest.raises(KeyFault, match="1 private and 0 public"):
            keys.load("a1")
        left = keys.slots()
        keys.remove("a1")
        assert (left, keys.slots()) == (("a1",), ())
        assert keys.ensure("a1").sign(b"data")
        keys.close()


def test_two_keys_of_one_name_are_refused(unit: Unit) -> None:
    import pkcs11  # noqa: PLC0415

    keys = keys_of(unit)
    keys.ensure()
    keys.close()  # so that the first key leaves the TPM, which has three slots and here no resource manager
    with (
        keys._login(pkcs11.lib(str(PKCS11_MODULES[0])), create=False) as session,
        pytest.raises(KeyFault, match="2 private and 2 public"),
    ):
        keys._generate(session, "")
    with pytest.raises(KeyFault, match="2 private and 2 public"):
        keys.load()


def test_a_store_of_another_tpm_cannot_be_used(tmp_path: Path) -> None:
    with swtpm(tmp_path / "one") as tcti:
        unit = make(tmp_path / "unit", tcti)
        keys = keys_of(unit)
        keys.ensure()
        keys.close()
    with swtpm(tmp_path / "two") as tcti:
        moved = make(tmp_path / "unit", tcti)
        with pytest.raises(KeyFault):
            keys_of(moved).ensure()


def test_the_pins_are_readable_by_the_agent_alone(unit: Unit) -> None:
    keys = keys_of(unit)
    keys.ensure()
    keys.close()

    assert unit.settings.paths.tpm_pin.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(unit.settings.paths.tpm_store / "tpm2_pkcs11.sqlite3") as database:
        assert database.execute("SELECT count(*) FROM tokens").fetchone() == (1,)
    database.close()


def test_a_unit_with_a_tpm_goes_the_whole_way(unit: Unit, ca: Ca, broker: Broker) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    station = Station(unit)
    csr = x509.load_pem_x509_csr(station.ask("enrol", serial=SERIAL)["csr"].encode())
    key = csr.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert csr.is_signature_valid
    nonce = bytes(32)

    def prove() -> dict[str, Any]:
        return station.ask("prove", nonce=base64.b64encode(nonce).decode())

    for _ in range(8):  # a connection in between neither logs the key's session out nor fills the TPM
        key.verify(base64.b64decode(prove()["signature"]), PROOF_CONTEXT + nonce, ec.ECDSA(hashes.SHA256()))
        assert station.ask("connect", nonce="n", attempts=1, wait_seconds=0)["held"]
        assert broker.next("hello")["key"] == "tpm"
    station.close()

    product = Product(unit.settings, unit.board, unit.pins)
    product.start()
    for round_ in (1, 2):
        assert broker.next("hello")["mode"] == "product"
        unit.pir.drive_high()
        unit.pir.drive_low()
        assert broker.next("alarm")["sequence"] == round_
        broker.stop()
        broker.start()
    product.stop()
    product.join()


def test_one_process_may_serve_one_board_after_the_other(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        with swtpm(tmp_path / f"tpm-{name}") as tcti:
            keys = keys_of(make(tmp_path / name, tcti))
            made.append(keys.ensure().public_key())
            keys.close()

    assert made[0] != made[1]
