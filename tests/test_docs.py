"""README.md, docs/ and their schemas say what module and example hub do, and lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

import felhom_agent as agent
import lab
import lenient_schema
import test_config
import test_report
from examples import hub as example_hub
from support import EXTRAS, make_collector, make_report

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"
README: Final = (ROOT / "README.md").read_text("utf-8")
HUB_PAGE: Final = (DOCS / "hub.md").read_text("utf-8")
PAGES: Final = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")])
STRICT: Final = json.loads((DOCS / "host-report.schema.json").read_text("utf-8"))
LENIENT: Final = json.loads((DOCS / "host-report-lenient.schema.json").read_text("utf-8"))
EXAMPLE: Final = json.loads((DOCS / "host-report.example.json").read_text("utf-8"))
COMPAT: Final = Path(__file__).parent / "compat" / "before-details"
BEFORE_DETAILS: Final = json.loads((COMPAT / "host-report.schema.json").read_text("utf-8"))
GUEST: Final[dict[str, Any]] = EXAMPLE["guests"][0]
DETAILS: Final = {item.name for item in dataclasses.fields(agent.GuestDetails)}


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of each row of a page's table with this first heading."""
    start = page.index(f"\n| {heading} |")
    _heading, _line, *rows = page[start:].strip().partition("\n\n")[0].split("\n")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names_in(cells: Any) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", " ".join(cells)))


def problems(schema: Any, report: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(report)]


# ---- what has several places ---------------------------------------------------------------------


def compare(names: set[str], places: dict[str, set[str]]) -> None:
    """Fail with a line for each name that is only in the module or only in another place."""
    missing = [f"{name} is not in {place}" for place in places for name in names - places[place]]
    missing += [f"{name} is only in {place}" for place in places for name in places[place] - names]
    assert not missing, "\n".join(missing)


def test_extra_is_in_every_place() -> None:
    places = {
        "EXTRAS in tests/support.py": {*EXTRAS},
        "the table of extras in README.md": names_in(row[0] for row in table(README, "extra")),
        "the table of extras in docs/hub.md": names_in(row[0] for row in table(HUB_PAGE, "extra")),
        "docs/host-report.schema.json": set(re.findall(r"the extra (\w+)", json.dumps(STRICT))),
    }
    compare({*agent.EXTRAS}, places)


def test_setting_is_in_every_place() -> None:
    places = {
        "the table in README.md": names_in(row[0] for row in table(README, "key")) - {"authz"},
        "ACCEPTED in tests/test_config.py": {*test_config.ACCEPTED},
        # Any integer will do.
        "REFUSED in tests/test_config.py": {*test_config.REFUSED, "hub.poll_seconds"},
    }
    compare(set(test_config.KEYS), places)


def find_fields(part: Any, prefix: str = "") -> Iterator[str]:
    """Yield the fields of a JSON value, as `guests.spec.cores`."""
    if isinstance(part, list):
        for item in part:
            yield from find_fields(item, prefix)
    elif isinstance(part, dict):
        for name, value in part.items():
            yield prefix + name
            yield from find_fields(value, f"{prefix}{name}.")


def find_described(part: Any, prefix: str = "") -> Iterator[str]:
    """Yield the fields that the schema describes in the same way."""
    part = STRICT["$defs"].get(str(part.get("$ref")).rpartition("/")[2], part)
    yield from find_described(part["items"], prefix) if "items" in part else ()
    for name, inner in part.get("properties", {}).items():
        yield prefix + name
        yield from find_described(inner, f"{prefix}{name}.")


def test_field_of_the_report_is_in_every_place() -> None:
    def names(part: Any) -> dict[str, Any]:
        return {item.name: None for item in dataclasses.fields(part)}

    guest = {**names(agent.Guest), **names(agent.GuestDetails), "spec": names(agent.GuestSpec)}
    del guest["details"]
    report = {
        **names(agent.HostReport),
        "host": names(agent.HostMetrics),
        "guests": guest,
        "cloudflared": names(agent.Cloudflared),
        "storage_targets": names(agent.StorageTarget),
        "backups": names(agent.Backup),
        "audit_tail": names(agent.AuditEntry),
    }
    fields = set(find_fields(report))
    # Both are empty in this version.
    empty = re.compile(r"(restore_tests|pbs_snapshots)\.")
    places = {
        "docs/host-report.schema.json": {
            field for field in find_described(STRICT) if not empty.match(field)
        },
        "docs/host-report.example.json": set(find_fields(EXAMPLE)),
        # It is without extras.
        "EXAMPLE in tests/test_report.py": {
            *find_fields(test_report.EXAMPLE),
            *(field for field in fields if not field.startswith("host.")),
        },
    }
    compare(fields, places)
    told = names_in(row[1] for row in table(HUB_PAGE, "extra"))
    assert told - {"type", "qemu"} == DETAILS | {"storage_targets", "backups", "audit_tail"}


# ---- schemas and reports -------------------------------------------------------------------------


def test_every_field_is_required_but_spec_and_details() -> None:
    optional: set[str] = set()

    def note(part: dict[str, Any]) -> dict[str, Any]:
        if part.get("type") == "object":
            optional.update(part["properties"].keys() - set(part["required"]))
        return part

    json.loads(json.dumps(STRICT), object_hook=note)
    assert optional == {"spec", *DETAILS}


def test_lenient_schema_is_made_from_the_strict_one(tmp_path: Path) -> None:
    """To make it anew: python3 tests/lenient_schema.py"""
    (tmp_path / "tests").mkdir()
    shutil.copytree(DOCS, tmp_path / "docs")
    copy = tmp_path / "docs" / lenient_schema.LENIENT.name
    copy.write_text("", "utf-8")
    script = shutil.copy(lenient_schema.__file__, tmp_path / "tests")
    subprocess.run([sys.executable, "-I", script], check=True)
    assert copy.read_bytes() == lenient_schema.LENIENT.read_bytes()


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.schema.json")), ids=lambda path: path.name)
def test_schema_is_of_draft_2020_12_and_on_the_page(path: Path) -> None:
    schema = json.loads(path.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert f"]({path.name})" in HUB_PAGE


@pytest.mark.parametrize(
    "changes",
    [
        {"disks": []},
        {"agent_version": "1" * 1000},
        {"guests": [{**GUEST, "disks": []}]},
        {"guests": [{**GUEST, "type": "oci"}]},
        {"guests": [{**GUEST, "status": "x"}]},
        {"guests": [{name: GUEST[name] for name in GUEST if name != "spec"}]},
        {"guests": [{name: GUEST[name] for name in GUEST if name != "tags"}]},
    ],
    ids=lambda changes: str(changes)[:20],
)
def test_only_the_lenient_schema_takes_what_a_later_agent_may_say(changes: Any) -> None:
    assert problems(STRICT, {**EXAMPLE, **changes})
    assert problems(LENIENT, {**EXAMPLE, **changes}) == []


@pytest.mark.parametrize("schema", [STRICT, LENIENT], ids=["strict", "lenient"])
def test_both_schemas_take_a_report_and_refuse_other_types(schema: Any) -> None:
    assert problems(schema, EXAMPLE) == []
    for name, value in (("guests", None), ("host", {}), ("host_id", 1), ("backups", {})):
        assert problems(schema, {**EXAMPLE, name: value})
    assert problems(schema, {name: EXAMPLE[name] for name in EXAMPLE if name != "backups"})


@pytest.mark.parametrize("name", ["backups", "minimal", "qemu", "storage", "unknown-guest"])
def test_hub_takes_a_report_from_before_details_and_tasks(name: str) -> None:
    body = (COMPAT / f"{name}.json").read_bytes()
    assert problems(BEFORE_DETAILS, json.loads(body)) == []
    assert example_hub.parse_report(body) == json.loads(body)


def test_without_extras_the_report_is_what_it_was(plain_node: lab.SimulatedNode) -> None:
    for report in (make_report(), make_collector(plain_node).collect()):
        assert problems(BEFORE_DETAILS, json.loads(report.to_json())) == []


# ---- README.md -----------------------------------------------------------------------------------


def test_configuration_table_has_the_defaults() -> None:
    sections: dict[str, Any] = {
        "proxmox": agent.ProxmoxConfig(node="the short host name"),
        "hub": agent.HubConfig(),
        "cloudflared": agent.CloudflaredConfig(),
    }
    rows = {row[0].strip("`"): row[2] for row in table(README, "key")}
    del rows["authz"]
    required = {key for key, shown in rows.items() if shown == "required"}
    secrets = {"proxmox.token_secret", "hub.api_key"}
    assert required == {*secrets, "proxmox.token_id", "hub.url", "hub.host_id"}
    for key in rows.keys() - required:
        section, _, name = key.partition(".")
        default = getattr(sections[section], name)
        if not isinstance(default, str) or not default:
            default = json.dumps(default)
        assert rows[key].removesuffix(": the system's CAs").strip("`") == default


def test_privileges_table_has_every_call(plain_node: lab.SimulatedNode) -> None:
    collector = make_collector(plain_node, extras=EXTRAS)
    collector.proxmox.version()
    collector.collect(is_selftest=True)
    asked = set()
    for request in plain_node.requests:
        path = request.path.removeprefix("/api2/json").partition("?")[0]
        path = path.replace("/nodes/pve1", "/nodes/NODE")
        path = re.sub(r"/(lxc|qemu)/\d+", r"/\1/VMID", path)
        asked.add(re.sub(r"/storage/\w+/", "/storage/STORAGE/", path))
    rows = table(README, "call (all are GET)")
    assert {call for row in rows for call in row[0].split("`")[1::2]} == asked


def test_every_command_of_the_build_script_exists() -> None:
    usage = subprocess.run(
        [ROOT / "build.sh", "help"], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    named = set(re.findall(r"\./build\.sh (\w+)", README))
    assert named - {"help"} <= set(re.findall(r"\./build\.sh (\w+)", usage))


def test_version_is_the_one_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"## \[(\d+\.\d+\.\d+)\]", changelog)[0] == agent.__version__


# ---- docs/hub.md ---------------------------------------------------------------------------------


def test_page_names_the_limits_of_agent_and_example() -> None:
    tolerance = example_hub.TOLERANCE_SECONDS
    for text in (
        f"POST {{hub.url}}{agent.REPORT_PATH}",
        f"User-Agent: felhom-agent/{agent.__version__}",
        f"{agent.MIN_POLL_SECONDS} to {agent.MAX_POLL_SECONDS}",
        f"I + {tolerance // 60} minutes",
        f"{example_hub.MAX_BODY_BYTES >> 20} MiB",
        f"{tolerance} s more (`--tolerance`",
        f"[why {tolerance}](#a-missed-heartbeat)",
    ):
        assert text in HUB_PAGE


def test_rules_watch_the_job_that_the_page_tells_to_scrape() -> None:
    rules = (ROOT / "examples" / "prometheus-rules.yml").read_text("utf-8")
    [job] = re.findall(r"job_name: (\S+)", HUB_PAGE)
    assert set(re.findall(r'job="(\w+)"', rules)) == {job}


# ---- every page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_lines_but_tables_fit(page: Path) -> None:
    text = page.read_text("utf-8")
    for path, anchor in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text("utf-8").lower())
            assert anchor in [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings]
    assert [line for line in text.split("\n") if len(line) > 100 and line[0] != "|"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_lines_parse(page: Path) -> None:
    for block in re.findall(r"(?ms)^ *```sh\n(.*?)^ *```$", page.read_text("utf-8")):
        done = subprocess.run(
            ["sh", "-n"], input=block, capture_output=True, text=True, timeout=10, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), block
