"""README.md and docs/ say what the module does: tables, commands, links, messages."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
import test_config
import test_report
from support import EXTRAS, make_collector, make_hub_client

ROOT: Final = Path(__file__).parent.parent
README: Final = (ROOT / "README.md").read_text("utf-8")
HUB_PAGE: Final = (ROOT / "docs" / "hub.md").read_text("utf-8")
SCHEMA: Final = (ROOT / "docs" / "host-report.schema.json").read_text("utf-8")
EXAMPLE: Final = json.loads((ROOT / "docs" / "host-report.example.json").read_text("utf-8"))
MESSAGES: Final = (ROOT / "docs" / "messages.md").read_text("utf-8")
PAGES: Final = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def table(heading: str) -> list[list[str]]:
    """The cells of each row of README's table with this first heading."""
    lines = README.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# ---- what has several places ---------------------------------------------------------------------


def compare(names: set[str], places: dict[str, set[str]]) -> None:
    """Fail with a line for each name that is only in the module or only in another place."""
    missing = [f"{name} is not in {place}" for place in places for name in names - places[place]]
    missing += [f"{name} is only in {place}" for place in places for name in places[place] - names]
    assert not missing, "\n".join(missing)


def test_extra_is_in_every_place() -> None:
    [row] = [row for row in table("key") if row[0] == "`proxmox.extras`"]
    [paragraph] = re.findall(r"(?ms)^\*\*Extras\*\*.*?^$", README)
    forms = {
        "EXTRAS in tests/support.py": (str(EXTRAS), "'{}'"),
        "proxmox.extras in README.md": (row[3], "`{}`"),
        "Extras in README.md": (paragraph, "(`{}`)"),
        "docs/hub.md": (HUB_PAGE, "`{}`"),
        "docs/host-report.schema.json": (SCHEMA, "the extra {}"),
    }
    missing = [
        f"{extra} is not in {place}"
        for extra in agent.EXTRAS
        for place, (text, form) in forms.items()
        if form.format(extra) not in text
    ]
    assert not missing, "\n".join(missing)
    assert set(EXTRAS) == set(agent.EXTRAS)


def test_setting_is_in_every_place() -> None:
    places = {
        "the table in README.md": {row[0].strip("`") for row in table("key")} - {"authz"},
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


def find_described(schema: Any, part: Any, prefix: str = "") -> Iterator[str]:
    """Yield the fields that a schema describes in the same way."""
    part = schema["$defs"].get(str(part.get("$ref")).rpartition("/")[2], part)
    yield from find_described(schema, part["items"], prefix) if "items" in part else ()
    for name, inner in part.get("properties", {}).items():
        yield prefix + name
        yield from find_described(schema, inner, f"{prefix}{name}.")


def test_field_of_the_report_is_in_every_place() -> None:
    def names(part: Any) -> set[str]:
        return {item.name for item in dataclasses.fields(part)}

    guest = dict.fromkeys(names(agent.Guest) - {"details"} | names(agent.GuestDetails))
    report = {
        **dict.fromkeys(names(agent.HostReport)),
        "host": dict.fromkeys(names(agent.HostMetrics)),
        "guests": {**guest, "spec": dict.fromkeys(names(agent.GuestSpec))},
        "cloudflared": dict.fromkeys(names(agent.Cloudflared)),
        "storage_targets": dict.fromkeys(names(agent.StorageTarget)),
        "backups": dict.fromkeys(names(agent.Backup)),
        "audit_tail": dict.fromkeys(names(agent.AuditEntry)),
    }
    fields = set(find_fields(report))
    schema = json.loads(SCHEMA)
    described = set(find_described(schema, schema))
    # Both are empty in this version.
    described -= {name for name in described if re.match(r"(restore_tests|pbs_snapshots)\.", name)}
    places = {
        "docs/host-report.schema.json": described,
        "docs/host-report.example.json": set(find_fields(EXAMPLE)),
        # It is without extras.
        "EXAMPLE in tests/test_report.py": {
            *find_fields(test_report.EXAMPLE),
            *(field for field in fields if not field.startswith("host.")),
        },
    }
    compare(fields, places)


def test_every_field_is_required_but_spec_and_details() -> None:
    optional: set[str] = set()

    def note(part: dict[str, Any]) -> dict[str, Any]:
        if part.get("type") == "object":
            optional.update(part["properties"].keys() - set(part["required"]))
        return part

    json.loads(SCHEMA, object_hook=note)
    assert optional == {"spec", *(item.name for item in dataclasses.fields(agent.GuestDetails))}


def test_example_report_is_one_of_this_agent_with_all_extras() -> None:
    errors = lab.report_schema().iter_errors(EXAMPLE)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []
    assert EXAMPLE["agent_version"] == agent.__version__
    assert {guest["type"] for guest in EXAMPLE["guests"]} == {"lxc", "qemu"}
    assert all("template" in guest for guest in EXAMPLE["guests"])


# ---- messages ------------------------------------------------------------------------------------


def all_hints() -> set[str]:
    """What the agent says to do, with the words that docs/messages.md has for what varies."""
    proxmox = agent.ProxmoxClient(
        agent.ProxmoxConfig(
            node="NODE", token_id="USER!TOKEN", token_secret="token-of-this-test", timeout_seconds=9
        )
    )
    hub = agent.HubClient(
        agent.HubConfig(url="https://h", host_id="x", api_key="key-of-this-test", timeout_seconds=9)
    )
    hints = {client.hint(cause) for client in (proxmox, hub) for cause in client.hints}
    return {hint.replace("(9)", "(SECONDS)") for hint in hints}


def test_messages_page_has_every_hint_word_for_word() -> None:
    page = MESSAGES.replace("`", "")
    assert sorted(hint for hint in all_hints() if hint not in page) == []


# ---- tables --------------------------------------------------------------------------------------


def test_configuration_table_has_the_defaults() -> None:
    sections: dict[str, Any] = {
        "proxmox": agent.ProxmoxConfig(node="the short host name"),
        "hub": agent.HubConfig(),
        "cloudflared": agent.CloudflaredConfig(),
    }
    required = {"proxmox.token_id", "proxmox.token_secret"}
    required |= {"hub.url", "hub.host_id", "hub.api_key"}
    rows = {row[0].strip("`"): row[2] for row in table("key")}
    del rows["authz"]
    assert {key for key, shown in rows.items() if shown == "required"} == required
    for key in rows.keys() - required:
        section, _, name = key.partition(".")
        default = getattr(sections[section], name)
        if not isinstance(default, str) or not default:
            default = json.dumps(default)
        assert rows[key].partition(":" if default == '""' else "\n")[0].strip("`") == default


def test_privileges_table_has_every_call(plain_node: lab.SimulatedNode) -> None:
    collector = make_collector(plain_node, extras=EXTRAS)
    collector.proxmox.version()
    collector.collect(check_all_paths=True)
    paths = {request.path.removeprefix("/api2/json") for request in plain_node.requests}
    asked = {
        re.sub(
            r"/storage/\w+/",
            "/storage/STORAGE/",
            re.sub(r"/(lxc|qemu)/\d+", r"/\1/VMID", path.partition("?")[0]),
        ).replace("/nodes/pve1", "/nodes/NODE")
        for path in paths
    }
    documented = {call for row in table("call (all are GET)") for call in row[0].split("`")[1::2]}
    assert documented == asked


def test_selftest_table_has_every_mode() -> None:
    documented = {row[0].strip("`").rpartition("=")[2] for row in table("command")}
    assert documented == {"config", "proxmox", "hub"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_lines_but_tables_fit(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors
    too_long = [line for line in text.split("\n") if len(line) > 100 and line[0] != "|"]
    assert too_long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_lines_parse(page: Path) -> None:
    blocks = re.findall(r"(?ms)^ *```sh\n(.*?)^ *```$", page.read_text("utf-8"))
    for block in blocks:
        done = subprocess.run(
            ["sh", "-n"], input=block, capture_output=True, text=True, timeout=10, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), block


def test_every_command_of_the_build_script_exists() -> None:
    usage = subprocess.run(
        [ROOT / "build.sh", "help"], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    named = set(re.findall(r"\./build\.sh (\w+)", README))
    assert named - {"help"} <= set(re.findall(r"\./build\.sh (\w+)", usage))


def test_version_is_the_one_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    released = re.search(r"## \[(\d+\.\d+\.\d+)\]", changelog)
    assert released
    assert released[1] == agent.__version__


def test_hub_gets_what_the_readme_promises(plain_hub: lab.SimulatedHub) -> None:
    """The shortened report of the first screen has no field that a report lacks."""
    start = README.index('{\n  "host_id"')
    shown = json.loads(README[start : README.index("```", start)])
    with lab.SimulatedNode(None) as node:
        report = make_collector(node).collect()
    make_hub_client(plain_hub).report(report)
    sent = plain_hub.reports[0]
    assert isinstance(sent["host"], dict)
    assert shown.keys() <= sent.keys()
    assert shown["host"].keys() <= sent["host"].keys()
