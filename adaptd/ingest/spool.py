"""Records on their way: de-duplicated, joined, sampled and put in order of time on disk, so that memory stays bounded.

One SQLite file. What has been read and what has been learned from is committed together with its results, so an interrupted
run goes on at the record where it stopped.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptd.errors import LogRefused
from adaptd.ingest.read import Found, Place
from adaptd.ingest.record import Half, Record, Refused, join, unpack

_SCHEMA = """
CREATE TABLE IF NOT EXISTS record(seq INTEGER PRIMARY KEY, digest BLOB UNIQUE, at REAL, lot INTEGER, domain TEXT, place TEXT,
  score REAL, body BLOB);
CREATE TABLE IF NOT EXISTS half(key TEXT PRIMARY KEY, side TEXT, place TEXT, format TEXT, body BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refused(reason TEXT PRIMARY KEY, count INTEGER, first TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counted(what TEXT, name TEXT, count INTEGER, PRIMARY KEY(what, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcome(rank INTEGER PRIMARY KEY, at REAL, domain TEXT, held INTEGER, emitted REAL, before REAL,
  after REAL, trace BLOB);
CREATE TABLE IF NOT EXISTS note(name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
#: Lots are drawn from the digest: 52 bits, as whole numbers SQLite compares exactly.
LOTS = 1 << 52
_CACHE_KIB = 32 * 1024


class Queued(NamedTuple):
    """One record in its place."""

    rank: int
    """Place in the order of time, from 0."""
    seq: int
    digest: bytes
    """Of its content, 16 bytes."""
    place: str
    record: Record


class Spool:
    """The records of one replay.

    Args:
      path: the file; made if it is not there.
      with_answer: whether the same question with another answer is another record.
      share: of the records, chosen by their content, that are kept.
      unusable: why a record is not replayed, in a few words; empty if it is.
    """

    def __init__(
        self, path: Path, *, with_answer: bool, share: float = 1.0, unusable: Callable[[Record], str] = lambda _: ""
    ) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        self._db.execute("PRAGMA temp_store=FILE")
        self._db.executescript(_SCHEMA)
        self._with_answer, self._share, self._unusable = with_answer, share, unusable
        self._last_at = -math.inf
        self.kept = self.count()
        self._begin()

    # -- notes and transactions ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._db.execute("BEGIN")

    def commit(self, **notes: Any) -> None:
        """Make everything since the last commit durable, together with these notes."""
        for name, value in notes.items():
            self._db.execute("INSERT OR REPLACE INTO note VALUES(?, ?)", (name, json.dumps(value)))
        self._db.execute("COMMIT")
        self._begin()

    def note(self, name: str, default: Any = None) -> Any:
        """What was last noted under a name."""
        row = self._db.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def close(self) -> None:
        """Forget what was not committed."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._db.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def start_file(self) -> None:
        """A record without a time stands where the last one of its file stood."""
        self._last_at = -math.inf

    def add(self, found: Found) -> None:
        """Take what a row held."""
        if isinstance(found.item, Refused):
            self.refuse(found.item.reason, found.place)
        elif isinstance(found.item, Half):
            self._add_half(found, found.item)
        else:
            self._add(found.item, str(found.place), found.format)

    def refuse(self, reason: str, place: Place | str) -> None:
        """Count something that is not used, and remember where the first of its kind stands."""
        self._db.execute(
            "INSERT INTO refused VALUES(?, 1, ?) ON CONFLICT(reason) DO UPDATE SET count = count + 1",
            (reason, str(place)),
        )

    def tally(self, what: str, name: str, n: int = 1) -> None:
        """Count something under a name."""
        self._db.execute(
            "INSERT INTO counted VALUES(?, ?, ?) ON CONFLICT(what, name) DO UPDATE SET count = count + excluded.count",
            (what, name, n),
        )

    def _add(self, record: Record, place: str, format_: str) -> None:
        if reason := self._unusable(record):
            self.refuse(reason, place)
            return
        digest = record.digest(with_answer=self._with_answer)
        lot = int.from_bytes(digest[:8], "big") >> 12
        if lot >= self._share * LOTS:
            self.refuse("left out by --sample", place)
            return
        self._last_at = self._last_at if math.isnan(record.at) else record.at
        row = (digest, self._last_at, lot, record.domain, place, record.pack())
        stored = self._db.execute(
            "INSERT OR IGNORE INTO record(digest, at, lot, domain, place, body) VALUES(?, ?, ?, ?, ?, ?)", row
        ).rowcount
        if not stored:
            self.refuse("a duplicate", place)
            return
        self.kept += 1
        self.tally("format", format_)

    def _add_half(self, found: Found, half: Half) -> None:
        row = self._db.execute("SELECT side, place, body FROM half WHERE key = ?", (half.key,)).fetchone()
        if row is None:
            self._store_half(half, found)
            return
        side, place, body = row
        others = [unpack(bytes.fromhex(packed)) for packed in json.loads(body)]
        if side == half.side and half.in_parts:
            self._store_half(Half(half.key, half.side, [join(others[0], half.records[0])], True), found)
            return
        if side == half.side:
            raise LogRefused(
                f"{found.place}: {half.key!r} is there twice, first in {place}: answers cannot be told apart; "
                "replay one batch at a time"
            )
        self._db.execute("DELETE FROM half WHERE key = ?", (half.key,))
        asked, answers = (others, half.records) if side == "question" else (half.records, others)
        for answer in answers:
            self._add(join(asked[0], answer), str(found.place), found.format)

    def _store_half(self, half: Half, found: Found) -> None:
        body = json.dumps([r.pack().hex() for r in half.records])
        row = (half.key, half.side, str(found.place), found.format, body)
        self._db.execute("INSERT OR REPLACE INTO half VALUES(?, ?, ?, ?, ?)", row)

    def settle(self) -> None:
        """Everything is read: questions that nobody answered stand alone, answers to nothing are refused."""
        while rows := self._db.execute("SELECT key, side, place, format, body FROM half LIMIT 256").fetchall():
            for key, side, place, format_, body in rows:
                self._db.execute("DELETE FROM half WHERE key = ?", (key,))
                if side == "answer":
                    self.refuse("an answer without its request", place)
                    continue
                self._add(unpack(bytes.fromhex(json.loads(body)[0])), place, format_)

    # -- choosing and ordering ----------------------------------------------------------------------------------------

    def keep_lowest(self, n: int, reason: str, *, by: str = "lot") -> None:
        """Keep `n` records, those with the lowest lot (a uniform sample) or the highest score; refuse the others."""
        order = "lot" if by == "lot" else "score DESC, lot"
        surplus = self.count() - n
        if surplus <= 0:
            return
        self._db.execute(
            f"DELETE FROM record WHERE seq NOT IN (SELECT seq FROM record ORDER BY {order} LIMIT ?)",
            (n,),
        )
        self._db.execute(
            "INSERT INTO refused VALUES(?, ?, '') ON CONFLICT(reason) DO UPDATE SET count = count + excluded.count",
            (reason, surplus),
        )
        self.kept = n

    def order(self) -> None:
        """Make the order of time quick to walk."""
        self._db.execute("CREATE INDEX IF NOT EXISTS by_time ON record(at, seq)")

    def score(self, scores: Iterable[tuple[int, float]]) -> None:
        """Set scores by sequence number."""
        self._db.executemany("UPDATE record SET score = ? WHERE seq = ?", [(value, seq) for seq, value in scores])

    def walk(self, start: int = 0, batch: int = 64) -> Iterator[list[Queued]]:
        """Batches of records in order of time, from the `start`th on; needs `order`."""
        rank = start
        at = (-math.inf, -1)
        query = (
            "SELECT seq, at, digest, place, body FROM record WHERE (at, seq) > (?, ?) ORDER BY at, seq LIMIT ? OFFSET ?"
        )
        while True:
            rows = self._db.execute(query, (*at, batch, start)).fetchall()
            if not rows:
                return
            at, start = (rows[-1][1], rows[-1][0]), 0
            yield [
                Queued(rank + i, seq, digest, place, unpack(body))
                for i, (seq, _, digest, place, body) in enumerate(rows)
            ]
            rank += len(rows)

    # -- results ------------------------------------------------------------------------------------------------------

    def keep_outcomes(self, rows: Iterable[Sequence[Any]]) -> None:
        """Remember (rank, at, domain, held out, emitted, rounds before, rounds after, encoded trace or None)."""
        self._db.executemany("INSERT OR REPLACE INTO outcome VALUES(?, ?, ?, ?, ?, ?, ?, ?)", list(rows))

    def outcomes(self, blocks: int, last: int) -> list[tuple[str, int, int, float, float, float, int, float]]:
        """Sums of what was not held out: (domain, block, time bin, emitted, before, after, records, last time).

        Args:
          blocks: records of a domain are dealt out to so many blocks: as few numbers as that hold an interval.
          last: number of bins of equal numbers of records, in order of time.
        """
        total = max(1, self._db.execute("SELECT MAX(rank) + 1 FROM outcome").fetchone()[0] or 1)
        return self._db.execute(
            "SELECT domain, rank % ?, rank * ? / ?, SUM(emitted), SUM(before), SUM(after), COUNT(*), MAX(at) FROM outcome "
            "WHERE held = 0 GROUP BY 1, 2, 3",
            (blocks, last, total),
        ).fetchall()

    def held_traces(self) -> Iterator[bytes]:
        """Encoded traces of what was held out, in order of time."""
        for (trace,) in self._db.execute("SELECT trace FROM outcome WHERE held = 1 ORDER BY rank"):
            yield trace

    def count(self) -> int:
        """Records."""
        return int(self._db.execute("SELECT COUNT(*) FROM record").fetchone()[0])

    def refusals(self) -> dict[str, dict[str, Any]]:
        """What was not used: reason -> how many, and where the first stands."""
        rows = self._db.execute("SELECT reason, count, first FROM refused ORDER BY count DESC, reason").fetchall()
        return {reason: {"count": count, "first": first} for reason, count, first in rows}

    def counts(self, what: str) -> dict[str, int]:
        """What was tallied, by name."""
        rows = self._db.execute("SELECT name, count FROM counted WHERE what = ? ORDER BY count DESC", (what,))
        return dict(rows.fetchall())
