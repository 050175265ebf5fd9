"""What the image fixes for all of its units: /etc/picket/agent.toml, parsed once into frozen values.

Unknown keys and wrong types are refused by name: a misspelt setting that is silently ignored would be found in the
field. A file holds any part of this; what it leaves out has the value shown here, except for `[image]`:

    [image]                 # required
    name = "picket"
    version = "0.1.0"
    [key]
    store = "probe-once"    # "file", "tpm", or "probe-once": look for a TPM once, record it, and stay with it
    [tpm]
    module = "/usr/lib/aarch64-linux-gnu/libtpm2_pkcs11.so.1"
    tcti = "device:/dev/tpmrm0"     # how to reach the TPM; "" says that this board has no place for one
    token = "picket"
    key = "device-1"
    [gpio]
    driver = "lgpio"        # the kernel's chips; or "unix:/path": lines that another process holds (remote_pins.py)
    [pir]
    warm_up_seconds = 60
    blocked_seconds = 2.5
    [pir.lines]             # GPIO chip label = line; the first chip that this board has is used
    "pinctrl-bcm2711" = 17
    [tamper.lines]          # a loop that is closed (high) while the case is; none by default
    [mqtt]
    endpoint = ""           # a host: burn-in refuses every other one
    keep_alive_seconds = 45
    publishes_per_second = 90       # AWS IoT takes 100 on one connection
    [tuning]                # what the owner may change from afar; see firmware_agent/tuning.py for each
    sensitivity = "normal"
    quiet_seconds = 10
    stuck_seconds = 900
    silent_hours = 168
    heartbeat_seconds = 300
    report_seconds = 900
    [clock]
    port = 443              # where the endpoint speaks HTTPS, and so tells the time
    [update]
    root = "/usr/share/picket/root.json"    # the TUF root that this image trusts
    product = "picket"      # releases for another product are refused
    health_seconds = 120    # how long a new release may take to prove sensor, spool and key
    soft_seconds = 900      # ... and to reach the cloud, if the old one could
    attempts = 3            # how often a new release is started before the old one comes back
    [paths]
    state = "/var/lib/picket"
    releases = "/opt/picket"
    run = "/run/picket"
    host_key = "/run/picket-factory/ssh_host_ed25519_key.pub"
    sealed = "/run/picket-system/product"   # exists in product mode
    clock_epoch = "/usr/lib/clock-epoch"    # its date is the image's
    board = "/"             # where the kernel's /proc, /sys and /run hang
    slots = "/run/picket-slots.sock"        # root's helper that installs images; only where there are slots
    layout = "/usr/lib/picket/layout.json"  # what the build says about the image
"""

import contextlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from firmware_agent.errors import SettingsFault
from firmware_agent.tuning import Tuning

DEFAULT_PATH: Final = Path("/etc/picket/agent.toml")

KEY_STORES: Final = ("file", "tpm", "probe-once")

#: The PIR sits on BCM 17 (pin 11 of the header) of every Pi; the virtual Pi has it on the PL061 of QEMU's `virt`.
PIR_LINES: Final = MappingProxyType(
    {"pinctrl-bcm2835": 17, "pinctrl-bcm2711": 17, "pinctrl-rp1": 17, "9030000.pl061": 5},
)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def _path(value: object) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise TypeError("an absolute path")
    return path


def _number(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise TypeError(f"a number from {low:g} to {high:g}")
        return float(value)

    return parse


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise TypeError(f"a whole number from {low} to {high}")
        return value

    return parse


def _store(value: object) -> str:
    if value not in KEY_STORES:
        raise TypeError("one of " + ", ".join(KEY_STORES))
    return _text(value)


def _driver(value: object) -> str:
    text = _text(value)
    if text != "lgpio" and not text.startswith("unix:/"):
        raise TypeError('"lgpio" or "unix:" and an absolute path')
    return text


def _lines(value: object) -> Mapping[str, int]:
    if not isinstance(value, dict) or not value:
        raise TypeError("a table of GPIO chip labels and lines")
    parse = _integer(0, 511)
    return MappingProxyType({label: parse(line) for label, line in value.items()})


@dataclass(frozen=True)
class Image:
    """Which image this is."""

    name: str = field(metadata={"parse": _text})
    version: str = field(metadata={"parse": _text})

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Key:
    """Where the device key lives."""

    store: str = field(default="probe-once", metadata={"parse": _store})


@dataclass(frozen=True)
class Tpm:
    """How the TPM is reached, and the names of token and key in it."""

    module: Path = field(default=Path("/usr/lib/aarch64-linux-gnu/libtpm2_pkcs11.so.1"), metadata={"parse": _path})
    tcti: str = field(default="device:/dev/tpmrm0", metadata={"parse": _text})
    token: str = field(default="picket", metadata={"parse": _text})
    key: str = field(default="device-1", metadata={"parse": _text})


@dataclass(frozen=True)
class Gpio:
    """Who holds the lines of `[pir]` and `[tamper]`: the kernel, or a process behind a Unix socket."""

    driver: str = field(default="lgpio", metadata={"parse": _driver})


@dataclass(frozen=True)
class Pir:
    """The motion sensor's line, by the label of the GPIO chip, and how long it lies after power-up.

    An HC-SR501 may go high up to three times in its first minute, so product mode is deaf for that long after the
    board's power came (not after a restart of the agent). After its output has fallen it sees nothing for 2.5 to 3 s,
    so what rises in that time is no motion.
    """

    lines: Mapping[str, int] = field(default_factory=lambda: PIR_LINES, metadata={"parse": _lines})
    warm_up_seconds: float = field(default=60.0, metadata={"parse": _number(0, 600)})
    blocked_seconds: float = field(default=2.5, metadata={"parse": _number(0, 60)})


def _maybe_lines(value: object) -> Mapping[str, int]:
    return MappingProxyType({}) if value == {} else _lines(value)


@dataclass(frozen=True)
class Tamper:
    """A loop through the case, by the label of the GPIO chip: high while the case is closed. Without lines, none."""

    lines: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}), metadata={"parse": _maybe_lines})


@dataclass(frozen=True)
class Update:
    """How the agent changes itself: whose releases it takes, and what a new one has to prove."""

    root: Path = field(default=Path("/usr/share/picket/root.json"), metadata={"parse": _path})
    product: str = field(default="picket", metadata={"parse": _text})
    health_seconds: float = field(default=120.0, metadata={"parse": _number(0.1, 3600)})
    soft_seconds: float = field(default=900.0, metadata={"parse": _number(0.1, 86400)})
    attempts: int = field(default=3, metadata={"parse": _integer(1, 10)})


@dataclass(frozen=True)
class Clock:
    """Where the endpoint tells the time, should no time server answer: its HTTPS port."""

    port: int = field(default=443, metadata={"parse": _integer(1, 65535)})


@dataclass(frozen=True)
class Mqtt:
    """The connection's rhythm, and the one host that this image's units connect to, if it says so.

    The SDK wants a keep-alive longer than its ping timeout of 30 s; AWS IoT takes at most 1200 s.
    """

    endpoint: str = field(default="", metadata={"parse": _text})
    keep_alive_seconds: int = field(default=45, metadata={"parse": _integer(32, 1200)})
    publishes_per_second: float = field(default=90.0, metadata={"parse": _number(1, 1_000_000)})


@dataclass(frozen=True)
class Paths:
    """Where things lie: what survives (`state`), what a boot forgets (`run`)."""

    state: Path = field(default=Path("/var/lib/picket"), metadata={"parse": _path})
    run: Path = field(default=Path("/run/picket"), metadata={"parse": _path})
    releases: Path = field(default=Path("/opt/picket"), metadata={"parse": _path})
    host_key: Path = field(default=Path("/run/picket-factory/ssh_host_ed25519_key.pub"), metadata={"parse": _path})
    #: Exists once the unit has left factory mode: root's word, which the agent cannot change.
    sealed: Path = field(default=Path("/run/picket-system/product"), metadata={"parse": _path})
    clock_epoch: Path = field(default=Path("/usr/lib/clock-epoch"), metadata={"parse": _path})
    board: Path = field(default=Path("/"), metadata={"parse": _path})
    slots: Path = field(default=Path("/run/picket-slots.sock"), metadata={"parse": _path})
    layout: Path = field(default=Path("/usr/lib/picket/layout.json"), metadata={"parse": _path})

    @property
    def answered(self) -> Path:
        """Exists once the station has opened a session in this boot; the banner stops."""
        return self.run / "answered"

    @property
    def connected(self) -> Path:
        """Holds the digest of the certificate that last held a connection."""
        return self.state / "connected"

    @property
    def seal_request(self) -> Path:
        """Written by `seal`; a root service on the unit does the rest."""
        return self.state / "seal-request"

    @property
    def key_store(self) -> Path:
        """What `probe-once` found, for ever."""
        return self.state / "key-store"

    @property
    def key_file(self) -> Path:
        """The private key of the store `file`."""
        return self.state / "key.pem"

    @property
    def tpm_pin(self) -> Path:
        """The PINs of our token."""
        return self.state / "tpm-pin.json"

    @property
    def tpm_store(self) -> Path:
        """libtpm2_pkcs11's own database: the wrapped key blobs."""
        return self.state / "tpm2_pkcs11"

    @property
    def identity(self) -> Path:
        """A symlink to the certificates in force."""
        return self.state / "identity"

    @property
    def spool(self) -> Path:
        """Alarms on their way to the cloud."""
        return self.state / "spool.db"

    @property
    def boot(self) -> Path:
        """What the launcher knows: the release on trial, and how often it was started."""
        return self.state / "boot.json"

    @property
    def jobs(self) -> Path:
        """The jobs' journal and what they are working on."""
        return self.state / "jobs"

    @property
    def reboot_request(self) -> Path:
        """Written by a job; a root service on the unit restarts the board."""
        return self.state / "reboot-request"

    @property
    def tuf(self) -> Path:
        """Signed update metadata, as far as it was seen."""
        return self.state / "tuf"

    @property
    def floor(self) -> Path:
        """What an update may never undercut; apart from the metadata, so that losing those does not lose this."""
        return self.state / "floor.json"

    @property
    def tuning(self) -> Path:
        """The settings that the cloud has changed."""
        return self.state / "tuning.json"

    @property
    def shadows(self) -> Path:
        """Which wish for the settings was looked at last."""
        return self.state / "shadows.json"

    @property
    def reports(self) -> Path:
        """The number of the last health report, and how many alarms were false."""
        return self.state / "reports.json"

    @property
    def arming(self) -> Path:
        """Armed or not, as of the last change."""
        return self.state / "arming.json"

    @property
    def clock(self) -> Path:
        """The last time that the cloud has told, as of the last hour."""
        return self.state / "clock.json"

    @property
    def clock_wrong(self) -> Path:
        """Exists while the agent finds the clock certainly wrong; `picket-clock.service` acts on it."""
        return self.run / "clock-wrong"

    @property
    def clock_https(self) -> Path:
        """Exists once the clock was set by the endpoint's HTTPS in this boot."""
        return self.run / "clock-https"

    @property
    def status(self) -> Path:
        """How the running agent is, for `picket-agent status`."""
        return self.run / "status.json"


@dataclass(frozen=True)
class Settings:
    """Everything that the image says to the agent."""

    image: Image
    key: Key = field(default_factory=Key)
    tpm: Tpm = field(default_factory=Tpm)
    gpio: Gpio = field(default_factory=Gpio)
    pir: Pir = field(default_factory=Pir)
    tamper: Tamper = field(default_factory=Tamper)
    mqtt: Mqtt = field(default_factory=Mqtt)
    clock: Clock = field(default_factory=Clock)
    tuning: Tuning = field(default_factory=Tuning)
    update: Update = field(default_factory=Update)
    paths: Paths = field(default_factory=Paths)


_SECTIONS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "image": Image,
        "key": Key,
        "tpm": Tpm,
        "gpio": Gpio,
        "pir": Pir,
        "tamper": Tamper,
        "mqtt": Mqtt,
        "clock": Clock,
        "tuning": Tuning,
        "update": Update,
        "paths": Paths,
    },
)


def _section(name: str, kind: type, table: object) -> Any:
    if not isinstance(table, dict):
        raise SettingsFault(f"[{name}] must be a table")
    known = {member.name: member for member in fields(kind)}
    for key in table:
        if key not in known:
            raise SettingsFault(f"unknown setting {name}.{key}; known are {', '.join(sorted(known))}")
    values = {}
    for key, value in table.items():
        try:
            values[key] = known[key].metadata["parse"](value)
        except TypeError as error:
            raise SettingsFault(f"{name}.{key} must be {error}, not {value!r}") from None
    try:
        return kind(**values)
    except TypeError:
        raise SettingsFault(f"[{name}] needs {', '.join(sorted(set(known) - set(values)))}") from None


def parse(text: str) -> Settings:
    """The settings in TOML text.

    Raises:
        SettingsFault: it is no TOML, or a key is unknown, missing or of the wrong type; the message names it.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsFault(f"the settings are no TOML: {error}") from error
    for name in document:
        if name not in _SECTIONS:
            raise SettingsFault(f"unknown section [{name}]; known are {', '.join(_SECTIONS)}")
    document.setdefault("image", {})
    return Settings(**{name: _section(name, _SECTIONS[name], table) for name, table in document.items()})


def load(path: Path = DEFAULT_PATH) -> Settings:
    """The settings in the file `path`.

    Raises:
        SettingsFault: the file is missing, unreadable or wrong.
    """
    try:
        return parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsFault(f"cannot read the settings {path}: {error}; the image must bring this file") from error
    except SettingsFault as error:
        raise SettingsFault(f"{path}: {error}") from error


def salvage(path: Path = DEFAULT_PATH) -> Settings:
    """What can still be used of settings that `load` refuses: each section that parses, the default for each other.

    An alarm system with a wrong line in its settings shall watch all the same. Where the key lives is no matter of
    defaults, though: if the file does not say it, what lies on the disk does, and nothing is looked for anew.
    """
    try:
        document: Mapping[str, Any] = tomllib.loads(path.read_text(errors="replace"))
    except (OSError, tomllib.TOMLDecodeError):
        document = {}
    sections: dict[str, Any] = {"image": Image("unknown", "unknown")}
    for name, table in document.items():
        if name in _SECTIONS:
            with contextlib.suppress(SettingsFault):
                sections[name] = _section(name, _SECTIONS[name], table)
    settings = Settings(**sections)
    if "key" not in sections and not settings.paths.key_store.exists():
        store = "tpm" if settings.paths.tpm_store.exists() else "file"
        settings = replace(settings, key=Key(store))
    return settings
