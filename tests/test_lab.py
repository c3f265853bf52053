"""The simulated node and hub refuse what Proxmox and the contract refuse.

What else the tests of the agent assume of them, those tests notice.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
from contextlib import closing
from typing import Any

import pytest

import felhom_agent as agent
import lab
from support import make_report

CONFIG = "/nodes/pve1/lxc/{}/config"
PRUNE = "/nodes/pve1/storage/{}/prunebackups?prune-backups=keep-all%3D1"
NO_FILE = "Configuration file 'nodes/pve1/{}.conf' does not exist"
PARAMETER = "Parameter verification failed."


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        (CONFIG.format(999), 500, NO_FILE.format("lxc/999")),
        (CONFIG.format(200), 500, NO_FILE.format("lxc/200")),
        ("/nodes/pve1/qemu/100/config", 500, NO_FILE.format("qemu-server/100")),
        ("/cluster/resources?bogus=1", 400, PARAMETER),
        (PRUNE.format("bak").replace("%3D", "%253D"), 400, PARAMETER),
        (PRUNE.format("nosuch"), 500, "storage 'nosuch' does not exist"),
        (PRUNE.format("nobackup"), 500, "storage 'nobackup' does not support backups"),
        ("/nodes/pve1/lxc", 501, "Method 'GET /nodes/pve1/lxc' not implemented"),
        ("/nodes/pve2/status", 501, "Method 'GET /nodes/pve2/status' not implemented"),
    ],
)
def test_node_refuses_with_proxmoxs_reason(path: str, status: int, reason: str) -> None:
    reply = lab.SimulatedNode(None).usual_reply(path)
    assert (reply.status, reply.reason) == (status, reason)
    assert json.loads(reply.body or b"")["message"].rstrip("\n") == reason


def test_hundredth_request_closes_the_connection(plain_node: lab.SimulatedNode) -> None:
    token = f"PVEAPIToken={plain_node.token_id}={plain_node.token_secret}"
    with closing(http.client.HTTPConnection("127.0.0.1", plain_node.port, timeout=10)) as client:
        for _ in range(101):
            client.request("GET", "/api2/json/version", headers={"Authorization": token})
            client.getresponse().read()
    assert [request.connection for request in plain_node.requests] == [1] * 100 + [2]


GUEST = agent.Guest(vmid=100, name="web", status="unknown")
UNKNOWN = agent.StorageTarget(
    storage="bak", type="dir", status="unknown", total_bytes=None, used_bytes=None
)


def post(hub: lab.SimulatedHub, body: str, key: str = "") -> int:
    headers = {"Authorization": f"Bearer {key or hub.api_key}", "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", hub.port, timeout=10)) as client:
        client.request("POST", "/api/v1/host-report", body, headers)
        return client.getresponse().status


@pytest.mark.parametrize(
    "changes",
    [
        {"reported_at": "2026-06-08T14:20:09.5Z"},
        {"guests": (dataclasses.replace(GUEST, vmid=99),)},
        {"guests": (dataclasses.replace(GUEST, vmid=101), GUEST)},
        {"guests": (GUEST, GUEST)},
        {"storage_targets": (dataclasses.replace(UNKNOWN, used_bytes=0),)},
    ],
    ids=str,
)
def test_hub_refuses_a_report_outside_the_contract(
    plain_hub: lab.SimulatedHub, changes: dict[str, Any]
) -> None:
    assert post(plain_hub, make_report(**changes).to_json()) == 422
    assert (plain_hub.reports, len(plain_hub.rejected)) == ([], 1)


def test_hub_refuses_nonsense_and_strange_keys(plain_hub: lab.SimulatedHub) -> None:
    text = make_report().to_json()
    assert '"cpu_count":null' in text
    assert post(plain_hub, text.replace('"cpu_count":null', '"cpu_count":"1"')) == 422
    assert post(plain_hub, text.replace('"cpu_count":null', '"cpu_count":NaN')) == 400
    assert post(plain_hub, text, "another") == 401
    assert plain_hub.reports == []
