"""As much of wandb's server as a run needs to begin and to be logged: python wandb_server.py PORT_FILE [STATUS]."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RUN = {
    "id": "UnVu",
    "config": "{}",
    "project": {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}},
    **dict.fromkeys(("historyLineCount", "eventsLineCount", "logLineCount"), 0),
    **dict.fromkeys(("history", "events", "historyTail", "eventsTail"), "[]"),
    "summaryMetrics": "{}",
}
ANSWERS = {
    "viewer": {"id": "u", "username": "me", "entity": "entity", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9", "min_cli_version": "0.0.1"}, "features": []},
    "model": {"bucket": None},
    "project": {"run": None},
    "createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []},
    **{kind: {"fields": []} for kind in ("QueryType", "TypeInfo", "InputInfo")},
}


STATUS = int(sys.argv[2]) if len(sys.argv) > 2 else 200


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content: dict = {}
        if self.path.endswith("/graphql"):
            name = (json.loads(body).get("variables") or {}).get("name") or "x"
            run = RUN | {"name": name, "displayName": name}
            content = {"data": ANSWERS | {"upsertBucket": {"bucket": run, "inserted": True}}}
        if STATUS != 200:
            content = {"errors": [{"message": "permission denied"}]}
        data = json.dumps(content).encode()
        self.send_response(STATUS)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *args: object) -> None: ...


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
Path(sys.argv[1]).write_text(str(server.server_port))
server.serve_forever()
