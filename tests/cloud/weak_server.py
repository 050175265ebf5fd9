"""A local cloud with one thing wrong, to see that the doctor notices. Run as `weak_server.py WEAKNESS SETTINGS`."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cloud.local import overlay, server


def without_client_certificate() -> None:
    """As ministack is by itself: asks for a certificate, serves who has none."""
    vars(overlay)["require_client_certificate"] = lambda: None


def without_jitp() -> None:
    """As ministack is by itself: registers a certificate and leaves it there."""
    vars(overlay)["provision_just_in_time"] = lambda _: None


def without_policies() -> None:
    """Any registered device may do anything."""
    configure = server._configure

    def without_authorisation(*arguments: Any) -> None:
        configure(*arguments)
        os.environ["AUTH"] = "false"

    vars(server)["_configure"] = without_authorisation


def with_inactive_certificates() -> None:
    """A certificate that was switched off works as before."""
    from ministack.services import iot  # noqa: PLC0415

    find = iot._mtls_active_registrations

    def forgiving(cert_id: str, status: str | None = "ACTIVE") -> Any:
        return find(cert_id, status) or (find(cert_id, "INACTIVE") if status == "ACTIVE" else [])

    iot._mtls_active_registrations = forgiving


def without_hang_up() -> None:
    """A certificate that nobody has registered is served at once."""
    without_policies()
    from ministack.services import iot  # noqa: PLC0415

    identify = iot._mtls_resolve_identity
    iot._mtls_resolve_identity = lambda der: identify(der) or identify(None)


WEAKNESSES = {
    "no-client-certificate": without_client_certificate,
    "no-jitp": without_jitp,
    "no-policies": without_policies,
    "inactive-certificates": with_inactive_certificates,
    "no-hang-up": without_hang_up,
}


def main() -> int:
    weakness, settings = sys.argv[1:]
    if weakness in {"inactive-certificates", "no-hang-up"}:  # these touch ministack, which reads the environment first

        def amend(behaviour: overlay.Behaviour, mqtt: socket.socket) -> None:
            overlay.install(behaviour, mqtt)
            WEAKNESSES[weakness]()

        if weakness == "no-hang-up":
            without_policies()
        return server.main([settings], amend=amend)
    WEAKNESSES[weakness]()
    return server.main([settings])


if __name__ == "__main__":
    sys.exit(main())
