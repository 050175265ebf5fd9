"""The runner against the jobs service: what AWS promises, what it does not, and what a unit does about it."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import files
from firmware_agent.jobs import runner as runners
from firmware_agent.jobs.kind import Context, Done, Failed, Key, Kind, Next, Orphan, Phase, Rejected, Restart, Result
from firmware_agent.jobs.runner import Runner, due
from firmware_agent.jobs.service import Service, clean, clean_all
from firmware_agent.jobs.single import Single
from firmware_agent.mqtt import NotDeliveredError
from tests.firmware_agent.jobs.world import SERIAL
from tests.firmware_agent.jobs_service import CannotDo, JobsService, LocalLink
from tests.firmware_agent.support import wait_for

DOCUMENT = {"picket": 1, "operation": "self-test", "product": "picket"}


class Scripted(Single):
    """A kind whose phases are what a test says."""

    operation = "self-test"

    def __init__(self, *phases: Phase, undo: tuple[Phase, ...] = ()) -> None:
        self.phases = phases
        self.undo = undo


@dataclass
class Stand:
    """A unit's runner, process after process, and the cloud."""

    root: Path
    service: JobsService = field(default_factory=JobsService)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.link = LocalLink(self.service, SERIAL)

    @property
    def journal(self) -> Path:
        return self.root / "jobs/journal.json"

    def phase(self, name: str, *results: Result, do: Callable[[Context], Any] | None = None, **more: Any) -> Phase:
        """A phase that gives its results one after the other, the last one for ever."""
        left = list(results) or [Next()]

        def run(context: Context) -> Result:
            self.said.append(name)
            if do is not None and (given := do(context)) is not None:
                assert isinstance(given, Next | Done | Failed | Rejected | Restart)
                return given
            return left.pop(0) if len(left) > 1 else left[0]

        return Phase(name, run, **more)

    def make(self, *kinds: Kind, **more: Any) -> tuple[Runner, list[bool]]:
        left: list[bool] = []
        made = Runner(self.link, self.root / "jobs", kinds, product="picket", leave=lambda: left.append(True), **more)
        return made, left

    def process(self, *kinds: Kind, until: Callable[[], bool] | None = None, **more: Any) -> bool:
        """One process: until there is nothing to do, or `until` holds; whether it ended for a restart's sake."""
        made, left = self.make(*kinds, **more)
        stop = threading.Event()

        def end() -> None:
            stop.set()
            made.wake()

        if until is None:
            self.link.idle = end
        else:
            self.link.idle = lambda: None
        thread = threading.Thread(target=made.run, args=(stop,))
        thread.start()
        try:
            if until is not None:
                wait_for(until)
                end()
            thread.join(20)
            assert not thread.is_alive()
        finally:
            end()
            thread.join()
        return bool(left)

    @property
    def reports(self) -> list[str]:
        return [told.short for told in self.service.told]

    def reason(self) -> str:
        return self.service.told[-1].details["reason"]


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path / "state")


# --- refusing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "code", "words"),
    [
        (DOCUMENT | {"product": "toaster"}, "wrong-product", "toaster"),
        (DOCUMENT | {"operation": "explode"}, "unknown-operation", "explode"),
        (DOCUMENT | {"speed": 3}, "bad-document", "speed"),
        ({"operation": "self-test"}, "bad-document", '"picket": 1'),
        (DOCUMENT | {"operation": "reboot"}, "not-possible", "reboot"),
    ],
)
def test_what_is_not_for_this_unit_is_rejected_in_words(
    stand: Stand, document: Mapping[str, Any], code: str, words: str
) -> None:
    stand.service.create("j", document, SERIAL, retries={"ALL": 5})

    stand.process(Scripted(stand.phase("work")))

    assert stand.reports == [f"REJECTED {code}"]
    assert words in stand.reason()
    assert stand.said == []


def test_in_safe_mode_other_jobs_fail_so_that_they_can_be_tried_again(stand: Stand) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)

    stand.process(safe_mode=True)

    assert stand.reports == ["FAILED interrupted"]
    assert "safe mode" in stand.reason()


def test_what_safe_mode_could_not_carry_to_its_end_is_gone_on_with_in_ordinary_times(stand: Stand) -> None:
    """A rotation between its two certificates, for one: nobody else would ever decide between them."""
    stand.service.create("j", DOCUMENT, SERIAL)
    begun = Scripted(stand.phase("work", Restart(), bound=True), stand.phase("more", bound=True))
    stand.process(begun)
    stand.process(safe_mode=True)
    told = stand.reports

    begun.orphan = lambda: Orphan(Key("j", 1), "more")  # type: ignore[method-assign]
    stand.process(begun)
    begun.orphan = lambda: None  # type: ignore[method-assign]
    stand.process(begun)

    assert told == ["IN_PROGRESS work", "FAILED interrupted"]
    assert stand.said == ["work", "more"]


# --- the way of a job ---------------------------------------------------------------------------------------------


def test_jobs_are_done_one_after_the_other_and_retries_under_their_number(stand: Stand) -> None:
    stand.service.create("a", DOCUMENT, SERIAL, retries={"FAILED": 1})
    stand.service.create("b", DOCUMENT, SERIAL)
    kind = Scripted(stand.phase("work", Failed("upload", "not yet"), Done({"level": "low"})))

    stand.process(kind)

    assert [(told.job, told.number, told.status) for told in stand.service.told] == [
        ("a", 1, "IN_PROGRESS"),
        ("a", 1, "FAILED"),
        ("b", 1, "IN_PROGRESS"),
        ("b", 1, "SUCCEEDED"),
        ("a", 2, "IN_PROGRESS"),
        ("a", 2, "SUCCEEDED"),
    ]


def test_however_often_the_runner_is_begun_again_it_listens_once(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = stand.make(Scripted(stand.phase("work")))
    asked: list[str] = []
    monkeypatch.setattr(stand.link, "subscribe", lambda _feature, filters, _listener: asked.extend(filters))
    monkeypatch.setattr(stand.link, "on_connect", lambda _listener: asked.append("connect"))
    ended = threading.Event()
    ended.set()

    for _ in range(3):
        made.run(ended)

    assert len(asked) == 2


def test_a_job_that_comes_later_is_announced_and_done(stand: Stand) -> None:
    kind = Scripted(stand.phase("work", Done()))
    timer = threading.Timer(0.1, lambda: stand.service.create("late", DOCUMENT, SERIAL))
    timer.start()

    stand.process(kind, until=lambda: stand.service.status("late", SERIAL) == "SUCCEEDED")
    timer.join()


def test_what_a_phase_keeps_is_there_for_the_next_process(stand: Stand) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    seen: list[Any] = []
    phases = (
        stand.phase("first", Next({"a": 1})),
        stand.phase("second", Restart({"b": 2}), bound=True),
        stand.phase(
            "third", Done(), do=lambda context: seen.append((dict(context.memo), context.document)), bound=True
        ),
    )

    assert stand.process(Scripted(*phases))
    assert not stand.process(Scripted(*phases))

    assert seen == [({"a": 1, "b": 2}, None)]
    assert stand.reports == ["IN_PROGRESS first", "IN_PROGRESS second", "SUCCEEDED"]


def test_a_process_that_is_asked_to_end_leaves_the_job_to_the_next(stand: Stand) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    endless = Scripted(stand.phase("work", do=lambda context: context.wait(3600)))

    stand.process(endless, until=lambda: stand.said == ["work"])
    stand.process(Scripted(stand.phase("work", Done())))

    assert stand.reports == ["IN_PROGRESS work", "IN_PROGRESS work", "SUCCEEDED"]


def test_an_error_that_nobody_foresaw_is_a_failure_with_its_words(stand: Stand) -> None:
    def fall(_: Context) -> None:
        raise OSError(28, "No space left on device")

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", do=fall)))

    assert stand.reports == ["IN_PROGRESS work", "FAILED no-space"]


def test_an_error_with_a_secret_in_its_words_is_told_without_it(stand: Stand) -> None:
    def fall(_: Context) -> None:
        raise ValueError("GET https://bucket.example/a?X-Amz-Signature=abc\nTraceback")

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", do=fall)))

    assert stand.reason() == "work: GET https://bucket.example/a?[query] Traceback"


# --- what the network and the cloud do -----------------------------------------------------------------------------


def test_a_report_that_could_not_be_made_is_made_by_the_next_process(stand: Stand) -> None:
    def pull_the_plug(_: Context) -> None:
        stand.link.up = False

    stand.service.create("j", DOCUMENT, SERIAL)
    kind = Scripted(stand.phase("work", Done({"level": "low"}), do=pull_the_plug))
    stand.process(kind, until=lambda: '"reporting"' in stand.journal.read_text() if stand.journal.exists() else False)
    assert stand.reports == ["IN_PROGRESS work"]

    stand.link.up = True
    stand.process(kind)

    assert stand.reports == ["IN_PROGRESS work", "SUCCEEDED"]
    assert stand.service.told[-1].details == {"level": "low"}
    assert stand.said == ["work"]


def test_a_report_that_the_cloud_has_lost_is_made_again_and_nothing_else(stand: Stand) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    kind = Scripted(stand.phase("work", Done()))
    stand.process(kind)
    found = stand.service.latest("j", SERIAL)
    assert found is not None
    found.status = "IN_PROGRESS"

    stand.process(kind)

    assert stand.reports == ["IN_PROGRESS work", "SUCCEEDED", "SUCCEEDED"]
    assert stand.said == ["work"]


def test_a_version_that_somebody_else_has_changed_is_taken_over(stand: Stand) -> None:
    def meddle(_: Context) -> None:
        found = stand.service.latest("j", SERIAL)
        assert found is not None
        found.version += 3

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", Done(), do=meddle)))

    assert stand.reports == ["IN_PROGRESS work", "SUCCEEDED"]
    assert [code for _, code in stand.service.refused] == ["VersionMismatch"]


@pytest.mark.parametrize("how", ["cancelled", "deleted", "timed out"])
def test_a_job_that_is_withdrawn_while_it_waits_is_dropped_at_once_and_cleaned_up(stand: Stand, how: str) -> None:
    def withdraw() -> None:
        match how:
            case "cancelled":
                stand.service.cancel("j", SERIAL, force=True)
            case "deleted":
                stand.service.delete("j", SERIAL, force=True)
            case _:
                stand.service.pass_time(1000)

    def work(context: Context) -> None:
        (context.scratch / "half").write_text("done")
        withdraw()
        context.wait(3600)

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", do=work)))

    assert stand.reports == ["IN_PROGRESS work"]
    assert stand.said == ["work"]
    assert sorted(path.name for path in (stand.root / "jobs").iterdir()) == ["journal.json"]


def test_a_job_that_is_withdrawn_while_the_unit_is_off_is_not_begun_again(stand: Stand) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    endless = Scripted(stand.phase("work", do=lambda context: context.wait(3600)))
    stand.process(endless, until=lambda: stand.said == ["work"])

    stand.service.delete("j", SERIAL, force=True)
    stand.process(endless)

    assert stand.said == ["work"]


def test_a_bound_job_is_carried_to_its_end_though_nobody_wants_it_any_more(stand: Stand) -> None:
    def work(context: Context) -> None:
        stand.service.cancel("j", SERIAL, force=True)
        assert context.confirm()  # a no is an answer, too

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", do=work, bound=True), stand.phase("more", Done())))

    assert stand.said == ["work", "more"]
    assert stand.reports == ["IN_PROGRESS work"]
    assert stand.service.status("j", SERIAL) == "CANCELED"


def test_a_phase_without_a_link_is_entered_again_a_bounded_number_of_times(stand: Stand) -> None:
    def ask(_: Context) -> None:
        raise NotDeliveredError("no link")

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", do=ask, attempts=3)))

    assert stand.said == ["work"] * 3
    assert stand.reports == ["IN_PROGRESS work"] * 3 + ["FAILED interrupted"]


def test_the_step_timer_is_set_by_every_phase_and_renewed_by_progress(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(context: Context) -> None:
        for done in (0.05, 0.12, 0.13, 0.5, 0.51):
            stand.service.pass_time(8)
            context.progress(done)

    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", do=work, minutes=20), stand.phase("next", Done(), minutes=90)))

    assert [(told.minutes, told.details.get("progress")) for told in stand.service.told] == [
        (20, None),
        (20, "12%"),
        (20, "50%"),
        (90, None),
        (None, None),
    ]


def test_progress_is_told_after_thirty_seconds_or_a_tenth() -> None:
    assert not due(29.9, 0.09)
    assert due(30.0, 0.0)
    assert due(0.0, 0.1)


def test_a_busy_service_is_asked_again(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "_RETRY_SECONDS", 0.01)
    answers = iter(["RequestThrottled", "InternalError"])
    handle = stand.service.handle

    def busy(topic: str, payload: bytes) -> tuple[str, bytes] | None:
        if topic.endswith("/update") and (code := next(answers, None)):
            return f"{topic}/rejected", f'{{"code":"{code}","message":"later"}}'.encode()
        return handle(topic, payload)

    stand.service.handle = busy  # type: ignore[method-assign]
    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", Done())))

    assert stand.reports == ["IN_PROGRESS work", "SUCCEEDED"]


def test_a_report_that_is_refused_for_ever_does_not_keep_the_unit_busy(stand: Stand) -> None:
    handle = stand.service.handle
    asked: list[str] = []

    def refuse(topic: str, payload: bytes) -> tuple[str, bytes] | None:
        asked.append(topic)
        if topic.endswith("/update"):
            return f"{topic}/rejected", b'{"code":"InvalidRequest","message":"no"}'
        return handle(topic, payload)

    stand.service.handle = refuse  # type: ignore[method-assign]
    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", Done())), until=lambda: len(asked) >= 9)

    assert len(asked) <= 12


# --- the journal --------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Says no to the journal while the list is not empty."""
    full: list[bool] = []
    write = files.write_atomic

    def refusing(path: Path, data: bytes, mode: int = 0o644) -> None:
        if full and path.name == "journal.json":
            raise OSError(28, "No space left on device")
        write(path, data, mode)

    monkeypatch.setattr(files, "write_atomic", refusing)
    return full


def test_what_cannot_be_noted_is_not_begun(stand: Stand, full_disk: list[bool]) -> None:
    full_disk.append(True)
    stand.service.create("j", DOCUMENT, SERIAL)

    stand.process(Scripted(stand.phase("work", Done())))

    assert stand.said == []
    assert stand.reports == ["FAILED no-space"]


def test_what_is_bound_goes_on_without_notes(stand: Stand, full_disk: list[bool]) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    phases = (stand.phase("switch", do=lambda _: full_disk.append(True), bound=True), stand.phase("prove", Done()))

    stand.process(Scripted(*phases))
    full_disk.clear()
    stand.process(Scripted(*phases))

    assert stand.said == ["switch", "prove", "switch", "prove"]  # the second process knows of the first entry only
    assert stand.reports == ["IN_PROGRESS switch", "SUCCEEDED"]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b'{"format":1,"job":7}', b"[" * 100_000])
def test_a_damaged_journal_is_kept_aside_and_its_job_fails(stand: Stand, content: bytes) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    endless = Scripted(stand.phase("work", do=lambda context: context.wait(3600)))
    stand.process(endless, until=lambda: stand.said == ["work"])
    stand.journal.write_bytes(content)

    stand.process(endless)

    assert stand.reports == ["IN_PROGRESS work", "FAILED interrupted"]
    assert "lost its notes" in stand.reason()
    assert stand.journal.with_name("journal.json.damaged").read_bytes() == content


def test_an_operation_that_this_release_cannot_do_any_more_is_reported(stand: Stand) -> None:
    stand.service.create("j", DOCUMENT, SERIAL)
    stand.process(Scripted(stand.phase("work", Restart(), bound=True), stand.phase("more")))

    stand.process()

    assert stand.reports == ["IN_PROGRESS work", "FAILED interrupted"]


def test_a_healthy_job_of_one_phase_needs_five_writes(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[Path] = []
    write = files.write_atomic

    def counted(path: Path, data: bytes, mode: int = 0o644) -> None:
        stores.append(path)
        write(path, data, mode)

    monkeypatch.setattr(files, "write_atomic", counted)
    stand.service.create("j", DOCUMENT, SERIAL)

    stand.process(Scripted(stand.phase("work", Done())))

    assert len(stores) == 5  # accepted, entered, cleaning, reporting, closed


# --- words --------------------------------------------------------------------------------------------------------


def test_status_details_are_as_the_service_takes_them() -> None:
    assert clean("a\nb\x00c\u200bd") == "a b c d"
    assert clean(" the line is \x07dead\r\n") == "the line is dead"
    assert clean("") == "-"
    assert len(clean("x" * 5000)) == 1024
    assert len(clean_all({str(number): "v" for number in range(20)})) == 10


def test_the_model_of_the_service_keeps_to_the_rules() -> None:
    """Who tests by a model has to test the model."""
    service = JobsService()
    service.create("j", DOCUMENT, SERIAL)
    topic = f"$aws/things/{SERIAL}/jobs"

    def ask(path: str, body: str) -> str:
        answered = service.handle(f"{topic}/{path}", body.encode())
        assert answered is not None
        return answered[0].rpartition("/")[2] + " " + answered[1].decode()

    assert "IN_PROGRESS" in ask("start-next", "{}")
    assert "VersionMismatch" in ask("j/update", '{"status":"FAILED","expectedVersion":1}')
    assert "InvalidRequest" in ask("j/update", '{"status":"FAILED","statusDetails":{"a":"b\\nc"}}')
    assert "InvalidStateTransition" in ask("j/update", '{"status":"CANCELED"}')
    assert "InvalidRequest" in ask("j/update", '{"status":"FINE"}')
    assert "InvalidJson" in ask("j/update", "{")
    assert "InvalidTopic" in ask("j/explode", "{}")
    assert "ResourceNotFound" in ask("k/get", "{}")
    with pytest.raises(CannotDo):
        service.cancel("j", SERIAL)
    service.cancel("j", SERIAL, force=True)
    assert "InvalidStateTransition" in ask("j/update", '{"status":"SUCCEEDED"}')
    assert "TerminalStateReached" in ask("j/get", "{}")
    assert '"execution"' not in ask("$next/get", "{}")


def test_an_answer_that_makes_no_sense_is_no_answer(stand: Stand) -> None:
    def handle(topic: str, payload: bytes) -> tuple[str, bytes] | None:
        return f"{topic}/accepted", b'{"execution":{"jobId":7}}'

    stand.service.handle = handle  # type: ignore[method-assign]

    with pytest.raises(NotDeliveredError, match="no sense"):
        Service(stand.link).next()
