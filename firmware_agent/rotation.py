"""The job kind `rotate-certificate`: a new key and a new certificate, never a moment without a pair that works.

    key       a new key beside the old one, and a CSR for it
    request   the cloud has it signed; the set is written beside the one in force
    prove     (bound) connect with the new pair; the jobs service answers; the new set is put in force
    commit    (bound) the cloud ends the old certificate; then the old set and its key are removed
    settle    (undo) whichever pair connects: by the old one the cloud ends the new certificate, by the new one the old

Two facts on the disk say how far it has come, so that nothing hangs on notes: which set is in force, and whether the
set that it replaced is still there.

- The new set is put in force only after it has carried a connection, and a commit is asked only after that. So while
  the old set is in force nothing has been committed, and the new one can be thrown away.
- The old set is removed only when the cloud has accepted the commit. So while the new set is in force beside the old
  one, either may be the one that works: both are tried, in turn, until the cloud has said which.

The cloud ends the old certificate only on a commit that came over the new one, and never both (`decide` of
`cloud/handlers/rotate_certificate.py`). The private keys stay where they were made.
"""

import itertools
import json
import logging
import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from firmware_agent import identity, topics
from firmware_agent.digests import digest
from firmware_agent.errors import AgentFault, WrongState
from firmware_agent.identity import Identity
from firmware_agent.jobs.kind import Context, Done, Failed, Key, Next, Orphan, Phase, Result
from firmware_agent.keys import DeviceKey, KeyStore
from firmware_agent.mqtt import NotDeliveredError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_log = logging.getLogger(__name__)

#: How long a pair may take to connect. A failing handshake alone takes half a minute, and the link waits up to a minute
#: between two attempts.
CONNECT_SECONDS: Final = 180.0

#: How long one answer may take; the function behind it may have to start first.
ANSWER_SECONDS: Final = 15.0

_ASKED: Final = 4  # times
_LOOK_SECONDS: Final = 0.2

#: A crash in `settle` has to be gone on with, however often: nothing else knows which pair works.
_SETTLE_ATTEMPTS: Final = 1000

Operation = Literal["begin", "commit", "abort"]


class Wire(Protocol):
    """What a rotation needs of the link."""

    @property
    def serial(self) -> str:
        """The unit's name in the cloud."""
        ...

    def connected_as(self) -> str | None:
        """The id of the certificate that the present connection was made with; None without one."""
        ...

    def use(self, identity: Identity, key: DeviceKey) -> None:
        """Leave the connection, and make the next one with another pair."""
        ...

    def subscribe(self, feature: str, filters: Sequence[str], listener: Callable[[str, bytes], None]) -> None:
        """Give what is published on `filters` to `listener`."""
        ...

    def publish(self, topic: str, payload: bytes) -> "Future[None]":
        """Send once at QoS 1."""
        ...


class RefusedError(Exception):
    """The cloud does not do what it was asked; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message or code)
        self.code = code


class Exchange:
    """Questions to the cloud's function, and its answers.

    A question goes out on `dt/picket/<thing>/rotate`, its answer comes on `cmd/picket/<thing>/rotate/accepted` or
    `…/rejected` with the question's `clientToken`.
    """

    def __init__(self, link: Wire, *, seconds: float = ANSWER_SECONDS) -> None:
        self._link = link
        self._seconds = seconds
        self._arrived: queue.SimpleQueue[tuple[bool, Mapping[str, Any]]] = queue.SimpleQueue()
        link.subscribe("rotate", [f"cmd/picket/{link.serial}/rotate/+"], self._take)

    def _take(self, topic: str, payload: bytes) -> None:
        """On the link's thread."""
        with suppress(ValueError):
            body = json.loads(payload)
            if isinstance(body, dict):
                self._arrived.put((topic.endswith("/accepted"), body))

    def ask(
        self, operation: Operation, rotation: str, alive: Callable[[float], None], csr: str | None = None
    ) -> Mapping[str, Any]:
        """Ask, and wait for the answer.

        Args:
            operation: what.
            rotation: which.
            alive: called with the seconds that it may sleep, again and again.
            csr: for `begin`.

        Raises:
            NotDeliveredError: no link, or no answer in time. The cloud may have done it: ask again.
            RefusedError: the cloud said no.
        """
        token = os.urandom(8).hex()
        body = {"operation": operation, "rotation": rotation, "clientToken": token} | ({"csr": csr} if csr else {})
        sent = self._link.publish(topics.data_topic(self._link.serial, "rotate"), json.dumps(body).encode())
        try:
            sent.result(timeout=self._seconds)
        except FutureTimeoutError:
            raise NotDeliveredError("no acknowledgement in time") from None
        end = time.monotonic() + self._seconds
        while (left := end - time.monotonic()) > 0:
            try:
                accepted, answer = self._arrived.get(timeout=min(left, _LOOK_SECONDS))
            except queue.Empty:
                alive(0.0)
                continue
            if answer.get("clientToken") != token:
                continue  # to a question that was given up
            if not accepted:
                raise RefusedError(str(answer.get("code", "")), str(answer.get("message", "")))
            return answer
        raise NotDeliveredError("no answer in time")


class Rotation:
    """Change the unit's key and certificate.

    Args:
        link: the one connection.
        store: where the keys are.
        identities: the symlink to the set in force (settings: `paths.identity`).
        board: the board's serial, for the CSR.
        exchange: the way to the cloud's function; made from `link` when None.
        connect_seconds: how long a pair may take to connect.
        clock: monotonic seconds.
    """

    operation = "rotate-certificate"

    def __init__(
        self,
        link: Wire,
        store: KeyStore,
        identities: Path,
        board: str,
        *,
        exchange: Exchange | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._store = store
        self._identities = identities
        self._board = board
        self._exchange = exchange or Exchange(link)
        self._connect_seconds = connect_seconds
        self._clock = clock
        self.phases: Sequence[Phase] = (
            Phase("key", self._key, code="rotation"),
            Phase("request", self._request, code="rotation", attempts=5),
            Phase("prove", self._prove, code="rotation", bound=True, attempts=5),
            Phase("commit", self._commit, code="rotation", bound=True, attempts=10),
        )
        self.undo: Sequence[Phase] = (Phase("settle", self._settle, code="rotation", attempts=_SETTLE_ATTEMPTS),)

    # --- forward ---------------------------------------------------------------------------------------------------

    def _key(self, context: Context) -> Result:
        self._end_earlier(context)
        slot = slot_of(context.key)
        self._store.remove(slot)  # half a key, if this phase was interrupted
        key = self._store.ensure(slot)
        csr = _request(key, self._link.serial, self._board)
        # Kept, because a CSR that is signed again is another one, and the cloud knows the question by it.
        return Next({"slot": slot, "csr": csr})

    def _end_earlier(self, context: Context) -> None:
        """Remove what is left of an earlier rotation; one that the cloud has not heard the end of is ended before."""
        now = identity.load(self._identities)
        if now.replaces in identity.others(self._identities):
            self._ask_commit(context, now)
        self._tidy()

    def _request(self, context: Context) -> Result:
        slot, csr = str(context.memo["slot"]), str(context.memo["csr"])
        try:
            answer = self._ask(context, "begin", str(context.key), csr)
        except RefusedError as refused:
            return Failed("rotation", f"the cloud signs no certificate: {refused}")
        except NotDeliveredError as error:
            if self._link.connected_as() is None:
                raise
            return Failed("rotation", f"the cloud signs no certificate: {error}")
        old = identity.in_force(self._identities)
        new = replace(
            identity.load(self._identities),
            chain=str(answer.get("certificatePem", "")),
            slot=slot,
            rotation=str(context.key),
            replaces=old,
        )
        identity.check(new, self._store.load(slot).public_key(), self._board)
        return Next({"old": old, "new": identity.write(self._identities, new)})

    def _prove(self, context: Context) -> Result:
        name = str(context.memo["new"])
        new = identity.load(self._identities, name)
        if not self._connected(context, new):
            return Failed("rotation", f"the new certificate did not connect within {self._connect_seconds:g} s")
        answered = any(context.confirm() for _ in range(_ASKED))
        if not answered or self._link.connected_as() != new.certificate_sha256:
            return Failed("rotation", "nothing is answered over a connection with the new certificate")
        identity.use(self._identities, name)
        return Next()

    def _commit(self, context: Context) -> Result:
        new = identity.load(self._identities, str(context.memo["new"]))
        while self._connected(context, new):
            try:
                self._ask_commit(context, new)
            except NotDeliveredError as error:
                _log.info("rotation: the commit has no answer yet: %s", error)
                continue
            except RefusedError as refused:
                return Failed("rotation", f"the cloud does not commit: {refused}")
            self._tidy()
            return Done({"certificate": new.certificate_sha256})
        return Failed("rotation", "the new certificate connects no more")

    # --- back ------------------------------------------------------------------------------------------------------

    def _settle(self, context: Context) -> Result:
        """Find out which pair the cloud keeps, however long it takes; that one is then in force, alone."""
        old, new = str(context.memo["old"]), str(context.memo["new"])
        for name in itertools.cycle((old, new)):
            try:
                if self._settled_by(context, name, "abort" if name == old else "commit"):
                    break
            except (NotDeliveredError, RefusedError, AgentFault, OSError) as error:
                _log.info("rotation: not settled by the %s certificate: %s", "old" if name == old else "new", error)
            context.wait(_LOOK_SECONDS)
        if identity.in_force(self._identities) == new:
            return Failed("rotation", "the new certificate is in force all the same")
        return Next()

    def _settled_by(self, context: Context, name: str, operation: Literal["abort", "commit"]) -> bool:
        """Whether the pair connects and the cloud agrees to keep it."""
        pair = identity.load(self._identities, name)
        if not self._connected(context, pair):
            return False
        if operation == "abort":
            self._ask(context, "abort", str(context.key))
        else:
            self._ask_commit(context, pair)
        identity.use(self._identities, name)
        self._tidy()
        return True

    def clean_up(self, context: Context) -> None:
        """Leave one pair, unless it is not known yet which."""
        now = identity.load(self._identities)
        others = identity.others(self._identities)
        if now.replaces in others:
            return  # `orphan` will find it
        if others or set(self._store.slots()) - {now.slot}:
            with suppress(NotDeliveredError, RefusedError):  # else the cloud ends it by its age
                self._exchange.ask("abort", str(context.key), lambda _: None)
        self._tidy()
        slot = slot_of(context.key)
        if slot != now.slot:
            self._store.remove(slot)

    def orphan(self) -> Orphan | None:
        """A rotation without notes: it goes on at its commit. One that never came so far is removed."""
        try:
            name, now = identity.in_force(self._identities), identity.load(self._identities)
        except WrongState:
            return None
        if now.replaces in identity.others(self._identities):
            return Orphan(Key.parse(now.rotation), "commit", {"old": now.replaces, "new": name})
        with suppress(AgentFault):
            self._tidy()
        return None

    # --- what all of them need ---------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Keep the set in force and its key, and nothing else."""
        identity.keep_only_in_force(self._identities)
        now = identity.load(self._identities).slot
        for slot in self._store.slots():
            if slot != now:
                self._store.remove(slot)

    def _connected(self, context: Context, pair: Identity) -> bool:
        """Whether the link comes up with `pair`, in time by a clock that nobody sets.

        Raises:
            AgentFault: its key cannot be used.
        """
        wanted = pair.certificate_sha256
        if self._link.connected_as() != wanted:
            self._link.use(pair, self._store.load(pair.slot))
        end = self._clock() + self._connect_seconds
        while self._link.connected_as() != wanted:
            if self._clock() >= end:
                return False
            context.wait(_LOOK_SECONDS)
        return True

    def _ask_commit(self, context: Context, new: Identity) -> None:
        """Over a connection with `new`.

        A cloud that has forgotten the rotation ended it long ago, and not by an abort: else this certificate would not
        connect.
        """
        try:
            self._ask(context, "commit", new.rotation)
        except RefusedError as refused:
            if refused.code != "unknown":
                raise

    def _ask(self, context: Context, operation: Operation, rotation: str, csr: str | None = None) -> Mapping[str, Any]:
        for _ in range(_ASKED - 1):
            with suppress(NotDeliveredError):
                return self._exchange.ask(operation, rotation, context.wait, csr)
            context.wait(_LOOK_SECONDS)
        return self._exchange.ask(operation, rotation, context.wait, csr)


def _request(key: DeviceKey, serial: str, board: str) -> str:
    """A CSR, as PEM, named as the factory's."""
    from cryptography import x509  # noqa: PLC0415 - ten megabytes that the running agent does without
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Picket"),
            x509.NameAttribute(NameOID.COMMON_NAME, serial),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, board),
        ],
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key.private_key(), hashes.SHA256()).public_bytes(Encoding.PEM).decode()


class KeyInForce:
    """Whatever key is in force when it is used: a rotation changes it while the agent runs.

    Args:
        store: where the keys are.
        identities: the symlink to the set in force.
    """

    def __init__(self, store: KeyStore, identities: Path) -> None:
        self._store = store
        self._identities = identities

    def _key(self) -> DeviceKey:
        return self._store.load(identity.load(self._identities).slot)

    def public_key(self) -> "ec.EllipticCurvePublicKey":
        """Its public half."""
        return self._key().public_key()

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, as DER."""
        return self._key().sign(data)


def slot_of(key: Key) -> str:
    """The slot of the key that an execution makes: the same one after a crash, and another for each execution."""
    return digest(str(key).encode())[:12]
