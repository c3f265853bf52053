"""README.md and docs/ say what the module does: tables, commands, links, messages."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
from support import make_collector, make_hub_client

ROOT: Final = Path(__file__).parent.parent
README: Final = (ROOT / "README.md").read_text("utf-8")
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


def refused(code: int) -> ssl.SSLCertVerificationError:
    exc = ssl.SSLCertVerificationError(1, "certificate verify failed")
    exc.verify_code = code
    return exc


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
    failures: list[Exception] = [
        *(refused(code) for code in (62, 10, 20)),
        ssl.SSLError("TLS"),
        TimeoutError("timed out"),
        socket.gaierror("no such name"),
        ConnectionRefusedError("refused"),
    ]
    hints = {*proxmox.hints.values(), *hub.hints.values()}
    hints |= {client.failure_hint(exc) for client in (proxmox, hub) for exc in failures}
    hints.add(proxmox.failure_hint(agent.PinMismatch("another")))
    return {hint.replace("(9)", "(SECONDS)") for hint in hints}


def test_messages_page_has_every_hint_word_for_word() -> None:
    page = MESSAGES.replace("`", "")
    assert sorted(hint for hint in all_hints() if hint not in page) == []


def test_configuration_table_has_every_key_with_its_default() -> None:
    sections: dict[str, Any] = {
        "proxmox": agent.ProxmoxConfig(node="the short host name"),
        "hub": agent.HubConfig(),
        "cloudflared": agent.CloudflaredConfig(),
    }
    keys = {
        f"{name}.{item.name}": getattr(section, item.name)
        for name, section in sections.items()
        for item in dataclasses.fields(section)
    }
    required = {"token_id", "token_secret", "host_id", "api_key", "hub.url"}
    documented = {row[0].strip("`"): row[2] for row in table("key")}
    assert documented.keys() == keys.keys() | {"authz"}
    for key, default in keys.items():
        shown = documented[key].partition(":")[0] if default == "" else documented[key]
        if key in required or key.partition(".")[2] in required:
            assert shown == "required"
        elif key == "proxmox.node":
            assert shown == default
        else:
            expected = (
                json.dumps(default) if not isinstance(default, str) or not default else default
            )
            assert documented[key].split("`")[1] == expected


def test_privileges_table_has_every_call(plain_node: lab.SimulatedNode) -> None:
    collector = make_collector(plain_node, extras=("qemu", "storage", "backups"))
    collector.proxmox.version()
    collector.collect(thorough=True)
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
