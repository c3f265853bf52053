"""Lets the daemon's own loop run against the lab for minutes, with a fault of `faults.py` in every other cycle.

    ./build.sh soak 10                  for ten minutes, 2 by default
    ./build.sh soak 10 --seed 1234      once more what the run with this seed did

Ends with exit status 1 where a cycle without a fault failed, a cycle took too long, or descriptors or memory grew.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import faults
import felhom_agent as agent
import lab

INTERVAL_SECONDS: Final = 0.05  # users cannot go below a minute
M_ARENA_MAX: Final = -8  # mallopt(3)
WARM_UP_CYCLES: Final = 40
LONGEST_SECONDS: Final = 10.0
MEMORY_GROWTH_BYTES: Final = 32 << 20  # with that of the simulated servers, which are in this process


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


class Over(Exception):
    """The time is up."""


@dataclass(slots=True)
class Soak:
    """The loop's wait, clock and ear: between two cycles it judges the one and prepares the other."""

    parts: faults.Agent
    ends: float
    chance: random.Random
    cycles: int = 0
    reports: int = 0
    longest_seconds: float = 0.0
    began: float = 0.0
    fault: faults.Fault | None = None
    broken: faults.Breakable | None = None
    problems: list[str] = field(default_factory=list)
    memory_bytes: tuple[int, int] = (0, 0)  # once warm, and after the last cycle

    def wait(self, _seconds: float) -> None:
        took = time.monotonic() - self.began
        accepted = len(self.parts.hub.reports)
        self.cycles += 1
        self.reports += accepted
        self.longest_seconds = max(self.longest_seconds, took)
        name = self.fault.name if self.fault else "no fault"
        if took > LONGEST_SECONDS:
            self.problems.append(f"cycle {self.cycles} ({name}) took {took:.1f} s")
        if self.fault is None and accepted != 1:
            self.problems.append(f"cycle {self.cycles} ({name}) failed: {'; '.join(self.parts.log.lines[-3:])}")
        if self.broken and self.fault:
            self.broken.mend(self.fault)
        for kept in (
            self.parts.node.requests,
            self.parts.hub.requests,
            self.parts.hub.reports,
            self.parts.hub.rejected,
            self.parts.log.lines,
        ):
            kept.clear()
        if self.cycles % 2 == 0:  # the last one was without a fault, so nothing is under way
            now = resident_bytes()
            self.memory_bytes = (now if self.cycles <= WARM_UP_CYCLES else self.memory_bytes[0], now)
            if time.monotonic() > self.ends and self.cycles > WARM_UP_CYCLES:
                raise Over
        self.prepare()

    def prepare(self) -> None:
        self.fault = self.broken = None
        if self.cycles % 2 == 0:
            self.fault = self.chance.choice(faults.FAULTS)
            place = self.chance.choice([place for place in faults.PLACES if place not in ("version", "permissions")])
            self.broken = self.parts.hub if place == "hub" else self.parts.node
            self.broken.arm(self.fault, place)
        self.began = time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description="Runs the agent against a lab in which every other cycle goes wrong.")
    parser.add_argument("minutes", type=float, nargs="?", default=2.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args(argv)
    print(f"{arguments.minutes:g} minutes with --seed {arguments.seed}, a fault in every other cycle, {len(faults.FAULTS)} to choose from")

    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # else each thread of the simulated servers keeps a heap of its own
    with tempfile.TemporaryDirectory(prefix="felhom-soak-") as folder:
        certificates = lab.make_certificates(Path(folder) / "node")
        hub_certificates = lab.make_certificates(Path(folder) / "hub", generation="current")
        faults.order()
        files = len(os.listdir("/proc/self/fd"))
        with faults.running(certificates, hub_certificates) as parts:
            parts.hub.envelope = {}  # which would lengthen the interval
            soak = Soak(parts, time.monotonic() + 60 * arguments.minutes, random.Random(arguments.seed))
            loop = agent.Loop(
                parts.collector, parts.client, INTERVAL_SECONDS, logger=parts.logger, wait=soak.wait, tell=lambda _status, _seconds: None
            )
            soak.prepare()
            with contextlib.suppress(Over):
                loop.run()
        files_now = len(os.listdir("/proc/self/fd"))

    memory, memory_now = soak.memory_bytes
    print(f"{soak.cycles} cycles, {soak.reports} reports received, longest cycle {soak.longest_seconds:.2f} s")
    print(f"memory {memory >> 20} MiB after {WARM_UP_CYCLES} cycles, {memory_now >> 20} MiB at the end")
    print(f"descriptors {files} at the start, {files_now} at the end")
    if memory_now - memory > MEMORY_GROWTH_BYTES:
        soak.problems.append("memory grew")
    if files_now > files:
        soak.problems.append("descriptors were not closed")
    for problem in soak.problems:
        print(f"problem: {problem}")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
