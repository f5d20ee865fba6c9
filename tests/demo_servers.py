"""The demo of a run, served to tests on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgtm.demo.endpoints import Demo
from sgtm.demo.server import DemoServer, render
from sgtm.inference.sources import find_model


@contextmanager
def serving(run: Path) -> Iterator[DemoServer]:
    with DemoServer("127.0.0.1", 0) as server:
        server.demo = Demo.open(find_model(run))
        server.page = render(server.demo, server.nonce).encode()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
