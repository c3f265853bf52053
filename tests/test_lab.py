"""The simulated hub refuses what the contract refuses, so that the other tests need not look."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import felhom_agent as agent
import lab
from support import make_report

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
