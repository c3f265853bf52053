"""The hub client: what it sends, what it makes of each reply, and how it uses a proxy."""

from __future__ import annotations

import base64
import contextlib
import gc
import os
import re
import select
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from pytest_httpserver import HTTPServer

import felhom_agent as agent
import lab
from support import (
    HANG_SECONDS,
    LOG,
    SOON,
    make_collector,
    make_hub_client,
    make_report,
    messages,
    raw_server,
)

PATH: Final = "/api/v1/host-report"
EMPTY: Final = agent.build_envelope({})


@pytest.fixture
def client(plain_hub: lab.SimulatedHub) -> agent.HubClient:
    return make_hub_client(plain_hub)


# ---- what is sent --------------------------------------------------------------------------------


def test_report_is_posted_with_these_headers_and_no_others(httpserver: HTTPServer) -> None:
    """To a server that is not ours: pytest-httpserver."""
    httpserver.expect_ordered_request(PATH, method="POST").respond_with_json({})
    url = httpserver.url_for("").rstrip("/")
    report = make_report()
    config = agent.HubConfig(url=url, host_id="pve1", api_key="a-key-of-this-test")
    agent.HubClient(config, logger=LOG).report(report)
    ((request, _),) = httpserver.log
    assert request.get_data() == report.to_json().encode()
    assert dict(request.headers) == {
        "Authorization": "Bearer a-key-of-this-test",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": f"felhom-agent/{agent.__version__}",
        "Content-Length": str(len(report.to_json())),
        "Host": f"localhost:{httpserver.port}",
        "Connection": "close",
    }


@pytest.mark.parametrize("prefix", ["", "/", "/felhom/hub", "/felhom/"])
def test_path_prefix_of_the_url_is_kept(plain_hub: lab.SimulatedHub, prefix: str) -> None:
    plain_hub.base = prefix.rstrip("/")
    url = f"http://127.0.0.1:{plain_hub.port}{prefix}"
    assert make_hub_client(plain_hub, url=url).report(make_report()) != EMPTY


# ---- what is made of the reply -------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(lab.Reply(204), id="204"),
        pytest.param(lab.Reply(201, body=b"{}"), id="empty object"),
        pytest.param(lab.Reply(299, body=b'{"further": [{}]}'), id="unknown field"),
        pytest.param(lab.Reply(body=b"\xef\xbb\xbf \r\n{}"), id="byte order mark"),
    ],
)
def test_success_that_requests_nothing_changes_nothing(
    plain_hub: lab.SimulatedHub, client: agent.HubClient, reply: lab.Answer
) -> None:
    plain_hub.script(PATH, reply)
    assert client.report(make_report()) == EMPTY


# ---- error statuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("0", 0), ("007", 7), ("3600", 3600), ("3601", 3600), ("1" + "0" * 17, 3600), ("9 ", 9)),
        *((value, None) for value in ("", "-1", "1.5", "12 h", "9" * 5000, "٣")),
        ("Fri, 31 Dec 9999 23:59:59 GMT", None),
    ],
    ids=lambda value: str(value)[:12],
)
def test_retry_after_is_read_in_seconds(
    plain_hub: lab.SimulatedHub, client: agent.HubClient, value: str, seconds: int | None
) -> None:
    plain_hub.script(PATH, lab.Reply(429, headers={"Retry-After": value}))
    with pytest.raises(agent.HTTPError) as caught:
        client.report(make_report())
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("length", [1, 4 << 20], ids=["short", "long"])
def test_refusal_that_comes_before_the_report_was_read_is_shown(length: int) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")

    with raw_server(talk) as port:
        client = make_hub_client(lab.SimulatedHub(None), url=f"http://127.0.0.1:{port}")
        with pytest.raises(agent.HTTPError, match=f"^POST {PATH}: 413 Too Large; .*4 MiB"):
            client.report(make_report(host_id="x" * length))


# ---- the envelope --------------------------------------------------------------------------------


def envelope_with(hub: lab.SimulatedHub, client: agent.HubClient, value: str) -> Any:
    hub.script(PATH, lab.Reply(body=b'{"poll_interval_seconds":%b}' % value.encode()))
    return client.report(make_report()).poll_interval_seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("60", 60), ("900.0", 900), ("-1", -1), ("1e3", 1000), ("9" * 400, int("9" * 400))),
        *((value, None) for value in ('"900"', "true", "null", "1e99", "1e999", "NaN", "0.5")),
        *((value, None) for value in ("[900]", '{"s":900}', '"\\ud800"')),
    ],
    ids=lambda value: str(value)[:9],
)
def test_integer_is_the_requested_interval_and_another_value_is_told_once(
    plain_hub: lab.SimulatedHub,
    client: agent.HubClient,
    caplog: pytest.LogCaptureFixture,
    value: str,
    seconds: int | None,
) -> None:
    caplog.set_level("INFO")
    found = [envelope_with(plain_hub, client, each) for each in (value, value, "60", value)]
    assert found == [seconds, seconds, 60, seconds]
    assert type(found[0]) is type(seconds)
    expected = [] if seconds else ["WARNING", "INFO", "WARNING"]
    assert [level for level, text in messages(caplog)] == expected
    assert all("poll_interval_seconds" in text for _, text in messages(caplog))


# ---- the proxy -----------------------------------------------------------------------------------


class Tunnel(socketserver.BaseRequestHandler):
    """Passes on whatever follows CONNECT, wherever it was meant to go, to the proxy's target."""

    server: Proxy

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.request.recv(1)
        self.server.heads.append(head)
        self.request.sendall(self.server.reply)
        if b" 200 " not in self.server.reply:
            return
        with socket.create_connection(("127.0.0.1", self.server.target_port)) as onward:
            other = {self.request: onward, onward: self.request}
            # Whoever ends first may reset the connection.
            with contextlib.suppress(ConnectionError):
                while True:
                    for source in select.select(list(other), [], [], 10)[0]:
                        data = source.recv(65536)
                        if not data:
                            return
                        self.server.passed += data
                        other[source].sendall(data)


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy: `heads` is what it was asked, `passed` all that went through."""

    def __init__(self, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.target_port = target_port
        self.reply = b"HTTP/1.1 200 Connection established\r\n\r\n"
        self.heads: list[bytes] = []
        self.passed = b""


@pytest.fixture
def far_hub(tmp_path: Path) -> Iterator[lab.SimulatedHub]:
    """A hub that is hub.example.com, which only the proxy knows."""
    with lab.SimulatedHub(lab.make_certificates(tmp_path, names=["hub.example.com"])) as hub:
        yield hub


@pytest.fixture
def proxy(far_hub: lab.SimulatedHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(far_hub.port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("https_proxy", f"http://operator:pass%40wor%2564@{address}")
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


FAR: Final = "https://hub.example.com"


@pytest.mark.parametrize(("port", "target"), [("", ":443"), (":8443", ":8443")])
def test_hub_is_reached_through_the_proxy(
    far_hub: lab.SimulatedHub, proxy: Proxy, port: str, target: str
) -> None:
    make_hub_client(far_hub, url=FAR + port).report(make_report())
    assert len(far_hub.reports) == 1
    (head,) = (head.decode() for head in proxy.heads)
    assert head.startswith(f"CONNECT hub.example.com{target} HTTP/1.1\r\n")
    assert f"\r\nHost: hub.example.com{target}\r\n" in head
    credentials = base64.b64encode(b"operator:pass@wor%64").decode()
    assert f"proxy-authorization: basic {credentials.lower()}\r\n" in head.lower()
    # Neither server gets the other's secret.
    assert far_hub.api_key not in head + proxy.passed.decode("latin-1")
    assert credentials not in repr(far_hub.requests)


def test_hub_behind_the_proxy_must_have_its_name(far_hub: lab.SimulatedHub, proxy: Proxy) -> None:
    expected = r"other\.example\.com through the proxy .*mismatch.*; .*hub\.url"
    with pytest.raises(agent.TransportError, match=expected):
        make_hub_client(far_hub, url="https://other.example.com").report(make_report())
    assert (len(proxy.heads), far_hub.connections, far_hub.requests) == (1, 1, [])


@pytest.mark.parametrize(
    ("reply", "problem", "hint"),
    [
        (b"HTTP/1.1 407 Who?\r\n\r\n", "the proxy answers 407", "user and password in https_proxy"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "403", "https_proxy.*allows.*no_proxy"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "the proxy answers 502", "hub.url.*reaches the hub"),
        (b"HTTP/1.1 300 Many\r\nLocation: https://127.0.0.1/\r\n\r\n", "300", "https_proxy"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not answer as a proxy", "https_proxy"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "not answer as a proxy", "https_proxy"),
        (b"operator:pass%40wor%2564\r\n", "not answer as a proxy", "https_proxy"),
        (b"HTTP/1.1 403 operator:pass%40wor%2564\r\n\r\n", "the proxy answers 403", "https_proxy"),
        (b"", "closed", "https_proxy"),
        (b"HTTP/1.1 200 OK\r\nX: %b\r\n\r\n" % bytes(70_000), "as a proxy", "https_proxy"),
    ],
    ids=[
        *("407", "403", "502", "redirect", "not HTTP"),
        *("TLS", "echo", "403 echo", "closes", "long header"),
    ],
)
def test_proxy_that_refuses_is_told_and_its_password_is_not(
    far_hub: lab.SimulatedHub, proxy: Proxy, reply: bytes, problem: str, hint: str
) -> None:
    proxy.reply = reply
    address = f"127.0.0.1:{proxy.server_address[1]}"
    with pytest.raises(agent.TransportError) as caught:
        make_hub_client(far_hub, url=FAR).report(make_report())
    message = str(caught.value)
    through = f"^POST {PATH}: hub.example.com through the proxy {address}: "
    assert re.search(f"{through}.*{problem}.*; .*{hint}", message)
    assert [secret for secret in ("wor%2564", "wor%64", "operator") if secret in message] == []
    assert far_hub.requests == []
    # A socket that was left open would be a warning.
    gc.collect()


@pytest.mark.parametrize(
    "reply", [None, b"", b"HTTP/1.1 200 OK\r\n"], ids=["down", "silent", "drips"]
)
def test_proxy_that_does_not_answer_is_told_in_time(
    reply: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        for _ in range(500):
            connection.sendall(reply or b"")
            if select.select([connection], [], [], 0.02)[0]:
                return

    began = time.monotonic()
    with raw_server(talk) if reply is not None else closed_port() as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        changes = {} if reply is None else {"timeout_seconds": SOON}
        client = make_hub_client(lab.SimulatedHub(None), url=FAR, **changes)
        problem = "refused; .*https_proxy" if reply is None else "timed out; .*timeout_seconds"
        with pytest.raises(agent.TransportError, match=f"through the proxy .*: .*{problem}"):
            client.report(make_report())
    assert time.monotonic() - began < HANG_SECONDS


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    yield port


def test_no_proxy_is_honoured(
    far_hub: lab.SimulatedHub, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "example.org,.example.com")
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        *(socket, "getaddrinfo"),
        lambda _host, _port, *options: look_up("127.0.0.1", far_hub.port, *options),
    )
    # Any proxy will do that is not used.
    for name in (os.environ["https_proxy"], "socks5://127.0.0.1:1"):
        monkeypatch.setenv("https_proxy", name)
        make_hub_client(far_hub, url=FAR).report(make_report())
    assert (len(far_hub.reports), proxy.heads) == (2, [])


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_proxy_is_never_used_for_proxmox_nor_for_a_loopback_address(
    node: lab.SimulatedNode, hub: lab.SimulatedHub, proxy: Proxy, host: str
) -> None:
    make_collector(node, url=f"https://{host}:{node.port}").collect()
    make_hub_client(hub, url=f"https://{host}:{hub.port}").report(make_report())
    assert proxy.heads == []
