"""The collector: what it asks, what fails a cycle or a part of the report, and what it logs."""

from __future__ import annotations

import contextlib
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
from support import EXTRAS, Prober, make_collector, messages, proxmox_config

RESOURCES: Final = "/cluster/resources"
STATUS: Final = "/nodes/pve1/status"
PERMISSIONS: Final = "/access/permissions"
CONFIG: Final = "/nodes/pve1/lxc/{}/config?current=1"


@pytest.fixture
def node(plain_node: lab.SimulatedNode) -> lab.SimulatedNode:
    """With two containers, 100 and 101, and no VM."""
    plain_node.guests, plain_node.vms = lab.many_guests(2), []
    return plain_node


def reply_with(data: object) -> lab.Reply:
    return lab.Reply(body=json.dumps({"data": data}).encode())


def list_entries(node: lab.SimulatedNode) -> list[Any]:
    """What the node lists of itself, containers first, to be changed and scripted."""
    with contextlib.closing(agent.ProxmoxClient(proxmox_config(node))) as client:
        entries = [entry for entry in client.resources() if entry["type"] in ("lxc", "node")]
    return sorted(entries, key=lambda entry: str(entry["type"]))


def statuses(report: agent.HostReport) -> dict[int, str]:
    return {guest.vmid: guest.status for guest in report.guests}


def levels(log: pytest.LogCaptureFixture, pattern: str) -> list[str]:
    """The levels of the messages that have this pattern."""
    return [level for level, text in messages(log) if re.search(pattern, text)]


# --- what is asked --------------------------------------------------------------------------------


def test_selftest_asks_for_all_privileges_and_nothing_else(node: lab.SimulatedNode) -> None:
    """What a cycle asks, with each extra, is in test_extras.py."""
    collector, paths = make_collector(node), []
    for is_selftest in (False, True):
        node.requests.clear()
        collector.collect(is_selftest=is_selftest)
        paths.append({request.path.removeprefix(node.base) for request in node.requests})
    assert paths[1] == {*paths[0], PERMISSIONS}
    # One for each cycle, for pveproxy closes an idle one after 5 s.
    assert node.connections == 2


# --- which guests ---------------------------------------------------------------------------------


def test_every_container_is_reported_by_vmid_templates_too(plain_node: lab.SimulatedNode) -> None:
    report = make_collector(plain_node).collect()
    kinds = sorted(plain_node.guests, key=lambda guest: guest.vmid)
    expected = [(kind.vmid, "lxc", kind.name, kind.status) for kind in kinds[:-1]]
    # It was removed, or migrated, after it was listed.
    expected.append((999, "lxc", "vanished", "unknown"))
    found = [(guest.vmid, guest.type, guest.name, guest.status) for guest in report.guests]
    assert found == expected
    assert [guest.vmid for guest in report.guests if guest.spec is None] == [999]
    specs = {guest.vmid: guest.spec for guest in report.guests}
    # No cores mean all of the node's.
    assert specs[105] == agent.GuestSpec(cores=2, memory_bytes=1 << 30, disk_bytes=8 << 30)
    assert specs[101] == agent.GuestSpec(cores=2, memory_bytes=1 << 30, disk_bytes=8 << 30)
    assert specs[109] == agent.GuestSpec(cores=2, memory_bytes=512 << 20, disk_bytes=None)


def test_other_nodes_of_the_cluster_are_ignored(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
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
def test_guests_under_the_old_name_of_a_renamed_host(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, status: Any
) -> None:
    old = lab.OtherNode("oldname", status, node.guests)
    node.guests, node.other_nodes = [], [old, lab.OtherNode("pve2", "offline")]
    collector = make_collector(node)
    assert collector.collect().guests == collector.collect().guests == ()
    warnings = [text for level, text in messages(log) if level == "WARNING"]
    assert len(warnings) == (status == "offline")
    for text in warnings:
        assert re.match(
            "node pve1 has no guests, but oldname, .* renamed.* check proxmox.node", text
        )


@pytest.mark.parametrize("name", ["PVE1", "localhost"])
def test_node_that_is_not_listed_fails_the_cycle_and_the_listed_are_named(
    node: lab.SimulatedNode, name: str
) -> None:
    """Proxmox takes `localhost` for this node, but lists it under its own name."""
    node.other_nodes = [lab.OtherNode("pve2")]
    with pytest.raises(agent.AgentError, match=r"proxmox\.node.*case.*pve1, pve2") as caught:
        make_collector(node, node=name).collect()
    assert f"node {name} " in str(caught.value)
    assert str(caught.value).startswith(f"GET {RESOURCES}: ")


@pytest.mark.parametrize("vmid", [None, "abc", True, 99, 1_000_000_000, "100/../101"], ids=str)
@pytest.mark.parametrize("kind", ["lxc", "qemu"])
def test_guest_without_a_valid_vmid_fails_the_cycle(
    node: lab.SimulatedNode, kind: str, vmid: object
) -> None:
    """To leave it out would claim that it does not exist."""
    entries = list_entries(node)
    node.script(RESOURCES, reply_with([*entries, {**entries[-1], "type": kind, "vmid": vmid}]))
    with pytest.raises(agent.TransportError, match=f"^GET {RESOURCES}: .*vmid"):
        make_collector(node, extras=["qemu"]).collect()


def test_vmid_may_be_a_string(node: lab.SimulatedNode) -> None:
    entries = [{**entry, "vmid": str(entry.get("vmid"))} for entry in list_entries(node)]
    node.script(RESOURCES, reply_with(entries))
    assert list(statuses(make_collector(node).collect())) == [100, 101]


# --- partial failure ------------------------------------------------------------------------------


# Whatever else a response can be is in the fault table.
@pytest.mark.parametrize("path", [RESOURCES, STATUS])
def test_without_list_or_status_there_is_no_report(node: lab.SimulatedNode, path: str) -> None:
    node.script(path, reply_with("nonsense"))
    with pytest.raises(agent.TransportError, match=f"^GET {path}: .*unusable .data is str.; "):
        make_collector(node).collect()
    assert not [request for request in node.requests if "/config" in request.path]


def test_empty_list_proves_nothing_without_the_privileges(node: lab.SimulatedNode) -> None:
    """With a guest the same is a warning; see test_faults.py."""
    node.guests, node.vms = [], lab.many_vms(1)
    node.script(PERMISSIONS, lab.Forever(lab.Reply(500)))
    with pytest.raises(agent.HTTPError, match=f"^GET {PERMISSIONS}.*: .*; "):
        make_collector(node).collect()
    collector = make_collector(node, extras=["qemu"])
    assert len(collector.collect().guests) == 1


# What is left of such a guest is in test_faults.py.
@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "a guest's configuration cannot be read, so it is unknown: GET "),
        (
            12,
            "the configurations of 12 guests cannot be read, so they are unknown; the first: GET ",
        ),
    ],
)
def test_failing_guests_are_one_warning_and_their_recovery_one_line(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, count: int, text: str
) -> None:
    node.guests = lab.many_guests(count)
    collector = make_collector(node)
    node.script("/nodes/pve1/lxc/", lab.Forever(lab.Reply(500, "gone")))
    collector.collect()
    collector.collect()
    node.clear_script()
    collector.collect()
    collector.collect()
    assert levels(log, re.escape(f"{text}/nodes/pve1/lxc/100/config: ")) == ["WARNING", "DEBUG"]
    assert levels(log, "guests: problem resolved") == ["INFO"]
    assert len([level for level, _ in messages(log) if level != "DEBUG"]) == 2


def test_collect_ends_after_six_timeouts_and_the_rest_is_unknown(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this clock each configuration takes 10 s, as long as one request may."""

    def asked() -> int:
        return len([request for request in node.requests if "/config" in request.path])

    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 10 * asked())
    node.guests = lab.many_guests(20)
    report = make_collector(node, timeout_seconds=10).collect()
    assert asked() == 6
    assert len(report.guests) == 20
    assert [guest.spec is None for guest in report.guests] == [False] * 6 + [True] * 14
    assert {guest.status for guest in report.guests[6:]} == {"unknown"}
    assert levels(log, "configurations of 14 guests .*no time left in this cycle") == ["WARNING"]


def test_container_with_environment_variables_keeps_its_status(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    """Proxmox refuses all of its configuration to who may not change it, for ever."""
    node.guests = [
        lab.Guest(100, "web", config={"env": "A=1", "cores": 2, "memory": 768}),
        lab.Guest(101, "db", "stopped", config={"env": "A=1", "cpulimit": "1.5"}),
    ]
    report = make_collector(node).collect()
    assert statuses(report) == {100: "running", 101: "stopped"}
    assert [guest.spec for guest in report.guests] == [
        agent.GuestSpec(cores=2, memory_bytes=768 * 1024 * 1024, disk_bytes=None),
        # A CPU limit is not a number of cores.
        agent.GuestSpec(cores=None, memory_bytes=512 * 1024 * 1024, disk_bytes=None),
    ]
    reason = "403 Permission check failed (/vms/100, VM.Config.Options)"
    assert levels(log, re.escape(reason)) == ["DEBUG"]
    assert {level for level, _ in messages(log)} == {"DEBUG"}


@pytest.mark.parametrize("age", [9, 121], ids=["listed-as-unknown", "old-list"])
def test_refused_configuration_of_a_guest_without_a_listed_status(
    node: lab.SimulatedNode, age: int
) -> None:
    node.resources_age_seconds = age
    node.guests[0].status = "unknown" if age == 9 else "running"
    node.guests[0].config["env"] = "A=1"
    found = {guest.vmid: guest for guest in make_collector(node).collect().guests}
    refused = found[node.guests[0].vmid]
    assert (refused.status, refused.spec) == ("unknown", None)


@pytest.mark.parametrize("error", [OSError("no"), ValueError(), RuntimeError("no")], ids=repr)
def test_prober_that_fails_does_not_stop_the_report_and_is_told_when_it_changes(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, error: Exception
) -> None:
    prober = Prober()
    collector = make_collector(node, prober)
    found = []
    for prober.state in ("failed", error, error, "active", error):
        found.append(collector.collect().cloudflared.status)
    assert found == ["failed", "unknown", "unknown", "active", "unknown"]
    assert levels(log, "cloudflared") == ["WARNING", "DEBUG", "INFO", "WARNING"]


# --- the age of the list --------------------------------------------------------------------------

# In seconds; those with a state are of captured lists.
AGES: Final = [
    pytest.param(0, True, id="0-in-the-same-second"),
    pytest.param(55, True, id="55-monitor-hangs"),
    pytest.param(120, True, id="120"),
    pytest.param(121, False, id="121"),
    pytest.param(315, False, id="315-pvestatd-stopped-and-expired"),
    pytest.param(-1, False, id="negative"),
]


@pytest.mark.parametrize(("age", "is_believed"), AGES)
def test_list_that_is_too_old_is_not_believed(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, age: int, is_believed: bool
) -> None:
    """Proxmox repeats the last values for 5 minutes as if they were true."""
    node.resources_age_seconds = age
    report = make_collector(node, extras=["storage"]).collect()
    assert statuses(report) == dict.fromkeys((100, 101), "running" if is_believed else "unknown")
    # The configuration is true whatever the list says.
    assert [guest.name for guest in report.guests] == ["ct100", "ct101"]
    assert [guest.spec is None for guest in report.guests] == [False, False]
    assert (report.host.cpu_usage is not None) == is_believed
    assert report.host.uptime_seconds == 2574
    local = next(target for target in report.storage_targets if target.storage == "local")
    assert local.status == ("available" if is_believed else "unknown")
    assert local.total_bytes == (4294967296 if is_believed else None)
    assert local.used_bytes == (31494144 if is_believed else None)
    assert len(messages(log)) == (not is_believed)
    for level, text in messages(log):
        assert (level, "systemctl status pvestatd" in text) == ("WARNING", True)
        assert "a storage that does not answer" in text
        assert "in the last 120 s" in text


@pytest.mark.parametrize("missing", ["status", "entry"])
def test_list_of_unknown_age_is_not_believed(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, missing: str
) -> None:
    entries = list_entries(node)
    del (node.status if missing == "status" else entries[-1])["uptime"]
    node.script(RESOURCES, reply_with(entries))
    report = make_collector(node).collect()
    assert set(statuses(report).values()) == {"unknown"}
    assert report.host.cpu_usage is None
    assert levels(log, "pvestatd") == ["WARNING"]


@pytest.mark.parametrize("uptime", [0, 299, 300])
def test_old_list_in_the_first_five_minutes_after_a_boot_is_tried_again(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, uptime: int
) -> None:
    collector = make_collector(node)
    node.status["uptime"] = uptime
    for node.resources_age_seconds in (301, -1):
        if uptime < 300:
            with pytest.raises(
                agent.AgentError, match=r"^Proxmox has not measured its guests yet; "
            ):
                collector.collect()
        else:
            assert set(statuses(collector.collect()).values()) == {"unknown"}
    assert levels(log, "pvestatd") == ([] if uptime < 300 else ["WARNING", "DEBUG"])
    log.clear()
    node.resources_age_seconds = 0
    assert set(statuses(collector.collect()).values()) == {"running"}
    assert len(messages(log)) == (uptime == 300)


@pytest.mark.parametrize("uptime", [0, 299])
def test_list_without_measurements_soon_after_a_boot_is_tried_again(
    node: lab.SimulatedNode, uptime: int
) -> None:
    """It is from before pvestatd's first round, and as new as the boot."""
    node.status["uptime"], node.resources_age_seconds = uptime, 0
    for guest in node.guests:
        guest.status = "unknown"
    with pytest.raises(agent.AgentError, match=r"^Proxmox has not measured its guests yet; "):
        make_collector(node).collect()


@pytest.mark.parametrize("uptime", [2574, 10])
def test_node_that_is_listed_as_offline_is_out_of_the_cluster(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, uptime: int
) -> None:
    entries = list_entries(node)
    entries[-1] = {"type": "node", "node": "pve1", "id": "node/pve1", "status": "offline"}
    for entry in entries[:-1]:
        entry["status"] = "unknown"
    node.status["uptime"] = uptime
    node.script(RESOURCES, reply_with(entries))
    assert set(statuses(make_collector(node).collect()).values()) == {"unknown"}
    ((level, text),) = messages(log)
    assert level == "WARNING"
    assert re.search("offline; .*pvecm status.*systemctl status corosync pve-cluster", text)
    assert "pvestatd" not in text


@pytest.mark.parametrize(
    ("containers", "vms", "kinds"),
    [
        (["unknown"] * 2, ["running"] * 2, "containers"),
        (["running"] * 2, ["unknown"] * 2, "virtual machines"),
        (["unknown"], ["unknown"] * 2, "containers and virtual machines"),
        ([], ["unknown"], "virtual machines"),
        (["unknown"], ["running"] * 2, None),
        (["unknown", "running"], ["unknown", "running"], None),
    ],
)
def test_kind_of_guests_that_is_not_measured_is_one_warning(
    node: lab.SimulatedNode,
    log: pytest.LogCaptureFixture,
    containers: list[str],
    vms: list[str],
    kinds: str | None,
) -> None:
    """Containers, if one container's monitor fails; and then no second message counts them."""
    node.guests, node.vms = lab.many_guests(len(containers)), lab.many_vms(len(vms))
    for guest, status in zip(node.guests + node.vms, containers + vms, strict=True):
        guest.status = status
    make_collector(node, extras=["qemu"]).collect()
    warnings = [text for level, text in messages(log) if level == "WARNING"]
    assert [text.partition(",")[0] for text in warnings] == (
        [f"pvestatd does not measure the {kinds}"] if kinds else []
    )
    assert not [text for text in warnings if "systemctl status pvestatd" not in text]


def test_guest_that_was_just_created_has_spec_and_name_and_is_no_warning(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture
) -> None:
    node.guests[0].status = "unknown"
    new = node.guests[0].vmid
    report = make_collector(node).collect()
    assert [vmid for vmid, status in statuses(report).items() if status == "unknown"] == [new]
    assert [guest.name for guest in report.guests] == ["ct100", "ct101"]
    assert None not in [guest.spec for guest in report.guests]
    assert report.host.cpu_usage is not None
    assert {level for level, _ in messages(log)} <= {"DEBUG"}


# --- problems that come and go --------------------------------------------------------------------

# What is changed at the node, and what the warning says
PROBLEMS: Final[Mapping[str, tuple[str, Any, str]]] = {
    "pvestatd": ("resources_age_seconds", 121, "systemctl status pvestatd"),
    "VM.Audit on /vms": (
        *("acl", [("/nodes/pve1", "PVEAuditor", True), ("/vms/100", "VMAudit", True)]),
        "lacks VM.Audit on /vms",
    ),
    "excess privileges": ("acl", [lab.AUDITOR, ("/vms", "Power", True)], "read: VM.PowerMgmt; "),
}


@pytest.mark.parametrize("topic", PROBLEMS)
def test_problem_is_told_when_it_starts_and_when_it_is_over(
    node: lab.SimulatedNode, log: pytest.LogCaptureFixture, topic: str
) -> None:
    node.roles["Power"] = (*lab.PRIVILEGES, "VM.PowerMgmt")
    name, value, text = PROBLEMS[topic]
    usual = getattr(node, name)
    collector = make_collector(node)
    for each in (usual, value, value, usual, usual, value):
        setattr(node, name, each)
        collector.collect()
    assert levels(log, text) == ["WARNING", "DEBUG", "WARNING"]
    assert levels(log, f"^{topic}: problem resolved$") == ["INFO"]
    assert len(messages(log)) == 4


# --- whatever Proxmox answers ---------------------------------------------------------------------

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
    *(RESOURCES, STATUS, f"{PERMISSIONS}?path=/vms/999999999"),
    f"{PERMISSIONS}?path=/nodes/pve1",
    *("/nodes/pve1/lxc/100/config?current=1", "/nodes/pve1/qemu/200/config?current=1"),
    "/nodes/pve1/storage/bak/prunebackups?prune-backups=keep-all%3D1",
    "/nodes/pve1/tasks?source=archive",
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


def make_small_node() -> lab.SimulatedNode:
    node = lab.SimulatedNode(None)
    node.guests = [guest for guest in node.guests if guest.vmid in (100, 101)]
    node.vms = [vm for vm in node.vms if vm.vmid == 200]
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


@pytest.fixture(scope="module")
def lasting_node() -> Iterator[lab.SimulatedNode]:
    with make_small_node() as running:
        yield running


GUEST: Final = {"type": "lxc", "node": "pve1", "vmid": 100, "name": "web", "status": "running"}
NODE: Final = {"type": "node", "node": "pve1", "status": "online", "uptime": 2565, "cpu": 0.5}
STORAGE: Final = {"type": "storage", "node": "pve1", "storage": "bak", "status": "available"}


@given(script=scripts())
@example({RESOURCES: reply_with([NODE, {**GUEST, "status": ["running"]}, STORAGE])})
@example({RESOURCES: reply_with([NODE, {**GUEST, "status": {}}, STORAGE])})
@example({RESOURCES: reply_with([NODE, {**GUEST, "status": "x" * 65}, STORAGE])})
@example({RESOURCES: reply_with([NODE, {**GUEST, "name": "\ud800"}, {**STORAGE, "storage": 5}])})
@example({STATUS: reply_with({"uptime": 2574, "cpuinfo": {"cpus": 2**53 - 1}})})
@example({STATUS: reply_with({"uptime": 2**53, "memory": {"total": 1e308, "used": -1}})})
# A file that somebody edited: Proxmox does not check what it reads.
@example({PATHS[4]: reply_with({"cores": 99999})})
@example({PATHS[5]: reply_with({"cores": 2**40, "sockets": 2**40})})
@example(
    {PATHS[6]: reply_with([{"volid": "bak:/vzdump-lxc-100-2026_11_24-02_00_03.", "ctime": 1e11}])}
)
@example(
    {PATHS[7]: reply_with([{"user": "a", "type": "b\ud800", "endtime": 1, "status": "\ud800"}])}
)
def test_whatever_proxmox_answers_ends_in_a_valid_report_or_an_error(
    lasting_node: lab.SimulatedNode, script: dict[str, lab.Reply]
) -> None:
    lasting_node.clear_script()
    for path, reply in script.items():
        lasting_node.script(path, lab.Forever(reply))
    try:
        report = make_collector(lasting_node, extras=EXTRAS).collect()
    except agent.AgentError:
        return
    document = json.loads(report.to_json(), parse_constant=lab.refuse_constant)
    errors = lab.report_schema().iter_errors(document)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []
    # Nothing that UTF-8 cannot hold.
    json.dumps(document, ensure_ascii=False).encode()
    assert document["guests"] == sorted(document["guests"], key=lambda guest: guest["vmid"])
