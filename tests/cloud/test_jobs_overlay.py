"""AWS IoT Jobs on the local cloud, spoken by real devices over mutual TLS: what it does by itself, what we added.

A minute of jobs is a second here (`minute_seconds` of the fixture's local cloud).
"""

import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.local.jobs import deadline, judge_report, retry_due
from cloud.local.schedule import may_roll_out, parse_window
from tests.cloud.conftest import Fleet, Unit, eventually
from tests.cloud.device import Device, connected, connected_as_guest

S3 = "https://s3.us-east-1.amazonaws.com"
_count = itertools.count(1)


@pytest.fixture(scope="module")
def unit(fleet: Fleet) -> Unit:
    return fleet.unit()


@pytest.fixture
def device(fleet: Fleet, unit: Unit) -> Iterator[Device]:
    with connected(fleet, unit) as made:
        yield made
    _clear(fleet, unit)


def _clear(fleet: Fleet, unit: Unit) -> None:
    """Leave no job behind for the next test's device."""
    iot = fleet.target.iot
    found = iot.list_job_executions_for_thing(thingName=unit.serial)["executionSummaries"]
    for job in {each["jobId"] for each in found}:
        iot.delete_job(jobId=job, force=True)


def _job(fleet: Fleet, *targets: str, document: dict[str, Any] | None = None, **options: Any) -> str:
    name = f"job-{next(_count)}"
    arns = [f"arn:aws:iot:us-east-1:000000000000:thing/{target}" for target in targets]
    fleet.target.iot.create_job(
        jobId=name, targets=arns, document=json.dumps(document or {"operation": "self-test"}), **options
    )
    return name


def _execution(fleet: Fleet, unit: Unit, job: str, **options: Any) -> dict[str, Any]:
    answer = fleet.target.iot.describe_job_execution(jobId=job, thingName=unit.serial, **options)
    return dict(answer["execution"])


def _status(fleet: Fleet, job: str) -> str:
    return fleet.target.iot.describe_job(jobId=job)["job"]["status"]


def fetch(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


# -- what ministack does by itself, on which the agent builds


def test_a_new_job_is_announced_and_worked_to_its_end(fleet: Fleet, unit: Unit, device: Device) -> None:
    job = _job(fleet, unit.serial)
    told = device.next("jobs/notify-next", lambda message: "execution" in message)
    started = device.start()
    kind, _ = device.update(job, "IN_PROGRESS", statusDetails={"phase": "check"})
    device.update(job, "SUCCEEDED")

    assert (told["execution"]["jobId"], told["execution"]["status"]) == (job, "QUEUED")
    assert started is not None
    assert (started["jobId"], started["executionNumber"], started["status"]) == (job, 1, "IN_PROGRESS")
    assert kind == "accepted"
    assert device.next("jobs/notify-next", lambda message: "execution" not in message)
    assert (_status(fleet, job), device.next_job()) == ("COMPLETED", None)


def test_an_update_with_a_stale_version_is_refused_with_the_present_state(
    fleet: Fleet, unit: Unit, device: Device
) -> None:
    job = _job(fleet, unit.serial)
    device.start()

    kind, answer = device.update(job, "IN_PROGRESS", expectedVersion=1)

    assert (kind, answer["code"]) == ("rejected", "VersionMismatch")
    assert answer["executionState"]["versionNumber"] == 2


def test_a_finished_execution_takes_no_further_update(fleet: Fleet, unit: Unit, device: Device) -> None:
    job = _job(fleet, unit.serial)
    device.update(job, "REJECTED", statusDetails={"code": "wrong-product"})

    kind, answer = device.update(job, "SUCCEEDED")

    assert (kind, answer["code"]) == ("rejected", "InvalidStateTransition")


def test_a_cancel_takes_what_is_queued_and_by_force_what_is_in_progress(
    fleet: Fleet, unit: Unit, device: Device
) -> None:
    job = _job(fleet, unit.serial)
    device.start()
    fleet.target.iot.cancel_job(jobId=job)
    after_cancel = _execution(fleet, unit, job)["status"]
    other = _job(fleet, unit.serial)
    device.update(job, "SUCCEEDED")
    device.start()
    fleet.target.iot.cancel_job(jobId=other, force=True)

    kind, answer = device.update(other, "SUCCEEDED")

    assert (after_cancel, _execution(fleet, unit, other)["status"]) == ("IN_PROGRESS", "CANCELED")
    assert (kind, answer["code"]) == ("rejected", "InvalidStateTransition")


def test_a_deleted_job_is_gone_for_the_device(fleet: Fleet, unit: Unit, device: Device) -> None:
    job = _job(fleet, unit.serial)
    device.start()
    fleet.target.iot.delete_job(jobId=job, force=True)

    kind, answer = device.update(job, "SUCCEEDED")

    assert (kind, answer["code"], device.next_job()) == ("rejected", "ResourceNotFound", None)


def test_a_unit_that_joins_the_ring_of_a_continuous_job_gets_it(fleet: Fleet, unit: Unit, device: Device) -> None:
    iot = fleet.target.iot
    iot.create_thing_group(thingGroupName="late")
    job = f"job-{next(_count)}"
    group = "arn:aws:iot:us-east-1:000000000000:thinggroup/late"
    iot.create_job(jobId=job, targets=[group], document="{}", targetSelection="CONTINUOUS")
    before = device.next_job()
    iot.add_thing_to_thing_group(thingGroupName="late", thingName=unit.serial)

    assert before is None
    assert device.next("jobs/notify-next", lambda message: message.get("execution", {}).get("jobId") == job)


def test_a_job_whose_failures_reach_the_threshold_is_cancelled(fleet: Fleet, unit: Unit, device: Device) -> None:
    other = fleet.unit()
    criterion = {
        "failureType": "ALL",
        "action": "CANCEL",
        "thresholdPercentage": 50.0,
        "minNumberOfExecutedThings": 1,
    }
    job = _job(fleet, unit.serial, other.serial, abortConfig={"criteriaList": [criterion]})
    device.update(job, "FAILED", statusDetails={"code": "unhealthy"})

    assert eventually(lambda: _status(fleet, job) == "CANCELED")
    assert _execution(fleet, other, job)["status"] == "CANCELED"


# -- what the overlay adds


def test_an_execution_in_progress_comes_before_an_older_one_that_waits(
    fleet: Fleet, unit: Unit, device: Device
) -> None:
    older, younger = _job(fleet, unit.serial), _job(fleet, unit.serial)
    device.update(younger, "IN_PROGRESS")

    found = device.next_job()

    assert found is not None
    assert (found["jobId"], _execution(fleet, unit, older)["status"]) == (younger, "QUEUED")


def test_a_failed_execution_is_tried_again_under_the_next_number_and_told_to_the_device(
    fleet: Fleet, unit: Unit, device: Device
) -> None:
    retry = {"criteriaList": [{"failureType": "FAILED", "numberOfRetries": 1}]}
    job = _job(fleet, unit.serial, jobExecutionsRetryConfig=retry)
    device.start()
    device.update(job, "FAILED", statusDetails={"code": "download"})

    told = device.next("jobs/notify-next", lambda message: message.get("execution", {}).get("executionNumber") == 2)
    again = device.start()
    device.update(job, "FAILED", statusDetails={"code": "download"}, executionNumber=2)

    assert told["execution"]["jobId"] == job
    assert again is not None
    assert (again["executionNumber"], again["versionNumber"]) == (2, 2)
    assert eventually(lambda: _status(fleet, job) == "COMPLETED")
    assert device.next_job() is None
    assert _execution(fleet, unit, job, executionNumber=1)["status"] == "FAILED"


def test_a_rejected_execution_is_never_tried_again(fleet: Fleet, unit: Unit, device: Device) -> None:
    retry = {"criteriaList": [{"failureType": "ALL", "numberOfRetries": 3}]}
    job = _job(fleet, unit.serial, jobExecutionsRetryConfig=retry)

    device.update(job, "REJECTED")

    assert (_status(fleet, job), device.next_job()) == ("COMPLETED", None)


def test_an_abort_comes_before_a_retry(fleet: Fleet, unit: Unit, device: Device) -> None:
    criterion = {"failureType": "FAILED", "action": "CANCEL", "thresholdPercentage": 1, "minNumberOfExecutedThings": 1}
    job = _job(
        fleet,
        unit.serial,
        abortConfig={"criteriaList": [criterion]},
        jobExecutionsRetryConfig={"criteriaList": [{"failureType": "FAILED", "numberOfRetries": 3}]},
    )
    device.update(job, "FAILED")
    after = _job(fleet, unit.serial)
    device.next("jobs/notify-next", lambda message: message.get("execution", {}).get("jobId") == after)

    assert (_status(fleet, job), _execution(fleet, unit, job)["executionNumber"]) == ("CANCELED", 1)


@pytest.mark.parametrize("how", ["in-progress timer", "step timer of the start", "step timer of an update"])
def test_a_silent_execution_times_out_by_itself_and_the_device_is_told(
    fleet: Fleet, unit: Unit, device: Device, how: str
) -> None:
    limit = {"timeoutConfig": {"inProgressTimeoutInMinutes": 1}} if how == "in-progress timer" else {}
    job = _job(fleet, unit.serial, **limit)
    started = device.start(**({"stepTimeoutInMinutes": 1} if how == "step timer of the start" else {}))
    if how == "step timer of an update":
        device.update(job, "IN_PROGRESS", stepTimeoutInMinutes=1)
    assert started is not None

    device.next("jobs/notify-next", lambda message: "execution" not in message)

    assert _execution(fleet, unit, job)["status"] == "TIMED_OUT"


def test_a_step_timer_that_is_not_allowed_is_refused(fleet: Fleet, unit: Unit, device: Device) -> None:
    job = _job(fleet, unit.serial)

    kind, answer = device.update(job, "IN_PROGRESS", stepTimeoutInMinutes=0)

    assert (kind, answer["code"]) == ("rejected", "InvalidRequest")


@given(
    started=st.integers(0, 10**6),
    steps=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10_080)), max_size=3),
    limit=st.none() | st.integers(1, 10_080),
)
def test_a_step_timer_never_reaches_beyond_the_in_progress_timer(
    started: int, steps: list[tuple[int, int]], limit: int | None
) -> None:
    execution: dict[str, Any] = {"startedAt": started}
    for at, minutes in steps:
        execution |= {"timeoutStartedAt": started + at, "stepTimeoutInMinutes": minutes}

    ends = deadline(execution, limit, 60_000)

    assert (ends is None) == (limit is None and not steps)
    if ends is not None and limit is not None:
        assert ends <= started + limit * 60_000
    if ends is not None and steps:
        assert ends <= started + steps[-1][0] + steps[-1][1] * 60_000  # the newest step timer alone counts


@given(allowed=st.integers(0, 10), failures=st.lists(st.sampled_from(["FAILED", "TIMED_OUT"]), min_size=1, max_size=12))
def test_retries_are_counted_for_each_kind_of_failure(allowed: int, failures: list[str]) -> None:
    execution = {"status": failures[0], "history": [{"status": each} for each in failures[1:]]}
    config = {"criteriaList": [{"failureType": "FAILED", "numberOfRetries": allowed}]}

    due = retry_due(execution, {"jobExecutionsRetryConfig": config})

    assert due == (failures[0] == "FAILED" and failures[1:].count("FAILED") < allowed)


def test_outside_its_window_a_job_reaches_no_device(fleet: Fleet, unit: Unit, device: Device) -> None:
    now = datetime.now(UTC)
    start = {"startTime": (now - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M")}
    closed, opened = now + timedelta(hours=6), now - timedelta(minutes=5)
    waiting = _job(fleet, unit.serial, schedulingConfig={**start, "maintenanceWindows": [_window(closed)]})
    going = _job(fleet, unit.serial, schedulingConfig={**start, "maintenanceWindows": [_window(opened)]})

    device.next("jobs/notify-next", lambda message: message.get("execution", {}).get("jobId") == going)

    with pytest.raises(fleet.target.iot.exceptions.ResourceNotFoundException):
        _execution(fleet, unit, waiting)
    fleet.target.iot.delete_job(jobId=waiting, force=True)


def _window(start: datetime) -> dict[str, Any]:
    return {"startTime": f"cron({start.minute} {start.hour} ? * * *)", "durationInMinutes": 60}


@given(
    start=st.times(),
    minutes=st.integers(1, 1430),
    moment=st.integers(10**9, 4 * 10**9).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
)
def test_a_daily_window_is_open_for_exactly_its_duration(start: Any, minutes: int, moment: datetime) -> None:
    window = parse_window({"startTime": f"cron({start.minute} {start.hour} * * ? *)", "durationInMinutes": minutes})
    begin = moment.replace(hour=start.hour, minute=start.minute, second=0, microsecond=0)
    since = (moment - begin).total_seconds() % 86_400

    assert window.open_at(moment) == (since < minutes * 60)


@pytest.mark.parametrize(
    ("weekdays", "is_open"), [("MON-FRI", True), ("SAT,SUN", False), ("7", False), ("FRI-MON", True), ("2-6", True)]
)
def test_a_window_keeps_to_its_days_of_the_week(weekdays: str, is_open: bool) -> None:
    window = {"startTime": f"cron(0 2 ? * {weekdays} *)", "durationInMinutes": 60}
    friday = datetime(2026, 11, 20, 2, 30, tzinfo=UTC)

    assert may_roll_out({"maintenanceWindows": [window]}, friday) is is_open


@pytest.mark.parametrize(
    ("schedule", "goes_out"),
    [
        ({"startTime": "2026-11-20T12:00"}, True),
        ({"startTime": "2026-11-20T12:01"}, False),
        ({"endTime": "2026-11-20T12:00"}, False),
        ({"startTime": "2026-11-19T00:00", "endTime": "2026-11-20T12:01"}, True),
        (None, True),
    ],
)
def test_a_job_goes_out_between_its_start_and_its_end(schedule: dict[str, str] | None, goes_out: bool) -> None:
    assert may_roll_out(schedule, datetime(2026, 11, 20, 12, tzinfo=UTC)) is goes_out


@pytest.mark.parametrize("text", ["", "rate(1 day)", "cron(0 2 * * *)", "cron(0 2 1 * ? *)", "cron(0 25 ? * * *)"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"window|no time of day"):
        parse_window({"startTime": text, "durationInMinutes": 60})


def test_a_document_carries_urls_that_its_reader_can_use_and_nobody_can_bend(
    fleet: Fleet, unit: Unit, device: Device
) -> None:
    bucket, metadata = fleet.outputs["Releases"], fleet.outputs["Metadata"]
    fleet.target.s3.put_object(Bucket=bucket, Key="targets/agent/a.tar.zst", Body=b"0123456789")
    fleet.target.s3.put_object(Bucket=bucket, Key="logs/secret", Body=b"another unit's log")
    fleet.target.s3.put_object(Bucket=metadata, Key="timestamp.json", Body=b"{}")
    document = {
        "metadata": f"{S3}/{metadata}/",
        "urls": {"agent/a.tar.zst": f"${{aws:iot:s3-presigned-url:{S3}/{bucket}/targets/agent/a.tar.zst}}"},
        "secret": f"${{aws:iot:s3-presigned-url:{S3}/{bucket}/logs/secret}}",
    }
    role = {"roleArn": fleet.outputs["DownloadRole"], "expiresInSec": 3600}
    _job(fleet, unit.serial, document=document, presignedUrlConfig=role)

    found = device.next_job()

    assert found is not None
    urls = found["jobDocument"]
    url = urls["urls"]["agent/a.tar.zst"]
    assert url.startswith("http://localhost:")  # a device of this machine
    assert fetch(url, Range="bytes=3-5") == (206, b"345")
    assert fetch(url.replace("a.tar", "b.tar"))[0] == 403
    assert fetch(url.partition("?")[0])[0] == 403
    assert fetch(urls["secret"])[0] == 403  # the role reads archives only
    assert fetch(urls["metadata"] + "timestamp.json") == (200, b"{}")
    assert fetch(urls["metadata"] + "timestamp.json", "PUT", b"evil")[0] == 403


def test_a_guest_is_given_urls_with_the_address_where_it_finds_this_machine(fleet: Fleet) -> None:
    guest = fleet.unit()
    bucket = fleet.outputs["Releases"]
    fleet.target.s3.put_object(Bucket=bucket, Key="targets/agent/a.tar.zst", Body=b"0123456789")
    document = {
        "metadata": f"{S3}/{fleet.outputs['Metadata']}/",
        "url": f"${{aws:iot:s3-presigned-url-v2:{S3}/{bucket}/targets/agent/a.tar.zst}}",
    }
    _job(fleet, guest.serial, document=document, presignedUrlConfig={"roleArn": fleet.outputs["DownloadRole"]})

    with connected_as_guest(fleet, guest) as device:
        found = device.next_job()

    assert found is not None
    port = fleet.cloud.url.rpartition(":")[2]
    here = f"http://10.0.2.2:{port}/"
    url = found["jobDocument"]["url"]
    assert (url.startswith(here), found["jobDocument"]["metadata"].startswith(here)) == (True, True)
    assert fetch(url.replace("10.0.2.2", "127.0.0.1"), Host=f"10.0.2.2:{port}") == (200, b"0123456789")
    _clear(fleet, guest)


def test_an_upload_goes_where_the_document_says_and_nowhere_else(fleet: Fleet, unit: Unit, device: Device) -> None:
    bucket = fleet.outputs["Releases"]
    key = "logs/${thingName}/${jobId}-${executionNumber}.json"
    place = f"${{aws:iot:s3-presigned-url-upload:{S3}/{bucket}/{key}}}"
    job = _job(
        fleet,
        unit.serial,
        document={"upload": place},
        presignedUrlConfig={"roleArn": fleet.outputs["UploadRole"], "expiresInSec": 60},
    )
    found = device.next_job()
    assert found is not None
    url = found["jobDocument"]["upload"]

    put = fetch(url, "PUT", b"what happened")
    stored = fleet.target.s3.get_object(Bucket=bucket, Key=f"logs/{unit.serial}/{job}-1.json")["Body"].read()

    assert (put[0], stored) == (200, b"what happened")
    assert fetch(url)[0] == 403  # to put, not to read
    assert fetch(url.replace(unit.serial, "PK-OTHER"), "PUT", b"in another's name")[0] == 403


def test_a_report_of_metrics_is_accepted_and_a_broken_one_refused(device: Device) -> None:
    report = {"header": {"report_id": 7, "version": "1.0"}, "metrics": {"network_stats": {"bytes_in": 1}}}
    device.publish("defender/metrics/json", report)
    accepted = device.next("defender/metrics/json/accepted")
    device.publish("defender/metrics/json", {**report, "header": {"report_id": 8}})
    rejected = device.next("defender/metrics/json/rejected")

    assert (accepted["thingName"], accepted["reportId"], accepted["status"]) == (device.serial, 7, "ACCEPTED")
    assert (rejected["reportId"], rejected["statusDetails"]["ErrorCode"]) == (8, "InvalidPayload")


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_no_payload_breaks_the_judge_of_reports(payload: bytes) -> None:
    assert judge_report(payload)[1] in {"MalformedReport", "InvalidPayload"}
