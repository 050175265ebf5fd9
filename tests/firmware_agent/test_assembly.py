"""A unit's image has no CA store: what its jobs fetch over HTTPS is trusted by the bundle that it was given."""

import hashlib
import ssl
from pathlib import Path

import pytest

from firmware_agent.assembly import downloader
from firmware_agent.update import DownloadFault
from firmware_agent.update.download import Limits, Payload
from tests.firmware_agent.range_server import Server, Store, serve
from tests.firmware_agent.support import Ca, pem

CONTENT = b"a release" * 1000
PAYLOAD = Payload("agent/release.tar.zst", len(CONTENT), (hashlib.sha256(CONTENT).hexdigest(),))


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ca: Ca) -> None:
    """Every server of `serve` speaks TLS, with a certificate for localhost by our CA."""
    certificate, key = ca.server()
    (tmp_path / "server.pem").write_text(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    plain = Server.__init__

    def begin(self: Server, store: Store) -> None:
        plain(self, store)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    monkeypatch.setattr(Server, "__init__", begin)


@pytest.fixture
def ca() -> Ca:
    return Ca()


@pytest.mark.usefixtures("secure")
def test_a_payload_comes_from_a_server_that_the_units_own_trust_bundle_knows(tmp_path: Path, ca: Ca) -> None:
    with serve(CONTENT) as store:
        url = store.url.replace("http://127.0.0.1", "https://localhost")
        found = downloader(pem(ca.certificate))(PAYLOAD, url, tmp_path)

    assert found.read_bytes() == CONTENT


@pytest.mark.usefixtures("secure")
def test_a_server_of_another_ca_gives_nothing(tmp_path: Path) -> None:
    with serve(CONTENT) as store, pytest.raises(DownloadFault):
        url = store.url.replace("http://127.0.0.1", "https://localhost")
        downloader(pem(Ca("Another CA").certificate))(
            PAYLOAD, url, tmp_path, limits=Limits(attempts=1), delay=lambda _: 0.0
        )
