"""What holds for both clients: time limits, sizes, connections, redirects, TLS and addresses.

Real sockets and real TLS throughout; only host names are looked up in a table.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import re
import select
import signal
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
from support import (
    HANG_SECONDS,
    SOON,
    make_hub_client,
    make_report,
    proxmox_config,
    raw_server,
)

STATUS: Final = "/nodes/pve1/status"
REPORT: Final = "/api/v1/host-report"
OK: Final = b"HTTP/1.1 200 OK\r\n"
CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"
Request = Callable[..., object]


def read_status(node: lab.SimulatedNode | None = None, **changes: Any) -> object:
    """Make one GET request; `changes` are keys of the configuration."""
    config = proxmox_config(node or lab.SimulatedNode(None), **changes)
    with contextlib.closing(agent.ProxmoxClient(config)) as client:
        return client.node_status()


def post_report(hub: lab.SimulatedHub | None = None, **changes: Any) -> object:
    """Make one POST request."""
    return make_hub_client(hub or lab.SimulatedHub(None), **changes).report(make_report())


both_clients = pytest.mark.parametrize(
    "request_to", [read_status, post_report], ids=["GET", "POST"]
)

# ---- the time limit ------------------------------------------------------------------------------


Server = Callable[[], contextlib.AbstractContextManager[int]]


def slow_server(start: bytes, again: bytes = b"") -> Server:
    """A server that sends `start` at once and `again` over and over, for ten seconds."""

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(start)
        for _ in range(500):
            readable = select.select([connection], [], [], 0.02)[0]
            if readable and not connection.recv(65536):
                return
            connection.sendall(again)

    return lambda: raw_server(talk)


@pytest.fixture(autouse=True)
def no_alarm_is_left() -> Iterator[None]:
    yield
    assert signal.setitimer(signal.ITIMER_REAL, 0) == (0, 0)


# Of a record of 16 KiB.
HANDSHAKE: Final = b"\x16\x03\x03\x40\x00\x02"
LENGTH: Final = b"Content-Length: 999\r\n\r\n"


@both_clients
@pytest.mark.parametrize(
    ("scheme", "server"),
    [
        pytest.param("https", slow_server(b""), id="silent handshake"),
        pytest.param("https", slow_server(HANDSHAKE, b"\0"), id="dripping handshake"),
        pytest.param("http", slow_server(b""), id="silence"),
        pytest.param("http", slow_server(b"HTTP/1.1 200 ", b"O"), id="dripping status line"),
        pytest.param("http", slow_server(OK, b"X: x\r\n"), id="dripping headers"),
        pytest.param("http", slow_server(OK + LENGTH, b" "), id="dripping body"),
        pytest.param("http", slow_server(CHUNKED, b"1\r\n \r\n"), id="dripping chunks"),
    ],
)
def test_time_limit_covers_every_stage(scheme: str, server: Server, request_to: Request) -> None:
    with server() as port:
        began = time.monotonic()
        with pytest.raises(agent.RequestTimeout, match=r"timed out; .*timeout_seconds"):
            request_to(url=f"{scheme}://127.0.0.1:{port}", timeout_seconds=SOON)
        assert SOON * 0.9 < time.monotonic() - began < HANG_SECONDS


# An alarm in a finalizer, or in the making of a socket, is Python's own business.  Each of these
# tests collects what is left of it, or a later one would find that.
alarm_anywhere = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@alarm_anywhere
def test_alarm_is_not_lost_between_chunks(plain_hub: lab.SimulatedHub) -> None:
    """Python 3.12 and 3.13 do not handle what a signal raises at the end of some loops in a try."""
    plain_hub.script("", lab.Forever(lab.Raw(CHUNKED + b"1\r\n \r\n" * 20_000)))
    client, report = make_hub_client(plain_hub, timeout_seconds=SOON / 50), make_report()
    for _ in range(100):
        with pytest.raises(agent.TransportError):
            client.report(report)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    gc.collect()


@alarm_anywhere
def test_alarm_that_comes_at_once_is_not_left_on(plain_node: lab.SimulatedNode) -> None:
    client = agent.ProxmoxClient(proxmox_config(plain_node))
    for microseconds in [*range(1, 40)] * 5:
        deadline = time.monotonic() + microseconds / 1e6
        with client.session(deadline), pytest.raises(agent.TransportError):
            client.node_status()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    gc.collect()


def test_alarm_from_elsewhere_is_none(plain_node: lab.SimulatedNode) -> None:
    """Somebody else's, or one that was on its way when its request ended."""
    assert read_status(plain_node)
    signal.raise_signal(signal.SIGALRM)


def test_request_that_was_interrupted_is_not_sent_with_the_next_one(
    plain_node: lab.SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the alarm had come when http.client had put the headers together."""

    def interrupt(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    client = agent.ProxmoxClient(proxmox_config(plain_node))
    with monkeypatch.context() as patch:
        patch.setattr(http.client.HTTPConnection, "endheaders", interrupt)
        with pytest.raises(agent.RequestTimeout):
            client.node_status()
    for _ in range(2):
        with client.session(time.monotonic() + 60):
            assert client.node_status()
    first, second = plain_node.requests
    assert first.headers == second.headers


# ---- sizes ---------------------------------------------------------------------------------------


FRAMES: Final = {
    "Content-Length": b"Content-Length: %(length)d\r\n\r\n%(body)b",
    "no length": b"\r\n%(body)b",
    "chunk": b"Transfer-Encoding: chunked\r\n\r\n%(length)x\r\n%(body)b\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize(
    ("name", "request_to", "maximum"),
    [("node", read_status, 8 * 1024 * 1024), ("hub", post_report, 1024 * 1024)],
    ids=["node", "hub"],
)
def test_body_may_have_its_maximum_and_not_a_byte_more(
    request: pytest.FixtureRequest, name: str, request_to: Request, maximum: int, frame: bytes
) -> None:
    server = request.getfixturevalue(f"plain_{name}")
    for length in (maximum, maximum + 1):
        body = b'{"data":{"uptime":1}}'.ljust(length)
        server.script("", lab.Raw(OK + frame % {b"length": length, b"body": body}))
    assert request_to(server)
    with pytest.raises(agent.TransportError, match=rf"\b{maximum}\b.*; .*\.url"):
        request_to(server)


# ---- kept connections ----------------------------------------------------------------------------


@pytest.fixture
def client(node: lab.SimulatedNode) -> Iterator[agent.ProxmoxClient]:
    with contextlib.closing(agent.ProxmoxClient(proxmox_config(node))) as client:
        yield client


def connections_used(server: lab.Server) -> list[int]:
    return [request.connection for request in server.requests]


def test_connection_that_the_server_closed_is_replaced_once(
    node: lab.SimulatedNode, client: agent.ProxmoxClient
) -> None:
    client.node_status()
    # It stops and starts, then it cuts a connection off.
    node.__exit__()
    node.__enter__()
    assert client.node_status()
    node.script(STATUS, lab.Cut(), lab.Usual(), lab.Forever(lab.Cut()))
    assert client.node_status()
    assert connections_used(node) == [1, 2, 2, 3]
    with pytest.raises(agent.TransportError, match=f"^GET {STATUS}: .*closed.*; "):
        client.node_status()
    assert connections_used(node)[4:] == [3, 4]


def test_post_is_never_sent_twice(hub: lab.SimulatedHub) -> None:
    client = make_hub_client(hub)
    client.report(make_report())
    hub.script("", lab.Cut())
    with pytest.raises(agent.TransportError, match=f"^POST {REPORT}: .*closed.*; "):
        client.report(make_report())
    assert connections_used(hub) == [1, 2]


@pytest.mark.parametrize(
    "answer",
    [
        *(lab.Reply(status, close=False) for status in (301, 403, 500)),
        *(lab.Reply(body=body) for body in (b"<html>", b"[]", bytes(9 << 20))),
        lab.Raw(b"nonsense\r\n", "silence"),
    ],
    ids=["301", "403", "500", "HTML", "array", "too large", "not HTTP"],
)
def test_connection_is_closed_after_a_failure(
    plain_node: lab.SimulatedNode, answer: lab.Answer
) -> None:
    plain_node.script(STATUS, lab.Usual(), answer)
    with contextlib.closing(agent.ProxmoxClient(proxmox_config(plain_node))) as client:
        client.node_status()
        with pytest.raises(agent.AgentError):
            client.node_status()
        assert client.node_status()
    assert connections_used(plain_node) == [1, 1, 2]


# ---- redirects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed_and_leaks_neither_secret(
    node: lab.SimulatedNode,
    hub: lab.SimulatedHub,
    certificates: lab.Certificates,
    status: int,
) -> None:
    requests: list[Callable[[], object]] = [lambda: read_status(node), lambda: post_report(hub)]
    with lab.SimulatedNode(certificates) as target:
        places = ("/elsewhere", f"{target.url}{STATUS}", f"http://127.0.0.1:{target.port}/", "//[")
        for place in ("", "file:///etc/hostname", *places):
            redirect = lab.Reply(status, "Moved", headers={"Location": place})
            node.script(STATUS, redirect)
            hub.script(REPORT, redirect)
            for request in requests:
                with pytest.raises(agent.HTTPError, match=f": {status} Moved to ") as caught:
                    request()
                problem, _, hint = str(caught.value).partition("; ")
                assert problem.endswith(place)
                assert [word for word in (".url", "https", "login") if word not in hint] == []
                assert caught.value.status == status
        assert target.connections == 0
    assert len(node.requests) == len(hub.requests) == 2 + len(places)


# ---- certificates --------------------------------------------------------------------------------


def assert_refused(
    request_to: Request, server: lab.Server, sentence: str, hint: str, **changes: Any
) -> None:
    with pytest.raises(agent.TransportError) as caught:
        request_to(server, **changes)
    problem, _, shown_hint = str(caught.value).partition("; ")
    assert re.search(rf": 127\.0\.0\.1:{server.port}: .*{sentence}", problem)
    assert re.search(hint, shown_hint)
    # Nothing was sent, and there was no second connection to find out more.
    assert (server.connections, server.requests) == (1, [])


CLOCK: Final = "renew.*clock"
NAMES: Final = (r"name.*proxmox\.url.*pvenode cert info", r"name.*hub\.url")
# A missing intermediate certificate looks like an unknown CA, so the hint names both.
UNKNOWN: Final = (
    r"^set proxmox\.ca_file .*/etc/pve/pve-root-ca\.pem.*intermediate",
    r"^set hub\.ca_file.*intermediate",
)
# No hint says to set what is set: a public certificate, or a file that was made anew.
REPLACED: Final = (
    r"^if .* public.* \"\" and .*name.*proxmox\.url.* restart the agent; .*intermediate",
    r"^check that hub\.ca_file .* restart the agent; .*intermediate",
)


@pytest.mark.parametrize(
    ("options", "trusted", "sentence", "hints"),
    [
        ({"not_before_days": -30, "days": 9}, "its own", "expired", (CLOCK, CLOCK)),
        ({"not_before_days": 2}, "its own", "not yet valid", (CLOCK, CLOCK)),
        ({"names": ["pve1.example.lan", "192.0.2.7"]}, "its own", "mismatch", NAMES),
        ({"names": []}, "its own", "mismatch", NAMES),
        ({}, "none", "unable to get local issuer", UNKNOWN),
        ({}, "another", "certificate", REPLACED),
        # That the server sends its root, too, proves nothing.
        ({}, "none, but root is sent", "self-signed", UNKNOWN),
    ],
    ids=["expired", "not yet valid", "name", "nameless", "unknown CA", "replaced", "root"],
)
def test_certificate_is_refused_in_openssls_words(
    tmp_path: Path,
    hub_certificates: lab.Certificates,
    options: dict[str, Any],
    trusted: str,
    sentence: str,
    hints: tuple[str, str],
) -> None:
    certificates = lab.make_certificates(tmp_path, **options)
    if trusted == "none, but root is sent":
        chain = certificates.cert_file.read_bytes() + certificates.ca_file.read_bytes()
        certificates.cert_file.write_bytes(chain)
    files = {"its own": certificates.ca_file, "another": hub_certificates.ca_file}
    ca_file = str(files.get(trusted, ""))
    with lab.SimulatedNode(certificates) as node, lab.SimulatedHub(certificates) as hub:
        assert_refused(read_status, node, sentence, hints[0], ca_file=ca_file)
        assert_refused(post_report, hub, sentence, hints[1], ca_file=ca_file)


# X509_V_ERR_… of x509_vfy.h; for the first and the last no server here is a reason.
@pytest.mark.parametrize("code", [2, 18, 19, 20, 21])
def test_codes_of_a_ca_that_is_not_known(code: int) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code = code
    assert agent.find_cause(error) == "unknown CA"


def test_without_a_ca_file_the_machines_own_cas_are_trusted(
    node: lab.SimulatedNode,
    hub: lab.SimulatedHub,
    certificates: lab.Certificates,
    hub_certificates: lab.Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca_file))
    assert read_status(node, ca_file="")
    monkeypatch.setenv("SSL_CERT_FILE", str(hub_certificates.ca_file))
    assert post_report(hub, ca_file="")


@pytest.mark.parametrize(
    "form", [str, lambda text: text.replace(":", "").lower()], ids=["colons", "bare"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"names": []}, {"not_before_days": -30, "days": 10}],
    ids=["good", "nameless", "expired"],
)
def test_pinned_certificate_is_accepted_whatever_else_it_is(
    tmp_path: Path, options: dict[str, Any], form: Callable[[str], str]
) -> None:
    certificates = lab.make_certificates(tmp_path, **options)
    with lab.SimulatedNode(certificates) as node:
        assert read_status(node, ca_file="", fingerprint=form(certificates.fingerprint))


def test_nothing_is_sent_to_another_certificate_than_the_pinned_one(
    node: lab.SimulatedNode, certificates: lab.Certificates, hub_certificates: lab.Certificates
) -> None:
    """Not even if its CA is trusted, and not if it comes with the second connection."""
    actual = certificates.fingerprint.replace(":", "")
    # Of the actual one all but the last digit are right.
    almost = actual[:-1] + ("0" if actual[-1] != "0" else "1")
    for fingerprint in (hub_certificates.fingerprint, almost):
        client = agent.ProxmoxClient(proxmox_config(node, fingerprint=fingerprint))
        # The connection that was made does not stay behind.
        for _ in range(2):
            with pytest.raises(agent.TransportError, match=f"{actual}; .*proxmox.fingerprint"):
                client.node_status()
    assert (node.connections, node.requests) == (4, [])

    right = proxmox_config(node, fingerprint=certificates.fingerprint)
    with contextlib.closing(agent.ProxmoxClient(right)) as client:
        client.node_status()
        node.__exit__()
        node.certificates = hub_certificates
        node.__enter__()
        with pytest.raises(agent.TransportError, match=r"proxmox\.fingerprint"):
            client.node_status()
    assert len(node.requests) == 1


# ---- TLS -----------------------------------------------------------------------------------------


def old_server(certificates: lab.Certificates) -> ssl.SSLContext:
    context = certificates.server_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def demanding_server(certificates: lab.Certificates) -> ssl.SSLContext:
    context = certificates.server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.ca_file)
    return context


def shake_hands(connection: socket.socket, context: ssl.SSLContext | None) -> None:
    """Do so with this context, or answer in plain HTTP."""
    if context is None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        return
    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as tls:
        with contextlib.suppress(ssl.SSLError):
            tls.do_handshake()
        # Until the client leaves: a reset could overtake the alert.
        while socket.socket.recv(tls, 65536):
            pass


@both_clients
@pytest.mark.parametrize(
    ("build_context", "reason"),
    [
        pytest.param(old_server, "protocol version", id="TLS 1.0"),
        pytest.param(lambda _: None, "wrong version", id="plain HTTP"),
        # There the alert comes only with the first read.
        pytest.param(demanding_server, "certificate required", id="client certificate"),
    ],
)
def test_tls_that_fails_is_told_with_openssls_reason(
    certificates: lab.Certificates,
    build_context: Callable[[lab.Certificates], ssl.SSLContext | None],
    reason: str,
    request_to: Request,
) -> None:
    context = build_context(certificates)
    changes: dict[str, Any] = {"ca_file": str(certificates.ca_file), "timeout_seconds": 5}
    with (
        raw_server(lambda connection: shake_hands(connection, context)) as port,
        pytest.raises(agent.TransportError, match=f"{reason}.*; .*TLS 1.2"),
    ):
        request_to(url=f"https://127.0.0.1:{port}", **changes)


@both_clients
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_server_that_ends_the_handshake(ending: str, request_to: Request) -> None:
    """As pveproxy does with ALLOW_FROM, and any server that stops."""

    def talk(connection: socket.socket) -> None:
        # Not before all of it has come, or closing would be a reset.
        connection.recv(65536)
        if ending == "reset":
            lab.reset_when_closed(connection)

    hint = "(pveproxy, and ALLOW_FROM|the web server in front of the hub)"
    expected = f"connection closed or reset during the TLS handshake; check .*{hint}"
    with raw_server(talk) as port, pytest.raises(agent.TransportError, match=expected):
        request_to(url=f"https://127.0.0.1:{port}")


# ---- addresses -----------------------------------------------------------------------------------

Address = tuple[Any, ...]
Addresses = dict[str, list[Address]]


def address(port: int, family: int = socket.AF_INET) -> Address:
    return (family, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Addresses:
    """Host name → its addresses; no other name is known, and none is looked up anywhere else."""
    known: Addresses = {}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, family: int = 0, type: int = 0) -> list[Any]:
        flags = socket.AI_NUMERICHOST
        return known[host] if host in known else list(real(host, port, family, type, 0, flags))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


SWALLOWED: Final = r"connection timed out; .*\.url is up, firewalls"


@both_clients
def test_address_that_swallows_packets_has_five_seconds(
    node: lab.SimulatedNode,
    resolve: Addresses,
    request_to: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As broken IPv6 does; the next one has the rest of the time."""
    assert agent.CONNECT_SECONDS == 5
    monkeypatch.setattr(agent, "CONNECT_SECONDS", 0.1)
    with lab.black_hole() as port:
        resolve["pve1.example.lan"] = [address(port)] * 3
        with pytest.raises(agent.TransportError, match=SWALLOWED):
            request_to(url="https://pve1.example.lan")
        resolve["pve1.example.lan"].append(address(node.port))
        with pytest.raises(agent.TransportError, match="certificate"):
            request_to(url="https://pve1.example.lan")


@alarm_anywhere
@both_clients
def test_time_limit_covers_all_addresses(resolve: Addresses, request_to: Request) -> None:
    began = time.monotonic()
    with lab.black_hole() as port:
        resolve["pve1.example.lan"] = [address(port)] * 20
        with pytest.raises(agent.TransportError, match=SWALLOWED):
            request_to(url="https://pve1.example.lan", timeout_seconds=SOON)
    assert SOON * 0.9 < time.monotonic() - began < HANG_SECONDS


@both_clients
def test_handshake_may_take_longer_than_connecting(
    certificates: lab.Certificates, request_to: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "CONNECT_SECONDS", 0.1)
    is_over = threading.Event()

    def talk(connection: socket.socket) -> None:
        is_over.wait(0.5)
        with certificates.server_context().wrap_socket(connection, server_side=True) as tls:
            assert lab.read_request(tls.makefile("rb"), 1)
            tls.sendall(OK + b"Content-Length: 11\r\n\r\n" + b'{"data":{}}')

    with raw_server(talk) as port:
        request_to(url=f"https://127.0.0.1:{port}", ca_file=str(certificates.ca_file))


@both_clients
def test_failure_of_the_first_address_is_told(resolve: Addresses, request_to: Request) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refused = address(listener.getsockname()[1])
    # As ::1 is on a host without IPv6: getaddrinfo puts it last.
    addresses = [refused, address(1, socket.AF_X25)]
    resolve["server.example.lan"] = addresses
    with pytest.raises(agent.TransportError, match=r": server\.example\.lan: .*refused; .*\.url"):
        request_to(url="https://server.example.lan")
    resolve["server.example.lan"] = [addresses[1]]
    with pytest.raises(agent.TransportError, match="family"):
        request_to(url="https://server.example.lan")


@both_clients
def test_reset_while_connecting_is_told(
    request_to: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset while sending is not, for then the response says more."""

    def reset(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(socket, "create_connection", reset)
    with pytest.raises(agent.TransportError, match=r"Connection reset by peer; .*\.url"):
        request_to(url="http://127.0.0.1:1")


@both_clients
def test_label_that_is_too_long_is_a_failure_and_a_bug_is_none(
    request_to: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug's traceback has to reach the log."""
    with pytest.raises(agent.TransportError, match=r"label .*too long.*\.url"):
        request_to(url=f"https://{'a' * 64}.example.com")
    monkeypatch.setattr(agent, "open_socket", lambda: None)
    with pytest.raises(TypeError):
        request_to(url="http://127.0.0.1:1")
