"""Chromium without a window, driven by its DevTools protocol over a pipe: no driver, no library, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT = "needs Chromium: apt-get install chromium"
LIMIT_S = 60.0  # for an answer
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


class Browser:
    """One page.

    Attributes:
        requests: the addresses of all that pages asked for, but the files that were opened.
        errors: what scripts and the page's policy complained about.
    """

    def __init__(self, read: int, write: int) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._read, self._write, self._number, self._waiting = read, write, 0, b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    _session = ""

    def open(self, path: Path, width: int, *, dark: bool = False, scripts: bool = True, fragment: str = "") -> None:
        """Opens a file in a window of so many pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._call("Page.navigate", url="about:blank")
        self._until("Page.loadEventFired")
        self._call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self._until("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Presses and releases the mouse in the middle of an element, as a hand does."""
        place = (
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        x, y = self.value(place)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def is_seen(self, selector: str) -> bool:
        """Whether an element is drawn, in the window."""
        seen = (
            "(e => { const r = e.getBoundingClientRect(); return e.checkVisibility() && r.height > 0 &&"
            " r.top < innerHeight && r.bottom > 0 && r.left >= 0; })"
        )
        return bool(self.value(f"{seen}(document.querySelector({json.dumps(selector)}))"))

    def picture(self, path: Path, height: int | None = None) -> None:
        """A PNG of the page from its top: the whole, or so many pixels of it."""
        width, whole = self.value("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        found = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        own = {"sessionId": self._session} if self._session else {}
        os.write(
            self._write,
            json.dumps({"id": self._number, "method": method, "params": parameters, **own}).encode() + b"\0",
        )
        while True:
            said = self._next()
            if said.get("id") == self._number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]

    def _until(self, event: str) -> None:
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            if not select([self._read], [], [], LIMIT_S)[0]:
                raise TimeoutError(f"Chromium said nothing for {LIMIT_S:g} s")
            more = os.read(self._read, 1 << 20)
            if not more:
                raise EOFError("Chromium has ended")
            self._waiting += more
        first, _, self._waiting = self._waiting.partition(b"\0")
        said = json.loads(first)
        self._note(said.get("method", ""), said.get("params", {}))
        return said

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent" and parameters.get("type") != "Document":
            self.requests.append(parameters["request"]["url"])
        if method == "Log.entryAdded":
            self.errors.append(parameters["entry"]["text"])
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser until the end, with a profile of its own."""
    assert PROGRAM, WITHOUT
    (given, ours), (theirs, answers) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        start = f'exec "$0" "$@" 3<&{given} 4>&{answers}'  # it reads from 3 and writes to 4
        process = subprocess.Popen(
            ["bash", "-c", start, PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(given, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(given)
        os.close(answers)
        try:
            yield Browser(theirs, ours)
        finally:
            os.close(ours)  # which ends it
            os.close(theirs)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
