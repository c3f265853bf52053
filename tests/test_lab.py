"""The simulated node and hub refuse what Proxmox and the contract refuse.

What else the tests of the agent assume of them, those tests notice.
"""

from __future__ import annotations

import dataclasses
import json
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
        (PRUNE.format("nobackup"), 500, "storage 'nobackup' does not support backups"),
        ("/nodes/pve1/lxc", 501, "Method 'GET /nodes/pve1/lxc' not implemented"),
        ("/nodes/pve2/status", 501, "Method 'GET /nodes/pve2/status' not implemented"),
    ],
)
def test_node_refuses_with_proxmoxs_reason(path: str, status: int, reason: str) -> None:
    reply = lab.SimulatedNode(None).usual_reply(path)
    assert (reply.status, reply.reason) == (status, reason)
    assert json.loads(reply.body or b"")["message"].rstrip("\n") == reason


GUEST = agent.Guest(vmid=100, name="web", status="unknown")
UNKNOWN = agent.StorageTarget(
    storage="bak", type="dir", status="unknown", total_bytes=None, used_bytes=None
)


def post(body: str, key: str = "lab-hub-key") -> int:
    """Return the status for a report; whatever is refused is not among the reports."""
    hub = lab.SimulatedHub(None)
    headers = {"authorization": f"Bearer {key}"}
    request = lab.Request("POST", "/api/v1/host-report", headers, body.encode(), 1)
    status = hub.answer(request).status
    assert (len(hub.reports), len(hub.rejected)) == ((1, 0) if status == 200 else (0, 1))
    return status


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
def test_hub_refuses_a_report_outside_the_contract(changes: dict[str, Any]) -> None:
    assert post(make_report(**changes).to_json()) == 422


def test_hub_refuses_nonsense_and_strange_keys() -> None:
    text = make_report().to_json()
    assert post(text) == 200
    assert post(text.replace('"cpu_count":null', '"cpu_count":"1"')) == 422
    assert post(text.replace('"cpu_count":null', '"cpu_count":NaN')) == 400
    assert post(text, "another") == 401
