import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import hsm, secure_boot, signing
from image.boot_key import open_boot_signer
from image.errors import SigningError
from image.signing import Signer, check, open_signer

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
needs_token = pytest.mark.skipif(
    not MODULE.exists() or shutil.which("softhsm2-util") is None, reason="softhsm2 is not installed"
)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A token with a P-256 key `image` and an RSA key `boot`; its URI without the object."""
    import pkcs11  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
    (folder / "pin").write_text("123456\n")
    (folder / "wrong-pin").write_text("654321\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", "line-a", "--pin", "123456", "--so-pin", "12345678"],
            check=True, capture_output=True,
        )  # fmt: skip
        with pkcs11.lib(str(MODULE)).get_token(token_label="line-a").open(rw=True, user_pin="123456") as session:
            from pkcs11.util.ec import encode_named_curve_parameters  # noqa: PLC0415

            curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
            parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
            parameters.generate_keypair(store=True, label="image")
            session.generate_keypair(pkcs11.KeyType.RSA, 2048, store=True, label="boot")
        yield f"pkcs11:token=line-a;object={{}}?module-path={MODULE}&pin-source=file:{folder}/pin"
        pkcs11.unload(str(MODULE))


def ssh_key(path: Path, kind: str, passphrase: str = "") -> Path:
    bits = ["-b", "256"] if kind == "ecdsa" else []
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, *bits, "-N", passphrase, "-f", path], check=True, capture_output=True
    )
    return path


def ssh_verifies(folder: Path, signer: Signer, signature: bytes, data: bytes, namespace: str) -> bool:
    (folder / "allowed").write_text(signing.allowed_signers([signer.public_line], [signing.IMAGE, signing.BUNDLE]))
    (folder / "data.sig").write_bytes(signature)
    done = subprocess.run(
        ["ssh-keygen", "-Y", "verify", "-f", folder / "allowed", "-I", "image", "-n", namespace,
         "-s", folder / "data.sig"],
        input=data, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_ssh_keygen_takes_our_signature_and_nothing_that_was_changed(tmp_path: Path, kind: str) -> None:
    signer = open_signer(f"file:{ssh_key(tmp_path / 'key', kind)}")
    other = open_signer(f"file:{ssh_key(tmp_path / 'other', kind)}")
    signature = signer.sign(b"data", signing.IMAGE)

    assert ssh_verifies(tmp_path, signer, signature, b"data", signing.IMAGE)
    assert not ssh_verifies(tmp_path, signer, signature, b"Data", signing.IMAGE)
    assert not ssh_verifies(tmp_path, signer, signature, b"data", signing.BUNDLE)
    assert not ssh_verifies(tmp_path, other, signature, b"data", signing.IMAGE)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_we_take_what_ssh_keygen_signed(tmp_path: Path, kind: str, algorithm: str) -> None:
    key = ssh_key(tmp_path / "key", kind)
    signature = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-O", f"hashalg={algorithm}", "-f", key, "-n", signing.IMAGE],
        input=b"data", capture_output=True, check=True,
    ).stdout  # fmt: skip

    assert check(signature, b"data", signing.IMAGE) == open_signer(f"file:{key}").public_line
    with pytest.raises(SigningError, match="changed"):
        check(signature, b"Data", signing.IMAGE)
    with pytest.raises(SigningError, match="not for"):
        check(signature, b"data", signing.BUNDLE)


@needs_token
def test_a_key_on_a_token_signs_as_a_file_does(tmp_path: Path, token: str) -> None:
    signer = open_signer(token.format("image"))

    for data in (b"one", b"two"):  # a token that stays logged in would refuse the second
        assert ssh_verifies(tmp_path, signer, signer.sign(data, signing.IMAGE), data, signing.IMAGE)


@needs_token
def test_a_boot_key_on_a_token_signs_as_the_bootloader_wants(token: str) -> None:
    signer = open_boot_signer(token.format("boot"))

    secure_boot.verify(b"image", secure_boot.sign(b"image", signer, 0), signer.public)


@needs_token
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("/pin", "/wrong-pin"), "refuses the PIN"),
        (("object=image", "object=absent"), "no key absent"),
        (("object=image", "object=boot"), "no P-256"),
        (("token=line-a", "token=line-b"), "line-b"),
    ],
)
def test_a_token_that_cannot_sign_says_why(token: str, change: tuple[str, str], complaint: str) -> None:
    with pytest.raises(SigningError, match=complaint):
        open_signer(token.format("image").replace(*change))


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("pkcs11:token=a;object=b?module-path=/m&pin-value=1234", "seen by everybody"),
        ("pkcs11:token=a?module-path=/m", "needs token"),
        ("pkcs11:token=a;object=b", "needs token"),
        ("pkcs11:token=a;token=b;object=c?module-path=/m", "twice"),
        ("pkcs11:token=a;object=b;colour=red?module-path=/m", "colour"),
        ("pkcs11:token=a;object=b?module-path=/m&pin-source=http://x", "no file"),
    ],
)
def test_a_uri_that_says_too_little_or_too_much_is_named(uri: str, complaint: str) -> None:
    with pytest.raises(SigningError, match=complaint):
        hsm.parse(uri)


def test_a_key_with_a_passphrase_is_opened_by_the_file_that_holds_it(tmp_path: Path) -> None:
    key = ssh_key(tmp_path / "key", "ed25519", "a secret")
    (tmp_path / "passphrase").write_text("a secret\n")

    signer = open_signer(f"file:{key}?passphrase-file={tmp_path}/passphrase")

    assert check(signer.sign(b"", signing.IMAGE), b"", signing.IMAGE) == signer.public_line
    with pytest.raises(SigningError, match="passphrase"):
        open_signer(f"file:{key}")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_the_public_half_alone_is_known_and_signs_nothing(tmp_path: Path, kind: str) -> None:
    key = ssh_key(tmp_path / "key", kind)

    signer = open_signer(f"public:{key}.pub")

    assert signer.public_line == open_signer(f"file:{key}").public_line
    with pytest.raises(SigningError, match="only the public half"):
        signer.sign(b"", signing.IMAGE)
    with pytest.raises(SigningError, match="private half"):
        open_signer(f"public:{key}")


def test_a_key_for_trying_out_is_made_once(tmp_path: Path) -> None:
    first = signing.ensure(tmp_path / "image").read_bytes()

    assert signing.ensure(tmp_path / "image").read_bytes() == first
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600


def test_the_fingerprint_is_the_one_that_ssh_keygen_shows(tmp_path: Path) -> None:
    key = ssh_key(tmp_path / "key", "ed25519")

    said = subprocess.run(["ssh-keygen", "-l", "-f", key], capture_output=True, text=True, check=True).stdout

    assert signing.fingerprint(open_signer(f"file:{key}").public_line) == said.split()[1]


@pytest.mark.parametrize(("uri", "complaint"), [("file:/absent", "/absent"), ("key", "none of"), ("file:/a?b=c", "b")])
def test_a_key_that_is_not_there_is_named(uri: str, complaint: str) -> None:
    with pytest.raises(SigningError, match=complaint):
        open_signer(uri)


@given(st.binary(max_size=200))
def test_rubbish_is_no_signature(rubbish: bytes) -> None:
    armored = b"-----BEGIN SSH SIGNATURE-----\n" + rubbish + b"\n-----END SSH SIGNATURE-----\n"
    for signature in (rubbish, armored):
        with pytest.raises(SigningError):
            check(signature, b"", signing.IMAGE)
