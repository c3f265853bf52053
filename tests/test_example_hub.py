"""The example hub over real sockets and real processes: answers, store, alarms, page, metrics."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
from examples import hub as example
from support import LOG, make_report

PATH: Final = "/api/v1/host-report"
HOSTS: Final = ("pve1", "pve2")
HEADERS: Final = {"Authorization": "Bearer key-of-pve1", "Content-Type": "application/json"}
NOW: Final = 1_780_000_000.0
DAY: Final = 86400.0
INTERVAL: Final = 300
# A host that has been silent for longer is overdue.
PATIENCE: Final = INTERVAL + 360
EXAMPLE: Final = Path(__file__).parent.parent / "docs" / "host-report.example.json"
Log = pytest.LogCaptureFixture


def make_document(**changes: Any) -> dict[str, Any]:
    return {**json.loads(make_report().to_json()), **changes}


def make_guest(**changes: Any) -> dict[str, Any]:
    return {"vmid": 100, "type": "lxc", "name": "web", "status": "running", **changes}


HOST: Final = make_document()["host"]
GOOD: Final = json.dumps(make_document()).encode()


def write_keys(folder: Path, hosts: Iterable[str] = HOSTS) -> Path:
    path = folder / "keys.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({host_id: f"key-of-{host_id}" for host_id in hosts}), "utf-8")
    return path


def write_command(folder: Path, text: str) -> Path:
    path = folder / "alarm"
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)
    return path


def request(
    port: int,
    method: str = "POST",
    path: str = PATH,
    headers: Mapping[str, str] = HEADERS,
    body: bytes = b"",
) -> tuple[http.client.HTTPResponse, str]:
    """Leave out headers without a value; Content-Length comes from the body if none is given."""
    given = {name: value for name, value in headers.items() if value}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, given)
        response = connection.getresponse()
        return response, response.read().decode()


def post(port: int, document: object = None, host_id: str = "pve1") -> int:
    headers = {**HEADERS, "Authorization": f"Bearer key-of-{host_id}"}
    body = json.dumps(document or make_document(host_id=host_id)).encode()
    return request(port, headers=headers, body=body)[0].status


@dataclass
class Running:
    """A hub that serves on loopback, by a clock that stands still until a test moves it."""

    hub: example.Hub
    now: float
    folder: Path
    port: int

    def post(self, document: object = None, host_id: str = "pve1") -> int:
        return post(self.port, document, host_id)

    def get(self, path: str = "/", status: int = 200) -> str:
        response, text = request(self.port, "GET", path, {})
        assert response.status == status
        return text

    def states(self) -> dict[str, str]:
        return {host["host_id"]: self.hub.state(host) for host in self.hub.load_hosts()}

    def turn(self, seconds: float = 0) -> list[str]:
        """Let time pass as the loop of a running hub sees it; return what the command was told."""
        until = self.now + seconds
        while True:
            self.hub.step()
            for thread in threading.enumerate():
                if "(tell)" in thread.name:
                    thread.join(20)
            if self.now >= until:
                break
            self.now = min(until, self.now + 60)
        path = self.folder / "told"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@contextlib.contextmanager
def run_hub(folder: Path, now: float = NOW, hosts: Iterable[str] = HOSTS) -> Iterator[Running]:
    """Its command fails as long as there is a file `broken` in the folder."""
    command = write_command(folder, f'cd {folder}; echo "$1 $2 $#" >>told; [ ! -e broken ]')
    options = argparse.Namespace(keys=write_keys(folder, hosts), on_change=str(command), remind=24)
    options.interval, options.tolerance = INTERVAL, PATIENCE - INTERVAL
    database = example.open_database(folder / "hub.sqlite3")
    hub = example.Hub(options, database)
    with contextlib.closing(database), example.Server(("127.0.0.1", 0), example.Handler) as server:
        server.hub = hub
        running = Running(hub, now, folder, server.server_port)
        hub.clock = lambda: running.now
        hub.alive_since = hub.stepped_at = now
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        try:
            yield running
        finally:
            server.shutdown()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with run_hub(tmp_path) as running:
        yield running


def command_line(folder: Path, *arguments: str) -> list[str]:
    options = [f"--keys={write_keys(folder)}", f"--database={folder}/hub.sqlite3"]
    return [sys.executable, example.__file__, *options, "--listen=127.0.0.1:0", *arguments]


def run_to_the_end(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = command_line(folder, *arguments)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return ended.returncode, ended.stdout, ended.stderr


class Process(subprocess.Popen[str]):
    """The hub as a process of its own; a context manager, which ends it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__(command_line(folder, *arguments), stderr=subprocess.PIPE, text=True)
        self.port = int(self.await_log("listening on").rpartition(":")[2].strip("/\n"))

    def __exit__(self, *exc: Any) -> None:
        self.kill()
        super().__exit__(*exc)

    def await_log(self, part: str) -> str:
        """Return the next line of the log with this in it."""
        assert self.stderr
        for line in self.stderr:
            if part in line:
                return line
        raise AssertionError(f"the hub has ended, and logged no {part!r}")


# ---- answers -------------------------------------------------------------------------------------


def test_the_agent_can_report_to_it_and_gets_its_interval(running: Running) -> None:
    url = f"http://127.0.0.1:{running.port}"
    config = agent.HubConfig(url=url, host_id="pve1", api_key="key-of-pve1")
    envelope = agent.HubClient(config, logger=LOG).report(make_report())
    assert envelope.poll_interval_seconds == INTERVAL
    assert running.states() == {"pve1": "on time", "pve2": "never reported"}


TOO_LARGE: Final = b" " * (4 * 1024 * 1024 + 1)
# What the page could not show.
INVALID: Final[dict[str, dict[str, Any]]] = {
    "guests-an-object": {"guests": {}},
    "guest-without-name": {"guests": [make_guest(name=None)]},
    "vmid-true": {"guests": [make_guest(vmid=True)]},
    "onboot-a-number": {"guests": [make_guest(onboot=1)]},
    "cpu-negative": {"host": {**HOST, "cpu_usage": -1}},
    "cpu-nan": {"host": {**HOST, "cpu_usage": float("nan")}},
    "memory-huge": {"host": {**HOST, "memory_total_bytes": 10**400}},
    "backup-time": {"backups": [{"vmid": 100, "storage": "nas", "created_at": "yesterday"}]},
    "backup-year-1": {"backups": [{"vmid": 100, "storage": "nas", "created_at": "0001-01-01"}]},
    "host_id-a-number": {"host_id": 1},
}
REFUSED: Final[dict[str, tuple[int, dict[str, str], bytes]]] = {
    "not-json": (400, {}, b'{"host_id": '),
    "not-utf-8": (400, {}, GOOD.replace(b"pve1", b"pv\xe91")),
    "too-deep": (400, {}, b"[" * 100_000),
    "no-key": (401, {"Authorization": ""}, GOOD),
    "key-without-scheme": (401, {"Authorization": "key-of-pve1"}, GOOD),
    "unknown-key-and-a-large-body": (401, {"Authorization": "Bearer key-3"}, TOO_LARGE),
    "key-of-another-host": (403, {"Authorization": "Bearer key-of-pve2"}, GOOD),
    "length-no-number": (411, {"Content-Length": "+5"}, b""),
    "chunked": (411, {"Transfer-Encoding": "chunked"}, b"0\r\n\r\n"),
    "chunked-and-length": (411, {"Transfer-Encoding": "chunked", "Content-Length": "5"}, b"0"),
    "too-large": (413, {}, TOO_LARGE),
    "length-of-5000-digits": (413, {"Content-Length": "9" * 5000}, b""),
    "form": (415, {"Content-Type": "application/x-www-form-urlencoded"}, GOOD),
    "not-an-object": (422, {}, b"[]"),
}
for name, changes in INVALID.items():
    REFUSED[name] = (422, {}, json.dumps(make_document(**changes)).encode())


@pytest.mark.parametrize(("status", "headers", "body"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_with_a_reason(
    status: int, headers: Mapping[str, str], body: bytes, running: Running
) -> None:
    response, text = request(running.port, headers={**HEADERS, **headers}, body=body)
    assert (response.status, list(json.loads(text))) == (status, ["error"])
    assert json.loads(text)["error"]
    assert set(running.states().values()) == {"never reported"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/?refresh=off", 200),
        ("POST", "/", 405),
        ("GET", "/favicon.ico", 200),
        ("GET", PATH, 405),
        ("GET", "/api", 404),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int, running: Running) -> None:
    response, text = request(running.port, method, path, {})
    assert response.status == status
    assert bool(text) == (method != "HEAD")
    assert response.headers["Refresh"] == ("30" if path == "/" else None)


def test_health_is_that_of_the_database_and_of_the_loop(running: Running) -> None:
    running.now += 61
    running.get("/healthz", 503)
    running.hub.step()
    running.get("/healthz", 200)
    running.hub.sql("PRAGMA query_only = ON")
    running.get("/healthz", 503)
    response, text = request(running.port, body=GOOD)
    assert response.status == 503
    assert json.loads(text) == {"error": "database: attempt to write a readonly database"}
    running.hub.sql("PRAGMA query_only = OFF")
    assert running.post() == 200


def test_200_hosts_report_at_once_beside_silent_connections(tmp_path: Path) -> None:
    hosts = [f"pve{number}" for number in range(200)]
    together = threading.Barrier(len(hosts))
    # Otherwise the kernel makes some of them try again a second later.
    assert example.Server.request_queue_size >= len(hosts)
    assert example.Handler.timeout == 5
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(run_hub(tmp_path, hosts=hosts))
        pool = stack.enter_context(ThreadPoolExecutor(len(hosts)))
        for _ in range(100):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            silent.sendall(b"POST /api/v1/host-report HTTP/1.1\r\n")

        def report(host_id: str) -> int:
            together.wait(20)
            return running.post(host_id=host_id)

        assert list(pool.map(report, hosts)) == [200] * len(hosts)
        assert running.states() == dict.fromkeys(hosts, "on time")


# ---- store and start -----------------------------------------------------------------------------


def test_no_acknowledged_report_is_lost_when_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "hub.sqlite3"
    with Process(tmp_path) as hub:
        for number in range(20):
            assert post(hub.port, make_document(reported_at=str(number))) == 200
    with contextlib.closing(sqlite3.connect(path)) as database:
        query = "SELECT json_extract(report, '$.reported_at') FROM hosts"
        assert database.execute(query).fetchall() == [("19",)]
    assert path.stat().st_mode & 0o077 == 0


def test_the_database_of_version_0_3_0_is_taken_over(tmp_path: Path) -> None:
    created = "CREATE TABLE hosts (host_id PRIMARY KEY, received_at, due_at, report,"
    received_at = NOW - DAY
    with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite3")) as database, database:
        database.execute(f"{created} told DEFAULT 'well')")
        row = ("pve1", received_at, received_at + 900, GOOD.decode(), "overdue")
        database.execute("INSERT INTO hosts VALUES (?, ?, ?, ?, ?)", row)
    with run_hub(tmp_path) as running:
        # With write-ahead logging and 2, FULL, SQLite promises that a power cut takes nothing.
        assert running.hub.sql("PRAGMA journal_mode")[0][0] == "wal"
        assert running.hub.sql("PRAGMA synchronous")[0][0] == 2
        assert running.states() == {"pve1": "overdue", "pve2": "never reported"}
        assert f"last report</bdi> <bdi>{example.show_time(received_at)}" in running.get()
        assert running.turn() == ["pve1 reminder 2"]
        assert running.post() == 200
        assert running.turn() == ["pve1 back 2"]


KEY_FILES: Final = {
    "open": "{}" + " " * 4096,
    "empty": '{"pve1": ""}',
    "shared": '{"pve1": "key", "pve2": "key", "pve3": "another"}',
}
BAD_START: Final = {
    "keys-for-others": ("--keys={}/open.json", "chmod 600"),
    "keys-empty": ("--keys={}/empty.json", '"pve1"'),
    "keys-missing": ("--keys={}/missing.json", "No such file"),
    "keys-shared": ("--keys={}/shared.json", "the same key for pve1 and pve2"),
    "no-folder": ("--database={}/missing/db", "/missing/db: unable to open"),
    "no-database": ("--database={}/open.json", "open.json: file is not a database"),
    "port-in-use": ("--listen=127.0.0.1:{port}", "Address already in use"),
    "port-too-high": ("--listen=127.0.0.1:70000", "127.0.0.1:70000"),
    "port-alone": ("--listen=8080", "ADDRESS:PORT"),
    "interval": ("--interval=10", "60 to 3600"),
    "tolerance": ("--tolerance=-301", "--tolerance"),
    "mute-of-nobody": ("--mute=pve9=1", "no report of pve9"),
    "mute-for-nan-hours": ("--mute=pve1=nan", "pve1=2.5): Invalid value NaN"),
    "mute-in-no-database": ("--database={}/none --mute=pve1=1", "there is no"),
    "test-of-no-command": ("--test-alarm", "--on-change"),
}


@pytest.mark.parametrize(("arguments", "problem"), BAD_START.values(), ids=BAD_START)
def test_a_bad_start_is_one_line_and_exit_2(arguments: str, problem: str, tmp_path: Path) -> None:
    for name, text in KEY_FILES.items():
        (tmp_path / f"{name}.json").write_text(text, "utf-8")
        (tmp_path / f"{name}.json").chmod(0o644 if name == "open" else 0o600)
    example.open_database(tmp_path / "hub.sqlite3").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = arguments.format(tmp_path, port=taken.getsockname()[1])
        status, _, said = run_to_the_end(tmp_path, *given.split())
    assert (status, said.count("\n")) == (2, 1), said
    assert problem in said


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_it_listens_on_ipv6_and_is_healthy_from_the_start_on(tmp_path: Path) -> None:
    with (
        Process(tmp_path, "--listen=[::1]:0") as hub,
        socket.create_connection(("::1", hub.port), timeout=20) as connection,
    ):
        connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert connection.makefile("rb").read(12) == b"HTTP/1.0 200"


def test_keys_are_read_again_when_they_change(running: Running, caplog: Log) -> None:
    path = write_keys(running.folder, ["pve1", "pve3"])
    running.hub.step()
    path.write_text("{", "utf-8")
    for _ in range(3):
        running.hub.step()
    path.unlink()
    for _ in range(3):
        running.hub.step()
    assert running.states().keys() == {"pve1", "pve3"}
    assert running.post() == 200
    assert caplog.text.count("the keys read before remain valid") == 2


# ---- alarms --------------------------------------------------------------------------------------


def test_the_alarm_arrives_from_end_to_end_also_while_another_command_hangs(tmp_path: Path) -> None:
    end = tmp_path / "end"
    hangs = f"[ $1 = pve2 ] || until [ -e {end} ]; do sleep 0.1; done"
    command = write_command(tmp_path, f'echo "told $1 $2 $#" >&2; {hangs}')
    with Process(tmp_path, f"--on-change={command}", "--interval=60", "--tolerance=-58") as hub:
        try:
            for host_id in HOSTS:
                assert post(hub.port, host_id=host_id) == 200
                assert hub.await_log("told") == f"told {host_id} overdue 2\n"
        finally:
            end.touch()
        assert post(hub.port) == 200
        assert hub.await_log("told") == "told pve1 back 2\n"


def test_a_command_that_fails_is_run_again(running: Running, caplog: Log) -> None:
    seconds: list[float] = []

    def repair_later(pause: float) -> None:
        seconds.append(pause)
        if len(seconds) == 1500:
            (running.folder / "broken").unlink()

    running.hub.wait = repair_later
    (running.folder / "broken").touch()
    running.post()
    assert running.turn(PATIENCE + 1) == ["pve1 overdue 2"] * 10
    pauses = re.findall(r"exit status 1.; next try in (\d+) s", caplog.text)
    assert pauses == ["5", "10", "20", "40", "80", "160", "320", "600", "600"]
    assert sum(seconds) == sum(map(int, pauses))


def test_a_new_word_does_not_wait_behind_one_that_failed(running: Running) -> None:
    seconds: list[float] = []

    def report(pause: float) -> None:
        seconds.append(pause)
        running.post()
        running.hub.step()

    running.post()
    running.turn(PATIENCE + 1)
    running.hub.wait = report
    (running.folder / "broken").touch()
    assert running.turn(DAY) == ["pve1 reminder 2"]
    assert seconds == [1]
    (running.folder / "broken").unlink()
    assert running.turn() == ["pve1 back 2"]


def test_test_alarm_shows_output_and_status(tmp_path: Path) -> None:
    command = write_command(tmp_path, 'echo "said $*"; exit 7')
    ended = run_to_the_end(tmp_path, f"--on-change={command}", "--test-alarm")
    assert ended == (7, "said test-alarm overdue\n", "")


def test_an_alarm_is_raised_once_repeated_daily_and_taken_back_once(running: Running) -> None:
    running.post()
    for seconds, expected in (
        (PATIENCE, []),
        (1, ["pve1 overdue 2"]),
        (DAY - 60, []),
        (60, ["pve1 reminder 2"]),
    ):
        assert running.turn(seconds) == expected
    running.post()
    assert running.turn() == ["pve1 back 2"]
    running.hub.options.remind = 0
    assert running.turn(3 * DAY) == ["pve1 overdue 2"]


def test_a_restart_neither_repeats_nor_forgets_an_alarm(tmp_path: Path) -> None:
    with run_hub(tmp_path) as running:
        running.post()
        running.turn(PATIENCE)
        running.post(host_id="pve2")
        assert running.turn(1) == ["pve1 overdue 2"]
    # pve2 falls silent while the hub is down, and has its time to report from the start on.
    with run_hub(tmp_path, NOW + DAY - 3600) as running:
        assert running.turn(PATIENCE) == []
        assert running.turn(1) == ["pve2 overdue 2"]


@pytest.mark.parametrize("seconds", [3600, -DAY], ids=["suspended", "clock-put-back"])
def test_after_a_clock_jump_every_host_gets_its_time_anew(seconds: float, running: Running) -> None:
    running.post()
    running.now += seconds
    assert running.turn(PATIENCE) == []
    assert running.turn(1) == ["pve1 overdue 2"]


def test_a_muted_host_raises_no_alarm_until_then(running: Running, tmp_path: Path) -> None:
    running.post()
    # The command that mutes has a real clock.
    running.now = time.time()
    run_to_the_end(tmp_path, "--mute=pve1=2.5")
    assert "muted until" in running.get()
    assert running.turn(2 * 3600) == []
    assert running.turn(3600) == ["pve1 overdue 2"]
    run_to_the_end(tmp_path, "--mute=pve1=72")
    assert running.turn(DAY + 60) == []
    run_to_the_end(tmp_path, "--mute=pve1=0")
    assert running.turn() == ["pve1 reminder 2"]


def test_two_nodes_under_one_name_are_noticed(running: Running, caplog: Log) -> None:
    for node in ("pve1", "copy", "pve1"):
        running.post(make_document(host={**HOST, "node": node}))
    assert "nodes</bdi> <b>copy and pve1" in running.get()
    assert 'felhom_host_nodes{host_id="pve1"} 2.0' in running.get("/metrics")
    assert "pve1: reports come from the nodes ['pve1', 'copy']" in caplog.text
    running.now += DAY + 1
    running.post()
    assert "copy" not in running.get()


def test_a_refusal_is_logged_with_the_host_and_a_page_view_is_not(tmp_path: Path) -> None:
    with Process(tmp_path) as hub:
        for path in ("/", "/metrics"):
            request(hub.port, "GET", path, {})
        # Nor is a client that hangs up.
        with socket.create_connection(("127.0.0.1", hub.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        body = json.dumps(make_document(host_id="pve\x1b9")).encode()
        request(hub.port, headers={**HEADERS, "Authorization": "Bearer x"}, body=body)
        assert "pve\\\\u001b9': 401 no key, or an unknown one" in hub.await_log("")
        request(hub.port, headers=HEADERS, body=b"{}")
        assert "422 host_id is missing" in hub.await_log("")


# ---- page and metrics ----------------------------------------------------------------------------


def test_hosts_are_shown_with_their_state_the_overdue_first(running: Running) -> None:
    page = running.get()
    assert page.count("<b>never reported</b>") == page.count("--selftest=hub") == 2
    assert "<title>Hosts: 2 never reported</title>" in page
    running.post(host_id="pve2")
    running.turn(PATIENCE + 1)
    running.post()
    page = running.get()
    states = re.findall(r"<h2><bdi>(\w+)</bdi> <b>(.*?)</b></h2>", page)
    assert states == [("pve2", "overdue"), ("pve1", "on time")]
    assert "<title>Hosts: 1 overdue, 1 on time</title>" in page
    running.turn(INTERVAL + 1)
    assert running.states() == {"pve1": "late", "pve2": "overdue"}
    write_keys(running.folder, [])
    running.hub.step()
    assert "<title>Hosts: none yet, add one to the keys</title>" in running.get()


def test_null_is_unknown_and_zero_is_zero(running: Running) -> None:
    running.post(make_document(host={**HOST, "cpu_usage": None}))
    for label in ("CPU", "Proxmox VE"):
        assert f"<bdi>{label}</bdi> <b>unknown" in running.get()
    assert "felhom_cpu_usage_ratio" not in running.get("/metrics")
    running.post(make_document(host={**HOST, "cpu_usage": 0}))
    assert "<bdi>CPU</bdi> <bdi>0%" in running.get()
    assert 'felhom_cpu_usage_ratio{host_id="pve1"} 0.0' in running.get("/metrics")


def make_full_document() -> dict[str, Any]:
    """The documented report, with more that does or does not deserve a look."""
    document: dict[str, Any] = json.loads(EXAMPLE.read_text("utf-8"))
    document["cloudflared"]["status"] = "failed"
    document["host"]["memory_used_bytes"] = document["host"]["memory_total_bytes"]
    document["host"]["rootfs_used_bytes"] = 0.9 * document["host"]["rootfs_total_bytes"]
    document["guests"][4]["onboot"] = True
    parked = make_guest(vmid=901, name="parked", status="stopped", onboot=False)
    document["guests"] = [parked, *document["guests"]]
    tasks = {"vzstart 101": "WARNINGS: 1", "vncproxy 100": "timed out", "aptupdate": "unknown"}
    for operation, result in tasks.items():
        document["audit_tail"] += [{"at": "2026-06-08", "operation": operation, "result": result}]
    return document


def test_what_deserves_a_look_stands_out(running: Running) -> None:
    assert running.post(make_full_document()) == 200
    page = running.get()
    lines = re.findall(r"<div><bdi>(.*?)</bdi> <(b|bdi)>(.*?)</", page)
    failed = "failed at 2026-06-08T00:03:42Z: VM 200 qmp command &#x27;backup&#x27; failed"
    assert [(label, value) for label, tag, value in lines if tag == "b"] == [
        ("cloudflared", "failed"),
        ("Root disk", "90%"),
        ("backup-nas", "91%"),
        ("offsite", "unknown"),
        ("vzdump 200", f"{failed} - got timeout"),
        ("101 db", "should run, but is stopped"),
        ("102 wiki", "unknown"),
    ]
    assert {("Memory", "bdi", "100%"), ("local", "bdi", "10%")} < set(lines)
    assert "<details open><summary>Guests: 2 running, 3 stopped, 1 unknown" in page
    running.post(make_document(guests=[make_guest(vmid=100 + n) for n in range(13)]))
    assert "<details ><summary>Guests: 13 running" in running.get()


METRICS: Final = """
felhom_poll_interval_seconds{host_id="pve1"} 300.0
felhom_report_received_timestamp_seconds{host_id="pve1"} 1780000000.0
felhom_tunnel_up{host_id="pve1"} 0.0
felhom_guest_running{host_id="pve1",vmid="101",name="db",type="lxc"} 0.0
felhom_guest_should_run{host_id="pve1",vmid="101",name="db",type="lxc"} 1.0
felhom_guest_should_run{host_id="pve1",vmid="200",name="win11",type="qemu"} 0.0
felhom_guest_should_run{host_id="pve1",vmid="900",name="debian-13-template",type="qemu"} 0.0
felhom_storage_used_bytes{host_id="pve1",storage="local"} 28216709120.0
vmid="100",type="lxc",storage="backup-nas"} 1780876803.0
felhom_tasks_failed{host_id="pve1"} 1.0
"""


def test_metrics_say_what_is_known(running: Running) -> None:
    assert running.post(make_full_document()) == 200
    text = running.get("/metrics")
    assert [line for line in METRICS.split("\n") if f"{line}\n" not in text] == []
    for unknown in ('vmid="102"', 'storage="offsite"', 'host_id="pve2"'):
        assert unknown not in text
    running.turn(PATIENCE + 1)
    text = running.get("/metrics")
    assert 'felhom_host_overdue{host_id="pve1"} 1.0' in text
    assert "felhom_tunnel_up" not in text


HOSTILE: Final = "<script>alert('1')</script>\"' onload=x \u202e\ud800\\\n"


def test_a_later_agent_may_say_more_and_all_of_it_is_escaped(running: Running) -> None:
    document = make_document(
        agent_version=HOSTILE,
        cloudflared={"status": HOSTILE, "tunnels": None},
        disks=[1],
        host={**HOST, "pve_version": HOSTILE, "node": HOSTILE},
        guests=[make_guest(name=HOSTILE, type=HOSTILE, status=HOSTILE, lock=HOSTILE)],
        storage_targets=[{"storage": HOSTILE, "used_bytes": 1, "total_bytes": 1}],
        audit_tail=[{"at": "2026-06-08T02:00:03Z", "operation": HOSTILE, "result": HOSTILE}],
    )
    running.post()
    assert running.post(document) == 200
    response, page = request(running.port, "GET", "/", {})
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)") >= 10
    assert not re.search(r"<[^>]*onload[^>']*>", page)
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"(src|href)='(?!/)", page)


def test_a_report_that_cannot_be_shown_does_not_break_the_page(running: Running) -> None:
    running.post()
    running.hub.sql("UPDATE hosts SET report = '{\"host\": 1}'")
    page = running.get()
    assert "This report cannot be shown:</bdi> <b>host_id is missing or invalid" in page
    assert "pve2" in page
    assert 'felhom_host_overdue{host_id="pve1"} 0.0' in running.get("/metrics")
