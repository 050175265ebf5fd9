"""The authority: profiles as a whole, and every request that it must refuse."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from factory import authority
from factory.errors import SignerFault, UnitFault, UserMistake

SERIAL, BOARD = "PK-000001", "10000000cafe0001"
PASSPHRASE = b"correct horse battery"


def subject(serial: str = SERIAL, board: str = BOARD) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Picket"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, board),
            x509.NameAttribute(NameOID.COMMON_NAME, serial),
        ]
    )


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: x509.Name | None = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject() if name is None else name)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def pem(der: bytes) -> str:
    return x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def signing() -> authority.CertificateAuthority:
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    return authority.make_signing(authority.make_root(start), start)


def test_a_good_request_is_taken() -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    checked = authority.check_request(pem(request(key)), serial=SERIAL, board=BOARD)

    assert checked.public_key() == key.public_key()


def test_a_request_with_a_wrong_signature_is_refused() -> None:
    der = bytearray(request(ec.generate_private_key(ec.SECP256R1())))
    der[-1] ^= 1

    with pytest.raises(UnitFault, match="not signed by its own key"):
        authority.check_request(pem(bytes(der)), serial=SERIAL, board=BOARD)


def test_an_rsa_1024_key_is_refused() -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505

    with pytest.raises(UnitFault, match="RSA-1024"):
        authority.check_request(pem(request(weak)), serial=SERIAL, board=BOARD)


def test_a_key_on_another_curve_is_refused() -> None:
    with pytest.raises(UnitFault, match="secp384r1"):
        authority.check_request(pem(request(ec.generate_private_key(ec.SECP384R1()))), serial=SERIAL, board=BOARD)


def test_an_ed25519_key_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    der = x509.CertificateSigningRequestBuilder().subject_name(subject()).sign(key, None)

    with pytest.raises(UnitFault, match="Ed25519"):
        authority.check_request(der.public_bytes(serialization.Encoding.PEM).decode(), serial=SERIAL, board=BOARD)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (subject(serial="PK-000002"), "CN is PK-000002"),
        (subject(board="10000000cafe0002"), "serialNumber is 10000000cafe0002"),
        (x509.Name([]), "CN is missing"),
        (x509.Name([*subject(), x509.NameAttribute(NameOID.COMMON_NAME, "PK-000002")]), r"PK-000001 \+ PK-000002"),
    ],
)
def test_a_request_for_another_unit_is_refused(name: x509.Name, says: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    with pytest.raises(UnitFault, match=says):
        authority.check_request(pem(request(key, name)), serial=SERIAL, board=BOARD)


@given(st.text())
def test_text_that_is_no_request_is_the_units_fault(text: str) -> None:
    with pytest.raises(UnitFault):
        authority.check_request(text, serial=SERIAL, board=BOARD)


def test_a_device_certificate_is_an_802_1ar_identity(signing: authority.CertificateAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()

    leaf = authority.make_leaf(signing, key, serial=SERIAL, board=BOARD, batch="WO-7")

    leaf.verify_directly_issued_by(signing.certificate)
    assert leaf.version is x509.Version.v3
    assert leaf.subject.rfc4514_string() == f"CN={SERIAL},2.5.4.5={BOARD},OU=WO-7,O=Picket"
    assert leaf.not_valid_after_utc == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert leaf.not_valid_before_utc == signing.certificate.not_valid_before_utc
    assert leaf.serial_number.bit_length() >= 64
    found = {extension.oid: (extension.critical, extension.value) for extension in leaf.extensions}
    assert found == {
        x509.BasicConstraints.oid: (True, x509.BasicConstraints(ca=False, path_length=None)),
        x509.KeyUsage.oid: (True, authority._usage(sign=True)),
        x509.ExtendedKeyUsage.oid: (False, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])),
        x509.SubjectKeyIdentifier.oid: (False, x509.SubjectKeyIdentifier.from_public_key(key)),
        x509.AuthorityKeyIdentifier.oid: (
            False,
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.key.public_key()),
        ),
    }


def test_a_device_certificate_takes_nothing_but_the_key_from_a_request(signing: authority.CertificateAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([*subject(), x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "admins")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )

    checked = authority.check_request(greedy, serial=SERIAL, board=BOARD)
    leaf = authority.make_leaf(signing, authority.public_key(checked), serial=SERIAL, board=BOARD, batch="WO-7")

    assert "admins" not in leaf.subject.rfc4514_string()
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_the_hierarchy_is_root_then_signing_then_devices(tmp_path: Path) -> None:
    signing = authority.create_authority(tmp_path / "ca", PASSPHRASE)

    root = x509.load_pem_x509_certificate((tmp_path / "ca/root.pem").read_bytes())
    signing.certificate.verify_directly_issued_by(root)
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)
    assert root.public_key().curve.name == "secp384r1"  # type: ignore[union-attr]
    assert signing.key.curve.name == "secp256r1"
    constraints = signing.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(ca=True, path_length=0))


def test_both_keys_are_encrypted_and_readable_by_their_owner_alone(tmp_path: Path) -> None:
    authority.create_authority(tmp_path, PASSPHRASE)

    for name in ("root.key", "signing.key"):
        assert b"ENCRYPTED" in (tmp_path / name).read_bytes()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    authority.create_authority(tmp_path, PASSPHRASE)
    before = (tmp_path / "signing.pem").read_bytes()

    with pytest.raises(UserMistake, match="holds an authority already"):
        authority.create_authority(tmp_path, PASSPHRASE)

    assert (tmp_path / "signing.pem").read_bytes() == before


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="shorter"):
        authority.create_authority(tmp_path, b"short")

    assert list(tmp_path.iterdir()) == []


def test_a_wrong_passphrase_is_the_users_mistake(tmp_path: Path) -> None:
    authority.create_authority(tmp_path, PASSPHRASE)

    with pytest.raises(UserMistake, match="passphrase does not open"):
        authority.load_signing(tmp_path, b"wrong horse battery")


def test_an_expired_signing_ca_stops_the_line(tmp_path: Path) -> None:
    start = datetime.now(UTC) - timedelta(days=400)
    signing = authority.make_signing(authority.make_root(start), start, years=1)
    (tmp_path / "signing.pem").write_text(signing.pem)
    (tmp_path / "signing.key").write_bytes(authority._encrypted(signing.key, PASSPHRASE))

    with pytest.raises(SignerFault, match="expired on"):
        authority.load_signing(tmp_path, PASSPHRASE)


def test_a_signing_ca_from_the_future_points_at_the_clock(tmp_path: Path) -> None:
    start = datetime.now(UTC) + timedelta(days=2)
    (tmp_path / "signing.pem").write_text(authority.make_signing(authority.make_root(start), start).pem)

    with pytest.raises(SignerFault, match="not valid before") as caught:
        authority.load_signing(tmp_path, PASSPHRASE)

    assert "clock" in caught.value.advice


def test_a_key_that_is_not_the_certificates_is_the_signers_fault(tmp_path: Path) -> None:
    authority.create_authority(tmp_path / "a", PASSPHRASE)
    authority.create_authority(tmp_path / "b", PASSPHRASE)
    (tmp_path / "b/signing.key").replace(tmp_path / "a/signing.key")

    with pytest.raises(SignerFault, match="not the key of"):
        authority.load_signing(tmp_path / "a", PASSPHRASE)


def test_a_missing_authority_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="no signing CA") as caught:
        authority.load_signing(tmp_path, PASSPHRASE)

    assert "ca init" in caught.value.advice


def test_the_verification_certificate_carries_the_registration_code(signing: authority.CertificateAuthority) -> None:
    proof = authority.make_verification(signing, "a1b2c3")

    proof.verify_directly_issued_by(signing.certificate)
    assert [name.value for name in proof.subject] == ["a1b2c3"]
