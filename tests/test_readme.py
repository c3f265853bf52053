"""The README says what the code does: its examples, tables and figures are held against the module."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import faults
import felhom_agent as agent
import lab
from support import Prober, build_collector

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(header: str) -> list[list[str]]:
    """The rows of the table that begins with `header`, each as its cells."""
    lines = README[README.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_example_report_is_what_the_agent_sends(certificates: lab.Certificates) -> None:
    guests = [
        lab.Guest(vmid=100, name="web", config=lab.usual_config(100, "web", cores=2)),
        lab.Guest(vmid=101, name="db", config=lab.usual_config(101, "db"), vanished=True),
    ]
    with lab.SimulatedNode(certificates, guests=guests) as node:
        sent = json.loads(build_collector(node, Prober("unknown")).collect().to_json())
    example = json.loads(blocks("json")[0])
    assert example | {"reported_at": sent["reported_at"]} == sent


def test_example_configuration_is_what_the_selftest_prints() -> None:
    environ = {"FELHOM_AGENT_PROXMOX_CA_FILE": "/etc/pve/pve-root-ca.pem", "FELHOM_AGENT_PROXMOX_NODE": "pve1"}
    environ |= {"FELHOM_AGENT_PROXMOX_TOKEN_SECRET": "a-secret", "FELHOM_AGENT_HUB_API_KEY": "a-key"}
    config = agent.load_config(str(ROOT / "agent.example.json"), environ)
    assert json.loads(blocks("json")[1]) == config.redacted()


def test_configuration_table_has_every_key_with_its_default() -> None:
    shown = {key.strip("`"): default for key, _, default, _ in table("key")}
    for section in (agent.ProxmoxConfig, agent.HubConfig, agent.CloudflaredConfig):
        for item in dataclasses.fields(section):
            default = shown.pop(f"{section.section}.{item.name}")
            assert default.startswith(
                (f"`{item.default}`", "required", "the short host name") if item.default else ('`""`', "required", "the")
            )
    assert shown == {"authz": "`{}`"}


NAMES = {"section": "SECTION", "server": "SERVER", "daemon": "DAEMON", "user": "USER", "node": "NODE", "nodes": "NODES"}
MENDS = [agent.ProxmoxClient.mends, agent.OTHER_NODE_MENDS, agent.HubClient.mends]
MENDS += [{client.misfit: agent.NOT_THIS} for client in (agent.ProxmoxClient, agent.HubClient)]


@pytest.mark.parametrize("mends", MENDS, ids=["proxmox", "other-node", "hub", "not-proxmox", "not-the-hub"])
def test_message_table_has_every_mend_beside_its_message(mends: Mapping[str, str]) -> None:
    rows = [(re.findall("`([^`]+)`", messages), mend) for messages, _, mend in table("message")]
    for words, mend in mends.items():
        assert [messages for messages, said in rows if said == mend.format(**NAMES) and any(each.startswith(words) for each in messages)]


def test_message_table_has_no_mend_of_its_own() -> None:
    known = {mend.format(**NAMES) for mends in MENDS for mend in mends.values()}
    grant = agent.GRANT.format(user="USER")
    assert {mend for _, _, mend in table("message")} - known == {f"{grant} && pveum user token modify USER NAME --privsep 0"}


def test_message_table_has_every_failure() -> None:
    messages = " ".join(message for message, _, _ in table("message"))
    assert [words for _, words in agent.FAILURES if f"`{words}`" not in messages] == []


def test_privileges_table_has_every_call(node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
    node.guests[:] = [guest for guest in node.guests if guest.vmid == 100]
    environment = {**os.environ, **lab.environment(node, hub)}
    subprocess.run([sys.executable, str(ROOT / "felhom_agent.py"), "--selftest=proxmox"], env=environment, check=True, capture_output=True)
    calls = {call.strip("`").replace("NODE", "pve1").replace("VMID", "100") for call, _, _ in table("call (all are GET)")}
    assert {request.path.removeprefix("/api2/json") for request in node.requests} == calls


def test_hub_of_the_readme_takes_a_report(node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (example,) = blocks("python")
    with subprocess.Popen(
        [sys.executable, "-u", "-c", example.replace("8080", str(port))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            environment = {**os.environ, **lab.environment(node, hub)}
            environment |= {"FELHOM_AGENT_HUB_URL": f"http://127.0.0.1:{port}", "FELHOM_AGENT_HUB_HOST_ID": "pve1"}
            environment |= {"FELHOM_AGENT_HUB_API_KEY": "example-key"}
            command = [sys.executable, str(ROOT / "felhom_agent.py"), "--selftest=hub"]
            for _ in range(50):  # until it listens: a refused try takes a fraction of a second
                ended = subprocess.run(command, env=environment, capture_output=True, text=True)
                if ended.returncode == 0:
                    break
            assert json.loads(ended.stdout)["envelope"]["poll_interval_seconds"] == 300
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["host_id"] == "pve1"
        finally:
            process.kill()


def test_version_is_the_one_of_the_module() -> None:
    assert set(re.findall(r'(?:agent_version": "|felhom-agent/|version )(\d+\.\d+\.\d+)', README)) == {agent.__version__}
    assert f"## [{agent.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_call_of_the_build_script_exists() -> None:
    usage = subprocess.run([str(ROOT / "build.sh"), "help"], check=True, capture_output=True, text=True).stdout
    for call in re.findall(r"\./build\.sh (\w+)", README):
        assert f"./build.sh {call} " in usage


def test_fault_count_is_the_one_of_the_table() -> None:
    assert f"{faults.COUNT} combinations of fault and place" in " ".join(README.split())
