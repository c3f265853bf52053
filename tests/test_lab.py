"""What the agent's tests trust the simulated node and hub to do."""

from __future__ import annotations

import copy
import hashlib
import http.client
import json
import shlex
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import jsonschema
import pytest

import lab

LAB = Path(lab.__file__)
CONFIG = "/nodes/pve1/lxc/{}/config"


def trusting(certificates: lab.Certificates) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates.ca_file))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def connect(server: lab.Server) -> http.client.HTTPSConnection:
    assert server.certificates
    return http.client.HTTPSConnection("127.0.0.1", server.port, context=trusting(server.certificates), timeout=10)


def token(node: lab.SimulatedNode) -> dict[str, str]:
    return {"Authorization": f"PVEAPIToken={node.token_id}={node.token_secret}"}


@pytest.fixture
def client(node: lab.SimulatedNode) -> Iterator[http.client.HTTPSConnection]:
    with closing(connect(node)) as connection:
        yield connection


class Caller:
    """Calls the node with its token over one connection, as far as the node keeps it."""

    def __init__(self, node: lab.SimulatedNode, client: http.client.HTTPSConnection) -> None:
        self.node, self.client = node, client

    def __call__(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes]:
        self.client.request(method, "/api2/json" + path, headers=token(self.node) if headers is None else headers)
        response = self.client.getresponse()
        return response, response.read()

    def data(self, path: str) -> Any:
        response, body = self(path)
        assert response.status == 200
        return json.loads(body)["data"]


@pytest.fixture
def call(node: lab.SimulatedNode, client: http.client.HTTPSConnection) -> Caller:
    return Caller(node, client)


# --- certificates -------------------------------------------------------------------------------------------------------------------


def handshake(server: lab.Server, context: ssl.SSLContext, name: str = "127.0.0.1") -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 10) as plain, context.wrap_socket(plain, server_hostname=name) as tls:
        return tls.getpeercert(binary_form=True) or b""


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "localhost", "pve1", "pve1.example.lan"])
def test_node_certificate_names_what_proxmox_names(node: lab.SimulatedNode, certificates: lab.Certificates, name: str) -> None:
    presented = handshake(node, trusting(certificates), name)
    assert hashlib.sha256(presented).hexdigest().upper() == certificates.fingerprint.replace(":", "")


@pytest.mark.parametrize(
    ("generation", "complaint"), [("current", None), ("old", "key usage extension"), ("pve7", "Missing Authority Key Identifier")]
)
def test_strict_check_refuses_the_older_chains(
    tmp_path: Path, generation: Literal["current", "old", "pve7"], complaint: str | None
) -> None:
    certificates = lab.make_certificates(tmp_path, generation=generation)
    strict = ssl.create_default_context(cafile=str(certificates.ca_file))
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    with lab.SimulatedNode(certificates) as node:
        handshake(node, trusting(certificates))
        if complaint is None:
            handshake(node, strict)
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match=complaint):
                handshake(node, strict)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param({"not_before_days": -30, "days": 10}, "expired", id="expired"),
        pytest.param({"not_before_days": 2}, "not yet valid", id="not-yet-valid"),
        pytest.param({"names": ["pve1.example.lan"]}, "IP address mismatch", id="no-loopback-name"),
    ],
)
def test_defective_certificate_is_refused(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    certificates = lab.make_certificates(tmp_path, **options)
    with lab.SimulatedNode(certificates) as node, pytest.raises(ssl.SSLCertVerificationError, match=complaint):
        handshake(node, trusting(certificates))


def test_one_lab_does_not_vouch_for_another(node: lab.SimulatedNode, tmp_path: Path) -> None:
    other = lab.make_certificates(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(node, trusting(other))


# --- the node's answers -------------------------------------------------------------------------------------------------------------


def test_answer_has_the_headers_of_pveproxy(call: Caller) -> None:
    response, body = call("/version")
    assert body == b'{"data":{"release":"9.2","repoid":"14a22df35955d97d","version":"9.2.11"}}'
    headers = dict(response.headers)
    assert headers.pop("Date") == headers.pop("Expires")
    assert headers == {
        "Cache-Control": "max-age=0",
        "Connection": "Keep-Alive",
        "Pragma": "no-cache",
        "Server": "pve-api-daemon/3.0",
        "Content-Length": "73",
        "Content-Type": "application/json;charset=UTF-8",
    }


LOOKUP = "hostname lookup 'nosuch' failed - failed to get address info for: nosuch: Temporary failure in name resolution"


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/nodes/nosuch/status", 500, LOOKUP),
        ("/nodes/nosuch/lxc", 500, LOOKUP),
        ("/nodes/pve1/lxc/4711/config", 500, "Configuration file 'nodes/pve1/lxc/4711.conf' does not exist"),
        ("/nodes/pve1/lxc/999/config", 500, "Configuration file 'nodes/pve1/lxc/999.conf' does not exist"),
        ("/nodes/pve1/lxc/abc/config", 400, "Parameter verification failed."),
        ("/nodes/pve1/lxc/99/config", 400, "Parameter verification failed."),
        ("/nodes/pve1/lxc/100/config?current=maybe", 400, "Parameter verification failed."),
        ("/nodes/pve1/lxc/100/config?bogus=1", 400, "Parameter verification failed."),
        ("/nodes?bogus=1", 400, "Parameter verification failed."),
        ("/nodes/pve1/nosuchthing", 501, "Method 'GET /nodes/pve1/nosuchthing' not implemented"),
    ],
)
def test_refusal_says_why_in_the_reason_and_closes(call: Caller, node: lab.SimulatedNode, path: str, status: int, reason: str) -> None:
    response, body = call(path)
    assert (response.status, response.reason, response.headers["Connection"]) == (status, reason, "close")
    assert json.loads(body)["data"] is None
    assert json.loads(body)["message"].rstrip("\n") == reason
    call("/version")
    assert node.connections == 2


def test_post_is_not_implemented(call: Caller) -> None:
    response, _body = call("/version", "POST")
    assert (response.status, response.reason) == (501, "Method 'POST /version' not implemented")


@pytest.mark.parametrize("name", ["PVE1", "pve1.example.lan"])
def test_node_name_in_another_spelling_is_unreachable(call: Caller, name: str) -> None:
    response, body = call(f"/nodes/{name}/status")
    assert (response.status, response.reason, body) == (595, "No route to host", b"")
    assert not {"Content-Type", "Content-Length"} & set(response.headers)


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        pytest.param(None, "No ticket", id="none"),
        pytest.param("Bearer x", "No ticket", id="other-scheme"),
        pytest.param("PVEAPIToken=", "No ticket", id="empty"),
        pytest.param("pveapitoken=a@pve!b=c", "No ticket", id="lower-case-scheme"),
        pytest.param("PVEAPIToken=felhom-agent@pve!agent=wrong", "Authentication failed!", id="wrong-secret"),
        pytest.param("PVEAPIToken=nobody", "Authentication failed!", id="malformed"),
    ],
)
def test_unauthenticated_is_refused_late_and_without_a_body(
    call: Caller, node: lab.SimulatedNode, authorization: str | None, reason: str
) -> None:
    node.auth_delay_seconds = 0.1
    began = time.monotonic()
    response, body = call("/nosuchthing", headers={"Authorization": authorization} if authorization else {})
    assert time.monotonic() - began >= 0.1
    assert (response.status, response.reason, body) == (401, reason, b"")
    assert not {"Content-Type", "Content-Length"} & set(response.headers)


def test_localhost_is_the_node_too(call: Caller) -> None:
    assert call.data("/nodes/localhost/status") == call.data("/nodes/pve1/status")


def test_node_status_has_strings_where_proxmox_has(call: Caller) -> None:
    status = call.data("/nodes/pve1/status")
    assert status["loadavg"] == ["2.54", "1.74", "1.20"]
    assert status["cpuinfo"]["mhz"] == "2596.122"
    assert status["cpu"] == 0


# --- rights -------------------------------------------------------------------------------------------------------------------------


def test_token_without_rights_gets_empty_lists_and_refusals(call: Caller, node: lab.SimulatedNode) -> None:
    node.permissions.clear()
    assert call.data("/access/permissions") == {}
    assert call.data("/nodes/pve1/lxc") == []
    assert set(call.data("/nodes")[0]) == {"id", "level", "node", "ssl_fingerprint", "status", "type"}
    for path, reason in {
        "/nodes/pve1/status": "Permission check failed (/nodes/pve1, Sys.Audit)",
        "/nodes/nosuch/status": "Permission check failed (/nodes/nosuch, Sys.Audit)",
        CONFIG.format(100): "Permission check failed (/vms/100, VM.Audit)",
        CONFIG.format(4711): "Permission check failed (/vms/4711, VM.Audit)",
    }.items():
        response, body = call(path)
        assert (response.status, response.reason) == (403, reason)
        assert json.loads(body) == {"data": None, "message": reason + "\n"}


def test_right_on_one_guest_shows_that_guest_alone(call: Caller, node: lab.SimulatedNode) -> None:
    node.permissions = {"/vms/100": {"VM.Audit": 1}}
    assert [guest["vmid"] for guest in call.data("/nodes/pve1/lxc")] == [100]
    assert call.data(CONFIG.format(100))["hostname"] == "web"
    assert call(CONFIG.format(101))[0].status == 403


def test_deeper_path_overrides_a_right_above_it(call: Caller, node: lab.SimulatedNode) -> None:
    node.permissions["/vms/100"] = {"Sys.Audit": 1}
    assert 100 not in [guest["vmid"] for guest in call.data("/nodes/pve1/lxc")]


def test_auditor_sees_the_rights_and_the_figures(call: Caller) -> None:
    permissions = call.data("/access/permissions")
    assert set(permissions) == {"/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"}
    assert permissions["/vms"]["VM.Audit"] == 1
    assert {"cpu", "maxcpu", "mem", "maxmem", "uptime"} < set(call.data("/nodes")[0])


# --- guests -------------------------------------------------------------------------------------------------------------------------


def test_list_has_every_guest_unsorted_and_typed_as_proxmox_types_it(call: Caller) -> None:
    listed = {guest["vmid"]: guest for guest in call.data("/nodes/pve1/lxc")}
    assert list(listed) != sorted(listed)
    assert {vmid: guest["cpus"] for vmid, guest in listed.items()} == {
        **dict.fromkeys((100, 101, 105, 106, 109, 110, 999), 2),
        **dict.fromkeys((103, 104), 1),
        102: "1.5",
        107: "many",
        108: 4,
    }
    assert (listed[103]["template"], listed[104]["lock"]) == (1, "backup")
    assert not {"template", "lock"} & set(listed[100])
    assert (listed[100]["pressurecpusome"], "pressurecpusome" in listed[110]) == ("0.12", False)
    assert (listed[100]["maxdisk"], listed[110]["maxdisk"], listed[109]["maxdisk"]) == (270553174016, 8 << 30, 4 << 30)
    assert (listed[109]["maxmem"], listed[107]["maxmem"]) == (512 << 20, 12 << 20)


def test_config_is_what_the_file_says(call: Caller) -> None:
    broken = call.data(CONFIG.format(107))
    assert (broken["cores"], broken["memory"], broken["rootfs"]) == ("many", "12x", "???")
    assert call.data(CONFIG.format(109)) == {"digest": "da39a3ee5e6b4b0d3255bfef95601890afd80709"}
    assert (call.data(CONFIG.format(102))["cpulimit"], call.data(CONFIG.format(110))["cpulimit"]) == ("1.5", "0")
    assert (call.data(CONFIG.format(103))["template"], call.data(CONFIG.format(104))["lock"]) == (1, "backup")
    assert "☃" in call.data(CONFIG.format(106))["description"]


def test_pending_changes_are_mixed_in_unless_current(call: Caller) -> None:
    pending, current = call.data(CONFIG.format(105)), call.data(CONFIG.format(105) + "?current=1")
    assert (pending["cores"], "swap" in pending) == (4, False)
    assert (current["cores"], current["swap"]) == (2, 512)


def test_many_guests_are_as_many_and_unsorted() -> None:
    vmids = [guest.vmid for guest in lab.many_guests(250)]
    assert vmids != sorted(vmids)
    assert sorted(vmids) == list(range(100, 350))


# --- connections --------------------------------------------------------------------------------------------------------------------


def test_hundredth_request_closes_the_connection(call: Caller, node: lab.SimulatedNode) -> None:
    said = [call("/version")[0].headers["Connection"] for _ in range(101)]
    assert said == ["Keep-Alive"] * 99 + ["close", "Keep-Alive"]
    assert [request.connection for request in node.requests] == [1] * 100 + [2]


def test_guest_list_says_close_then_keep_alive_and_closes(call: Caller, node: lab.SimulatedNode) -> None:
    response, _body = call("/nodes/pve1/lxc")
    assert response.headers.get_all("Connection") == ["close", "Keep-Alive"]
    call("/version")
    assert node.connections == 2


def test_idle_connection_is_closed(certificates: lab.Certificates) -> None:
    node = lab.SimulatedNode(certificates)
    node.idle_seconds = 0.05
    with node, closing(connect(node)) as client:
        Caller(node, client)("/version")
        client.sock.settimeout(lab.IDLE_SECONDS / 2)
        assert client.sock.recv(1) == b""


def test_request_is_recorded_as_it_came(call: Caller, node: lab.SimulatedNode) -> None:
    call(CONFIG.format(100) + "?current=1")
    (request,) = node.requests
    assert (request.method, request.path, request.body) == ("GET", "/api2/json/nodes/pve1/lxc/100/config?current=1", b"")
    assert request.headers["authorization"] == token(node)["Authorization"]


def test_plain_http_where_there_are_no_certificates() -> None:
    with lab.SimulatedNode(None) as node, closing(http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)) as client:
        client.request("GET", "/api2/json/version", headers=token(node))
        assert client.getresponse().status == 200
        assert node.url == f"http://127.0.0.1:{node.port}"


@pytest.mark.parametrize("noise", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "half-a-hello", "no-tls"])
def test_client_that_speaks_no_tls_does_no_harm(call: Caller, node: lab.SimulatedNode, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", node.port)) as plain:
        plain.sendall(noise)
    assert call("/version")[0].status == 200


@pytest.mark.parametrize("noise", [b"", b"nonsense\r\n", b"GET / HTTP/1.1\r\nHost", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"])
def test_client_that_leaves_in_the_middle_is_not_answered(noise: bytes) -> None:
    with lab.SimulatedNode(None) as node, socket.create_connection(("127.0.0.1", node.port), 10) as plain:
        plain.sendall(noise)
        plain.shutdown(socket.SHUT_WR)
        assert plain.recv(1) == b""
        assert node.requests == []


def test_requests_in_flight_are_counted_and_a_stop_ends_them(certificates: lab.Certificates) -> None:
    before = threading.active_count()
    with lab.SimulatedNode(certificates) as node, closing(connect(node)) as one, closing(connect(node)) as other:
        node.script("", lab.Forever(lab.Stall()))
        for client in (one, other):
            client.request("GET", "/api2/json/version", headers=token(node))
        node.wait_for_requests(2, 10)
        assert (node.most_in_flight, node.open_connections) == (2, 2)
    assert (threading.active_count(), node.open_connections) == (before, 0)


def test_answer_on_its_way_still_goes_out_when_the_server_stops(certificates: lab.Certificates) -> None:
    with lab.SimulatedNode(certificates, latency_seconds=600) as node:
        client = connect(node)
        client.request("GET", "/api2/json/version", headers=token(node))
        node.wait_for_requests(1, 10)
    with closing(client):
        assert client.getresponse().read().startswith(b'{"data":')


def test_close_is_announced_in_tls_but_a_cut_is_not(node: lab.SimulatedNode, certificates: lab.Certificates) -> None:
    node.script("", lab.Raw(b""), lab.Cut())
    for complaint in (None, "(?i)EOF"):
        plain = socket.create_connection(("127.0.0.1", node.port), 10)
        context = trusting(certificates)
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)  # Debian's Python 3.11 sets it by default
        with context.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as tls:
            tls.sendall(b"GET / HTTP/1.1\r\n\r\n")
            if complaint is None:
                assert tls.recv(1) == b""
            else:
                with pytest.raises(ssl.SSLError, match=complaint):
                    tls.recv(1)


def test_server_comes_back_on_its_port(certificates: lab.Certificates) -> None:
    node = lab.SimulatedNode(certificates)
    with node:
        port = node.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with node, closing(connect(node)) as client:
        assert node.port == port
        assert Caller(node, client)("/version")[0].status == 200


# --- scripts ------------------------------------------------------------------------------------------------------------------------


def test_script_answers_the_next_matches_in_order(call: Caller, node: lab.SimulatedNode) -> None:
    node.script("/nodes/pve1/status", lab.Reply(503, "Busy"), lab.Usual(), lab.Reply(599))
    assert call("/version")[0].status == 200
    assert [call("/nodes/pve1/status")[0].status for _ in range(4)] == [503, 200, 599, 200]


def test_script_of_an_exact_path_leaves_those_below_it(call: Caller, node: lab.SimulatedNode) -> None:
    node.script("/nodes$", lab.Forever(lab.Reply(500)))
    assert [call(path)[0].status for path in ("/nodes", "/nodes/pve1/status", "/nodes?x=1")] == [500, 200, 500]
    node.clear_script()
    assert call("/nodes")[0].status == 200


def test_scripted_reply_is_sent_as_written(call: Caller, node: lab.SimulatedNode) -> None:
    node.script("", lab.Reply(200, "Fine", b"<html>", {"Content-Type": "text/html", "Server": None}, close=True), lab.Reply(204))
    response, body = call("/version")
    assert (response.reason, body, response.headers["Content-Type"], response.headers["Server"]) == ("Fine", b"<html>", "text/html", None)
    assert response.headers["Connection"] == "close"
    response, body = call("/version")
    assert (response.status, body, response.headers["Content-Length"]) == (204, b"", None)


def test_cut_closes_without_an_answer(call: Caller, node: lab.SimulatedNode) -> None:
    node.script("", lab.Cut())
    with pytest.raises(http.client.RemoteDisconnected):
        call("/version")


@pytest.mark.parametrize(
    "answer",
    [lab.Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"), lab.Drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", 0)],
)
def test_bytes_go_out_as_they_are_then_it_closes(call: Caller, node: lab.SimulatedNode, answer: lab.Answer) -> None:
    node.script("", answer)
    with pytest.raises(http.client.IncompleteRead) as caught:
        call("/version")
    assert caught.value.partial == b"half"


def test_stall_ends_after_its_time(call: Caller, node: lab.SimulatedNode) -> None:
    node.script("", lab.Stall(0.05))
    with pytest.raises(http.client.RemoteDisconnected):
        call("/version")


# --- the hub ------------------------------------------------------------------------------------------------------------------------

REPORT: dict[str, Any] = json.loads("""{
    "host_id": "pve1", "agent_version": "0.3.0", "reported_at": "2026-06-08T14:20:09Z",
    "host": {
        "node": "pve1", "pve_version": "9.2.11", "kernel_version": "6.14.11-4-pve", "uptime_seconds": 2574, "cpu_model": "AMD EPYC",
        "cpu_count": 2, "cpu_usage": 0.0167, "load_average": [2.54, 1.74, 1.2], "memory_total_bytes": 25276510208,
        "memory_used_bytes": 1378762752, "swap_total_bytes": 0, "swap_used_bytes": 0, "rootfs_total_bytes": 270553174016,
        "rootfs_used_bytes": 28216709120
    },
    "guests": [
        {"vmid": 100, "type": "lxc", "name": "web", "status": "running", "controller_version": "",
         "spec": {"cores": 2, "memory_bytes": 1073741824, "disk_bytes": 8589934592}},
        {"vmid": 101, "type": "lxc", "name": "db", "status": "unknown", "controller_version": ""}
    ],
    "cloudflared": {"status": "active"},
    "storage_targets": [], "backups": [], "restore_tests": [], "pbs_snapshots": [], "audit_tail": []
}""")
FIGURES = [name for name, value in REPORT["host"].items() if not isinstance(value, str)]
ABSENT = object()


def changed(path: str, value: object) -> dict[str, Any]:
    """The report with one value changed: `changed("guests.0.spec", ABSENT)`."""
    report = copy.deepcopy(REPORT)
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    inner: Any = report
    for step in parents:
        inner = inner[step]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return report


def post(hub: lab.SimulatedHub, body: bytes, method: str = "POST", path: str = "/api/v1/host-report", **headers: str) -> tuple[int, Any]:
    usual = {"Authorization": f"Bearer {hub.api_key}", "Content-Type": "application/json"}
    with closing(connect(hub)) as client:
        client.request(
            method, urlsplit(hub.url).path + path, body, usual | {name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = client.getresponse()
        return response.status, json.loads(response.read())


def test_good_report_is_kept_and_answered_with_the_envelope(hub: lab.SimulatedHub) -> None:
    assert post(hub, json.dumps(REPORT).encode()) == (200, hub.envelope)
    hub.wait_for_reports(1, 0)
    assert (hub.reports, hub.rejected) == ([REPORT], [])


@pytest.mark.parametrize(
    "report",
    [
        *[pytest.param(changed(f"host.{name}", None), id=f"{name}-unknown") for name in FIGURES],
        *[pytest.param(changed(f"guests.0.spec.{name}", None), id=f"{name}-unknown") for name in REPORT["guests"][0]["spec"]],
        pytest.param(changed("guests", []), id="no-guests"),
        pytest.param(changed("host.load_average", [0, 0.5, 100]), id="whole-numbers-in-load-average"),
        pytest.param(changed("host.memory_total_bytes", 2**53 - 1), id="largest-figure"),
        pytest.param(changed("guests.0.name", "Grüße ☃"), id="unicode-name"),
        pytest.param(changed("audit_tail", [{"at": "2026-06-08T14:20:09Z", "actor": "a", "operation": "o", "result": "r"}]), id="entry"),
    ],
)
def test_report_within_the_contract_is_accepted(hub: lab.SimulatedHub, report: dict[str, Any]) -> None:
    assert post(hub, json.dumps(report).encode()) == (200, hub.envelope)


@pytest.mark.parametrize(
    "report",
    [
        *[pytest.param(changed(name, ABSENT), id=f"without-{name}") for name in REPORT],
        *[pytest.param(changed(name, None), id=f"null-{name}") for name in REPORT],
        *[pytest.param(changed(f"host.{name}", ABSENT), id=f"without-host-{name}") for name in REPORT["host"]],
        *[pytest.param(changed(f"host.{name}", str(REPORT["host"][name])), id=f"string-{name}") for name in FIGURES],
        *[pytest.param(changed(f"host.{name}", -1), id=f"negative-{name}") for name in FIGURES],
        *[pytest.param(changed(f"host.{name}", None), id=f"null-{name}") for name in ["node"]],
        *[pytest.param(changed(f"guests.0.{name}", ABSENT), id=f"guest-without-{name}") for name in REPORT["guests"][0]],
        *[pytest.param(changed(f"guests.0.{name}", None), id=f"guest-null-{name}") for name in REPORT["guests"][0]],
        pytest.param(changed("extra", 1), id="extra-field"),
        pytest.param(changed("host.extra", 1), id="extra-field-in-host"),
        pytest.param(changed("guests.0.spec.extra", 1), id="extra-field-in-spec"),
        pytest.param(changed("guests.1.spec", REPORT["guests"][0]["spec"]), id="spec-with-status-unknown"),
        pytest.param(changed("guests.0.spec.cores", 0), id="zero-cores"),
        pytest.param(changed("guests.0.spec.cores", 1.5), id="broken-cores"),
        pytest.param(changed("guests.0.vmid", 99), id="small-vmid"),
        pytest.param(changed("guests.0.vmid", 102), id="unsorted-guests"),
        pytest.param(changed("guests.0.vmid", 101), id="guest-twice"),
        pytest.param(changed("host.cpu_usage", 1.01), id="cpu-usage-above-one"),
        pytest.param(changed("host.cpu_usage", True), id="boolean-figure"),
        pytest.param(changed("host.load_average", ["2.54", "1.74", "1.20"]), id="load-average-of-strings"),
        pytest.param(changed("host.load_average", [1, 2]), id="short-load-average"),
        pytest.param(changed("host.uptime_seconds", 2574.0), id="float-for-an-integer"),
        pytest.param(changed("host.memory_total_bytes", 2**53), id="figure-beyond-a-double"),
        pytest.param(changed("reported_at", "2026-06-08T14:20:09.5Z"), id="fraction-of-a-second"),
        pytest.param(changed("reported_at", "2026-06-08T14:20:09+00:00"), id="offset-for-z"),
        pytest.param(changed("reported_at", "2026-06-08T14:20:09Z\n"), id="time-with-newline"),
        pytest.param(changed("guests.0.name", "x" * 257), id="long-name"),
        pytest.param(changed("backups", [{}]), id="untyped-backup"),
        pytest.param([], id="no-object"),
    ],
)
def test_report_outside_the_contract_is_refused(hub: lab.SimulatedHub, report: object) -> None:
    status, answer = post(hub, json.dumps(report).encode())
    assert (status, hub.reports) == (422, [])
    assert hub.rejected == [f"422 {answer['error']}"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "lab-hub-key"}, 401),
        ({"Content_Type": "text/plain"}, 415),
        ({"method": "PUT"}, 405),
        ({"path": "/api/v1/other"}, 404),
        ({"path": "/api/v1/host-report?key=x"}, 404),
        ({"body": b"{"}, 400),
        ({"body": b"\xff"}, 400),
        ({"body": json.dumps(changed("host.cpu_usage", float("nan"))).encode()}, 400),
    ],
)
def test_wrong_request_is_refused(hub: lab.SimulatedHub, request_: dict[str, Any], status: int) -> None:
    assert post(hub, **{"body": json.dumps(REPORT).encode(), **request_})[0] == status
    assert (len(hub.rejected), hub.reports) == (1, [])
    assert hub.api_key not in hub.rejected[0]


def test_hub_wants_the_length_of_the_report(hub: lab.SimulatedHub) -> None:
    with closing(connect(hub)) as client:
        client.putrequest("POST", "/api/v1/host-report")
        client.putheader("Authorization", f"Bearer {hub.api_key}")
        client.putheader("Content-Type", "application/json")
        client.endheaders()
        assert client.getresponse().status == 411


def test_hub_lives_below_its_prefix(certificates: lab.Certificates) -> None:
    with lab.SimulatedHub(certificates, prefix="/felhom") as hub:
        hub.script("/api/v1/host-report", lab.Reply(503))
        assert hub.url.endswith("/felhom")
        with closing(connect(hub)) as client:
            client.request("POST", "/felhom/api/v1/host-report", b"{}")
            assert client.getresponse().status == 503
        assert post(hub, json.dumps(REPORT).encode())[0] == 200


def test_waiting_for_a_report_that_does_not_come_fails(hub: lab.SimulatedHub) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 reports"):
        hub.wait_for_reports(1, 0)


def test_schemas_are_valid_and_the_envelope_fits_its_own(hub: lab.SimulatedHub) -> None:
    report, envelope = (
        json.loads((LAB.parent / name).read_text("utf-8")) for name in ("host-report.schema.json", "control-envelope.schema.json")
    )
    jsonschema.Draft202012Validator.check_schema(report)
    jsonschema.Draft202012Validator.check_schema(envelope)
    for fitting in (hub.envelope, {}, {"unknown": 1}):
        jsonschema.Draft202012Validator(envelope).validate(fitting)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(envelope).validate({"poll_interval_seconds": "900"})


# --- fixtures and command line ------------------------------------------------------------------------------------------------------


def test_configuration_file_is_private_and_reaches_both(agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
    config = json.loads(agent_config.read_text("utf-8"))
    assert agent_config.stat().st_mode & 0o777 == 0o600
    assert (config["proxmox"]["url"], config["hub"]["url"]) == (node.url, hub.url)
    assert set(lab.environment(node, hub)) == {f"FELHOM_AGENT_{section}_{key}".upper() for section, keys in config.items() for key in keys}


def test_command_line_serves_until_the_count_is_reached(tmp_path: Path) -> None:
    env_file, report_file = tmp_path / "lab.env", tmp_path / "report.json"
    files: list[str | Path] = ["--folder", tmp_path / "it's", "--env-file", env_file, "--report-file", report_file]
    command = [sys.executable, LAB, "--count", "1", "--poll-seconds", "60", *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        exports = [process.stdout.readline() for _ in range(9)]
        assert env_file.read_text("utf-8") == "".join(exports)
        words = [shlex.split(line) for line in exports]
        assert {len(line) for line in words} == {2}
        environ = dict(line[1].split("=", 1) for line in words)
        context = ssl.create_default_context(cafile=environ["FELHOM_AGENT_HUB_CA_FILE"])
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        address = urlsplit(environ["FELHOM_AGENT_HUB_URL"])
        headers = {"Authorization": f"Bearer {environ['FELHOM_AGENT_HUB_API_KEY']}", "Content-Type": "application/json"}
        with closing(http.client.HTTPSConnection("127.0.0.1", address.port or 0, context=context, timeout=10)) as client:
            client.request("POST", "/api/v1/host-report", json.dumps(REPORT), headers)
            assert json.loads(client.getresponse().read()) == {"poll_interval_seconds": 60}
        assert process.wait(10) == 0
        assert process.stderr.read().startswith("POST /api/v1/host-report: report 1, ")
    assert json.loads(report_file.read_text("utf-8")) == REPORT


def test_command_line_ends_on_sigterm_and_removes_its_folder() -> None:
    with subprocess.Popen([sys.executable, LAB, "--guests", "3"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        environ = dict(shlex.split(process.stdout.readline())[1].split("=", 1) for _ in range(9))
        assert Path(environ["FELHOM_AGENT_PROXMOX_CA_FILE"]).exists()
        process.terminate()
        assert process.wait(10) == 0
    assert not Path(environ["FELHOM_AGENT_PROXMOX_CA_FILE"]).exists()


@pytest.mark.parametrize(("options", "status", "text"), [(["--help"], 0, "usage: "), ([], 2, "./build.sh test")])
def test_bare_python_gets_the_help_and_is_told_what_is_missing(options: list[str], status: int, text: str) -> None:
    ran = subprocess.run([sys.executable, "-S", LAB, *options], capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == status
    assert text in ran.stdout + ran.stderr
