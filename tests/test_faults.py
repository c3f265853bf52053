"""Nothing ends it: each fault of `faults.py` costs what it has to and no more, and the next cycle is as if nothing had been."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import os
import re
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import pytest

import faults
import felhom_agent as agent
import lab
from support import LOG, REPORT, Prober, build_collector, hub_config, proxmox_config

BOUND_SECONDS = 3.0  # one request has less than a second; the rest is for a busy machine


def report_without(places: set[str], whole: dict[str, object], *, all_guests: bool) -> dict[str, object]:
    """What is left of the report where the answers at these places cannot be used."""
    host, guests = whole["host"], whole["guests"]
    assert isinstance(host, dict)
    assert isinstance(guests, list)
    lost = 0 if "configuration" not in places else len(guests) if all_guests else 1
    unknown = [{key: value for key, value in guest.items() if key != "spec"} | {"status": "unknown"} for guest in guests[:lost]]
    return whole | {"host": host | ({"cpu_usage": None} if "nodes" in places else {}), "guests": unknown + guests[lost:]}


@pytest.mark.parametrize("fault", faults.FAULTS, ids=[fault.name for fault in faults.FAULTS])
def test_fault_costs_no_more_than_it_has_to(
    fault: faults.Fault, certificates: lab.Certificates, hub_certificates: lab.Certificates
) -> None:
    walk = faults.walk(fault, certificates, hub_certificates)
    for visit in walk.visits:
        place, dead = visit.place, fault.level == "port"
        places = faults.order()
        lost = {place, *(places[places.index(place) :] if dead and place in places else ())}  # a port that is gone is gone for the rest
        assert visit.struck, place
        assert visit.seconds < BOUND_SECONDS + dead * len(lost), place
        assert visit.next_error is None, place
        if place in fault.used or (fault.level == "kept" and visit.reused):
            assert visit.error is None, place
            assert visit.report == visit.next_report or fault.alters, place
            text = json.dumps(visit.report, ensure_ascii=False)
            assert text.encode(), place  # which half a surrogate pair does not outlive
            assert not re.search(r"[0-9]{17}|e\+", text), place
        elif lost & {"version", "status", "list", "hub"}:
            assert type(visit.error) is (agent.HTTPError if fault.status else agent.TransportError), place
            assert getattr(visit.error, "status", 0) == fault.status, place
        else:
            assert visit.error is None, place
            assert visit.report == report_without(lost, visit.next_report, all_guests=dead), place
    assert walk.strays == 0
    assert walk.left == set()
    assert fault.level != "kept" or any(visit.reused for visit in walk.visits)


@pytest.mark.parametrize("place", faults.PLACES)
def test_every_status_is_told_apart(place: str) -> None:
    with faults.running(None, None) as parts:
        proxmox = parts.proxmox
        calls: dict[str, Callable[[], object]] = {
            "version": proxmox.version,
            "permissions": proxmox.permissions,
            "nodes": proxmox.nodes,
            "status": proxmox.node_status,
            "list": proxmox.list_lxc,
            "configuration": lambda: proxmox.guest_config(100),
            "hub": lambda: parts.client.report(REPORT),
        }
        server: lab.Server = parts.hub if place == "hub" else parts.node
        body = b'{"data":[]}' if place in ("nodes", "list") else b'{"data":{}}'
        for status in faults.STATUSES:
            for sent in (body, b""):
                server.script("", lab.Reply(status, body=sent))
                seen: object = None
                try:
                    calls[place]()
                except agent.HTTPError as exc:
                    seen = exc.status
                except agent.TransportError:
                    seen = "no answer"
                if status >= 300:
                    expected: object = status
                else:
                    expected = None if place == "hub" or (sent and status != HTTPStatus.NO_CONTENT) else "no answer"
                assert seen == expected, (status, sent)


FLOODS = [fault for fault in faults.FAULTS if fault.again and not fault.every_seconds]


@pytest.mark.parametrize("fault", FLOODS, ids=[fault.name for fault in FLOODS])
def test_flood_does_not_fill_the_memory(fault: faults.Fault, certificates: lab.Certificates, hub_certificates: lab.Certificates) -> None:
    tracemalloc.start()
    try:
        faults.walk(fault, certificates, hub_certificates, ("list", "hub"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20


def test_memory_stays_flat(certificates: lab.Certificates, hub_certificates: lab.Certificates) -> None:
    def resident_bytes() -> int:
        gc.collect()  # as the agent does before it waits
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    heavy = [fault for fault in faults.FAULTS if fault.name in ("body without end", "gzip bomb", "100,000 brackets", "header of 1 MiB")]
    assert len(heavy) == 4
    sizes = []
    for _ in range(5):
        for fault in heavy:
            for place in ("list", "hub"):
                faults.visit(fault, place, "", certificates, hub_certificates)
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[2] < 16 << 20  # the first rounds fill the pools of Python and of the C library


# --- the machine --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path, write_config: Callable[..., Path]) -> Iterator[faults.Daemon]:
    """A daemon that has sent its first report."""
    config = write_config(proxmox={"timeout_seconds": 1}, hub={"timeout_seconds": 1})
    with faults.Daemon(tmp_path, config) as running:
        assert "accepted" in running.await_cycle()
        yield running


@contextmanager
def limited(daemon: faults.Daemon, kind: int, limit: int) -> Iterator[None]:
    soft, hard = resource.prlimit(daemon.process.pid, kind)
    resource.prlimit(daemon.process.pid, kind, (limit, hard))
    yield
    resource.prlimit(daemon.process.pid, kind, (soft, hard))


def test_goes_on_after_there_were_no_descriptors(daemon: faults.Daemon) -> None:
    with limited(daemon, resource.RLIMIT_NOFILE, 3):
        assert daemon.step() == daemon.step() == ""  # not even to systemd it can say a word
    assert "accepted" in daemon.step()
    assert "Too many open files" in daemon.log.read_text("utf-8")


def test_goes_on_after_there_was_no_memory(daemon: faults.Daemon, node: lab.SimulatedNode) -> None:
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[0])
    node.script("/nodes/pve1/lxc$", lab.json_reply({"data": [{"vmid": 100, "name": "x" * (7 << 20)}]}))
    with limited(daemon, resource.RLIMIT_AS, pages * os.sysconf("SC_PAGESIZE") + (2 << 20)):
        assert "fault of the agent since" in daemon.step()
    assert "accepted" in daemon.step()
    assert "MemoryError" in daemon.log.read_text("utf-8")


def test_reads_its_files_once(daemon: faults.Daemon, node: lab.SimulatedNode, tmp_path: Path) -> None:
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
def test_goes_on_without_standard_error(redirection: str, tmp_path: Path, agent_config: Path) -> None:
    with faults.Daemon(tmp_path, agent_config, shell=f'exec "$@" {redirection}') as running:
        assert "accepted" in running.await_cycle()
        assert "accepted" in running.step()


def test_goes_on_when_nobody_reads_standard_error(tmp_path: Path, agent_config: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with faults.Daemon(tmp_path, agent_config, stderr=writer) as running:
        os.close(writer)
        assert "accepted" in running.await_cycle()
        assert "accepted" in running.step()
        os.close(reader)  # which would end a process that takes SIGPIPE
        assert "accepted" in running.step()


def test_wall_clock_is_nothing_but_the_time_of_the_report(
    node: lab.SimulatedNode, hub: lab.SimulatedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, gmtime = time.time(), time.gmtime
    year = 365.25 * 86400
    jumps = [now + year, now - year]
    waits: list[float] = []
    clock = [now]

    def wait(seconds: float) -> None:
        waits.append(seconds)
        clock[0] = jumps.pop(0) if jumps else now

    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "gmtime", lambda seconds=None: gmtime(clock[0] if seconds is None else seconds))
    client = agent.HubClient(hub_config(hub), logger=LOG)
    agent.Loop(build_collector(node), client, 900, logger=LOG, wait=wait).run(3)
    assert waits == [pytest.approx(900, abs=9)] * 3
    assert inspect.signature(agent.Loop).parameters["clock"].default is time.monotonic
    reported = [time.strftime("%Y-%m", gmtime(moment)) for moment in (now, now + year, now - year)]
    assert [str(report["reported_at"])[:7] for report in hub.reports] == reported


@pytest.mark.parametrize("host", ["nosuch.invalid", "x" * 64 + ".invalid", "a..b"], ids=["unknown", "too long", "empty label"])
def test_name_that_cannot_be_resolved_is_a_failed_cycle(host: str) -> None:
    proxmox = agent.ProxmoxClient(proxmox_config(lab.SimulatedNode(None), url=f"https://{host}:8006"))
    client = agent.HubClient(hub_config(lab.SimulatedHub(None), url=f"https://{host}"), logger=LOG)
    with pytest.raises(agent.TransportError):
        proxmox.node_status()
    with pytest.raises(agent.TransportError):
        client.report(REPORT)


class Faulty(agent.Collector):
    """A bug of our own, which quotes a secret."""

    def collect(self) -> agent.HostReport:
        raise ZeroDivisionError(f"division by\n{faults.TOKEN_SECRET}\x1b[31m")


def test_own_bug_is_told_once_without_secrets_and_ends_nothing(node: lab.SimulatedNode, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("bug")  # noqa: LOG001  # it ends with the test
    formatter, handler = agent.LineFormatter(journal=False), agent.StderrHandler()
    formatter.secrets = agent.secret_forms(faults.TOKEN_SECRET)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    collector = Faulty(agent.ProxmoxClient(proxmox_config(node)), Prober(), host_id="pve1", agent_version="", logger=logger)
    waits: list[float] = []
    client = agent.HubClient(hub_config(lab.SimulatedHub(None)), logger=logger)
    agent.Loop(collector, client, 900, logger=logger, wait=waits.append).run(3)
    said = capfd.readouterr().err
    assert len(waits) == 3
    assert said.count("Traceback") == said.count("ZeroDivisionError: ") == 1
    assert "***\\x1b[31m" in said
    assert faults.TOKEN_SECRET not in said
    assert all(line.startswith("    ") for line in said.splitlines()[1:-2])
