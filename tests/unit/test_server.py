"""The demo over HTTP: what it answers, and whom it refuses."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path

import pytest
from demo_servers import serving
from exports import GPT_NEO
from text_models import byte_run

from sgtm.demo import server as module
from sgtm.demo.endpoints import Demo
from sgtm.demo.server import BODY_BYTES, DemoServer, render, serve
from sgtm.inference.sources import find_model

JSON = {"Content-Type": "application/json"}
ASK = {"prompt": "El", "removed": ["es"], "tokens": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return byte_run(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def server(run):
    with serving(run) as server:
        yield server


def send(server, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
    """(status, headers, content) of one request; `http.client` adds Host and Content-Length where they are missing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def post(server, path: str, values, **headers) -> tuple[int, dict]:
    status, _, content = send(server, "POST", path, json.dumps(values).encode(), JSON | headers)
    return status, json.loads(content)


def test_the_endpoints_answer_as_the_demo_does(server):
    assert post(server, "/complete", ASK) == (200, server.demo.complete(ASK))
    losses = {"text": "El año", "removed": ["fr"]}
    expected = json.loads(json.dumps(server.demo.losses(losses)))
    assert post(server, "/losses", losses) == (200, expected)


def test_the_page_has_a_labelled_switch_for_each_domain_and_needs_no_other_file(server):
    status, headers, content = send(server, "GET", "/?from=a-link")
    page = content.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    switches = re.findall(
        r'<label><input type="checkbox" role="switch" value="(\w+)" checked[^>]*> (\w+)</label>', page
    )
    assert switches == [("es", "es"), ("fr", "fr")]
    for name in ("prompt", "tokens", "text"):
        assert f'<label for="{name}">' in page and f'id="{name}"' in page
    assert (
        not re.findall(r'(?:src|href)="(?!data:,)', page)
        and "url(" not in page
        and "//" not in re.sub("  //.*", "", page)
    )
    assert "innerHTML" not in page and " on" not in re.sub(r"<script.*</script>|>[^<]*<", "", page, flags=re.S)
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', page))
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and policy.count(f"'nonce-{nonce}'") == 2
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"


def test_a_run_without_masks_has_a_page_without_switches(tmp_path):
    unmasked = byte_run(tmp_path, GPT_NEO.replace("masking: {", "masking: {strategy: none, "))
    page = render(Demo.open(find_model(unmasked)), "n")
    assert (
        "trained without masks: there is no domain to switch off" in page
        and "checkbox" not in page.split("</style>")[1]
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the request is not JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "the request is not JSON in UTF-8"),
        (b"[" * 20_000, "the request is not JSON in UTF-8"),
        (b"{}", "must be a JSON object with prompt, removed, tokens and nothing else"),
        (json.dumps(ASK | {"removed": ["it"]}).encode(), "unknown domain 'it'; known domains: es, fr"),
        (json.dumps(ASK | {"prompt": "a" * 99}).encode(), "the prompt has 99 tokens, and the context of full holds 16"),
        (json.dumps(ASK | {"prompt": "\ud800"}).encode(), "text: it has half a surrogate pair"),
    ],
)
def test_wrong_input_is_status_400_and_a_sentence(server, body, message):
    status, _, content = send(server, "POST", "/complete", body, JSON)
    assert status == 400 and message in json.loads(content)["error"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "evil.example:80@127.0.0.1", "[::1", "", "localhost.evil"],
)
@pytest.mark.parametrize("path", ["/", "/complete"])
def test_another_host_name_is_refused(server, host, path):
    method, body = ("GET", None) if path == "/" else ("POST", json.dumps(ASK).encode())
    status, _, content = send(server, method, path, body, JSON | {"Host": host})
    assert status == 403
    assert json.loads(content)["error"] == f"this demo is at {server.url}, and answers to no other name"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "localhost.", "127.0.0.1:1", "127.9.9.9", "[::1]:80"])
def test_its_own_names_are_not_refused(server, host):
    """With any port: that of a tunnel is another."""
    assert post(server, "/complete", ASK, Host=host)[0] == 200


def test_without_a_host_or_with_two_a_request_is_refused(server):
    for lines in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


def test_a_page_of_another_origin_is_refused(server):
    own = f"127.0.0.1:{server.server_port}"
    assert post(server, "/complete", ASK, Origin=f"http://{own}")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://{own}.evil.example"):
        assert post(server, "/complete", ASK, Origin=origin) == (
            403,
            {"error": "this demo answers to its own page alone"},
        )
    status, _, content = send(server, "POST", "/complete", json.dumps(ASK).encode(), {"Content-Type": "text/plain"})
    assert (status, json.loads(content)["error"]) == (415, "a request is of Content-Type application/json")


@pytest.mark.parametrize("length", [BODY_BYTES + 1, 10 * BODY_BYTES])
def test_a_long_body_is_refused_unread(server, length):
    status, headers, content = send(server, "POST", "/losses", b" " * length, JSON)
    assert (status, headers["Connection"]) == (413, "close")
    assert json.loads(content)["error"] == f"a request has at most 65,536 bytes, this has {length:,}"


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "Content-Length: -1",
        "Content-Length: 2\r\nContent-Length: 3",
        "Transfer-Encoding: chunked",
        "Content-Length: 2\r\nTransfer-Encoding: chunked",
    ],
)
def test_a_body_of_unknown_length_is_refused(server, lines):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        start = "POST /losses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{start}{lines}{chr(13) + chr(10) if lines else ''}\r\n{{}}".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 411 ")


def test_there_is_nothing_else(server):
    assert send(server, "GET", "/complete")[0] == send(server, "GET", "/etc/passwd")[0] == 404
    assert post(server, "/", ASK)[0] == post(server, "/complete/", ASK)[0] == 404
    assert send(server, "PUT", "/complete", b"{}", JSON)[0] == 501


def test_a_failure_is_a_sentence_and_a_traceback_in_the_terminal(server, monkeypatch, capfd):
    def fail(values):
        raise RuntimeError("a bug with a secret")

    monkeypatch.setattr(server.demo, "losses", fail)
    status, answer = post(server, "/losses", {})
    assert status == 500 and answer == {"error": "the demo has failed; its terminal shows where"}
    assert "RuntimeError: a bug with a secret" in capfd.readouterr().err


def test_one_connection_takes_several_requests_and_nothing_is_logged(server, capfd):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    for _ in range(2):
        connection.request("POST", "/complete", json.dumps(ASK), JSON)
        response = connection.getresponse()
        assert response.status == 200 and json.loads(response.read())
    connection.close()
    assert capfd.readouterr() == ("", "")


def test_a_client_that_goes_away_is_no_error(server, capfd):
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(b"POST /complete HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    assert post(server, "/complete", ASK)[0] == 200
    assert capfd.readouterr().err == ""


def test_a_port_in_use_and_an_address_of_another_machine_are_named(server):
    with pytest.raises(ValueError, match=f"port {server.server_port} of 127.0.0.1 is in use; give another with --port"):
        DemoServer("127.0.0.1", server.server_port)
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1, port 0: .*; see --host and --port"):
        DemoServer("192.0.2.1", 0)
    with pytest.raises(ValueError, match=r"cannot listen on no\.such\.invalid, port 0: "):
        DemoServer("no.such.invalid", 0)


def test_the_url_is_one_that_a_browser_opens():
    for host, name in {"127.0.0.1": "127.0.0.1", "0.0.0.0": socket.gethostname(), "localhost": "localhost"}.items():
        with DemoServer(host, 0) as server:
            assert server.url == f"http://{name}:{server.server_port}/"
            assert server.accepts_host(f"{name}:{server.server_port}") and not server.accepts_host("evil.example")
            assert server.is_local == (host != "0.0.0.0") and server.accepts_host("10.1.2.3:80") == (host == "0.0.0.0")


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_serving_prints_the_url_and_warns_of_others(run, monkeypatch, capsys, host, warned):
    def ends(server):
        raise KeyboardInterrupt

    ended = []
    monkeypatch.setattr(module.DemoServer, "serve_forever", ends)
    monkeypatch.setattr(Demo, "end", lambda demo: ended.append(demo))
    with pytest.raises(KeyboardInterrupt):
        serve(find_model(run), host, 0)
    printed = capsys.readouterr()
    assert re.fullmatch(r"http://[\w.-]+:\d+/ \(Ctrl-C ends it\)\n", printed.out) and len(ended) == 1
    warning = (
        r"warning: --host 0\.0\.0\.0: anyone who reaches port \d+ of this machine can use the full model of .*run, "
    )
    assert bool(re.search(warning + "es and fr included; there is no password", printed.err)) == warned
