"""Alarms on their way to the cloud: on the disk before anything else happens, off it when the broker has them.

SQLite with WAL and `synchronous=FULL`: a commit has reached the medium when `alarm` returns, so an alarm survives a
`kill -9` and a pulled plug, at the price of one fsync. What may be lost costs none: a heartbeat, or the news that a
message was delivered (it would be sent once more, with the same id). The sequence number rises in the same transaction,
so it never repeats and a gap can only mean loss.

The spool is bounded. When it is full, the oldest heartbeats go first (nobody needs to know how warm the unit was last
week), then the oldest events, and only when there is nothing else the oldest alarms.

A disk that is full, read-only or gone does not silence the unit: what cannot be written stays in memory, is handed out
like the rest, and is written as soon as that works again. A database that is damaged is put aside, and what can still
be read of it goes into a new one.

Older releases may open this file after a roll back: tables are only ever added to it.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from firmware_agent import files, messages, topics

_log = logging.getLogger(__name__)

#: A week without a cloud in a busy house, and more; at 300 bytes each some 40 MB.
CAPACITY: Final = 120_000

#: What is kept in memory while the disk takes nothing.
UNSAVED: Final = 1_000

#: Of how many boots the beginning is remembered.
_BOOTS: Final = 1_000

#: A boot's beginning that moves by less is a clock that runs a little fast or slow.
_SLACK_SECONDS: Final = 1.0

_SCHEMA: Final = """
    CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, body BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS message_kind ON message (kind);
    CREATE TABLE IF NOT EXISTS sequence (last INTEGER NOT NULL);
    INSERT INTO sequence SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM sequence);
    CREATE TABLE IF NOT EXISTS event_sequence (last INTEGER NOT NULL);
    INSERT INTO event_sequence SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM event_sequence);
    CREATE TABLE IF NOT EXISTS boot (id TEXT PRIMARY KEY, began REAL NOT NULL);
"""

#: Which table counts which kind.
_SEQUENCES: Final = MappingProxyType({topics.ALARM: "sequence", topics.EVENT: "event_sequence"})

#: Primary result codes that say that the file itself is bad (https://www.sqlite.org/rescode.html).
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
#: ... and those after which the same connection can be used on.
_PASSING: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY})


@dataclass(frozen=True)
class Spooled:
    """A message that waits. `id` tells it from all others; those on the disk have a rising one above zero."""

    id: int
    kind: str
    body: bytes


@dataclass(frozen=True)
class Depth:
    """What waits.

    Attributes:
        alarms, events, heartbeats: how many of each.
        unsaved: how many of them are in memory alone, because the disk does not take them.
        lost: how many alarms and events were dropped since the agent started, because there were too many.
        fault: what the disk says, while it takes nothing.
    """

    alarms: int
    events: int
    heartbeats: int
    unsaved: int
    lost: int
    fault: str | None


class Spool:
    """The queue in the file `path`; usable from several threads of one process, which is its only writer.

    Args:
        path: the database; made when absent.
        capacity: how many messages at most.
    """

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        self._path = path
        self._capacity = capacity
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._full = True  # whether its commits reach the medium
        self._counts: dict[str, int] = {}
        self._last = dict.fromkeys(_SEQUENCES, 0)
        self._last_id = 0
        self._boots: dict[str, float] = {}
        # What the disk is still to be told:
        self._unsaved: list[Spooled] = []
        self._delivered: set[int] = set()
        self._new_boots: dict[str, float] = {}
        self._lost = 0
        self._fault: str | None = None
        with contextlib.suppress(sqlite3.Error):
            self._opened()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- in ---------------------------------------------------------------------------------------------------------

    def alarm(self, body: Callable[[int], bytes]) -> int:
        """Keep an alarm, durably where the disk allows. `body` makes it from its sequence number, which is returned."""
        return self._keep(topics.ALARM, body)

    def event(self, body: Callable[[int], bytes]) -> int:
        """Keep an event in the same way; events have a sequence of their own."""
        return self._keep(topics.EVENT, body)

    def heartbeat(self, body: bytes) -> None:
        """Keep a heartbeat while there is room; not on the medium at once.

        Raises:
            sqlite3.Error: the disk does not take it.
        """
        with self._lock:
            self._write(lambda database: self._insert(database, self._spooled(topics.HEARTBEAT, body)), full=False)

    def learn(self, boot_id: str, began: float) -> float | None:
        """The boot `boot_id` began at the Unix time `began`, in seconds.

        From now on the estimated moments of that boot's messages are put right when they are handed out.

        Returns:
            None when that is no news, else by how many seconds the beginning has moved (0 for the first time).
        """
        with self._lock:
            known = self._boots.get(boot_id)
            if known is not None and abs(known - began) < _SLACK_SECONDS:
                return None
            self._boots[boot_id] = self._new_boots[boot_id] = began
            with contextlib.suppress(sqlite3.Error):
                self._write()
            return began - known if known is not None else 0.0

    # --- out --------------------------------------------------------------------------------------------------------

    def oldest(self, count: int, *, without: Collection[str] = ()) -> list[Spooled]:
        """Up to `count` messages, the oldest first, of all kinds but `without`, their moments put right."""
        with self._lock:
            found = self._stored(count, without)
            found += [one for one in self._unsaved if one.kind not in without][: count - len(found)]
            return [Spooled(one.id, one.kind, messages.put_right(one.body, self._boots)) for one in found]

    def delete(self, *delivered: Spooled) -> None:
        """Forget what the broker has; not on the medium at once."""
        with self._lock:
            ids = {one.id for one in delivered}
            in_memory = {one.id for one in self._unsaved if one.id in ids}
            self._unsaved = [one for one in self._unsaved if one.id not in in_memory]
            self._delivered |= {one for one in ids - in_memory if one > 0}
            if self._delivered:
                with contextlib.suppress(sqlite3.Error):
                    self._write(full=False)

    def __len__(self) -> int:
        with self._lock:
            return sum(self._counts.values()) + len(self._unsaved) - len(self._delivered)

    def depth(self) -> Depth:
        """What waits, counted without a look at the disk."""
        with self._lock:
            counts = dict(self._counts)
            for one in self._unsaved:
                counts[one.kind] = counts.get(one.kind, 0) + 1
            return Depth(
                alarms=counts.get(topics.ALARM, 0),
                events=counts.get(topics.EVENT, 0),
                heartbeats=counts.get(topics.HEARTBEAT, 0),
                unsaved=len(self._unsaved),
                lost=self._lost,
                fault=self._fault,
            )

    def probe(self) -> None:
        """Write a message to the medium, read it and take it back; nobody else sees it.

        Raises:
            sqlite3.Error: an alarm could not be made durable now.
        """

        def try_out(database: sqlite3.Connection) -> None:
            database.execute("SAVEPOINT probe")
            database.execute("INSERT INTO message (kind, body) VALUES ('probe', x'00')")
            (found,) = database.execute("SELECT count(*) FROM message WHERE kind = 'probe'").fetchone()
            database.execute("ROLLBACK TO probe")
            database.execute("RELEASE probe")
            database.execute("UPDATE sequence SET last = last")  # so that the commit has something to write
            if found != 1:
                raise sqlite3.DataError("the spool does not give back what it was given")

        with self._lock:
            self._write(try_out)

    def close(self) -> None:
        """Close the database; what is in it stays, and what is in memory gets its last chance."""
        with self._lock:
            if self._unsaved or self._delivered:
                with contextlib.suppress(sqlite3.Error):
                    self._write()
            if self._unsaved:
                _log.error("%d messages are lost: the disk has taken nothing until the end", len(self._unsaved))
            self._shut()

    # --- what is written ----------------------------------------------------------------------------------------------

    def _keep(self, kind: str, body: Callable[[int], bytes]) -> int:
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self._opened()  # so that the disk's last number is known
            sequence = self._last[kind] + 1
            kept = self._spooled(kind, body(sequence))
            self._last[kind] = sequence
            self._unsaved.append(kept)
            try:
                self._write()
            except sqlite3.Error:
                if self._fault is None:  # a damaged file was exchanged
                    with contextlib.suppress(sqlite3.Error):
                        self._write()
            if len(self._unsaved) > UNSAVED:
                self._unsaved.remove(min(self._unsaved, key=lambda one: one.kind == topics.ALARM))
                self._lost += 1
            return sequence

    def _spooled(self, kind: str, body: bytes) -> Spooled:
        """A message with an id that no other has: below zero while the disk's ids are not known."""
        step = 1 if self._database is not None else -1
        self._last_id = step if self._last_id * step < 0 else self._last_id + step
        return Spooled(self._last_id, kind, body)

    def _write(self, work: Callable[[sqlite3.Connection], None] = lambda _: None, *, full: bool = True) -> None:
        """One transaction: what the disk is still to be told, then `work`; on the medium if `full`.

        Raises:
            sqlite3.Error: nothing was written, and what was to be told still is.
        """
        database = self._opened()
        counts = dict(self._counts)
        try:
            # With NORMAL a commit in WAL mode is atomic, but reaches the medium with the next full one only.
            if full != self._full:
                database.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
                self._full = full
            database.execute("BEGIN IMMEDIATE")  # locked from the start, so that two writers wait instead of failing
            self._catch_up(database)
            work(database)
            lost = self._shrink(database)
            database.execute("COMMIT")
        except BaseException as error:
            self._counts = counts
            if database.in_transaction:  # a full disk has rolled back by itself
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                self._failed(error)
            raise
        self._lost += lost
        self._unsaved.clear()
        self._delivered.clear()
        self._new_boots.clear()
        if self._fault is not None:
            _log.warning("the spool's disk works again")
            self._fault = None

    def _catch_up(self, database: sqlite3.Connection) -> None:
        for message in self._unsaved:
            self._insert(database, message)
        if self._unsaved:
            for kind, table in _SEQUENCES.items():
                database.execute(f"UPDATE {table} SET last = ? WHERE last < ?", (self._last[kind],) * 2)  # noqa: S608
        for number in self._delivered:
            for (kind,) in database.execute("DELETE FROM message WHERE id = ? RETURNING kind", (number,)).fetchall():
                self._counts[kind] -= 1
        if self._new_boots:
            database.executemany("INSERT OR REPLACE INTO boot VALUES (?, ?)", self._new_boots.items())
            database.execute(
                "DELETE FROM boot WHERE rowid NOT IN (SELECT rowid FROM boot ORDER BY rowid DESC LIMIT ?)", (_BOOTS,)
            )

    def _insert(self, database: sqlite3.Connection, message: Spooled) -> None:
        # A commit that failed may have worked all the same: then the row is there already.
        found = database.execute(
            "INSERT OR IGNORE INTO message VALUES (?, ?, ?)", (message.id, message.kind, message.body)
        )
        self._counts[message.kind] = self._counts.get(message.kind, 0) + found.rowcount

    def _shrink(self, database: sqlite3.Connection) -> int:
        """Drop what is too much; how many alarms and events that costs."""
        excess = sum(self._counts.values()) - self._capacity
        lost = 0
        for kind in sorted(self._counts, key=_rank):
            drop = min(excess, self._counts[kind])
            if drop > 0:
                database.execute(
                    "DELETE FROM message WHERE id IN (SELECT id FROM message WHERE kind = ? ORDER BY id LIMIT ?)",
                    (kind, drop),
                )
                self._counts[kind] -= drop
                excess -= drop
                lost += drop if kind != topics.HEARTBEAT else 0
        return lost

    def _stored(self, count: int, without: Collection[str] = ()) -> list[Spooled]:
        marks = ",".join("?" * len(without))
        query = f"SELECT id, kind, body FROM message WHERE kind NOT IN ({marks}) ORDER BY id LIMIT ?"  # noqa: S608
        try:
            rows = self._opened().execute(query, (*without, count + len(self._delivered)))
            found = [Spooled(*row) for row in rows if row[0] not in self._delivered]
        except sqlite3.Error as error:
            self._failed(error)
            return []
        return found[:count]

    # --- the file ---------------------------------------------------------------------------------------------------

    def _opened(self) -> sqlite3.Connection:
        """The database, opened now if it is not.

        Raises:
            sqlite3.Error: the disk does not let it.
        """
        if self._database is None:
            try:
                self._open()
            except sqlite3.Error as error:
                self._failed(error)
                if self._database is None:
                    raise
        assert self._database is not None  # noqa: S101 - for the type checker
        return self._database

    def _open(self, salvaged: Iterable[Spooled] = ()) -> None:
        database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
            database.executemany(
                "INSERT OR IGNORE INTO message VALUES (?, ?, ?)", ((one.id, one.kind, one.body) for one in salvaged)
            )
            self._counts = dict(database.execute("SELECT kind, count(*) FROM message GROUP BY kind").fetchall())
            for kind, table in _SEQUENCES.items():
                (last,) = database.execute(f"SELECT last FROM {table}").fetchone()  # noqa: S608 - a constant
                self._last[kind] = max(self._last[kind], last)
            (last,) = database.execute("SELECT max(seq, 0) FROM sqlite_sequence").fetchone() or (0,)
            self._boots = dict(database.execute("SELECT id, began FROM boot").fetchall()) | self._boots
        except BaseException:
            database.close()
            raise
        self._database, self._full = database, True
        self._last_id = max(last, *(one.id for one in self._unsaved), 0)
        # A delivery of these that is under way will not be recognised, and they are sent once more: no harm.
        self._unsaved = [self._spooled(one.kind, one.body) if one.id < 0 else one for one in self._unsaved]

    def _shut(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _failed(self, error: sqlite3.Error) -> None:
        """Say what the disk says, once, and do what helps."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the primary one
        if str(error) != self._fault:
            _log.error("the spool's disk takes nothing: %s", error)
        self._fault = str(error)
        if code in _DAMAGED:
            self._begin_anew()
        elif code not in _PASSING:
            self._shut()

    def _begin_anew(self) -> None:
        """Put the damaged file aside, and take what it still gives into a new one."""
        self._shut()
        aside = self._path.with_name(self._path.name + ".damaged")
        with contextlib.suppress(OSError, sqlite3.Error):
            for suffix in ("-wal", "-shm", ""):
                old = self._path.with_name(self._path.name + suffix)
                new = aside.with_name(aside.name + suffix)
                new.unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    old.rename(new)
            files.sync_directory(self._path.parent)
            _log.error("the spool was damaged; it is kept as %s and a new one begun", aside.name)
            self._open(_salvage(aside))
            self._new_boots = dict(self._boots)
            self._fault = None


def _rank(kind: str) -> int:
    """What goes first when there is too much; what only a newer release knows counts as an event."""
    return {topics.HEARTBEAT: 0, topics.ALARM: 2}.get(kind, 1)


def _salvage(path: Path) -> list[Spooled]:
    """The messages that a damaged database still gives, up to the first that it does not."""
    found: list[Spooled] = []
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
        found.extend(Spooled(*row) for row in database.execute("SELECT id, kind, body FROM message NOT INDEXED"))
    return found
