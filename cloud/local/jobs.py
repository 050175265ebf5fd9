"""What ministack lacks of AWS IoT Jobs and Device Defender: retries, step timers, windows, uploads, replies.

ministack keeps the jobs, rolls them out, aborts them and speaks to devices. Added here, as AWS documents it:

- an execution that FAILED or TIMED_OUT is tried again as often as `jobExecutionsRetryConfig` says, under the next
  execution number; an abort or a cancel comes before a retry;
- the step timer of an update or a start, which ends at the in-progress timer at the latest; timers end by themselves,
  not only when somebody looks;
- an execution in progress is `$next` before any that is queued;
- nothing is rolled out before a job's start time or outside its maintenance windows; each batch is announced;
- `${aws:iot:s3-presigned-url-upload:…}` in a job document, with ${thingName}, ${jobId}, ${executionNumber} in its key;
- `https://s3.<region>.amazonaws.com/` in a job document is this machine, at the address where the device finds it;
- Device Defender answers a report with `accepted` or `rejected`.

Documents: https://docs.aws.amazon.com/iot/latest/developerguide/jobs-configurations-details.html,
https://docs.aws.amazon.com/iot/latest/developerguide/create-manage-jobs.html,
https://docs.aws.amazon.com/iot/latest/developerguide/detect-device-side-metrics.html.
"""

import contextvars
import functools
import importlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from cloud.local.endpoint import ACCOUNT, DEVICE_ADDRESS, DEVICE_DOMAIN, REGION
from cloud.local.schedule import may_roll_out

#: Every name of ministack that this file replaces or calls, with the signature that it was written against.
WRAPPED: Mapping[str, Mapping[str, str]] = {
    "ministack.services.iot": {
        "_jobs_now_ms": "() -> int",
        "_jobs_seconds_before_timeout": "(execution: dict) -> int | None",
        "_jobs_apply_timeout": "(execution: dict) -> dict",
        "_jobs_timeout_minutes": "(execution: dict, job: dict | None) -> int | None",
        "_jobs_maybe_complete": "(job_id: str) -> None",
        "_jobs_abort": "(job_id: str) -> dict",
        "_jobs_queue_execution": "(thing: str, job_id: str, now: int) -> None",
        "_jobs_rollout_batch_size": "(job: dict, waiting: int) -> int",
        "_jobs_rollout_release": "(job: dict) -> list[tuple[str, str | None]]",
        "_jobs_materialize_executions": "(job_id: str) -> None",
        "_jobs_presign_session": "(role_arn: str, expires: int) -> tuple[str, dict]",
        "_jobs_presigned_document": "(job: dict) -> str",
        "_iot_role_usable": "(role_arn: str) -> bool",
        "_job_document_s3_location": "(source: str) -> tuple[str, str]",
        "_job_execution_event": (
            "(execution: dict, status: str | None = None, force_canceled: bool | None = None) -> None"
        ),
        "_jobs_rejected": "(code: str, message: str, client_token=None, execution_state: dict | None = None) -> dict",
        "_handle_jobs_publish": (
            "(account_id: str, region: str, thing: str, verb: str, job_id: str | None, payload: bytes) -> None"
        ),
        "jobs_first_pending_job_id": "(thing_name: str) -> str | None",
        "jobs_pending_for_thing": "(thing_name: str) -> list[dict]",
        "jobs_start_next_execution": (
            "(thing_name: str, *, status_details: dict | None = None, peek: bool = False) -> dict | None"
        ),
        "jobs_describe_execution": "(thing_name: str, job_id: str) -> dict | None",
        "jobs_update_execution": (
            "(thing_name: str, job_id: str, *, status, expected_version=None, status_details: dict | None = None,"
            " step_timeout_minutes=None, execution_number=None) -> tuple"
        ),
        "jobs_notify_thing": "(account_id: str, region: str, thing_name: str, prev_next_job_id: str | None) -> None",
        "broker_publish": (
            "(account_id: str, region: str, topic: str, payload: bytes, qos: int = 0, retain: bool = False,"
            " properties: bytes = b'', client_id: str | None = None, principal: str | None = None) -> None"
        ),
        "publishing_events": "()",
    },
}

#: Numbers that the API allows. https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_UpdateJobExecution.html
STEP_MINUTES = range(1, 10_081)

_FAILURES = {"FAILED": {"FAILED"}, "TIMED_OUT": {"TIMED_OUT"}, "ALL": {"FAILED", "TIMED_OUT"}}
_UPLOAD = re.compile(r"\$\{aws:iot:s3-presigned-url-upload:(?P<url>(?:[^{}]|\$\{[a-zA-Z]+\})*)\}")
_REPORT = re.compile(r"\$aws/things/(?P<thing>[^/]+)/defender/metrics/(?P<form>json)")


# -- what AWS does, as pure functions


def deadline(execution: Mapping[str, Any], in_progress_minutes: int | None, minute_ms: float) -> float | None:
    """When an execution in progress times out, in milliseconds of Unix time; None when it has no timer.

    The step timer counts from the update that set it and never reaches beyond the in-progress timer.
    """
    started = execution.get("startedAt")
    if started is None:
        started = execution.get("lastUpdatedAt")
    ends = []
    if in_progress_minutes and started is not None:
        ends.append(started + in_progress_minutes * minute_ms)
    step = execution.get("stepTimeoutInMinutes")
    if step is not None and step > 0:
        ends.append(execution["timeoutStartedAt"] + step * minute_ms)
    return min(ends, default=None)


def retry_due(execution: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    """Whether this finished execution is to be tried again."""
    config = job.get("jobExecutionsRetryConfig") or {}
    before = [each["status"] for each in execution.get("history", [])]
    for criterion in config.get("criteriaList") or []:
        counted = _FAILURES.get(str(criterion.get("failureType")), set())
        if execution["status"] in counted:
            used = sum(status in counted for status in before)
            if used < int(criterion.get("numberOfRetries") or 0):
                return True
    return False


def judge_report(payload: bytes) -> tuple[int | None, str | None]:
    """A Device Defender report's id, and why it is refused (AWS's error code), None when it is accepted."""
    try:
        report = json.loads(payload)
    except ValueError:
        return None, "MalformedReport"
    if not isinstance(report, dict):
        return None, "MalformedReport"
    header = report.get("header", report.get("hed"))
    metrics = report.get("metrics", report.get("met"))
    if not isinstance(header, dict):
        return None, "InvalidPayload"
    number = header.get("report_id", header.get("rid"))
    version = header.get("version", header.get("v"))
    if type(number) is not int:
        return None, "InvalidPayload"
    custom = report.get("custom_metrics", report.get("cmet"))
    good = version == "1.0" and (isinstance(metrics, dict) or isinstance(custom, dict))
    return number, None if good else "InvalidPayload"


# -- the amendments


@dataclass(frozen=True)
class _Request:
    """What a device asks at this moment, and for which of its executions."""

    thing: str = ""
    number: int = 1
    step_minutes: int | None = None


_NOBODY = _Request()
_request: contextvars.ContextVar[_Request] = contextvars.ContextVar("_picket_jobs_request", default=_NOBODY)

#: Things whose pending executions changed outside any request; the next sweep tells them.
_to_notify: set[str] = set()


def _iot() -> Any:
    return importlib.import_module("ministack.services.iot")


def install(minute_seconds: float) -> None:
    """Put every amendment of this file in place.

    Args:
        minute_seconds: how long AWS's minute is here: rollout rates and timers are told in minutes.
    """
    iot = _iot()
    iot._JOB_ROLLOUT_INTERVAL_MS = int(minute_seconds * 1000)  # noqa: SLF001
    in_progress_first(iot)
    end_timers(iot, minute_seconds * 1000)
    take_step_timers(iot)
    keep_jobs_open_for_retries(iot)
    roll_out_in_windows(iot)
    announce_each_batch(iot)
    presign_uploads(iot)
    answer_metrics(iot)


def in_progress_first(iot: Any) -> None:
    """`$next` and start-next hand out what is in progress before what is queued."""
    pending = iot.jobs_pending_for_thing

    @functools.wraps(pending)
    def ordered(thing_name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = pending(thing_name)
        return sorted(found, key=lambda execution: execution["status"] != "IN_PROGRESS")

    iot.jobs_pending_for_thing = ordered


def end_timers(iot: Any, minute_ms: float) -> None:
    """The step timer and the in-progress timer run beside each other; whichever ends first ends the execution."""
    minutes_of = iot._jobs_timeout_minutes  # noqa: SLF001

    def ends(execution: dict[str, Any]) -> float | None:
        if execution.get("status") != "IN_PROGRESS":
            return None
        stepless = {**execution, "stepTimeoutInMinutes": None}
        return deadline(execution, minutes_of(stepless, iot._jobs.get(execution["jobId"])), minute_ms)  # noqa: SLF001

    def seconds_left(execution: dict[str, Any]) -> int | None:
        end = ends(execution)
        return None if end is None else max(0, int((end - iot._jobs_now_ms()) / 1000))  # noqa: SLF001

    def apply(execution: dict[str, Any]) -> dict[str, Any]:
        end = ends(execution)
        if end is None or iot._jobs_now_ms() <= end:  # noqa: SLF001
            return execution
        execution.update(
            status="TIMED_OUT",
            lastUpdatedAt=iot._jobs_now_ms(),  # noqa: SLF001
            versionNumber=execution["versionNumber"] + 1,
        )
        iot._job_execution_event(execution)  # noqa: SLF001
        _to_notify.add(execution["thingName"])
        iot._jobs_maybe_complete(execution["jobId"])  # noqa: SLF001
        _to_notify.update(iot._jobs_abort(execution["jobId"]))  # noqa: SLF001
        return execution

    iot._jobs_seconds_before_timeout = seconds_left  # noqa: SLF001
    iot._jobs_apply_timeout = apply  # noqa: SLF001


def _set_step(iot: Any, thing: str, job_id: str, step: int | None) -> None:
    """Start the step timer anew, or take it away where `step` is -1."""
    record = iot._job_executions.get((thing, job_id))  # noqa: SLF001
    if record is None or step is None or record["status"] != "IN_PROGRESS":
        return
    record.update(stepTimeoutInMinutes=None if step == -1 else step, timeoutStartedAt=iot._jobs_now_ms())  # noqa: SLF001


def take_step_timers(iot: Any) -> None:
    """A step timer can be set by an update and by a start, over MQTT too; and who asks is noted."""
    handle = iot._handle_jobs_publish  # noqa: SLF001
    start, update = iot.jobs_start_next_execution, iot.jobs_update_execution

    async def handle_with_step(
        account_id: str, region: str, thing: str, verb: str, job_id: str | None, payload: bytes
    ) -> None:
        request = _parsed(payload)
        step = request.get("stepTimeoutInMinutes")
        if step is not None and not (type(step) is int and (step == -1 or step in STEP_MINUTES)):
            topic = "/".join(("$aws/things", thing, "jobs", *([job_id] if job_id else []), verb, "rejected"))
            refusal = iot._jobs_rejected(  # noqa: SLF001
                "InvalidRequest", "stepTimeoutInMinutes must be -1 or 1 to 10080", request.get("clientToken")
            )
            await iot.broker_publish(account_id, region, topic, json.dumps(refusal).encode(), qos=1)
            return
        token = _request.set(_Request(thing, step_minutes=step))
        try:
            await handle(account_id, region, thing, verb, job_id, payload)
        finally:
            _request.reset(token)

    @functools.wraps(start)
    def start_with_step(
        thing_name: str, *, status_details: dict[str, Any] | None = None, peek: bool = False
    ) -> dict[str, Any] | None:
        found: dict[str, Any] | None = start(thing_name, status_details=status_details, peek=peek)
        if found is None:
            return None
        asked = _request.get()
        if not peek:
            _set_step(iot, thing_name, found["jobId"], asked.step_minutes)
            found = dict(iot._job_executions[(thing_name, found["jobId"])])  # noqa: SLF001
        _request.set(_Request(thing_name, found["executionNumber"], asked.step_minutes))
        return found

    @functools.wraps(update)
    def update_with_step(thing_name: str, job_id: str, **options: Any) -> tuple[Any, ...]:
        step = options.pop("step_timeout_minutes", None) or _request.get().step_minutes
        answer: tuple[Any, ...] = update(thing_name, job_id, **options)
        if answer[0] is not None:
            _set_step(iot, thing_name, job_id, step)
            _request.set(_Request(thing_name, answer[0]["executionNumber"], step))
        return answer

    iot._handle_jobs_publish = handle_with_step  # noqa: SLF001
    iot.jobs_start_next_execution = start_with_step
    iot.jobs_update_execution = update_with_step


def _parsed(payload: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(payload)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def keep_jobs_open_for_retries(iot: Any) -> None:
    """A job is not complete while an execution of it is to be tried again. `sweep` tries it."""
    complete = iot._jobs_maybe_complete  # noqa: SLF001

    @functools.wraps(complete)
    def unless_retried(job_id: str) -> None:
        job = iot._jobs.get(job_id)  # noqa: SLF001
        if job and job["status"] == "IN_PROGRESS":
            executions = [each for each in iot._job_executions.values() if each["jobId"] == job_id]  # noqa: SLF001
            if any(retry_due(each, job) for each in executions):
                return
        complete(job_id)

    iot._jobs_maybe_complete = unless_retried  # noqa: SLF001


def roll_out_in_windows(iot: Any) -> None:
    """Outside its schedule a job's batches are empty."""
    size = iot._jobs_rollout_batch_size  # noqa: SLF001

    @functools.wraps(size)
    def scheduled(job: dict[str, Any], waiting: int) -> int:
        return size(job, waiting) if may_roll_out(job.get("schedulingConfig"), datetime.now(UTC)) else 0

    iot._jobs_rollout_batch_size = scheduled  # noqa: SLF001


def announce_each_batch(iot: Any) -> None:
    """Every unit of a CONTINUOUS job's later batches is told of it.

    ministack takes a batch out of the queue before it looks what was first for each thing. The look itself then makes
    the execution, so that the job seems to have been first all along and is not announced, and is queued twice.
    """
    release = iot._jobs_rollout_release  # noqa: SLF001

    @functools.wraps(release)
    def announced(job: dict[str, Any]) -> list[tuple[str, str | None]]:
        if job.get("targetSelection") != "CONTINUOUS":
            found: list[tuple[str, str | None]] = release(job)
            return found
        waiting: list[str] = job["rolloutQueue"]
        size = iot._jobs_rollout_batch_size(job, len(waiting))  # noqa: SLF001
        fronts = [(thing, iot.jobs_first_pending_job_id(thing)) for thing in waiting[:size]]
        job.update(rolloutQueue=waiting[size:], rolloutBatchAt=iot._jobs_now_ms())  # noqa: SLF001
        iot._jobs_materialize_executions(job["jobId"])  # noqa: SLF001
        return [each for each in fronts if (each[0], job["jobId"]) in iot._job_executions]  # noqa: SLF001

    iot._jobs_rollout_release = announced  # noqa: SLF001


def presign_uploads(iot: Any) -> None:
    """Upload placeholders become URLs to PUT to, and S3's address is the one by which this device finds us."""
    presigned, describe = iot._jobs_presigned_document, iot.jobs_describe_execution  # noqa: SLF001

    @functools.wraps(describe)
    def describe_and_note(thing_name: str, job_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = describe(thing_name, job_id)
        if found is not None:
            _request.set(_Request(thing_name, found["executionNumber"], _request.get().step_minutes))
        return found

    def for_the_device(job: dict[str, Any]) -> str:
        host = _host(iot)
        role = str((job.get("presignedUrlConfig") or {}).get("roleArn") or "")
        expires = int((job.get("presignedUrlConfig") or {}).get("expiresInSec") or 3600)
        asked = _request.get()

        def upload(match: re.Match[str]) -> str:
            names = {"thingName": asked.thing, "jobId": job["jobId"], "executionNumber": str(asked.number)}
            url = re.sub(r"\$\{(\w+)\}", lambda each: names.get(each[1], each[0]), match["url"])
            bucket, key = iot._job_document_s3_location(url)  # noqa: SLF001
            if not (bucket and key and role and iot._iot_role_usable(role)):  # noqa: SLF001
                return match[0]
            access_key, session = iot._jobs_presign_session(role, expires)  # noqa: SLF001
            request = AWSRequest("PUT", f"http://{host}/{bucket}/{key}")
            credentials = Credentials(access_key, session["SecretAccessKey"], session["SessionToken"])
            S3SigV4QueryAuth(credentials, "s3", REGION, expires=expires).add_auth(request)
            return str(request.url)

        document = _UPLOAD.sub(upload, job.get("document") or "{}")
        token = iot.jobs_device_host.set(host)
        try:
            text: str = presigned({**job, "document": document})
        finally:
            iot.jobs_device_host.reset(token)
        return text.replace(f"https://s3.{REGION}.amazonaws.com/", f"http://{host}/")

    iot.jobs_describe_execution = describe_and_note
    iot._jobs_presigned_document = for_the_device  # noqa: SLF001


def _host(iot: Any) -> str:
    """Our address and port as the asking device knows them, by the name that it dialled."""
    dialled: str = iot.jobs_device_host.get().rpartition(":")[0]
    away = dialled == DEVICE_DOMAIN or dialled.endswith(f".{DEVICE_DOMAIN}")
    return f"{DEVICE_ADDRESS if away else 'localhost'}:{iot._GATEWAY_PORT}"  # noqa: SLF001


def answer_metrics(iot: Any) -> None:
    """Device Defender's answer to each report. Nothing is detected here: the report is checked and forgotten."""
    publish = iot.broker_publish

    @functools.wraps(publish)
    async def and_answer(account_id: str, region: str, topic: str, payload: bytes, *others: Any, **named: Any) -> None:
        await publish(account_id, region, topic, payload, *others, **named)
        match = _REPORT.fullmatch(topic)
        if match is None:
            return
        number, refused = judge_report(payload)
        answer: dict[str, Any] = {"thingName": match["thing"], "timestamp": int(time.time() * 1000)}
        if number is not None:
            answer["reportId"] = number
        answer["status"] = "REJECTED" if refused else "ACCEPTED"
        if refused:
            answer["statusDetails"] = {"ErrorCode": refused, "ErrorMessage": "the report is not valid"}
        kind = "rejected" if refused else "accepted"
        await publish(account_id, region, f"{topic}/{kind}", json.dumps(answer).encode(), qos=1)

    iot.broker_publish = and_answer


async def sweep() -> None:
    """End timers that ran out, try again what is to be tried again, and tell the things. Called twice a second."""
    iot = _iot()
    async with iot.publishing_events():
        with iot.request_scope(ACCOUNT, REGION):
            fronts: dict[str, str | None] = {}
            for execution in list(iot._job_executions.values()):  # noqa: SLF001
                iot._jobs_apply_timeout(execution)  # noqa: SLF001
            for thing in sorted(_to_notify):
                fronts[thing] = ""  # the front changed, whatever it was
            _to_notify.clear()
            for (thing, job_id), execution in list(iot._job_executions.items()):  # noqa: SLF001
                job = iot._jobs.get(job_id)  # noqa: SLF001
                if job and job["status"] == "IN_PROGRESS" and retry_due(execution, job):
                    fronts.setdefault(thing, iot.jobs_first_pending_job_id(thing))
                    iot._jobs_queue_execution(thing, job_id, iot._jobs_now_ms())  # noqa: SLF001
        for thing, front in fronts.items():
            await iot.jobs_notify_thing(ACCOUNT, REGION, thing, front)
