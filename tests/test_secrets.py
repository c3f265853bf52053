"""The two secrets are in nothing that the agent shows, and each goes to its own server only.

What single responses bring to light is in test_faults.py; here are other servers and the process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import felhom_agent as agent
import lab
from faults import API_KEY, TOKEN_SECRET, find_secrets, show_error
from support import MODULE, Daemon, make_hub_client, make_report, raw_server

# ---- other servers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 407 No\r\n\r\n",
        b"HTTP/1.1 302 No\r\nLocation: /\r\n\r\n",
        b"",
    ],
    ids=["200", "407", "302", "ends its side"],
)
def test_proxy_gets_no_secret(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but CONNECT, and after 200 the beginning of a TLS handshake."""
    received = b""

    def talk(connection: socket.socket) -> None:
        nonlocal received
        connection.settimeout(10)
        received = connection.recv(65536)
        connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            received += piece

    with raw_server(talk) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        url = "https://hub.example.com"
        client = make_hub_client(lab.SimulatedHub(None), url=url, api_key=API_KEY)
        with pytest.raises(agent.TransportError) as caught:
            client.report(make_report())
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"CONNECT hub.example.com:443 HTTP/1.1\r\n")
    assert rest[:1] == (b"\x16" if b"200" in reply else b"")
    assert find_secrets(received.decode("latin-1")) == []
    assert find_secrets(show_error(caught.value)) == []


# ---- the process ---------------------------------------------------------------------------------


@pytest.fixture
def planted(
    write_config: Callable[..., Path], node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> Path:
    """A configuration with the two secrets, for a node and a hub that send them back."""
    node.token_secret, hub.api_key = TOKEN_SECRET, API_KEY
    node.script("/nodes/pve1/lxc/100", lab.Forever(lab.Reply(500, TOKEN_SECRET)))
    hub.envelope = {"poll_interval_seconds": f"Bearer {API_KEY}", "blocked": API_KEY}
    return write_config()


def test_daemon_shows_no_secret_to_anybody(
    planted: Path, tmp_path: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> None:
    document = json.loads(planted.read_text("utf-8"))
    # So that there is something that systemctl must not inherit.
    variables = {"FELHOM_AGENT_HUB_API_KEY": document["hub"].pop("api_key")}
    planted.write_text(json.dumps(document), "utf-8")
    systemctl = "cat /proc/$PPID/cmdline /proc/$$/cmdline /proc/$$/environ >>seen; echo active"
    with Daemon(
        *(tmp_path, planted, "--log-level=debug"), systemctl=systemctl, environment=variables
    ) as daemon:
        assert "accepted" in daemon.await_cycle()
        hub.script("", lab.Reply(500, API_KEY), lab.Reply(302, headers={"Location": API_KEY}))
        node.script("/nodes/pve1/status", *[lab.Usual()] * 2, lab.Reply(403, TOKEN_SECRET))
        for _ in range(3):
            daemon.step()
        process = Path(f"/proc/{daemon.process.pid}")
        for name in ("cmdline", "status", "maps", "comm"):
            assert find_secrets((process / name).read_text("latin-1")) == [], name
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(10) == 0
        daemon.receive_status()
    assert len(daemon.notified) > 4
    assert find_secrets("".join(daemon.notified)) == []
    assert find_secrets(repr(hub.requests), [TOKEN_SECRET]) == []
    assert find_secrets(repr(node.requests), [API_KEY]) == []
    assert (tmp_path / "seen").stat().st_size > 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != planted:
            assert find_secrets(path.read_text("latin-1")) == [], path.name
    log = daemon.log.read_text("utf-8")
    assert all(f" {status} " in log for status in (500, 302, 403))


@pytest.mark.parametrize("selftest", ["config", "proxmox", "hub"])
@pytest.mark.parametrize("broken", ["nothing", "node", "hub"])
def test_selftest_shows_no_secret(
    planted: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub, selftest: str, broken: str
) -> None:
    if broken == "node":
        node.script("", lab.Forever(lab.Reply(403, f"{TOKEN_SECRET}: no")))
    elif broken == "hub":
        hub.script("", lab.Forever(lab.Reply(403, f"{API_KEY}, {TOKEN_SECRET}: no")))
    options = ["--config", str(planted), f"--selftest={selftest}", "--log-level=debug"]
    done = subprocess.run(
        [sys.executable, str(MODULE), *options],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert find_secrets(done.stdout + done.stderr) == []
