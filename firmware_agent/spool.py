"""Alarms on their way to the cloud: on the disk before anything else happens, off it when the broker has them.

SQLite with WAL and `synchronous=FULL`: a commit has reached the medium when `alarm` returns, so an alarm survives a
`kill -9` and a pulled plug. The sequence number rises in the same transaction, so it never repeats and a gap can only
mean loss.

The spool is bounded. When it is full, the oldest heartbeats go first (nobody needs to know how warm the unit was last
week), and only when there are none left the oldest alarms.
"""

import sqlite3
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from firmware_agent import topics

CAPACITY: Final = 100_000  # alarms of 300 bytes: 30 MB

_SCHEMA: Final = """
    CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, body BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS sequence (last INTEGER NOT NULL);
    INSERT INTO sequence SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM sequence);
"""


@dataclass(frozen=True)
class Spooled:
    """A message that waits; `id` rises with age's opposite: the smallest is the oldest."""

    id: int
    kind: str
    body: bytes


class Spool:
    """The queue in the file `path`; usable from several threads of one process.

    Args:
        path: the database; made when absent.
        capacity: how many messages at most.

    Raises:
        sqlite3.Error: the file is no database, or the disk is full.
    """

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def alarm(self, body: Callable[[int], bytes]) -> int:
        """Keep an alarm, durably. `body` makes it from its sequence number, which is returned."""
        with self._lock, self._transaction() as database:
            (last,) = database.execute("UPDATE sequence SET last = last + 1 RETURNING last").fetchone()
            database.execute("INSERT INTO message (kind, body) VALUES (?, ?)", (topics.ALARM, body(last)))
            self._shrink(database)
        return int(last)

    def heartbeat(self, body: bytes) -> None:
        """Keep a heartbeat while there is room."""
        with self._lock, self._transaction() as database:
            database.execute("INSERT INTO message (kind, body) VALUES (?, ?)", (topics.HEARTBEAT, body))
            self._shrink(database)

    def oldest(self, count: int, *, after: int = 0, without: Collection[str] = ()) -> list[Spooled]:
        """Up to `count` messages, the oldest first: those with an id over `after` whose kind is not in `without`."""
        marks = ",".join("?" * len(without))
        query = f"SELECT id, kind, body FROM message WHERE id > ? AND kind NOT IN ({marks}) ORDER BY id LIMIT ?"  # noqa: S608
        with self._lock:
            rows = self._database.execute(query, (after, *without, count)).fetchall()
        return [Spooled(*row) for row in rows]

    def delete(self, *messages: Spooled) -> None:
        """Forget messages that the broker has, with one fsync for all."""
        with self._lock, self._transaction() as database:
            database.executemany("DELETE FROM message WHERE id = ?", [(message.id,) for message in messages])

    def __len__(self) -> int:
        with self._lock:
            (count,) = self._database.execute("SELECT count(*) FROM message").fetchone()
        return int(count)

    def close(self) -> None:
        """Close the database; what is in it stays."""
        with self._lock:
            self._database.close()

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._database)

    def _shrink(self, database: sqlite3.Connection) -> None:
        (count,) = database.execute("SELECT count(*) FROM message").fetchone()
        if count > self._capacity:
            database.execute(
                "DELETE FROM message WHERE id IN (SELECT id FROM message ORDER BY kind <> ?, id LIMIT ?)",
                (topics.HEARTBEAT, count - self._capacity),
            )


class _Transaction:
    """All or nothing, locked from the start so that two writers wait instead of failing."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._database.execute("COMMIT")
        elif self._database.in_transaction:  # SQLite has rolled back by itself when the disk was full
            self._database.execute("ROLLBACK")
