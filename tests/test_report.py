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
from support import make_report

GREATEST: Final = 2**53 - 1
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# As the contract shows it, in its order.
EXAMPLE: Final[dict[str, Any]] = json.loads("""{
    "host_id": "pve1",
    "agent_version": "0.3.0",
    "reported_at": "2026-06-08T14:20:09Z",
    "host": {
        "node": "pve1",
        "pve_version": "9.2.11",
        "kernel_version": "6.14.11-4-pve",
        "uptime_seconds": 2574,
        "cpu_model": "AMD EPYC",
        "cpu_count": 2,
        "cpu_usage": 0.0167,
        "load_average": [2.54, 1.74, 1.2],
        "memory_total_bytes": 25276510208,
        "memory_used_bytes": 1378762752,
        "swap_total_bytes": 0,
        "swap_used_bytes": 0,
        "rootfs_total_bytes": 270553174016,
        "rootfs_used_bytes": 28216709120
    },
    "guests": [
        {
            "vmid": 100,
            "type": "lxc",
            "name": "web",
            "status": "running",
            "controller_version": "",
            "spec": {"cores": 2, "memory_bytes": 1073741824, "disk_bytes": 8589934592}
        },
        {"vmid": 101, "type": "lxc", "name": "db", "status": "unknown", "controller_version": ""}
    ],
    "cloudflared": {"status": "active"},
    "storage_targets": [],
    "backups": [],
    "restore_tests": [],
    "pbs_snapshots": [],
    "audit_tail": []
}""")
COLLECTIONS: Final = ("storage_targets", "backups", "restore_tests", "pbs_snapshots", "audit_tail")

# As captured.  `cpu` in the status is what that API worker has seen since it was last asked.
STATUS: Final[dict[str, Any]] = {**json.loads(lab.NODE_STATUS), "cpu": 0.715025906735751}
NODE: Final[dict[str, Any]] = {"type": "node", "node": "pve1", "status": "online", "cpu": 0.0167}
LISTED: Final[dict[str, Any]] = json.loads("""{
    "id": "lxc/100", "type": "lxc", "node": "pve1", "vmid": 100, "name": "web", "status": "running",
    "maxcpu": 1.5, "maxmem": 7, "maxdisk": 270553174016, "template": 0
}""")
ROOTFS: Final = "local:100/vm-100-disk-0.raw,size=8G"
CONFIG: Final[dict[str, Any]] = {"cores": 2, "memory": 1024, "rootfs": ROOTFS, "digest": "50b696e6"}


def build_host(status: object = STATUS, node: object = NODE) -> agent.HostMetrics:
    host = agent.build_host("pve1", status, node)
    assert find_problems(make_report(host=host)) == []
    return host


def build_guest(
    listed: Mapping[str, object], config: Mapping[str, object] | None = CONFIG, **changes: Any
) -> agent.Guest:
    """A guest on a node with 6 CPUs; `listed` says what its entry has instead of the usual."""
    keywords: dict[str, Any] = {"cpu_count": 6, "stale": False, **changes}
    guest = agent.build_guest({**LISTED, **listed}, config, **keywords)
    assert find_problems(make_report(guests=(guest,))) == []
    return guest


def build_spec(config: Mapping[str, object], **changes: Any) -> agent.GuestSpec:
    spec = build_guest({}, config, **changes).spec
    assert spec is not None
    return spec


def find_problems(report: agent.HostReport) -> list[str]:
    """What the schema objects to in the report as it is sent."""
    text = report.to_json()
    assert text.isascii()
    document = json.loads(text, parse_constant=lab.refuse_constant)
    errors = lab.report_schema().iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


# --- shape ----------------------------------------------------------------------------------------


def test_report_is_the_contracts_example_to_the_byte() -> None:
    guests = (build_guest({}), build_guest({"vmid": 101, "name": "db"}, None))
    report = make_report(host=build_host(), guests=guests)
    assert report.to_json() == json.dumps(EXAMPLE, separators=(",", ":"))


def test_unknown_values_are_null_and_collections_are_empty_lists() -> None:
    """Absent they would be missed by a hub with typed fields."""
    guest = build_guest({"name": None}, {"cores": "?", "memory": "?", "rootfs": "?"})
    document = json.loads(make_report(host=build_host({}, {}), guests=(guest,)).to_json())
    assert list(document) == list(EXAMPLE)
    assert document["host"] == {**dict.fromkeys(EXAMPLE["host"]), "node": "pve1"}
    assert document["guests"][0]["name"] == ""
    assert document["guests"][0]["spec"] == dict.fromkeys(EXAMPLE["guests"][0]["spec"])
    assert [document[name] for name in COLLECTIONS] == [[]] * 5


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
    "memory_total_bytes": ("memory", "total"),
    "memory_used_bytes": ("memory", "used"),
    "swap_total_bytes": ("swap", "total"),
    "swap_used_bytes": ("swap", "used"),
    "rootfs_total_bytes": ("rootfs", "total"),
    "rootfs_used_bytes": ("rootfs", "used"),
}
NO_NUMBERS: Final[tuple[object, ...]] = (
    *(None, True, False, [], [5], {}, {"total": 5}, -1, -0.5, math.nan, math.inf, -math.inf),
    *(GREATEST + 1, float(2**53), 10**400, 1e99),
    *("", " ", "many", "12x", "2 ", " 2", "2\n", "+2", "-1", "1e3", "1.", ".5", "1.2.3", "0x10"),
    *("1_000", "٣", "²", "NaN", "inf", "9" * 5000),
)
NUMBERS: Final[tuple[tuple[object, float], ...]] = (
    *((17, 17), ("17", 17), (17.0, 17), ("17.0", 17), (GREATEST, GREATEST)),
    (str(GREATEST), GREATEST),
)


def short(value: object) -> str:
    return ascii(value)[:24]


@pytest.mark.parametrize(
    ("sent", "metric"),
    [(0, 0), *NUMBERS, *((sent, None) for sent in (1.5, "1.5", *NO_NUMBERS))],
    ids=short,
)
def test_metric_is_an_integer_or_null(sent: object, metric: int | None) -> None:
    for name, path in METRICS.items():
        host = build_host(changed(STATUS, path, sent))
        assert dataclasses.asdict(host) == {**dataclasses.asdict(build_host()), name: metric}
        assert type(getattr(host, name)) is type(metric)


@pytest.mark.parametrize("part", ["cpuinfo", "memory", "swap", "rootfs", "current-kernel"])
@pytest.mark.parametrize("unexpected", [None, "x", 5, [1]], ids=repr)
def test_part_of_another_type_is_unknown_and_the_others_are_not(
    part: str, unexpected: object
) -> None:
    host = dataclasses.asdict(build_host({**STATUS, part: unexpected, "kversion": None}))
    lost = {"cpuinfo": {"cpu_count", "cpu_model"}, "current-kernel": {"kernel_version"}}
    expected = lost.get(part, {f"{part}_total_bytes", f"{part}_used_bytes"})
    known = dataclasses.asdict(build_host(STATUS))
    missing = {name for name, value in host.items() if value is None and known[name] is not None}
    assert missing - {"kernel_version"} == expected - {"kernel_version"}
    assert ("kernel_version" in missing) == (part == "current-kernel")


@pytest.mark.parametrize(
    ("sent", "count"),
    [(1, 1), ("4", 4), (8192, 8192), *((sent, None) for sent in (0, 1.5, *NO_NUMBERS))],
    ids=short,
)
def test_cpu_count_is_at_least_one_or_null(sent: object, count: int | None) -> None:
    assert build_host(changed(STATUS, ("cpuinfo", "cpus"), sent)).cpu_count == count


@pytest.mark.parametrize(
    ("sent", "version"),
    [
        ("pve-manager/9.2.11/14a22df35955d97d", "9.2.11"),
        ("pve-manager/8.4.1/abcdef (running kernel: 6.8.12-10-pve)", "8.4.1"),
        ("pve-manager/9.0.0~10/x", "9.0.0~10"),
        *((sent, None) for sent in ("", "9.2.11", "pve-manager/", None, 9.2, ["pve-manager/9/x"])),
    ],
    ids=short,
)
def test_version_of_proxmox(sent: object, version: str | None) -> None:
    assert build_host({**STATUS, "pveversion": sent}).pve_version == version


KERNELS: Final = {
    "both": ({"release": "6.14.11-4-pve"}, "Linux 6.14.11-3-pve #1 SMP @0", "6.14.11-4-pve"),
    "8.0": (None, "Linux 6.2.16-3-pve #1 SMP PREEMPT_DYNAMIC PVE 6.2.16-3", "6.2.16-3-pve"),
    "empty-release": ({"release": ""}, "Linux 6.2.16-3-pve", "6.2.16-3-pve"),
    "other-sentence": (None, "FreeBSD 14", None),
    "neither": (None, None, None),
}


@pytest.mark.parametrize(("current", "sentence", "kernel"), KERNELS.values(), ids=KERNELS)
def test_kernel_version(current: object, sentence: object, kernel: str | None) -> None:
    status = {**STATUS, "current-kernel": current, "kversion": sentence}
    assert build_host(status).kernel_version == kernel


@pytest.mark.parametrize(
    ("sent", "averages"),
    [
        (["2.54", "1.74", "1.20"], [2.54, 1.74, 1.2]),
        (["0.00", "0.00", "0.00"], [0, 0, 0]),
        ([2.54, 1, "3"], [2.54, 1, 3]),
        *((["1", "2", wrong], None) for wrong in ("x", None, "-3", True, math.nan)),
        *((sent, None) for sent in ([], ["1", "2"], ["1", "2", "3", "4"], ["1", "x", "2", "3"])),
        *((sent, None) for sent in ("1 2 3", "123", {"0": 1, "1": 2, "2": 3}, None, 5)),
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
        ({}, None),
        (None, None),
        *(({"cpu": sent}, None) for sent in NO_NUMBERS),
    ],
    ids=short,
)
def test_cpu_usage_is_a_fraction_from_the_nodes_entry_or_null(
    entry: object, usage: float | None
) -> None:
    """The one in the status is no substitute: it is 0 on a worker's first look."""
    assert build_host(node=entry).cpu_usage == usage


# --- containers -----------------------------------------------------------------------------------

# As captured: what the list says of a container, its configuration, and its cores, MiB and GiB.
USUAL: Final[dict[str, object]] = {"memory": 1024, "rootfs": ROOTFS, "swap": 512}
BROKEN: Final[dict[str, object]] = {"cores": "many", "memory": "12x", "rootfs": "???"}
CONTAINERS: Final[Mapping[str, tuple[dict[str, object], dict[str, object], tuple[Any, ...]]]] = {
    "running": ({"maxcpu": 2, "maxdisk": 270553174016}, {**USUAL, "cores": 2}, (2, 1024, 8)),
    "no-cores": ({"maxcpu": 2, "name": "nocores"}, USUAL, (6, 1024, 8)),
    "cpulimit-alone": ({"maxcpu": 1.5}, {**USUAL, "cpulimit": "1.5"}, (6, 1024, 8)),
    "cpulimit-0": ({"maxcpu": 2}, {**USUAL, "cpulimit": "0"}, (6, 1024, 8)),
    "both": ({"maxcpu": 4}, {**USUAL, "cores": 4, "cpulimit": "2"}, (4, 1024, 8)),
    "template": ({"template": 1}, {**USUAL, "cores": 1, "template": 1}, (1, 1024, 8)),
    "locked": ({"lock": "backup"}, {**USUAL, "cores": 1, "lock": "backup"}, (1, 1024, 8)),
    "snapshot": ({"maxcpu": 2}, {**USUAL, "cores": 2, "parent": "before"}, (2, 1024, 8)),
    "mount-points": (
        {"tags": "prod;web"},
        {**USUAL, "cores": 2, "mp0": "local:106/vm-106-disk-1.raw,mp=/srv,size=4G"},
        (2, 1024, 8),
    ),
    "raw-keys": ({}, {**USUAL, "cores": 2, "lxc": [["lxc.apparmor.profile", "x"]]}, (2, 1024, 8)),
    "broken-file": ({"maxcpu": 0, "maxmem": 12582912}, BROKEN, (None, None, None)),
    "empty-file": ({"name": "CT109"}, {"digest": "da39a3ee"}, (6, 512, None)),
}


@pytest.mark.parametrize("status", ["running", "stopped"])
@pytest.mark.parametrize(("listed", "config", "spec"), CONTAINERS.values(), ids=CONTAINERS)
def test_container_is_what_its_configuration_says(
    listed: dict[str, object], config: dict[str, object], spec: tuple[Any, ...], status: str
) -> None:
    """Stopped, the list has the volume's size or 4 GiB, running, that of the file system."""
    size = {"maxdisk": 4 * GIB} if status == "stopped" else {}
    guest = build_guest({**listed, **size, "status": status}, config)
    cores, mib, gib = spec
    expected = agent.GuestSpec(
        cores=cores, memory_bytes=mib and mib * MIB, disk_bytes=gib and gib * GIB
    )
    name = listed.get("name", "web")
    assert guest == agent.Guest(vmid=100, name=str(name), status=status, spec=expected)


@pytest.mark.parametrize(
    ("sent", "cores"),
    [(1, 1), ("4", 4), (4.0, 4), (8192, 8192), *((sent, None) for sent in (0, 1.5, *NO_NUMBERS))],
    ids=short,
)
def test_cores_are_the_configured_ones_or_null(sent: object, cores: int | None) -> None:
    expected = dataclasses.replace(build_spec(CONFIG), cores=cores)
    assert build_spec({**CONFIG, "cores": sent, "cpulimit": "1.5"}) == expected


@pytest.mark.parametrize(
    ("sent", "mib"),
    [(16, 16), ("2048", 2048), (0, None), (GREATEST, None), *((sent, None) for sent in NO_NUMBERS)],
    ids=short,
)
def test_memory_is_the_configured_one_or_null(sent: object, mib: int | None) -> None:
    expected = dataclasses.replace(build_spec(CONFIG), memory_bytes=mib and mib * MIB)
    assert build_spec({**CONFIG, "memory": sent}) == expected


def test_cores_without_a_limit_on_an_unknown_node_are_null() -> None:
    assert build_spec({}, cpu_count=None).cores is None
    assert build_spec({"cores": 2}, cpu_count=None).cores == 2


VOLUMES: Final[Mapping[str, int | None]] = {
    ROOTFS: 8 * GIB,
    "local-lvm:vm-100-disk-0,size=512M": 512 * MIB,
    "local-lvm:vm-100-disk-0,size=4096K": 4 * MIB,
    "local-lvm:vm-100-disk-0,size=2T": 2048 * GIB,
    "local-lvm:vm-100-disk-0,size=1048576": MIB,
    "local-lvm:vm-100-disk-0,size=1.5G": 1536 * MIB,
    "local-lvm:vm-100-disk-0,acl=1,size=8G,mountoptions=noatime;lazytime": 8 * GIB,
    "volume=local-lvm:vm-100-disk-0,size=8G": 8 * GIB,
    "/dev/sdb1,size=8G": 8 * GIB,
    # No size, as of a subvolume or a bind mount.
    **dict.fromkeys(("local-zfs:subvol-100-disk-0", "/mnt/data", "/mnt/data,ro=1", "")),
    **dict.fromkeys(("???", "none", "local:x,mysize=8G")),
    **dict.fromkeys(f"local:x,size={size}" for size in ("", "0", "0G", "0T", "G", "8g", "8P")),
    **dict.fromkeys(f"local:x,size={size}" for size in ("8GB", "8 G", "-8G", "+8G", "1e3", ".5G")),
    **dict.fromkeys(f"local:x,size={size}" for size in ("8.G", "٣G", "8192T", "9" * 5000 + "T")),
}


@pytest.mark.parametrize(
    ("volume", "size"),
    [*VOLUMES.items(), *((volume, None) for volume in (None, 8, True, [], [ROOTFS], {"size": 8}))],
    ids=short,
)
def test_disk_is_the_configured_size_or_null(volume: object, size: int | None) -> None:
    """The list's maxdisk is no substitute: there it is a placeholder or the host's file system."""
    assert build_spec({**CONFIG, "rootfs": volume}).disk_bytes == size


@pytest.mark.parametrize(
    ("listed", "config", "stale", "name", "status"),
    [
        ({}, None, False, "web", "unknown"),
        ({"status": "unknown", "name": None}, None, False, "", "unknown"),
        ({"status": "unknown", "name": None}, {"hostname": "web"}, False, "web", "unknown"),
        ({"status": "unknown", "name": None}, {}, False, "", "unknown"),
        ({}, {"hostname": "other"}, True, "web", "unknown"),
        ({"status": "prelaunch"}, {}, False, "web", "prelaunch"),
        *(({"status": sent}, {}, False, "web", "unknown") for sent in (None, "", 5, ["running"])),
    ],
    ids=short,
)
def test_status_and_name_of_a_guest(
    listed: dict[str, object], config: dict[str, object] | None, stale: bool, name: str, status: str
) -> None:
    guest = build_guest(listed, config, stale=stale)
    assert (guest.name, guest.status) == (name, status)
    assert (guest.spec is None) == (config is None)
    assert ("spec" in json.loads(make_report(guests=(guest,)).to_json())["guests"][0]) == (
        config is not None
    )


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
    assert build_guest({"name": sent}).name == (text or "")
    document = make_report(host=host, guests=(build_guest({"name": sent}),)).to_json()
    json.dumps(json.loads(document), ensure_ascii=False).encode()
