"""The simulated node and hub answer as the tests of the agent assume.

What only those tests themselves rely on, they notice.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

import felhom_agent as agent
import lab
from support import make_report

CONFIG = "/nodes/pve1/lxc/{}/config"
PRUNE = "/nodes/pve1/storage/{}/prunebackups?prune-backups=keep-all%3D1"


class Caller:
    """Calls the node with its token over one connection, as long as the node keeps it."""

    def __init__(self, node: lab.SimulatedNode, client: http.client.HTTPConnection) -> None:
        self.node, self.client = node, client

    def __call__(self, path: str) -> tuple[http.client.HTTPResponse, Any]:
        token = f"PVEAPIToken={self.node.token_id}={self.node.token_secret}"
        self.client.request("GET", "/api2/json" + path, headers={"Authorization": token})
        response = self.client.getresponse()
        return response, json.load(response)

    def resources(self) -> dict[str, dict[str, Any]]:
        return {entry["id"]: entry for entry in self("/cluster/resources")[1]["data"]}


@pytest.fixture
def call(plain_node: lab.SimulatedNode) -> Iterator[Caller]:
    client = http.client.HTTPConnection("127.0.0.1", plain_node.port, timeout=10)
    with closing(client):
        yield Caller(plain_node, client)


# --- the node -------------------------------------------------------------------------------------

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
def test_refusal_gives_its_reason_and_closes(
    call: Caller, plain_node: lab.SimulatedNode, path: str, status: int, reason: str
) -> None:
    response, document = call(path)
    assert (response.status, response.reason) == (status, reason)
    assert response.headers["Connection"] == "close"
    assert document["message"].rstrip("\n") == reason
    call("/version")
    assert plain_node.connections == 2


def test_values_expire_after_five_minutes(call: Caller, plain_node: lab.SimulatedNode) -> None:
    plain_node.resources_age_seconds = 301
    listed = call.resources()
    assert {entry["status"] for entry in listed.values()} == {"unknown", "ok"}
    figures = {"name", "cpu", "maxdisk", "uptime"}
    assert not figures & {key for entry in listed.values() for key in entry}


def test_backups_come_from_pvedaemon_which_closes(
    call: Caller, plain_node: lab.SimulatedNode
) -> None:
    response, document = call(PRUNE.format("bak"))
    assert response.headers.get_all("Connection") == ["close", "Keep-Alive"]
    assert {(entry["mark"], entry.get("vmid")) for entry in document["data"]} == {
        *(("keep", vmid) for vmid in (100, 101, 106, 200)),
        # Their names are somebody's own.
        *(("protected", vmid) for vmid in (100, "100", None)),
        ("renamed", "100"),
    }
    call("/version")
    assert plain_node.connections == 2


def test_hundredth_request_closes_the_connection(
    call: Caller, plain_node: lab.SimulatedNode
) -> None:
    said = [call("/version")[0].headers["Connection"] for _ in range(101)]
    assert said == ["Keep-Alive"] * 99 + ["close", "Keep-Alive"]
    assert [request.connection for request in plain_node.requests] == [1] * 100 + [2]


# --- the hub --------------------------------------------------------------------------------------

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
        {"storage_targets": (UNKNOWN, UNKNOWN)},
    ],
    ids=str,
)
def test_report_outside_the_contract_is_refused(
    plain_hub: lab.SimulatedHub, changes: dict[str, Any]
) -> None:
    assert post(plain_hub, make_report(**changes).to_json()) == 422
    assert (plain_hub.reports, len(plain_hub.rejected)) == ([], 1)


@pytest.mark.parametrize(
    ("part", "other", "status"),
    [
        ('"cpu_count":null', '"cpu_count":"1"', 422),
        ('"cpu_count":null', '"cpu_count":NaN', 400),
        ("{", "", 400),
    ],
)
def test_report_of_another_shape_is_refused(
    plain_hub: lab.SimulatedHub, part: str, other: str, status: int
) -> None:
    text = make_report().to_json()
    assert part in text
    assert post(plain_hub, text.replace(part, other, 1)) == status


def test_strange_key_is_refused(plain_hub: lab.SimulatedHub) -> None:
    assert post(plain_hub, make_report().to_json(), "another") == 401
    assert (len(plain_hub.rejected), "another" in plain_hub.rejected[0]) == (1, False)
