"""Extras: VMs, storages and the newest backups, and that nothing more is asked without them.

The simulated node's VMs, storages and backups are captured ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

import pytest

import lab
from felhom_agent import AgentError, GuestSpec, HostReport
from support import SOON_IF_BUSY, make_collector, messages

GIB: Final = 1 << 30
PRUNE: Final = "/nodes/pve1/storage/{}/prunebackups?prune-backups=keep-all%3D1"
# Those that hold backups, are available and not a Proxmox Backup Server.
ASKED: Final = [PRUNE.format(name) for name in ("bak", "local", "nas")]


@pytest.fixture
def node(plain_node: lab.SimulatedNode) -> lab.SimulatedNode:
    """With one container; every kind of VM, storage and backup."""
    plain_node.guests = lab.many_guests(1)
    return plain_node


def collect(node: lab.SimulatedNode, *extras: str) -> HostReport:
    """The report, which is valid and as the hub would take it."""
    report = make_collector(node, extras=extras).collect()
    errors = lab.report_schema().iter_errors(json.loads(report.to_json()))
    assert [f"{error.json_path}: {error.message}" for error in errors] == []
    return report


def find_calls(node: lab.SimulatedNode) -> list[str]:
    return [request.path.removeprefix(node.base) for request in node.requests]


def storages(report: HostReport) -> dict[str, str]:
    return {target.storage: target.status for target in report.storage_targets}


def backups(report: HostReport) -> list[tuple[int, str, str]]:
    return [(backup.vmid, backup.storage, backup.created_at) for backup in report.backups]


# --- what is asked --------------------------------------------------------------------------------

LISTS: Final = ["/cluster/resources", "/nodes/pve1/status", "/access/permissions?path=/vms"]
USUAL: Final = ["/access/permissions?path=/nodes/pve1", "/nodes/pve1/lxc/100/config?current=1"]
VMS: Final = [f"/nodes/pve1/qemu/{vmid}/config?current=1" for vmid in range(200, 205)]
STORAGE: Final = ["/access/permissions?path=/storage"]
NAMES: Final = ("none", "qemu", "storage", "backups", "all")
CALLS: Final[Mapping[tuple[str, ...], list[str]]] = {
    (): LISTS + USUAL,
    ("qemu",): LISTS + USUAL + VMS,
    ("storage",): LISTS + STORAGE + USUAL,
    ("backups",): LISTS + STORAGE + USUAL + ASKED,
    ("qemu", "storage", "backups"): LISTS + STORAGE + USUAL + VMS + ASKED,
}


@pytest.mark.parametrize(("extras", "calls"), CALLS.items(), ids=NAMES)
def test_cycle_with_extras_makes_these_calls_and_no_others(
    node: lab.SimulatedNode, extras: tuple[str, ...], calls: list[str]
) -> None:
    """The token is diagnosed for what they need; pvedaemon serves only backups, after the rest."""
    report = collect(node, *extras)
    assert find_calls(node) == calls
    assert {request.method for request in node.requests} == {"GET"}
    assert len(report.guests) == (6 if "qemu" in extras else 1)
    assert bool(report.storage_targets) == bool({"storage", "backups"} & set(extras))
    assert bool(report.backups) == ("backups" in extras)


# --- VMs ------------------------------------------------------------------------------------------

# Cores, MiB and GiB.
KINDS: Final[Mapping[int, tuple[str, str, int, int, float | None]]] = {
    # Sockets times cores, not capped at the node's 2, and no pending change; both disks, but not
    # EFI, CD-ROM or the unused one.
    200: ("vm-one", "running", 8, 4096, 132),
    # A template, of which only the name and a disk are set.
    201: ("vm-two", "stopped", 1, 512, 10),
    # `current=2048`, and the number of vcpus is not that of cores.
    202: ("diskless", "stopped", 2, 2048, None),
    # A number, as older versions have it; the cloud-init drive does not count.
    203: ("cloud", "running", 2, 2048, 3072.5),
    # Two sockets with one core each; a disk without a size.
    204: ("passthrough", "stopped", 2, 1024, None),
}


def test_every_kind_of_vm_is_what_its_configuration_says(node: lab.SimulatedNode) -> None:
    container, *vms = collect(node, "qemu").guests
    assert (container.vmid, container.type) == (100, "lxc")
    assert [vm.vmid for vm in vms] == list(KINDS)
    for vm in vms:
        name, status, cores, mib, gib = KINDS[vm.vmid]
        size = int(gib * GIB) if gib else None
        spec = GuestSpec(cores=cores, memory_bytes=mib << 20, disk_bytes=size)
        assert (vm.type, vm.name, vm.status, vm.spec) == ("qemu", name, status, spec)


BOOT: Final = "local:200/vm-200-disk-0.qcow2"
CONFIGS: Final[Mapping[str, tuple[dict[str, object], tuple[object, object, object]]]] = {
    "cores-alone": ({"cores": 4}, (4, 512, None)),
    "sockets-alone": ({"sockets": "2"}, (2, 512, None)),
    "broken-cores": ({"sockets": 2, "cores": "many"}, (None, 512, None)),
    "broken-memory": ({"memory": "current=many"}, (1, None, None)),
    "every-bus": (
        dict.fromkeys(("ide0", "sata5", "scsi30", "virtio15"), f"{BOOT},size=1G"),
        (1, 512, 4),
    ),
    "not-disks": (
        dict.fromkeys(("scsihw", "efidisk0", "tpmstate0", "unused0", "net0"), f"{BOOT},size=1G"),
        (1, 512, None),
    ),
    "size-of-0": ({"scsi0": f"{BOOT},size=0", "scsi1": f"{BOOT},size=1G"}, (1, 512, None)),
    "not-text": ({"scsi0": 5}, (1, 512, None)),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_spec_of_a_vm(
    node: lab.SimulatedNode, config: dict[str, object], expected: tuple[Any, Any, Any]
) -> None:
    node.vms = [lab.Guest(200, "vm", config=config, type="qemu")]
    cores, mib, gib = expected
    spec = GuestSpec(cores=cores, memory_bytes=mib and mib << 20, disk_bytes=gib and gib * GIB)
    assert collect(node, "qemu").guests[-1].spec == spec


def test_vm_that_fails(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    """As a container does, and both are counted in one warning."""
    node.script("/nodes/pve1/qemu/201", lab.Reply(500, "gone"))
    node.script("/nodes/pve1/lxc/100", lab.Reply(500, "gone"))
    node.vms[0].status = "unknown"
    new = node.vms[0].vmid
    guests = {guest.vmid: guest for guest in collect(node, "qemu").guests}
    assert [vmid for vmid in guests if guests[vmid].spec is None] == [100, 201]
    assert [vmid for vmid in guests if guests[vmid].status == "unknown"] == [100, 201, new]
    # From its configuration.
    assert guests[new].name == "cloud"
    assert [(level, "2 of 6 guests" in text) for level, text in messages(log)] == [("WARNING", 1)]


# --- storages -------------------------------------------------------------------------------------


def test_storages_are_sorted_and_unknown_without_sizes(node: lab.SimulatedNode) -> None:
    assert list(map(dataclasses.astuple, collect(node, "storage").storage_targets)) == [
        ("bak", "dir", "available", 4294967296, 31494144),
        ("gone", "dir", "unknown", None, None),
        ("local", "dir", "available", 4294967296, 31494144),
        ("nas", "nfs", "available", 4294967296, 31494144),
        ("nobackup", "dir", "available", 4294967296, 31494144),
        ("pbs", "pbs", "available", 4294967296, 31494144),
    ]


def test_missing_privilege_on_storages_is_told_and_the_hint_helps(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    """Without Datastore.Audit Proxmox lists no storages, as if there were none."""
    node.acl = [("/vms", "PVEAuditor", True), ("/nodes/pve1", "PVEAuditor", True)]
    assert collect(node).storage_targets == ()
    for extra in ("storage", "backups"):
        with pytest.raises(AgentError, match=r"Datastore\.Audit on /storage.*--roles PVEAuditor"):
            collect(node, extra)
    assert messages(log) == []
    node.acl.append(("/storage/bak", "PVEAuditor", True))
    assert storages(collect(node, "storage")) == {"bak": "available"}
    ((level, text),) = messages(log)
    assert (level, "Datastore.Audit on /storage" in text) == ("WARNING", True)
    node.acl = [("/", "PVEAuditor", True)]
    assert len(collect(node, "storage").storage_targets) == 6
    assert len(messages(log)) == 1


# --- backups --------------------------------------------------------------------------------------


def test_newest_backup_of_each_guest_on_each_storage_is_reported(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    """Renamed files have no guest; backups of guests that are gone count."""
    report = collect(node, "backups")
    assert backups(report) == [
        (100, "bak", "2026-11-24T02:00:03Z"),
        (100, "nas", "2026-11-21T02:00:03Z"),
        (101, "bak", "2026-11-21T02:00:40Z"),
        (200, "bak", "2026-11-24T02:01:00Z"),
        (999, "bak", "2025-01-01T00:00:00Z"),
    ]
    volid = "bak:backup/vzdump-lxc-100-2026_11_24-02_00_03.tar.zst"
    newest = (100, "bak", volid, "2026-11-24T02:00:03Z", None, None)
    assert dataclasses.astuple(report.backups[0]) == newest
    assert messages(log) == []


@pytest.mark.parametrize("age", [61, 315, -1])
def test_no_storage_is_asked_while_the_list_is_old(node: lab.SimulatedNode, age: int) -> None:
    """What blocks pvestatd is mostly a storage that hangs, and would hold a pvedaemon worker."""
    node.resources_age_seconds = age
    report = collect(node, "backups")
    assert not [call for call in find_calls(node) if "prunebackups" in call]
    assert (set(storages(report).values()), report.backups) == ({"unknown"}, ())


FAILURES: Final = {
    "refused": lab.Reply(500, "unable to activate storage 'bak'"),
    "forbidden": lab.Reply(403, "Permission check failed (/storage/bak, Datastore.Audit)"),
    "hangs": lab.Stall(),
    "other-type": lab.json_reply({"data": {}}),
    **{
        name: lab.json_reply({"data": [lab.backup("bak:backup/x", 1795485603, 100), entry]})
        for name, entry in {
            "no-guest": lab.backup("bak:backup/y", 1795485603, None),
            "no-name": lab.backup("", 1795485603, 101),
            "no-date": lab.backup("bak:backup/y", 0, 101),
            "date-beyond-all": lab.backup("bak:backup/y", 10**15, 101),
        }.items()
    },
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_storage_whose_backups_cannot_be_read_is_unknown_and_the_others_are_not(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, failure: lab.Answer
) -> None:
    """An empty list would claim that there are none.  While the list is old, none is asked."""
    node.script("/nodes/pve1/storage/bak/", lab.Forever(failure))
    collector = make_collector(node, extras=("backups",), timeout_seconds=SOON_IF_BUSY)
    for _ in range(2):
        report = collector.collect()
        found = storages(report)
        assert (found["bak"], found["local"], found["nas"]) == ("unknown", *["available"] * 2)
        assert report.storage_targets[0].total_bytes is None
        assert backups(report) == [(100, "nas", "2026-11-21T02:00:03Z")]
    node.clear_script()
    told = []
    for node.resources_age_seconds in (61, 5):
        collector.collect()
        told.append([level for level, text in messages(log) if "storage bak" in text])
    assert told == [["WARNING", "DEBUG"], ["WARNING", "DEBUG", "INFO"]]
    assert PRUNE.format("bak") in messages(log)[0][1]
