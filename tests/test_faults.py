"""Whatever goes wrong costs one report at most, and the next cycle is as if nothing had been."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import logging
import os
import resource
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import faults
import felhom_agent as agent
import lab
from support import (
    HANG_SECONDS,
    LOG,
    SOON_IF_BUSY,
    Daemon,
    Prober,
    make_collector,
    make_hub_client,
    messages,
    proxmox_config,
)

FAULTS: Final = [pytest.param(fault, id=fault.name) for fault in faults.FAULTS]


class Agent:
    """Collector and hub client between two servers that can be broken."""

    def __init__(
        self, node: faults.BreakableNode, hub: faults.BreakableHub, **changes: Any
    ) -> None:
        self.node, self.hub = node, hub
        self.collector = make_collector(node, **changes)
        self.client = make_hub_client(hub, **changes)
        self.usual = self.cycle()

    def cycle(self, place: str = "") -> dict[str, Any]:
        """Send one report and return it without its time."""
        if place == "version":
            self.collector.proxmox.version()
        report = self.collector.collect()
        self.client.report(report)
        return {**json.loads(report.to_json()), "reported_at": ""}

    @property
    def connections(self) -> tuple[int, int]:
        return self.node.connections, self.hub.connections

    def repair(self) -> None:
        self.hub.reports.clear()
        for server in (self.node, self.hub):
            server.clear_script()
            server.requests.clear()


@pytest.fixture
def healthy_agent(fault: faults.Fault) -> Iterator[Agent]:
    """An agent that has sent a report; it waits only for a fault that is silence."""
    changes = {"timeout_seconds": SOON_IF_BUSY} if fault.ending == "silence" else {}
    with faults.BreakableNode() as node, faults.BreakableHub() as hub:
        yield Agent(node, hub, **changes)


def without_guest(report: dict[str, Any], vmid: int) -> dict[str, Any]:
    """The report if this guest's configuration cannot be read."""
    guests = [dict(guest) for guest in report["guests"]]
    for guest in guests:
        if guest["vmid"] == vmid:
            del guest["spec"]
            guest["status"] = "unknown"
    return {**report, "guests": guests}


@pytest.mark.parametrize("place", faults.PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_costs_no_more_than_it_has_to(
    healthy_agent: Agent, log: pytest.LogCaptureFixture, fault: faults.Fault, place: str
) -> None:
    node, hub, usual = healthy_agent.node, healthy_agent.hub, healthy_agent.usual
    faults.break_server(node, hub, place, fault)
    error, report = None, {}
    began = time.monotonic()
    try:
        report = healthy_agent.cycle(place)
    except agent.AgentError as exc:
        error = exc
    took = time.monotonic() - began
    shown = [text for _, text in messages(log)]
    sent = [repr(hub.requests), repr(node.requests)]
    healthy_agent.repair()

    if fault.harmless:
        assert (error, report) == (None, usual)
    elif place == "configuration":
        assert (error, report) == (None, without_guest(usual, 100))
    else:
        expected = agent.HTTPError if fault.status else agent.TransportError
        assert type(error) is expected, error
        assert getattr(error, "status", 0) == fault.status
        shown.append(str(error))
    assert took < HANG_SECONDS
    assert [line for line in shown if not line.isprintable() or len(line) > 1000] == []
    everything = [*shown, json.dumps(report), faults.show_error(error) if error else ""]
    assert faults.find_secrets("\n".join(everything)) == []
    assert faults.find_secrets(sent[0], [faults.TOKEN_SECRET]) == []
    assert faults.find_secrets(sent[1], [faults.API_KEY]) == []

    before = healthy_agent.connections
    assert healthy_agent.cycle() == usual
    opened = [now - then for now, then in zip(healthy_agent.connections, before, strict=True)]
    assert opened == [1, 1]


# ---- memory --------------------------------------------------------------------------------------

FLOODS: Final = [fault for fault in faults.FAULTS if fault.name.startswith("flood")]
# Every fourth of those that take no time.
QUICK: Final = [
    fault for fault in faults.FAULTS if fault not in FLOODS and fault.ending == "close"
][::4]


@contextlib.contextmanager
def traced_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("place", "maximum_mib"), [("status", 20), ("hub", 4)])
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FLOODS])
def test_flood_takes_little_more_memory_than_the_cap(
    healthy_agent: Agent, fault: faults.Fault, place: str, maximum_mib: int
) -> None:
    faults.break_server(healthy_agent.node, healthy_agent.hub, place, fault)
    with traced_memory():
        with pytest.raises(agent.TransportError):
            healthy_agent.cycle()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    healthy_agent.repair()
    assert peak_bytes < maximum_mib << 20


def test_nothing_is_left_after_many_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    def count_resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    # pytest keeps what is logged.
    monkeypatch.setattr(LOG, "disabled", True)
    sizes, before = [], count_resources()
    with faults.BreakableNode() as node, faults.BreakableHub() as hub, traced_memory():
        tested = Agent(node, hub)
        for _ in range(4):
            for place, fault in itertools.product(("resources", "configuration", "hub"), QUICK):
                faults.break_server(node, hub, place, fault)
                with contextlib.suppress(agent.AgentError):
                    tested.cycle()
                tested.repair()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    assert sizes[-1] - sizes[1] < 64 << 10
    assert count_resources() == before


# ---- the machine ---------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path, write_config: Callable[..., Path]) -> Iterator[Daemon]:
    """A daemon that has sent its first report."""
    config = write_config(proxmox={"timeout_seconds": 1}, hub={"timeout_seconds": 1})
    with Daemon(tmp_path, config) as running:
        assert "accepted" in running.await_cycle()
        yield running


@contextlib.contextmanager
def limited(daemon: Daemon, kind: int, limit: int) -> Iterator[None]:
    soft, hard = resource.prlimit(daemon.process.pid, kind)
    resource.prlimit(daemon.process.pid, kind, (limit, hard))
    yield
    resource.prlimit(daemon.process.pid, kind, (soft, hard))


def test_goes_on_after_there_were_no_descriptors(daemon: Daemon) -> None:
    with limited(daemon, resource.RLIMIT_NOFILE, 3):
        # It cannot even tell systemd.
        assert daemon.step() == daemon.step() == ""
    assert "accepted" in daemon.step()
    assert "Too many open files" in daemon.log.read_text("utf-8")


def test_goes_on_after_there_was_no_memory(daemon: Daemon, node: lab.SimulatedNode) -> None:
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text("utf-8").split()[0])
    node.script("/cluster/resources", lab.Reply(body=b" " * (8 << 20)))
    address_space = pages * os.sysconf("SC_PAGESIZE") + (2 << 20)
    with limited(daemon, resource.RLIMIT_AS, address_space):
        assert "tries: 1" in daemon.step()
    assert "accepted" in daemon.step()
    assert "MemoryError" in daemon.log.read_text("utf-8")


def test_reads_its_files_once(daemon: Daemon, node: lab.SimulatedNode, tmp_path: Path) -> None:
    assert node.certificates
    for path in (tmp_path / "agent.json", node.certificates.ca_file):
        content = path.read_bytes()
        try:
            path.write_bytes(b"damaged")
            assert "accepted" in daemon.step()
            path.unlink()
            assert "accepted" in daemon.step()
        finally:
            path.write_bytes(content)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"], ids=["closed", "full"])
def test_goes_on_without_standard_error(
    tmp_path: Path, agent_config: Path, hub: lab.SimulatedHub, redirection: str
) -> None:
    hub.script("", lab.Reply(503))
    with Daemon(tmp_path, agent_config, shell=f'exec "$@" {redirection}') as running:
        assert "tries: 1" in running.await_cycle()
        assert "accepted" in running.step()


def test_jumps_of_the_wall_clock_change_nothing(
    plain_node: lab.SimulatedNode, plain_hub: lab.SimulatedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, year, waits = time.time(), 365 * 86400, list[float]()
    jumps = itertools.cycle((now, now + year, now - year))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    collector, client = make_collector(plain_node), make_hub_client(plain_hub)
    loop = agent.Loop(collector, client, 900, logger=LOG, wait=waits.append)
    loop.run(3)
    assert loop.clock is time.monotonic
    assert len(plain_hub.reports) == 3
    assert waits == [pytest.approx(900, abs=5)] * 3


# ---- a bug of ours -------------------------------------------------------------------------------


class Faulty(agent.Collector):
    """Has a bug whose message quotes a secret, and forges a line."""

    def collect(self, *, thorough: bool = False) -> agent.HostReport:
        raise ZeroDivisionError(f"division by\n{faults.TOKEN_SECRET}\x1b[31m")


def test_own_bug_is_told_once_without_secrets_and_ends_nothing(
    plain_node: lab.SimulatedNode, plain_hub: lab.SimulatedHub
) -> None:
    stream, waits = io.StringIO(), list[float]()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(agent.LogFormatter())
    logger = logging.getLogger("tests.bug")
    logger.addHandler(handler)
    proxmox = agent.ProxmoxClient(proxmox_config(plain_node))
    agent.SECRETS["proxmox"] = faults.TOKEN_SECRET
    collector = Faulty(proxmox, Prober(), host_id="", agent_version="", logger=logger)
    agent.Loop(collector, make_hub_client(plain_hub), 900, logger=logger, wait=waits.append).run(3)
    shown = stream.getvalue()
    assert len(waits) == 3
    assert shown.count("Traceback") == shown.count("ZeroDivisionError: division") == 1
    assert "    ***\\x1b[31m\n" in shown
    assert faults.TOKEN_SECRET not in shown
    first, *others = shown.splitlines()
    assert "bug in the agent" in first
    assert [line for line in others if not line.startswith("    ")] == []
