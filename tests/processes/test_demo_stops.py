"""`sgtm demo` as a program: it prints its URL, answers, and a signal ends it within seconds, in a completion too."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading

import pytest
from exports import GPT_NEO
from text_models import byte_run

LONG = GPT_NEO.replace("context: 16", "context: 512").replace("tokens_per_step: 64", "tokens_per_step: 512")
ASK = {"prompt": "El", "removed": ["es"], "tokens": 256}


def complete(port: int) -> tuple[int, dict] | None:
    """The answer; None where the program has ended before."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/complete", json.dumps(ASK), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (ConnectionError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(tmp_path, number):
    run = byte_run(tmp_path, LONG)
    command = [sys.executable, "-u", "-m", "sgtm", "demo", str(run), "--port", "0"]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert demo.stdout is not None
        line = demo.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and line.endswith("/ (Ctrl-C ends it)\n"), demo.communicate(
            timeout=60
        )
        port = int(line.split("/ ")[0].rpartition(":")[2])
        answer = complete(port)
        assert answer is not None and answer[0] == 200
        asking = [threading.Thread(target=complete, args=(port,)) for _ in range(3)]
        for thread in asking:
            thread.start()
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=60)
        assert demo.returncode == 128 + number
        assert errors == f"stopped by {number.name}; again: sgtm demo {run} --port 0\n"
        for thread in asking:
            thread.join(60)
    finally:
        demo.kill()
        demo.wait()
