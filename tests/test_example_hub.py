"""The example hub over real sockets and real processes: answers, store, alarms, page, metrics."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import select
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
from examples import hub as example
from support import LOG, make_report

SCRIPT: Final = Path(example.__file__)
PATH: Final = "/api/v1/host-report"
KEYS: Final = {"pve1": "key-1", "pve2": "key-2"}
HEADERS: Final = {"Authorization": "Bearer key-1", "Content-Type": "application/json"}
DAY: Final = 86400.0
INTERVAL: Final = 300
TOLERANCE: Final = 360


def make_document(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(make_report().to_json())
    return {**document, **changes}


def make_guest(**changes: Any) -> dict[str, Any]:
    guest = {"vmid": 100, "type": "lxc", "name": "web", "status": "running"}
    return {**guest, "controller_version": "", **changes}


HOST: Final = make_document()["host"]
DETAILS: Final[dict[str, Any]] = {
    "template": False,
    "onboot": True,
    "lock": None,
    "tags": [],
    "ha_state": None,
    "uptime_seconds": None,
    "cpu_usage": None,
    "memory_used_bytes": None,
}


@dataclass
class Clock:
    now: float = 1_780_000_000.0

    def __call__(self) -> float:
        return self.now

    def text(self, ago: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now - ago))


def write_keys(folder: Path, keys: Mapping[str, str] = KEYS) -> Path:
    path = folder / "keys.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(keys), "utf-8")
    return path


def request(
    port: int,
    method: str = "POST",
    path: str = PATH,
    headers: Mapping[str, str] = HEADERS,
    body: bytes = b"",
) -> tuple[http.client.HTTPResponse, str]:
    """Send exactly these headers, and Content-Length unless they say how long the body is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_accept_encoding=True)
        if not {"Content-Length", "Transfer-Encoding"} & set(headers):
            headers = {**headers, "Content-Length": str(len(body))}
        for name, value in headers.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response, response.read().decode()


def post(port: int, document: object, host_id: str = "pve1") -> int:
    headers = {**HEADERS, "Authorization": f"Bearer {KEYS[host_id]}"}
    return request(port, headers=headers, body=json.dumps(document).encode())[0].status


@dataclass
class Running:
    """A hub that serves on loopback, by a clock that stands still until a test moves it."""

    hub: example.Hub
    clock: Clock
    port: int

    def post(self, document: object | None = None, host_id: str = "pve1") -> int:
        return post(self.port, document or make_document(host_id=host_id), host_id)

    def get(self, path: str = "/") -> str:
        response, text = request(self.port, "GET", path, {})
        assert response.status == 200
        return text

    def stored(self) -> list[tuple[str, float]]:
        rows = self.hub.sql("SELECT host_id, received_at FROM hosts")
        return [(row["host_id"], row["received_at"]) for row in rows]

    def states(self) -> dict[str, str]:
        return {host["host_id"]: self.hub.state(host) for host in self.hub.load_hosts()}

    def turn(self, seconds: float = 0) -> list[str]:
        """Let time pass as the loop of a running hub sees it; return what the command was told."""
        until = self.clock.now + seconds
        while True:
            self.hub.step()
            for thread in threading.enumerate():
                if "(tell)" in thread.name:
                    thread.join(20)
            if self.clock.now >= until:
                break
            self.clock.now = min(until, self.clock.now + 60)
        path = Path(self.hub.options.on_change).parent / "told"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@contextlib.contextmanager
def run_hub(
    folder: Path,
    clock: Clock,
    keys: Mapping[str, str] = KEYS,
    remind_hours: float = 24,
) -> Iterator[Running]:
    command = folder / "writes-down"
    command.write_text(f'#!/bin/sh\necho "$1 $2 $#" >>{folder}/told\n', "utf-8")
    command.chmod(0o755)
    options = argparse.Namespace(
        keys=write_keys(folder, keys),
        interval=INTERVAL,
        tolerance=TOLERANCE,
        on_change=str(command),
        remind=remind_hours,
    )
    database = example.open_database(folder / "hub.sqlite3")
    hub = example.Hub(options, database)
    hub.clock = clock
    hub.alive_since = hub.stepped_at = clock()
    server = example.Server(("127.0.0.1", 0), example.Handler)
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield Running(hub, clock, server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        database.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with run_hub(tmp_path, Clock()) as running:
        yield running


@contextlib.contextmanager
def run_process(folder: Path, *arguments: str) -> Iterator[Process]:
    options = [f"--keys={write_keys(folder)}", f"--database={folder}/hub.sqlite3"]
    command = [sys.executable, str(SCRIPT), *options, "--listen=127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


class Process:
    """The hub as a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.unread = process, b""
        self.port = int(self.await_log("listening on").rpartition(":")[2].strip("/"))

    def await_log(self, part: str) -> str:
        """Return the next line of the log with this in it."""
        assert self.process.stderr
        while True:
            line, newline, rest = self.unread.partition(b"\n")
            if newline:
                self.unread = rest
                if part in line.decode():
                    return line.decode()
                continue
            assert select.select([self.process.stderr], [], [], 30)[0], f"no {part!r} in the log"
            received = os.read(self.process.stderr.fileno(), 65536)
            assert received, f"the hub has ended, and logged no {part!r}"
            self.unread += received


# ---- answers -------------------------------------------------------------------------------------


def test_a_report_is_stored_and_answered_with_the_interval(running: Running) -> None:
    response, text = request(running.port, body=json.dumps(make_document()).encode())
    assert (response.status, json.loads(text)) == (200, {"poll_interval_seconds": INTERVAL})
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Content-Length"] == str(len(text))
    assert running.stored() == [("pve1", running.clock.now)]


def test_the_agent_can_report_to_it(running: Running) -> None:
    url = f"http://127.0.0.1:{running.port}"
    config = agent.HubConfig(url=url, host_id="pve1", api_key="key-1")
    envelope = agent.HubClient(config, logger=LOG).report(make_report())
    assert envelope.poll_interval_seconds == INTERVAL


GOOD: Final = json.dumps(make_document()).encode()
TOO_LARGE: Final = b" " * (4 * 1024 * 1024 + 1)
REFUSED: Final = {
    "not-json": (400, {}, b'{"host_id": '),
    "not-utf-8": (400, {}, GOOD.replace(b"pve1", b"pv\xe91")),
    "too-deep": (400, {}, b"[" * 100_000),
    "length-no-number": (411, {"Content-Length": "+5"}, b""),
    "no-key": (401, {"Authorization": ""}, GOOD),
    "unknown-key": (401, {"Authorization": "Bearer key-3"}, GOOD),
    "key-not-ascii": (401, {"Authorization": "Bearer \xe9"}, GOOD),
    "key-without-scheme": (401, {"Authorization": "key-1"}, GOOD),
    "unknown-key-and-a-large-body": (401, {"Authorization": "Bearer key-3"}, TOO_LARGE),
    "key-of-another-host": (403, {"Authorization": "Bearer key-2"}, GOOD),
    "chunked": (411, {"Transfer-Encoding": "chunked"}, b"0\r\n\r\n"),
    "chunked-and-length": (411, {"Transfer-Encoding": "chunked", "Content-Length": "5"}, b"0"),
    "too-large": (413, {}, TOO_LARGE),
    "length-of-5000-digits": (413, {"Content-Length": "9" * 5000}, b""),
    "form": (415, {"Content-Type": "application/x-www-form-urlencoded"}, GOOD),
    "no-type": (415, {"Content-Type": ""}, GOOD),
    "not-an-object": (422, {}, b"[]"),
}


@pytest.mark.parametrize(("status", "headers", "body"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_with_a_reason(
    status: int, headers: Mapping[str, str], body: bytes, running: Running
) -> None:
    response, text = request(running.port, headers={**HEADERS, **headers}, body=body)
    assert (response.status, list(json.loads(text))) == (status, ["error"])
    assert json.loads(text)["error"]
    assert running.stored() == []


INVALID: Final = {
    "no-guests": {"guests": None},
    "guests-an-object": {"guests": {}},
    "guest-a-number": {"guests": [1]},
    "guest-without-name": {"guests": [{"vmid": 100, "type": "lxc", "status": "running"}]},
    "vmid-a-string": {"guests": [make_guest(vmid="100")]},
    "vmid-true": {"guests": [make_guest(vmid=True)]},
    "onboot-a-number": {"guests": [make_guest(onboot=1)]},
    "cpu-a-string": {"host": {**HOST, "cpu_usage": "0.5"}},
    "cpu-negative": {"host": {**HOST, "cpu_usage": -1}},
    "cpu-nan": {"host": {**HOST, "cpu_usage": float("nan")}},
    "memory-huge": {"host": {**HOST, "memory_total_bytes": 10**400}},
    "backup-time": {"backups": [{"vmid": 100, "storage": "nas", "created_at": "yesterday"}]},
    "backup-time-with-no-zone": {
        "backups": [{"vmid": 100, "storage": "nas", "created_at": "0001-01-01"}]
    },
    "task-without-result": {"audit_tail": [{"at": "2026-06-08T02:00:03Z", "operation": "x"}]},
    "no-host_id": {"host_id": 1},
}


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID)
def test_what_the_page_could_not_show_is_refused(changes: dict[str, Any], running: Running) -> None:
    assert running.post(make_document(guests=[make_guest()]) | changes) == 422
    assert running.stored() == []


def test_a_later_agent_may_say_more(running: Running) -> None:
    guest = make_guest(type="oci", status="paused", tags=["x"], disks=[])
    document = make_document(guests=[guest], disks=[1], cloudflared={"status": "x", "y": None})
    assert running.post(document) == 200
    assert "paused" in running.get()


PATHS: Final = {
    "page": ("GET", "/", 200),
    "page-head": ("HEAD", "/", 200),
    "page-without-refresh": ("GET", "/?refresh=off", 200),
    "page-posted": ("POST", "/", 405),
    "icon": ("GET", "/favicon.ico", 200),
    "health": ("GET", "/healthz", 200),
    "health-head": ("HEAD", "/healthz", 200),
    "metrics": ("GET", "/metrics", 200),
    "report-read": ("GET", PATH, 405),
    "other": ("GET", "/api", 404),
    "other-posted": ("POST", "/api", 404),
}


@pytest.mark.parametrize(("method", "path", "status"), PATHS.values(), ids=PATHS)
def test_paths_and_methods(method: str, path: str, status: int, running: Running) -> None:
    assert running.post() == 200
    response, text = request(running.port, method, path, {})
    assert response.status == status
    assert bool(text) == (method != "HEAD")
    assert response.headers["Refresh"] == ("30" if path == "/" else None)


def test_health_is_that_of_the_database_and_of_the_loop(running: Running) -> None:
    running.clock.now += 61
    assert request(running.port, "GET", "/healthz", {})[0].status == 503
    running.hub.step()
    assert request(running.port, "GET", "/healthz", {})[0].status == 200
    running.hub.sql("PRAGMA query_only = ON")
    assert request(running.port, "GET", "/healthz", {})[0].status == 503


def test_silent_connections_do_not_keep_a_report_out(running: Running) -> None:
    assert example.Handler.timeout == 5
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            silent.sendall(b"POST /api/v1/host-report HTTP/1.1\r\n")
        assert running.post() == 200


def test_200_hosts_report_at_once(tmp_path: Path) -> None:
    keys = {f"pve{number}": f"key-{number}" for number in range(200)}
    together = threading.Barrier(len(keys))
    # Otherwise the kernel makes some of them try again a second later.
    assert example.Server.request_queue_size >= len(keys)
    with run_hub(tmp_path, Clock(), keys) as running, ThreadPoolExecutor(len(keys)) as pool:

        def report(host_id: str) -> int:
            body = json.dumps(make_document(host_id=host_id)).encode()
            headers = {**HEADERS, "Authorization": f"Bearer {keys[host_id]}"}
            together.wait(20)
            return request(running.port, headers=headers, body=body)[0].status

        assert list(pool.map(report, keys)) == [200] * len(keys)
        assert sorted(host_id for host_id, _ in running.stored()) == sorted(keys)


# ---- store ---------------------------------------------------------------------------------------


def test_what_is_stored_survives_a_power_cut(running: Running) -> None:
    """As far as SQLite can see to it, which says this of write-ahead logging with 2, FULL."""
    names = ("journal_mode", "synchronous")
    values = [running.hub.sql(f"PRAGMA {name}")[0][0] for name in names]
    assert values == ["wal", 2]


def test_the_newest_report_is_kept_for_ever(running: Running) -> None:
    received_at = example.show_time(running.clock.now)
    assert running.post(make_document(agent_version="0.1")) == 200
    assert running.post() == 200
    running.clock.now += 1000 * DAY
    page = running.get()
    assert f"last report</bdi> <bdi>{received_at}" in page
    assert f"agent</bdi> <bdi>{agent.__version__}</bdi>" in page


def test_no_acknowledged_report_is_lost_when_it_is_killed(tmp_path: Path) -> None:
    acknowledged = 0
    for reports in (1, 20, 50):
        with run_process(tmp_path) as hub:
            for _ in range(reports):
                assert post(hub.port, make_document(reported_at=str(acknowledged))) == 200
                acknowledged += 1
            # One more, which is killed while it is being stored.
            connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
            with contextlib.closing(connection):
                connection.request("POST", PATH, json.dumps(make_document()), HEADERS)
                hub.process.kill()
            # The newest one that was acknowledged, unless that last one was stored, too.
            with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite3")) as database:
                query = "SELECT json_extract(report, '$.reported_at') FROM hosts"
                stored = database.execute(query).fetchone()[0]
            assert stored in (str(acknowledged - 1), make_document()["reported_at"])
    with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite3")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert (tmp_path / "hub.sqlite3").stat().st_mode & 0o077 == 0


def test_a_busy_or_full_database_is_a_503_and_nothing_more(tmp_path: Path) -> None:
    with run_process(tmp_path) as hub:
        assert post(hub.port, make_document()) == 200
        with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite3")) as other:
            other.execute("BEGIN EXCLUSIVE")
            response, text = request(hub.port, body=GOOD)
            assert (response.status, json.loads(text)) == (
                503,
                {"error": "database: database is locked"},
            )
        assert post(hub.port, make_document()) == 200


def test_the_database_of_version_0_3_0_is_taken_over(tmp_path: Path) -> None:
    clock = Clock()
    with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite3")) as database, database:
        database.execute(
            "CREATE TABLE hosts (host_id PRIMARY KEY, received_at, due_at, report,"
            " told DEFAULT 'well')"
        )
        database.execute("CREATE TABLE history (host_id, received_at, report)")
        row = ("pve1", clock.now - DAY, clock.now - DAY + 900, GOOD.decode(), "overdue")
        database.execute("INSERT INTO hosts VALUES (?, ?, ?, ?, ?)", row)
    with run_hub(tmp_path, clock) as running:
        assert running.states() == {"pve1": "overdue", "pve2": "never reported"}
        assert f"last report</bdi> <bdi>{example.show_time(clock.now - DAY)}" in running.get()
        assert running.turn() == ["pve1 reminder 2"]
        assert running.post() == 200
        assert running.turn() == ["pve1 back 2"]


# ---- start ---------------------------------------------------------------------------------------

BAD_START: Final = {
    "keys-for-others": (["--keys={}/open.json"], "chmod 600"),
    "keys-empty": (["--keys={}/empty.json"], '"pve1"'),
    "keys-cut-off": (["--keys={}/cut.json"], "line 1"),
    "keys-missing": (["--keys={}/missing.json"], "No such file"),
    "keys-shared": (["--keys={}/shared.json"], "the same key for pve1 and pve2"),
    "no-folder": (["--database={}/missing/db"], "/missing/db: unable to open"),
    "no-database": (["--database={}/open.json"], "open.json: file is not a database"),
    "port-in-use": (["--listen=127.0.0.1:{port}"], "Address already in use"),
    "port-too-high": (["--listen=127.0.0.1:70000"], "127.0.0.1:70000"),
    "port-alone": (["--listen=8080"], "ADDRESS:PORT"),
    "interval": (["--interval=10"], "60 to 3600"),
    "tolerance": (["--interval=60", "--tolerance=-61"], "--tolerance"),
    "unknown-option": (["--x"], "--x"),
    "mute-of-nobody": (["--database={}/db", "--mute=pve9=1"], "no report of pve9"),
    "mute-for-nan-hours": (["--mute=pve1=nan"], "pve1=2.5"),
    "mute-in-no-database": (["--database={}/none", "--mute=pve1=1"], "there is no"),
    "test-of-no-command": (["--test-alarm"], "--on-change"),
    "mute-without-hours": (["--mute=pve1"], "--mute"),
}


@pytest.mark.parametrize(("arguments", "problem"), BAD_START.values(), ids=BAD_START)
def test_a_bad_start_is_one_line_and_exit_2(
    arguments: list[str], problem: str, tmp_path: Path
) -> None:
    keys = {
        "open": "{}" + " " * 4096,
        "empty": '{"pve1": ""}',
        "cut": "{",
        "shared": '{"pve1": "key", "pve2": "key", "pve3": "another"}',
    }
    for name, text in keys.items():
        (tmp_path / f"{name}.json").write_text(text, "utf-8")
        (tmp_path / f"{name}.json").chmod(0o644 if name == "open" else 0o600)
    example.open_database(tmp_path / "db").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = [argument.format(tmp_path, port=port) for argument in arguments]
        start = [f"--keys={write_keys(tmp_path)}", f"--database={tmp_path}/db"]
        command = [sys.executable, str(SCRIPT), *start, "--listen=127.0.0.1:0", *given]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert problem in ended.stderr


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_it_listens_on_ipv6_and_is_healthy_from_the_start_on(tmp_path: Path) -> None:
    with run_process(tmp_path, "--listen=[::1]:0") as hub:
        url = ("::1", hub.port)
        with socket.create_connection(url, timeout=20) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert connection.makefile("rb").read(12) == b"HTTP/1.1 200"


def test_keys_are_read_again_when_they_change(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_keys(tmp_path, {"pve1": "key-1", "pve3": "key-3"})
    running.hub.step()
    assert running.states().keys() == {"pve1", "pve3"}
    path.write_text("{", "utf-8")
    for _ in range(3):
        running.hub.step()
    assert running.states().keys() == {"pve1", "pve3"}
    path.unlink()
    for _ in range(3):
        running.hub.step()
    assert running.post() == 200
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert all("remain valid" in error for error in errors)


# ---- alarms --------------------------------------------------------------------------------------


def write_command(folder: Path, text: str) -> str:
    path = folder / "alarm"
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_alarm_arrives_from_end_to_end(tmp_path: Path) -> None:
    fails_once = f"[ $2 = back ] || ! mkdir {tmp_path}/failed 2>/dev/null"
    command = write_command(tmp_path, f'echo "$1 $2 $#" >>{tmp_path}/told; {fails_once}')
    times = ["--interval=60", "--tolerance=-58"]
    with run_process(tmp_path, f"--on-change={command}", *times) as hub:
        assert post(hub.port, make_document()) == 200
        hub.await_log("pve1: overdue")
        assert "next try in 5 s" in hub.await_log("exit status 1")
        hub.await_log("pve1: overdue")
        # The hub goes on while a command fails.
        assert post(hub.port, make_document()) == 200
        hub.await_log("pve1: back")
        hub.await_log("pve1: overdue")
    told = (tmp_path / "told").read_text("utf-8").splitlines()
    assert told[:3] == ["pve1 overdue 2", "pve1 overdue 2", "pve1 back 2"]


def test_a_command_that_hangs_delays_no_other_host(tmp_path: Path) -> None:
    end = tmp_path / "end"
    hangs = f"until [ -e {end} ]; do sleep 0.1; done"
    command = write_command(tmp_path, f"[ $1 = pve2 ] && echo told $1 >&2 || {hangs}")
    with run_process(tmp_path, f"--on-change={command}", "--interval=60", "--tolerance=-60") as hub:
        try:
            assert post(hub.port, make_document()) == 200
            hub.await_log("pve1: overdue")
            assert post(hub.port, make_document(host_id="pve2"), "pve2") == 200
            hub.await_log("told pve2")
        finally:
            end.touch()


def test_the_pause_after_a_failure_grows(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.hub.options.on_change = "/bin/false"
    running.hub.wait = lambda _seconds: time.sleep(0.2)
    running.post()
    running.turn(INTERVAL + TOLERANCE)
    running.clock.now += 1
    running.hub.step()
    while "next try in 10 s" not in caplog.text:
        time.sleep(0.05)
    running.post()
    running.hub.step()


def test_a_new_word_does_not_wait_behind_one_that_failed(running: Running) -> None:
    running.post()
    running.turn(INTERVAL + TOLERANCE + 1)
    # From now on the command fails to deliver reminders.
    command = Path(running.hub.options.on_change)
    command.write_text(command.read_text("utf-8") + "[ $2 != reminder ]\n", "utf-8")
    running.clock.now += DAY
    running.hub.step()
    while not (command.parent / "told").exists():
        time.sleep(0.05)
    running.post()
    assert running.turn() == ["pve1 reminder 2"]
    assert running.turn() == ["pve1 back 2"]


def test_test_alarm_shows_output_and_status(tmp_path: Path) -> None:
    path = write_command(tmp_path, 'echo "said $*"; exit 7')
    command = [sys.executable, str(SCRIPT), f"--on-change={path}", "--test-alarm"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout) == (7, "said test-alarm overdue\n")


def test_an_alarm_is_raised_once_repeated_daily_and_taken_back_once(running: Running) -> None:
    running.post()
    for seconds, expected in (
        (INTERVAL + TOLERANCE, []),
        (1, ["pve1 overdue 2"]),
        (DAY - 60, []),
        (60, ["pve1 reminder 2"]),
        (DAY - 60, []),
        (60, ["pve1 reminder 2"]),
    ):
        assert running.turn(seconds) == expected
    running.post()
    assert running.turn() == ["pve1 back 2"]
    assert running.turn(INTERVAL) == []


def test_reminders_can_be_turned_off(tmp_path: Path) -> None:
    with run_hub(tmp_path, Clock(), remind_hours=0) as running:
        running.post()
        assert running.turn(3 * DAY) == ["pve1 overdue 2"]


def test_a_restart_neither_repeats_nor_forgets_an_alarm(tmp_path: Path) -> None:
    clock = Clock()
    with run_hub(tmp_path, clock) as running:
        running.post()
        running.post(host_id="pve2")
        running.turn(INTERVAL + TOLERANCE)
        running.post(host_id="pve2")
        assert running.turn(1) == ["pve1 overdue 2"]
    # pve2 falls silent while the hub is down, and has its time to report from the start on.
    clock.now += DAY - 3600
    with run_hub(tmp_path, clock) as running:
        assert running.turn(INTERVAL + TOLERANCE) == []
        assert running.turn(1) == ["pve2 overdue 2"]
    with run_hub(tmp_path, clock) as running:
        running.post()
        assert running.turn() == ["pve1 back 2"]


@pytest.mark.parametrize("seconds", [3600, 5 * 3600], ids=["suspended", "clock-put-ahead"])
def test_after_a_pause_of_the_loop_every_host_gets_its_time_anew(
    seconds: float, running: Running
) -> None:
    running.post()
    running.clock.now += seconds
    assert running.turn(INTERVAL + TOLERANCE) == []
    assert running.turn(1) == ["pve1 overdue 2"]


def test_a_report_ahead_of_the_clock_counts_as_of_now(running: Running) -> None:
    running.clock.now += DAY
    running.post()
    running.clock.now -= DAY
    assert running.turn(INTERVAL + TOLERANCE) == []
    assert running.turn(1) == ["pve1 overdue 2"]


def test_a_muted_host_raises_no_alarm_until_then(running: Running, tmp_path: Path) -> None:
    running.post()
    # The command that mutes has a real clock.
    running.clock.now = time.time()

    def mute(hours: str) -> None:
        options = [f"--database={tmp_path}/hub.sqlite3", f"--mute=pve1={hours}"]
        subprocess.run([sys.executable, str(SCRIPT), *options], timeout=20, check=True)

    mute("2.5")
    assert "muted until" in running.get()
    running.turn()
    assert running.turn(2 * 3600) == []
    assert running.turn(3600) == ["pve1 overdue 2"]
    running.post()
    assert running.turn() == ["pve1 back 2"]
    mute("24")
    assert running.turn(3600) == []
    mute("0")
    assert running.turn(60) == ["pve1 overdue 2"]
    mute("72")
    assert running.turn(DAY + 60) == []
    mute("0")
    assert running.turn() == ["pve1 reminder 2"]


def test_two_nodes_under_one_name_are_noticed(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    for node in ("pve1", "copy", "pve1"):
        running.post(make_document(host={**HOST, "node": node}))
    assert "nodes</bdi> <b>copy and pve1" in running.get()
    assert 'felhom_host_nodes{host_id="pve1"} 2.0' in running.get("/metrics")
    assert [r.getMessage() for r in caplog.records if "copy" in r.getMessage()]
    running.clock.now += DAY + 1
    running.post()
    assert "nodes</bdi> <b>copy and pve1" not in running.get()


def test_a_refusal_is_logged_with_the_host_and_a_page_view_is_not(tmp_path: Path) -> None:
    with run_process(tmp_path) as hub:
        for path in ("/", "/metrics"):
            request(hub.port, "GET", path, {})
        # Nor is a client that hangs up.
        with socket.create_connection(("127.0.0.1", hub.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        body = json.dumps(make_document(host_id="pve\x1b9")).encode()
        request(hub.port, headers={**HEADERS, "Authorization": "Bearer x"}, body=body)
        line = hub.await_log("")
        assert "pve\\\\u001b9: 401 no key, or an unknown one" in line.replace("'", "")
        request(hub.port, headers=HEADERS, body=b"{}")
        assert "422 host_id is missing" in hub.await_log("")


# ---- page and metrics ----------------------------------------------------------------------------


def test_hosts_are_shown_with_their_state_the_overdue_first(running: Running) -> None:
    page = running.get()
    assert page.count("<b>never reported</b>") == page.count("--selftest=hub") == 2
    assert "<title>Hosts: 2 never reported</title>" in page
    running.post(host_id="pve2")
    running.turn(INTERVAL + TOLERANCE + 1)
    running.post()
    page = running.get()
    states = re.findall(r"<h2><bdi>(\w+)</bdi> <b>(.*?)</b></h2>", page)
    assert states == [("pve2", "overdue"), ("pve1", "on time")]
    assert "<title>Hosts: 1 overdue, 1 on time</title>" in page
    running.turn(INTERVAL + 1)
    assert running.states() == {"pve1": "late", "pve2": "overdue"}


def test_an_empty_page_has_a_title(tmp_path: Path) -> None:
    with run_hub(tmp_path, Clock(), {}) as running:
        assert "<title>Hosts: none yet, add one to the keys</title>" in running.get()


def test_null_is_unknown_and_zero_is_zero(running: Running) -> None:
    running.post(make_document(host={**HOST, "cpu_usage": None}))
    assert "<bdi>CPU</bdi> <b>unknown" in running.get()
    assert "felhom_cpu_usage_ratio" not in running.get("/metrics")
    running.post(make_document(host={**HOST, "cpu_usage": 0}))
    assert "<bdi>CPU</bdi> <bdi>0%" in running.get()
    assert 'felhom_cpu_usage_ratio{host_id="pve1"} 0.0' in running.get("/metrics")


def make_full_document(clock: Clock) -> dict[str, Any]:
    """Something of everything that the page and the metrics show."""
    guests = [
        make_guest(**DETAILS),
        make_guest(vmid=101, name="db", status="stopped", **DETAILS),
        make_guest(vmid=102, name="gold", status="stopped", **{**DETAILS, "template": True}),
        make_guest(vmid=103, name="moving", status="stopped", **{**DETAILS, "lock": "migrate"}),
        make_guest(vmid=104, name="parked", status="stopped", **{**DETAILS, "onboot": False}),
        make_guest(vmid=105, name="lost", status="unknown", **{**DETAILS, "onboot": None}),
    ]
    backups = [
        {"vmid": 100, "type": kind, "storage": "nas", "created_at": clock.text(age)}
        for kind, age in (("lxc", 3 * 3600), ("lxc", 5 * DAY), ("qemu", 60))
    ]
    figures = {f"{part}_used_bytes": 9 * 2**30 for part in ("memory", "rootfs")}
    figures |= {f"{part}_total_bytes": 10 * 2**30 for part in ("memory", "rootfs")}
    tasks = [("vzdump 100", "job errors"), ("vzdump 101", "OK"), ("vzstart 101", "WARNINGS: 1")]
    tasks += [("vncproxy 100", "connection timed out"), ("aptupdate", "unknown")]
    return make_document(
        host={**HOST, "cpu_usage": 0.5, "uptime_seconds": 9, **figures},
        cloudflared={"status": "failed"},
        guests=guests,
        backups=backups,
        storage_targets=[
            {"storage": "nas", "used_bytes": 2 * 2**30, "total_bytes": 8 * 2**30},
            {"storage": "iscsi", "status": "available", "used_bytes": None, "total_bytes": None},
        ],
        audit_tail=[
            {"at": clock.text(600), "actor": "root@pam", "operation": operation, "result": result}
            for operation, result in tasks
        ],
    )


def test_what_deserves_a_look_stands_out(running: Running) -> None:
    assert running.post(make_full_document(running.clock)) == 200
    page = running.get()
    assert re.findall(r"<b>(.*?)</b>", page) == [
        "never reported",
        "on time",
        "unknown",
        "failed",
        "90%",
        "unknown",
        f"failed at {running.clock.text(600)}: job errors",
        "should run, but is stopped",
        "unknown",
    ]
    for label in ("cloudflared</bdi> <b>failed", "vzdump 100</bdi> <b>", "101 db</bdi> <b>should"):
        assert f"<bdi>{label}" in page
    assert "<bdi>Root disk</bdi> <b>90%" in page
    assert "<bdi>Memory</bdi> <bdi>90%" in page
    assert "<bdi>nas</bdi> <bdi>25%" in page
    assert "<bdi>iscsi</bdi> <b>unknown" in page
    assert "<bdi>105 lost</bdi> <b>unknown" in page
    assert "<details open><summary>Guests: 1 running, 4 stopped, 1 unknown" in page
    running.post(make_document(guests=[make_guest(vmid=100 + n) for n in range(13)]))
    assert "<details ><summary>Guests: 13 running" in running.get()


METRICS: Final = """
host_overdue{host_id="pve1"} 0.0
host_nodes{host_id="pve1"} 1.0
poll_interval_seconds{host_id="pve1"} 300.0
rootfs_used_bytes{host_id="pve1"} 9663676416.0
tunnel_up{host_id="pve1"} 0.0
guest_running{host_id="pve1",vmid="101",name="db",type="lxc"} 0.0
guest_should_run{host_id="pve1",vmid="101",name="db",type="lxc"} 1.0
guest_should_run{host_id="pve1",vmid="102",name="gold",type="lxc"} 0.0
storage_used_bytes{host_id="pve1",storage="nas"} 2147483648.0
tasks_failed{host_id="pve1"} 1.0
"""


def test_metrics_say_what_is_known(running: Running) -> None:
    assert running.post(make_full_document(running.clock)) == 200
    text = running.get("/metrics")
    assert [line for line in METRICS.strip().splitlines() if f"felhom_{line}" not in text] == []
    assert f'received_timestamp_seconds{{host_id="pve1"}} {running.clock.now}\n' in text
    assert 'vmid="105"' not in text
    assert 'storage="iscsi"' not in text
    assert 'host_id="pve2"' not in text
    running.turn(INTERVAL + TOLERANCE + 1)
    text = running.get("/metrics")
    assert 'felhom_host_overdue{host_id="pve1"} 1.0' in text
    assert "felhom_tunnel_up" not in text


HOSTILE: Final = "<script>alert('1')</script>\"' onload=x \u202e\ud800\\\n"


def test_everything_a_report_says_is_escaped(running: Running) -> None:
    document = make_document(
        agent_version=HOSTILE,
        cloudflared={"status": HOSTILE},
        host={**HOST, "pve_version": HOSTILE, "node": HOSTILE},
        guests=[make_guest(name=HOSTILE, type=HOSTILE, status=HOSTILE, lock=HOSTILE)],
        storage_targets=[{"storage": HOSTILE, "used_bytes": 1, "total_bytes": 1}],
        audit_tail=[{"at": "2026-06-08T02:00:03Z", "operation": HOSTILE, "result": HOSTILE}],
    )
    assert running.post(document) == 200
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
    with running.hub.lock, running.hub.database as database:
        database.execute("UPDATE hosts SET report = '{\"host\": 1}'")
    page = running.get()
    assert "This report cannot be shown:</bdi> <b>host_id is missing or invalid" in page
    assert "pve2" in page
    assert 'felhom_host_overdue{host_id="pve1"} 0.0' in running.get("/metrics")
