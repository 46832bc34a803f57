"""The table of jobs over HTTP: the coordinator serves it, devices take jobs from it.

Plain JSON over the standard library's server. Whoever reaches the port can take jobs and give
Records, so it listens on this machine only unless told otherwise, and asks for a secret if one is
set.
"""

import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from gracile.benchmark.jobs import LEASE_S, JobTable, Lease
from gracile.errors import UserError

SECRET = "X-Gracile-Secret"
TIMEOUT_S = 30.0
LARGEST = 64 << 20  # bytes of a request
FILES = "/files/"


def server(
    table: JobTable, host: str = "127.0.0.1", port: int = 0, secret: str | None = None
) -> ThreadingHTTPServer:
    """A server of a table; call its `serve_forever`, or run that in a thread.

    Args:
        table: of the jobs.
        host: "0.0.0.0" to be reached from other machines.
        port: 0 for any that is free; see the server's `server_address`.
        secret: what a request must bring; None: nothing.
    """
    calls: Mapping[str, Callable[..., Any]] = {
        "/lease": lambda worker, runtimes, seconds: _plain(table.lease(worker, runtimes, seconds)),
        "/renew": table.renew,
        "/done": table.done,
        "/failed": table.failed,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that the standard library calls
            if self._allowed():
                self._answer(lambda: table.file(self.path.removeprefix(FILES)))

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if not self._allowed():
                return
            if size > LARGEST or self.path not in calls:
                self._send(404 if size <= LARGEST else 413, b"{}")
                return
            body = self.rfile.read(size)
            self._answer(lambda: json.dumps(calls[self.path](**json.loads(body))).encode())

        def _allowed(self) -> bool:
            given = self.headers.get(SECRET, "")
            if secret is None or hmac.compare_digest(given.encode(), secret.encode()):
                return True
            self._send(403, b'{"error": "wrong secret"}')
            return False

        def _answer(self, make: Callable[[], bytes]) -> None:
            try:
                self._send(200, make())
            except (UserError, TypeError, ValueError) as e:
                self._send(400, json.dumps({"error": str(e)}).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: requests are no news."""

    return ThreadingHTTPServer((host, port), Handler)


class RemoteTable:
    """A table that a coordinator serves, with the same calls; see `JobTable`.

    Args:
        url: like ``http://host:8123``.
        secret: what the server asks for.
    """

    def __init__(self, url: str, secret: str | None = None):
        self.url, self.secret = url.rstrip("/"), secret

    def lease(self, worker: str, runtimes: Sequence[str], seconds: float = LEASE_S) -> Lease | None:
        """See `JobTable.lease`."""
        found = self._call("/lease", worker=worker, runtimes=list(runtimes), seconds=seconds)
        return None if found is None else Lease(**found)

    def renew(self, id: str, token: str, seconds: float = LEASE_S) -> bool:
        """See `JobTable.renew`."""
        return bool(self._call("/renew", id=id, token=token, seconds=seconds))

    def done(self, id: str, token: str, records: Sequence[Mapping[str, Any]]) -> bool:
        """See `JobTable.done`."""
        return bool(self._call("/done", id=id, token=token, records=list(records)))

    def failed(self, id: str, token: str, error: str) -> bool:
        """See `JobTable.failed`."""
        return bool(self._call("/failed", id=id, token=token, error=error))

    def file(self, sha: str) -> bytes:
        """See `JobTable.file`."""
        return self._fetch(Request(f"{self.url}{FILES}{sha}"))

    def _call(self, path: str, **values: Any) -> Any:
        data = json.dumps(values).encode()
        return json.loads(self._fetch(Request(self.url + path, data, method="POST")))

    def _fetch(self, request: Request) -> bytes:
        if self.secret is not None:
            request.add_header(SECRET, self.secret)
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:
                body: bytes = answer.read()
                return body
        except HTTPError as e:
            raise UserError(f"{self.url}: {e.code}: {e.read().decode(errors='replace')}") from None
        except (URLError, TimeoutError) as e:
            raise ConnectionError(f"{self.url}: {getattr(e, 'reason', e)}") from None


def _plain(lease: Lease | None) -> dict[str, Any] | None:
    return None if lease is None else vars(lease)
