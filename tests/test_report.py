"""The wire contract: what the report looks like, and that every figure in it is true or null."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

import felhom_agent
import lab
from felhom_agent import (
    AgentError,
    AuditEntry,
    Backup,
    Cloudflared,
    Collector,
    ControlEnvelope,
    Guest,
    HostMetrics,
    HostReport,
    HubClient,
    HubConfig,
    PBSSnapshot,
    ProxmoxClient,
    ProxmoxConfig,
    RestoreTest,
    StorageTarget,
    TransportError,
    build_guest,
    build_host,
    diagnose_token,
    parse_integer,
    parse_json,
    parse_number,
    parse_retry_after,
    parse_text,
    parse_volume_size,
    parse_whole,
)

MOST: Final = 2**53 - 1
GIB: Final = 1 << 30

# What the contract shows, in its order.
EXAMPLE: Final[dict[str, Any]] = {
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
        "rootfs_used_bytes": 28216709120,
    },
    "guests": [
        {
            "vmid": 100,
            "type": "lxc",
            "name": "web",
            "status": "running",
            "controller_version": "",
            "spec": {"cores": 2, "memory_bytes": 1073741824, "disk_bytes": 8589934592},
        },
        {"vmid": 101, "type": "lxc", "name": "db", "status": "unknown", "controller_version": ""},
    ],
    "cloudflared": {"status": "active"},
    "storage_targets": [],
    "backups": [],
    "restore_tests": [],
    "pbs_snapshots": [],
    "audit_tail": [],
}
COLLECTIONS: Final = ("storage_targets", "backups", "restore_tests", "pbs_snapshots", "audit_tail")

STATUS: Final[dict[str, Any]] = json.loads(lab.NODE_STATUS)
NODES: Final[list[dict[str, Any]]] = [
    {"id": "node/pve0", "node": "pve0", "status": "offline", "type": "node"},
    {"id": "node/PVE1", "node": "PVE1", "status": "online", "type": "node", "cpu": 0.75, "maxcpu": 64},
    {"id": "node/pve1", "node": "pve1", "status": "online", "type": "node", "cpu": 0.0167, "maxcpu": 2},
]
LISTED: Final[dict[str, Any]] = {"vmid": 100, "name": "web", "status": "running", "cpus": "1.5", "maxmem": 7, "maxdisk": 4 * GIB}
CONFIG: Final[dict[str, Any]] = {"cores": 2, "memory": 1024, "rootfs": "local:100/vm-100-disk-0.raw,size=8G", "digest": "50b696e6"}


def build_report(host: HostMetrics, *guests: Guest) -> HostReport:
    return HostReport(
        host_id="pve1",
        agent_version="0.3.0",
        reported_at="2026-06-08T14:20:09Z",
        host=host,
        guests=guests,
        cloudflared=Cloudflared(status="active"),
    )


def problems(report: HostReport) -> list[str]:
    """What the schema has against the report as it is sent."""
    text = report.to_json()
    assert text.isascii()
    return [f"{error.json_path}: {error.message}" for error in lab.report_schema().iter_errors(json.loads(text))]


# ---- shape ------------------------------------------------------------------------------------------------------------------


def test_report_is_the_contracts_example_to_the_byte() -> None:
    listed = {"vmid": 101, "name": "db", "status": "running", "maxmem": GIB, "maxdisk": GIB}
    report = build_report(build_host("pve1", STATUS, NODES), build_guest(100, LISTED, CONFIG, 2), build_guest(101, listed, None, 2))
    assert report.to_json() == json.dumps(EXAMPLE, separators=(",", ":"))
    assert problems(report) == []


@pytest.mark.parametrize("name", COLLECTIONS)
def test_collection_without_entries_is_an_empty_list(name: str) -> None:
    document = json.loads(build_report(build_host("pve1", {}, [])).to_json())
    assert document[name] == []
    assert document["guests"] == []


def test_what_is_not_known_is_null_and_never_absent() -> None:
    guest = build_guest(100, {"status": "stopped"}, {"cores": "?", "memory": "?", "rootfs": "?"}, 2)
    report = build_report(build_host("pve1", {}, []), guest)
    document = json.loads(report.to_json())
    assert document["host"] == {**dict.fromkeys(EXAMPLE["host"]), "node": "pve1"}
    assert document["guests"][0]["spec"] == {"cores": None, "memory_bytes": None, "disk_bytes": None}
    assert problems(report) == []


TIME: Final = "2026-06-08T14:20:09Z"
ELEMENTS: Final[dict[str, Callable[[int | None, bool | None], Any]]] = {
    "storage_targets": lambda size, _: StorageTarget(storage="local", type="dir", status="available", total_bytes=size, used_bytes=size),
    "backups": lambda size, ok: Backup(vmid=100, storage="local", volid="local:b", created_at=TIME, size_bytes=size, verified=ok),
    "restore_tests": lambda _size, _ok: RestoreTest(vmid=100, volid="local:b", tested_at=TIME, result="ok"),
    "pbs_snapshots": lambda size, ok: PBSSnapshot(
        datastore="d", backup_type="ct", backup_id="100", backup_time=TIME, size_bytes=size, verified=ok
    ),
    "audit_tail": lambda _size, _ok: AuditEntry(at=TIME, actor="root@pam", operation="restore", result="ok"),
}


@pytest.mark.parametrize(("size", "ok"), [(0, False), (MOST, True), (None, None)], ids=["least", "most", "unknown"])
@pytest.mark.parametrize("name", COLLECTIONS)
def test_elements_of_the_collections_are_as_the_schema_types_them(name: str, size: int | None, ok: bool | None) -> None:
    element = ELEMENTS[name](size, ok)
    changes: dict[str, Any] = {name: (element,)}
    report = dataclasses.replace(build_report(build_host("pve1", STATUS, NODES)), **changes)
    assert problems(report) == []
    (sent,) = json.loads(report.to_json())[name]
    assert sent == dataclasses.asdict(element)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_report_never_holds_what_is_no_json(number: float) -> None:
    report = build_report(dataclasses.replace(build_host("pve1", STATUS, NODES), cpu_usage=number))
    with pytest.raises(ValueError, match="JSON"):
        report.to_json()


def test_report_cannot_be_changed() -> None:
    report = build_report(build_host("pve1", STATUS, NODES))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.host_id = "x"  # type: ignore[misc]


# ---- numbers and text -------------------------------------------------------------------------------------------------------

# What each stands for as a number and as a whole number.
NUMBERS: Final[list[tuple[object, float | None, int | None]]] = [
    (0, 0, 0),
    (2, 2, 2),
    (MOST, MOST, MOST),
    (1.5, 1.5, None),
    (2.0, 2, 2),
    ("0", 0, 0),
    ("2", 2, 2),
    ("2574", 2574, 2574),
    ("1.20", 1.2, None),
    ("2.0", 2, 2),
    ("9007199254740991", MOST, MOST),
    *(
        (nonsense, None, None)
        for nonsense in (
            True,
            False,
            None,
            "",
            " ",
            "many",
            "12x",
            "2 ",
            " 2",
            "2\n",
            "+2",
            "-1",
            "1e3",
            "1.",
            ".5",
            "1.2.3",
            "0x10",
            "1_000",
            "٣",
            "²",
            "NaN",
            "inf",
            "9" * 5000,
            -1,
            -0.5,
            MOST + 1,
            float(2**53),
            10**400,
            1e99,
            math.nan,
            math.inf,
            -math.inf,
            [],
            [1],
            {},
            {"x": 1},
        )
    ),
]


@pytest.mark.parametrize(("value", "number", "integer"), [pytest.param(*row, id=ascii(row[0])[:24]) for row in NUMBERS])
def test_number_is_read_or_not_known(value: object, number: float | None, integer: int | None) -> None:
    assert parse_number(value) == number
    assert parse_integer(value) == integer
    assert type(parse_integer(value)) is type(integer)


@pytest.mark.parametrize(("value", "read"), [(0, None), (1, 1), ("8192", 8192), (8193, None)])
def test_integer_outside_of_its_bounds_is_not_known(value: object, read: int | None) -> None:
    assert parse_integer(value, 1, 8192) == read


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("web", "web"),
        ("", ""),
        ("Grüße ☃ 😀", "Grüße ☃ 😀"),
        ("a\x00\x1b[2J\nb", "a\x00\x1b[2J\nb"),
        ("a\ud800b\udfff", "a\ufffdb\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ufeffx", "\ufeffx"),
        ("x" * 257, "x" * 256),
        ("x" * 255 + "\ud83d\ude00", "x" * 255 + "\ufffd"),
        ("😀" * 300, "😀" * 256),
        (1, None),
        (None, None),
        (["web"], None),
    ],
    ids=lambda value: ascii(value)[:16],
)
def test_text_is_what_every_json_reader_takes(value: object, read: str | None) -> None:
    assert parse_text(value) == read


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a":}',
        "{} {}",
        "NaN",
        "[Infinity]",
        '{"a":-Infinity}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        "<html>",
        "\ufeff{}",
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


# ---- the node ---------------------------------------------------------------------------------------------------------------


def changed(document: Mapping[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    """A copy in which `path` leads to this value."""
    result = copy.deepcopy(dict(document))
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


FIGURES: Final[Mapping[str, tuple[str, ...]]] = {
    "uptime_seconds": ("uptime",),
    "cpu_count": ("cpuinfo", "cpus"),
    "memory_total_bytes": ("memory", "total"),
    "memory_used_bytes": ("memory", "used"),
    "swap_total_bytes": ("swap", "total"),
    "swap_used_bytes": ("swap", "used"),
    "rootfs_total_bytes": ("rootfs", "total"),
    "rootfs_used_bytes": ("rootfs", "used"),
}
NOT_KNOWN: Final[list[object]] = [None, True, "", "many", "12x", -1, "-1", 1.5, math.nan, math.inf, 10**30, [], {}, [5], {"total": 5}]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(("sent", "figure"), [(17, 17), ("17", 17), (17.0, 17), *((sent, None) for sent in NOT_KNOWN)], ids=repr)
def test_figure_of_the_node_is_read_or_null(name: str, sent: object, figure: int | None) -> None:
    host = build_host("pve1", changed(STATUS, FIGURES[name], sent), NODES)
    assert dataclasses.asdict(host) == {**dataclasses.asdict(build_host("pve1", STATUS, NODES)), name: figure}
    assert problems(build_report(host)) == []


@pytest.mark.parametrize("wrong", [None, "x", 5, [], [1]], ids=repr)
@pytest.mark.parametrize("part", ["cpuinfo", "memory", "swap", "rootfs", "current-kernel"])
def test_part_of_another_shape_is_not_known_and_the_others_are(part: str, wrong: object) -> None:
    host = dataclasses.asdict(build_host("pve1", {**STATUS, part: wrong}, NODES))
    lost = {"cpuinfo": "cpu_count cpu_model", "current-kernel": "kernel_version"}.get(part, f"{part}_total_bytes {part}_used_bytes").split()
    assert {name for name, value in host.items() if value is None} == set(lost)


@pytest.mark.parametrize(("sent", "count"), [(1, 1), (8192, 8192), ("4", 4), (0, None), (8193, None)])
def test_node_has_at_least_one_core(sent: object, count: int | None) -> None:
    assert build_host("pve1", changed(STATUS, ("cpuinfo", "cpus"), sent), NODES).cpu_count == count


@pytest.mark.parametrize(
    ("sent", "version"),
    [
        ("pve-manager/9.2.11/14a22df35955d97d", "9.2.11"),
        ("pve-manager/8.4.1/abcdef (running kernel: 6.8.12-10-pve)", "8.4.1"),
        ("pve-manager/9.0.0~10/x", "9.0.0~10"),
        *((sent, None) for sent in ("", "9.2.11", "pve-manager/", "pve-manager//x", None, 9.2, ["pve-manager/9.2.11/x"])),
    ],
    ids=str,
)
def test_version_of_proxmox(sent: object, version: str | None) -> None:
    assert build_host("pve1", {**STATUS, "pveversion": sent}, NODES).pve_version == version


@pytest.mark.parametrize(("path", "name"), [(("current-kernel", "release"), "kernel_version"), (("cpuinfo", "model"), "cpu_model")])
@pytest.mark.parametrize(("sent", "text"), [("A\ud800", "A\ufffd"), ("x" * 999, "x" * 256), (None, None), (5, None), ([], None)], ids=ascii)
def test_text_of_the_node_is_read_or_null(path: tuple[str, ...], name: str, sent: object, text: str | None) -> None:
    host = build_host("pve1", changed(STATUS, path, sent), NODES)
    assert getattr(host, name) == text
    assert problems(build_report(host)) == []


@pytest.mark.parametrize(
    ("sent", "load"),
    [
        (["2.54", "1.74", "1.20"], [2.54, 1.74, 1.2]),
        (["0.00", "0.00", "0.00"], [0, 0, 0]),
        ([2.54, 1, "3"], [2.54, 1, 3]),
        *(
            (sent, None)
            for sent in (
                [],
                ["1", "2"],
                ["1", "2", "3", "4"],
                ["1", "2", "x", "3"],
                ["1", "2", None],
                ["1", "2", "-3"],
                ["1", "2", True],
                [1, 2, math.nan],
                "1 2 3",
                "123",
                {"0": 1, "1": 2, "2": 3},
                None,
                5,
            )
        ),
    ],
    ids=repr,
)
def test_load_average_is_three_numbers_or_null(sent: object, load: list[float] | None) -> None:
    report = build_report(build_host("pve1", {**STATUS, "loadavg": sent}, NODES))
    assert json.loads(report.to_json())["host"]["load_average"] == load
    assert problems(report) == []


@pytest.mark.parametrize(
    ("sent", "usage"),
    [
        (0, 0),
        (1, 1),
        (0.9592850049, 0.9592850049),
        ("0.5", 0.5),
        *((sent, None) for sent in (1.01, 2, -0.1, "x", None, True, math.nan, ())),
    ],
    ids=repr,
)
def test_cpu_usage_is_a_fraction_or_null(sent: object, usage: float | None) -> None:
    report = build_report(build_host("pve1", STATUS, [{"node": "pve1", "cpu": sent}]))
    assert json.loads(report.to_json())["host"]["cpu_usage"] == usage
    assert problems(report) == []


@pytest.mark.parametrize(
    "nodes",
    [[], NODES[:2], [{"node": "pve1"}], [{"cpu": 0.5}], [{"node": ["pve1"], "cpu": 0.5}], [{"id": "node/pve1", "cpu": 0.5}]],
    ids=["no entry", "other nodes only", "without cpu", "without name", "name of another type", "id alone"],
)
def test_cpu_usage_comes_from_this_nodes_entry_alone(nodes: list[dict[str, object]]) -> None:
    """The figure in the status is 0 on a worker's first look, so it is no substitute."""
    assert build_host("pve1", {**STATUS, "cpu": 0.9}, nodes).cpu_usage is None


# ---- guests -----------------------------------------------------------------------------------------------------------------

# Each kind of container that the simulated node has: cores, memory in MiB, disk in GiB.
KINDS: Final[Mapping[int, tuple[int | None, int | None, int | None]]] = {
    100: (2, 1024, 8),
    101: (6, 1024, 8),  # no cores set: all of the node's
    102: (6, 1024, 8),  # a cpulimit is no number of cores
    103: (1, 1024, 8),
    104: (1, 1024, 8),
    105: (2, 1024, 8),
    106: (2, 1024, 8),
    107: (None, None, None),  # a broken file
    108: (4, 1024, 8),
    109: (6, 512, 4),  # an empty file; Proxmox shows 4 GiB in the list
    110: (6, 1024, 8),
    999: (2, 1024, 8),
}


@pytest.mark.parametrize("guest", lab.default_guests(), ids=lambda guest: guest.name)
def test_spec_of_each_kind_of_container(guest: lab.Guest) -> None:
    listed, config = guest.list_entry(6), guest.config_entry(current=True)
    built = build_guest(guest.vmid, listed, config | ({"cores": 2} if guest.vmid == 999 else {}), 6)
    cores, memory, disk = KINDS[guest.vmid]
    spec = {"cores": cores, "memory_bytes": memory and memory << 20, "disk_bytes": disk and disk * GIB}
    assert built.spec is not None
    assert dataclasses.asdict(built.spec) == spec
    assert (built.vmid, built.type, built.name, built.status) == (guest.vmid, "lxc", guest.name, guest.status)
    assert problems(build_report(build_host("pve1", STATUS, NODES), built)) == []


@pytest.mark.parametrize("guest", [each for each in lab.default_guests() if each.config.get("rootfs")], ids=lambda guest: guest.name)
def test_spec_stays_when_a_guest_starts_or_stops(guest: lab.Guest) -> None:
    config = guest.config_entry(current=True)
    listed = [dataclasses.replace(guest, status=status).list_entry(6) for status in ("running", "stopped")]
    assert listed[0]["maxdisk"] != listed[1]["maxdisk"]
    assert build_guest(guest.vmid, listed[0], config, 6).spec == build_guest(guest.vmid, listed[1], config, 6).spec


def spec_of(listed: Mapping[str, Any], config: Mapping[str, Any], cpu_count: int | None = 6) -> dict[str, Any]:
    guest = build_guest(100, {**LISTED, **listed}, {**CONFIG, **config}, cpu_count)
    assert problems(build_report(build_host("pve1", STATUS, NODES), guest)) == []
    assert guest.spec is not None
    return dataclasses.asdict(guest.spec)


@pytest.mark.parametrize(
    ("sent", "cores"),
    [(1, 1), (8192, 8192), ("4", 4), (4.0, 4), *((sent, None) for sent in (0, 8193, 1.5, "1.5", *NOT_KNOWN))],
    ids=repr,
)
def test_cores_of_the_configuration_or_null(sent: object, cores: int | None) -> None:
    assert spec_of({}, {"cores": sent, "cpulimit": "1.5"}) == {**spec_of({}, {}), "cores": cores}


@pytest.mark.parametrize(
    ("sent", "memory"),
    [(16, 16 << 20), ("2048", 2 * GIB), (1, 1 << 20), *((sent, None) for sent in (0, MOST, MOST >> 19, *NOT_KNOWN))],
    ids=repr,
)
def test_memory_of_the_configuration_or_null(sent: object, memory: int | None) -> None:
    assert spec_of({}, {"memory": sent}) == {**spec_of({}, {}), "memory_bytes": memory}


VOLUMES: Final[Mapping[str, int | None]] = {
    "local:100/vm-100-disk-0.raw,size=8G": 8 * GIB,
    "local-lvm:vm-100-disk-0,size=512M": 512 << 20,
    "local-lvm:vm-100-disk-0,size=4096K": 4 << 20,
    "local-lvm:vm-100-disk-0,size=2T": 2048 * GIB,
    "local-lvm:vm-100-disk-0,size=1048576": 1 << 20,
    "local-lvm:vm-100-disk-0,size=1.5G": 1536 << 20,
    "local-lvm:vm-100-disk-0,size=0.5T": 512 * GIB,
    "local-lvm:vm-100-disk-0,acl=1,size=8G,mountoptions=noatime;lazytime": 8 * GIB,
    "volume=local-lvm:vm-100-disk-0,size=8G": 8 * GIB,
    "/dev/sdb1,size=8G": 8 * GIB,
    "local-lvm:vm-100-disk-0": 0,
    "/mnt/data": 0,
    "/mnt/data,ro=1": 0,
    **dict.fromkeys(
        (
            "",
            "???",
            "none",
            "size=8G",
            ",size=8G",
            "local:x,size=",
            "local:x,size=G",
            "local:x,size=8g",
            "local:x,size=8P",
            "local:x,size=8GB",
            "local:x,size=8 G",
            "local:x,size=-8G",
            "local:x,size=+8G",
            "local:x,size=1e3",
            "local:x,size=.5G",
            "local:x,size=8.G",
            "local:x,size=٣G",
            "local:x,size=0",
            "local:x,size=0G",
            "local:x,size=8G\n",
            "local:x,size=9007T",
            "local:x,size=8192T",
            "local:x,size=" + "9" * 5000 + "T",
        )
    ),
}


@pytest.mark.parametrize(("volume", "size"), VOLUMES.items(), ids=lambda value: ascii(value)[:40])
def test_size_of_a_volume(volume: str, size: int | None) -> None:
    """Where the configuration says none, the list's maxdisk is what there is."""
    assert parse_volume_size(volume) == size
    assert spec_of({}, {"rootfs": volume})["disk_bytes"] == (4 * GIB if size == 0 else size)


@pytest.mark.parametrize("volume", [None, 8, True, [], ["local:x", "size=8G"], {"size": "8G"}], ids=repr)
def test_volume_that_is_no_text_is_not_known(volume: object) -> None:
    assert parse_volume_size(volume) is None
    assert spec_of({}, {"rootfs": volume})["disk_bytes"] is None


@pytest.mark.parametrize("cpu_count", [6, None])
def test_keys_that_are_not_set_have_proxmoxs_default(cpu_count: int | None) -> None:
    guest = build_guest(100, LISTED, {"digest": "x", "cpulimit": "1.5"}, cpu_count)
    assert guest.spec == felhom_agent.GuestSpec(cores=cpu_count, memory_bytes=512 << 20, disk_bytes=4 * GIB)


@pytest.mark.parametrize("sent", [*NOT_KNOWN, "absent"], ids=repr)
def test_size_that_neither_configuration_nor_list_gives_is_null(sent: object) -> None:
    listed = {"name": "web", "status": "running"} | ({} if sent == "absent" else {"maxdisk": sent})
    spec = build_guest(100, listed, {}, 6).spec
    assert spec is not None
    assert spec.disk_bytes is None


@pytest.mark.parametrize("status", ["running", "stopped", "unknown"])
def test_guest_without_a_configuration_is_unknown_and_has_no_spec(status: str) -> None:
    guest = build_guest(100, {**LISTED, "status": status}, None, 6)
    assert guest == Guest(vmid=100, name="web", status="unknown")
    assert problems(build_report(build_host("pve1", STATUS, NODES), guest)) == []


@pytest.mark.parametrize("status", [None, "", 5, ["running"], "unknown"], ids=repr)
def test_guest_whose_status_is_not_known_has_no_spec(status: object) -> None:
    assert build_guest(100, {**LISTED, "status": status}, CONFIG, 6) == Guest(vmid=100, name="web", status="unknown")


@pytest.mark.parametrize("status", ["running", "prelaunch", "x" * 999, "a\x1b[2J\nb", "\ud800"], ids=ascii)
def test_status_is_as_proxmox_lists_it(status: str) -> None:
    guest = build_guest(100, {**LISTED, "status": status}, CONFIG, 6)
    assert guest.status == (parse_text(status) or "")[:64]
    assert problems(build_report(build_host("pve1", STATUS, NODES), guest)) == []


@pytest.mark.parametrize("name", ["a\x00b\x1b[2J\r\nc", "\ud800", "x" * 999, '"\\', "\u2028", "😀", "", None, 5, []], ids=ascii)
def test_name_of_a_guest_never_breaks_the_report(name: object) -> None:
    guest = build_guest(100, {**LISTED, "name": name}, CONFIG, 6)
    assert problems(build_report(build_host("pve1", STATUS, NODES), guest)) == []
    assert guest.name == (parse_text(name) or "")


# ---- whatever the servers say -----------------------------------------------------------------------------------------------

ANY_JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=MOST - 2, max_value=2**64)
    | st.floats()
    | st.text()
    | st.text(alphabet="0123456789.-+eExKMGT", max_size=24)
    | st.sampled_from(["9" * 400, "\ud800", "unknown", "local:x,size=1.5T", "pve-manager/9.2.11/x", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Each path into a document, that of the document itself first."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, original: object) -> Any:
    """A real reply in which up to four values are others, strings of themselves, lists of themselves, twice there or gone."""
    root = [copy.deepcopy(original)]
    for _ in range(draw(st.integers(0, 4))):
        *way, last = draw(st.sampled_from([(0, *path) for path in places(root[0])]))
        place: Any = root
        for key in way:
            place = place[key]
        match draw(st.sampled_from(("other", "text", "list", "twice", "gone"))):
            case "text":
                place[last] = str(place[last])
            case "list":
                place[last] = [place[last]]
            case "twice" if isinstance(place, list) and place is not root:
                place.append(copy.deepcopy(place[last]))
            case "gone" if place is not root:
                del place[last]
            case _:
                place[last] = draw(ANY_JSON)
    return root[0]


def as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


GUESTS: Final = {guest.vmid: guest for guest in lab.default_guests()}
LIST: Final = [guest.list_entry(2) for guest in GUESTS.values()]


@given(status=mutated(STATUS), nodes=mutated(NODES))
def test_any_node_is_reported_within_the_schema(status: Any, nodes: Any) -> None:
    entries = [entry for entry in nodes if isinstance(entry, dict)] if isinstance(nodes, list) else []
    assert problems(build_report(build_host("pve1", as_object(status), entries))) == []


@given(data=st.data(), vmid=st.sampled_from(sorted(GUESTS)), cpu_count=st.none() | st.integers(1, 8192))
def test_any_guest_is_reported_within_the_schema(data: st.DataObject, vmid: int, cpu_count: int | None) -> None:
    listed = as_object(data.draw(mutated(GUESTS[vmid].list_entry(2))))
    config = as_object(data.draw(mutated(GUESTS[vmid].config_entry(current=True))))
    guest = build_guest(vmid, listed, config, cpu_count)
    assert problems(build_report(build_host("pve1", STATUS, NODES), guest)) == []


def parsers() -> list[Callable[[object], object]]:
    """Every parser that takes any JSON value, so that a new one is not forgotten."""
    named = [function for name, function in vars(felhom_agent).items() if name.startswith("parse_") and inspect.isfunction(function)]
    return [function for function in named if next(iter(inspect.signature(function).parameters.values())).annotation == "object"]


@pytest.mark.parametrize("parse", parsers(), ids=lambda parse: parse.__name__)
@given(value=ANY_JSON)
def test_parser_takes_any_value_and_gives_what_json_can_hold(parse: Callable[[object], object], value: object) -> None:
    read = parse(value)
    if isinstance(read, int | float):
        json.dumps(read, allow_nan=False)
        assert abs(read) <= MOST


NO_WHOLE_NUMBERS: Final[list[object]] = [True, False, None, 900.5, 1e99, math.inf, math.nan, "900", "", [900], {}]


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        *((sent, sent) for sent in (-5, 0, 900, MOST)),
        (900.0, 900),
        (10**400, MOST),
        (-(10**30), -MOST),
        *((sent, None) for sent in NO_WHOLE_NUMBERS),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_whole_number_of_the_envelope(sent: object, read: int | None) -> None:
    assert parse_whole(sent) == read
    assert type(parse_whole(sent)) is type(read)


@given(value=st.floats() | st.integers() | st.from_regex(r"[0-9]{0,20}(\.[0-9]{0,20})?"))
def test_number_is_true_or_not_known(value: float | str) -> None:
    number, integer = parse_number(value), parse_integer(value)
    if number is not None:
        assert number == float(value)
        assert 0 <= number <= MOST
    assert integer is None or integer == number


@given(value=st.text(max_size=300) | st.text(st.characters(categories=["Cs"]), max_size=300))
def test_text_stays_what_it_is_where_it_can(value: str) -> None:
    read = parse_text(value)
    assert read is not None
    assert len(read.encode()) <= 4 * 256
    expected = value[:256].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert read == expected
    assert len(read) <= 256


@given(number=st.decimals(min_value="0.001", max_value=2**20, places=3), unit=st.sampled_from(["", "K", "M", "G", "T"]))
def test_size_of_any_volume_is_true_or_not_known(number: object, unit: str) -> None:
    size = parse_volume_size(f"local:x,size={number}{unit}")
    exact = int(float(str(number)) * 1024 ** ["", "K", "M", "G", "T"].index(unit))
    assert size == (exact if 0 < exact <= MOST else None)


@given(text=st.text(alphabet='{}[]",:\\u0123456789.eE+-NaInfityrulsx \n', max_size=40) | st.text())
def test_any_text_is_json_or_a_value_error(text: str) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert parse_json(json.dumps(value)) == value or "e" in text.lower()  # 1e999 is read as infinity, and refused as a figure


@given(value=st.text() | st.integers().map(str) | st.datetimes().map(lambda when: when.strftime("%a, %d %b %Y %H:%M:%S GMT")))
def test_any_retry_after_is_at_most_an_hour(value: str) -> None:
    seconds = parse_retry_after(value, time.time())
    assert seconds is None or 0 <= seconds <= 3600


PERMISSIONS: Final = {path: dict.fromkeys(lab.PRIVILEGES, 1) for path in (*lab.PERMISSION_PATHS, "/nodes/pve1", "/vms/100")}


@given(permissions=mutated(PERMISSIONS))
def test_any_permissions_are_judged(permissions: Any) -> None:
    sees_all, wrong = diagnose_token(as_object(permissions), "felhom-agent@pve!agent", "pve1")
    assert isinstance(sees_all, bool)
    assert all(line.isprintable() for line in wrong)


# ---- the same through the clients -------------------------------------------------------------------------------------------


class Active:
    def probe(self) -> str:
        return "active"


@pytest.fixture
def plain_node() -> Iterator[lab.SimulatedNode]:
    """Without TLS, which has no part in this and takes most of the time."""
    with lab.SimulatedNode(None, guests=[GUESTS[vmid] for vmid in (100, 107)]) as running:
        yield running


@given(data=st.data())
def test_any_answers_of_proxmox_are_a_valid_report_or_the_agents_own_error(plain_node: lab.SimulatedNode, data: st.DataObject) -> None:
    replies = {
        "/access/permissions": PERMISSIONS,
        "/nodes$": NODES,
        "/nodes/pve1/status": STATUS,
        "/nodes/pve1/lxc$": [GUESTS[vmid].list_entry(2) for vmid in (100, 107)],
        "/nodes/pve1/lxc/100": GUESTS[100].config_entry(current=True),
        "/nodes/pve1/lxc/107": GUESTS[107].config_entry(current=True),
    }
    plain_node.clear_script()
    for path in data.draw(st.lists(st.sampled_from(sorted(replies)), max_size=3, unique=True)):
        body = json.dumps(data.draw(mutated({"data": replies[path]})))
        plain_node.script(path, lab.Forever(lab.Reply(body=body.encode())))
    config = ProxmoxConfig(url=plain_node.url, node="pve1", token_id=plain_node.token_id, token_secret=plain_node.token_secret)
    collector = Collector(ProxmoxClient(config), Active(), host_id="pve1", agent_version="0.3.0", logger=logging.getLogger("report"))
    try:
        report = collector.collect()
    except AgentError:
        return
    assert problems(report) == []


@pytest.fixture
def plain_hub() -> Iterator[lab.SimulatedHub]:
    with lab.SimulatedHub(None) as running:
        yield running


ENVELOPE: Final = {"poll_interval_seconds": 900, "blocked": False, "desired_generation": 0, "has_signed_ops": False}


@given(envelope=mutated(ENVELOPE))
def test_any_envelope_is_read_or_an_error_of_the_hub(plain_hub: lab.SimulatedHub, envelope: Any) -> None:
    plain_hub.clear_script()
    plain_hub.script("", lab.Reply(body=json.dumps(envelope).encode()))
    client = HubClient(HubConfig(url=plain_hub.url, host_id="pve1", api_key=plain_hub.api_key), logger=logging.getLogger("report"))
    try:
        read = client.report(build_report(build_host("pve1", STATUS, NODES)))
    except TransportError:
        # NaN and its like are no JSON
        assert not isinstance(envelope, dict) or any(name in json.dumps(envelope) for name in ("NaN", "Infinity"))
        return
    assert isinstance(read, ControlEnvelope)
    for name, sent in ENVELOPE.items():
        said, found = envelope.get(name), getattr(read, name)
        if isinstance(sent, bool):
            assert found is (said if isinstance(said, bool) else None)
        elif found is None:
            assert isinstance(said, bool) or not isinstance(said, int) or abs(said) > MOST
        else:
            assert not isinstance(said, bool)
            assert found == max(-MOST, min(MOST, said))
