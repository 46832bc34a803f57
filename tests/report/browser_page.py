"""A headless Chromium, driven over its DevTools pipe: what a page logs, loads and looks like."""

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_SECONDS = 60


@dataclass
class Visit:
    """What happened while a page was shown: complaints, requests, sizes and a picture."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    scroll_width: int = 0
    inner_width: int = 0
    title: str = ""
    screenshot: bytes = b""


class Chromium:
    """One browser process with a fresh profile; use as a context manager."""

    def __init__(self, binary: str, profile: Path):
        to_child, self._out = _high_pipe()
        self._in, from_child = _high_pipe()

        def connect() -> None:  # DevTools reads from 3 and writes to 4
            os.dup2(to_child, 3)
            os.dup2(from_child, 4)

        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=connect,
            pass_fds=(3, 4),
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._count, self._events = b"", 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._call("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def visit(self, url: str, *, width: int, height: int = 900, dark: bool = False) -> Visit:
        """Open a page in a window of this size and report all it did."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def page(method, **params):
            return self._call(method, session, **params)

        for domain in ("Page", "Runtime", "Log", "Network"):
            page(f"{domain}.enable")
        page(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        page("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired", session)
        page(
            "Runtime.evaluate", expression="new Promise(r => setTimeout(r, 150))", awaitPromise=True
        )
        visit = Visit()

        def value(expression):
            return page("Runtime.evaluate", expression=expression)["result"].get("value")

        visit.scroll_width = value("document.documentElement.scrollWidth")
        visit.inner_width = value("window.innerWidth")
        visit.title = value("document.title")
        picture = page("Page.captureScreenshot", captureBeyondViewport=True)
        visit.screenshot = base64.b64decode(picture["data"])
        for event in self._events:
            if event.get("sessionId") == session:
                _note(visit, event["method"], event["params"])
        self._call("Target.closeTarget", targetId=target)
        return visit

    def _call(self, method, session=None, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _wait_for(self, method, session):
        while not any(
            e.get("method") == method and e.get("sessionId") == session for e in self._events
        ):
            self._events.append(self._next())

    def _next(self):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(self._in, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("Chromium fell silent or closed its pipe")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _high_pipe() -> tuple[int, int]:
    """A pipe on descriptors from 10 up, so that the child's 3 and 4 are free to be set."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in low)
    for fd in low:
        os.close(fd)
    return high


def _note(visit: Visit, method: str, params: dict) -> None:
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        said = " ".join(str(a.get("value", a.get("description"))) for a in params["args"])
        visit.complaints.append(f"console.{params['type']}: {said}")
    elif method == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        said = details.get("exception", {}).get("description") or details["text"]
        visit.complaints.append(f"exception: {said}")
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        visit.complaints.append(f"log {params['entry']['level']}: {params['entry']['text']}")
    elif method == "Network.loadingFailed":
        visit.complaints.append(f"request failed: {params['errorText']}")
    elif method == "Network.requestWillBeSent":
        visit.requests.append(params["request"]["url"])
