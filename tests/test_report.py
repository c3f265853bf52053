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
COLLECTIONS: Final = ("storage_targets", "backups", "restore_tests", "pbs_snapshots", "audit_tail")

# As captured.  `cpu` in the status is what that API worker has seen since it was last asked.
STATUS: Final[dict[str, Any]] = {**json.loads(lab.NODE_STATUS), "cpu": 0.715025906735751}
NODE: Final[dict[str, Any]] = {"type": "node", "node": "pve1", "status": "online", "cpu": 0.0167}
ROOTFS: Final = "local:100/vm-100-disk-0.raw,size=8G"
CONFIG: Final[dict[str, Any]] = {"cores": 2, "memory": 1024, "rootfs": ROOTFS, "digest": "50b696e6"}


def build_host(status: object = STATUS, node: object = NODE) -> agent.HostMetrics:
    return agent.build_host("pve1", status, node)


def build_spec(config: Mapping[str, object], cpu_count: int | None = 6) -> agent.GuestSpec:
    return agent.build_spec(config, "lxc", cpu_count)


def find_problems(report: agent.HostReport) -> list[str]:
    """What the schema objects to in the report as it is sent."""
    text = report.to_json()
    assert text.isascii()
    document = json.loads(text, parse_constant=lab.refuse_constant)
    errors = lab.report_schema().iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


# --- shape ----------------------------------------------------------------------------------------


def test_report_is_the_contracts_example_to_the_byte() -> None:
    spec = build_spec(CONFIG)
    guests = (
        agent.Guest(vmid=100, name="web", status="running", spec=spec),
        agent.Guest(vmid=101, name="db", status="unknown"),
    )
    report = make_report(host=build_host(), guests=guests)
    assert report.to_json() == json.dumps(EXAMPLE, separators=(",", ":"))
    assert find_problems(report) == []


def test_unknown_values_are_null_and_collections_are_empty_lists() -> None:
    """Absent they would be missed by a hub with typed fields."""
    spec = build_spec({"cores": "?", "memory": "?", "rootfs": "?"})
    guest = agent.Guest(vmid=100, name="", status="running", spec=spec)
    report = make_report(host=build_host({}, {}), guests=(guest,))
    document = json.loads(report.to_json())
    assert list(document) == list(EXAMPLE)
    assert document["host"] == {**dict.fromkeys(document["host"]), "node": "pve1"}
    assert document["guests"][0]["spec"] == dict.fromkeys(EXAMPLE["guests"][0]["spec"])
    assert [document[name] for name in COLLECTIONS] == [[]] * 5
    assert find_problems(report) == []


def test_report_cannot_be_changed() -> None:
    report = make_report()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.host_id = "x"  # type: ignore[misc]


# --- the node -------------------------------------------------------------------------------------


def changed(document: Mapping[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    """A copy in which `path` leads to this value."""
    result = copy.deepcopy(dict(document))
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


METRICS: Final[Mapping[str, tuple[str, ...]]] = {
    "uptime_seconds": ("uptime",),
    "cpu_count": ("cpuinfo", "cpus"),
    **{
        f"{part}_{name}_bytes": (part, name)
        for part in ("memory", "swap", "rootfs")
        for name in ("total", "used")
    },
}
NO_NUMBERS: Final[tuple[object, ...]] = (
    *(None, True, [5], {"total": 5}, -1, -0.5, math.nan, math.inf, 2**53, 10**400),
    *("", "12x", "2\n", "+2", "-1", "1e3", ".5", "0x10", "1_000", "٣", "NaN", "9" * 5000),
)


def short(value: object) -> str:
    return ascii(value)[:24]


@pytest.mark.parametrize(
    ("sent", "metric"),
    [
        *((0, 0), (17, 17), ("17", 17), (17.0, 17), ("17.0", 17), (2**53 - 1, 2**53 - 1)),
        *((sent, None) for sent in (1.5, "1.5", *NO_NUMBERS)),
    ],
    ids=short,
)
def test_metric_is_an_integer_or_null(sent: object, metric: int | None) -> None:
    found = build_host({**STATUS, "uptime": sent}).uptime_seconds
    assert (found, type(found)) == (metric, type(metric))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("sent", "metric"), [(17, 17), ("12x", None), (None, None)])
def test_each_metric_has_a_place_of_its_own(name: str, sent: object, metric: int | None) -> None:
    host = dataclasses.asdict(build_host(changed(STATUS, METRICS[name], sent)))
    assert host == {**dataclasses.asdict(build_host()), name: metric}


@pytest.mark.parametrize("unexpected", [None, "x", 5, [1]], ids=repr)
def test_part_of_another_type_is_unknown_and_the_others_are_not(unexpected: object) -> None:
    known = dataclasses.asdict(build_host())
    lost = {"swap_total_bytes": None, "swap_used_bytes": None}
    assert dataclasses.asdict(build_host({**STATUS, "swap": unexpected})) == {**known, **lost}
    # No node has 0 CPUs.
    lost = {"cpu_count": None, "cpu_model": None}
    for cpuinfo in (unexpected, {"cpus": 0}):
        assert dataclasses.asdict(build_host({**STATUS, "cpuinfo": cpuinfo})) == {**known, **lost}


@pytest.mark.parametrize(
    ("sent", "version"),
    [
        ("pve-manager/9.2.11/14a22df35955d97d", "9.2.11"),
        ("pve-manager/9.0.0~10/x", "9.0.0~10"),
        *((sent, None) for sent in ("", "9.2.11", "pve-manager/", None, ["pve-manager/9/x"])),
    ],
    ids=short,
)
def test_version_of_proxmox(sent: object, version: str | None) -> None:
    assert build_host({**STATUS, "pveversion": sent}).pve_version == version


@pytest.mark.parametrize(
    ("current", "sentence", "kernel"),
    [
        ({"release": "6.14.11-4-pve"}, "Linux 6.14.11-3-pve #1 SMP @0", "6.14.11-4-pve"),
        # As Proxmox VE 8.0 says it.
        (None, "Linux 6.2.16-3-pve #1 SMP PREEMPT_DYNAMIC PVE 6.2.16-3", "6.2.16-3-pve"),
        ({"release": ""}, "Linux 6.2.16-3-pve", "6.2.16-3-pve"),
        (None, "FreeBSD 14", None),
        (None, None, None),
    ],
    ids=short,
)
def test_kernel_version(current: object, sentence: object, kernel: str | None) -> None:
    status = {**STATUS, "current-kernel": current, "kversion": sentence}
    assert build_host(status).kernel_version == kernel


NO_LOADS: Final[tuple[object, ...]] = (
    *(["1", "2", "x"], ["1", None, "3"], ["1", "2"], ["1"] * 4, []),
    *("123", {"0": 1, "1": 2, "2": 3}, None, 5),
)


@pytest.mark.parametrize(
    ("sent", "averages"),
    [
        (["2.54", "1.74", "1.20"], [2.54, 1.74, 1.2]),
        (["0.00", "0.00", "0.00"], [0, 0, 0]),
        ([2.54, 1, "3"], [2.54, 1, 3]),
        *((sent, None) for sent in NO_LOADS),
    ],
    ids=short,
)
def test_load_average_is_three_numbers_or_null(
    sent: object, averages: Sequence[float] | None
) -> None:
    assert build_host({**STATUS, "loadavg": sent}).load_average == averages


@pytest.mark.parametrize(
    ("entry", "usage"),
    [
        ({"cpu": 0.9592850049}, 0.9592850049),
        ({"cpu": 1}, 1),
        ({"cpu": "0.5"}, 0.5),
        # pvestatd has not measured yet.
        ({"cpu": 0}, None),
        ({"cpu": 0.0}, None),
        ({"cpu": 1.01}, None),
        ({"cpu": "?"}, None),
        ({}, None),
        (None, None),
    ],
    ids=short,
)
def test_cpu_usage_is_a_fraction_from_the_nodes_entry_or_null(
    entry: object, usage: float | None
) -> None:
    """The one in the status is no substitute: it is 0 on a worker's first look."""
    assert build_host(node=entry).cpu_usage == usage


# --- specs ----------------------------------------------------------------------------------------

# Configurations as captured, and what they mean in cores, MiB and GiB on a node with 6 CPUs.
USUAL: Final[dict[str, object]] = {"memory": 1024, "rootfs": ROOTFS, "swap": 512}
MOUNT_POINT: Final = "local:106/vm-106-disk-1.raw,mp=/srv,size=4G"
BROKEN: Final[dict[str, object]] = {"cores": "many", "memory": "12x", "rootfs": "???"}
CONTAINERS: Final[Mapping[str, tuple[dict[str, object], tuple[Any, ...]]]] = {
    "usual": ({**USUAL, "cores": 2}, (2, 1024, 8)),
    "text": ({**USUAL, "cores": "2", "memory": "2048"}, (2, 2048, 8)),
    "no-cores": (USUAL, (6, 1024, 8)),
    "cpulimit-alone": ({**USUAL, "cpulimit": "1.5"}, (6, 1024, 8)),
    "both": ({**USUAL, "cores": 4, "cpulimit": "2"}, (4, 1024, 8)),
    "mount-points": ({**USUAL, "cores": 2, "mp0": MOUNT_POINT}, (2, 1024, 8)),
    "raw-keys": ({**USUAL, "cores": 2, "lxc": [["lxc.apparmor.profile", "x"]]}, (2, 1024, 8)),
    "zeros": ({**USUAL, "cores": 0, "memory": 0}, (None, None, 8)),
    "too-much": ({**USUAL, "cores": 2, "memory": 2**53 - 1}, (2, None, 8)),
    "broken-file": (BROKEN, (None, None, None)),
    "empty-file": ({"digest": "da39a3ee"}, (6, 512, None)),
}


def make_spec(cores: int | None, mib: int | None, gib: int | None) -> agent.GuestSpec:
    return agent.GuestSpec(
        cores=cores, memory_bytes=mib and mib * MIB, disk_bytes=gib and gib * GIB
    )


@pytest.mark.parametrize(("config", "spec"), CONTAINERS.values(), ids=CONTAINERS)
def test_container_is_what_its_configuration_says(
    config: dict[str, object], spec: tuple[Any, ...]
) -> None:
    assert build_spec(config) == make_spec(*spec)


def test_cores_without_a_limit_on_an_unknown_node_are_null() -> None:
    assert build_spec({}, cpu_count=None).cores is None
    assert build_spec({"cores": 2}, cpu_count=None).cores == 2


VOLUMES: Final[Mapping[str, int | None]] = {
    ROOTFS: 8 * GIB,
    "local-lvm:vm-100-disk-0,size=4096K": 4 * MIB,
    "local-lvm:vm-100-disk-0,size=512M": 512 * MIB,
    "local-lvm:vm-100-disk-0,size=2T": 2048 * GIB,
    "local-lvm:vm-100-disk-0,size=1048576": MIB,
    "local-lvm:vm-100-disk-0,size=1.5G": 1536 * MIB,
    "volume=local-lvm:vm-100-disk-0,acl=1,size=8G,mountoptions=noatime;lazytime": 8 * GIB,
    # No size, as of a subvolume or a bind mount.
    **dict.fromkeys(("local-zfs:subvol-100-disk-0", "/mnt/data,ro=1", "", "local:x,mysize=8G")),
    **dict.fromkeys(f"local:x,size={size}" for size in ("", "0T", "G", "8g", "8P", "8GB", "8 G")),
    **dict.fromkeys(f"local:x,size={size}" for size in ("-8G", "1e3", "8.G", "٣G", "8192T")),
    "local:x,size=" + "9" * 5000 + "T": None,
}


@pytest.mark.parametrize(
    ("volume", "size"), [*VOLUMES.items(), (None, None), (8, None), ([ROOTFS], None)], ids=short
)
def test_disk_is_the_configured_size_or_null(volume: object, size: int | None) -> None:
    """The list's maxdisk is no substitute: there it is a placeholder or the host's file system."""
    assert build_spec({**CONFIG, "rootfs": volume}).disk_bytes == size


@pytest.mark.parametrize(
    ("listed", "spec"),
    [
        # An OCI container with environment variables; its maxdisk is the host's file system.
        ({"maxcpu": 2, "maxmem": 512 * MIB, "maxdisk": 270553174016}, (2, 512, None)),
        # A CPU limit.
        ({"maxcpu": 1.5, "maxmem": 512 * MIB}, (None, 512, None)),
        ({"maxcpu": 0, "maxmem": 0}, (None, None, None)),
        ({}, (None, None, None)),
    ],
    ids=short,
)
def test_spec_from_the_list_is_without_disk(
    listed: dict[str, object], spec: tuple[Any, ...]
) -> None:
    assert agent.build_listed_spec(listed) == make_spec(*spec)


# --- status and name ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "config", "age", "name", "status"),
    [
        ({}, None, 5, "web", "unknown"),
        ({"status": "unknown", "name": None}, None, 5, "", "unknown"),
        ({"status": "unknown", "name": None}, {"hostname": "web"}, 5, "web", "unknown"),
        ({"status": "unknown", "name": None}, {}, 5, "", "unknown"),
        ({}, {"hostname": "other"}, 121, "web", "unknown"),
        ({"status": "prelaunch"}, {}, 5, "web", "prelaunch"),
        *(({"status": sent}, {}, 5, "web", "unknown") for sent in (None, "", 5, ["running"])),
    ],
    ids=short,
)
def test_status_and_name_of_a_guest(
    plain_node: lab.SimulatedNode,
    listed: dict[str, object],
    config: dict[str, object] | None,
    age: int,
    name: str,
    status: str,
) -> None:
    """The list has both; a new guest's name stands only in its configuration."""
    node_entry = {**NODE, "uptime": STATUS["uptime"] - age}
    guest = {"type": "lxc", "node": "pve1", "vmid": 100, "name": "web", "status": "running"}
    plain_node.script("/cluster/resources", lab.json_reply({"data": [node_entry, guest | listed]}))
    answer = lab.Reply(500, "gone") if config is None else lab.json_reply({"data": config})
    plain_node.script("/nodes/pve1/lxc/100", answer)
    [found] = json.loads(make_collector(plain_node).collect().to_json())["guests"]
    assert (found["name"], found["status"]) == (name, status)
    assert ("spec" in found) == (config is not None)


# --- details --------------------------------------------------------------------------------------

# As listed while it runs.
RUNNING: Final[dict[str, object]] = json.loads("""{
    "template": 0, "uptime": 2574, "cpu": 0.25, "mem": 7340032, "maxmem": 536870912,
    "lock": "backup", "tags": "web;prod", "hastate": "started"
}""")


def build_details(
    listed: Mapping[str, object] = RUNNING,
    config: object = CONFIG,
    *,
    is_fresh: bool = True,
    is_running: bool = True,
) -> agent.GuestDetails:
    return agent.build_details(listed, config, is_fresh=is_fresh, is_running=is_running)


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
        ("größe;日本;UPPER;-x;;", ["-x", "UPPER", "größe", "日本"]),
        ("a\ud800", ["a?"]),
        ("", []),
        (None, []),
        (5, None),
        (["web"], None),
    ],
    ids=short,
)
def test_tags_are_sorted_without_duplicates(sent: object, tags: list[str] | None) -> None:
    assert build_details({"tags": sent}).tags == tags


# --- storages and backups -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "is_fresh", "status", "total", "used"),
    [
        ({"maxdisk": 4294967296, "disk": 31494144}, True, "available", 4294967296, 31494144),
        ({"maxdisk": 4294967296, "disk": 0}, True, "available", 4294967296, 0),
        ({"maxdisk": 4294967296, "disk": 31494144}, False, "unknown", None, None),
        ({"maxdisk": 5, "disk": 5, "status": "unknown"}, True, "unknown", None, None),
        # iSCSI and ESXi have no size.
        *(
            ({"plugintype": kind, "maxdisk": 0, "disk": 0}, True, "available", None, None)
            for kind in ("iscsi", "iscsidirect", "esxi")
        ),
    ],
    ids=short,
)
def test_storage_has_sizes_if_it_is_available(
    listed: dict[str, object], is_fresh: bool, status: str, total: int | None, used: int | None
) -> None:
    entry = {"storage": "bak", "plugintype": "dir", "status": "available", **listed}
    kind = entry["plugintype"]
    expected = ("bak", kind, status, total, used)
    assert dataclasses.astuple(agent.build_storage(entry, is_fresh=is_fresh)) == expected


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
ARCHIVES: Final[Mapping[str, tuple[list[dict[str, object]], list[tuple[int, str]], str]]] = {
    "none": ([], [], ""),
    "own-names-beside": ([*OWN_NAMES, SCHEDULED], [(100, "lxc")], ""),
    "own-names-alone": (OWN_NAMES, [], "4 archives not counted, because vzdump did"),
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
        for ctime in (-3600, 0, 253402214400, "soon", None)
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
        volid = "bak:backup/vzdump-lxc-100-2026_10_01-02_00_03.tar.zst"
        expected = (100, "lxc", "bak", volid, "2026-10-01T02:00:03Z", None, None)
        assert dataclasses.astuple(backup) == expected


# --- tasks ----------------------------------------------------------------------------------------


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
        ({"status": "WARNINGS: 1"}, "root@pam", "vzdump", "WARNINGS: 1"),
        ({"status": None}, "root@pam", "vzdump", "unknown"),
        ({"status": ""}, "root@pam", "vzdump", "unknown"),
        ({"status": "a\x1b[2J\nb\ud800"}, "root@pam", "vzdump", "a\\x1b[2J\\x0ab\\xd800"),
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
    running = [task(endtime=0), {"type": "vzdump", "user": "root@pam"}]
    tasks[1:1] = [*running, task(type=5), task(user=None), task(endtime="soon"), "UPID:pve1", None]
    found = [entry.operation for entry in agent.build_audit_tail(tasks)]
    assert found == ["vzdump 2", "vzdump 5", "vzdump 9"]


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        ("", ""),
        ("Grüße ☃ 😀", "Grüße ☃ 😀"),
        ('"\\\u2028a\x00\x1b[2J\r\nb', '"\\\u2028a\x00\x1b[2J\r\nb'),
        ("a\ud800b\udfff", "a?b?"),
        ("x" * 513, "x" * 512),
        *((sent, None) for sent in (1, None, ["web"], True)),
    ],
    ids=short,
)
def test_text_is_what_every_json_reader_can_hold(sent: object, text: str | None) -> None:
    host = build_host(changed(STATUS, ("cpuinfo", "model"), sent))
    assert host.cpu_model == text
    document = json.loads(make_report(host=host).to_json())
    json.dumps(document, ensure_ascii=False).encode()
