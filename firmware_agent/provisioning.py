"""Factory mode: the station asks one verb after the other, the unit answers.

    identify → enrol → burn-in → installed → prove → self-test → watch-pir → connect → seal

That is the order of the line, and `status` tells a person how the unit is. Every verb stands alone and may be asked
again: what a verb needs it finds on the disk, and what it makes is complete and durable before it answers. The unit
reports values and judges nothing; limits belong to the line.
"""

import base64
import binascii
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from firmware_agent import __version__, files, identity, keys, messages, topics
from firmware_agent.board import Board
from firmware_agent.errors import AgentFault, BadRequest, WrongState
from firmware_agent.identity import Identity
from firmware_agent.keys import tpm
from firmware_agent.pins import Pins
from firmware_agent.settings import Settings
from firmware_agent.wire import (
    MAX_LINE,
    PROOF_CONTEXT,
    Event,
    Fault,
    LinkLostError,
    MalformedError,
    Reply,
    Request,
    Result,
    Stream,
    decode_request,
    encode_reply,
)

NONCE_BYTES: Final = 32

MAX_WATCH_SECONDS: Final = 120.0
MAX_ATTEMPTS: Final = 20
MAX_WAIT_SECONDS: Final = 120.0

Emit = Callable[[dict[str, Any]], None]


# --- parameters, parsed where they come in ------------------------------------------------------------------------


class Params:
    """The parameters of one request, taken out one by one; what is left over at the end was a mistake."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._left = dict(params)

    def _take(self, name: str) -> Any:
        try:
            return self._left.pop(name)
        except KeyError:
            raise BadRequest(f"the parameter {name!r} is missing") from None

    def text(self, name: str, longest: int = 128) -> str:
        """A string of 1 to `longest` characters."""
        value = self._take(name)
        if not isinstance(value, str) or not 1 <= len(value) <= longest:
            raise BadRequest(f"{name!r} must be a text of 1 to {longest} characters")
        return value

    def serial(self, name: str) -> str:
        """A unit's serial."""
        value = self.text(name)
        if not topics.valid_serial(value):
            raise BadRequest(f"{name!r} is no serial: 4 to 32 of A-Z, 0-9 and inner hyphens, not {value!r}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self._take(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise BadRequest(f"{name!r} must be a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadRequest(f"{name!r} must be a whole number from {low} to {high}")
        return value

    def choice(self, name: str, *allowed: str) -> str:
        """One of `allowed`."""
        value = self._take(name)
        if value not in allowed:
            raise BadRequest(f"{name!r} must be one of {', '.join(allowed)}")
        return str(value)

    def binary(self, name: str, size: int) -> bytes:
        """`size` bytes, sent as base64."""
        try:
            value = base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"{name!r} is no base64") from error
        if len(value) != size:
            raise BadRequest(f"{name!r} must be {size} bytes, not {len(value)}")
        return value

    def table(self, name: str) -> "Params":
        """A nested object."""
        value = self._take(name)
        if not isinstance(value, dict):
            raise BadRequest(f"{name!r} must be an object")
        return Params(value)

    def done(self) -> None:
        """Refuse what nobody took."""
        if self._left:
            raise BadRequest(f"unknown parameters: {', '.join(sorted(self._left))}")


@dataclass(frozen=True)
class Nothing:
    """A verb without parameters."""

    @classmethod
    def parse(cls, params: Params) -> "Nothing":
        """Takes none."""
        del params
        return cls()


@dataclass(frozen=True)
class Enrol:
    """`enrol`: whom the CSR shall name."""

    serial: str

    @classmethod
    def parse(cls, params: Params) -> "Enrol":
        """From the wire."""
        return cls(params.serial("serial"))


@dataclass(frozen=True)
class BurnIn:
    """`burn-in`: the identity to install."""

    identity: Identity

    @classmethod
    def parse(cls, params: Params) -> "BurnIn":
        """From the wire."""
        endpoint = params.table("endpoint")
        burn_in = cls(
            Identity(
                serial=params.serial("serial"),
                chain=params.text("chain", 64 * 1024),
                trust=params.text("trust", 128 * 1024),
                host=endpoint.text("host", 253),  # RFC 1035: the longest name
                port=endpoint.integer("port", 1, 65535),
                batch=params.text("batch"),
            ),
        )
        endpoint.done()
        return burn_in


@dataclass(frozen=True)
class Prove:
    """`prove`: what to sign."""

    nonce: bytes

    @classmethod
    def parse(cls, params: Params) -> "Prove":
        """From the wire."""
        return cls(params.binary("nonce", NONCE_BYTES))


@dataclass(frozen=True)
class WatchPir:
    """`watch-pir`: for how long, or until the first falling edge."""

    seconds: float
    until_falling: bool

    @classmethod
    def parse(cls, params: Params) -> "WatchPir":
        """From the wire."""
        return cls(
            params.number("seconds", 0.001, MAX_WATCH_SECONDS),
            params.choice("until", "end", "falling") == "falling",
        )


@dataclass(frozen=True)
class Connect:
    """`connect`: how often to try, how long to wait in between, and the nonce of the hello."""

    nonce: str
    attempts: int
    wait_seconds: float

    @classmethod
    def parse(cls, params: Params) -> "Connect":
        """From the wire."""
        return cls(
            params.text("nonce"),
            params.integer("attempts", 1, MAX_ATTEMPTS),
            params.number("wait_seconds", 0, MAX_WAIT_SECONDS),
        )


# --- the verbs ----------------------------------------------------------------------------------------------------


class Provisioning:
    """One session with the station.

    Args:
        settings: what the image fixes.
        board: what the agent runs on.
        pins: where the PIR is.
        sleep: how to wait between connection attempts.
    """

    def __init__(
        self,
        settings: Settings,
        board: Board,
        pins: Pins,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._board = board
        self._pins = pins
        self._sleep = sleep
        self._store: keys.KeyStore | None = None
        self._verbs: Mapping[str, tuple[Callable[[Params], Any], Callable[[Any, Emit], dict[str, Any]]]] = {
            "identify": (Nothing.parse, self._identify),
            "enrol": (Enrol.parse, self._enrol),
            "burn-in": (BurnIn.parse, self._burn_in),
            "installed": (Nothing.parse, self._installed),
            "prove": (Prove.parse, self._prove),
            "self-test": (Nothing.parse, self._self_test),
            "watch-pir": (WatchPir.parse, self._watch_pir),
            "connect": (Connect.parse, self._connect),
            "seal": (Nothing.parse, self._seal),
            "status": (Nothing.parse, self._status),
        }

    def serve(self, stream: Stream) -> None:
        """Answer requests until the station hangs up or `seal` is done. Nothing that is asked ends it with an error."""
        try:
            self._prepare()
            while True:
                line = stream.readline(MAX_LINE + 1)
                if not line:
                    return
                if len(line) > MAX_LINE:
                    _skip_line(line, stream)
                    line = b"too long\n"  # no request: answered as such below
                if not self._answer(line, stream):
                    return
        except (LinkLostError, BrokenPipeError, ConnectionError):
            return  # the station's side is gone: the session is over, and what was done is on the disk
        finally:
            if self._store is not None:
                self._store.close()
                self._store = None

    def _prepare(self) -> None:
        self._paths.run.mkdir(parents=True, exist_ok=True)
        self._paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._paths.answered.touch()  # the banner stops

    def _answer(self, line: bytes, stream: Stream) -> bool:
        """Answer one line; whether the session goes on."""

        def send(reply: Reply) -> None:
            stream.write(encode_reply(reply))
            stream.flush()

        try:
            request = decode_request(line)
        except MalformedError as error:
            send(Fault(0, BadRequest.code, str(error)))
            return True
        try:
            result = self._perform(request, lambda event: send(Event(request.id, event)))
        except AgentFault as fault:
            send(Fault(request.id, fault.code, str(fault)))
            return True
        except (LinkLostError, BrokenPipeError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 - a bug in one verb must not end the session, and must be told
            send(Fault(request.id, AgentFault.code, f"{type(error).__name__}: {error}"))
            return True
        send(Result(request.id, result))
        if request.verb == "seal":
            self._request_seal()
            return False
        return True

    def _perform(self, request: Request, emit: Emit) -> dict[str, Any]:
        try:
            parse, verb = self._verbs[request.verb]
        except KeyError:
            raise BadRequest(f"unknown verb {request.verb!r}; known are {', '.join(self._verbs)}") from None
        params = Params(request.params)
        parsed = parse(params)
        params.done()
        return verb(parsed, emit)

    def _keys(self) -> keys.KeyStore:
        """The key store, opened at its first use and kept for the session."""
        if self._store is None:
            self._store = keys.open_store(self._settings)
        return self._store

    def _refuse_when_sealed(self) -> None:
        if self._paths.sealed.exists():
            raise WrongState("this unit is sealed; it takes no new identity")

    def _identify(self, _: Nothing, __: Emit) -> dict[str, Any]:
        facts = self._board.facts()
        grade = keys.grade(self._settings)
        tcti = self._settings.tpm.tcti
        fitted = tpm.present(tcti)
        return {
            "board": facts.serial,
            "revision": facts.revision,
            "model": facts.model,
            "macs": dict(facts.macs),
            "medium": {"cid": facts.medium_cid, "bytes": facts.medium_bytes},
            "memory_bytes": facts.memory_bytes,
            "tpm": {"present": fitted, "ek_sha256": _endorsement(tcti) if fitted else None},
            "key_store": grade,
            "agent": __version__,
            "image": {"name": self._settings.image.name, "version": self._settings.image.version},
            "boot_id": facts.boot_id,
            "kernel": facts.kernel,
        }

    def _enrol(self, params: Enrol, _: Emit) -> dict[str, Any]:
        self._refuse_when_sealed()
        key = self._keys().ensure()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Picket"),
                x509.NameAttribute(NameOID.COMMON_NAME, params.serial),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, self._board.facts().serial),
            ],
        )
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        csr = builder.sign(key.private_key(), hashes.SHA256())
        return {"csr": csr.public_bytes(Encoding.PEM).decode(), "key": keys.grade(self._settings)}

    def _burn_in(self, params: BurnIn, _: Emit) -> dict[str, Any]:
        self._refuse_when_sealed()
        only = self._settings.mqtt.endpoint
        if only and params.identity.host != only:
            raise BadRequest(f"this image is for the endpoint {only} alone, not for {params.identity.host}")
        identity.check(params.identity, self._keys().load().public_key(), self._board.facts().serial)
        identity.install(self._paths.identity, params.identity)
        return {"certificate_sha256": params.identity.certificate_sha256}

    def _installed(self, _: Nothing, __: Emit) -> dict[str, Any]:
        found = identity.load(self._paths.identity)
        return {
            "chain": found.chain,
            "trust_sha256": found.trust_sha256,
            "endpoint": {"host": found.host, "port": found.port},
            "batch": found.batch,
        }

    def _prove(self, params: Prove, _: Emit) -> dict[str, Any]:
        signature = self._keys().load().sign(PROOF_CONTEXT + params.nonce)
        return {"signature": base64.b64encode(signature).decode()}

    def _self_test(self, _: Nothing, __: Emit) -> dict[str, Any]:
        with self._pins.pir() as pir:
            level = pir.level()
        clock = self._board.clock()
        return {
            **asdict(self._board.health(self._paths.state)),
            "pir_level": level,
            "clock": messages.timestamp(clock.unix),
            "clock_synchronised": clock.quality == "ntp",
        }

    def _watch_pir(self, params: WatchPir, emit: Emit) -> dict[str, Any]:
        edges: queue.SimpleQueue[tuple[bool, float]] = queue.SimpleQueue()
        count = 0
        with self._pins.pir() as pir:
            pir.watch(lambda rising: edges.put((rising, time.monotonic())))
            level = pir.level()
            emit({"watching": True, "level": level})
            end = time.monotonic() + params.seconds
            while (left := end - time.monotonic()) > 0:
                try:
                    rising, at = edges.get(timeout=left)
                except queue.Empty:
                    break
                count += 1
                level = int(rising)
                emit({"edge": "rising" if rising else "falling", "at": at})
                if params.until_falling and not rising:
                    break
        return {"edges": count, "level": level}

    def _connect(self, params: Connect, emit: Emit) -> dict[str, Any]:
        from firmware_agent import mqtt  # noqa: PLC0415 - 12 MB of native code would slow the first answer

        found = identity.load(self._paths.identity)
        key = self._keys().load()
        attempts: list[mqtt.Attempt] = []
        for number in range(1, params.attempts + 1):
            if attempts:
                self._sleep(params.wait_seconds)
            hello = messages.hello(
                "factory",
                nonce=params.nonce,
                facts=self._board.facts(),
                identity=found,
                image=self._settings.image,
                clock=self._board.clock(),
                key=keys.grade(self._settings),
            )
            attempts.append(
                mqtt.attempt(
                    found,
                    key,
                    topics.data_topic(found.serial, topics.HELLO),
                    hello.payload(),
                    keep_alive_seconds=self._settings.mqtt.keep_alive_seconds,
                    now=self._board.clock().unix,
                ),
            )
            emit({"attempt": number, **asdict(attempts[-1])})
            if attempts[-1].outcome == "held":
                files.write_atomic(self._paths.connected, found.certificate_sha256.encode())
                break
        return {
            "attempts": [asdict(attempt) for attempt in attempts],
            "held": attempts[-1].outcome == "held",
        }

    def _seal(self, _: Nothing, __: Emit) -> dict[str, Any]:
        found = identity.load(self._paths.identity)
        try:
            connected = self._paths.connected.read_text()
        except FileNotFoundError:
            connected = ""
        if connected != found.certificate_sha256:
            raise WrongState("this unit has not held a connection with its certificate yet; run connect first")
        return {"sealing": True}

    def _status(self, _: Nothing, __: Emit) -> dict[str, Any]:
        from firmware_agent import status  # noqa: PLC0415 - asked by people, not by the line

        document = status.collect(self._settings, self._board)
        return {"words": status.words(document), "status": dict(document)}

    def _request_seal(self) -> None:
        """Ask for the seal, after the answer is out: the way to the station is about to be cut."""
        files.write_atomic(self._paths.seal_request, b"")


def _skip_line(line: bytes, stream: Stream) -> None:
    """Read on to the end of a line that is longer than the wire allows."""
    while not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE + 1)
        if not line:
            raise LinkLostError("the link broke off inside a line")


def _endorsement(tcti: str) -> str | None:
    try:
        return tpm.ek_sha256(tcti)
    except OSError:
        return None  # a TPM without a P-256 endorsement key is still a TPM
