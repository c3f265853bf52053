"""Runs the agent's loop for minutes against a simulated node and hub that fail at random.

    ./build.sh soak 10                  for ten minutes; the default is 2
    ./build.sh soak 10 --seed 1234      with the faults of the run that had this seed

Every other cycle has a fault.  Exits with 1 if a cycle without one failed, a cycle took too long, a
report broke the contract, a secret was logged, or memory, threads or descriptors grew.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import felhom_agent as agent
import lab
from faults import FAULTS
from support import EXTRAS, LOG, SOON_IF_BUSY, make_collector, make_hub_client

LONGEST_SECONDS: Final = (agent.COLLECT_TIMEOUT_FACTOR + 1) * SOON_IF_BUSY + 2
WARM_UP_CYCLES: Final = 100
# Together with the simulated servers, which are in this process.
MEMORY_GROWTH_KIB: Final = 32 << 10


def garble(chance: random.Random, data: bytes) -> bytes:
    garbled = bytearray(data)
    for _ in range(chance.randint(1, 20)):
        garbled[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(garbled)


def break_something(chance: random.Random, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> str:
    """Have one of the last cycle's requests answered wrongly, once or always, and say how."""
    server: lab.Server = chance.choice((node, node, node, hub))
    request = chance.choice(server.requests)
    reply = lab.json_reply(hub.envelope) if server is hub else node.answer(request)
    body = reply.body or b"{}"
    secret = hub.api_key if server is hub else node.token_secret
    response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    answer: lab.Answer = chance.choice(FAULTS).answer(body, secret)
    garbled = (lab.Reply(body=garble(chance, body)), lab.Raw(garble(chance, response)))
    answer = chance.choice((answer, *garbled, lab.Stall(), lab.Cut(), lab.Reply(500, secret)))
    path = request.path.removeprefix(server.base)
    server.script(path, chance.choice((answer, lab.Forever(answer))))
    return f"{path}: {answer}"[:300]


def soak(
    node: lab.SimulatedNode, hub: lab.SimulatedHub, seconds: float, chance: random.Random
) -> Iterator[str]:
    """Run cycles until the time is over, and yield each problem."""
    collector = make_collector(node, timeout_seconds=SOON_IF_BUSY, extras=EXTRAS)
    client = make_hub_client(hub, timeout_seconds=SOON_IF_BUSY)
    loop = agent.Loop(collector, client, 900, logger=LOG, wait=lambda _: None)
    end, failed = time.monotonic() + seconds, 0
    # For each cycle the most memory so far, in KiB.
    peaks: list[int] = []
    while time.monotonic() < end or len(peaks) <= WARM_UP_CYCLES:
        name = break_something(chance, node, hub) if len(peaks) % 2 else "no fault"
        log = io.StringIO()
        LOG.handlers = [logging.StreamHandler(log)]
        for kept in (node.requests, hub.requests, hub.reports, hub.rejected):
            kept.clear()
        began = time.monotonic()
        loop.run(1)
        took, lines = time.monotonic() - began, log.getvalue()
        node.clear_script()
        hub.clear_script()
        problems = {
            f"took {took:.1f} s": took > LONGEST_SECONDS,
            "no report": name == "no fault" and not hub.reports,
            f"report refused: {hub.rejected}": hub.rejected,
            "bug in the agent": "Traceback" in lines,
            "secret in the log": node.token_secret in lines or hub.api_key in lines,
        }
        for problem in filter(problems.get, problems):
            yield f"{name}: {problem}\n{lines}"
        failed += not hub.reports
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    growth = peaks[-1] - peaks[WARM_UP_CYCLES]
    print(f"{len(peaks)} cycles, {failed} of them failed, memory grew by {growth} KiB")
    if growth > MEMORY_GROWTH_KIB:
        yield "memory grew"


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description="Run the agent with random faults.")
    parser.add_argument("minutes", type=float, nargs="?", default=2.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    print(f"{arguments.minutes:g} minutes with --seed {arguments.seed}", flush=True)
    # M_ARENA_MAX of mallopt(3): else each thread of the servers keeps a heap of its own.
    ctypes.CDLL(None).mallopt(-8, 1)
    LOG.setLevel(logging.DEBUG)
    count, chance = 0, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="felhom-soak-") as folder:
        certificates = lab.make_certificates(Path(folder))
        # Descriptors and threads.
        before = len(os.listdir("/proc/self/fd")) + threading.active_count()
        with lab.SimulatedNode(certificates) as node, lab.SimulatedHub(certificates) as hub:
            for problem in soak(node, hub, 60 * arguments.minutes, chance):
                print(problem, flush=True)
                count += 1
        left = len(os.listdir("/proc/self/fd")) + threading.active_count() - before
    print(f"{left} descriptors and threads left, {count} problems")
    return 1 if count or left else 0


if __name__ == "__main__":
    sys.exit(main())
