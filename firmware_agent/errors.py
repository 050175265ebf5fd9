"""What can go wrong on the unit, drawn by who must act.

    AgentFault                  every fault has a `code` for programs and a message for people
    ├── BadRequest              bad-request      the station asked for something that makes no sense: mend the station
    ├── WrongState              wrong-state      the station asked too early or too late: go back a step
    ├── SettingsFault           settings         /etc/picket/agent.toml cannot be used: mend the image
    └── UnitFault               unit             this unit is to be repaired or to get other parts
        ├── NoTpm               no-tpm           configured for a TPM, and none is usable: never fall back to a file
        ├── KeyFault            key-store        the key is there, but cannot be used
        ├── PirFault            no-pir           no GPIO chip with the PIR's line, or somebody else holds it
        ├── KeyMismatch         key-mismatch     the certificate belongs to another key
        ├── WrongSubject        wrong-subject    the certificate names another unit
        └── BadCertificate      bad-certificate  the certificates do not parse or do not hang together

The codes are part of the wire (`firmware_agent.wire.Fault.code`): the station chooses by them who is at fault.
"""


class AgentFault(Exception):
    """A verb or the product mode cannot go on."""

    code = "internal"


class BadRequest(AgentFault):
    """The request is none that this agent can answer."""

    code = "bad-request"


class WrongState(AgentFault):
    """The unit is not yet, or no more, in the state that the verb needs."""

    code = "wrong-state"


class SettingsFault(AgentFault):
    """The settings of the image do not parse."""

    code = "settings"


class UnitFault(AgentFault):
    """The unit itself is at fault."""

    code = "unit"


class NoTpm(UnitFault):
    """The unit is configured for a TPM and none is usable."""

    code = "no-tpm"


class KeyFault(UnitFault):
    """The device key exists, but cannot be used."""

    code = "key-store"


class PirFault(UnitFault):
    """The PIR's line cannot be opened."""

    code = "no-pir"


class KeyMismatch(UnitFault):
    """A certificate for another key."""

    code = "key-mismatch"


class WrongSubject(UnitFault):
    """A certificate for another unit."""

    code = "wrong-subject"


class BadCertificate(UnitFault):
    """Certificates that do not parse, or a chain that does not hang together."""

    code = "bad-certificate"
