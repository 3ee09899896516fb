"""A headless chromium, driven through its debugging pipe: nothing is needed beside it."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_SECONDS = 60.0  # in which it answers, on a machine that is busy


class Browser:
    """One page of a browser.

    Attributes:
      complaints: what its log and console said of errors and warnings, and requests that left
        the file.
    """

    def __init__(self, profile: Path):
        assert CHROMIUM
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-dev-shm-usage "
            f"--no-first-run --remote-debugging-pipe --user-data-dir={profile}"
        )
        # The browser reads its descriptor 3 and writes its descriptor 4.
        # Which numbers the pipes have here is not known: two that are free stand between.
        command = f"exec 8<&{to_read} 9>&{to_write}; exec {CHROMIUM} {flags} 3<&8 4>&9 8<&- 9>&-"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *unused: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        """Opens a file in a window of this width, as a reader with a preference for dark or not."""
        phone = width < 600
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._call("Page.navigate", url=file.resolve().as_uri())
        until = time.monotonic() + _SECONDS
        while not self._loaded:
            self._receive(until)

    def value(self, expression: str) -> Any:
        """What JavaScript says."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """A PNG of the whole page."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            found = self._receive(until)
            if found.get("id") == self._number:
                assert "error" not in found, (method, found)
                return found["result"]

    def _receive(self, until: float) -> dict[str, Any]:
        """The next message, after a look at it."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            read = os.read(self._from, 1 << 16) if ready else b""
            if not read:
                raise TimeoutError("chromium does not answer")
            self._rest += read
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        self._look_at(message.get("method", ""), message.get("params", {}))
        return message

    def _look_at(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {params}")
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "about:", "data:")):
                self.complaints.append(f"request: {url}")
