"""The two secrets are in nothing that the agent says, and go to nobody but the server each is meant for."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import faults
import felhom_agent as agent
import lab
from support import LOG, REPORT, hub_config, proxmox_config, raw_server

ANYWHERE = (faults.TOKEN_SECRET, faults.API_KEY)


def written(secret: str) -> set[str]:
    """What gives the secret away: itself, and each piece of it between the characters that are written differently elsewhere.

    Not asked of the agent itself. Base64 is looked for at each of the three offsets at which the secret may stand in what is encoded.
    """
    encoded = secret.encode()
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], urllib.parse.quote(secret), urllib.parse.quote(secret, "")}
    forms |= {urllib.parse.quote_plus(secret), secret.encode().hex(), re.sub("(.)", lambda m: f"\\u{ord(m[1]):04x}", secret)}
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        forms |= {encode(b"x" * offset + encoded).decode().rstrip("=")[4 if offset else 0 : -1] for offset in range(3)}
    return forms | {piece for piece in re.findall("[a-z0-9]+", secret) if piece not in ("hub", "secret")}


def found(secrets: Sequence[str], text: str) -> list[str]:
    return [form for secret in secrets for form in written(secret) if form in text]


@pytest.mark.parametrize("secret", ANYWHERE)
@pytest.mark.parametrize("write", [str, repr, json.dumps, urllib.parse.quote, lambda secret: base64.b64encode(secret.encode()).decode()])
def test_search_finds_what_it_looks_for(secret: str, write: Callable[[str], str]) -> None:
    assert found([secret], f"log line: {write(secret)} and so on")


# --- the fault table ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", faults.FAULTS, ids=[fault.name for fault in faults.FAULTS])
def test_fault_brings_no_secret_to_light(fault: faults.Fault, certificates: lab.Certificates, hub_certificates: lab.Certificates) -> None:
    walk = faults.walk(fault, certificates, hub_certificates)
    assert walk.strays == 0
    for visit in walk.visits:
        for line in visit.said:
            assert found(ANYWHERE, line) == [], visit.place
        assert found([faults.API_KEY], visit.to_node) == [], visit.place
        assert found([faults.TOKEN_SECRET], visit.to_hub) == [], visit.place


@pytest.mark.parametrize("fault", faults.FAULTS, ids=[fault.name for fault in faults.FAULTS])
def test_fault_forges_no_line(fault: faults.Fault, certificates: lab.Certificates, hub_certificates: lab.Certificates) -> None:
    for visit in faults.walk(fault, certificates, hub_certificates).visits:
        for line in visit.logged:
            assert line.isprintable(), visit.place
            assert len(line) < 5000, visit.place


# --- other servers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 407 No\r\n\r\n", b"HTTP/1.1 302 No\r\nLocation: /\r\n\r\n", b""])
def test_proxy_gets_no_secret(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        connection.settimeout(3)
        received.append(connection.recv(65536))
        connection.sendall(answer)
        received.append(connection.recv(65536))  # where it let us through, the ClientHello

    with raw_server(talk) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        config = hub_config(lab.SimulatedHub(None), url="https://hub.example.com", api_key=faults.API_KEY, timeout_seconds=1)
        with pytest.raises(agent.TransportError) as error:
            agent.HubClient(config, logger=LOG).report(REPORT)
    assert received[0].startswith(b"CONNECT hub.example.com:443 ")
    assert found(ANYWHERE, b"".join(received).decode("latin-1")) == []
    assert found(ANYWHERE, "".join(traceback.format_exception(error.value))) == []


@pytest.mark.parametrize("section", ["proxmox", "hub"])
def test_server_with_a_wrong_certificate_gets_no_secret(section: str, certificates: lab.Certificates, tmp_path: Path) -> None:
    other = lab.make_certificates(tmp_path)  # of another CA
    with lab.SimulatedNode(certificates) as node, lab.SimulatedHub(certificates) as hub:
        proxmox = agent.ProxmoxClient(proxmox_config(node, ca_file=str(other.ca_file)))
        client = agent.HubClient(hub_config(hub, ca_file=str(other.ca_file)), logger=LOG)
        with pytest.raises(agent.TransportError):
            client.report(REPORT) if section == "hub" else proxmox.node_status()
        assert node.requests == hub.requests == []


# --- the process --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(write_config: Callable[..., Path], node: lab.SimulatedNode, hub: lab.SimulatedHub) -> Path:
    """A configuration with the two secrets, for a node and a hub that echo them where they can."""
    node.token_secret, hub.api_key = ANYWHERE
    for guest in node.guests[:3]:
        guest.name = guest.config["hostname"] = f"{faults.TOKEN_SECRET} {base64.b64encode(faults.TOKEN_SECRET.encode()).decode()}"
    hub.envelope = {"poll_interval_seconds": f"Bearer {faults.API_KEY}", "blocked": faults.API_KEY}
    return write_config()


def test_daemon_shows_no_secret_to_anybody(planted: Path, tmp_path: Path, hub: lab.SimulatedHub) -> None:
    document = json.loads(planted.read_text("utf-8"))
    variables = {"FELHOM_AGENT_HUB_API_KEY": document["hub"].pop("api_key")}  # so that there is something that systemctl must not get
    planted.write_text(json.dumps(document), "utf-8")
    systemctl = "cat /proc/$PPID/cmdline /proc/$$/cmdline /proc/$$/environ >>seen; echo active"
    with faults.Daemon(tmp_path, planted, systemctl=systemctl, environment=variables) as running:
        assert "accepted" in running.await_cycle()
        hub.script("", lab.Reply(500, f"no such key: {faults.API_KEY}"), lab.Reply(302, headers={"Location": f"/{faults.API_KEY}"}))
        for _ in range(3):
            running.step()
        for name in ("cmdline", "status", "maps", "comm"):
            assert found(ANYWHERE, Path(f"/proc/{running.process.pid}/{name}").read_text("latin-1")) == [], name
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(3) == 0
    assert len(running.told) > 4
    assert found(ANYWHERE, "".join(running.told)) == []
    assert found([faults.TOKEN_SECRET], repr(hub.requests)) == []
    assert (tmp_path / "seen").stat().st_size > 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != planted:
            assert found(ANYWHERE, path.read_text("latin-1")) == [], path.name
    assert {path.name for path in tmp_path.rglob("*")} == {"agent.json", "commands", "log", "notify", "seen", "systemctl"}


@pytest.mark.parametrize("selftest", ["config", "proxmox", "hub"])
@pytest.mark.parametrize("broken", ["nothing", "node", "hub"])
def test_selftest_shows_no_secret(selftest: str, broken: str, planted: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
    servers: dict[str, tuple[lab.Server, str]] = {"node": (node, faults.TOKEN_SECRET), "hub": (hub, faults.API_KEY)}
    if broken in servers:
        server, secret = servers[broken]
        server.script("", lab.Forever(lab.Reply(403, f"{secret}: no")))
    command = [sys.executable, agent.__file__, "--config", str(planted), f"--selftest={selftest}", "--log-level=debug"]
    ended = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 1)
    assert found(ANYWHERE, ended.stdout + ended.stderr) == []


@pytest.mark.parametrize("section", ["proxmox", "hub"])
def test_secret_that_is_refused_is_not_shown(section: str, planted: Path) -> None:
    document = json.loads(planted.read_text("utf-8"))
    key = {"proxmox": "token_secret", "hub": "api_key"}[section]
    document[section][key] += " \n"
    planted.write_text(json.dumps(document), "utf-8")
    config = agent.load_config(str(planted), {})
    with pytest.raises(agent.ConfigError) as error:
        config.validate()
    assert f"{section}.{key}: " in str(error.value)
    said = "".join(traceback.format_exception(error.value)) + repr(config) + repr(error.value) + json.dumps(config.redacted())
    assert found(ANYWHERE, said) == []
