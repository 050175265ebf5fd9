"""Names on the wire to the cloud: MQTT topics and what a valid serial is.

The serial is the certificate's CN, the thing name and the MQTT client id, so one rule serves them all: what AWS
accepts in a thing name (`CreateThing`: `[a-zA-Z0-9:_-]{1,128}`), narrowed to what a label can carry without doubt.
"""

import re

PREFIX = "dt/picket"

ALARM = "alarm"
EVENT = "event"
HEARTBEAT = "heartbeat"
HELLO = "hello"

_SERIAL = re.compile(r"[A-Z0-9][A-Z0-9-]{2,30}[A-Z0-9]")


def valid_serial(text: str) -> bool:
    """Whether `text` can be a serial: 4 to 32 of A-Z, 0-9 and inner hyphens."""
    return _SERIAL.fullmatch(text) is not None


def data_topic(thing: str, kind: str) -> str:
    """The topic that the unit `thing` publishes `kind` on, e.g. `dt/picket/PK-000001/alarm`."""
    return f"{PREFIX}/{thing}/{kind}"


def jobs_topic(thing: str, *parts: str) -> str:
    """A reserved topic of AWS IoT Jobs, e.g. `$aws/things/PK-000001/jobs/notify-next`.

    https://docs.aws.amazon.com/iot/latest/developerguide/reserved-topics.html#reserved-topics-job
    """
    return "/".join(("$aws/things", thing, "jobs", *parts))


def shadow_topic(thing: str, name: str, *parts: str) -> str:
    """A reserved topic of a named shadow, e.g. `$aws/things/PK-000001/shadow/name/alarm/update`."""
    return "/".join(("$aws/things", thing, "shadow/name", name, *parts))


def defender_topic(thing: str) -> str:
    """Where Device Defender takes a unit's metrics."""
    return f"$aws/things/{thing}/defender/metrics/json"


def feature(topic: str) -> str:
    """Which part of the agent a topic belongs to: `jobs`, `shadow`, `defender`, `alarm`, `heartbeat`, ..."""
    parts = topic.split("/")
    return parts[3] if len(parts) > 3 else parts[0]


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to `topic_filter` gets what is published on `topic` (MQTT 5, 4.7)."""
    wanted, given = topic_filter.split("/"), topic.split("/")
    if given[0].startswith("$") and wanted[0] in {"+", "#"}:
        return False
    for position, word in enumerate(wanted):
        if word == "#":
            return True
        if position >= len(given) or word not in {"+", given[position]}:
            return False
    return len(wanted) == len(given)
