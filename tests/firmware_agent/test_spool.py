"""What the spool has taken it gives back, in order, once it may forget, and whatever kills it."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firmware_agent import messages, topics
from firmware_agent.board import ClockReading
from firmware_agent.spool import UNSAVED, Spool

ROOT = Path(__file__).parent.parent.parent
CAPACITY = 6


class SpoolMachine(RuleBasedStateMachine):
    """A spool beside a list that should behave the same."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "spool.db"
        self.spool = Spool(self.path, CAPACITY)
        self.model: list[tuple[str, bytes]] = []
        self.sequence = 0

    def teardown(self) -> None:
        self.spool.close()
        self.directory.cleanup()

    def _shrink(self) -> None:
        while len(self.model) > CAPACITY:
            heartbeats = [entry for entry in self.model if entry[0] == topics.HEARTBEAT]
            self.model.remove(heartbeats[0] if heartbeats else self.model[0])

    @rule()
    def alarm(self) -> None:
        self.sequence += 1
        body = f"alarm {self.sequence}".encode()
        assert self.spool.alarm(lambda sequence: f"alarm {sequence}".encode()) == self.sequence
        self.model.append((topics.ALARM, body))
        self._shrink()

    @rule(number=st.integers(0, 1_000_000))
    def heartbeat(self, number: int) -> None:
        body = f"heartbeat {number} {len(self.model)} {self.sequence}".encode()
        self.spool.heartbeat(body)
        self.model.append((topics.HEARTBEAT, body))
        self._shrink()

    @rule(count=st.integers(1, 3))
    def deliver(self, count: int) -> None:
        for message in self.spool.oldest(count):
            self.spool.delete(message)
            self.model.remove((message.kind, message.body))

    @rule()
    def refuse(self) -> None:
        def broken(_: int) -> bytes:
            raise ValueError

        try:
            self.spool.alarm(broken)
        except ValueError:
            return
        raise AssertionError

    @rule()
    def restart(self) -> None:
        self.spool.close()
        self.spool = Spool(self.path, CAPACITY)

    @invariant()
    def gives_back_what_it_took_in_order(self) -> None:
        assert self.model == [(message.kind, message.body) for message in self.spool.oldest(100)]
        assert len(self.spool) == len(self.model)


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


WRITER = """
import sys
from pathlib import Path
from firmware_agent.spool import Spool
spool = Spool(Path(sys.argv[1]))
while True:
    print(spool.alarm(lambda sequence: b"{}"), flush=True)
"""


def test_what_was_confirmed_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    confirmed = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(20):
                confirmed = int(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
            for line in process.stdout:
                if line.endswith(b"\n"):
                    confirmed = int(line)

    with Spool(path) as spool:
        assert len(spool) >= confirmed
        assert spool.alarm(lambda _: b"") == len(spool)  # no number is used twice, none is left out


def test_a_damaged_spool_is_put_aside_and_a_new_one_begun(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"no database at all" * 100)

    with Spool(path) as spool:
        assert spool.alarm(lambda sequence: json.dumps(sequence).encode()) == 1
        assert spool.depth().fault is None

    assert (tmp_path / "spool.db.damaged").exists()
    assert "damaged" in caplog.text


def numbered(spool: Spool, *, event: bool = False, quality: str = "ntp", boot: str = "boot-1") -> int:
    """Keep an alarm that says its number."""

    def body(sequence: int) -> bytes:
        clock = ClockReading(sequence, quality)  # type: ignore[arg-type]
        return messages.alarm(sequence, clock=clock, uptime=sequence * 10, boot_id=boot).payload()

    return spool.event(body) if event else spool.alarm(body)


def sequences(spool: Spool) -> list[int]:
    return [json.loads(one.body)["sequence"] for one in spool.oldest(1_000_000)]


def test_what_a_damaged_spool_still_gives_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        for _ in range(200):
            numbered(spool)
    with path.open("r+b") as file:  # the last page of the table, say
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)

    with Spool(path) as spool:
        for _ in range(5):
            numbered(spool)
            found = sequences(spool)

    assert found[-1] == 205
    assert sorted(set(found)) == found
    assert len(found) > 50


def test_a_database_that_is_damaged_while_it_is_open_costs_no_new_alarm(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        spool.learn("boot-1", 1_800_000_000.0)
        for _ in range(20_000 // 100):
            spool.alarm(lambda sequence: json.dumps({"sequence": sequence, "ballast": "x" * 40_000}).encode())
        with path.open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        spool.oldest(1_000)  # more than the cache holds: the damage shows
        first = numbered(spool, quality="estimated")
        assert first == 201
        assert (spool.depth().unsaved, spool.depth().fault) == (0, None)

    with Spool(path) as spool:
        assert sequences(spool)[-1] == 201
        assert numbered(spool, quality="estimated") == 202
        assert [json.loads(one.body)["at_quality"] for one in spool.oldest(999)[-2:]] == ["corrected"] * 2


# --- what goes first ----------------------------------------------------------------------------------------------


def test_heartbeats_go_first_then_events_then_alarms(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db", capacity=6) as spool:
        for _ in range(2):
            numbered(spool)
            numbered(spool, event=True)
            spool.heartbeat(b"{}")
        seen = [spool.depth()]
        for _ in range(6):
            numbered(spool)
            seen.append(spool.depth())

    assert [(one.alarms, one.events, one.heartbeats) for one in seen] == [
        (2, 2, 2),
        (3, 2, 1),
        (4, 2, 0),
        (5, 1, 0),
        (6, 0, 0),
        (6, 0, 0),
        (6, 0, 0),
    ]
    assert seen[-1].lost == 4


def test_alarms_and_events_are_counted_apart_and_come_out_in_the_order_of_their_coming(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        assert [numbered(spool), numbered(spool, event=True), numbered(spool)] == [1, 1, 2]

        assert [one.kind for one in spool.oldest(9)] == [topics.ALARM, topics.EVENT, topics.ALARM]
        assert sequences(spool) == [1, 1, 2]


# --- a week offline -----------------------------------------------------------------------------------------------

#: One process without the test's own memory: 100,000 events in, all out, and how much memory that took at most.
WEEK = """
import resource, sqlite3, sys
from pathlib import Path
from firmware_agent import messages
from firmware_agent.board import ClockReading
from firmware_agent.spool import Spool

spool = Spool(Path(sys.argv[1]))
(setting,) = spool._opened().execute("PRAGMA synchronous").fetchone()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def keep(number):
    clock = ClockReading(1.7e9 + number, "ntp")
    make = lambda sequence: messages.alarm(sequence, clock=clock, uptime=number, boot_id="b").payload()
    (spool.alarm if number % 10 == 0 else spool.event)(make)
    if number % 50 == 0:
        spool.heartbeat(b"{}")

# The product's own setting costs an fsync each, minutes in all: its first thousand are written so, the rest is not.
for number in range(1000):
    keep(number)
before = peak()
spool._write = lambda *work, full=True, write=spool._write: write(*work, full=False)
for number in range(1000, 100_000):
    keep(number)
print(setting, len(spool), peak() - before)
ids, alarms, events = set(), [], []
while batch := spool.oldest(64):
    for one in batch:
        if one.kind == "heartbeat":
            continue
        body = messages.json.loads(one.body)
        ids.add(body["event_id"])
        (alarms if one.kind == "alarm" else events).append(body["sequence"])
    spool.delete(*batch)
print(len(ids), alarms == list(range(1, 10_001)), events == list(range(1, 90_001)), len(spool))
"""


def test_seven_days_and_a_hundred_thousand_events_lose_nothing_and_need_no_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WEEK, str(tmp_path / "spool.db")], cwd=ROOT, capture_output=True, text=True, check=True
    )

    synchronous, waiting, grown = (int(word) for word in done.stdout.splitlines()[0].split())
    assert synchronous == 2  # FULL
    assert waiting == 102_000
    assert grown < 4_000  # kB: SQLite's own cache is 2 MB
    assert done.stdout.splitlines()[1] == "100000 True True 0"


FSYNCS = """
import sys
from pathlib import Path
from firmware_agent.spool import Spool
spool = Spool(Path(sys.argv[1]))
spool.alarm(lambda _: b"{}")
for number in range(40):
    match sys.argv[2]:
        case "alarm": spool.alarm(lambda _: b"{}")
        case "heartbeat": spool.heartbeat(b"{}")
        case "delivered":
            spool.heartbeat(b"{}")
            spool.delete(*spool.oldest(1))
spool._database = None  # no tidy end
"""


@pytest.mark.parametrize(("what", "wanted"), [("alarm", 40), ("heartbeat", 0), ("delivered", 0)])
def test_an_alarm_costs_one_fsync_and_a_heartbeat_none(tmp_path: Path, what: str, wanted: int) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")

    def synced(kind: str, name: str) -> int:
        log = tmp_path / f"{name}.log"
        command = [strace, "-f", "-e", "trace=fsync,fdatasync", "-o", str(log), sys.executable, "-c", FSYNCS]
        done = subprocess.run([*command, str(tmp_path / name), kind], cwd=ROOT, capture_output=True, check=False)
        if b"ptrace" in done.stderr:
            pytest.skip("this machine lets nothing be traced")
        assert done.returncode == 0, done.stderr
        return log.read_text().count("sync(")

    assert synced(what, "with") - synced("nothing", "without") == wanted


# --- disks --------------------------------------------------------------------------------------------------------

FULL = """
import json, resource, sys
from pathlib import Path
from firmware_agent.spool import Spool
place = Path(sys.argv[1])
spool = Spool(place / "spool.db")
body = lambda sequence: json.dumps([sequence, "x" * 500]).encode()
for _ in range(3):
    spool.alarm(body)
def fill():
    if sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    else:
        with open(place / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 1024)
            except OSError:
                pass
def empty():
    if sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        (place / "ballast").unlink()
def numbers():
    return [json.loads(one.body)[0] for one in spool.oldest(1000)]
fill()
for _ in range(97):
    spool.alarm(body)
full = spool.depth()
assert full.unsaved > 0 and full.fault, full
assert numbers() == list(range(1, 101)), numbers()
for one in spool.oldest(100)[:2] + spool.oldest(100)[-2:]:
    spool.delete(one)
assert numbers() == list(range(3, 99)), numbers()
try:
    spool.probe()
except Exception as error:
    print(type(error).__name__)
empty()
spool.alarm(body)
assert spool.depth().unsaved == 0 and spool.depth().fault is None, spool.depth()
assert numbers() == [*range(3, 99), 101], numbers()
again = Spool(place / "spool.db")
assert [json.loads(one.body)[0] for one in again.oldest(1000)] == [*range(3, 99), 101]
again.probe()
assert len(again) == len(spool) == 97
assert again.alarm(body) == 102
"""


def test_alarms_go_on_when_nothing_more_can_be_written_and_reach_the_disk_when_it_can(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), "limit"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "OperationalError\n"


def test_a_full_disk_silences_nobody(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=512k none {tmp_path} && exec " + '"$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody mount a small disk")

    done = subprocess.run(
        [*inside, sys.executable, "-c", FULL, str(tmp_path), "disk"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "OperationalError\n"


def test_without_any_disk_alarms_wait_in_memory_and_the_newest_stay(tmp_path: Path) -> None:
    place = tmp_path / "not yet there"
    with Spool(place / "spool.db") as spool:
        for _ in range(UNSAVED + 5):
            numbered(spool)
        numbered(spool, event=True)
        depth = spool.depth()
        assert (depth.alarms, depth.events, depth.lost) == (UNSAVED, 0, 6)
        assert depth.fault == "unable to open database file"
        first = spool.oldest(1)
        assert json.loads(first[0].body)["sequence"] == 6
        spool.delete(*first)

        place.mkdir()
        assert numbered(spool) == UNSAVED + 6
        assert spool.depth().unsaved == 0

    with Spool(place / "spool.db") as spool:
        assert sequences(spool) == list(range(7, UNSAVED + 7))


def test_what_was_begun_without_a_disk_takes_nothing_from_what_was_on_it(tmp_path: Path) -> None:
    path, away = tmp_path / "here" / "spool.db", tmp_path / "away"
    path.parent.mkdir()
    with Spool(path) as spool:
        for _ in range(3):
            numbered(spool)
    path.parent.rename(away)

    with Spool(path) as spool:
        numbered(spool)
        flying = spool.oldest(9)
        away.rename(path.parent)
        numbered(spool)
        spool.delete(*flying)  # acknowledged when it had got another id: sent once more, and nothing else vanishes

        assert len(spool) == 5
        assert numbered(spool) == 5


# --- the moment ---------------------------------------------------------------------------------------------------


def moments(spool: Spool) -> list[tuple[str, str]]:
    return [(body["at"], body["at_quality"]) for body in (json.loads(one.body) for one in spool.oldest(99))]


def test_estimated_moments_are_put_right_once_the_boot_knows_its_time(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        numbered(spool, quality="estimated")
        numbered(spool, event=True, quality="estimated")
        numbered(spool, quality="rtc")
        assert moments(spool)[0] == ("1970-01-01T00:00:01.000Z", "estimated")

        assert spool.learn("boot-1", 1_800_000_000.0) == 0.0

        assert moments(spool) == [
            ("2027-01-15T08:00:10.000Z", "corrected"),
            ("2027-01-15T08:00:10.000Z", "corrected"),
            ("1970-01-01T00:00:02.000Z", "rtc"),
        ]


def test_messages_of_an_earlier_boot_are_put_right_if_that_boot_has_learned_it(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        numbered(spool, quality="estimated", boot="boot-1")
        spool.learn("boot-1", 1_800_000_000.0)
    with Spool(path) as spool:
        numbered(spool, quality="estimated", boot="boot-2")

        assert moments(spool) == [
            ("2027-01-15T08:00:10.000Z", "corrected"),
            ("1970-01-01T00:00:02.000Z", "estimated"),
        ]


def test_a_clock_that_is_set_again_moves_the_beginning_and_a_slow_one_does_not(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        assert spool.learn("b", 4_000_000_000.0) == 0.0  # a server in the year 2099
        assert spool.learn("b", 4_000_000_000.3) is None
        assert spool.learn("b", 1_800_000_000.0) == -2_200_000_000.0


def test_the_beginnings_of_very_many_boots_do_not_fill_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        spool._write = functools.partial(spool._write, full=False)  # type: ignore[method-assign]
        for number in range(1_200):
            spool.learn(f"boot-{number}", float(number))
    with Spool(path) as spool:
        (count,) = spool._opened().execute("SELECT count(*) FROM boot").fetchone()
        assert count == 1_000
        numbered(spool, quality="estimated", boot="boot-1199")
        assert moments(spool)[0][1] == "corrected"


# --- other releases -----------------------------------------------------------------------------------------------

#: What the release 0.1.0 did with its spool.
OLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.executescript("BEGIN IMMEDIATE;"
    "CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, body BLOB NOT NULL);"
    "CREATE TABLE IF NOT EXISTS sequence (last INTEGER NOT NULL);"
    "INSERT INTO sequence SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM sequence);COMMIT;")
(last,) = database.execute("UPDATE sequence SET last = last + 1 RETURNING last").fetchone()
database.execute("INSERT INTO message (kind, body) VALUES ('alarm', ?)", (b'{"sequence":%d}' % last,))
print(last, *[row[0] for row in database.execute("SELECT kind FROM message ORDER BY id LIMIT 16")])
"""


def test_a_release_before_and_after_this_one_can_use_the_same_spool(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"

    def old() -> str:
        return subprocess.check_output([sys.executable, "-c", OLD, str(path)], text=True).strip()

    assert old() == "1 alarm"
    with Spool(path) as spool:
        assert (numbered(spool), numbered(spool, event=True)) == (2, 1)
    assert old() == "3 alarm alarm event alarm"
    with Spool(path) as spool:
        assert sequences(spool) == [1, 2, 1, 3]
        assert numbered(spool) == 4


def test_a_message_of_a_kind_that_only_a_newer_release_knows_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        spool._opened().execute("INSERT INTO message (kind, body) VALUES ('novelty', x'7b7d')")
    with Spool(path) as spool:
        assert [one.kind for one in spool.oldest(9)] == ["novelty"]
        assert len(spool) == 1
