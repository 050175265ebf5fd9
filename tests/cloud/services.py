"""What stands in for AWS IoT at the other end of a unit's link, twice, behind one interface: what an operator may do.

`Mosquitto` is an independent broker with models of AWS's services beside it, written from AWS's documents.
`LocalCloud` is the local cloud with the real stack in it, asked by boto3 as AWS would be. Where the two differ, it is
said here, at the method that evens it out.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from cloud.fleet import Fleet as Operator
from cloud.repository import Repository
from cloud.rollout import Ring
from firmware_agent import identity
from firmware_agent.identity import Identity
from firmware_agent.link import Refused
from tests import updates
from tests.cloud.conftest import Fleet
from tests.cloud.conftest import Unit as Joined
from tests.firmware_agent.faults import FaultProxy
from tests.firmware_agent.jobs.world import Web
from tests.firmware_agent.jobs_service import Bridge, JobsService
from tests.firmware_agent.linking import Running, permit, provision_as
from tests.firmware_agent.shadow_service import ShadowService
from tests.firmware_agent.support import BOARD, SERIAL, Broker, Unit, free_port, wait_for

_REPORT_BYTES = 5_000  # of a Device Defender metrics report: AWS IoT's quota is 5 KB


@dataclass(frozen=True)
class Seen:
    """A job's execution on the unit, as its operator sees it."""

    number: int
    status: str
    details: Mapping[str, str]
    version: int


class Service(Protocol):
    """The other end, for one unit."""

    @property
    def serial(self) -> str:
        """The unit's name there."""
        ...

    def identity(self, unit: Unit) -> Identity:
        """What the unit connects with; made and installed when it has none."""
        ...

    def create(
        self, job: str, document: Mapping[str, Any] | Callable[[], Mapping[str, Any]], *, retries: int = 0
    ) -> None:
        """A job for the unit, with so many retries when it fails."""
        ...

    def cancel(self, job: str) -> None:
        """Cancel the execution, by force."""
        ...

    def delete(self, job: str) -> None:
        """Delete the execution, by force."""
        ...

    def seen(self, job: str, number: int | None = None) -> Seen | None:
        """This execution, or the newest; None if there is none."""
        ...

    def pass_a_minute(self) -> None:
        """A minute of jobs goes by."""
        ...

    def offer_update(self, job: str, world: updates.World, version: str, files: Mapping[str, bytes]) -> None:
        """Publish a signed repository and its payloads by target path, and offer what is in it for all units."""
        ...

    def expired(self, url: str) -> str:
        """A presigned URL as it is when its time is over: the storage answers 403."""
        ...

    def desire(self, name: str, **desired: Any) -> int:
        """Write into a shadow as the owner's app does; its version after that."""
        ...

    def shadow(self, name: str) -> Mapping[str, Any]:
        """`desired` and `reported`, as far as they exist; empty without a shadow."""
        ...

    def alarms(self) -> list[dict[str, Any]]:
        """What has come, each id once."""
        ...

    def hang_up(self) -> None:
        """End the unit's connection, and let it make no other."""
        ...

    def come_back(self) -> None:
        """Take it again."""
        ...


# --- mosquitto ----------------------------------------------------------------------------------------------------


class DefenderService:
    """Device Defender's answers to metrics reports.

    https://docs.aws.amazon.com/iot-device-defender/latest/devguide/detect-device-side-metrics.html
    """

    def __init__(self) -> None:
        self.publish: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self._last = 0

    def handle(self, topic: str, payload: bytes) -> tuple[str, bytes]:
        """As AWS: the answer has no client token."""
        report = json.loads(payload)
        number = report["header"]["report_id"]
        good = report["header"]["version"] == "1.0" and isinstance(report.get("metrics"), dict)
        good = good and number > self._last and len(payload) < _REPORT_BYTES
        status = "ACCEPTED" if good else "REJECTED"
        answer = {"thingName": topic.split("/")[2], "reportId": number, "status": status, "timestamp": 1}
        if good:
            self._last = number
        else:
            answer["statusDetails"] = {"ErrorCode": "InvalidPayload", "ErrorMessage": "it is not valid"}
        return f"{topic}/{status.lower()}", json.dumps(answer).encode()


class Mosquitto:
    """An independent broker, and models of AWS's services. It hangs up by being restarted."""

    serial = SERIAL

    def __init__(self, broker: Broker, jobs: JobsService, shadows: ShadowService, proxy: FaultProxy) -> None:
        self._broker = broker
        self._jobs = jobs
        self._shadows = shadows
        self._proxy = proxy
        self._listening = [shadows.listens]
        self._opened = ExitStack()
        self._alarms: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def opened(cls, broker: Broker) -> Iterator["Mosquitto"]:
        """The broker with everything beside it."""
        permit(broker)
        broker.start()
        proxy = FaultProxy(broker.port)
        shadows = ShadowService(broker.ca, broker)
        made = cls(broker, JobsService(), shadows, proxy)
        with made._opened as opened:
            opened.callback(proxy.close)
            shadows.start()
            opened.callback(shadows.stop)
            reports = Bridge(DefenderService(), broker.ca, broker.port, ["$aws/things/+/defender/metrics/json"])
            for bridge in (Bridge(made._jobs, broker.ca, broker.port), reports):
                opened.enter_context(bridge)
                made._listening.append(bridge.listens)
            yield made

    def identity(self, unit: Unit) -> Identity:
        path = unit.settings.paths.identity
        return identity.load(path) if path.exists() else provision_as(unit, self._broker.ca, self._proxy.port, SERIAL)

    def create(
        self, job: str, document: Mapping[str, Any] | Callable[[], Mapping[str, Any]], *, retries: int = 0
    ) -> None:
        self._jobs.create(job, document, SERIAL, retries={"FAILED": retries})

    def cancel(self, job: str) -> None:
        self._jobs.cancel(job, SERIAL, force=True)

    def delete(self, job: str) -> None:
        self._jobs.delete(job, SERIAL, force=True)

    def seen(self, job: str, number: int | None = None) -> Seen | None:
        for one in reversed(self._jobs.executions):
            if one.job == job and number in {None, one.number}:
                return Seen(one.number, one.status, dict(one.details), one.version)
        return None

    def pass_a_minute(self) -> None:
        self._jobs.pass_time(1.1)

    def offer_update(self, job: str, world: updates.World, version: str, files: Mapping[str, bytes]) -> None:
        web = Web()
        self._opened.callback(web.close)
        served = self._opened.enter_context(updates.serve(world.directory))
        web.content = {f"/{path}": content for path, content in files.items()}
        signed: list[int] = []

        def document() -> dict[str, Any]:
            signed.append(len(signed))
            return {
                "picket": 1,
                "operation": "update",
                "product": "picket",
                "target": next(path for path in files if path.endswith(".tar.zst")),
                "version": version,
                "metadata": f"{served.url}/metadata/",
                "urls": {path: f"{web.url}/{path}?X-Amz-Signature={len(signed)}" for path in files},
            }

        self.create(job, document)

    def expired(self, url: str) -> str:
        return url.partition("?")[0] + "?stale"

    def desire(self, name: str, **desired: Any) -> int:
        return self._shadows.desire(SERIAL, name, **desired)

    def shadow(self, name: str) -> Mapping[str, Any]:
        halves = {"desired": self._shadows.desired(SERIAL, name), "reported": self._shadows.reported(SERIAL, name)}
        return {half: state for half, state in halves.items() if state}

    def alarms(self) -> list[dict[str, Any]]:
        """In the order of their first coming."""
        while not self._broker.seen.empty():
            seen = self._broker.seen.get()
            if seen.topic.endswith("/alarm"):
                self._alarms.setdefault(seen.payload["event_id"], seen.payload)
        return list(self._alarms.values())

    def hang_up(self) -> None:
        self._proxy.target = free_port()
        self._broker.stop()

    def come_back(self) -> None:
        """The services are back before the unit is: AWS has no broker without them."""
        self._broker.start()
        for listens in self._listening:
            assert listens.wait(20)
        self._proxy.target = self._broker.port


# --- the local cloud ----------------------------------------------------------------------------------------------


@dataclass
class LocalCloud:
    """The local cloud. It hangs up when the unit's certificate is made INACTIVE; a minute of jobs is a second."""

    fleet: Fleet
    joined: Joined
    _jobs: list[str] = field(default_factory=list)
    _uploaded: bool = False

    @classmethod
    @contextmanager
    def opened(cls, fleet: Fleet) -> Iterator["LocalCloud"]:
        """A unit of its own in the cloud that the tests share; nothing of it is left behind."""
        made = cls(fleet, fleet.admitted(board=BOARD))
        try:
            yield made
        finally:
            made._clear()

    @property
    def serial(self) -> str:
        return self.joined.serial

    def identity(self, unit: Unit) -> Identity:
        paths = unit.settings.paths
        if not paths.identity.exists():
            for directory in (paths.state, paths.run):
                directory.mkdir(parents=True)
            paths.key_file.write_text(self.joined.leaf.key)
            at = self.fleet.endpoint
            leaf = self.joined.leaf
            identity.install(paths.identity, Identity(self.serial, leaf.chain, self.fleet.trust, at.host, at.port, "1"))
        return identity.load(paths.identity)

    def create(
        self, job: str, document: Mapping[str, Any] | Callable[[], Mapping[str, Any]], *, retries: int = 0
    ) -> None:
        assert not callable(document), "what is fresh in a document is made by the cloud itself"
        config = {"criteriaList": [{"failureType": "FAILED", "numberOfRetries": retries}]} if retries else None
        with self._iot() as iot:
            iot.create_job(
                jobId=self._name(job),
                targets=[f"arn:aws:iot:us-east-1:000000000000:thing/{self.serial}"],
                document=json.dumps(document),
                presignedUrlConfig={"roleArn": self.fleet.outputs["DownloadRole"], "expiresInSec": 3600},
                **({"jobExecutionsRetryConfig": config} if config else {}),
            )
        self._jobs.append(job)

    def cancel(self, job: str) -> None:
        with self._iot() as iot:
            iot.cancel_job_execution(jobId=self._name(job), thingName=self.serial, force=True)

    def delete(self, job: str) -> None:
        found = self.seen(job)
        assert found is not None
        with self._iot() as iot:
            iot.delete_job_execution(
                jobId=self._name(job), thingName=self.serial, executionNumber=found.number, force=True
            )

    def seen(self, job: str, number: int | None = None) -> Seen | None:
        which = {} if number is None else {"executionNumber": number}
        with self._iot() as iot:
            try:
                found = iot.describe_job_execution(jobId=self._name(job), thingName=self.serial, **which)["execution"]
            except iot.exceptions.ResourceNotFoundException:
                return None
        details = found.get("statusDetails", {}).get("detailsMap", {})
        return Seen(found["executionNumber"], found["status"], details, found["versionNumber"])

    def pass_a_minute(self) -> None:
        """Time goes by itself, and fast."""

    def offer_update(self, job: str, world: updates.World, version: str, files: Mapping[str, bytes]) -> None:
        """By the fleet operator's own command."""
        operator, repository = Operator(self.fleet.target), Repository(world.directory)
        self._uploaded = True
        operator.upload(repository)
        self.create(job, operator.document(operator.release(repository, Ring.MAIN, version)))

    def expired(self, url: str) -> str:
        return re.sub(r"(X-Amz-Signature=)\w+", rf"\g<1>{'0' * 64}", url)

    def desire(self, name: str, **desired: Any) -> int:
        body = json.dumps({"state": {"desired": desired}}).encode()
        with self._data() as data:
            answer = data.update_thing_shadow(thingName=self.serial, shadowName=name, payload=body)
            return int(json.loads(answer["payload"].read())["version"])

    def shadow(self, name: str) -> Mapping[str, Any]:
        with self._data() as data:
            try:
                answer = data.get_thing_shadow(thingName=self.serial, shadowName=name)
            except data.exceptions.ResourceNotFoundException:
                return {}
            state: dict[str, Any] = json.loads(answer["payload"].read())["state"]
            return {half: state[half] for half in ("desired", "reported") if half in state}

    def alarms(self) -> list[dict[str, Any]]:
        """In the order of their moments: its function is called for each by itself, and may be called out of turn."""
        rows = self.fleet.rows(self.serial, "EVENT#")
        return [{**row, "sequence": int(row["sequence"])} for row in rows]

    def hang_up(self) -> None:
        self._set_certificate("INACTIVE")

    def come_back(self) -> None:
        self._set_certificate("ACTIVE")

    def _set_certificate(self, status: Any) -> None:
        with self._iot() as iot:
            iot.update_certificate(certificateId=self.joined.leaf.certificate_id, newStatus=status)

    def _clear(self) -> None:
        with self._iot() as iot:
            for job in self._jobs:
                iot.delete_job(jobId=self._name(job), force=True)
        if self._uploaded:
            for bucket in (self.fleet.outputs[name] for name in ("Metadata", "Releases")):
                for entry in self.fleet.target.s3.list_objects_v2(Bucket=bucket).get("Contents", []):
                    self.fleet.target.s3.delete_object(Bucket=bucket, Key=entry["Key"])

    def _name(self, job: str) -> str:
        """Job names are an account's, not a unit's."""
        return f"{self.serial}-{job}"

    @contextmanager
    def _iot(self) -> Iterator[Any]:
        with contextlib.closing(self.fleet.target.iot) as iot:
            yield iot

    @contextmanager
    def _data(self) -> Iterator[Any]:
        target = self.fleet.target
        with contextlib.closing(target.session.client("iot-data", endpoint_url=target.endpoint_url)) as data:
            yield data


# --- the unit -----------------------------------------------------------------------------------------------------


@contextmanager
def online(service: Service, unit: Unit) -> Iterator[Running]:
    """One process of the unit on its link, connected."""
    with Running.on(unit, service.identity(unit)) as running:
        running.wait_connected()
        yield running


class Tap:
    """Hears what a link asks and what is refused, and may do something just before it asks."""

    def __init__(self, running: Running) -> None:
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.before: Callable[[str, Mapping[str, Any]], None] = lambda _topic, _body: None
        self._ask = running.link.ask
        running.link.ask = self._heard  # type: ignore[method-assign]

    def _heard(self, topic: str, body: Mapping[str, Any], **options: Any) -> Any:
        self.asked.append(topic)
        self.before(topic, body)
        try:
            return self._ask(topic, body, **options)
        except Refused as refused:
            self.refused.append(refused.code)
            raise


def away(running: Running) -> None:
    """Until the unit has noticed that it was hung up on."""
    wait_for(lambda: not running.link.connected())
