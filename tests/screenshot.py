"""Makes README's picture of the example hub: docs/hub-light.png and docs/hub-dark.png.

Two simulated nodes report to examples/hub.py, one of them falls silent, and Chromium takes pictures
of the page.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import felhom_agent as agent
import lab
from support import Prober, proxmox_config

ROOT: Final = Path(__file__).parent.parent
# As if the hub had already told somebody that this host is overdue.
FALL_SILENT: Final = """
    UPDATE hosts SET received_at = received_at - 1500, due_at = due_at - 1500,
        told = 'overdue', told_at = received_at - 840 WHERE host_id = 'pve2'
"""
# Here Chromium connects to nothing but the page.
BROWSER: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # README shows the picture 840 pixels wide, most screens have more.
    "--window-size=840,446",
    "--force-device-scale-factor=1.5",
)


def guest(vmid: int, name: str, status: str = "running") -> lab.Guest:
    return lab.Guest(vmid, name, status, lab.usual_config(vmid, name, onboot=1))


def simulated_node(
    number: int, cpu: float, memory: float, storage: str, share: float
) -> lab.SimulatedNode:
    node = lab.SimulatedNode(None, name=f"pve{number}", guests=[])
    node.status["memory"] = {"total": 64 << 30, "used": int(memory * (64 << 30))}
    node.resources["cpu"] = cpu
    node.storages = [lab.Storage(storage, total_bytes=100, used_bytes=round(100 * share))]
    return node


def fleet() -> list[lab.SimulatedNode]:
    first = simulated_node(1, cpu=0.17, memory=0.58, storage="nas", share=0.93)
    first.guests = [guest(101, "nextcloud"), guest(102, "gitea", "stopped")]
    first.vms = [lab.Guest(200, "haos", config={"name": "haos", "onboot": 1}, type="qemu")]

    second = simulated_node(2, cpu=0.06, memory=0.31, storage="backup", share=0.41)
    second.guests = [guest(110, "mail"), guest(111, "web"), guest(112, "pihole")]
    return [first, second]


def report_once(node: lab.SimulatedNode, url: str, key: str) -> None:
    prober = Prober("active" if node.name == "pve1" else "inactive")
    with node:
        client = agent.ProxmoxClient(proxmox_config(node, extras=("qemu", "storage", "details")))
        report = agent.Collector(client, prober, host_id=node.name).collect()
    agent.HubClient(agent.HubConfig(url=url, host_id=node.name, api_key=key)).report(report)


def take_pictures(url: str, folder: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("needs chromium: apt install chromium")
    for theme, scheme in (("light", 1), ("dark", 0)):
        picture = ROOT / "docs" / f"hub-{theme}.png"
        options = [
            f"--user-data-dir={folder / theme}",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={picture}",
        ]
        subprocess.run([browser, *BROWSER, *options, url], capture_output=True, check=True)
        print(f"{picture}: {picture.stat().st_size} bytes")


def main() -> None:
    nodes = fleet()
    keys = {node.name: f"key-of-{node.name}" for node in nodes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "keys.json").touch(mode=0o600)
        (folder / "keys.json").write_text(json.dumps(keys), "utf-8")
        command = [sys.executable, str(ROOT / "examples/hub.py"), "--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as hub:
            try:
                assert hub.stderr
                url = re.findall("http://.*", hub.stderr.readline())[0]
                for node in nodes:
                    report_once(node, url.rstrip("/"), keys[node.name])
                with sqlite3.connect(folder / "hub.sqlite3") as database:
                    database.execute(FALL_SILENT)
                take_pictures(url, folder)
            finally:
                hub.terminate()


if __name__ == "__main__":
    main()
