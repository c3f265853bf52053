"""Connections, deadlines, sizes, TLS, redirects and proxies: what holds for both servers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import select
import socket
import socketserver
import ssl
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import felhom_agent as agent
import lab
from support import LOG, REPORT, SOON, build_collector, hub_config, proxmox_config, raw_server

STATUS = "/nodes/pve1/status"


def raw(body: bytes, header: bytes = b"", length: int | None = None) -> bytes:
    """An answer as bytes, of the length that its body has or is said to have."""
    said = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (header, said, body)


@pytest.fixture
def plain_node() -> Iterator[lab.SimulatedNode]:
    """Without TLS, which loopback addresses may do."""
    with lab.SimulatedNode(None) as node:
        yield node


@pytest.fixture
def plain_hub() -> Iterator[lab.SimulatedHub]:
    with lab.SimulatedHub(None) as hub:
        yield hub


def status_of(node: lab.SimulatedNode, **changes: Any) -> object:
    """What one single call reads."""
    return agent.ProxmoxClient(proxmox_config(node, **changes)).node_status()


def report_to(hub: lab.SimulatedHub, **changes: Any) -> agent.ControlEnvelope:
    return agent.HubClient(hub_config(hub, **changes), logger=LOG).report(REPORT)


def authorization(node: lab.SimulatedNode) -> dict[str, str]:
    return {"authorization": f"PVEAPIToken={node.token_id}={node.token_secret}"}


def around(node: lab.SimulatedNode, path: str) -> list[lab.Request]:
    """The request for this path, and the one after it."""
    first = next(number for number, request in enumerate(node.requests) if request.path.endswith(path))
    return node.requests[first : first + 2]


# --- kept connections ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guests", "handshakes", "in_flight"),
    [pytest.param(10, 3, 1, id="10"), pytest.param(100, 5, 3, id="100"), pytest.param(1000, 15, 3, id="1000")],
)
def test_few_handshakes_and_few_in_flight(
    certificates: lab.Certificates, hub: lab.SimulatedHub, guests: int, handshakes: int, in_flight: int
) -> None:
    latency_seconds = 0.005 if guests == 100 else 0.0  # so that they overlap for sure
    with lab.SimulatedNode(certificates, guests=lab.many_guests(guests), latency_seconds=latency_seconds) as node:
        report = build_collector(node).collect()
        assert agent.HubClient(hub_config(hub), logger=LOG).report(report).poll_interval_seconds == 900
    assert len(node.requests) == 4 + guests  # permissions, nodes, status, list
    assert node.connections + hub.connections <= handshakes
    assert node.most_in_flight <= in_flight
    assert guests != 100 or node.most_in_flight == in_flight
    assert {guest.status for guest in report.guests} == {"running", "stopped"}


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        pytest.param({"Connection": "Keep-Alive"}, True, id="keep-alive"),
        pytest.param({"Connection": None}, True, id="says-nothing"),
        pytest.param({"Connection": "close"}, False, id="close"),
        pytest.param({"Connection": "close\r\nConnection: Keep-Alive"}, False, id="close-then-keep-alive"),
    ],
)
def test_connection_is_kept_as_the_server_says(node: lab.SimulatedNode, answer: dict[str, str | None], kept: bool) -> None:
    usual = node.answer(lab.Request(method="GET", path="/api2/json/nodes", headers=authorization(node), body=b"", connection=0))
    node.script("/nodes$", dataclasses.replace(usual, headers=answer, close=False))  # the server itself would keep it in each case
    build_collector(node).collect()
    before, after = around(node, "/nodes")
    assert (before.connection == after.connection) is kept


@pytest.mark.parametrize("status", [400, 403, 500, 595])
def test_connection_is_dropped_after_an_error_status(node: lab.SimulatedNode, status: int) -> None:
    node.script("/nodes$", lab.Reply(status, "no", headers={"Connection": "Keep-Alive"}, close=False))
    build_collector(node).collect()
    before, after = around(node, "/nodes")
    assert before.connection != after.connection


def test_no_connection_is_kept_between_cycles(node: lab.SimulatedNode) -> None:
    collector = build_collector(node)
    collector.collect()
    requests, connections = len(node.requests), node.connections
    collector.collect()
    assert min(request.connection for request in node.requests[requests:]) > connections


def test_get_is_asked_again_on_a_fresh_connection_where_the_kept_one_was_gone(node: lab.SimulatedNode) -> None:
    node.script(STATUS, lab.Cut())
    build_collector(node).collect()
    asked = [request.connection for request in node.requests if request.path.endswith("/status")]
    assert len(asked) == len(set(asked)) == 2


def test_get_is_asked_again_once_only(node: lab.SimulatedNode) -> None:
    node.script(STATUS, lab.Forever(lab.Cut()))
    with pytest.raises(agent.TransportError, match=r"GET /nodes/pve1/status: .*the connection was closed before the answer was complete"):
        build_collector(node).collect()
    assert len([request for request in node.requests if request.path.endswith("/status")]) == 2


def test_get_on_a_fresh_connection_is_not_asked_again(node: lab.SimulatedNode) -> None:
    node.script(STATUS, lab.Cut())
    with pytest.raises(agent.TransportError, match="closed before the answer"):
        status_of(node)
    assert len(node.requests) == 1


def test_connection_that_the_server_closes_unsaid_costs_no_request(node: lab.SimulatedNode) -> None:
    usual = node.answer(lab.Request(method="GET", path="/api2/json/nodes", headers=authorization(node), body=b"", connection=0))
    node.script("/nodes$", dataclasses.replace(usual, headers={"Connection": "Keep-Alive"}, close=True))
    build_collector(node).collect()
    assert len([request for request in node.requests if request.path.endswith("/status")]) == 1


def test_post_is_never_sent_twice(hub: lab.SimulatedHub) -> None:
    client = agent.HubClient(hub_config(hub), logger=LOG)
    client.report(REPORT)
    hub.script("", lab.Cut())
    with pytest.raises(agent.TransportError, match="closed before the answer"):
        client.report(REPORT)
    assert len(hub.requests) == hub.connections == 2


@pytest.mark.parametrize("total", [0, 8192], ids=["in-the-same-read", "after-it"])
def test_surplus_answer_is_not_taken_for_the_next_one(node: lab.SimulatedNode, total: int) -> None:
    body = json.dumps({"data": [{"node": "pve1", "cpu": 0.5}]}).encode()
    first = raw(body)
    first = raw(body, b"X-Fill: %s\r\n" % (b"x" * (total - len(first) - 10))) if total else first  # what is read at once ends with it
    assert len(first) == total or not total
    node.script("/nodes$", lab.Raw(first + raw(json.dumps({"data": {**node.status, "uptime": 666}}).encode())))
    host = build_collector(node).collect().host
    assert (host.cpu_usage, host.uptime_seconds) == (0.5, 2574)


# --- several in flight --------------------------------------------------------------------------------------------------------------


class LateNode(lab.SimulatedNode):
    """Answers for one guest only when all others have been asked for."""

    late_vmid = 0

    def answer(self, request: lab.Request) -> lab.Reply:
        if f"/lxc/{self.late_vmid}/" in request.path:
            self.wait_for_requests(4 + len(self.guests), 10)
        return super().answer(request)


@pytest.mark.parametrize("late_vmid", [100, 101, 102, 130], ids=str)  # the first three are each the first on a connection
def test_late_guest_does_not_hold_the_others_up(certificates: lab.Certificates, late_vmid: int) -> None:
    with LateNode(certificates, guests=lab.many_guests(60)) as node:
        node.late_vmid = late_vmid
        report = build_collector(node, timeout_seconds=2).collect()
    assert [guest.vmid for guest in report.guests if guest.status == "unknown"] == []


@pytest.mark.parametrize("answer", [lab.Stall(), lab.Drip(raw(b'{"data":{}}'))], ids=["not-begun", "begun"])
def test_hanging_guest_is_the_only_one_that_is_unknown(certificates: lab.Certificates, answer: lab.Answer) -> None:
    with lab.SimulatedNode(certificates, guests=lab.many_guests(60)) as node:
        node.script("/nodes/pve1/lxc/130/", lab.Forever(answer))
        report = build_collector(node, timeout_seconds=SOON).collect()
    assert [guest.vmid for guest in report.guests if guest.status == "unknown"] == [130]


def test_nothing_is_asked_on_a_connection_that_owes_an_answer(certificates: lab.Certificates) -> None:
    with lab.SimulatedNode(certificates, guests=lab.many_guests(60)) as node:
        node.script("/nodes/pve1/lxc/130/", lab.Stall())  # which a further question would end
        client = agent.ProxmoxClient(proxmox_config(node, timeout_seconds=SOON))
        with pytest.raises(agent.TransportError, match="no complete answer in time"):
            client.guest_config(130)
        report = build_collector(node).collect()
    assert {guest.status for guest in report.guests} == {"running", "stopped"}


def test_cycle_is_bounded_where_every_guest_hangs(plain_node: lab.SimulatedNode) -> None:
    plain_node.guests = lab.many_guests(60)
    plain_node.script("/nodes/pve1/lxc/", lab.Forever(lab.Stall()))
    report = build_collector(plain_node, timeout_seconds=0.1).collect()
    assert {guest.status for guest in report.guests} == {"unknown"}
    assert len(report.guests) == 60
    assert len(plain_node.requests) < 4 + 60  # twenty time-outs in a row would be more than a cycle may take


# --- deadlines ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(lambda body: b"HTTP/1.1 200 " + b"O" * 40 + raw(body)[15:], id="status-line"),
        pytest.param(lambda body: raw(body, b"X-Fill: %s\r\n" % (b"x" * 40)), id="header"),
        pytest.param(lambda body: raw(body + b" " * 40), id="body"),
        pytest.param(lambda body: raw(b"1\r\n{\r\n" * 6 + body, b"Transfer-Encoding: chunked\r\n"), id="chunks"),
    ],
)
def test_answer_byte_by_byte_is_cut_off(plain_node: lab.SimulatedNode, slow: Callable[[bytes], bytes]) -> None:
    answer = slow(b'{"data":{}}')
    plain_node.script(STATUS, lab.Drip(answer, 1.5 / len(answer)))  # all of it would take longer than the client waits
    with pytest.raises(agent.TransportError, match="no complete answer in time"):
        status_of(plain_node, timeout_seconds=SOON)


def test_patience_is_for_the_whole_answer_only(plain_node: lab.SimulatedNode) -> None:
    plain_node.script(STATUS, lab.Drip(raw(b'{"data":{}}'), 0.001))
    assert status_of(plain_node) == {}


@pytest.mark.parametrize("every_seconds", [None, 0.02], ids=["silent", "byte-by-byte"])
def test_handshake_that_does_not_end_is_cut_off(plain_node: lab.SimulatedNode, every_seconds: float | None) -> None:
    def talk(connection: socket.socket) -> None:
        # the beginning of a TLS record of 16 KiB, for two seconds, then an end that would be another error
        for byte in b"\x16\x03\x03\x40\x00\x02" + bytes(94):
            if select.select([] if every_seconds else [connection], [], [], every_seconds or 2)[0] and not connection.recv(4096):
                return
            if every_seconds:
                connection.sendall(bytes([byte]))

    with raw_server(talk) as port, pytest.raises(agent.TransportError, match="no complete answer in time"):
        status_of(plain_node, url=f"https://127.0.0.1:{port}", ca_file="", timeout_seconds=SOON)


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port where connecting never ends: the queue is full and nobody takes from it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


Addresses = dict[str, list[tuple[Any, ...]]]


def address(port: int, family: int = socket.AF_INET) -> tuple[Any, ...]:
    return (family, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Addresses:
    """Host name → its addresses, loopback where there are none; no other name is looked up."""
    known: Addresses = {}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, family: int = 0, type: int = 0) -> list[tuple[Any, ...]]:
        if host in known:
            return known[host] or [address(port)]
        return list(real(host, port, family, type, flags=socket.AI_NUMERICHOST))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def test_address_that_does_not_answer_leaves_time_for_the_next(node: lab.SimulatedNode, resolve: Addresses) -> None:
    with black_hole() as port:
        resolve["pve1.example.lan"] = [address(port), address(node.port)]
        assert status_of(node, url=f"https://pve1.example.lan:{node.port}", timeout_seconds=2 * SOON)


def test_address_family_that_the_kernel_does_not_have_is_passed_over(node: lab.SimulatedNode, resolve: Addresses) -> None:
    resolve["pve1.example.lan"] = [address(node.port, socket.AF_X25), address(node.port)]  # as ::1 is with ipv6.disable=1
    assert status_of(node, url="https://pve1.example.lan")


def test_many_addresses_share_one_deadline(node: lab.SimulatedNode, resolve: Addresses) -> None:
    with black_hole() as port:
        # the last one would answer, if each of those before it did not get all the time
        resolve["pve1.example.lan"] = [address(port)] * 3 + [address(node.port)]
        assert status_of(node, url="https://pve1.example.lan", timeout_seconds=2 * SOON)
        resolve["pve1.example.lan"] = [address(port)] * 4
        with pytest.raises(agent.TransportError, match="no complete answer in time"):
            status_of(node, url="https://pve1.example.lan", timeout_seconds=SOON)


def test_no_name_is_looked_up_when_the_time_is_over(node: lab.SimulatedNode, resolve: Addresses) -> None:
    resolve["pve1.example.lan"] = [address(node.port)]
    client = agent.ProxmoxClient(proxmox_config(node, url="https://pve1.example.lan"))
    with client.cycle():
        client.ends = 0.0
        resolve.clear()  # from here on a look-up ends in another error
        with pytest.raises(agent.TransportError, match="no complete answer in time"):
            client.node_status()


# --- sizes --------------------------------------------------------------------------------------------------------------------------

ENVELOPE = b'{"poll_interval_seconds":60}'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOO_MUCH = [
    pytest.param(raw(ENVELOPE, length=10**12), id="length-of-a-terabyte"),
    pytest.param(raw(ENVELOPE + b" " * (1 << 20)), id="length-above-the-cap"),
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\n" + ENVELOPE + b" " * (2 << 20), id="body-without-end"),
    pytest.param(CHUNKED + b"fffffffffffffff\r\n" + ENVELOPE + b" " * (2 << 20), id="huge-chunk"),
    pytest.param(CHUNKED + b"20000\r\n%s\r\n" % (b" " * 0x20000) * 20 + b"1c\r\n" + ENVELOPE + b"\r\n0\r\n\r\n", id="chunks-without-end"),
    pytest.param(CHUNKED + b"-1\r\n" + ENVELOPE, id="negative-chunk"),
    pytest.param(raw(ENVELOPE, b"X: %s\r\n" % (b"x" * 70_000)), id="header-line"),
    pytest.param(raw(ENVELOPE, b"X: x\r\n" * 200), id="header-lines"),
    pytest.param(raw(ENVELOPE, b"HTTP/1.1 102 Processing\r\nX: %s\r\n\r\n" % (b"x" * 60_000)), id="header-in-header"),
    pytest.param(b"HTTP/1.1 102 Processing\r\nX: %s\r\n\r\n" % (b"x" * 60_000) * 150 + raw(ENVELOPE), id="announcements-without-end"),
    pytest.param(b"HTTP/1.1 200 " + b"O" * 70_000 + raw(ENVELOPE)[15:], id="status-line"),
]


@contextlib.contextmanager
def memory_below(limit_bytes: int) -> Iterator[None]:
    """Of objects of Python: what the test itself holds was made before."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", TOO_MUCH)
def test_answer_that_is_too_large_is_refused_without_a_buffer_for_it(plain_hub: lab.SimulatedHub, data: bytes) -> None:
    plain_hub.script("", lab.Raw(data))
    client = agent.HubClient(hub_config(plain_hub), logger=LOG)
    with memory_below(3 << 20), pytest.raises(agent.TransportError):
        client.report(REPORT)


def test_length_that_is_a_lie_makes_no_buffer(plain_hub: lab.SimulatedHub) -> None:
    plain_hub.script("", lab.Raw(raw(ENVELOPE, length=10**12)))
    client = agent.HubClient(hub_config(plain_hub), logger=LOG)
    with memory_below(1 << 19), pytest.raises(agent.TransportError):
        client.report(REPORT)


def test_body_in_small_chunks_takes_little_more_memory_than_its_length(plain_hub: lab.SimulatedHub) -> None:
    plain_hub.script("", lab.Raw(CHUNKED + b"1\r\n \r\n" * 300_000 + b"0\r\n\r\n"))
    client = agent.HubClient(hub_config(plain_hub), logger=LOG)
    with memory_below(8 << 20):
        client.report(REPORT)


def test_proxmox_may_answer_eight_mebibytes_and_no_more(plain_node: lab.SimulatedNode) -> None:
    body = b'{"data":{}}'.ljust(8 << 20)
    plain_node.script(STATUS, lab.Reply(body=body), lab.Reply(body=body + b" "))
    assert status_of(plain_node) == {}
    with pytest.raises(agent.TransportError, match="the answer is too large"):
        status_of(plain_node)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(raw(ENVELOPE, length=100), id="shorter-than-it-says"),
        pytest.param(CHUNKED + b"1c\r\n" + ENVELOPE, id="no-last-chunk"),
        pytest.param(CHUNKED + b"zz\r\n" + ENVELOPE, id="chunk-size-is-no-number"),
        pytest.param(raw(ENVELOPE, b"Content-Length: 28\r\n", length=2), id="two-lengths"),
        pytest.param(raw(ENVELOPE, length=-1), id="negative-length"),
        pytest.param(raw(ENVELOPE).replace(b": 28", b": +28"), id="length-with-a-sign"),
        pytest.param(b"HTTP/1.1 200 OK\r\nConten", id="cut-in-the-header"),
        pytest.param(b"HTTP/1.1 200 OK\r\n", id="cut-after-the-status-line"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="no-http"),
        pytest.param(b"HTTP/1.1 abc OK\r\n\r\n", id="no-status"),
        pytest.param(b"\x16\x03\x01\x02\x00", id="tls-on-a-plain-port"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_broken_answer_is_a_transport_error(plain_hub: lab.SimulatedHub, data: bytes) -> None:
    plain_hub.script("", lab.Raw(data))
    with pytest.raises(agent.TransportError, match="POST /api/v1/host-report: "):
        report_to(plain_hub)


@pytest.mark.parametrize("status", [413, 429])
def test_refusal_is_heard_before_the_report_is_read(status: int) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)

    large = dataclasses.replace(REPORT, host_id="x" * (8 << 20))
    with raw_server(talk) as port, pytest.raises(agent.HTTPError, match=f"POST /api/v1/host-report: {status} No"):
        agent.HubClient(hub_config(lab.SimulatedHub(None), url=f"http://127.0.0.1:{port}"), logger=LOG).report(large)


class Interrupted(socket.socket):
    """A signal comes as soon as somebody wants to read."""

    def makefile(self, *_: object, **__: object) -> Any:
        raise KeyboardInterrupt


def test_answer_that_a_signal_cuts_off_at_its_making_says_nothing() -> None:
    with Interrupted() as sock, pytest.raises(KeyboardInterrupt):
        agent.Answer(sock)
    gc.collect()  # http.client's clean-up: pytest makes an error of what is raised there


# --- redirects ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(certificates: lab.Certificates) -> Iterator[lab.SimulatedNode]:
    """Where a redirect leads and no request may come."""
    with lab.SimulatedNode(certificates) as node:
        yield node


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_leaks_neither_token_nor_key(
    node: lab.SimulatedNode, hub: lab.SimulatedHub, target: lab.SimulatedNode, status: int
) -> None:
    targets = ("/elsewhere", f"{target.url}/api2/json{STATUS}", f"http://127.0.0.1:{target.port}/", "file:///etc/hostname", "//[", "")
    for count, location in enumerate(targets, 1):
        redirect = lab.Reply(status, "Moved", headers={"Location": location})
        node.script(STATUS, redirect)
        hub.script("", redirect)
        with pytest.raises(agent.HTTPError, match=f"GET {STATUS}: {status} Moved; set proxmox.url to the address itself") as from_node:
            status_of(node)
        with pytest.raises(agent.HTTPError, match=f"POST /api/v1/host-report: {status} Moved; set hub.url to the address") as from_hub:
            report_to(hub)
        assert from_node.value.status == from_hub.value.status == status
        assert (len(node.requests), len(hub.requests), target.connections) == (count, count, 0)


# --- TLS ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["current", "old", "pve7"])
def test_every_generation_of_proxmox_certificates_is_accepted(tmp_path: Path, generation: Literal["current", "old", "pve7"]) -> None:
    with lab.SimulatedNode(lab.make_certificates(tmp_path, generation=generation)) as node:
        assert status_of(node)


def test_strict_check_is_waived_for_proxmox_alone(certificates: lab.Certificates, hub_certificates: lab.Certificates) -> None:
    usual = ssl.create_default_context()
    node, hub = agent.ProxmoxClient(proxmox_config(lab.SimulatedNode(certificates))), lab.SimulatedHub(certificates)
    contexts = [node.context, agent.HubClient(hub_config(hub), logger=LOG).context]
    waived = [usual.verify_flags ^ context.verify_flags for context in contexts if context]
    assert waived == [usual.verify_flags & ssl.VERIFY_X509_STRICT, 0]
    for context in contexts:
        assert context is not None
        assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def answer_at_once(connection: socket.socket, context: ssl.SSLContext) -> None:
    """Shake hands as a server of TLS 1.2, and send with the last of it an answer to what has not been asked yet."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            connection.sendall(outgoing.read())
            incoming.write(connection.recv(65536))
    tls.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
    connection.sendall(outgoing.read())
    connection.recv(65536)
    connection.recv(65536)  # the client leaves


def test_answer_with_the_end_of_the_handshake_is_seen(certificates: lab.Certificates) -> None:
    context = certificates.server_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    began = time.monotonic()
    with raw_server(lambda connection: answer_at_once(connection, context)) as port, pytest.raises(agent.HTTPError, match="503 Busy"):
        status_of(lab.SimulatedNode(certificates), url=f"https://127.0.0.1:{port}", timeout_seconds=3)
    assert time.monotonic() - began < 2  # and not only when the time is over


def test_server_is_told_why_its_certificate_is_refused(certificates: lab.Certificates, hub_certificates: lab.Certificates) -> None:
    told: list[str] = []

    def talk(connection: socket.socket) -> None:
        try:
            certificates.server_context().wrap_socket(connection, server_side=True).recv(1)
        except ssl.SSLError as exc:
            told.append(str(exc.reason))

    with raw_server(talk) as port, pytest.raises(agent.TransportError, match="is not signed"):
        status_of(lab.SimulatedNode(hub_certificates), url=f"https://127.0.0.1:{port}", timeout_seconds=SOON)
    assert told == ["TLSV1_ALERT_UNKNOWN_CA"]


REFUSED = [
    pytest.param(
        {"names": ["pve1.example.lan", "192.0.2.7"]},
        "the certificate is for pve1.example.lan, 192.0.2.7; use one of these names in proxmox.url",
        id="wrong-name",
    ),
    pytest.param({"names": []}, "the certificate is for another host; use one of these names in proxmox.url", id="nameless"),
    pytest.param(
        {"not_before_days": -30, "days": 10}, "the certificate is .*valid.* from .* to .*; renew it, or set the clock", id="expired"
    ),
    pytest.param({"not_before_days": 2}, "the certificate is .*valid.* from .* to .*; renew it, or set", id="not-yet-valid"),
]


@pytest.mark.parametrize(("options", "complaint"), REFUSED)
def test_defective_certificate_is_refused_with_its_defect(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    with lab.SimulatedNode(lab.make_certificates(tmp_path, **options)) as node:
        with pytest.raises(agent.TransportError, match=f"GET {STATUS}: 127.0.0.1:{node.port}: {complaint}"):
            status_of(node)
        assert node.requests == []


def test_foreign_ca_is_refused_and_the_file_to_name_is_said(
    node: lab.SimulatedNode, hub: lab.SimulatedHub, certificates: lab.Certificates, hub_certificates: lab.Certificates
) -> None:
    with pytest.raises(agent.TransportError, match=r"not .*trusted.*; name its CA in proxmox.ca_file, /etc/pve/pve-root-ca.pem"):
        status_of(node, ca_file=str(hub_certificates.ca_file))
    with pytest.raises(agent.TransportError, match=r"not .*trusted.*; name the CA that signed it in hub.ca_file"):
        report_to(hub, ca_file=str(certificates.ca_file))
    with pytest.raises(agent.TransportError, match=r"not .*trusted"):
        status_of(node, ca_file="")  # the system's roots
    assert node.requests == hub.requests == []


class OldServer(lab.Certificates):
    """For a server that knows nothing newer than TLS 1.1."""

    def server_context(self) -> ssl.SSLContext:
        context = super().server_context()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context


def test_tls_before_1_2_is_refused(certificates: lab.Certificates) -> None:
    with lab.SimulatedNode(OldServer(**dataclasses.asdict(certificates))) as node:
        with pytest.raises(agent.TransportError, match="TLS"):
            status_of(node)
        with pytest.raises(agent.TransportError, match="TLS"):
            status_of(node, fingerprint=certificates.fingerprint)


@pytest.mark.parametrize("form", [str, lambda text: text.replace(":", "").lower()], ids=["colons", "bare"])
@pytest.mark.parametrize("options", [{}, {"names": []}, {"not_before_days": -30, "days": 10}], ids=["good", "nameless", "expired"])
def test_pinned_certificate_is_accepted_whatever_signed_it(tmp_path: Path, options: dict[str, Any], form: Callable[[str], str]) -> None:
    certificates = lab.make_certificates(tmp_path, **options)
    with lab.SimulatedNode(certificates) as node:
        assert status_of(node, ca_file="", fingerprint=form(certificates.fingerprint))


def test_nothing_is_sent_to_another_than_the_pinned_certificate(node: lab.SimulatedNode, hub_certificates: lab.Certificates) -> None:
    with pytest.raises(agent.TransportError, match=r"the certificate is not the pinned one; compare proxmox.fingerprint with"):
        status_of(node, fingerprint=hub_certificates.fingerprint)  # though its CA is trusted
    assert (node.connections, node.requests) == (1, [])


# --- proxies ------------------------------------------------------------------------------------------------------------------------


class Tunnel(socketserver.BaseRequestHandler):
    """One connection of a client that asks for CONNECT: whatever it asks for, it gets the proxy's target."""

    server: Proxy

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.request.recv(1)
        self.server.heads.append(head)
        self.request.sendall(self.server.answer)
        with socket.create_connection(("127.0.0.1", self.server.target_port)) as onward:
            other = {self.request: onward, onward: self.request}
            while True:
                for source in select.select(list(other), [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    self.server.passed += data
                    other[source].sendall(data)


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy; `heads` is what it was asked, `passed` all that went through."""

    def __init__(self, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.target_port = target_port
        self.answer = b"HTTP/1.1 200 Connection established\r\n\r\n"
        self.heads: list[bytes] = []
        self.passed = b""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@pytest.fixture
def far_hub(tmp_path: Path) -> Iterator[lab.SimulatedHub]:
    """A hub whose certificate names hub.example.com alone."""
    with lab.SimulatedHub(lab.make_certificates(tmp_path / "far", generation="current", names=["hub.example.com"])) as hub:
        yield hub


@pytest.fixture
def proxy(far_hub: lab.SimulatedHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy that the environment names; everything leads to the hub."""
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Proxy(far_hub.port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for name in ("https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://operator:pass%40word@127.0.0.1:{server.port}")
        yield server
        server.shutdown()
        thread.join()


FAR = "https://hub.example.com"


@pytest.mark.parametrize(("port", "asked"), [("", b":443"), (":8443", b":8443")], ids=["usual-port", "port"])
def test_hub_is_reached_through_the_proxy(far_hub: lab.SimulatedHub, proxy: Proxy, port: str, asked: bytes) -> None:
    assert report_to(far_hub, url=FAR + port).poll_interval_seconds == 900
    assert len(far_hub.reports) == 1
    assert [head.splitlines()[0] for head in proxy.heads] == [b"CONNECT hub.example.com" + asked + b" HTTP/1.1"]
    assert b"Proxy-authorization: Basic b3BlcmF0b3I6cGFzc0B3b3Jk\r\n" in proxy.heads[0]
    assert far_hub.api_key.encode() not in proxy.heads[0] + proxy.passed
    assert not [name for name in far_hub.requests[0].headers if name.startswith("proxy")]


def test_hub_behind_the_proxy_must_bear_its_name(far_hub: lab.SimulatedHub, proxy: Proxy, resolve: Addresses) -> None:
    resolve["other.example.com"] = [address(far_hub.port)]
    with pytest.raises(agent.TransportError, match=r"the certificate is for hub.example.com; use one of these names in hub.url"):
        report_to(far_hub, url="https://other.example.com")
    assert far_hub.requests == []


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        pytest.param(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "the proxy does not let us through", id="407"),
        pytest.param(b"HTTP/1.1 301 Moved\r\nLocation: https://127.0.0.1/\r\n\r\n", "the proxy does not let us through", id="redirect"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", "the proxy cannot be used: no answer in HTTP", id="no-http"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: %s\r\n" % (b"x" * 60_000) * 20, "the answer is too large", id="too-large"),
    ],
)
def test_proxy_that_refuses_is_named_and_its_password_is_not(
    far_hub: lab.SimulatedHub, proxy: Proxy, answer: bytes, complaint: str
) -> None:
    proxy.answer = answer
    with pytest.raises(agent.TransportError, match=f"through the proxy 127.0.0.1:{proxy.port}.*{complaint}; check https_proxy") as caught:
        report_to(far_hub, url=FAR)
    assert far_hub.requests == []
    assert "pass" not in str(caught.value)


def test_proxy_that_is_not_there_is_named(far_hub: lab.SimulatedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(agent.TransportError, match="the proxy cannot be used: connection refused; check https_proxy and no_proxy"):
        report_to(far_hub, url=FAR)


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http:/secret",
        "http://:3128",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1:secret",
        "http://operator:p@secret/1@127.0.0.1:3128",
        "http://operator:p/secret@127.0.0.1:3128",
        "http://operator:p@secret@127.0.0.1:3128",
    ],
)
def test_proxy_without_a_usable_address_is_told_and_never_passed_over(
    far_hub: lab.SimulatedHub, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, resolve: Addresses, address: str
) -> None:
    monkeypatch.setenv("https_proxy", address)
    resolve["hub.example.com"] = [("not to be asked",)]
    with pytest.raises(agent.TransportError, match="the proxy's address cannot be used; check https_proxy and no_proxy") as caught:
        report_to(far_hub, url=FAR)
    assert (far_hub.connections, proxy.heads) == (0, [])
    assert "secret" not in str(caught.value)


def test_no_proxy_is_honoured(far_hub: lab.SimulatedHub, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, resolve: Addresses) -> None:
    monkeypatch.setenv("no_proxy", "example.org,.example.com")
    resolve["hub.example.com"] = [address(far_hub.port)]
    report_to(far_hub, url=FAR)
    assert (len(far_hub.reports), proxy.heads) == (1, [])


def test_proxy_is_never_used_for_proxmox_or_loopback(
    node: lab.SimulatedNode, hub: lab.SimulatedHub, proxy: Proxy, resolve: Addresses
) -> None:
    resolve["pve1.example.lan"] = resolve["localhost"] = []
    for host in ("127.0.0.1", "localhost", "pve1.example.lan"):
        assert status_of(node, url=f"https://{host}:{node.port}")
    for host in ("127.0.0.1", "localhost"):
        report_to(hub, url=f"https://{host}:{hub.port}")
    assert proxy.heads == []


# --- nothing is left ----------------------------------------------------------------------------------------------------------------

FAULTS: list[tuple[str, lab.Answer]] = [
    ("/nodes$", lab.Cut()),
    (STATUS, lab.Reply(500, "broken")),
    ("/nodes/pve1/lxc$", lab.Raw(b"nonsense")),
    ("/nodes/pve1/lxc$", lab.Raw(raw(b'{"data":[', length=99))),
    ("/nodes/pve1/lxc/", lab.Cut()),
    ("/nodes/pve1/lxc/", lab.Reply(403, "no")),
    ("/nodes/pve1/lxc/", lab.Reply(301, "moved", headers={"Location": "/"})),
    ("/access/", lab.Raw(raw(b"{}") * 2)),
    ("/api/", lab.Reply(503, headers={"Retry-After": "1"})),
    ("/api/", lab.Cut()),
]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def count_ours() -> int:
    gc.collect()
    return sum(type(each).__module__ in (agent.__name__, "http.client", "urllib.request") for each in gc.get_objects())


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_nothing_is_left_after_many_cycles_with_faults(
    certificates: lab.Certificates, hub_certificates: lab.Certificates, tls: bool
) -> None:
    before = open_descriptors(), threading.active_count()
    node = lab.SimulatedNode(certificates if tls else None, guests=lab.many_guests(2))
    with node, lab.SimulatedHub(hub_certificates if tls else None) as hub:
        collector = build_collector(node)
        client = agent.HubClient(hub_config(hub), logger=LOG)
        ours = []
        for _ in range(4):
            for match, fault in FAULTS:
                for server in (node, hub):
                    server.clear_script()
                    server.script(match, fault)
                with contextlib.suppress(agent.AgentError):
                    client.report(collector.collect())
            ours.append(count_ours())
    assert (open_descriptors(), threading.active_count()) == before
    assert ours[0] == ours[-1]
