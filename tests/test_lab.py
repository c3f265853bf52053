"""The simulated node and hub answer as the tests of the agent assume."""

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
RESOURCES = "/cluster/resources"
PRUNE = "/nodes/pve1/storage/{}/prunebackups?prune-backups=keep-all%3D1"


def trusting(ca_file: str | Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca_file))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def connect(server: lab.Server) -> http.client.HTTPSConnection:
    assert server.certificates
    context = trusting(server.certificates.ca_file)
    return http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=10)


def token(node: lab.SimulatedNode) -> dict[str, str]:
    return {"Authorization": f"PVEAPIToken={node.token_id}={node.token_secret}"}


class Caller:
    """Call the node with its token over one connection, as long as the node keeps it."""

    def __init__(self, node: lab.SimulatedNode, client: http.client.HTTPConnection) -> None:
        self.node, self.client = node, client

    def __call__(
        self, path: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        headers = token(self.node) if headers is None else headers
        self.client.request(method, "/api2/json" + path, headers=headers)
        response = self.client.getresponse()
        return response, response.read()

    def data(self, path: str) -> Any:
        response, body = self(path)
        assert response.status == 200
        return json.loads(body)["data"]

    def resources(self) -> dict[str, dict[str, Any]]:
        return {entry["id"]: entry for entry in self.data(RESOURCES)}


@pytest.fixture
def call(node: lab.SimulatedNode) -> Iterator[Caller]:
    with closing(connect(node)) as client:
        yield Caller(node, client)


# --- certificates ---------------------------------------------------------------------------------


def handshake(server: lab.Server, context: ssl.SSLContext, name: str = "127.0.0.1") -> bytes:
    with (
        socket.create_connection(("127.0.0.1", server.port), 10) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "localhost", "pve1", "pve1.example.lan"])
def test_node_certificate_has_the_names_that_proxmox_gives_it(
    node: lab.SimulatedNode, certificates: lab.Certificates, name: str
) -> None:
    presented = handshake(node, trusting(certificates.ca_file), name)
    assert hashlib.sha256(presented).digest().hex(":").upper() == certificates.fingerprint


@pytest.mark.parametrize(
    ("generation", "complaint"),
    [
        ("current", None),
        ("old", "key usage extension"),
        ("pve7", "Missing Authority Key Identifier"),
    ],
)
def test_strict_check_refuses_the_older_chains(
    tmp_path: Path, generation: Literal["current", "old", "pve7"], complaint: str | None
) -> None:
    certificates = lab.make_certificates(tmp_path, generation=generation)
    strict = trusting(certificates.ca_file)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    with lab.SimulatedNode(certificates) as node:
        handshake(node, trusting(certificates.ca_file))
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
        pytest.param({"names": ["pve1.example.lan"]}, "IP address mismatch", id="no-loopback"),
    ],
)
def test_defective_certificate_is_refused(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    certificates = lab.make_certificates(tmp_path, **options)
    with (
        lab.SimulatedNode(certificates) as node,
        pytest.raises(ssl.SSLCertVerificationError, match=complaint),
    ):
        handshake(node, trusting(certificates.ca_file))


def test_each_ca_is_its_own(node: lab.SimulatedNode, tmp_path: Path) -> None:
    other = lab.make_certificates(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(node, trusting(other.ca_file))


# --- the node's answers ---------------------------------------------------------------------------


def test_answer_has_the_headers_of_pveproxy(call: Caller) -> None:
    response, body = call("/version")
    assert json.loads(body)["data"]["version"] == "9.2.11"
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


LOOKUP = "failed to get address info for: nosuch: Temporary failure in name resolution"
NO_FILE = "Configuration file 'nodes/pve1/{}.conf' does not exist"
MOUNT = "directory is expected to be a mount point but is not mounted: '/srv/gone'"
PARAMETER = "Parameter verification failed."


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/nodes/nosuch/status", 500, f"hostname lookup 'nosuch' failed - {LOOKUP}"),
        (CONFIG.format(4711), 500, NO_FILE.format("lxc/4711")),
        (CONFIG.format(999), 500, NO_FILE.format("lxc/999")),
        (CONFIG.format(200), 500, NO_FILE.format("lxc/200")),
        ("/nodes/pve1/qemu/100/config", 500, NO_FILE.format("qemu-server/100")),
        (CONFIG.format("abc"), 400, PARAMETER),
        (CONFIG.format(99), 400, PARAMETER),
        (CONFIG.format("100") + "?current=maybe", 400, PARAMETER),
        (RESOURCES + "?bogus=1", 400, PARAMETER),
        (PRUNE.format("bak").replace("%3D", "%253D"), 400, PARAMETER),
        (PRUNE.format("nosuch"), 500, "storage 'nosuch' does not exist"),
        (PRUNE.format("nobackup"), 500, "storage 'nobackup' does not support backups"),
        (PRUNE.format("gone"), 500, f"unable to activate storage 'gone' - {MOUNT}"),
        ("/nodes/pve1/lxc", 501, "Method 'GET /nodes/pve1/lxc' not implemented"),
        ("/nodes", 501, "Method 'GET /nodes' not implemented"),
    ],
)
def test_refusal_gives_its_reason_and_closes(
    call: Caller, node: lab.SimulatedNode, path: str, status: int, reason: str
) -> None:
    response, body = call(path)
    assert (response.status, response.reason) == (status, reason)
    assert response.headers.get_all("Connection") == ["close"]
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
        pytest.param("PVEAPIToken=a@pve!agent=wrong", "Authentication failed!", id="wrong-secret"),
        pytest.param("PVEAPIToken=nobody", "Authentication failed!", id="malformed"),
    ],
)
def test_unauthenticated_is_refused_late_and_without_a_body(
    call: Caller, node: lab.SimulatedNode, authorization: str | None, reason: str
) -> None:
    node.auth_delay_seconds = 0.1
    began = time.monotonic()
    headers = {"Authorization": authorization} if authorization else {}
    response, body = call("/nosuchthing", headers=headers)
    assert time.monotonic() - began >= 0.1
    assert (response.status, response.reason, body) == (401, reason, b"")
    assert not {"Content-Type", "Content-Length"} & set(response.headers)


def test_node_status_has_strings_where_proxmox_has_and_localhost_is_the_node(call: Caller) -> None:
    status = call.data("/nodes/localhost/status")
    assert status["loadavg"] == ["2.54", "1.74", "1.20"]
    assert status["cpuinfo"]["mhz"] == "2596.122"
    assert status["cpu"] == 0


# --- /cluster/resources ---------------------------------------------------------------------------


def test_container_is_listed_as_proxmox_lists_it(call: Caller) -> None:
    assert call.resources()["lxc/100"] == {
        "cpu": 0.245004192691072,
        "disk": 28216639488,
        "diskread": 1048576,
        "diskwrite": 2097152,
        "id": "lxc/100",
        "maxcpu": 2,
        "maxdisk": 270553174016,
        "maxmem": 1073741824,
        "mem": 134217728,
        "memhost": 0,
        "name": "web",
        "netin": 0,
        "netout": 0,
        "node": "pve1",
        "status": "running",
        "tags": "prod;web",
        "template": 0,
        "type": "lxc",
        "uptime": 123,
        "vmid": 100,
    }


def test_listed_figures_are_numbers_derived_from_the_configuration(call: Caller) -> None:
    listed = call.resources()
    guests = {entry["vmid"]: entry for entry in listed.values() if "vmid" in entry}
    assert list(guests) != sorted(guests)
    assert {vmid: guest["maxcpu"] for vmid, guest in guests.items()} == {
        **dict.fromkeys((100, 101, 105, 106, 109, 110, 999, 200, 203, 204), 2),
        **dict.fromkeys((103, 104, 201, 202), 1),
        102: 1.5,
        107: 0,
        108: 4,
    }
    sizes = {vmid: (guests[vmid]["maxmem"] >> 20, guests[vmid]["maxdisk"] >> 30) for vmid in guests}
    assert {vmid: sizes[vmid] for vmid in (107, 109, 110, 200, 201, 202)} == {
        107: (12, 4),
        109: (512, 4),
        110: (1024, 8),
        200: (4096, 32),
        201: (512, 0),
        202: (2048, 0),
    }
    assert (guests[103]["template"], guests[201]["template"]) == (1, 1)
    assert (guests[104]["lock"], guests[202]["lock"]) == ("backup", "migrate")
    assert "lock" not in guests[100]


def test_name_that_is_not_ascii_is_encoded_twice(call: Caller, node: lab.SimulatedNode) -> None:
    node.guests[1].name = "büro"
    assert call.resources()["lxc/100"]["name"] == "bÃ¼ro"


def test_unknown_guest_has_neither_name_nor_figures(call: Caller, node: lab.SimulatedNode) -> None:
    node.guests = [lab.Guest(1099, "new", "unknown", {"tags": "a;b"}, lock="create")]
    node.pools["/vms/1099"] = "x"
    assert call.resources()["lxc/1099"] == {
        "id": "lxc/1099",
        "lock": "create",
        "node": "pve1",
        "pool": "x",
        "status": "unknown",
        "tags": "a;b",
        "type": "lxc",
        "vmid": 1099,
    }


def test_storage_has_sizes_only_if_it_is_available(call: Caller) -> None:
    listed = call.resources()
    gone = {
        "content": "backup",
        "id": "storage/pve1/gone",
        "node": "pve1",
        "plugintype": "dir",
        "shared": 0,
        "status": "unknown",
        "storage": "gone",
        "type": "storage",
    }
    assert listed["storage/pve1/gone"] == gone
    bak = {"id": "storage/pve1/bak", "storage": "bak", "status": "available"}
    assert listed["storage/pve1/bak"] == gone | bak | {"disk": 31494144, "maxdisk": 4294967296}
    assert listed["storage/pve1/nas"]["shared"] == 1
    assert listed["storage/pve1/pbs"]["plugintype"] == "pbs"


def test_node_entry_is_older_than_the_status(call: Caller, node: lab.SimulatedNode) -> None:
    entry = call.resources()["node/pve1"]
    assert (entry["status"], entry["cpu"], entry["uptime"]) == ("online", 0.0167285119344523, 2565)
    assert call.data("/nodes/pve1/status")["uptime"] == 2574
    node.resources_age_seconds = 300
    assert call.resources()["node/pve1"]["uptime"] == 2274
    assert call.resources()["lxc/100"]["status"] == "running"


def test_values_expire_after_five_minutes(call: Caller, node: lab.SimulatedNode) -> None:
    node.resources_age_seconds = 301
    node.pools["/vms/100"] = "x"
    listed = call.resources()
    assert listed["node/pve1"] == {
        "cgroup-mode": 2,
        "id": "node/pve1",
        "node": "pve1",
        "status": "unknown",
        "type": "node",
    }
    assert listed["/pool/x"] == {"id": "/pool/x", "pool": "x", "type": "pool"}
    assert {entry["status"] for entry in listed.values() if "status" in entry} == {"unknown", "ok"}
    assert not {"name", "cpu", "maxdisk"} & {key for entry in listed.values() for key in entry}


def test_guests_and_storages_of_other_nodes_bear_their_node(
    call: Caller, node: lab.SimulatedNode
) -> None:
    nas = lab.Storage("nas", shared=True)
    node.other_nodes = [
        lab.OtherNode("pve2", guests=[lab.Guest(300, "there")], storages=[nas]),
        lab.OtherNode("pve3", "offline", [lab.Guest(301, "off")]),
        lab.OtherNode("pve4", None, [lab.Guest(302, "stranded", type="qemu")]),
    ]
    listed = call.resources()
    assert (listed["lxc/300"]["node"], listed["lxc/300"]["status"]) == ("pve2", "running")
    assert listed["storage/pve2/nas"]["status"] == "available"
    assert listed["node/pve2"]["cpu"] != listed["node/pve1"]["cpu"]
    assert listed["node/pve3"]["status"] == "offline"
    assert not {"cpu", "uptime"} & set(listed["node/pve3"])
    assert listed["lxc/301"]["status"] == listed["qemu/302"]["status"] == "unknown"
    assert "node/pve4" not in listed


# --- configurations and backups -------------------------------------------------------------------


def test_config_is_what_the_file_says(call: Caller) -> None:
    broken = call.data(CONFIG.format(107))
    assert (broken["cores"], broken["memory"], broken["rootfs"]) == ("many", "12x", "???")
    empty = {"digest": "da39a3ee5e6b4b0d3255bfef95601890afd80709"}
    assert call.data(CONFIG.format(109)) == empty
    assert call.data(CONFIG.format(102))["cpulimit"] == "1.5"
    assert call.data(CONFIG.format(103))["template"] == 1
    assert call.data(CONFIG.format(104))["lock"] == "backup"
    assert "☃" in call.data(CONFIG.format(106))["description"]


@pytest.mark.parametrize(
    ("path", "pending", "current"),
    [
        ("lxc/105", {"cores": 4, "swap": None}, {"cores": 2, "swap": 512}),
        ("qemu/200", {"cores": 8, "memory": "8192"}, {"cores": 4, "memory": "4096"}),
    ],
)
def test_pending_changes_are_mixed_in_unless_current(
    call: Caller, path: str, pending: dict[str, object], current: dict[str, object]
) -> None:
    mixed = call.data(f"/nodes/pve1/{path}/config")
    config = call.data(f"/nodes/pve1/{path}/config?current=1")
    assert {key: mixed.get(key) for key in pending} == pending
    assert {key: config.get(key) for key in current} == current


def test_vm_config_has_every_kind_of_disk_and_memory(call: Caller) -> None:
    configs = {
        vm.name: call.data(f"/nodes/pve1/qemu/{vm.vmid}/config?current=1") for vm in call.node.vms
    }
    assert {name: config.get("memory") for name, config in configs.items()} == {
        "cloud": 2048,
        "diskless": "current=2048",
        "passthrough": "1024",
        "vm-one": "4096",
        "vm-two": None,
    }
    one = configs["vm-one"]
    assert (one["sockets"], one["efidisk0"][-7:], one["ide2"][-21:]) == (
        2,
        "size=4M",
        "media=cdrom,size=600M",
    )
    assert "size=" not in one["unused0"] + configs["passthrough"]["scsi1"]


def test_backups_of_all_guests_are_listed_by_pvedaemon(
    call: Caller, node: lab.SimulatedNode
) -> None:
    response, body = call(PRUNE.format("bak"))
    assert response.headers.get_all("Connection") == ["close", "Keep-Alive"]
    backups = json.loads(body)["data"]
    assert backups[1] == {
        "ctime": 1795312803,
        "mark": "protected",
        "type": "lxc",
        "vmid": 100,
        "volid": "bak:backup/vzdump-lxc-100-2026_11_22-02_00_03.tar.zst",
    }
    owners = {(entry["mark"], entry.get("vmid")) for entry in backups}
    assert owners == {
        *(("keep", vmid) for vmid in (100, 101, 200, 999)),
        *(("protected", vmid) for vmid in (100, 200)),
        *(("renamed", vmid) for vmid in ("100", None)),
    }
    call("/version")
    assert node.connections == 2


def test_many_guests_and_vms_are_unsorted_and_share_no_id() -> None:
    guests, vms = lab.many_guests(250), lab.many_vms(250)
    for vmids in ([guest.vmid for guest in guests], [guest.vmid for guest in vms]):
        assert vmids != sorted(vmids)
    assert len({guest.vmid for guest in guests + vms}) == 500
    assert {guest.type for guest in vms} == {"qemu"}


# --- privileges -----------------------------------------------------------------------------------

AUDITOR = ("/", "PVEAuditor", True)
POOLS = {"/vms/100": "x", "/storage/bak": "x", "/vms/102": "y"}
ALL = dict.fromkeys(lab.PRIVILEGES, 1)
HERE = dict.fromkeys(lab.PRIVILEGES, 0)
EVERY_PATH = {
    *("/", "/access", "/access/groups", "/nodes", "/nodes/pve1", "/pool", "/pool/x", "/pool/y"),
    *("/sdn", "/storage", "/storage/bak", "/vms", "/vms/100", "/vms/101", "/vms/102"),
}
# What the token sees with PVEAuditor on /, the node aside.
VISIBLE = {"100", "101", "102", "x", "y", "bak", "local", "localnetwork"}
TOKENS: dict[str, tuple[lab.ACL, lab.ACL | None]] = {
    "auditor": ([AUDITOR], None),
    "not-propagated": ([("/", "PVEAuditor", False)], None),
    "no-vms": ([AUDITOR, ("/vms", "NoAccess", True)], None),
    "no-vms-here": ([AUDITOR, ("/vms", "NoAccess", False)], None),
    "no-node": ([AUDITOR, ("/nodes/pve1", "NoAccess", True)], None),
    "no-101": ([AUDITOR, ("/vms/101", "NoAccess", True)], None),
    "no-bak": ([AUDITOR, ("/storage/bak", "NoAccess", True)], None),
    "pool-x": ([("/pool/x", "PVEAuditor", True)], None),
    "no-pool-x": ([AUDITOR, ("/pool/x", "NoAccess", True)], None),
    "vm-100": ([("/vms/100", "VMAudit", True)], None),
    "no-vm-role": ([AUDITOR, ("/vms", "NoVM", True)], None),
    "none": ([], None),
    "token-without-acl": ([AUDITOR], []),
    "token-only": ([], [AUDITOR]),
    "token-and-user": ([AUDITOR], [AUDITOR]),
    "token-here": ([AUDITOR], [("/vms/100", "VMAudit", False)]),
}
# Of each token: permissions at /vms, /vms/100, /vms/101, /nodes/pve1, and what it sees.
NO_VM = {"Datastore.Audit": 1, "Sys.Audit": 1}
Permissions = dict[str, int]
EXPECTED: dict[str, tuple[Permissions, Permissions, Permissions, Permissions, set[str]]] = {
    "auditor": (ALL, ALL, ALL, ALL, VISIBLE),
    "not-propagated": ({}, {}, {}, {}, set()),
    "no-vms": ({}, {}, {}, ALL, VISIBLE - {"100", "101", "102"}),
    "no-vms-here": ({}, ALL, ALL, ALL, VISIBLE),
    "no-node": (ALL, ALL, ALL, {}, VISIBLE),
    "no-101": (ALL, ALL, {}, ALL, VISIBLE - {"101"}),
    "no-bak": (ALL, ALL, ALL, ALL, VISIBLE - {"bak"}),
    "pool-x": ({}, HERE, {}, {}, {"100", "x", "bak"}),
    "no-pool-x": (ALL, {}, ALL, ALL, VISIBLE - {"100", "x", "bak"}),
    "vm-100": ({}, {"VM.Audit": 1}, {}, {}, {"100"}),
    "no-vm-role": (NO_VM, HERE | NO_VM, NO_VM, ALL, VISIBLE - {"101"}),
    "none": ({}, {}, {}, {}, set()),
    "token-without-acl": ({}, {}, {}, {}, set()),
    "token-only": ({}, {}, {}, {}, set()),
    "token-and-user": (ALL, ALL, ALL, ALL, VISIBLE),
    "token-here": ({}, {"VM.Audit": 0}, {}, {}, {"100"}),
}
WHOLE_REPLY = {
    "auditor": EVERY_PATH,
    "not-propagated": {"/"},
    "no-vms": EVERY_PATH - {"/vms", "/vms/100", "/vms/101", "/vms/102"},
    "no-node": EVERY_PATH - {"/nodes/pve1"},
    "no-101": EVERY_PATH - {"/vms/101"},
    "pool-x": {"/pool/x", "/vms/100", "/storage/bak"},
    "vm-100": {"/vms/100"},
    "no-vm-role": EVERY_PATH,
    "none": set(),
    "token-only": set(),
}


@pytest.fixture
def set_up(call: Caller, node: lab.SimulatedNode, name: str) -> None:
    node.acl, node.token_acl = TOKENS[name]
    node.pools = POOLS
    node.other_acl_paths = ["/nodes/pve1", "/storage/bak", "/vms/100", "/vms/101"]
    node.guests = [guest for guest in node.guests if guest.vmid in (100, 101, 102)]
    node.vms = []
    node.storages = [storage for storage in node.storages if storage.name in ("bak", "local")]


@pytest.mark.usefixtures("set_up")
@pytest.mark.parametrize("name", EXPECTED)
def test_token_sees_what_it_may(call: Caller, name: str) -> None:
    *permissions, visible = EXPECTED[name]
    paths = ["/vms", "/vms/100", "/vms/101", "/nodes/pve1"]
    for path, expected in zip(paths, permissions, strict=True):
        assert call.data(f"/access/permissions?path={path}") == {path: expected}
    listed = call.resources()
    figures = {"cpu", "disk", "maxcpu", "maxdisk", "maxmem", "mem", "uptime"}
    entry = {"cgroup-mode", "id", "level", "node", "status", "type"}
    may_read_status = bool(permissions[3])
    assert set(listed.pop("node/pve1")) == entry | (figures if may_read_status else set())
    assert {place.rpartition("/")[2] for place in listed} == visible
    pools = {
        entry["pool"] for entry in listed.values() if entry["type"] == "lxc" and "pool" in entry
    }
    assert pools <= visible
    status, _body = call("/nodes/pve1/status")
    assert status.status == (200 if may_read_status else 403)


@pytest.mark.usefixtures("set_up")
@pytest.mark.parametrize("name", WHOLE_REPLY)
def test_whole_reply_leaves_out_paths_without_a_privilege(
    call: Caller, node: lab.SimulatedNode, name: str
) -> None:
    reply = call.data("/access/permissions")
    assert set(reply) == WHOLE_REPLY[name]
    assert all(reply[path] == node.permissions(path) for path in reply)


def test_privilege_is_checked_before_existence(call: Caller, node: lab.SimulatedNode) -> None:
    node.acl = []
    for path, missing in {
        "/nodes/pve1/status": "/nodes/pve1, Sys.Audit",
        "/nodes/nosuch/status": "/nodes/nosuch, Sys.Audit",
        CONFIG.format(100): "/vms/100, VM.Audit",
        CONFIG.format(4711): "/vms/4711, VM.Audit",
        "/nodes/pve1/qemu/200/config": "/vms/200, VM.Audit",
        PRUNE.format("bak"): "/storage/bak, Datastore.Audit|Datastore.AllocateSpace",
    }.items():
        response, body = call(path)
        reason = f"Permission check failed ({missing})"
        assert (response.status, response.reason) == (403, reason)
        assert json.loads(body) == {"data": None, "message": reason + "\n"}


# --- connections ----------------------------------------------------------------------------------


def test_hundredth_request_closes_the_connection(call: Caller, node: lab.SimulatedNode) -> None:
    said = [call("/version")[0].headers["Connection"] for _ in range(101)]
    assert said == ["Keep-Alive"] * 99 + ["close", "Keep-Alive"]
    assert [request.connection for request in node.requests] == [1] * 100 + [2]


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
    path = "/api2/json/nodes/pve1/lxc/100/config?current=1"
    assert (request.method, request.path, request.body) == ("GET", path, b"")
    assert request.headers["authorization"] == token(node)["Authorization"]


def test_without_certificates_it_speaks_plain_http() -> None:
    with lab.SimulatedNode(None) as node:
        client = http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)
        with closing(client):
            assert Caller(node, client)("/version")[0].status == 200
        assert node.url == f"http://127.0.0.1:{node.port}"


NOISE = [
    b"",
    b"nonsense\r\n",
    b"GET / HTTP/1.1\r\nHost",
    b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
]


@pytest.mark.parametrize("noise", NOISE)
def test_client_that_leaves_early_is_not_answered(noise: bytes) -> None:
    with (
        lab.SimulatedNode(None) as node,
        socket.create_connection(("127.0.0.1", node.port), 10) as plain,
    ):
        plain.sendall(noise)
        plain.shutdown(socket.SHUT_WR)
        assert plain.recv(1) == b""
        assert node.requests == []


def test_client_that_does_not_speak_tls_does_no_harm(call: Caller, node: lab.SimulatedNode) -> None:
    with socket.create_connection(("127.0.0.1", node.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert call("/version")[0].status == 200


def test_requests_in_flight_are_counted_and_a_stop_ends_them(
    certificates: lab.Certificates,
) -> None:
    before = threading.active_count()
    with (
        lab.SimulatedNode(certificates) as node,
        closing(connect(node)) as one,
        closing(connect(node)) as other,
    ):
        node.script("", lab.Forever(lab.Stall()))
        for client in (one, other):
            client.request("GET", "/api2/json/version", headers=token(node))
        node.wait_for_requests(2, 10)
        assert (node.most_in_flight, node.open_connections) == (2, 2)
    assert (threading.active_count(), node.open_connections) == (before, 0)


def test_stop_lets_an_answer_finish(certificates: lab.Certificates) -> None:
    with lab.SimulatedNode(certificates, latency_seconds=600) as node:
        client = connect(node)
        client.request("GET", "/api2/json/version", headers=token(node))
        node.wait_for_requests(1, 10)
    with closing(client):
        assert client.getresponse().read().startswith(b'{"data":')


def test_close_is_announced_in_tls_but_a_cut_is_not(
    node: lab.SimulatedNode, certificates: lab.Certificates
) -> None:
    node.script("", lab.Raw(b""), lab.Cut())
    context = trusting(certificates.ca_file)
    # Debian's Python 3.11 sets it by default.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    for complaint in (None, "(?i)EOF"):
        plain = socket.create_connection(("127.0.0.1", node.port), 10)
        with context.wrap_socket(
            plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False
        ) as tls:
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


# --- scripts --------------------------------------------------------------------------------------


def test_script_answers_the_next_matches_in_order(call: Caller, node: lab.SimulatedNode) -> None:
    node.script("/nodes/pve1/status", lab.Reply(503, "Busy"), lab.Usual(), lab.Reply(599))
    assert call("/version")[0].status == 200
    statuses = [call("/nodes/pve1/status")[0].status for _ in range(4)]
    assert statuses == [503, 200, 599, 200]


def test_script_of_an_exact_path_leaves_those_below_it(
    call: Caller, node: lab.SimulatedNode
) -> None:
    node.script("/access$", lab.Forever(lab.Reply(503)))
    paths = ("/access", "/access/permissions", "/access?x=1")
    assert [call(path)[0].status for path in paths] == [503, 200, 503]
    node.clear_script()
    assert call("/access")[0].status == 501


def test_scripted_reply_is_sent_as_written(call: Caller, node: lab.SimulatedNode) -> None:
    headers = {"Content-Type": "text/html", "Server": None}
    node.script("", lab.Reply(200, "Fine", b"<html>", headers, close=True), lab.Reply(204))
    response, body = call("/version")
    assert (response.reason, body, response.headers["Server"]) == ("Fine", b"<html>", None)
    assert response.headers["Content-Type"] == "text/html"
    assert response.headers["Connection"] == "close"
    response, body = call("/version")
    assert (response.status, body, response.headers["Content-Length"]) == (204, b"", None)


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"


@pytest.mark.parametrize("answer", [lab.Raw(HALF), lab.Drip(HALF, 0)])
def test_bytes_go_out_as_they_are_then_it_closes(
    call: Caller, node: lab.SimulatedNode, answer: lab.Answer
) -> None:
    node.script("", answer)
    with pytest.raises(http.client.IncompleteRead) as caught:
        call("/version")
    assert caught.value.partial == b"half"


@pytest.mark.parametrize("answer", [lab.Cut(), lab.Stall(0.05)])
def test_connection_ends_without_an_answer(
    call: Caller, node: lab.SimulatedNode, answer: lab.Answer
) -> None:
    node.script("", answer)
    with pytest.raises(http.client.RemoteDisconnected):
        call("/version")


# --- the hub --------------------------------------------------------------------------------------

REPORT: dict[str, Any] = json.loads("""{
    "host_id": "pve1", "agent_version": "0.3.0", "reported_at": "2026-06-08T14:20:09Z",
    "host": {
        "node": "pve1", "pve_version": "9.2.11", "kernel_version": "6.14.11-4-pve",
        "uptime_seconds": 2574, "cpu_model": "AMD EPYC", "cpu_count": 2, "cpu_usage": 0.0167,
        "load_average": [2.54, 1.74, 1.2], "memory_total_bytes": 25276510208,
        "memory_used_bytes": 1378762752, "swap_total_bytes": 0, "swap_used_bytes": 0,
        "rootfs_total_bytes": 270553174016, "rootfs_used_bytes": 28216709120
    },
    "guests": [
        {"vmid": 100, "type": "lxc", "name": "web", "status": "running", "controller_version": "",
         "spec": {"cores": 2, "memory_bytes": 1073741824, "disk_bytes": 8589934592}},
        {"vmid": 101, "type": "lxc", "name": "db", "status": "unknown", "controller_version": ""}
    ],
    "cloudflared": {"status": "active"},
    "storage_targets": [
        {"storage": "bak", "type": "dir", "status": "available",
         "total_bytes": 4294967296, "used_bytes": 31494144},
        {"storage": "gone", "type": "dir", "status": "unknown",
         "total_bytes": null, "used_bytes": null}
    ],
    "backups": [
        {"vmid": 100, "storage": "bak", "volid": "bak:backup/vzdump-lxc-100.tar.zst",
         "created_at": "2026-06-08T02:00:03Z", "size_bytes": null, "verified": null},
        {"vmid": 100, "storage": "nas", "volid": "nas:backup/vzdump-lxc-100.tar.zst",
         "created_at": "2026-06-07T02:00:03Z", "size_bytes": null, "verified": null}
    ],
    "restore_tests": [], "pbs_snapshots": [], "audit_tail": []
}""")
FIGURES = [name for name, value in REPORT["host"].items() if not isinstance(value, str)]
SPEC = REPORT["guests"][0]["spec"]
ABSENT = object()


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the report with one value changed: `changed("guests.0.spec", ABSENT)`."""
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


def post(
    hub: lab.SimulatedHub,
    body: bytes,
    method: str = "POST",
    path: str = "/api/v1/host-report",
    **headers: str,
) -> tuple[int, Any]:
    all_headers = {"Authorization": f"Bearer {hub.api_key}", "Content-Type": "application/json"}
    all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(connect(hub)) as client:
        client.request(method, urlsplit(hub.url).path + path, body, all_headers)
        response = client.getresponse()
        return response.status, json.loads(response.read())


def test_good_report_is_kept_and_answered_with_the_envelope(hub: lab.SimulatedHub) -> None:
    assert post(hub, json.dumps(REPORT).encode()) == (200, hub.envelope)
    hub.wait_for_reports(1, 0)
    assert (hub.reports, hub.rejected) == ([REPORT], [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"host.{name}", None) for name in FIGURES),
        *((f"guests.0.spec.{name}", None) for name in SPEC),
        *((collection, []) for collection in ("guests", "storage_targets", "backups")),
        ("guests.0.name", "Grüße ☃"),
        ("guests.0.type", "qemu"),
        ("guests.1.spec", SPEC),
        ("host.load_average", [0, 0.5, 100]),
        ("host.memory_total_bytes", 2**53 - 1),
    ],
)
def test_report_within_the_contract_is_accepted(
    hub: lab.SimulatedHub, path: str, value: object
) -> None:
    assert post(hub, json.dumps(changed(path, value)).encode()) == (200, hub.envelope)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((name, value) for name in REPORT for value in (ABSENT, None)),
        *((f"host.{name}", ABSENT) for name in REPORT["host"]),
        *((f"host.{name}", value) for name in FIGURES for value in ("1", -1)),
        *((f"guests.0.{name}", value) for name in REPORT["guests"][0] for value in (ABSENT, None)),
        *((f"storage_targets.0.{name}", ABSENT) for name in REPORT["storage_targets"][0]),
        *((f"backups.0.{name}", ABSENT) for name in REPORT["backups"][0]),
        *((path, 1) for path in ("extra", "host.extra", "guests.0.spec.extra", "backups.0.extra")),
        ("guests.0.type", "openvz"),
        ("guests.0.spec.cores", 0),
        ("guests.0.spec.cores", 1.5),
        ("guests.0.vmid", 99),
        ("guests.0.vmid", 102),
        ("guests.0.vmid", 101),
        ("guests.0.name", "x" * 513),
        ("storage_targets.0.status", "active"),
        ("storage_targets.0.storage", "local"),
        ("storage_targets.1.used_bytes", 1),
        ("backups.0.storage", "nas"),
        ("backups.0.vmid", 101),
        ("host.node", None),
        ("host.cpu_usage", 1.01),
        ("host.cpu_usage", True),
        ("host.load_average", ["2.54", "1.74", "1.20"]),
        ("host.load_average", [1, 2]),
        ("host.uptime_seconds", 2574.0),
        ("host.memory_total_bytes", 2**53),
        ("reported_at", "2026-06-08T14:20:09.5Z"),
        ("reported_at", "2026-06-08T14:20:09+00:00"),
        ("reported_at", "2026-06-08T14:20:09Z\n"),
    ],
)
def test_report_outside_the_contract_is_refused(
    hub: lab.SimulatedHub, path: str, value: object
) -> None:
    status, answer = post(hub, json.dumps(changed(path, value)).encode())
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
        ({"body": b"[]"}, 422),
        ({"body": json.dumps(changed("host.cpu_usage", float("nan"))).encode()}, 400),
    ],
)
def test_wrong_request_is_refused(
    hub: lab.SimulatedHub, request_: dict[str, Any], status: int
) -> None:
    assert post(hub, **{"body": json.dumps(REPORT).encode(), **request_})[0] == status
    assert (len(hub.rejected), hub.reports) == (1, [])
    assert hub.api_key not in hub.rejected[0]


def test_report_without_its_length_is_refused(hub: lab.SimulatedHub) -> None:
    with closing(connect(hub)) as client:
        client.putrequest("POST", "/api/v1/host-report")
        client.putheader("Authorization", f"Bearer {hub.api_key}")
        client.putheader("Content-Type", "application/json")
        client.endheaders()
        assert client.getresponse().status == 411


def test_hub_lives_below_its_prefix(certificates: lab.Certificates) -> None:
    with lab.SimulatedHub(certificates, prefix="/felhom") as hub:
        hub.script("/api/v1/host-report", lab.Reply(503, body=b"null"))
        assert hub.url.endswith("/felhom")
        statuses = [post(hub, json.dumps(REPORT).encode())[0] for _ in range(2)]
        assert statuses == [503, 200]


def test_waiting_for_a_report_that_does_not_come_fails(hub: lab.SimulatedHub) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 reports"):
        hub.wait_for_reports(1, 0)


def test_schemas_are_valid_and_the_envelope_fits_its_own(hub: lab.SimulatedHub) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(lab.SCHEMA.read_text("utf-8")))
    path = lab.SCHEMA.with_name("control-envelope.schema.json")
    envelope = json.loads(path.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(envelope)
    for fitting in (hub.envelope, {}, {"unknown": 1}):
        jsonschema.Draft202012Validator(envelope).validate(fitting)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(envelope).validate({"poll_interval_seconds": "900"})


# --- command line ---------------------------------------------------------------------------------


def read_environment(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout
    words = [shlex.split(process.stdout.readline()) for _ in range(9)]
    assert {(len(line), line[0]) for line in words} == {(2, "export")}
    return dict(line[1].split("=", 1) for line in words)


def test_command_line_serves_until_the_count_is_reached(tmp_path: Path) -> None:
    env_file, report_file = tmp_path / "lab.env", tmp_path / "report.json"
    command: list[str | Path] = [sys.executable, LAB, "--count", "1", "--poll-seconds", "60"]
    command += ["--folder", tmp_path / "it's", "--env-file", env_file, "--report-file", report_file]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        environ = read_environment(process)
        assert (
            dict(
                shlex.split(line)[1].split("=", 1)
                for line in env_file.read_text("utf-8").splitlines()
            )
            == environ
        )
        context = trusting(environ["FELHOM_AGENT_HUB_CA_FILE"])
        port = urlsplit(environ["FELHOM_AGENT_HUB_URL"]).port
        client = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
        headers = {"Authorization": f"Bearer {environ['FELHOM_AGENT_HUB_API_KEY']}"}
        headers["Content-Type"] = "application/json"
        with closing(client):
            client.request("POST", "/api/v1/host-report", json.dumps(REPORT), headers)
            assert json.loads(client.getresponse().read()) == {"poll_interval_seconds": 60}
        assert process.wait(10) == 0
        assert process.stderr
        assert process.stderr.read().startswith("POST /api/v1/host-report: report 1, ")
    assert json.loads(report_file.read_text("utf-8")) == REPORT


def test_command_line_ends_on_sigterm_and_removes_its_folder() -> None:
    command: list[str | Path] = [sys.executable, LAB, "--guests", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ca_file = Path(read_environment(process)["FELHOM_AGENT_PROXMOX_CA_FILE"])
        assert ca_file.exists()
        process.terminate()
        assert process.wait(10) == 0
    assert not ca_file.exists()


@pytest.mark.parametrize(
    ("options", "status", "text"), [(["--help"], 0, "usage: "), ([], 2, "./build.sh test")]
)
def test_bare_python_gets_the_help_and_is_told_what_is_missing(
    options: list[str], status: int, text: str
) -> None:
    command: list[str | Path] = [sys.executable, "-S", LAB, *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == status
    assert text in ran.stdout + ran.stderr
