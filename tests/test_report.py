"""The wire contract: the shape of the report, and that each value in it is true or null."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
from support import make_collector, make_report

MIB: Final = 1 << 20
GIB: Final = 1 << 30

# As the contract shows it, in its order.
EXAMPLE: Final[dict[str, Any]] = json.loads("""{
    "host_id": "pve1", "agent_version": "0.3.0", "reported_at": "2026-06-08T14:20:09Z",
    "host": {
        "node": "pve1", "pve_version": "9.2.11", "kernel_version": "6.14.11-4-pve",
        "uptime_seconds": 2574, "cpu_model": "AMD EPYC", "cpu_count": 2, "cpu_usage": 0.0167,
        "load_average": [2.54, 1.74, 1.2],
        "memory_total_bytes": 25276510208, "memory_used_bytes": 1378762752,
        "swap_total_bytes": 0, "swap_used_bytes": 0,
        "rootfs_total_bytes": 270553174016, "rootfs_used_bytes": 28216709120
    },
    "guests": [
        {"vmid": 100, "type": "lxc", "name": "web", "status": "running", "controller_version": "",
         "spec": {"cores": 2, "memory_bytes": 1073741824, "disk_bytes": 8589934592}},
        {"vmid": 101, "type": "lxc", "name": "db", "status": "unknown", "controller_version": ""}
    ],
    "cloudflared": {"status": "active"},
    "storage_targets": [], "backups": [], "restore_tests": [], "pbs_snapshots": [], "audit_tail": []
}""")

# As captured.  `cpu` in the status is what that API worker has seen since it was last asked.
STATUS: Final[dict[str, Any]] = {
    **json.loads(lab.NODE_STATUS),
    "cpu": 0.715025906735751,
    # As Proxmox VE 8.0 has it, without `current-kernel`.
    "kversion": "Linux 6.2.16-3-pve #1 SMP PREEMPT_DYNAMIC PVE 6.2.16-3",
}
NODE: Final[dict[str, Any]] = {"type": "node", "node": "pve1", "status": "online", "cpu": 0.0167}
ROOTFS: Final = "local:100/vm-100-disk-0.raw,size=8G"
CONFIG: Final[dict[str, Any]] = {"cores": 2, "memory": 1024, "rootfs": ROOTFS, "digest": "50b696e6"}


def short(value: object) -> str:
    return ascii(value)[:24]


def build_host(status: object = STATUS, node: object = NODE) -> agent.HostMetrics:
    return agent.build_host("pve1", status, node)


def find_problems(report: agent.HostReport) -> list[str]:
    """What the schema objects to in the report as it is sent."""
    text = report.to_json()
    assert text.isascii()
    document = json.loads(text, parse_constant=lab.refuse_constant)
    # No hub need hold half a surrogate pair.
    json.dumps(document, ensure_ascii=False).encode()
    errors = lab.report_schema().iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def test_report_is_the_contracts_example_to_the_byte() -> None:
    spec = agent.build_spec(CONFIG, "lxc", 6)
    guests = (
        agent.Guest(vmid=100, name="web", status="running", spec=spec),
        agent.Guest(vmid=101, name="db", status="unknown"),
    )
    report = make_report(host=build_host(), guests=guests)
    assert report.to_json() == json.dumps(EXAMPLE, separators=(",", ":"))
    assert find_problems(report) == []


def test_unknown_values_are_null_and_collections_are_empty_lists() -> None:
    """Absent they would be missed by a hub with typed fields."""
    spec = agent.build_spec({"cores": "?", "memory": "?", "rootfs": "?"}, "lxc", 6)
    guest = agent.Guest(vmid=100, name="", status="running", spec=spec)
    report = make_report(host=build_host({}, {}), guests=(guest,))
    document = json.loads(report.to_json())
    assert list(document) == list(EXAMPLE)
    assert document["host"] == {**dict.fromkeys(EXAMPLE["host"]), "node": "pve1"}
    assert document["guests"][0]["spec"] == dict.fromkeys(EXAMPLE["guests"][0]["spec"])
    assert [value for value in document.values() if isinstance(value, list)][1:] == [[]] * 5
    assert find_problems(report) == []


NO_INTEGERS: Final[tuple[object, ...]] = (
    *(None, True, [5], {"total": 5}, -1, -0.5, 1.5, math.nan, math.inf, 2**53, 10**400),
    *("", "12x", "2\n", "+2", "-1", "1.5", "1e3", ".5", "0x10", "1_000", "٣", "9" * 5000),
)
NO_LOADS: Final[tuple[object, ...]] = (
    *(["1", "2", "x"], ["1", None, "3"], ["1", "2"], ["1"] * 4, []),
    *("123", {"0": 1, "1": 2, "2": 3}, None, 5),
)
ODD: Final = '"\\\u2028 ☃ 😀\x00\x1b[2J\r\nb'
OLD_KERNEL: Final = "6.2.16-3-pve"
# Where in the node's status, the metric, values that are sent there with what is reported of
# them, and values that say nothing
METRICS: Final[list[tuple[str, str, Sequence[tuple[object, Any]], Sequence[object]]]] = [
    ("uptime", "uptime_seconds", [(0, 0), (17, 17), ("17", 17), (17.0, 17)], NO_INTEGERS),
    ("uptime", "uptime_seconds", [("17.0", 17), (2**53 - 1, 2**53 - 1)], ()),
    *(
        (f"{part}.{name}", f"{part}_{name}_bytes", [(17, 17)], ("12x",))
        for part in ("memory", "swap", "rootfs")
        for name in ("total", "used")
    ),
    # No node has 0 CPUs.
    ("cpuinfo.cpus", "cpu_count", [(17, 17)], (0,)),
    ("cpuinfo.model", "cpu_model", [("", ""), (ODD, ODD), ("a\ud800b\udfff", "a?b?")], ()),
    ("cpuinfo.model", "cpu_model", [("x" * 513, "x" * 512)], (1, None, ["web"], True)),
    ("pveversion", "pve_version", [("pve-manager/9.0.0~10/x", "9.0.0~10")], ("", "9.2.11")),
    ("pveversion", "pve_version", [], ("pve-manager/", None, ["pve-manager/9/x"])),
    ("current-kernel", "kernel_version", [(None, OLD_KERNEL), ("x", OLD_KERNEL)], ()),
    ("current-kernel", "kernel_version", [([1], OLD_KERNEL), ({"release": ""}, OLD_KERNEL)], ()),
    ("loadavg", "load_average", [(["0.00"] * 3, [0, 0, 0]), ([2.54, 1, "3"], [2.54, 1, 3])], ()),
    ("loadavg", "load_average", [], NO_LOADS),
]


@pytest.mark.parametrize(("place", "metric", "known", "unknown"), METRICS)
def test_metric_is_what_the_status_says_or_null(
    place: str, metric: str, known: Sequence[tuple[object, Any]], unknown: Sequence[object]
) -> None:
    section, _, name = place.rpartition(".")
    for sent, value in [*known, *((nothing, None) for nothing in unknown)]:
        status = copy.deepcopy(STATUS)
        (status[section] if section else status)[name] = sent
        host = build_host(status)
        assert host == dataclasses.replace(build_host(), **{metric: value}), short(sent)
        assert type(getattr(host, metric)) is type(value)
        assert find_problems(make_report(host=host)) == []


# 0: pvestatd has not measured yet.
@pytest.mark.parametrize(
    ("sent", "usage"),
    [(0.9592850049, 0.9592850049), (1, 1), ("0.5", 0.5), (0, None), (1.01, None), ("?", None)],
)
def test_cpu_usage_is_a_fraction_from_the_nodes_entry_or_null(
    sent: object, usage: float | None
) -> None:
    """The one in the status is no substitute: it is 0 on a worker's first look."""
    assert build_host(node={"cpu": sent}).cpu_usage == usage
    assert build_host(node={}).cpu_usage is build_host(node=None).cpu_usage is None


USUAL: Final[dict[str, object]] = {"memory": 1024, "rootfs": ROOTFS, "swap": 512}
MOUNT_POINT: Final = "local:106/vm-106-disk-1.raw,mp=/srv,size=4G"
BROKEN: Final[dict[str, object]] = {"cores": "many", "memory": "12x", "rootfs": "???"}
BUSES: Final = dict.fromkeys(("ide0", "sata5", "scsi30", "virtio15"), "local:x,size=1G")
NO_DISKS: Final = dict.fromkeys(
    ("scsihw", "efidisk0", "tpmstate0", "unused0", "net0"), "local:x,size=1G"
)
# A configuration on a node with 6 CPUs, and what it means in cores, MiB and GiB.
SPECS: Final[Mapping[str, tuple[str, dict[str, object], tuple[Any, Any, Any]]]] = {
    "usual": ("lxc", {**USUAL, "cores": 2}, (2, 1024, 8)),
    "text": ("lxc", {**USUAL, "cores": "2", "memory": "2048"}, (2, 2048, 8)),
    "no-cores": ("lxc", USUAL, (6, 1024, 8)),
    "cpulimit-alone": ("lxc", {**USUAL, "cpulimit": "1.5"}, (6, 1024, 8)),
    "both": ("lxc", {**USUAL, "cores": 4, "cpulimit": "2"}, (4, 1024, 8)),
    "mount-points": ("lxc", {**USUAL, "cores": 2, "mp0": MOUNT_POINT}, (2, 1024, 8)),
    "zeros": ("lxc", {**USUAL, "cores": 0, "memory": 0}, (None, None, 8)),
    "too-much": ("lxc", {**USUAL, "cores": 2, "memory": 2**53 - 1}, (2, None, 8)),
    "broken-file": ("lxc", BROKEN, (None, None, None)),
    "empty-file": ("lxc", {"digest": "da39a3ee"}, (6, 512, None)),
    "vm-cores-alone": ("qemu", {"cores": 4}, (4, 512, None)),
    "vm-sockets-alone": ("qemu", {"sockets": "2"}, (2, 512, None)),
    "vm-broken-cores": ("qemu", {"sockets": 2, "cores": "many"}, (None, 512, None)),
    "vm-memory": ("qemu", {"memory": "current=2048"}, (1, 2048, None)),
    "vm-broken-memory": ("qemu", {"memory": "current=many"}, (1, None, None)),
    "vm-every-bus": ("qemu", {**BUSES, "ide2": "none,media=cdrom"}, (1, 512, 4)),
    "vm-not-disks": ("qemu", {**NO_DISKS}, (1, 512, None)),
    "vm-disk-of-0": ("qemu", {**BUSES, "scsi1": "local:x,size=0"}, (1, 512, None)),
    "vm-disk-that-is-none": ("qemu", {"scsi0": 5}, (1, 512, None)),
}


def make_spec(cores: int | None, mib: int | None, gib: int | None) -> agent.GuestSpec:
    return agent.GuestSpec(
        cores=cores, memory_bytes=mib and mib * MIB, disk_bytes=gib and gib * GIB
    )


@pytest.mark.parametrize(("kind", "config", "spec"), SPECS.values(), ids=SPECS)
def test_guest_is_what_its_configuration_says(
    kind: str, config: dict[str, object], spec: tuple[Any, Any, Any]
) -> None:
    assert agent.build_spec(config, kind, 6) == make_spec(*spec)


VOLUMES: Final[list[tuple[object, int | None]]] = [
    *(("local-lvm:vm-100-disk-0,size=4096K", 4 * MIB), ("x:y,size=512M", 512 * MIB)),
    *(("x:y,size=2T", 2048 * GIB), ("x:y,size=1048576", MIB), ("x:y,size=1.5G", 1536 * MIB)),
    ("volume=local-lvm:vm-100-disk-0,acl=1,size=8G,mountoptions=noatime;lazytime", 8 * GIB),
    # No size, as of a subvolume or a bind mount
    *((volume, None) for volume in ("local-zfs:subvol-100-disk-0", "/mnt/data,ro=1", "", None, 8)),
    ("x:y,mysize=8G", None),
    *((f"x:y,size={size}", None) for size in ("", "0T", "G", "8g", "8P", "8GB", "8 G", "-8G")),
    *((f"x:y,size={size}", None) for size in ("1e3", "8.G", "٣G", "8192T", "9" * 5000)),
]


@pytest.mark.parametrize(("volume", "size"), VOLUMES, ids=short)
def test_disk_is_the_configured_size_or_null(volume: object, size: int | None) -> None:
    """The list's maxdisk is no substitute: there it is a placeholder or the host's file system."""
    assert agent.build_spec({**CONFIG, "rootfs": volume}, "lxc", 6).disk_bytes == size


def test_cores_without_a_limit_on_an_unknown_node_are_null() -> None:
    assert agent.build_spec({}, "lxc", None).cores is None


def test_spec_from_the_list_is_without_disk() -> None:
    """An OCI container with environment variables; its maxdisk is the host's file system."""
    listed = {"maxcpu": 2, "maxmem": 512 * MIB, "maxdisk": 270553174016}
    assert agent.build_listed_spec(listed) == make_spec(2, 512, None)
    # A CPU limit
    assert agent.build_listed_spec({**listed, "maxcpu": 1.5}) == make_spec(None, 512, None)
    assert agent.build_listed_spec({"maxcpu": 0, "maxmem": 0}) == make_spec(None, None, None)


@pytest.mark.parametrize("listed", ["prelaunch", None, "", 5, ["running"]], ids=short)
def test_status_of_a_guest_is_the_listed_one_or_unknown(
    plain_node: lab.SimulatedNode, listed: object
) -> None:
    node = {**NODE, "uptime": STATUS["uptime"]}
    guest = {"type": "lxc", "node": "pve1", "vmid": 100, "status": listed}
    plain_node.script("/cluster/resources", lab.json_reply({"data": [node, guest]}))
    plain_node.script("/nodes/pve1/lxc/100", lab.json_reply({"data": {"hostname": "web"}}))
    [found] = make_collector(plain_node).collect().guests
    assert (found.name, found.status) == ("web", listed if listed == "prelaunch" else "unknown")


# As listed while it runs.
RUNNING: Final[dict[str, object]] = json.loads("""{
    "template": 0, "uptime": 2574, "cpu": 0.25, "mem": 7340032, "maxmem": 536870912,
    "lock": "backup", "tags": "web;prod", "hastate": "started"
}""")


def build_details(
    listed: Mapping[str, object] = RUNNING, config: object = CONFIG, **changes: bool
) -> agent.GuestDetails:
    usual = {"is_fresh": True, "is_running": True}
    return agent.build_details(listed, config, **{**usual, **changes})


def test_details_are_fields_of_the_guest_itself() -> None:
    guest = agent.Guest(vmid=100, name="web", status="running", details=build_details())
    usual = agent.Guest(vmid=100, name="web", status="running")
    document, without = (json.loads(make_report(guests=(g,)).to_json()) for g in (guest, usual))
    assert document["guests"][0] == {
        **without["guests"][0],
        "template": False,
        "onboot": False,
        "lock": "backup",
        "tags": ["prod", "web"],
        "ha_state": "started",
        "uptime_seconds": 2574,
        "cpu_usage": 0.25,
        "memory_used_bytes": 7 * MIB,
    }


def test_details_that_are_not_known_are_null() -> None:
    """Never false, 0 or an empty list.  Proxmox itself keeps lock, tags and HA state."""
    known = build_details()
    measured = dict.fromkeys(("uptime_seconds", "cpu_usage", "memory_used_bytes"))
    stopped = dataclasses.replace(known, **measured)
    assert build_details(is_running=False) == stopped
    old = dataclasses.replace(stopped, template=None)
    assert build_details(is_fresh=False, is_running=False) == old
    assert build_details(config=None) == dataclasses.replace(known, onboot=None)
    nothing = build_details({}, None, is_running=False)
    assert set(dataclasses.astuple(dataclasses.replace(nothing, tags=None))) == {None}
    # No tags at all are not listed.
    assert nothing.tags == []


@pytest.mark.parametrize(
    ("sent", "onboot"), [(1, True), ("1", True), (0, False), ("yes", None), (2, None)], ids=short
)
def test_onboot_is_yes_no_or_null(sent: object, onboot: bool | None) -> None:
    assert build_details(config={"onboot": sent}).onboot is onboot
    assert build_details({"template": sent}).template is onboot


@pytest.mark.parametrize(
    ("sent", "tags"),
    [
        ("web;prod;web", ["prod", "web"]),
        ("b,a c;;", ["a", "b", "c"]),
        ("größe;日本;UPPER;-x;a\ud800", ["-x", "UPPER", "a?", "größe", "日本"]),
        *(("", []), (None, []), (5, None), (["web"], None)),
    ],
    ids=short,
)
def test_tags_are_sorted_without_duplicates(sent: object, tags: list[str] | None) -> None:
    assert build_details({"tags": sent}).tags == tags


@pytest.mark.parametrize(
    ("changes", "is_fresh", "status", "sizes"),
    [
        ({}, True, "available", (9, 5)),
        ({"disk": 0}, True, "available", (9, 0)),
        # iSCSI and ESXi have no size.
        ({"maxdisk": 0, "disk": 0}, True, "available", (None, None)),
        ({"status": "unknown"}, True, "unknown", (None, None)),
        ({}, False, "unknown", (None, None)),
    ],
)
def test_storage_has_sizes_if_it_is_available(
    changes: dict[str, object], is_fresh: bool, status: str, sizes: tuple[int | None, int | None]
) -> None:
    entry = {"storage": "bak", "plugintype": "dir", "status": "available", "maxdisk": 9, "disk": 5}
    storage = agent.build_storage({**entry, **changes}, is_fresh=is_fresh)
    assert dataclasses.astuple(storage) == ("bak", "dir", status, *sizes)


def archive(name: str, ctime: object = 1790820003) -> dict[str, object]:
    return {"volid": f"bak:backup/vzdump-{name}", "ctime": ctime, "mark": "protected"}


SCHEDULED: Final = archive("lxc-100-2026_10_01-02_00_03.tar.zst")
OWN_NAMES: Final = [
    # `vmid` and `type` are what somebody wrote into the name.
    archive("qemu-nixos.vma.zst", 1790000000) | {"type": "qemu"},
    archive("lxc-100-before-upgrade.tar.zst", 1795572194) | {"vmid": "100", "type": "lxc"},
    archive("lxc-100-2026_11_01-02_00_03-web.tar"),
    archive("qemu-9-2026_10_01-02_00_03.vma"),
]
# Archives, whose backups are counted, and the problem
ARCHIVES: Final[Mapping[str, tuple[list[dict[str, object]], list[tuple[int, str]], str]]] = {
    "none": ([], [], ""),
    "own-names-beside": ([*OWN_NAMES, SCHEDULED], [(100, "lxc")], ""),
    "own-names-alone": (OWN_NAMES, [], "4 archives not counted, because vzdump did not name them"),
    "was-a-vm": (
        [SCHEDULED, archive("qemu-100-2026_11_01-02_00_03.vma", 1793498403)],
        [(100, "lxc"), (100, "qemu")],
        "",
    ),
    "openvz": ([archive("openvz-100-2026_10_01-02_00_03.tgz")], [(100, "lxc")], ""),
    **{
        f"ctime-{ctime}": (
            [archive("lxc-101-2026_10_01-02_00_03.tar", ctime), SCHEDULED],
            [(100, "lxc")],
            "an archive without a valid date is not counted: bak:backup/vzdump-lxc-101-2026_10_01-",
        )
        for ctime in (-3600, 0, 2**32, "soon", None)
    },
}


@pytest.mark.parametrize(("archives", "guests", "problem"), ARCHIVES.values(), ids=ARCHIVES)
def test_archive_counts_by_its_standard_name(
    archives: list[dict[str, object]], guests: list[tuple[int, str]], problem: str
) -> None:
    backups, found = agent.build_backups("bak", archives)
    assert sorted((backup.vmid, backup.type) for backup in backups) == guests
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
    dates = {backup.created_at for backup in backups if backup.type == "lxc"}
    assert dates <= {"2026-10-01T02:00:03Z"}
    assert find_problems(make_report(backups=tuple(backups))) == []


def test_backup_is_the_newest_one() -> None:
    older = archive("lxc-100-2026_09_01-02_00_03.tar.zst", 1788228003)
    for archives in ([older, SCHEDULED], [SCHEDULED, older]):
        [backup], _ = agent.build_backups("bak", archives)
        expected = (100, "lxc", "bak", SCHEDULED["volid"], "2026-10-01T02:00:03Z", None, None)
        assert dataclasses.astuple(backup) == expected
    [backup], _ = agent.build_backups("bak", [SCHEDULED | {"ctime": 2**32 - 1}])
    assert backup.created_at == "2106-02-07T06:28:15Z"


def task(**changes: object) -> dict[str, object]:
    """A backup job of several guests, as captured."""
    usual: dict[str, object] = {"type": "vzdump", "id": "", "user": "root@pam", "status": "OK"}
    return {**usual, "starttime": 1796083829, "endtime": 1796083830, **changes}


@pytest.mark.parametrize(
    ("changes", "actor", "operation", "result"),
    [
        ({}, "root@pam", "vzdump", "OK"),
        ({"id": "101", "status": "job errors"}, "root@pam", "vzdump 101", "job errors"),
        ({"user": "op@pve", "tokenid": "auto"}, "op@pve!auto", "vzdump", "OK"),
        ({"user": "u" * 513, "type": "t" * 513}, "u" * 511 + "…", "t" * 511 + "…", "OK"),
        *(({"status": sent}, "root@pam", "vzdump", "unknown") for sent in (None, "")),
        ({"status": "ÿ\x1b[2J\nb\ud800"}, "root@pam", "vzdump", "ÿ\\x1b[2J\\x0ab\\xd800"),
        ({"status": "\x1b" * 5000}, "root@pam", "vzdump", ("\\x1b" * 128)[:511] + "…"),
    ],
    ids=short,
)
def test_task_that_has_ended_is_an_entry(
    changes: dict[str, object], actor: str, operation: str, result: str
) -> None:
    entries = tuple(agent.build_audit_tail([task(**changes)]))
    expected = ("2026-12-01T00:10:30Z", actor, operation, result)
    assert [dataclasses.astuple(entry) for entry in entries] == [expected]
    assert find_problems(make_report(audit_tail=entries)) == []


def test_tasks_are_listed_oldest_first_and_what_is_none_is_passed_over() -> None:
    tasks: list[object] = [task(endtime=1796083830 + seconds, id=seconds) for seconds in (9, 2, 5)]
    tasks += [task(endtime=ended) for ended in (None, 0, 10**15, "soon")]
    tasks += [task(type=5), task(user=None), "UPID:pve1", None, [], {}]
    found = [entry.operation for entry in agent.build_audit_tail(tasks[::-1])]
    assert found == ["vzdump 2", "vzdump 5", "vzdump 9"]
