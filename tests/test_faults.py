"""Whatever goes wrong costs one report at most, and the next cycle is as if nothing had been."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import operator
import os
import re
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
    SOON,
    SOON_IF_BUSY,
    Daemon,
    make_collector,
    make_hub_client,
    messages,
)

NAME: Final = operator.attrgetter("name")


class Agent:
    """Collector and hub client between two servers that can be broken."""

    def __init__(self, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
        self.node, self.hub = node, hub
        self.collector = make_collector(node)
        self.client = make_hub_client(hub)
        self.usual = self.cycle()

    def cycle(self, place: str = "") -> dict[str, Any]:
        """Send one report and return it without its time."""
        if place == "version":
            self.collector.proxmox.version()
        report = self.collector.collect()
        self.client.report(report)
        return {**json.loads(report.to_json()), "reported_at": ""}

    @property
    def connections(self) -> list[int]:
        return [self.node.connections, self.hub.connections]

    def repair(self) -> None:
        self.hub.reports.clear()
        for server in (self.node, self.hub):
            server.clear_script()
            server.requests.clear()


@pytest.fixture
def healthy_agent() -> Iterator[Agent]:
    """An agent that has sent a report."""
    with faults.make_node() as node, faults.make_hub() as hub:
        yield Agent(node, hub)


def limit_time(tested: Agent, place: str) -> None:
    """Wait for what is silent no longer than others in the same cycle may need."""
    if place == "hub":
        tested.client.timeout_seconds = SOON
    elif place in ("version", "resources"):
        tested.collector.proxmox.timeout_seconds = SOON
    else:
        tested.collector.proxmox.timeout_seconds = SOON_IF_BUSY


def run_with_fault(
    tested: Agent, log: pytest.LogCaptureFixture, fault: faults.Fault, place: str
) -> tuple[agent.AgentError | None, dict[str, Any]]:
    """Run a cycle with the fault and one without; return the error and the report of the first.

    It takes no longer than it may, shows no secret and forges no line, and leaves nothing behind.
    """
    faults.break_server(tested.node, tested.hub, place, fault)
    error, report = None, {}
    began = time.monotonic()
    if fault.ending == "silence":
        limit_time(tested, place)
    try:
        report = tested.cycle(place)
    except agent.AgentError as exc:
        error = exc
    assert time.monotonic() - began < HANG_SECONDS
    tested.client.timeout_seconds = tested.collector.proxmox.timeout_seconds = 10

    lines = [text for _, text in messages(log)] + ([str(error)] if error else [])
    assert [line for line in lines if not line.isprintable() or len(line) > 1000] == []
    everything = [*lines, json.dumps(report), faults.show_error(error) if error else ""]
    assert faults.find_secrets("\n".join(everything)) == []
    assert faults.find_secrets(repr(tested.hub.requests), [faults.TOKEN_SECRET]) == []
    assert faults.find_secrets(repr(tested.node.requests), [faults.API_KEY]) == []

    tested.repair()
    before = tested.connections
    assert tested.cycle() == tested.usual
    # One to each server.
    assert tested.connections == [count + 1 for count in before]
    return error, report


every_fault = pytest.mark.parametrize("fault", faults.FAULTS, ids=NAME)


@pytest.mark.parametrize("place", faults.PLACES)
@pytest.mark.parametrize("fault", faults.HARMLESS, ids=NAME)
def test_unusual_response_costs_nothing(
    healthy_agent: Agent, log: pytest.LogCaptureFixture, fault: faults.Fault, place: str
) -> None:
    assert run_with_fault(healthy_agent, log, fault, place) == (None, healthy_agent.usual)


@every_fault
@pytest.mark.parametrize("place", faults.ESSENTIAL)
def test_fault_costs_no_more_than_this_report(
    healthy_agent: Agent, log: pytest.LogCaptureFixture, fault: faults.Fault, place: str
) -> None:
    error, _ = run_with_fault(healthy_agent, log, fault, place)
    expected = agent.HTTPError if fault.status else agent.TransportError
    assert isinstance(error, expected)
    assert getattr(error, "status", 0) == fault.status
    operation = "POST" if place == "hub" else "GET"
    assert re.match(f"{operation} {faults.PLACES[place]}: {fault.problem}", str(error))


@every_fault
def test_fault_in_what_only_serves_advice_costs_a_warning(
    healthy_agent: Agent, log: pytest.LogCaptureFixture, fault: faults.Fault
) -> None:
    """What the token may do cannot be read, but the list holds guests."""
    assert run_with_fault(healthy_agent, log, fault, "permissions") == (None, healthy_agent.usual)
    (warning,) = [text for level, text in messages(log) if level == "WARNING"]
    assert warning.startswith("the token could not be checked: GET /access/permissions: ")
    assert ("INFO", "token: problem resolved") in messages(log)


# Of 403 see test_collector.py.
@pytest.mark.parametrize(
    "fault", [fault for fault in faults.FAULTS if fault.status != 403], ids=NAME
)
def test_fault_in_a_guests_configuration_costs_this_guests_spec(
    healthy_agent: Agent, log: pytest.LogCaptureFixture, fault: faults.Fault
) -> None:
    usual = healthy_agent.usual
    first = {**usual["guests"][0], "status": "unknown"}
    del first["spec"]
    expected = {**usual, "guests": [first, *usual["guests"][1:]]}
    assert run_with_fault(healthy_agent, log, fault, "configuration") == (None, expected)


# ---- memory --------------------------------------------------------------------------------------

FLOODS: Final = [fault for fault in faults.FAULTS if fault.name.startswith("flood")]
# Every eighth of those that take no time.
QUICK: Final = [
    fault for fault in faults.FAULTS if fault not in FLOODS and fault.ending == "close"
][::8]


@contextlib.contextmanager
def traced_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def test_floods_of_all_guests_are_not_in_memory_together(plain_node: lab.SimulatedNode) -> None:
    plain_node.guests, flood = lab.many_guests(10), lab.Reply(body=faults.FLOOD)
    plain_node.script("/nodes/pve1/lxc/", lab.Forever(flood))
    collector = make_collector(plain_node)
    with traced_memory():
        collector.collect()
        assert tracemalloc.get_traced_memory()[1] < 40 << 20


@pytest.mark.parametrize(("place", "maximum_mib"), [("status", 20), ("hub", 10)])
@pytest.mark.parametrize("fault", FLOODS, ids=NAME)
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
    with faults.make_node() as node, faults.make_hub() as hub, traced_memory():
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
        assert "1 failed attempt" in daemon.step()
    assert "accepted" in daemon.step()
    assert "MemoryError" in daemon.log.read_text("utf-8")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"], ids=["closed", "full"])
def test_goes_on_without_standard_error(
    tmp_path: Path, agent_config: Path, hub: lab.SimulatedHub, redirection: str
) -> None:
    hub.script("", lab.Reply(503))
    with Daemon(tmp_path, agent_config, shell=f'exec "$@" {redirection}') as running:
        assert "1 failed attempt" in running.await_cycle()
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
