"""A table of measurements to be made, in one SQLite file: who waits, who measures, what came out.

One side adds artifacts and settings, the other leases a job, measures and gives Records. A lease
that is not renewed ends, so a device that dies loses nothing; a job that fails too often is given
up. The same artifacts with the same settings are one job.
"""

import json
import secrets
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep, time
from typing import Any

from gracile.benchmark.artifact import CASCADE, Artifact, files
from gracile.core.record import Record
from gracile.core.state import sha256, write_atomic
from gracile.errors import UserError

FILE = "jobs.sqlite"
STORE = "files"  # artifacts by the hash of their content
LEASE_S = 60.0
ATTEMPTS = 3
BUSY_S = 30.0
SETTINGS = ("threads", "hint", "batch", "device", "rounds", "layers", "streams", "memory",
            "reference")  # fmt: skip
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, number INTEGER, runtime TEXT NOT NULL, task TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting', attempts INTEGER NOT NULL DEFAULT 0,
    token TEXT, worker TEXT, until REAL, records TEXT, error TEXT
)
"""


@dataclass(frozen=True)
class Lease:
    """A job that was taken.

    Attributes:
        id: of the job.
        token: proves that the job is still this lease's.
        seconds: how long it holds unless it is renewed.
        task: what to measure: ``artifacts`` (name -> its facts and files) and ``settings``.
    """

    id: str
    token: str
    seconds: float
    task: dict[str, Any]


@dataclass(frozen=True)
class JobState:
    """How far a job is: "waiting", "leased", "done" or "failed".

    Attributes:
        attempts: leases so far.
        worker: who has or had the last.
        records: what came out; empty before it is done.
        error: of the last attempt that failed.
    """

    id: str
    state: str
    attempts: int = 0
    worker: str | None = None
    records: tuple[Record, ...] = field(default=(), repr=False)
    error: str | None = None


class JobTable:
    """The jobs in a folder.

    Args:
        folder: made if it is not there; holds the table and the artifacts' files.
        attempts: leases after which a job that never ended well is given up.
    """

    def __init__(self, folder: str | Path, attempts: int = ATTEMPTS):
        self.folder, self.attempts = Path(folder), attempts
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(SCHEMA)

    def add(self, artifacts: Mapping[str, Artifact], **settings: Any) -> str:
        """Ask for a measurement; one that was asked for before is not made again.

        Args:
            artifacts: name -> artifact, all of one runtime; the first is the baseline.
            settings: threads, hint, batch, device, and those of `side_by_side`: rounds, layers,
                streams, memory, reference.

        Returns:
            The job's id.

        Raises:
            UserError: no artifacts, of several runtimes, or an unknown setting.
        """
        runtimes = {a.runtime for a in artifacts.values()}
        if len(runtimes) != 1:
            raise UserError(f"a job is about one runtime, got {sorted(runtimes) or 'no artifact'}.")
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise UserError(f"unknown setting '{unknown[0]}'; known: {', '.join(SETTINGS)}.")
        task = {
            "artifacts": [[name, self._stored(a)] for name, a in artifacts.items()],
            "settings": settings,
        }
        text = json.dumps(task, sort_keys=True)
        id = sha256(text)[:16]
        with self._open() as db:
            db.execute(
                "INSERT OR IGNORE INTO jobs (id, number, runtime, task) "
                "VALUES (?, (SELECT COALESCE(MAX(number), 0) + 1 FROM jobs), ?, ?)",
                (id, runtimes.pop(), text),
            )
        return id

    def lease(self, worker: str, runtimes: Sequence[str], seconds: float = LEASE_S) -> Lease | None:
        """Take the oldest job that waits, or whose lease has ended; None if there is none.

        Args:
            worker: who asks, for people.
            runtimes: those it has; jobs of others are left.
            seconds: until the job is somebody else's, unless `renew` is called.
        """
        now, token = time(), secrets.token_hex(8)
        with self._open() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', error = COALESCE(error, 'its lease ended') "
                "WHERE state = 'leased' AND until < ? AND attempts >= ?",
                (now, self.attempts),
            )
            marks = ", ".join("?" * len(runtimes))
            row = db.execute(
                "SELECT id, task FROM jobs WHERE (state = 'waiting' OR (state = 'leased' AND "
                f"until < ?)) AND runtime IN ({marks}) ORDER BY number LIMIT 1",
                (now, *runtimes),
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state = 'leased', attempts = attempts + 1, token = ?, worker = ?, "
                "until = ? WHERE id = ?",
                (token, worker, now + seconds, row[0]),
            )
        return Lease(row[0], token, seconds, json.loads(row[1]))

    def renew(self, id: str, token: str, seconds: float = LEASE_S) -> bool:
        """Hold a lease longer; False if the job is no longer this lease's."""
        return self._change("until = ?", (time() + seconds,), id, token)

    def done(self, id: str, token: str, records: Sequence[Mapping[str, Any]]) -> bool:
        """Give the Records; False (and nothing changes) if the job is no longer this lease's.

        Raises:
            UserError: something that is no Record.
        """
        for r in records:
            Record.from_dict(dict(r))
        return self._change("state = 'done', records = ?", (json.dumps(list(records)),), id, token)

    def failed(self, id: str, token: str, error: str) -> bool:
        """Say that an attempt failed: the job waits again, or is given up."""
        return self._change(
            "error = ?, state = CASE WHEN attempts >= ? THEN 'failed' ELSE 'waiting' END",
            (error, self.attempts), id, token,
        )  # fmt: skip

    def state(self, id: str) -> JobState:
        """How far a job is.

        Raises:
            UserError: no such job.
        """
        with self._open() as db:
            row = db.execute(
                "SELECT state, attempts, worker, records, error FROM jobs WHERE id = ?", (id,)
            ).fetchone()
        if row is None:
            raise UserError(f"{self.folder}: no job '{id}'.")
        records = tuple(Record.from_dict(r) for r in json.loads(row[3] or "[]"))
        return JobState(id, row[0], row[1], row[2], records, row[4])

    def wait(self, id: str, limit_s: float | None = None, poll_s: float = 0.5) -> list[Record]:
        """The Records of a job, as soon as somebody has measured it.

        Args:
            limit_s: how long to wait; None: as long as it takes.

        Raises:
            UserError: it was given up, or was not done in time; the job stays.
        """
        end = None if limit_s is None else time() + limit_s
        while True:
            now = self.state(id)
            if now.state == "done":
                return list(now.records)
            if now.state == "failed":
                raise UserError(
                    f"{self.folder}: job {id} was given up after {now.attempts} attempts: "
                    f"{now.error}"
                )
            if end is not None and time() >= end:
                raise UserError(
                    f"{self.folder}: job {id} is {now.state} after {limit_s:g} s; start `gracile "
                    f"agent {self.folder}` on the device and ask again."
                )
            sleep(poll_s)

    def file(self, sha: str) -> bytes:
        """The content of an artifact's file.

        Raises:
            UserError: no such file.
        """
        path = self.folder / STORE / sha
        if not sha.isalnum() or not path.is_file():
            raise UserError(f"no file '{sha}'.")
        return path.read_bytes()

    def _stored(self, artifact: Artifact) -> dict[str, Any]:
        """Keep an artifact's files by content, and say what it is; without this machine's path."""
        if artifact.path.name == CASCADE:
            raise UserError(f"{artifact.path}: a cascade is measured here, not by an agent.")
        parts = []
        for path in files(artifact.path):
            data = path.read_bytes()
            sha = sha256(data)
            if not (self.folder / STORE / sha).exists():
                write_atomic(self.folder / STORE / sha, data)
            parts.append([path.suffix, sha])
        facts = artifact.to_dict()
        del facts["path"], facts["size_bytes"]
        return {**facts, "files": parts}

    def _change(self, what: str, values: Sequence[Any], id: str, token: str) -> bool:
        with self._open() as db:
            changed = db.execute(
                f"UPDATE jobs SET {what} WHERE id = ? AND token = ? AND state = 'leased'",
                (*values, id, token),
            )
            return changed.rowcount == 1

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.folder / FILE, timeout=BUSY_S, isolation_level=None)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody else writes in; undone if it raises."""
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")


def unpacked(facts: Mapping[str, Any], content: Any, folder: Path) -> Artifact:
    """Write an artifact's files into a folder and open it.

    Args:
        facts: as a task holds them.
        content: hash -> bytes of a file; they are checked.
        folder: emptied first.

    Raises:
        UserError: a name or a content that is not what the task says.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for suffix, sha in facts["files"]:
        if not str(suffix).removeprefix(".").isalnum():
            raise UserError(f"a file's ending must be letters and digits, got '{suffix}'.")
        data = content(sha)
        if sha256(data) != sha:
            raise UserError(f"the file {sha} arrived with another content.")
        (folder / f"model{suffix}").write_bytes(data)
    path = folder / f"model{facts['files'][0][0]}"
    return Artifact.from_dict({**facts, "path": str(path)})
