"""The agent: takes measurements from coordinators' tables, makes them here, gives Records back.

It runs on the device, needs no torch, and measures one job at a time. Of several coordinators the
one that was served for the shortest time comes next.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any, Protocol

from gracile.benchmark.jobs import FILE, LEASE_S, JobTable, Lease, unpacked
from gracile.benchmark.jobs_http import RemoteTable
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.side_by_side import side_by_side
from gracile.errors import UserError

OF_LOAD = ("threads", "hint", "batch", "device")
OF_FILES = {  # runtime -> its package
    "executorch": "executorch",
    "litert": "ai_edge_litert",
    "ncnn": "ncnn",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
POLL_S = 2.0


class Table(Protocol):
    """What an agent asks of a coordinator: `JobTable`, or `RemoteTable`."""

    def lease(self, worker: str, runtimes: Sequence[str], seconds: float = ...) -> Lease | None:
        """Take a job."""

    def renew(self, id: str, token: str, seconds: float = ...) -> bool:
        """Hold a lease longer."""

    def done(self, id: str, token: str, records: Sequence[Any]) -> bool:
        """Give Records."""

    def failed(self, id: str, token: str, error: str) -> bool:
        """Say that an attempt failed."""

    def file(self, sha: str) -> bytes:
        """The content of a file."""


class Agent:
    """Measures jobs of several coordinators.

    Args:
        tables: name -> table.
        runtimes: those it has.
        name: who it is, for people.
        lease_s: how long a lease holds; it is renewed three times as often.
        say: told one line about what is done.
        measure: makes the measurement; for tests.
    """

    def __init__(
        self,
        tables: dict[str, Table],
        runtimes: Sequence[str],
        *,
        name: str | None = None,
        lease_s: float = LEASE_S,
        say: Callable[[str], None] = lambda text: None,
        measure: Callable[[Table, Lease], list[dict[str, Any]]] | None = None,
    ):
        if not tables or not runtimes:
            raise UserError("an agent needs a coordinator to work for, and a runtime.")
        self.tables, self.runtimes, self.lease_s, self.say = tables, runtimes, lease_s, say
        self.name = name or socket.gethostname()
        self.served = dict.fromkeys(tables, 0.0)  # seconds
        self._measure = measure or measured

    def step(self) -> bool:
        """Make one measurement; False if nobody has any."""
        for name in sorted(self.tables, key=lambda n: self.served[n]):
            table = self.tables[name]
            try:
                lease = table.lease(self.name, self.runtimes, self.lease_s)
            except ConnectionError as e:
                self.say(f"{e}; trying again later")
                continue
            if lease is not None:
                self._serve(name, table, lease)
                return True
        return False

    def work(self, idle_s: float | None = None, poll_s: float = POLL_S) -> int:
        """Measure until there was nothing to do for `idle_s` seconds (None: forever).

        Returns:
            How many jobs were taken.
        """
        count, since = 0, perf_counter()
        while True:
            if self.step():
                count, since = count + 1, perf_counter()
                continue
            left = None if idle_s is None else idle_s - (perf_counter() - since)
            if left is not None and left <= 0:
                return count
            sleep(poll_s if left is None else min(poll_s, left))

    def _serve(self, name: str, table: Table, lease: Lease) -> None:
        start = perf_counter()
        try:
            with self._held(table, lease):
                records = self._measure(table, lease)
            kept = table.done(lease.id, lease.token, records)
            self.say(f"{name}: {lease.id}: {'done' if kept else 'too late, the lease had ended'}")
        except ConnectionError as e:
            self.say(f"{name}: {lease.id}: {e}; its lease will end")
        except Exception as e:  # whatever a runtime raises is the job's failure, not the agent's
            self._failed(name, table, lease, f"{type(e).__name__}: {e}")
        finally:
            self.served[name] += perf_counter() - start

    def _failed(self, name: str, table: Table, lease: Lease, error: str) -> None:
        self.say(f"{name}: {lease.id}: {error}")
        try:
            table.failed(lease.id, lease.token, error)
        except (ConnectionError, UserError) as e:
            self.say(f"{name}: {lease.id}: {e}; its lease will end")

    @contextmanager
    def _held(self, table: Table, lease: Lease) -> Iterator[None]:
        """Renew the lease as long as the measurement takes."""
        over = Event()

        def renew() -> None:
            while not over.wait(self.lease_s / 3):
                try:
                    if not table.renew(lease.id, lease.token, self.lease_s):
                        return
                except (ConnectionError, UserError):
                    continue

        thread = Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def measured(table: Table, lease: Lease) -> list[dict[str, Any]]:
    """Fetch a job's artifacts, and measure them side by side in a folder that is thrown away."""
    settings = lease.task["settings"]
    of_load = {k: v for k, v in settings.items() if k in OF_LOAD}
    rest = {k: v for k, v in settings.items() if k not in OF_LOAD}
    with TemporaryDirectory() as folder:
        loaded = {
            name: load(unpacked(facts, table.file, Path(folder) / str(k)), **of_load)
            for k, (name, facts) in enumerate(lease.task["artifacts"])
        }
        records = side_by_side(loaded, batch=settings.get("batch"), **rest)
        return [r.to_dict() for r in records]


def table_at(place: str, secret: str | None = None) -> Table:
    """The table of a coordinator: a URL, or the folder of a table on this machine.

    Raises:
        UserError: a folder without a table.
    """
    if place.startswith(("http://", "https://")):
        return RemoteTable(place, secret)
    if not (Path(place) / FILE).is_file():
        raise UserError(
            f"{place}: no table of jobs; `gracile benchmark ... --jobs {place}` is one."
        )
    return JobTable(place)


def runtimes_here() -> list[str]:
    """The runtimes that are installed and run whole files."""
    from importlib.util import find_spec

    return [name for name, package in OF_FILES.items() if find_spec(package) is not None]
