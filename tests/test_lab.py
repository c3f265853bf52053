"""The simulated node and hub answer as the tests of the agent assume."""

from __future__ import annotations

import dataclasses
import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import felhom_agent as agent
import lab
from support import make_report

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


# --- the node's answers ---------------------------------------------------------------------------


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


# --- /cluster/resources ---------------------------------------------------------------------------


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


# --- configurations and backups -------------------------------------------------------------------


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
        *(("keep", vmid) for vmid in (100, 101, 106, 200, 999)),
        *(("protected", vmid) for vmid in (100, "100", 200, None)),
        *(("renamed", vmid) for vmid in ("100", None)),
    }
    call("/version")
    assert node.connections == 2


# --- privileges -----------------------------------------------------------------------------------

AUDITOR = ("/", "PVEAuditor", True)
HERE = ("/vms/100", "VMAudit", False)


@pytest.mark.parametrize(
    ("acl", "token_acl", "permissions"),
    [
        ([AUDITOR], None, dict.fromkeys(lab.PRIVILEGES, 1)),
        ([("/pool/x", "PVEAuditor", True)], None, dict.fromkeys(lab.PRIVILEGES, 0)),
        ([HERE], None, {"VM.Audit": 0}),
        ([AUDITOR], [HERE], {"VM.Audit": 0}),
    ],
    ids=["root", "pool", "here", "token-here"],
)
def test_privilege_says_whether_it_holds_below_too(
    call: Caller,
    node: lab.SimulatedNode,
    acl: lab.ACL,
    token_acl: lab.ACL | None,
    permissions: dict[str, int],
) -> None:
    """What a token sees is in test_proxmox."""
    node.acl, node.token_acl, node.pools = acl, token_acl, {"/vms/100": "x"}
    assert call.data("/access/permissions?path=/vms/100") == {"/vms/100": permissions}


def test_pool_and_figures_of_the_node_take_privileges_of_their_own(
    call: Caller, node: lab.SimulatedNode
) -> None:
    node.acl, node.pools = [("/vms", "VMAudit", True)], {"/vms/100": "x"}
    listed = call.resources()
    assert "pool" not in listed["lxc/100"]
    assert "/pool/x" not in listed
    assert not {"cpu", "uptime"} & listed["node/pve1"].keys()
    assert call("/nodes/pve1/status")[0].status == 403


# --- connections ----------------------------------------------------------------------------------


def test_hundredth_request_closes_the_connection(call: Caller, node: lab.SimulatedNode) -> None:
    said = [call("/version")[0].headers["Connection"] for _ in range(101)]
    assert said == ["Keep-Alive"] * 99 + ["close", "Keep-Alive"]
    assert [request.connection for request in node.requests] == [1] * 100 + [2]


# --- the hub --------------------------------------------------------------------------------------

GUEST = agent.Guest(vmid=100, name="web", status="unknown")
UNKNOWN = agent.StorageTarget(
    storage="bak", type="dir", status="unknown", total_bytes=None, used_bytes=None
)


def post(hub: lab.SimulatedHub, report: agent.HostReport | bytes) -> int:
    body = report if isinstance(report, bytes) else report.to_json().encode()
    headers = {"Authorization": f"Bearer {hub.api_key}", "Content-Type": "application/json"}
    with closing(connect(hub)) as client:
        client.request("POST", "/api/v1/host-report", body, headers)
        return client.getresponse().status


@pytest.mark.parametrize(
    "changes",
    [
        {"reported_at": "2026-06-08T14:20:09.5Z"},
        {"host_id": ""},
        {"guests": (dataclasses.replace(GUEST, vmid=99),)},
        {"guests": (dataclasses.replace(GUEST, vmid=101), GUEST)},
        {"guests": (GUEST, GUEST)},
        {"guests": (dataclasses.replace(GUEST, type="openvz"),)},
        {"storage_targets": (dataclasses.replace(UNKNOWN, used_bytes=0),)},
        {"storage_targets": (UNKNOWN, UNKNOWN)},
    ],
    ids=str,
)
def test_report_outside_the_contract_is_refused(
    hub: lab.SimulatedHub, changes: dict[str, Any]
) -> None:
    assert post(hub, make_report(**changes)) == 422
    assert (hub.reports, len(hub.rejected)) == ([], 1)


@pytest.mark.parametrize(
    ("part", "other", "status"),
    [
        ('"cpu_count":null', '"cpu_count":"1"', 422),
        ('"cpu_count":null', '"cpu_count":NaN', 400),
        ("{", "", 400),
    ],
)
def test_report_of_another_shape_is_refused(
    hub: lab.SimulatedHub, part: str, other: str, status: int
) -> None:
    text = make_report().to_json()
    assert part in text
    assert post(hub, text.replace(part, other, 1).encode()) == status


def test_strange_key_is_refused(hub: lab.SimulatedHub) -> None:
    hub.api_key, key = "another", hub.api_key
    body = make_report().to_json()
    with closing(connect(hub)) as client:
        client.request("POST", "/api/v1/host-report", body, {"Authorization": f"Bearer {key}"})
        assert client.getresponse().status == 401
    assert key not in hub.rejected[0]
