"""The fleet, as its operator acts on it: rings, releases and jobs. What is decided is in `rollout`, pure.

Everything goes through AWS IoT Jobs, so that AWS keeps rates, retries, windows and aborts while nobody watches. A
rollout is a CONTINUOUS job over a ring: a unit that joins the ring later gets the ring's release too. A ring has one
update job of each kind (agent, os) at work at a time; a newer one cancels the older of its kind.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import botocore.exceptions

from cloud import rollout, stack
from cloud.errors import NoSuchName, NotYet
from cloud.registry import Device, Registry
from cloud.rollout import FAILURES, Execution, Job, Kind, Operation, Plan, Ring, Status, Summary
from cloud.target import Target, translated

if TYPE_CHECKING:
    from cloud.repository import Published, Release, Repository

#: What units call themselves; a document for another product is refused by them.
PRODUCT: Final = "picket"

#: The document's form, and how long a presigned URL in it is good for (AWS allows an hour at most).
FORMAT: Final = 1
URL_SECONDS: Final = 3600

#: As many executions as one look asks the details of; a rollout with more failures than this has been stopped.
DETAILS: Final = 500


@dataclass(frozen=True)
class Started:
    """A job at work. `found` says that it was at work already; `replaced` are the jobs that it put an end to."""

    job: str
    found: bool
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Uploaded:
    """What came to the buckets, and what was there already."""

    new: tuple[str, ...]
    kept: int


@dataclass(frozen=True)
class Progress:
    """An update job and how far it is. `version` is the release's, with `image` before it if it is an image's."""

    job: str
    version: str
    status: str
    comment: str
    created_at: datetime
    summary: Summary


@dataclass(frozen=True)
class RingStatus:
    """A ring: its units, what they run, and its newest update jobs, one of each kind (and any older still at work).

    `versions` counts units by their agent's version, `images` by their image's.
    """

    ring: Ring
    units: tuple[str, ...]
    versions: Mapping[str, int]
    images: Mapping[str, int]
    updates: tuple[Progress, ...]


@dataclass(frozen=True)
class Unit:
    """A unit in the fleet. `version` and what follows are None until it said hello."""

    serial: str
    ring: Ring
    version: str | None
    image: str | None
    mode: str | None
    last_seen: datetime | None

    def runs(self, kind: Kind) -> str | None:
        """The version of its agent or of its image."""
        return self.image and _version(self.image) if kind is Kind.OS else self.version


class Fleet:
    """The fleet of one product behind a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._registry = Registry(target)
        self._iot = target.iot
        self._s3 = target.s3
        self._details: dict[tuple[str, str, int, datetime], Mapping[str, str]] = {}
        self._versions: dict[str, str] = {}

    @cached_property
    def _names(self) -> Mapping[str, str]:
        return stack.outputs(self.target)

    # -- rings

    def group(self, ring: Ring) -> str:
        """The thing group of a ring."""
        return f"{self.target.stack}-{ring}"

    def members(self, ring: Ring) -> tuple[str, ...]:
        """The serials of a ring's units, sorted."""
        pages = self._iot.get_paginator("list_things_in_thing_group")
        with translated(self.target, f"listing the {ring} ring"):
            found = [
                thing for page in pages.paginate(thingGroupName=self.group(ring)) for thing in page.get("things", [])
            ]
        return tuple(sorted(found))

    def move(self, ring: Ring, serials: Sequence[str]) -> None:
        """Put units into a ring, and take them out of the other one. Safe to repeat.

        Raises:
            NoSuchName: one of them is unknown; none has moved.
        """
        if unknown := [serial for serial in serials if self._registry.thing(serial) is None]:
            raise NoSuchName(_nobody(", ".join(unknown)))
        for serial in serials:
            with translated(self.target, f"moving {serial} to the {ring} ring"):
                for other in Ring:
                    if other is not ring:
                        self._iot.remove_thing_from_thing_group(thingName=serial, thingGroupName=self.group(other))
                self._iot.add_thing_to_thing_group(thingName=serial, thingGroupName=self.group(ring))

    def units(self, rings: Iterable[Ring] = Ring) -> list[Unit]:
        """Every unit of these rings, with what it said last."""
        found = []
        for ring in rings:
            members = self.members(ring)
            said = self._registry.devices(members)
            found += [_unit(serial, ring, said.get(serial)) for serial in members]
        return sorted(found, key=lambda unit: unit.serial)

    # -- releases

    def upload(self, repository: "Repository") -> Uploaded:
        """Copy the update repository to where units fetch it, what is referred to before what refers to it.

        A copy that ends early leaves units with what they had; the next one completes it.

        Raises:
            NotYet: the bucket has newer metadata than the repository, or other bytes under an immutable name.
            RepositoryFault: nothing is published yet.
        """
        files = repository.files_to_publish()
        with translated(self.target, "uploading the update repository"):
            theirs = self._published_timestamp()
            ours = json.loads(files[-1].file.read_bytes())["signed"]["version"]
            if theirs is not None and theirs > ours:
                raise NotYet(
                    f"the bucket has timestamp {theirs}, newer than the repository's {ours}: somebody published from"
                    f" another copy of {repository.directory}; fetch that copy, or units will refuse what you upload"
                )
            new = [file.name for file in files if self._put(file)]
        return Uploaded(tuple(new), len(files) - len(new))

    def _bucket(self, name: str) -> str:
        return self._names["Metadata" if name.startswith("metadata/") else "Releases"]

    def _published_timestamp(self) -> int | None:
        """The version of the metadata in the bucket, None where there is none."""
        try:
            body = self._s3.get_object(Bucket=self._names["Metadata"], Key="metadata/timestamp.json")["Body"].read()
        except self._s3.exceptions.NoSuchKey:
            return None
        version: int = json.loads(body)["signed"]["version"]
        return version

    def _put(self, file: "Published") -> bool:
        """Upload a file unless it is there; whether it was new."""
        bucket, (content, encoding) = self._bucket(file.name), file.body()
        digest = hashlib.sha256(file.file.read_bytes()).hexdigest()
        there = self._digest(bucket, file.name)
        if there == digest:
            return False
        if there is not None and file.immutable:
            raise NotYet(
                f"s3://{bucket}/{file.name} has other bytes than {file.file}, and units may have taken them:"
                " publish under a new version instead"
            )
        packed: dict[str, Any] = {"ContentEncoding": encoding} if encoding else {}
        self._s3.put_object(
            Bucket=bucket,
            Key=file.name,
            Body=content,
            Metadata={"sha256": digest},
            CacheControl="public, max-age=31536000, immutable" if file.immutable else "no-cache",
            **packed,
        )
        return True

    def _digest(self, bucket: str, key: str) -> str | None:
        try:
            head = self._s3.head_object(Bucket=bucket, Key=key)
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return head.get("Metadata", {}).get("sha256", "unknown")

    def release(self, repository: "Repository", ring: Ring, version: str, kind: Kind = Kind.AGENT) -> "Release":
        """The release as the ring lists it, if units can get it.

        Raises:
            NotYet: the ring does not list it, or the listing is not in the bucket.
        """
        found = next((each for each in repository.releases(ring, kind) if each.version == version), None)
        if found is None:
            raise NotYet(_unlisted(repository, ring, version, kind))
        timestamp = repository.in_force("timestamp")
        with translated(self.target, "looking at the bucket"):
            published = self._published_timestamp()
        if timestamp is None or published != timestamp.signed.version:
            raise NotYet(
                f"the bucket has not the repository's newest metadata ({published or 'none'}):"
                " run `python -m cloud fleet release` first"
            )
        return found

    # -- updates

    def soak(
        self, repository: "Repository", version: str, wanted: timedelta, now: datetime, kind: Kind = Kind.AGENT
    ) -> rollout.Soak:
        """Whether the canaries have run exactly these bits for long enough."""
        release = next((each for each in repository.releases(Ring.MAIN, kind) if each.version == version), None)
        if release is None:
            raise NotYet(_unlisted(repository, Ring.MAIN, version, kind))
        stem = rollout.update_stem(self.target.stack, Ring.CANARY, version, release.tar_sha256, kind)
        members = self.members(Ring.CANARY)
        said = self._registry.devices(members)
        running = {serial: _runs(said[serial], kind) if serial in said else "" for serial in members}
        jobs = sorted((job for job in self.jobs(f"{stem}-")), key=lambda job: job.created_at)
        executions = self.executions(jobs[-1].name) if jobs else []
        return rollout.soaked(version, executions, running, wanted=wanted, now=now)

    def lowest(self, repository: "Repository", ring: Ring, kind: Kind = Kind.AGENT) -> int:
        """The security version that the ring's units do not go below."""
        versions = {each.version: each.security_version for each in repository.releases(ring, kind)}
        devices = self._registry.devices(self.members(ring)).values()
        return rollout.floor(versions, (_runs(device, kind) for device in devices))

    def start_update(self, ring: Ring, release: "Release", plan: Plan, now: datetime) -> Started:
        """Bring a release to a ring. Safe to repeat: the job that does it already is found.

        Other update jobs of the ring and of this kind are cancelled, except where a unit is at work on one.
        """
        kind = Kind(release.kind)
        stem = rollout.update_stem(self.target.stack, ring, release.version, release.tar_sha256, kind)
        jobs = self.jobs(rollout.update_prefix(self.target.stack, ring, kind))
        name, found = rollout.choose(stem, jobs)
        if found is None:
            self._create(name, [self._names[f"{ring.capitalize()}Ring"]], self.document(release), plan.options(now))
        older = tuple(job.name for job in jobs if job.active and job.name != name)
        for job in older:
            self.cancel(job, comment=f"replaced by {name}")
        return Started(name, found is not None, older)

    def document(self, release: "Release") -> dict[str, Any]:
        """What the units read: hints only, for the signed metadata decide."""
        return {
            "picket": FORMAT,
            "operation": "os-update" if release.kind == Kind.OS else "update",
            "product": release.product,
            "target": release.path,
            "version": release.version,
            "metadata": f"{self._s3_url}/{self._names['Metadata']}/metadata/",
            "urls": {
                path: f"${{aws:iot:s3-presigned-url-v2:{self._s3_url}/{self._names['Releases']}/{quote(stored)}}}"
                for path, stored in release.files.items()
            },
        }

    @property
    def _s3_url(self) -> str:
        suffix = "amazonaws.com.cn" if self.target.region.startswith("cn-") else "amazonaws.com"
        return f"https://s3.{self.target.region}.{suffix}"

    def _create(
        self, name: str, targets: Sequence[str], document: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        upload = document["operation"] == "collect-logs"
        with translated(self.target, f"creating the job {name}"):
            self._iot.create_job(
                jobId=name,
                targets=list(targets),
                document=json.dumps(document),
                presignedUrlConfig={
                    "roleArn": self._names["UploadRole" if upload else "DownloadRole"],
                    "expiresInSec": URL_SECONDS,
                },
                tags=[{"Key": "product", "Value": PRODUCT}],
                **{"targetSelection": "CONTINUOUS" if "urls" in document else "SNAPSHOT", **options},
            )

    # -- other jobs

    def start_operation(
        self,
        operation: Operation,
        where: Ring | str,
        plan: Plan,
        now: datetime,
        tuning: Mapping[str, Any] | None = None,
    ) -> Started:
        """Ask something of a unit, or of a ring as it is now. Safe to repeat while it is at work.

        Raises:
            NoSuchName: no unit has that serial.
            ValueError: the plan is outside what AWS takes.
        """
        document: dict[str, Any] = {"picket": FORMAT, "operation": operation, "product": PRODUCT}
        if operation is Operation.COLLECT_LOGS:
            key = "logs/${thingName}/${jobId}-${executionNumber}.txt.gz"
            document["upload"] = f"${{aws:iot:s3-presigned-url-upload:{self._s3_url}/{self._names['Releases']}/{key}}}"
        if tuning is not None:
            document["tuning"] = dict(tuning)
        target = self._names[f"{where.capitalize()}Ring"] if isinstance(where, Ring) else self._thing_arn(where)
        stem = rollout.operation_stem(self.target.stack, operation, str(where), document)
        name, found = rollout.choose(stem, self.jobs(f"{stem}-"))
        if found is None:
            self._create(name, [target], document, plan.options(now))
        return Started(name, found is not None)

    def _thing_arn(self, serial: str) -> str:
        with translated(self.target, f"asking for {serial}"):
            try:
                return self._iot.describe_thing(thingName=serial)["thingArn"]
            except self._iot.exceptions.ResourceNotFoundException as error:
                raise NoSuchName(_nobody(serial)) from error

    def logs(self, serial: str, into: Path) -> list[Path]:
        """Fetch what a unit has uploaded for collect-logs jobs; what is there already stays.

        Raises:
            NoSuchName: nothing is there, and no unit has that serial.
        """
        bucket, found = self._names["Releases"], []
        into.mkdir(parents=True, exist_ok=True)
        with translated(self.target, f"fetching the logs of {serial}"):
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"logs/{serial}/"):
                for entry in page.get("Contents", []):
                    path = into / Path(entry["Key"]).name  # nothing of the key but its last part becomes a path
                    if not path.exists():
                        path.write_bytes(self._s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read())
                    found.append(path)
        if not found and self._registry.thing(serial) is None:
            raise NoSuchName(_nobody(serial))
        return found

    # -- jobs in general

    def jobs(self, prefix: str) -> list[Job]:
        """Our jobs whose name begins with `prefix`, the newest first."""
        with translated(self.target, "listing jobs"):
            found = [
                Job(job["jobId"], job["status"], job["createdAt"])
                for page in self._iot.get_paginator("list_jobs").paginate()
                for job in page.get("jobs", [])
                if job["jobId"].startswith(prefix)
            ]
        return sorted(found, key=lambda job: job.created_at, reverse=True)

    def active_updates(self, ring: Ring) -> list[Job]:
        """The update jobs of a ring that are at work, of whatever kind."""
        return [
            job
            for kind in Kind
            for job in self.jobs(rollout.update_prefix(self.target.stack, ring, kind))
            if job.active
        ]

    def cancel(self, job: str, *, force: bool = False, comment: str = "stopped by the operator") -> None:
        """Stop a job: units that were not told of it, or have not begun, never will; by `force` no unit goes on.

        By force AWS forgets what units at work do; they see it at their next report and stop where they can.
        """
        with translated(self.target, f"cancelling the job {job}"):
            try:
                self._iot.cancel_job(jobId=job, force=force, comment=comment, reasonCode="PICKET")
            except self._iot.exceptions.ResourceNotFoundException as error:
                raise NoSuchName(f"no job is called {job}: see `python -m cloud fleet status`") from error

    def executions(self, job: str) -> list[Execution]:
        """All attempts of all units at a job; those that failed with the unit's own words."""
        found = []
        details = 0
        with translated(self.target, f"listing the executions of {job}"):
            for page in self._iot.get_paginator("list_job_executions_for_job").paginate(jobId=job):
                for entry in page.get("executionSummaries", []):
                    thing = entry["thingArn"].rpartition("thing/")[2]
                    brief = entry["jobExecutionSummary"]
                    number, status = brief.get("executionNumber", 1), Status(brief["status"])
                    updated = brief["lastUpdatedAt"].astimezone(UTC)
                    said: Mapping[str, str] = {}
                    if status in FAILURES and details < DETAILS:
                        said = self._said(job, thing, number, updated)
                        details += 1
                    found.append(Execution(thing, number, status, updated, said))
        return found

    def _said(self, job: str, thing: str, number: int, updated: datetime) -> Mapping[str, str]:
        key = (job, thing, number, updated)
        if key not in self._details:
            answer = self._iot.describe_job_execution(jobId=job, thingName=thing, executionNumber=number)
            self._details[key] = dict(answer["execution"].get("statusDetails", {}).get("detailsMap", {}))
        return self._details[key]

    def progress(self, job: str, members: Iterable[str] = ()) -> Progress:
        """How far a job is. `members` are whom it is for; while it is at work they wait until they are told.

        Raises:
            NoSuchName: there is no such job.
        """
        with translated(self.target, f"asking for the job {job}"):
            try:
                found: Any = self._iot.describe_job(jobId=job)["job"]
            except self._iot.exceptions.ResourceNotFoundException as error:
                raise NoSuchName(f"no job is called {job}: see `python -m cloud fleet status`") from error
            if job not in self._versions:
                document = json.loads(self._iot.get_job_document(jobId=job)["document"])
                word = "image " if document["operation"] == "os-update" else ""
                self._versions[job] = f"{word}{document.get('version') or document['operation']}"
        waiting = members if found["status"] in rollout.ACTIVE else ()
        return Progress(
            job=job,
            version=self._versions[job],
            status=found["status"],
            comment=found.get("comment", ""),
            created_at=found["createdAt"].astimezone(UTC),
            summary=rollout.summarise(self.executions(job), waiting),
        )

    def status(self, rings: Iterable[Ring] = Ring) -> list[RingStatus]:
        """Each ring's units, what they run, and its update jobs: the newest of each kind, and any still at work."""
        found = []
        for ring in rings:
            members = self.members(ring)
            shown = []
            for kind in Kind:
                jobs = self.jobs(rollout.update_prefix(self.target.stack, ring, kind))
                shown += [job for index, job in enumerate(jobs) if index == 0 or job.active]
            devices = self._registry.devices(members).values()
            versions = Counter(device.agent for device in devices)
            versions[""] += len(members) - versions.total()
            found.append(
                RingStatus(
                    ring,
                    members,
                    {version: count for version, count in sorted(versions.items()) if count},
                    dict(sorted(Counter(_runs(device, Kind.OS) for device in devices).items())),
                    tuple(self.progress(job.name, members) for job in shown),
                )
            )
        return found


def _unit(serial: str, ring: Ring, device: Device | None) -> Unit:
    if device is None:
        return Unit(serial, ring, None, None, None, None)
    return Unit(serial, ring, device.agent, device.image, device.mode, device.last_seen)


def _runs(device: Device, kind: Kind) -> str:
    """The version of its agent or of its image."""
    return _version(device.image) if kind is Kind.OS else device.agent


def _version(image: str) -> str:
    """`0.2.0` of `picket 0.2.0`."""
    return image.rpartition(" ")[2]


def _nobody(serials: str) -> str:
    return f"no unit is called {serials}: see `python -m cloud fleet units`"


def _unlisted(repository: "Repository", ring: Ring, version: str, kind: Kind) -> str:
    others = ", ".join(each.version for each in repository.releases(ring, kind)) or "none"
    what, made, option = ("image", "make image", " --os") if kind is Kind.OS else ("release", "make release", "")
    if ring is Ring.CANARY:
        return (
            f"the {what} {version} is not signed for the canaries (these are: {others}):"
            f" `{made}`, then `python -m cloud fleet release {version}{option}`"
        )
    return (
        f"the {what} {version} is not signed for all units (these are: {others}):"
        f" `python -m cloud fleet promote {version}{option}`,"
        " then two holders `python -m cloud keys sign`, then `python -m cloud fleet release`"
    )
