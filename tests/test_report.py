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
from support import find_problems, make_report

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

# As captured; `cpu` is what that API worker has seen since it was last asked.
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
    *(None, True, [5], {"total": 5}, -1, 1.5, math.nan, math.inf, 2**53, 10**400),
    *("", "12x", "2\n", "+2", "-1", "1.5", "1e3", ".5", "0x10", "1_000", "٣", "9" * 5000),
)
NO_LOADS: Final = (["1", "2", "x"], ["1", None, "3"], ["1", "2"], ["1"] * 4, "123", None, 5)
ODD: Final = '"\\\u2028 ☃ 😀\x00\x1b[2J\r\nb'
OLD_KERNEL: Final = "6.2.16-3-pve"
# A place in the node's status, the metric, values with what is reported of them, and other values
METRICS: Final[list[tuple[str, str, Sequence[tuple[object, Any]], Sequence[object]]]] = [
    ("uptime", "uptime_seconds", [(0, 0), ("17", 17), (17.0, 17), ("17.0", 17)], NO_INTEGERS),
    ("uptime", "uptime_seconds", [(2**53 - 1, 2**53 - 1)], ()),
    *(
        (f"{part}.{name}", f"{part}_{name}_bytes", [(17, 17)], ("12x",))
        for part in ("memory", "swap", "rootfs")
        for name in ("total", "used")
    ),
    ("cpuinfo.cpus", "cpu_count", [(17, 17)], (0,)),
    ("cpuinfo.model", "cpu_model", [("", ""), (ODD, ODD)], ()),
    ("cpuinfo.model", "cpu_model", [("x" * 513, "x" * 512)], (1, None, ["web"])),
    ("pveversion", "pve_version", [("pve-manager/9.0.0~10/x", "9.0.0~10")], ("9.2.11", None)),
    ("current-kernel", "kernel_version", [("x", OLD_KERNEL), ({"release": ""}, OLD_KERNEL)], ()),
    ("loadavg", "load_average", [([2.54, 0, "3.00"], [2.54, 0, 3])], NO_LOADS),
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
@pytest.mark.parametrize(("sent", "usage"), [(1, 1), ("0.5", 0.5), (0, None), (1.01, None)])
def test_cpu_usage_is_the_listed_fraction_or_null(sent: object, usage: float | None) -> None:
    """The one in the status is no substitute: it is 0 on a worker's first look."""
    assert build_host(node={"cpu": sent}).cpu_usage == usage
    assert build_host(node={}).cpu_usage is build_host(node=None).cpu_usage is None


USUAL: Final[dict[str, object]] = {"memory": 1024, "rootfs": ROOTFS, "swap": 512}
BROKEN: Final[dict[str, object]] = {"cores": "many", "memory": "12x", "rootfs": "???"}
BUSES: Final = dict.fromkeys(("ide0", "sata5", "scsi30", "virtio15"), "local:x,size=1G")
NO_DISKS: Final = dict.fromkeys(("scsihw", "efidisk0", "tpmstate0", "unused0"), "local:x,size=1G")
# A configuration on a node with 6 CPUs; cores, memory and disk
SPECS: Final[Mapping[str, tuple[str, dict[str, object], tuple[int | None, ...]]]] = {
    "cpulimit-alone": ("lxc", {**USUAL, "cpulimit": "1.5"}, (6, GIB, 8 * GIB)),
    "mount-points": ("lxc", {**CONFIG, "mp0": "local:x,mp=/srv,size=4G"}, (2, GIB, 8 * GIB)),
    "zeros": ("lxc", {**USUAL, "cores": 0, "memory": 0}, (None, None, 8 * GIB)),
    "too-much": ("lxc", {**CONFIG, "memory": 2**53 - 1}, (2, None, 8 * GIB)),
    "broken-file": ("lxc", BROKEN, (None, None, None)),
    "empty-file": ("lxc", {"digest": "da39a3ee"}, (6, 512 * MIB, None)),
    "vm-cores-alone": ("qemu", {"cores": 4}, (4, 512 * MIB, None)),
    "vm-sockets-alone": ("qemu", {"sockets": "2"}, (2, 512 * MIB, None)),
    "vm-broken-cores": ("qemu", {"sockets": 2, "cores": "many"}, (None, 512 * MIB, None)),
    "vm-broken-sockets": ("qemu", {"sockets": "many", "cores": 2}, (None, 512 * MIB, None)),
    "vm-too-many-cores": ("qemu", {"sockets": 2**40, "cores": 2**40}, (None, 512 * MIB, None)),
    "vm-every-bus": ("qemu", {**BUSES, "ide2": "none,media=cdrom"}, (1, 512 * MIB, 4 * GIB)),
    "vm-not-disks": ("qemu", {**NO_DISKS}, (1, 512 * MIB, None)),
    "vm-disk-of-0": ("qemu", {**BUSES, "scsi1": "local:x,size=0"}, (1, 512 * MIB, None)),
}


@pytest.mark.parametrize(("kind", "config", "spec"), SPECS.values(), ids=SPECS)
def test_guest_is_what_its_configuration_says(kind: str, config: Any, spec: Any) -> None:
    assert dataclasses.astuple(agent.build_spec(config, kind, 6)) == spec


def test_cores_without_a_limit_on_an_unknown_node_are_null() -> None:
    assert agent.build_spec({}, "lxc", None).cores is None


VOLUMES: Final[list[tuple[object, int | None]]] = [
    *(("local-lvm:vm-100-disk-0,size=4096K", 4 * MIB), ("x:y,size=512M", 512 * MIB)),
    *(("x:y,size=2T", 2048 * GIB), ("x:y,size=1048576", MIB), ("x:y,size=1.5G", 1536 * MIB)),
    ("volume=local-lvm:vm-100-disk-0,acl=1,size=8G,mountoptions=noatime;lazytime", 8 * GIB),
    # No size, as of a subvolume
    *((volume, None) for volume in ("local-zfs:subvol-100-disk-0", None, "x:y,mysize=8G")),
    *((f"x:y,size={size}", None) for size in ("", "0T", "G", "8g", "8P", "8GB", "8 G", "-8G")),
    *((f"x:y,size={size}", None) for size in ("1e3", "8.G", "٣G", "8192T", "9" * 5000)),
]


@pytest.mark.parametrize(("volume", "size"), VOLUMES, ids=short)
def test_disk_is_the_configured_size_or_null(volume: object, size: int | None) -> None:
    """The list's maxdisk is no substitute: there it is a placeholder or the host's file system."""
    assert agent.build_spec({**CONFIG, "rootfs": volume}, "lxc", 6).disk_bytes == size


def test_zeros_in_the_list_are_no_spec() -> None:
    spec = agent.build_listed_spec({"maxcpu": 0, "maxmem": 0, "maxdisk": 270553174016})
    assert dataclasses.astuple(spec) == (None, None, None)


# As listed while it runs.
RUNNING: Final[dict[str, object]] = json.loads("""{
    "template": 0, "uptime": 2574, "cpu": 0.25, "mem": 7340032, "maxmem": 536870912,
    "lock": "backup", "tags": "web;prod", "hastate": "started"
}""")


def build_details(listed: object = RUNNING, config: object = CONFIG) -> agent.GuestDetails:
    return agent.build_details(listed, config, is_fresh=True, status="running")


def test_details_are_fields_of_the_guest_itself() -> None:
    """Which of them are known when is in test_extras.py."""
    usual = agent.Guest(vmid=100, name="web", status="running")
    guests = (usual, dataclasses.replace(usual, details=build_details()))
    without, guest = json.loads(make_report(guests=guests).to_json())["guests"]
    details = json.loads("""{
        "template": false, "onboot": false, "lock": "backup", "tags": ["prod", "web"],
        "ha_state": "started", "uptime_seconds": 2574, "cpu_usage": 0.25,
        "memory_used_bytes": 7340032
    }""")
    assert guest == {**without, **details}


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
        ("größe;日本;UPPER;-x", ["-x", "UPPER", "größe", "日本"]),
        *(("", []), (None, []), (5, None), (["web"], None)),
    ],
    ids=short,
)
def test_tags_are_sorted_without_duplicates(sent: object, tags: list[str] | None) -> None:
    assert build_details({"tags": sent}).tags == tags


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"disk": 0}, ("available", 9, 0)),
        # iSCSI and ESXi have no size.
        ({"maxdisk": 0, "disk": 0}, ("available", None, None)),
        ({"status": "unknown"}, ("unknown", None, None)),
    ],
)
def test_storage_has_sizes_if_it_is_available(changes: Any, expected: Any) -> None:
    entry = {"storage": "bak", "plugintype": "dir", "status": "available", "maxdisk": 9, "disk": 5}
    storage = agent.build_storage({**entry, **changes}, is_fresh=True)
    assert dataclasses.astuple(storage) == ("bak", "dir", *expected)


def archive(name: str, ctime: object = 1790820003) -> dict[str, object]:
    return {"volid": f"bak:backup/vzdump-{name}", "ctime": ctime, "mark": "protected"}


OWN_NAMES: Final = [
    {},
    # `vmid` and `type` are what somebody wrote into the name.
    archive("qemu-nixos.vma.zst") | {"type": "qemu"},
    archive("lxc-100-before-upgrade.tar.zst") | {"vmid": "100", "type": "lxc"},
    archive("lxc-100-2026_11_01-02_00_03-web.tar"),
    archive("qemu-9-2026_10_01-02_00_03.vma"),
]


def test_archive_counts_by_its_standard_name() -> None:
    """And only so; what else a storage may hold is in test_extras.py."""
    problem = "5 archives not counted, because vzdump did not name them"
    assert agent.build_backups("bak", OWN_NAMES) == ([], problem)


@pytest.mark.parametrize(
    ("ctime", "created_at"),
    [
        (2**32 - 1, "2106-02-07T06:28:15Z"),
        *((ctime, "") for ctime in (-3600, 0, 2**32, "soon", None)),
    ],
)
def test_archive_without_a_valid_date_is_told(ctime: object, created_at: str) -> None:
    dated = archive("lxc-100-2026_10_01-02_00_03.tar.zst")
    other = archive("lxc-101-2026_10_01-02_00_03.tar", ctime)
    backups, problem = agent.build_backups("bak", [other, dated])
    found = {backup.vmid: backup.created_at for backup in backups}
    assert found.pop(100) == "2026-10-01T02:00:03Z"
    assert found.get(101, "") == created_at
    text = f"an archive without a valid date is not counted: {other['volid']}"
    assert problem == ("" if created_at else text)
    assert find_problems(make_report(backups=tuple(backups))) == []


def task(**changes: object) -> dict[str, object]:
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
    """Of those that ended in the same second, Proxmox lists the newest first."""
    tasks: list[object] = [task(endtime=1796083830 + vmid // 100, id=vmid) for vmid in (209, 305)]
    tasks += [task(endtime=1796083831, id=102), task(endtime=1796083831, id=101)]
    tasks += [task(endtime=ended) for ended in (None, 0, 10**15, "soon")]
    tasks += [task(type=5), task(user=None), "UPID:pve1", None, [], {}]
    found = [entry.operation for entry in agent.build_audit_tail(tasks)]
    assert found == ["vzdump 101", "vzdump 102", "vzdump 209", "vzdump 305"]
