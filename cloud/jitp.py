"""Just-in-time provisioning's parameters: what a leaf's subject gives, and what a template wants.

https://docs.aws.amazon.com/iot/latest/developerguide/jit-provisioning.html: parameters come from the subject alone, and
"the certificate must contain values for all of the parameters in the template body".
"""

import json
from collections.abc import Mapping

from cryptography import x509
from cryptography.x509.oid import NameOID

_PREFIX = "AWS::IoT::Certificate::"

#: Filled in by the service itself, never by the subject.
_ID = _PREFIX + "Id"

#: Which subject attribute feeds which parameter (the guide's table).
SUBJECT_ATTRIBUTES: Mapping[str, x509.ObjectIdentifier] = {
    _PREFIX + "Country": NameOID.COUNTRY_NAME,
    _PREFIX + "Organization": NameOID.ORGANIZATION_NAME,
    _PREFIX + "OrganizationalUnit": NameOID.ORGANIZATIONAL_UNIT_NAME,
    _PREFIX + "DistinguishedNameQualifier": NameOID.DN_QUALIFIER,
    _PREFIX + "StateName": NameOID.STATE_OR_PROVINCE_NAME,
    _PREFIX + "CommonName": NameOID.COMMON_NAME,
    _PREFIX + "SerialNumber": NameOID.SERIAL_NUMBER,
}


def subject_parameters(certificate_pem: str) -> dict[str, str]:
    """The parameters that this certificate's subject fills in."""
    subject = x509.load_pem_x509_certificate(certificate_pem.encode()).subject
    found: dict[str, str] = {}
    for parameter, oid in SUBJECT_ATTRIBUTES.items():
        values = subject.get_attributes_for_oid(oid)
        if values and values[0].value:
            found[parameter] = str(values[0].value)
    return found


def missing_parameters(template_body: str, certificate_pem: str) -> list[str]:
    """The parameters that a template declares and this certificate's subject does not fill in."""
    declared = json.loads(template_body).get("Parameters") or {}
    have = {*subject_parameters(certificate_pem), _ID}
    return sorted(name for name in declared if name not in have)
