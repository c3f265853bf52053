"""What a cycle costs: the agent beside urllib.request and proxmoxer, then the agent's extras.

    ./build.sh bench --guests 10,100,1000 --latency 0.008

Each row is a process of its own; the CPU time is its own too, the wall time includes that of the
simulated node, another Python program.  All peers read /cluster/resources, the node's status and
each container's configuration, and post what they read.  The agent also asks what its token may do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import ssl
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import felhom_agent as agent
import lab
from support import EXTRAS, Prober

CYCLES = 10
Sections = dict[str, dict[str, Any]]


def use_agent(sections: Sections) -> Callable[[], object]:
    proxmox = agent.ProxmoxClient(agent.ProxmoxConfig(**sections["proxmox"]))
    hub = agent.HubClient(agent.HubConfig(**sections["hub"]))
    collector = agent.Collector(proxmox, Prober(), host_id="pve1")
    return lambda: hub.report(collector.collect())


def use_urllib(sections: Sections, get: Callable[[str], Any] | None = None) -> Callable[[], object]:
    """With `get` the node is read with that instead."""
    proxmox, hub = sections["proxmox"], sections["hub"]
    context = ssl.create_default_context(cafile=hub["ca_file"])

    def call(url: str, authorization: str, body: bytes | None = None) -> Any:
        headers = {"Authorization": authorization, "Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            return json.load(response)

    def get_with_urllib(path: str) -> Any:
        token = f"PVEAPIToken={proxmox['token_id']}={proxmox['token_secret']}"
        return call(f"{proxmox['url']}/api2/json/{path}", token)["data"]

    def cycle() -> None:
        read, node = get or get_with_urllib, f"nodes/{proxmox['node']}"
        found = [resources := read("cluster/resources"), read(f"{node}/status")]
        vmids = [entry["vmid"] for entry in resources if entry["type"] == "lxc"]
        found += [read(f"{node}/lxc/{vmid}/config?current=1") for vmid in vmids]
        body = json.dumps(found).encode()
        call(hub["url"] + agent.REPORT_PATH, f"Bearer {hub['api_key']}", body)

    return cycle


def use_proxmoxer(sections: Sections) -> Callable[[], object]:
    proxmox = sections["proxmox"]
    user, _, name = proxmox["token_id"].partition("!")
    # Only ./build.sh bench installs it.
    api = importlib.import_module("proxmoxer").ProxmoxAPI(
        proxmox["url"].removeprefix("https://"),
        user=user,
        token_name=name,
        token_value=proxmox["token_secret"],
        verify_ssl=proxmox["ca_file"],
    )

    def get(path: str) -> Any:
        resource, _, query = path.partition("?")
        return api(resource).get(**dict([query.split("=")] if query else []))

    return use_urllib(sections, get)


PEERS = {"agent": use_agent, "urllib": use_urllib, "proxmoxer": use_proxmoxer}


def measure(peer: str, sections: Sections) -> tuple[float, float]:
    """Return wall and CPU milliseconds of a cycle, the medians without the first."""
    cycle, times = PEERS[peer](sections), []
    for _ in range(1 + CYCLES):
        began, worked = time.perf_counter(), time.process_time()
        cycle()
        times.append((time.perf_counter() - began, time.process_time() - worked))
    wall, cpu = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
    return wall, cpu


def build_node(certificates: lab.Certificates, containers: int, vms: int) -> lab.SimulatedNode:
    """Return a node with two storages that have a backup of each guest, and two without any."""
    node = lab.SimulatedNode(certificates, guests=lab.many_guests(containers))
    node.vms = lab.many_vms(vms)
    node.storages = [lab.Storage("local", "iso"), lab.Storage("local-lvm", "images", "lvmthin")]
    for name in ("bak", "nas"):
        backups = []
        for guest in (*node.guests, *node.vms):
            archive = f"vzdump-{guest.type}-{guest.vmid}-2026_11_24-02_00_03.zst"
            backups.append(
                lab.backup(f"{name}:backup/{archive}", 1_795_485_603, guest.vmid, guest.type)
            )
        node.storages.append(lab.Storage(name, backups=backups))
    return node


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description="Measure a cycle.")
    parser.add_argument("--guests", default="10,100", metavar="N,N", help="default: 10,100")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="default: 0")
    arguments = parser.parse_args()
    counts = map(int, arguments.guests.split(","))
    rows: list[Any] = [(count, 0, peer, ()) for count in counts for peer in PEERS]
    choices = ((), *((extra,) for extra in EXTRAS), EXTRAS)
    rows += [(20, 10, "agent", extras) for extras in choices]
    print(f"Python {sys.version.split()[0]}, the node answers after {arguments.latency:g} s")
    print("  CTs  VMs  peer and extras                 wall ms    CPU ms  connections  requests")
    with tempfile.TemporaryDirectory(prefix="felhom-bench-") as folder:
        certificates = lab.make_certificates(Path(folder), generation="current")
        for containers, vms, peer, extras in rows:
            node = build_node(certificates, containers, vms)
            node.latency_seconds = arguments.latency
            spawn = multiprocessing.get_context("spawn")
            with node, lab.SimulatedHub(certificates) as hub, ProcessPoolExecutor(1, spawn) as pool:
                # To judge a report would take the hub longer than the agent takes to make it.
                hub.script("", lab.Forever(lab.json_reply({})))
                sections = lab.configuration(node, hub)
                sections["proxmox"]["extras"] = extras
                wall, cpu = pool.submit(measure, peer, sections).result()
                totals = node.connections + hub.connections, len(node.requests + hub.requests)
            connections, requests = (total / (1 + CYCLES) for total in totals)
            name = f"{peer} {', '.join(extras)}"
            figures = f"{wall:>10.1f}{cpu:>10.1f}{connections:>13.0f}{requests:>10.0f}"
            print(f"{containers:>5}{vms:>5}  {name:30}{figures}", flush=True)


if __name__ == "__main__":
    main()
