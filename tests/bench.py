"""What a cycle costs inside a running process: the agent beside plain urllib.request and proxmoxer, against the simulated node and hub.

    ./build.sh bench --latency 0.008

Each peer runs in a process of its own and reads the same: /nodes, node status, the list of containers, the configuration of each; then it
posts what it has read. CPU and memory are the peer's own. Wall time without latency is for the most part the simulated node's, which is a
Python program too. The first cycle of each peer is not counted, unless it is the only one that there is time for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Sections = dict[str, dict[str, Any]]
Get = Callable[[str], Any]

CYCLES = 8
PEER_SECONDS = 3.0  # after these a peer begins no further cycle


def use_agent(sections: Sections, folder: Path) -> Callable[[], object]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import felhom_agent as fa

    class Active:
        def probe(self) -> str:
            return "active"

    path = folder / "agent.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(sections), "utf-8")
    config, log = fa.load_config(str(path), {}), logging.getLogger("bench")
    collector = fa.Collector(fa.ProxmoxClient(config.proxmox), Active(), host_id="pve1", agent_version=fa.__version__, logger=log)
    hub = fa.HubClient(config.hub, logger=log)
    return lambda: hub.report(collector.collect())


def use_urllib(sections: Sections, _folder: Path, get: Get | None = None) -> Callable[[], object]:
    """With `get` the node is read with that instead."""
    import urllib.request

    proxmox, hub = sections["proxmox"], sections["hub"]

    def call(section: dict[str, Any], path: str, authorization: str, body: bytes | None = None) -> Any:
        headers = {"Authorization": authorization, "Content-Type": "application/json"}
        request = urllib.request.Request(section["url"] + path, body, headers)
        with urllib.request.urlopen(request, timeout=30, context=contexts[section["ca_file"]]) as answer:
            return json.load(answer)

    contexts = {section["ca_file"]: ssl.create_default_context(cafile=section["ca_file"]) for section in (proxmox, hub)}
    token = f"PVEAPIToken={proxmox['token_id']}={proxmox['token_secret']}"
    read: Get = get or (lambda path: call(proxmox, f"/api2/json/{path}", token)["data"])

    def cycle() -> None:
        base = f"nodes/{proxmox['node']}"
        found = [read("nodes"), read(f"{base}/status"), guests := read(f"{base}/lxc")]
        found += [read(f"{base}/lxc/{guest['vmid']}/config?current=1") for guest in guests]
        call(hub, "/api/v1/host-report", f"Bearer {hub['api_key']}", json.dumps(found).encode())

    return cycle


def use_proxmoxer(sections: Sections, folder: Path) -> Callable[[], object]:
    proxmoxer = importlib.import_module("proxmoxer")
    proxmox = sections["proxmox"]
    user, _, name = proxmox["token_id"].partition("!")
    host, secret = proxmox["url"].removeprefix("https://"), proxmox["token_secret"]
    api = proxmoxer.ProxmoxAPI(host, user=user, token_name=name, token_value=secret, verify_ssl=proxmox["ca_file"])

    def get(path: str) -> Any:
        resource, _, query = path.partition("?")
        return api(resource).get(**dict([query.split("=")] if query else []))

    return use_urllib(sections, folder, get)


PEERS: dict[str, Callable[[Sections, Path], Callable[[], object]]] = {"agent": use_agent, "urllib": use_urllib, "proxmoxer": use_proxmoxer}


def serve(pipe: Connection, folder: Path, guests: int, latency: float) -> None:
    """Say how to reach node and hub, then at each request how many connections and requests both have had."""
    import lab

    certificates = lab.make_certificates(folder, generation="current")
    node = lab.SimulatedNode(certificates, guests=lab.many_guests(guests), latency_seconds=latency)
    with node, lab.SimulatedHub(certificates) as hub:
        hub.script("", lab.Forever(lab.json_reply({})))  # to judge a report takes the lab longer than the agent takes to make it
        pipe.send(lab.configuration(node, hub))
        while pipe.recv():
            pipe.send((node.connections + hub.connections, len(node.requests) + len(hub.requests)))


def run(pipe: Connection, folder: Path, peer: str, sections: Sections) -> None:
    """Run a cycle at each request; answer with wall and CPU milliseconds and the resident KiB."""
    cycle = PEERS[peer](sections, folder)
    while pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        cycle()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        status = Path("/proc/self/status").read_text("ascii")
        pipe.send((wall * 1000, cpu * 1000, int(status.partition("VmRSS:")[2].split()[0])))


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A process of its own at the other end of the pipe; False ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours
        ours.send(False)
        child.join()
    finally:
        child.kill()
        child.join()


def ask(pipe: Connection) -> Any:
    pipe.send(True)
    return pipe.recv()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cycles inside a running process, the agent beside its peers.")
    parser.add_argument("--guests", default="10,100,1000", metavar="N,N", help="containers on the node (default: 10,100,1000)")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="the node answers so late (default: 0)")
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="what would take longer than this in all is left out")
    arguments = parser.parse_args(argv)
    ends = time.monotonic() + arguments.seconds
    peers = [peer for peer in PEERS if peer != "proxmoxer" or importlib.util.find_spec("proxmoxer")]
    print(f"Python {sys.version.split()[0]}, the node answers {arguments.latency * 1000:g} ms late; medians of a cycle\n")
    print(f"{'guests':>6}  {'peer':10}{'wall ms':>10}{'CPU ms':>10}{'connections':>13}{'requests':>10}{'memory MiB':>12}{'cycles':>8}")
    last: dict[str, tuple[int, float]] = {}
    for guests in map(int, arguments.guests.split(",")):
        with tempfile.TemporaryDirectory(prefix="felhom-bench-") as name, process(serve, Path(name), guests, arguments.latency) as server:
            sections = server.recv()
            for peer in peers:
                known, took = last.get(peer, (1, 0.0))
                if (expected := took * guests / known) > ends - time.monotonic():
                    print(f"{guests:>6}  {peer:10}  left out, a cycle would take some {expected:.0f} s")
                    continue
                began = time.monotonic()
                cycles: list[tuple[float, ...]] = []
                with process(run, Path(name), peer, sections) as client:
                    while len(cycles) <= CYCLES and (not cycles or time.monotonic() < began + PEER_SECONDS):
                        before = ask(server)
                        measured = ask(client)
                        cycles.append((*measured, *(after - earlier for earlier, after in zip(before, ask(server), strict=True))))
                counted = cycles[1:] or cycles
                wall, cpu, memory, connections, requests = (statistics.median(column) for column in zip(*counted, strict=True))
                last[peer] = guests, wall / 1000
                costs = f"{wall:>10.1f}{cpu:>10.1f}{connections:>13.0f}{requests:>10.0f}{memory / 1024:>12.1f}{len(counted):>8}"
                print(f"{guests:>6}  {peer:10}{costs}", flush=True)
    if "proxmoxer" not in peers:
        print("\nproxmoxer is left out: it is not installed here, ./build.sh bench installs it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
