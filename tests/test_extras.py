"""Extras: VMs, storages, backups, details and tasks, and that no more is asked without them.

What becomes of each value that Proxmox can send is in test_report.py.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import time
from collections.abc import Mapping
from typing import Any, Final

import pytest

import lab
from felhom_agent import AgentError, GuestDetails, GuestSpec, HostReport, TransportError
from support import EXTRAS, SOON_IF_BUSY, make_collector, messages

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


def find_calls(node: lab.SimulatedNode, word: str = "") -> list[str]:
    """The paths that were asked and have this word, without the time in them."""
    paths = [request.path.removeprefix(node.base) for request in node.requests]
    return [re.sub("since=[0-9]{10}&", "since=…&", path) for path in paths if word in path]


def storages(report: HostReport) -> dict[str, str]:
    return {target.storage: target.status for target in report.storage_targets}


def backups(report: HostReport) -> list[tuple[int, str, str, str]]:
    fields = ("vmid", "type", "storage", "created_at")
    return list(map(operator.attrgetter(*fields), report.backups))


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [text for level, text in messages(log) if level == "WARNING"]


def levels(log: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [level for level, text in messages(log) if word in text]


# --- what is asked --------------------------------------------------------------------------------

PERMISSIONS: Final = "/access/permissions?path="
LISTS: Final = ["/cluster/resources", "/nodes/pve1/status", f"{PERMISSIONS}/vms/999999999"]
USUAL: Final = [f"{PERMISSIONS}/nodes/pve1", "/nodes/pve1/lxc/100/config?current=1"]
VMS: Final = [f"/nodes/pve1/qemu/{vmid}/config?current=1" for vmid in (200, 201, 202)]
STORAGE: Final = [f"{PERMISSIONS}/storage/999999999"]
TASKS: Final = ["/nodes/pve1/tasks?source=archive&since=…&limit=50"]
NAMES: Final = ("none", *EXTRAS, "all")
CALLS: Final[Mapping[tuple[str, ...], list[str]]] = {
    (): LISTS + USUAL,
    ("qemu",): LISTS + USUAL + VMS,
    ("storage",): LISTS + STORAGE + USUAL,
    ("backups",): LISTS + STORAGE + USUAL + ASKED,
    ("details",): LISTS + USUAL,
    ("tasks",): LISTS + USUAL + TASKS,
    EXTRAS: LISTS + STORAGE + USUAL + VMS + ASKED + TASKS,
}


@pytest.mark.parametrize(("extras", "calls"), CALLS.items(), ids=NAMES)
def test_cycle_with_extras_makes_these_calls_and_no_others(
    node: lab.SimulatedNode, extras: tuple[str, ...], calls: list[str]
) -> None:
    """The token is diagnosed for what they need; pvedaemon serves only backups, after the rest."""
    report = collect(node, *extras)
    assert find_calls(node) == calls
    assert {request.method for request in node.requests} == {"GET"}
    assert len(report.guests) == (4 if "qemu" in extras else 1)
    assert bool(report.storage_targets) == bool({"storage", "backups"} & set(extras))
    assert bool(report.backups) == ("backups" in extras)
    assert bool(report.audit_tail) == ("tasks" in extras)
    assert (report.guests[0].details is not None) == ("details" in extras)
    # No extra changes what the report has without it.
    (plain,) = collect(node).guests
    assert dataclasses.replace(report.guests[0], details=None) == plain


# --- VMs ------------------------------------------------------------------------------------------

# Cores, MiB and GiB.
KINDS: Final[Mapping[int, tuple[str, str, int, int, int | None]]] = {
    # Sockets times cores, not capped at the node's 2; both disks, but not EFI, CD-ROM or the
    # unused one.
    200: ("vm-one", "running", 8, 4096, 132),
    # Of a template only the name and a disk are set.
    201: ("template", "stopped", 1, 512, 10),
    # `current=2048`, and the number of vcpus is not that of cores.
    202: ("diskless", "stopped", 2, 2048, None),
}


def test_every_kind_of_vm_is_what_its_configuration_says(node: lab.SimulatedNode) -> None:
    container, *vms = collect(node, "qemu").guests
    assert (container.vmid, container.type) == (100, "lxc")
    assert [vm.vmid for vm in vms] == list(KINDS)
    for vm in vms:
        name, status, cores, mib, gib = KINDS[vm.vmid]
        spec = GuestSpec(cores=cores, memory_bytes=mib << 20, disk_bytes=gib and gib << 30)
        assert (vm.type, vm.name, vm.status, vm.spec) == ("qemu", name, status, spec)


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
    assert guests[new].name == "diskless"
    (warning,) = warnings(log)
    assert warning.startswith("the configurations of 2 guests cannot be read")


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


def test_newest_backup_of_each_guest_and_type_on_each_storage_is_reported(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    """Only vzdump's own names say whose an archive is; backups of guests that are gone count."""
    report = collect(node, "backups")
    assert backups(report) == [
        (100, "lxc", "bak", "2026-11-24T02:00:03Z"),
        (100, "lxc", "nas", "2026-11-21T02:00:03Z"),
        (101, "lxc", "bak", "2026-11-21T02:00:40Z"),
        # It was a VM before.
        (101, "qemu", "bak", "2026-11-22T02:00:40Z"),
        (106, "lxc", "bak", "2014-01-01T00:00:00Z"),
        (200, "qemu", "bak", "2026-11-24T02:01:00Z"),
    ]
    volid = "bak:backup/vzdump-lxc-100-2026_11_24-02_00_03.tar.zst"
    newest = (100, "lxc", "bak", volid, "2026-11-24T02:00:03Z", None, None)
    assert dataclasses.astuple(report.backups[0]) == newest
    assert messages(log) == []


def test_archives_that_do_not_count_are_told_once(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    bak = next(storage for storage in node.storages if storage.name == "bak")
    bak.backups = [lab.backup("bak:backup/vzdump-lxc-100-before-upgrade.tar.zst", 9, 100)]
    collector = make_collector(node, extras=["backups"])
    for _ in range(2):
        report = collector.collect()
        assert storages(report)["bak"] == "available"
        assert [backup.storage for backup in report.backups] == ["nas"]
    (warning,) = warnings(log)
    assert warning == "storage bak: 1 archive not counted, because vzdump did not name them"
    bak.backups.append(lab.backup("bak:backup/vzdump-lxc-100-2026_11_24-02_00_03.tar", 9, 100))
    assert backups(collector.collect())[0] == (100, "lxc", "bak", "1970-01-01T00:00:09Z")
    assert levels(log, "archives on bak: problem resolved") == ["INFO"]


def test_node_without_backups_has_none_to_ask_for(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    node.storages = [lab.Storage("local", "iso"), lab.Storage("pbs", plugintype="pbs")]
    node.resources_age_seconds = 31
    assert storages(collect(node, "backups")) == {"local": "available", "pbs": "available"}
    assert messages(log) == []


@pytest.mark.parametrize("age", [30, 31, 121, -1])
def test_storages_are_asked_only_while_the_list_is_new(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, age: int
) -> None:
    """What blocks pvestatd is mostly a storage that hangs, and would hold a pvedaemon worker."""
    node.resources_age_seconds = age
    report = collect(node, "backups")
    assert find_calls(node, "prunebackups") == (ASKED if age == 30 else [])
    assert bool(report.backups) == (age == 30)
    # An available storage without backups would claim that there are none.
    holding = {name: storages(report)[name] for name in ("bak", "local", "nas")}
    assert set(holding.values()) == {"available" if age == 30 else "unknown"}
    assert len(warnings(log)) == (age != 30)


FAILURES: Final = {
    "refused": lab.Reply(500, "storage 'bak' is not online"),
    "forbidden": lab.Reply(403, "Permission check failed (/storage/bak, Datastore.Audit)"),
    "closed": lab.Cut(),
    "other-type": lab.json_reply({"data": {}}),
    "pvedaemon-down": lab.Reply(595, "Connection refused"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_storage_whose_backups_cannot_be_read_is_unknown_and_the_others_are_not(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, failure: lab.Answer
) -> None:
    """An empty list would claim that there are none.  While the list is old, none is asked."""
    node.script("/nodes/pve1/storage/bak/", lab.Forever(failure))
    collector = make_collector(node, extras=("backups",))
    for _ in range(2):
        report = collector.collect()
        found = storages(report)
        assert (found["bak"], found["local"], found["nas"]) == ("unknown", *["available"] * 2)
        assert report.storage_targets[0].total_bytes is None
        assert backups(report) == [(100, "lxc", "nas", "2026-11-21T02:00:03Z")]
    node.clear_script()
    told = []
    for node.resources_age_seconds in (31, 5):
        collector.collect()
        told.append(levels(log, "storage bak"))
    assert told == [["WARNING", "DEBUG"], ["WARNING", "DEBUG", "INFO"]]
    (text,) = [text for text in warnings(log) if "storage bak" in text]
    assert "GET /nodes/pve1/storage/bak/prunebackups: " in text
    # What the storage itself says is about the storage, and not about pveproxy.
    assert ("pvesm status" in text) == (failure in (FAILURES["refused"], FAILURES["closed"]))


# The second is pveproxy's own time-out, which comes after 30 s.
HANGING: Final[Mapping[str, lab.Answer]] = {
    "no answer": lab.Stall(),
    "596": lab.Reply(596, "Connection timed out"),
}


def hang(node: lab.SimulatedNode, answer: lab.Answer = HANGING["596"]) -> None:
    """Four storages, which hang as one NAS does."""
    node.storages = [lab.Storage(f"nas{number}", plugintype="nfs") for number in range(4)]
    node.script("/nodes/pve1/storage/", lab.Forever(answer))


@pytest.mark.parametrize("answer", HANGING.values(), ids=HANGING)
def test_only_one_of_the_storages_that_hang_is_asked(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, answer: lab.Answer
) -> None:
    """Each would hold one of pvedaemon's three workers for good."""
    hang(node, answer)
    collector = make_collector(node, extras=["backups"], timeout_seconds=SOON_IF_BUSY)
    for _ in range(3):
        report = collector.collect()
        assert set(storages(report).values()) == {"unknown"}
        assert report.backups == ()
    assert find_calls(node, "prunebackups") == [PRUNE.format("nas0")]
    first, second = warnings(log)
    assert re.search("storage nas0 .*timed out; check pvesm status, .* 30 s$", first)
    assert re.search("nas0 .*not available, a day has passed, or the agent is restarted", second)


def test_storage_is_not_asked_without_the_time_that_it_may_take(node: lab.SimulatedNode) -> None:
    """It could be taken for one that hangs, and none would be asked for a day."""
    client = make_collector(node).proxmox
    with client.session(time.monotonic() + 9.9):
        assert client.node_status()
        with pytest.raises(TransportError, match=r"no time left in this cycle; .*timeout_seconds"):
            client.archives("bak")
    assert find_calls(node, "prunebackups") == []


@pytest.mark.parametrize("end", ["not available", "a day", "restart", "none of these"])
def test_storages_are_asked_again(
    node: lab.SimulatedNode, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    hang(node)
    collector, monotonic = make_collector(node, extras=["backups"]), time.monotonic
    collector.collect()
    node.clear_script()
    later = 86_300.0
    if end == "not available":
        node.storages[0].status = "unknown"
        collector.collect()
        assert len(find_calls(node, "prunebackups")) == 1 + 3
        node.storages[0].status = "available"
    elif end == "a day":
        later = 86_400.0
    elif end == "restart":
        collector = make_collector(node, extras=["backups"])
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + later)
    node.requests.clear()
    report = collector.collect()
    is_over = end != "none of these"
    assert len(find_calls(node, "prunebackups")) == (4 if is_over else 0)
    assert set(storages(report).values()) == {"available" if is_over else "unknown"}


# --- details --------------------------------------------------------------------------------------


def test_details_are_what_list_and_configuration_say(node: lab.SimulatedNode) -> None:
    running = lab.Guest(100, "a", config={"onboot": 1, "tags": "größe;日本;UPPER"})
    running.list_extra = {"hastate": "started"}
    stopped = lab.Guest(101, "b", "stopped", lock="backup", template=True)
    paused = lab.Guest(200, "c", "paused", type="qemu")
    node.guests, node.vms = [running, stopped], [paused]
    found = [guest.details for guest in collect(node, "details", "qemu").guests]
    nothing: dict[str, Any] = dict.fromkeys(("uptime_seconds", "cpu_usage", "memory_used_bytes"))
    defaults: dict[str, Any] = {"template": False, "lock": None, "tags": [], "ha_state": None}
    measured: dict[str, Any] = {"uptime_seconds": 123, "memory_used_bytes": 134217728}
    measured["cpu_usage"] = 0.245004192691072
    first = {"onboot": True, "tags": ["UPPER", "größe", "日本"], "ha_state": "started"}
    second = {"template": True, "onboot": False, "lock": "backup"}
    assert found == [
        GuestDetails(**defaults | measured | first),
        GuestDetails(**defaults | nothing | second),
        GuestDetails(**defaults | nothing | {"onboot": False}),
    ]


@pytest.mark.parametrize("case", ["old list", "refused", "unknown"])
def test_detail_that_is_not_known_is_null(node: lab.SimulatedNode, case: str) -> None:
    (guest,) = node.guests
    guest.status = "running"
    guest.config["onboot"], guest.lock = 1, "migrate"
    if case == "old list":
        node.resources_age_seconds = 121
    elif case == "refused":
        guest.config["env"] = "A=1"
    else:
        guest.status = "unknown"
    details = collect(node, "details").guests[0].details
    assert details
    assert (details.lock, details.tags, details.ha_state) == ("migrate", [], None)
    assert details.template is (False if case == "refused" else None)
    assert details.onboot is (None if case == "refused" else True)
    assert details.uptime_seconds == (123 if case == "refused" else None)
    assert (details.memory_used_bytes is None) == (details.cpu_usage is None) == (case != "refused")


# --- tasks ----------------------------------------------------------------------------------------


def test_finished_tasks_are_reported_the_oldest_first(node: lab.SimulatedNode) -> None:
    end = 1_795_485_603
    token = {"user": "op@pve", "tokenid": "auto"}
    tasks = [
        lab.task("vzdump", 101, end + 2, "WARNINGS: 1", **token),
        lab.task("vzdump", "", end + 1, "job errors"),
        lab.task("vzdump", 100, end),
    ]
    node.script("/nodes/pve1/tasks", lab.json_reply({"data": tasks}))
    assert list(map(dataclasses.astuple, collect(node, "tasks").audit_tail)) == [
        ("2026-11-24T02:00:03Z", "root@pam", "vzdump 100", "OK"),
        ("2026-11-24T02:00:04Z", "root@pam", "vzdump", "job errors"),
        ("2026-11-24T02:00:05Z", "op@pve!auto", "vzdump 101", "WARNINGS: 1"),
    ]


def test_tasks_of_the_last_day_are_asked_for(node: lab.SimulatedNode) -> None:
    """By when they began; however long they took."""
    begun = int(time.time()) - 86_400
    node.tasks = [
        lab.task("b", vmid, begun + 200, starttime=begun + distance)
        for vmid, distance in ((101, 60), (100, -60))
    ]
    assert [entry.operation for entry in collect(node, "tasks").audit_tail] == ["b 101"]
    node.tasks = [lab.task("b", 100, begun + 200 - number) for number in range(60)]
    assert len(collect(node, "tasks").audit_tail) == 50


def test_tasks_that_cannot_be_read_cost_a_warning(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, though each cycle asks for the tasks since another time."""
    node.script("/nodes/pve1/tasks", lab.Forever(lab.Reply(500, "no")))
    collector = make_collector(node, extras=["tasks"])
    for now in (1_795_485_603, 1_795_486_503):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert collector.collect().audit_tail == ()
    (warning,) = warnings(log)
    assert warning.startswith("audit_tail is unknown: GET /nodes/pve1/tasks: 500 ")
