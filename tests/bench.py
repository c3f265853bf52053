"""What a cycle costs the node and the agent, and what each extra adds.

    ./build.sh bench --guests 10,100,1000

Each row is a process of its own; the CPU time is its own too, the wall time includes that of the
simulated node, another Python program.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import felhom_agent as agent
import lab
from support import EXTRAS, Prober

CYCLES = 10


def measure(sections: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Return wall and CPU milliseconds of a cycle, the medians without the first."""
    proxmox = agent.ProxmoxClient(agent.ProxmoxConfig(**sections["proxmox"]))
    hub = agent.HubClient(agent.HubConfig(**sections["hub"]))
    collector = agent.Collector(proxmox, Prober(), host_id="pve1")
    times = []
    for _ in range(1 + CYCLES):
        began, worked = time.perf_counter(), time.process_time()
        hub.report(collector.collect())
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
    counts = map(int, parser.parse_args().guests.split(","))
    rows: list[tuple[int, int, tuple[str, ...]]] = [(count, 0, ()) for count in counts]
    rows += [(20, 10, extras) for extras in ((), *((extra,) for extra in EXTRAS), EXTRAS)]
    print(f"Python {sys.version.split()[0]}")
    print("  CTs  VMs  extras                          wall ms    CPU ms  connections  requests")
    with tempfile.TemporaryDirectory(prefix="felhom-bench-") as folder:
        certificates = lab.make_certificates(Path(folder), generation="current")
        for containers, vms, extras in rows:
            node = build_node(certificates, containers, vms)
            spawn = multiprocessing.get_context("spawn")
            with node, lab.SimulatedHub(certificates) as hub, ProcessPoolExecutor(1, spawn) as pool:
                # To judge a report would take the hub longer than the agent takes to make it.
                hub.script("", lab.Forever(lab.json_reply({})))
                sections = lab.configuration(node, hub)
                sections["proxmox"]["extras"] = extras
                wall, cpu = pool.submit(measure, sections).result()
                totals = node.connections + hub.connections, len(node.requests + hub.requests)
            connections, requests = (total / (1 + CYCLES) for total in totals)
            figures = f"{wall:>10.1f}{cpu:>10.1f}{connections:>13.0f}{requests:>10.0f}"
            print(f"{containers:>5}{vms:>5}  {', '.join(extras):30}{figures}", flush=True)


if __name__ == "__main__":
    main()
