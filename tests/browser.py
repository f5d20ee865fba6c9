"""A headless Chromium that tests click and type in, by the DevTools protocol over two pipes: no package is needed.

https://chromedevtools.github.io/devtools-protocol/; a message is JSON with a zero byte behind it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60.0  # for what a page is waited for; a machine may be busy
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
)


class Tab:
    """A tab of the browser, open at a page. `problems`: errors of its scripts, and what its console has shown."""

    def __init__(self, commands: int, events: int):
        self._commands, self._events, self._buffer, self._number = commands, events, b"", 0
        self._session: dict[str, str] = {}
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """The result of one method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": values, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.problems.append(json.dumps(answer["params"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._events, 2**16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """The JSON value of an expression of JavaScript; an element is {}."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait(self, expression: str) -> None:
        """Until it is true."""
        end = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"not true after {SECONDS:g} s: {expression}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element."""
        middle = (
            f"(() => {{ const element = document.querySelector({json.dumps(selector)}); "
            "element.scrollIntoView({block: 'center'}); const box = element.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        x, y = self.value(middle)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, text: str = "", code: int = 0) -> None:
        """A key of the keyboard; text: what it writes; code: its virtual key."""
        for kind in ("keyDown", "keyUp"):
            written = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **written)

    def write(self, text: str) -> None:
        """Into the element that has the focus."""
        self.call("Input.insertText", text=text)


@contextmanager
def browser(folder: Path, width: int = 1000, dark: bool = False) -> Iterator[Tab]:
    """A tab of a new browser, whose profile is in `folder`; `width`: of the page in pixels."""
    assert CHROMIUM is not None
    (low_reads, commands), (events, low_writes) = os.pipe(), os.pipe()
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (low_reads, low_writes))  # not 3 or 4 themselves
    shell = f'exec 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-; exec "$0" "$@"'
    options = [*OPTIONS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"]
    command, quiet = ["bash", "-c", shell, CHROMIUM, *options], subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=(reads, writes), stdout=quiet, stderr=quiet)
    for end in (low_reads, low_writes, reads, writes):
        os.close(end)
    try:
        tab = Tab(commands, events)
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        yield tab
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(commands)
        os.close(events)
