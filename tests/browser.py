"""A Chromium without a window, told what to do over a pipe: pages of any width, real clicks and keys, pictures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
PATIENCE = 60.0
"""Seconds to wait for anything."""


class Browser:
    """Speaks the DevTools protocol: JSON objects that end with a zero byte, to descriptor 3 and from 4."""

    def __init__(self, folder: Path) -> None:
        assert BROWSER is not None
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        ours = (self._write, self._read)

        def descriptors() -> None:
            high = [os.dup2(fd, 10 + i) for i, fd in enumerate((to_browser, from_browser))]
            for wanted, fd in zip((3, 4), high, strict=True):
                os.dup2(fd, wanted)

        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            command, preexec_fn=descriptors, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._ours, self._buffer, self._count, self._session = ours, b"", 0, None
        (target,) = [x for x in self.send("Target.getTargets")["targetInfos"] if x["type"] == "page"][:1]
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for fd in self._ours:
            os.close(fd)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; events are passed over."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 2**20)
            assert chunk, "the browser has gone"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """An expression's value."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Until the expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """A page of that width, loaded and arranged."""
        self.resize(width, height)
        self.send("Page.navigate", url=page.as_uri())
        self.wait_for("document.readyState === 'complete' && !!document.querySelector('#graphs[data-columns]')")

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        place = "(e => { e.scrollIntoView({block: 'center', inline: 'center'}); return e.getBoundingClientRect(); })"
        box = self.run(f"JSON.stringify({place}(document.querySelector({selector!r})))")
        at = json.loads(box)
        x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """A key, where the focus is."""
        text = {"text": "\r"} if key == "Enter" else {}
        both = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **both, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **both)

    def picture(self, path: Path, whole: bool = True) -> Path:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path
