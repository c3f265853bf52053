"""docs/hub.md and the schemas beside it say what the agent does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

import felhom_agent as agent
import lenient_schema
from examples import hub as example
from support import make_report

DOCS: Final = Path(__file__).parent.parent / "docs"
PAGE: Final = (DOCS / "hub.md").read_text("utf-8")
STRICT: Final = json.loads((DOCS / "host-report.schema.json").read_text("utf-8"))
LENIENT_PATH: Final = DOCS / "host-report-lenient.schema.json"
LENIENT: Final = json.loads(LENIENT_PATH.read_text("utf-8"))
EXAMPLE: Final = json.loads((DOCS / "host-report.example.json").read_text("utf-8"))


def problems(schema: Any, report: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(report)]


def make_document(**changes: Any) -> dict[str, Any]:
    return {**json.loads(make_report().to_json()), **changes}


def make_guests(count: int) -> list[dict[str, Any]]:
    spec = {"cores": 2, "memory_bytes": 4 << 30, "disk_bytes": 32 << 30}
    guest = {"type": "lxc", "status": "running", "controller_version": "", "spec": spec}
    return [{"vmid": 100 + n, "name": f"customer-web{n:03}", **guest} for n in range(count)]


def make_backups(count: int) -> list[dict[str, Any]]:
    volume = "backup-nas:backup/vzdump-lxc-{}-2026_06_08-02_00_03.tar.zst"
    backup = {"storage": "backup-nas", "created_at": "2026-06-08T02:00:03Z"}
    empty = {"type": "lxc", "size_bytes": None, "verified": None}
    vmids = range(100, 100 + count)
    return [{"vmid": vmid, "volid": volume.format(vmid), **backup, **empty} for vmid in vmids]


def add_all_extras(document: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a report with this many guests, one backup of each, two storages and some tasks."""
    details = {
        "template": False,
        "onboot": True,
        "lock": None,
        "tags": ["production"],
        "ha_state": None,
        "uptime_seconds": 1036728,
        "cpu_usage": 0.0042,
        "memory_used_bytes": 301989888,
    }
    storage = {
        "storage": "backup-nas",
        "type": "nfs",
        "status": "available",
        "total_bytes": 3936818397184,
        "used_bytes": 3582504742912,
    }
    time = "2026-06-08T00:03:40Z"
    task = {"at": time, "actor": "root@pam", "operation": "vzdump 100", "result": "OK"}
    return {
        **document,
        "guests": [{**guest, **details} for guest in make_guests(count)],
        "storage_targets": [storage, storage],
        "backups": [{**backup, "type": "lxc"} for backup in make_backups(count)],
        "audit_tail": [task] * min(count, 50),
    }


# ---- schemas -------------------------------------------------------------------------------------


def test_the_lenient_schema_is_made_from_the_strict_one(tmp_path: Path) -> None:
    """To make it anew: python3 tests/lenient_schema.py"""
    (tmp_path / "tests").mkdir()
    shutil.copytree(DOCS, tmp_path / "docs")
    copy = tmp_path / "docs" / LENIENT_PATH.name
    copy.write_text("", "utf-8")
    script = shutil.copy(lenient_schema.__file__, tmp_path / "tests")
    subprocess.run([sys.executable, "-I", script], check=True)
    assert copy.read_bytes() == LENIENT_PATH.read_bytes()


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.schema.json")), ids=lambda path: path.name)
def test_every_schema_is_of_draft_2020_12_and_on_the_page(path: Path) -> None:
    schema = json.loads(path.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert f"]({path.name})" in PAGE


LATER: Final = {
    "a-field": make_document(disks=[]),
    "a-field-of-a-guest": make_document(guests=[{**make_guests(1)[0], "disks": []}]),
    "some-of-the-details": make_document(guests=[{**make_guests(1)[0], "tags": []}]),
    "a-type-of-guest": make_document(guests=[{**make_guests(1)[0], "type": "oci"}]),
    "a-status-without-spec": make_document(
        guests=[{"vmid": 1000, "type": "lxc", "name": "x", "status": "x", "controller_version": ""}]
    ),
    "a-long-name": make_document(agent_version="1" * 1000),
}


@pytest.mark.parametrize("report", LATER.values(), ids=LATER)
def test_only_the_lenient_schema_takes_what_a_later_agent_may_say(report: object) -> None:
    assert problems(STRICT, report)
    assert problems(LENIENT, report) == []


@pytest.mark.parametrize("schema", [STRICT, LENIENT], ids=["strict", "lenient"])
def test_both_schemas_take_a_report_and_refuse_other_types(schema: Any) -> None:
    assert problems(schema, EXAMPLE) == []
    for name, value in (("guests", None), ("host", {}), ("host_id", 1), ("backups", {})):
        assert problems(schema, {**EXAMPLE, name: value})
    absent = dict(EXAMPLE)
    del absent["backups"]
    assert problems(schema, absent)


# ---- page ----------------------------------------------------------------------------------------


def test_the_page_names_the_limits_of_agent_and_example() -> None:
    assert f"POST {{hub.url}}{agent.REPORT_PATH}" in PAGE
    assert f"User-Agent: felhom-agent/{agent.__version__}" in PAGE
    assert f"{agent.MIN_POLL_SECONDS} to {agent.MAX_POLL_SECONDS}" in PAGE
    assert f"I + {example.TOLERANCE_SECONDS // 60} minutes" in PAGE
    assert f"{example.MAX_BODY_BYTES >> 20} MiB" in PAGE


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_body_sizes_are_about_what_the_page_says(count: int) -> None:
    [row] = re.findall(rf"^ *\| {count:,} \| ([\d.]+) kB \| ([\d.]+) kB \|$", PAGE, re.MULTILINE)
    plain = make_document(guests=make_guests(count))
    for said, report in zip(row, (plain, add_all_extras(plain, count)), strict=True):
        size = len(json.dumps(report, separators=(",", ":")))
        assert size == pytest.approx(1000 * float(said), rel=0.15)


def test_the_page_uses_options_that_the_example_has() -> None:
    command = [sys.executable, example.__file__, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    calls = re.findall(r"felhom-hub (?:\$HUB )?(--.*)|HUB=(--.*)\"|\(`(--[a-z-]+)`", PAGE)
    options = set(re.findall(r"--[a-z-]+", str(calls)))
    expected = {"--keys", "--database", "--on-change", "--test-alarm", "--mute", "--tolerance"}
    assert expected < options <= set(re.findall(r"--[a-z-]+", shown))


def test_the_page_says_when_a_host_is_overdue() -> None:
    assert f"{example.TOLERANCE_SECONDS} s more (`--tolerance`" in PAGE
    assert f"[why {example.TOLERANCE_SECONDS}](#a-missed-heartbeat)" in PAGE


def test_the_unit_runs_the_command_that_the_page_tells_to_save() -> None:
    [unit] = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)
    [command] = re.findall(r"--on-change (\S+)\"$", unit, re.MULTILINE)
    assert PAGE.count(f"save this as `{command}`") == 2
    assert re.findall(r"^Exec.*$", unit, re.MULTILINE) == [
        "ExecStart=/usr/local/bin/felhom-hub $HUB",
        "ExecReload=/usr/local/bin/felhom-hub $HUB --test-alarm",
    ]


def test_the_rules_watch_the_job_that_the_page_tells_to_scrape() -> None:
    rules = (DOCS.parent / "examples" / "prometheus-rules.yml").read_text("utf-8")
    [job] = re.findall(r"job_name: (\S+)", PAGE)
    assert set(re.findall(r'job="(\w+)"', rules)) == {job}


# ---- example report ------------------------------------------------------------------------------


def test_the_example_report_has_every_field_of_the_table_of_extras() -> None:
    table = PAGE.partition("| extra | field | good for |")[2].partition("\n\n")[0]
    cells = [row.split("|")[2] for row in table.splitlines()[2:]]
    fields = {field for cell in cells for field in re.findall(r"`(\w+)`", cell)} - {"qemu"}
    found = {*EXAMPLE, *(name for guest in EXAMPLE["guests"] for name in guest)}
    assert fields <= found
    assert {guest["type"] for guest in EXAMPLE["guests"]} == {"lxc", "qemu"}
    assert all(EXAMPLE[name] for name in ("storage_targets", "backups", "audit_tail"))


def test_the_lenient_schema_takes_the_example_report() -> None:
    assert problems(LENIENT, EXAMPLE) == []
