"""Makes README's picture of the example hub: docs/hub-light.png and docs/hub-dark.png.

    ./build.sh screenshot

Two simulated nodes report to examples/hub.py, one of them falls silent, and Chromium takes pictures
of the page.  No test needs it.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import felhom_agent as agent
import lab
from support import Prober

ROOT: Final = Path(__file__).parent.parent
EXTRAS: Final = ("qemu", "storage", "backups", "details")
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
THEMES: Final = {"light": "1", "dark": "0"}


def container(vmid: int, name: str, status: str = "running") -> lab.Guest:
    return lab.Guest(vmid, name, status, lab.usual_config(vmid, name, cores=2, onboot=1))


def machine(vmid: int, name: str) -> lab.Guest:
    config = {"name": name, "onboot": 1, "scsi0": f"local:vm-{vmid}-disk-0,size=32G"}
    return lab.Guest(vmid, name, config=config, type="qemu")


def storage(name: str, share: float, *guests: lab.Guest) -> lab.Storage:
    """A storage that is full to this share, with last night's backups of these guests."""
    total = 2 << 40
    last_night = int(time.time()) - 7 * 3600
    backups = []
    for guest in guests:
        archive = f"vzdump-{guest.type}-{guest.vmid}-2026_11_30-02_00_03.tar.zst"
        volid = f"{name}:backup/{archive}"
        backups.append(lab.backup(volid, last_night, guest.vmid, guest.type))
    return lab.Storage(name, total_bytes=total, used_bytes=int(share * total), backups=backups)


def simulated_node(number: int, days: int, cpu: float, memory: float) -> lab.SimulatedNode:
    """A node that has been up for so many days."""
    node = lab.SimulatedNode(None, name=f"pve{number}", guests=[])
    node.status["uptime"] = days * 86400
    node.status["memory"] = {"total": 64 << 30, "used": int(memory * (64 << 30))}
    node.resources["cpu"] = cpu
    return node


def fleet() -> list[lab.SimulatedNode]:
    first = simulated_node(1, days=41, cpu=0.17, memory=0.58)
    first.guests = [container(101, "nextcloud"), container(102, "gitea", "stopped")]
    first.vms = [machine(200, "haos")]
    first.storages = [storage("nas", 0.93, *first.guests, *first.vms)]

    second = simulated_node(2, days=12, cpu=0.06, memory=0.31)
    second.guests = [container(110, "mail"), container(111, "web"), container(112, "pihole")]
    second.storages = [storage("backup", 0.41, *second.guests)]
    return [first, second]


def report_once(node: lab.SimulatedNode, url: str, key: str) -> None:
    """Send a node's report, as its agent would."""
    prober = Prober("active" if node.name == "pve1" else "inactive")
    with node:
        sections = lab.configuration(node, lab.SimulatedHub(None))
        proxmox: dict[str, Any] = {**sections["proxmox"], "extras": EXTRAS}
        client = agent.ProxmoxClient(agent.ProxmoxConfig(**proxmox))
        report = agent.Collector(client, prober, host_id=node.name).collect()
    agent.HubClient(agent.HubConfig(url=url, host_id=node.name, api_key=key)).report(report)


def fall_silent(database: Path, host_id: str) -> None:
    """Date a host's last report back, as if the hub had told somebody that it is overdue."""
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE hosts SET received_at = received_at - 1500, due_at = due_at - 1500,"
            " told = 'overdue', told_at = received_at - 840 WHERE host_id = ?",
            [host_id],
        )


def take_pictures(url: str, folder: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("needs chromium: apt install chromium")
    for theme, scheme in THEMES.items():
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
    keys = {node.name: f"key of {node.name}".replace(" ", "-") for node in nodes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "keys.json").touch(mode=0o600)
        (folder / "keys.json").write_text(json.dumps(keys), "utf-8")
        program = str(ROOT / "examples" / "hub.py")
        command = [sys.executable, program, "--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as hub:
            try:
                assert hub.stderr
                lines = iter(hub.stderr.readline, "")
                url = next(found[0] for line in lines if (found := re.search("http://.*", line)))
                for node in nodes:
                    report_once(node, url.rstrip("/"), keys[node.name])
                fall_silent(folder / "hub.sqlite3", "pve2")
                take_pictures(url, folder)
            finally:
                hub.terminate()


if __name__ == "__main__":
    main()
