"""Key and certificates are judged as before, and the agent that runs afterwards has not grown by it."""

import base64
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import certificate, digests, files, vetting
from firmware_agent.errors import BadCertificate, KeyFault, KeyMismatch, NoTpm, WrongState, WrongSubject
from firmware_agent.settings import Settings
from tests.firmware_agent.support import BOARD, Broker, Ca, Unit, free_port, pem, provision, settings_text

ROOT = Path(__file__).parent.parent.parent
KEY = ec.generate_private_key(ec.SECP256R1())


def verdict(settings: Settings, board: str = BOARD) -> None:
    with vetting.begun(settings, board) as found:
        found()


def test_a_unit_in_order_passes(unit: Unit, ca: Ca) -> None:
    provision(unit, ca)

    verdict(unit.settings)


def test_what_is_wrong_comes_back_as_what_it_is(unit: Unit, ca: Ca, tmp_path: Path) -> None:
    unit.settings.paths.state.mkdir()
    with pytest.raises(WrongState, match="run enrol first"):
        verdict(unit.settings)
    provision(unit, ca)
    with pytest.raises(WrongSubject, match="not 00000000deadbeef"):
        verdict(unit.settings, "00000000deadbeef")
    other = Unit.make(tmp_path / "other")
    provision(other, ca)
    files.write_atomic(unit.settings.paths.key_file, other.settings.paths.key_file.read_bytes(), 0o600)
    with pytest.raises(KeyMismatch):
        verdict(unit.settings)
    unit.settings.paths.key_file.write_bytes(b"")
    with pytest.raises(KeyFault):
        verdict(unit.settings)
    tpm = Unit.make(tmp_path / "tpm", store="tpm", tcti=f"swtpm:host=127.0.0.1,port={free_port()}")
    with pytest.raises(NoTpm):
        verdict(tpm.settings)


def test_where_no_other_process_can_be_started_the_agent_looks_itself(
    unit: Unit, ca: Ca, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    provision(unit, ca)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    verdict(unit.settings)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    verdict(unit.settings)
    unit.settings.paths.key_file.write_bytes(b"")
    with pytest.raises(KeyFault):
        verdict(unit.settings)

    assert caplog.text.count("by the agent itself") == 3


CONNECTED = """
import sys, time
from pathlib import Path
from firmware_agent.product import Product
from firmware_agent.board import RaspberryPi
from firmware_agent import settings
from contextlib import nullcontext
import dataclasses

class Line:
    def level(self): return 0
    def watch(self, edge): pass
class Pins:
    def pir(self): return nullcontext(Line())
    def tamper(self): return nullcontext()
class Board(RaspberryPi):
    def facts(self): return dataclasses.replace(super().facts(), serial=sys.argv[2])

product = Product(settings.load(Path(sys.argv[1])), Board(), Pins())
product.start()
while not product._link.connected():
    time.sleep(0.05)
time.sleep(1)
print(",".join(sys.modules))
product.stop()
product.join()
"""


def test_a_connected_agent_has_not_loaded_what_only_its_jobs_need(unit: Unit, ca: Ca, broker: Broker) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    settings = unit.root / "agent.toml"
    settings.write_text(settings_text(unit.root))

    done = subprocess.run(
        [sys.executable, "-c", CONNECTED, str(settings), BOARD],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.strip().split(","))
    assert "firmware_agent.jobs.update" in loaded
    assert not loaded & {"cryptography", "_hashlib", "ssl", "http.client", "urllib3", "tuf", "zstandard", "pkcs11"}


# --- the little that is read without the library ------------------------------------------------------------------

moments = st.datetimes(datetime(1950, 1, 1), datetime(9999, 12, 31)).map(lambda at: at.replace(microsecond=0))  # noqa: DTZ001


@given(moments, moments, st.text("abcdefghij ", min_size=1, max_size=64))
def test_dates_and_id_are_read_as_the_library_reads_them(one: datetime, other: datetime, name: str) -> None:
    first, last = sorted((one, other))
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last + timedelta(0))
        .sign(KEY, hashes.SHA256())
    )

    found = certificate.validity("words before it\n" + pem(made) + pem(made))

    assert (found.not_valid_before_utc, found.not_valid_after_utc) == (
        first.replace(tzinfo=UTC),
        last.replace(tzinfo=UTC),
    )
    assert certificate.sha256(pem(made)) == made.fingerprint(hashes.SHA256()).hex()


WHOLE = certificate.der(pem(Ca().certificate))


@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=20))
def test_a_damaged_certificate_is_told_as_such_or_keeps_its_dates(cut: int, junk: bytes) -> None:
    text = base64.b64encode(WHOLE[:cut] + junk).decode()
    try:
        found = certificate.validity(f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
    except BadCertificate:
        return
    assert found.not_valid_before_utc.tzinfo is UTC


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----", "rubbish"])
def test_what_is_no_pem_is_told_as_such(text: str) -> None:
    with pytest.raises(BadCertificate):
        certificate.validity(text)


@given(st.binary(max_size=300))
def test_both_ways_to_sha256_agree(data: bytes) -> None:
    assert digests.digest(data) == digests.sha256(data).hexdigest()
