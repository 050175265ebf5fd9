"""Why the cloud cannot be reached, in words for a person.

The SDK only says that TLS failed, half a minute later. Python's own TLS says at once which check it was. Nothing is
sent but the greeting of a handshake: no client certificate, no MQTT.
"""

import socket

from firmware_agent.identity import Identity

_SECONDS = 3.0


def explain(identity: Identity) -> str | None:
    """What is wrong with whoever answers at the endpoint, or None when nothing is, as far as can be seen from here."""
    import ssl  # noqa: PLC0415 - a megabyte or two that a unit with a working link never needs

    context = ssl.create_default_context(cadata=identity.trust)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the SDK does not ask for the extensions that Python 3.13 does
    where = f"{identity.host}:{identity.port}"
    try:
        with (
            socket.create_connection((identity.host, identity.port), _SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=identity.host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return f"{where} shows a certificate that this unit does not trust: {error.verify_message}"
    except ssl.SSLError as error:
        if error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
            return f"{where} answers, but not in TLS: perhaps a login page of the network stands before it"
        return None  # an alert of the server: it saw us, and that is for the SDK to tell
    except socket.gaierror as error:
        return f"the name {identity.host} is not found: {error.strerror}"
    except OSError:
        return None
