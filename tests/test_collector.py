"""The collector: what it asks, what fails a cycle or a part of the report, and what it logs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import operator
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import felhom_agent as agent
import lab
from support import EXTRAS, Prober, find_problems, levels, make_collector, messages, warnings

RESOURCES: Final = "/cluster/resources"
STATUS: Final = "/nodes/pve1/status"
PERMISSIONS: Final = "/access/permissions"
Node = lab.SimulatedNode
Log = pytest.LogCaptureFixture


@pytest.fixture
def node(plain_node: Node) -> Node:
    """With two containers, 100 and 101, and no VM."""
    plain_node.guests, plain_node.vms = lab.many_guests(2), []
    return plain_node


def statuses(report: agent.HostReport) -> dict[int, str]:
    return {guest.vmid: guest.status for guest in report.guests}


def test_every_container_is_reported_by_vmid_templates_too(plain_node: Node) -> None:
    report = make_collector(plain_node).collect()
    *kinds, _vanished = sorted(plain_node.guests, key=lambda guest: guest.vmid)
    *guests, vanished = report.guests
    found = [(guest.vmid, guest.type, guest.name, guest.status) for guest in guests]
    assert found == [(kind.vmid, "lxc", kind.name, kind.status) for kind in kinds]
    assert None not in [guest.spec for guest in guests]
    # No cores mean all of the node's.
    assert guests[1].spec == agent.GuestSpec(cores=2, memory_bytes=1 << 30, disk_bytes=8 << 30)
    # It was removed, or migrated, after it was listed.
    assert dataclasses.astuple(vanished) == (999, "lxc", "vanished", "unknown", "", None, None)


def test_other_nodes_of_the_cluster_are_ignored(node: Node, log: Log) -> None:
    alone = make_collector(node, extras=EXTRAS).collect()
    guests = [lab.Guest(300, "web", config=lab.usual_config(300, "web"))]
    node.other_nodes = [
        lab.OtherNode("PVE1", "online", guests, lab.default_storages()),
        lab.OtherNode("pve2", "offline", [lab.Guest(301, "x")], [lab.Storage("other")]),
        lab.OtherNode("pve3", None, [lab.Guest(302, "y", type="qemu")]),
    ]
    report = make_collector(node, extras=EXTRAS).collect()
    assert dataclasses.replace(report, reported_at=alone.reported_at) == alone
    assert messages(log) == []


@pytest.mark.parametrize("status", ["offline", "online", None])
def test_guests_under_the_old_name_of_a_renamed_host(node: Node, log: Log, status: Any) -> None:
    old = lab.OtherNode("oldname", status, node.guests)
    node.guests, node.other_nodes = [], [old, lab.OtherNode("pve2", "offline")]
    assert make_collector(node).collect().guests == ()
    text = "node pve1 has no guests, but oldname, .* renamed.* check proxmox.node"
    assert levels(log) == levels(log, text) == ["WARNING"] * (status == "offline")


def test_node_that_is_not_listed_fails_the_cycle_and_the_listed_are_named(node: Node) -> None:
    node.other_nodes = [lab.OtherNode("pve2")]
    text = rf"^GET {RESOURCES}: node PVE1 .*proxmox\.node.*case.*pve1, pve2"
    with pytest.raises(agent.AgentError, match=text):
        make_collector(node, node="PVE1").collect()


@pytest.mark.parametrize("vmid", [None, "abc", True, 99, 1_000_000_000, "100/../101"], ids=str)
@pytest.mark.parametrize("kind", ["lxc", "qemu"])
def test_guest_without_a_valid_vmid_fails_the_cycle(node: Node, kind: Any, vmid: object) -> None:
    """To leave it out would claim that it does not exist."""
    node.vms = [lab.Guest(300, "odd", type=kind, list_extra={"vmid": vmid})]
    with pytest.raises(agent.TransportError, match=f"^GET {RESOURCES}: .*vmid"):
        make_collector(node, extras=["qemu"]).collect()


@pytest.mark.parametrize("listed", ["prelaunch", None, "", 5, ["running"]], ids=str)
def test_status_is_the_listed_one_or_unknown_and_vmid_may_be_a_string(
    node: Node, listed: object
) -> None:
    node.guests[0].list_extra = {"vmid": "100", "status": listed}
    expected = listed if listed == "prelaunch" else "unknown"
    assert statuses(make_collector(node).collect()) == {100: expected, 101: "running"}


# Whatever else a response can be is in the fault table.
@pytest.mark.parametrize("path", [RESOURCES, STATUS])
def test_without_list_or_status_there_is_no_report(node: Node, path: str) -> None:
    node.script(path, lab.json_reply({"data": "nonsense"}))
    with pytest.raises(agent.TransportError, match=f"^GET {path}: .*unusable .data is str.; "):
        make_collector(node).collect()
    assert not [request for request in node.requests if "/config" in request.path]


def test_empty_list_proves_nothing_without_the_privileges(node: Node) -> None:
    """With a guest the same is a warning; see test_faults.py."""
    node.guests, node.vms, node.storages = [], lab.many_vms(1), []
    node.script(PERMISSIONS, lab.Forever(lab.Reply(500)))
    with pytest.raises(agent.HTTPError, match=f"^GET {PERMISSIONS}.*: .*; "):
        make_collector(node).collect()
    with pytest.raises(agent.HTTPError, match=f"^GET {PERMISSIONS}"):
        make_collector(node, extras=["qemu", "storage"]).collect()
    node.storages = lab.default_storages()
    assert len(make_collector(node, extras=["qemu", "storage"]).collect().guests) == 1


# What is left of such a guest is in test_faults.py.
@pytest.mark.parametrize("count", [1, 12])
def test_failing_guests_are_one_warning_and_their_recovery_one_line(
    node: Node, log: Log, count: int
) -> None:
    node.guests = lab.many_guests(count)
    collector = make_collector(node)
    node.script("/nodes/pve1/lxc/", lab.Forever(lab.Reply(500, "gone")))
    collector.collect()
    collector.collect()
    node.clear_script()
    collector.collect()
    collector.collect()
    number = "a guest's configuration" if count == 1 else f"the configurations of {count} guests"
    text = f"^{number} cannot be read.* unknown.*: GET /nodes/pve1/lxc/100/config: "
    assert levels(log, text) == ["WARNING", "DEBUG"]
    assert levels(log, "guests: problem resolved") == ["INFO"]
    assert len([level for level in levels(log) if level != "DEBUG"]) == 2


def test_collect_ends_after_six_timeouts_and_the_rest_is_unknown(
    node: Node, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this clock each configuration takes 10 s, as long as one request may."""

    def asked() -> int:
        return len([request for request in node.requests if "/config" in request.path])

    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 10 * asked())
    node.guests = lab.many_guests(20)
    report = make_collector(node, timeout_seconds=10).collect()
    assert asked() == 6
    assert [guest.spec is None for guest in report.guests] == [False] * 6 + [True] * 14
    assert {guest.status for guest in report.guests[6:]} == {"unknown"}
    assert levels(log, "configurations of 14 guests .*no time left in this cycle") == ["WARNING"]


def test_container_with_environment_variables_keeps_its_status(node: Node, log: Log) -> None:
    """Proxmox refuses all of its configuration to who may not change it, for ever."""
    node.guests = [
        lab.Guest(100, "web", config={"env": "A=1", "cores": 2, "memory": 768}),
        # A CPU limit is not a number of cores.
        lab.Guest(101, "db", "stopped", config={"env": "A=1", "cpulimit": "1.5"}),
    ]
    web, db = make_collector(node).collect().guests
    assert (web.status, db.status) == ("running", "stopped")
    assert web.spec == agent.GuestSpec(cores=2, memory_bytes=768 << 20, disk_bytes=None)
    assert db.spec == agent.GuestSpec(cores=None, memory_bytes=512 << 20, disk_bytes=None)
    assert set(levels(log)) == set(levels(log, "403 Permission check failed")) == {"DEBUG"}


@pytest.mark.parametrize(("age", "status"), [(9, "unknown"), (121, "running")])
def test_refused_configuration_of_a_guest_without_a_listed_status(
    node: Node, age: int, status: str
) -> None:
    node.guests[0].status, node.resources_age_seconds = status, age
    node.guests[0].config["env"] = "A=1"
    refused = make_collector(node).collect().guests[0]
    assert (refused.status, refused.spec) == ("unknown", None)


@pytest.mark.parametrize("error", [agent.AgentError("no"), ValueError("no")], ids=repr)
def test_prober_that_fails_does_not_stop_the_report_and_is_told_when_it_changes(
    node: Node, log: Log, error: Exception
) -> None:
    prober = Prober()
    collector = make_collector(node, prober)
    found = []
    for prober.state in ("failed", error, error, "active", error):
        found.append(collector.collect().cloudflared.status)
    assert found == ["failed", "unknown", "unknown", "active", "unknown"]
    assert levels(log, "cloudflared") == ["WARNING", "DEBUG", "INFO", "WARNING"]
    # A bug is logged with its traceback.
    assert ("Traceback" in log.text) == isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("age", "is_believed"), [(0, True), (120, True), (121, False), (315, False), (-1, False)]
)
def test_list_that_is_too_old_is_not_believed(
    node: Node, log: Log, age: int, is_believed: bool
) -> None:
    """Proxmox repeats the last values for 5 minutes as if they were true."""
    node.resources_age_seconds = age
    report = make_collector(node, extras=["storage"]).collect()
    assert statuses(report) == dict.fromkeys((100, 101), "running" if is_believed else "unknown")
    # The configuration is true whatever the list says.
    assert [guest.name for guest in report.guests] == ["ct100", "ct101"]
    assert None not in [guest.spec for guest in report.guests]
    assert (report.host.cpu_usage is not None) == is_believed
    assert report.host.uptime_seconds == 2574
    local = next(target for target in report.storage_targets if target.storage == "local")
    assert local.status == ("available" if is_believed else "unknown")
    assert (local.total_bytes is None) == (local.used_bytes is None) == (not is_believed)
    text = "in the last 120 s.*systemctl status pvestatd .*a storage that does not answer"
    assert levels(log) == levels(log, text) == ["WARNING"] * (not is_believed)


@pytest.mark.parametrize("uptimes", [(None, 2565), (2574, None)], ids=["status", "entry"])
def test_list_of_unknown_age_is_not_believed(
    node: Node, log: Log, uptimes: tuple[object, object]
) -> None:
    node.status["uptime"], node.resources["uptime"] = uptimes
    report = make_collector(node).collect()
    assert set(statuses(report).values()) == {"unknown"}
    assert report.host.cpu_usage is None
    assert levels(log, "pvestatd") == ["WARNING"]


@pytest.mark.parametrize("uptime", [0, 299, 300])
@pytest.mark.parametrize(
    ("age", "status"),
    [(301, "running"), (-1, "running"), (0, "unknown")],
    ids=["old", "before-the-boot", "before-the-first-round"],
)
def test_without_measurements_in_the_first_five_minutes_after_a_boot_there_is_no_report(
    node: Node, log: Log, uptime: int, age: int, status: str
) -> None:
    node.status["uptime"], node.resources_age_seconds = uptime, age
    for guest in node.guests:
        guest.status = status
    collector = make_collector(node)
    if uptime < 300:
        with pytest.raises(agent.AgentError, match=r"^Proxmox has not measured its guests yet; "):
            collector.collect()
        assert messages(log) == []
    else:
        assert set(statuses(collector.collect()).values()) == {"unknown"}
        assert levels(log) == levels(log, "pvestatd") == ["WARNING"]


@pytest.mark.parametrize("uptime", [2574, 10])
def test_node_listed_as_offline_is_out_of_the_cluster(node: Node, log: Log, uptime: int) -> None:
    node.status["uptime"] = uptime
    node.resources = {"status": "offline", "uptime": None}
    for guest in node.guests:
        guest.status = "unknown"
    assert set(statuses(make_collector(node).collect()).values()) == {"unknown"}
    text = "offline; .*pvecm status.*systemctl status corosync pve-cluster$"
    assert levels(log) == levels(log, text) == ["WARNING"]


@pytest.mark.parametrize(
    ("containers", "vms", "kinds"),
    [
        (["unknown"] * 2, ["running"] * 2, "containers"),
        (["running"] * 2, ["unknown"] * 2, "virtual machines"),
        (["unknown"], ["unknown"] * 2, "guests"),
        ([], ["unknown"], "guests"),
        (["unknown"], ["running"] * 2, None),
        (["unknown", "running"], ["unknown", "running"], None),
    ],
)
def test_kind_of_guests_that_is_not_measured_is_one_warning(
    node: Node, log: Log, containers: list[str], vms: list[str], kinds: str | None
) -> None:
    """Containers, if one container's monitor fails; and then no second message counts them."""
    node.guests, node.vms = lab.many_guests(len(containers)), lab.many_vms(len(vms))
    for guest, status in zip(node.guests + node.vms, containers + vms, strict=True):
        guest.status = status
    make_collector(node, extras=["qemu"]).collect()
    text = f"pvestatd does not measure the {kinds}, .*systemctl status pvestatd"
    assert [bool(re.match(text, warning)) for warning in warnings(log)] == [True] * bool(kinds)


ONE_GUEST: Final = [("/nodes/pve1", "PVEAuditor", True), ("/vms/100", "VMAudit", True)]
# What is changed at the node, and what the warning says
PROBLEMS: Final[Mapping[str, tuple[str, Any, str]]] = {
    "pvestatd": ("resources_age_seconds", 121, "systemctl status pvestatd"),
    "VM.Audit on /vms": ("acl", ONE_GUEST, "lacks VM.Audit on /vms"),
    "excess privileges": ("acl", [lab.AUDITOR, ("/vms", "Power", True)], "read: VM.PowerMgmt; "),
}


@pytest.mark.parametrize("topic", PROBLEMS)
def test_problem_is_told_at_its_start_and_at_its_end(node: Node, log: Log, topic: str) -> None:
    node.roles["Power"] = (*lab.PRIVILEGES, "VM.PowerMgmt")
    name, value, text = PROBLEMS[topic]
    usual = getattr(node, name)
    collector = make_collector(node)
    for each in (usual, value, value, usual, usual, value):
        setattr(node, name, each)
        collector.collect()
    assert levels(log, text) == ["WARNING", "DEBUG", "WARNING"]
    assert levels(log, f"^{topic}: problem resolved$") == ["INFO"]
    assert len(levels(log)) == 4


ODD: Final[tuple[object, ...]] = (
    *(None, True, False, 0, -1, 99, 8193, 2**53 - 1, 2**53, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "0", "1.5", "-1", "many", "NaN", "1e5", "9" * 400, "\ud800"),
    *("a\x00\x1b[2J\u202e", "x" * 1000, "12x", "unknown", "local:1/x,size=8G", "/mnt,size=0"),
    *("local:1/x,size=9999999T", "pve-manager/", "Linux ", "backup", [], {}, [[]], {"": {}}),
)
VALUES: Final = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
PATHS: Final = (
    *(RESOURCES, STATUS, "/nodes/pve1/tasks?source=archive"),
    *(f"{PERMISSIONS}?path=/vms/999999999", f"{PERMISSIONS}?path=/nodes/pve1"),
    *("/nodes/pve1/lxc/100/config?current=1", "/nodes/pve1/qemu/200/config?current=1"),
    "/nodes/pve1/storage/bak/prunebackups?prune-backups=keep-all%3D1",
)


def find_places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each place inside a JSON value."""
    yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from find_places(value[key], (*way, key))


def mutate(draw: st.DrawFn, value: Any) -> Any:
    """Replace, leave out or double one place."""
    way = draw(st.sampled_from(list(find_places(value))))
    if not way:
        return copy.deepcopy(draw(VALUES))
    inner = functools.reduce(operator.getitem, way[:-1], value)
    match draw(st.sampled_from(["replace", "replace", "leave-out", "double"])):
        case "leave-out":
            del inner[way[-1]]
        case "double" if isinstance(inner, list):
            inner.append(copy.deepcopy(inner[way[-1]]))
        case _:
            inner[way[-1]] = copy.deepcopy(draw(VALUES))
    return value


def make_small_node() -> Node:
    """With the containers 100 and 101 and the VM 200."""
    node = lab.SimulatedNode(None, guests=lab.default_guests()[1:3])
    node.vms = lab.default_vms()[1:2]
    return node


@st.composite
def scripts(draw: st.DrawFn) -> dict[str, lab.Reply]:
    """For some paths the real reply, changed in its JSON; other faults are in test_faults.py."""
    real = make_small_node()
    found = {}
    for path in sorted(draw(st.sets(st.sampled_from(PATHS), min_size=1, max_size=3))):
        document = json.loads(real.usual_reply(path).body or b"")
        for _ in range(draw(st.integers(1, 3))):
            document = mutate(draw, document)
        found[path] = lab.Reply(body=json.dumps(document).encode())
    return found


# The node, a guest and storages without `content`
LISTED: Final = json.loads("""[
    {"type": "node", "node": "pve1", "status": "online", "uptime": 2565, "cpu": 0.5},
    {"type": "lxc", "node": "pve1", "vmid": 100, "name": "\\ud800", "status": "running"},
    {"type": "storage", "node": "pve1", "storage": 5, "status": "available"},
    {"type": "storage", "node": "pve1", "storage": "bak", "status": "available"}
]""")


@given(script=scripts())
@example({RESOURCES: lab.Reply(body=json.dumps({"data": LISTED}).encode())})
def test_whatever_proxmox_answers_ends_in_a_valid_report_or_an_error(
    script: dict[str, lab.Reply],
) -> None:
    with make_small_node() as node:
        for path, reply in script.items():
            node.script(path, lab.Forever(reply))
        try:
            report = make_collector(node, extras=EXTRAS).collect()
        except agent.AgentError:
            return
    assert find_problems(report) == []
    vmids = [guest.vmid for guest in report.guests]
    assert vmids == sorted(vmids)
