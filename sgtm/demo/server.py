"""The demo's HTTP server: one page, two endpoints, for the person at this machine.

Who else could reach the full model is kept away: it listens on the loopback interface unless `--host` says otherwise;
a request whose Host is a foreign name is refused, as a page of that name may have had it resolved to this machine (DNS
rebinding); and so is one that a page of another origin has made. Nothing is logged.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import re
import secrets
import socket
import socketserver
import sys
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from sgtm.demo.endpoints import COMPLETION_TOKENS, Busy, Demo
from sgtm.inference.sources import ModelSource
from sgtm.report.page import template
from sgtm.words import listed

HOST = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+)(?::\d+)?")
"""Address or name, and port, of a Host header."""
BODY_BYTES = 2**16
"""Of a request, at most."""
DISCARDED_BYTES = 2**20  # of a body that is too long, so that the client reads the answer before its connection ends
IDLE_SECONDS = 30.0  # that a connection may keep a thread waiting


class Refusal(Exception):
    """A request that gets an error. status: of HTTP; the message is for the person who reads the answer."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """Listens from the start, and answers once `demo` is set and `serve_forever` runs.

    Raises ValueError for an address that this machine does not have, and for a port that is in use.
    """

    daemon_threads = True
    demo: Demo
    page: bytes

    def __init__(self, host: str, port: int):
        self.host = host
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__((str(address[0]), port), DemoHandler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = "give another with --port, or --port 0 for any that is free"
                raise ValueError(f"port {port} of {host} is in use; {remedy}") from None
            raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}; see --host and --port") from None
        self.nonce = secrets.token_urlsafe(16)

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        anywhere = ipaddress.ip_address(str(self.server_address[0])).is_unspecified
        name = socket.gethostname() if anywhere else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.server_port}/"

    def accepts_host(self, header: str) -> bool:
        """Whether a Host header is a name of this server. The port may be that of a tunnel."""
        if (match := HOST.fullmatch(header)) is None:
            return False
        name = match[1].strip("[]").rstrip(".").lower()
        try:
            return ipaddress.ip_address(name).is_loopback or not self.is_local  # an address cannot be rebound
        except ValueError:
            own = {"localhost", self.host.lower()} | (set() if self.is_local else {socket.gethostname().lower()})
            return name in own

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are no error, nor is a thread that the end of the program cuts short."""
        if not (self.demo.ending or isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError))):
            super().handle_error(request, client_address)


class DemoHandler(BaseHTTPRequestHandler):
    server: DemoServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sgtm", ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        try:
            self._check_host()
            if urlsplit(self.path).path != "/":
                raise Refusal(HTTPStatus.NOT_FOUND, "there is one page, at /")
        except Refusal as refusal:
            self._refuse(refusal)
        else:
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        try:
            self._check_host()
            demo = self.server.demo
            endpoint = {"/complete": demo.complete, "/losses": demo.losses}.get(self.path)
            body = self._body()
            if endpoint is None:
                raise Refusal(HTTPStatus.NOT_FOUND, "POST goes to /complete or /losses")
            answer = endpoint(self._json(body))
        except Refusal as refusal:
            self._refuse(refusal)
        except ValueError as error:
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, str(error)))
        except Busy:
            self._refuse(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the model is busy, or the demo ends; try again"))
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc()
            self._refuse(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the demo has failed; its terminal shows where"))
        else:
            self._send_json(HTTPStatus.OK, answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: prompts are the person's own."""

    def _check_host(self) -> None:
        """Raises Refusal for a request by a name, or from a page, that is not this server's."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or not self.server.accepts_host(hosts[0]):
            raise Refusal(HTTPStatus.FORBIDDEN, f"this demo is at {self.server.url}, and answers to no other name")
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            raise Refusal(HTTPStatus.FORBIDDEN, "this demo answers to its own page alone")

    def _body(self) -> bytes:
        """Raises Refusal for one that is too long, or of unknown length or kind."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not lengths[0].isdecimal() or self.headers.get("Transfer-Encoding"):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "a request needs one Content-Length")
        length = int(lengths[0])
        if length > BODY_BYTES:
            self.rfile.read(min(length, DISCARDED_BYTES))
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {BODY_BYTES:,} bytes, this has {length:,}"
            )
        body = self.rfile.read(length)
        if self.headers.get_content_type() != "application/json":  # which other origins cannot send unasked
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request is of Content-Type application/json")
        return body

    @staticmethod
    def _json(body: bytes) -> Any:
        try:
            return json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request is not JSON in UTF-8") from None

    def _refuse(self, refusal: Refusal) -> None:
        self.close_connection = True  # what is left of the request must not be taken for the next one
        self._send_json(refusal.status, {"error": str(refusal)})

    def _send_json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(values, allow_nan=False).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        own = f"'nonce-{self.server.nonce}'"
        policy = f"default-src 'none'; script-src {own}; style-src {own}; connect-src 'self'; img-src data:"
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            **({"Connection": "close"} if self.close_connection else {}),
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def serve(source: ModelSource, host: str, port: int) -> None:
    """Answer until a signal ends the program; prints the URL once the page is there.

    Raises ValueError as `DemoServer` and `Demo.open`.
    """
    with DemoServer(host, port) as server:
        server.demo = demo = Demo.open(source)
        server.page = render(demo, server.nonce).encode()
        if not server.is_local:
            print(
                f"warning: --host {host}: anyone who reaches port {server.server_port} of this machine can use the "
                f"full model of {source.path}{f', {listed(demo.domains)} included' if demo.domains else ''}; there is "
                f"no password",
                file=sys.stderr,
            )
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        finally:
            demo.end()


def render(demo: Demo, nonce: str) -> str:
    """The page as HTML. nonce: of its style and script."""
    assert demo.source.config is not None  # the source is a run
    return template("page.html.j2", "sgtm.demo").render(
        name=demo.source.config.name, domains=demo.domains, tokens=COMPLETION_TOKENS, nonce=nonce
    )
