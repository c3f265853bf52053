"""Each extra, and that no more is asked without it; test_report.py has the single values."""

from __future__ import annotations

import dataclasses
import operator
import re
import time
from collections.abc import Mapping
from typing import Final

import pytest

import lab
from felhom_agent import AgentError, HostReport
from support import EXTRAS, SOON_IF_BUSY, find_problems, levels, make_collector, messages, warnings

PRUNE: Final = "/nodes/pve1/storage/{}/prunebackups?prune-backups=keep-all%3D1"
# Those that hold backups, are available and not a Proxmox Backup Server.
ASKED: Final = [PRUNE.format(name) for name in ("bak", "local", "nas")]
Node = lab.SimulatedNode
Log = pytest.LogCaptureFixture


@pytest.fixture
def node(plain_node: Node) -> Node:
    """With one container; every kind of VM, storage and backup."""
    plain_node.guests = lab.many_guests(1)
    return plain_node


def collect(node: Node, *extras: str) -> HostReport:
    report = make_collector(node, extras=extras).collect()
    assert find_problems(report) == []
    return report


def find_calls(node: Node, word: str = "") -> list[str]:
    """The paths that were asked and have this word, without the time in them."""
    paths = [request.path.removeprefix(node.base) for request in node.requests]
    return [re.sub("since=[0-9]{10}&", "since=…&", path) for path in paths if word in path]


def storages(report: HostReport) -> dict[str, str]:
    return {target.storage: target.status for target in report.storage_targets}


def backups(report: HostReport) -> list[tuple[int, str, str, str]]:
    fields = ("vmid", "type", "storage", "created_at")
    return list(map(operator.attrgetter(*fields), report.backups))


PERMISSIONS: Final = "/access/permissions?path="
LISTS: Final = ["/cluster/resources", "/nodes/pve1/status", f"{PERMISSIONS}/vms/999999999"]
USUAL: Final = [f"{PERMISSIONS}/nodes/pve1", "/nodes/pve1/lxc/100/config?current=1"]
VMS: Final = [f"/nodes/pve1/qemu/{vmid}/config?current=1" for vmid in (200, 201, 202)]
STORAGE: Final = [f"{PERMISSIONS}/storage/999999999"]
TASKS: Final = ["/nodes/pve1/tasks?source=archive&since=…&limit=50"]
CALLS: Final[Mapping[tuple[str, ...], list[str]]] = {
    (): LISTS + USUAL,
    ("qemu",): LISTS + USUAL + VMS,
    ("storage",): LISTS + STORAGE + USUAL,
    ("backups",): LISTS + STORAGE + USUAL + ASKED,
    ("details",): LISTS + USUAL,
    ("tasks",): LISTS + USUAL + TASKS,
    EXTRAS: LISTS + STORAGE + USUAL + VMS + ASKED + TASKS,
}


@pytest.mark.parametrize(("extras", "calls"), CALLS.items(), ids=("none", *EXTRAS, "all"))
def test_cycle_with_extras_makes_these_calls_and_no_others(
    node: Node, extras: tuple[str, ...], calls: list[str]
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


def test_every_kind_of_vm_is_what_its_configuration_says(node: Node, log: Log) -> None:
    node.vms.append(lab.Guest(203, "gone", type="qemu", vanished=True))
    # `diskless` was just created, so that its name is only in its configuration.
    node.vms[0].status = "unknown"
    _container, *vms = collect(node, "qemu").guests
    assert list(map(dataclasses.astuple, vms)) == [
        # Sockets times cores, not capped at the node's 2; only the two disks.
        (200, "qemu", "vm-one", "running", "", (8, 4 << 30, 132 << 30), None),
        (201, "qemu", "template", "stopped", "", (1, 512 << 20, 10 << 30), None),
        # `current=2048`, and the number of vcpus is not that of cores.
        (202, "qemu", "diskless", "unknown", "", (2, 2 << 30, None), None),
        (203, "qemu", "gone", "unknown", "", None, None),
    ]
    assert levels(log, "a guest's configuration cannot be read") == ["WARNING"]


def test_storages_are_sorted_and_unknown_without_sizes(node: Node) -> None:
    report = collect(node, "storage")
    assert list(storages(report)) == ["bak", "gone", "local", "nas", "nobackup", "pbs"]
    _bak, gone, _local, nas, *_others = map(dataclasses.astuple, report.storage_targets)
    assert gone == ("gone", "dir", "unknown", None, None)
    assert nas == ("nas", "nfs", "available", 4294967296, 31494144)


def test_missing_privilege_on_storages_is_told(node: Node, log: Log) -> None:
    """Without Datastore.Audit Proxmox lists no storages, as if there were none."""
    node.acl = [("/vms", "PVEAuditor", True), ("/nodes/pve1", "PVEAuditor", True)]
    assert collect(node).storage_targets == ()
    for extra in ("storage", "backups"):
        with pytest.raises(AgentError, match=r"Datastore\.Audit on /storage.*--roles PVEAuditor"):
            collect(node, extra)
    assert messages(log) == []
    node.acl.append(("/storage/bak", "PVEAuditor", True))
    assert storages(collect(node, "storage")) == {"bak": "available"}
    assert levels(log) == levels(log, r"Datastore\.Audit on /storage") == ["WARNING"]


def test_newest_backup_of_each_guest_and_type_on_each_storage_is_reported(
    node: Node, log: Log
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
    assert report.backups[0].volid == "bak:backup/vzdump-lxc-100-2026_11_24-02_00_03.tar.zst"
    assert messages(log) == []


def test_archives_that_do_not_count_are_told_once(node: Node, log: Log) -> None:
    bak = lab.Storage("bak", backups=[lab.backup("bak:backup/vzdump-lxc-100-own.tar", 9, 100)])
    node.storages = [bak]
    collector = make_collector(node, extras=["backups"])
    for _ in range(2):
        report = collector.collect()
        assert (storages(report), report.backups) == ({"bak": "available"}, ())
    (warning,) = warnings(log)
    assert warning.startswith("storage bak: 1 archive not counted")
    bak.backups.append(lab.backup("bak:backup/vzdump-lxc-100-2026_11_24-02_00_03.tar", 9, 100))
    assert backups(collector.collect()) == [(100, "lxc", "bak", "1970-01-01T00:00:09Z")]
    assert levels(log, "archives on bak: problem resolved") == ["INFO"]


def test_node_without_backups_has_none_to_ask_for(node: Node, log: Log) -> None:
    node.storages = [lab.Storage("local", "iso"), lab.Storage("pbs", plugintype="pbs")]
    node.resources_age_seconds = 31
    assert storages(collect(node, "backups")) == {"local": "available", "pbs": "available"}
    assert messages(log) == []


@pytest.mark.parametrize("age", [30, 31])
def test_storages_are_asked_only_while_the_list_is_new(node: Node, log: Log, age: int) -> None:
    """What blocks pvestatd is mostly a storage that hangs, and would hold a pvedaemon worker."""
    node.resources_age_seconds = age
    report = collect(node, "backups")
    assert find_calls(node, "prunebackups") == (ASKED if age == 30 else [])
    assert bool(report.backups) == (age == 30)
    # An available storage without backups would claim that there are none.
    found = {storages(report)[name] for name in ("bak", "local", "nas")}
    assert found == {"available" if age == 30 else "unknown"}
    assert len(warnings(log)) == 3 * (age != 30)


@pytest.mark.parametrize("failure", [lab.Reply(500), lab.Reply(403), lab.json_reply({"data": {}})])
def test_storage_whose_backups_cannot_be_read_is_unknown_and_the_others_are_not(
    node: Node, log: Log, failure: lab.Reply
) -> None:
    """An empty list would claim that there are none.  While the list is old, none is asked."""
    node.script("/nodes/pve1/storage/bak/", lab.Forever(failure))
    collector = make_collector(node, extras=["backups"])
    for _ in range(2):
        report = collector.collect()
        unknown = [name for name, status in storages(report).items() if status == "unknown"]
        assert unknown == ["bak", "gone"]
        assert backups(report) == [(100, "lxc", "nas", "2026-11-21T02:00:03Z")]
    (text,) = warnings(log)
    assert "GET /nodes/pve1/storage/bak/prunebackups: " in text
    # What the storage itself says is about the storage, and not about pveproxy.
    assert ("pvesm status" in text) == (failure.status == 500)
    node.clear_script()
    for node.resources_age_seconds, told in ((31, ["WARNING"]), (30, ["WARNING", "INFO"])):
        collector.collect()
        assert levels(log, "storage bak") == ["WARNING", "DEBUG", *told]


# pveproxy itself gives up after 30 s, with 596.
@pytest.mark.parametrize(
    ("answer", "end"),
    [(lab.Stall(), "a day"), (lab.Reply(596), "not available"), (lab.Reply(596), "restart")],
)
def test_only_one_of_the_storages_that_hang_is_asked_until_that_is_over(
    node: Node, log: Log, monkeypatch: pytest.MonkeyPatch, answer: lab.Answer, end: str
) -> None:
    """Each would hold one of pvedaemon's three workers for good."""
    monotonic = time.monotonic

    def wait(seconds: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + seconds)

    node.storages = [lab.Storage(f"nas{number}", plugintype="nfs") for number in range(4)]
    node.script("/nodes/pve1/storage/", lab.Forever(answer))
    collector = make_collector(node, extras=["backups"], timeout_seconds=SOON_IF_BUSY)
    for seconds in (0, 86_300):
        wait(seconds)
        report = collector.collect()
        assert set(storages(report).values()) == {"unknown"}
        assert report.backups == ()
    assert find_calls(node, "prunebackups") == [PRUNE.format("nas0")]
    first, *others, last = warnings(log)
    assert re.search("storage nas0 .*; check pvesm status", first)
    assert "nas3 is unknown: storage nas0 did not answer in time" in others[-1]
    assert (len(others), "nas0 is unknown: storage nas0 did not" in last) == (3, True)

    node.clear_script()
    if end == "a day":
        wait(86_400)
    elif end == "restart":
        collector = make_collector(node, extras=["backups"])
    else:
        node.storages[0].status = "unknown"
        collector.collect()
        assert len(find_calls(node, "prunebackups")) == 1 + 3
        node.storages[0].status = "available"
    node.requests.clear()
    report = collector.collect()
    assert len(find_calls(node, "prunebackups")) == 4
    assert set(storages(report).values()) == {"available"}


def test_storage_is_not_asked_without_the_time_that_it_may_take(
    node: Node, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be taken for one that hangs, and none would be asked for a day."""
    monotonic, collector = time.monotonic, make_collector(node, extras=["backups"])

    def clock() -> float:
        """By this clock the guest's configuration takes 50.1 s, and a cycle may take 60 s."""
        return monotonic() + 50.1 * bool(find_calls(node, "/config"))

    monkeypatch.setattr(time, "monotonic", clock)
    assert collector.collect().backups == ()
    assert find_calls(node, "prunebackups") == []
    assert levels(log, "no time left in this cycle; .*timeout_seconds") == ["WARNING"] * 3
    assert collector.collect().backups
    assert find_calls(node, "prunebackups") == ASKED


def test_details_are_what_list_and_configuration_say_or_null(node: Node) -> None:
    """Never false, 0 or an empty list.  Proxmox itself keeps lock, tags and HA state."""

    def details() -> list[object]:
        guests = collect(node, "details", "qemu").guests
        return [dataclasses.astuple(guest.details) for guest in guests if guest.details]

    # Uptime, CPU and memory
    measured, nothing = (123, 0.245004192691072, 134217728), (None, None, None)
    tags = {"onboot": 1, "tags": "größe;日本;UPPER"}
    node.guests = [
        lab.Guest(100, "full", config=tags, list_extra={"hastate": "started"}),
        lab.Guest(101, "template", "stopped", lock="backup", template=True),
        lab.Guest(102, "refused", config={"env": "A=1", "onboot": 1}),
        lab.Guest(103, "new", "unknown", lock="migrate"),
    ]
    node.vms = [lab.Guest(200, "paused", "paused", type="qemu")]
    assert details() == [
        (False, True, None, ["UPPER", "größe", "日本"], "started", *measured),
        (True, False, "backup", [], None, *nothing),
        (False, None, None, [], None, *measured),
        (None, False, "migrate", [], None, *nothing),
        (False, False, None, [], None, *nothing),
    ]
    node.resources_age_seconds = 121
    assert details()[0] == (None, True, None, ["UPPER", "größe", "日本"], "started", *nothing)


def test_tasks_of_the_last_day_are_asked_for(node: Node) -> None:
    # By when they began; however long they took.
    begun = int(time.time()) - 86_400
    usual = lab.task("b", 101, begun + 200, starttime=begun + 60)
    node.tasks = [usual, lab.task("b", 100, begun + 200, starttime=begun - 60)]
    assert [entry.operation for entry in collect(node, "tasks").audit_tail] == ["b 101"]
    node.tasks = [lab.task("b", 100, begun + 200 - number) for number in range(60)]
    assert len(collect(node, "tasks").audit_tail) == 50


def test_tasks_that_cannot_be_read_cost_a_warning(
    node: Node, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, though each cycle asks for the tasks since another time."""
    node.script("/nodes/pve1/tasks", lab.Forever(lab.Reply(500, "no")))
    collector = make_collector(node, extras=["tasks"])
    for now in (1_795_485_603, 1_795_486_503):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert collector.collect().audit_tail == ()
    (warning,) = warnings(log)
    assert warning.startswith("audit_tail is unknown: GET /nodes/pve1/tasks: 500 ")
