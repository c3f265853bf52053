"""The example hub over real sockets: its answers, its store, its alarms and its page."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
OVERDUE_AFTER: Final = INTERVAL + example.TOLERANCE_SECONDS


def make_document(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(make_report().to_json())
    return {**document, **changes}


def make_guest(**changes: Any) -> dict[str, Any]:
    guest = {"vmid": 100, "type": "lxc", "name": "web", "status": "running"}
    return {**guest, "controller_version": "", **changes}


@dataclass
class Clock:
    now: float = 1_780_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Running:
    """A hub that serves on loopback, by a clock that stands still until a test moves it."""

    hub: example.Hub
    clock: Clock

    def request(
        self,
        method: str = "POST",
        path: str = PATH,
        headers: Mapping[str, str] = HEADERS,
        body: bytes = b"",
    ) -> tuple[http.client.HTTPResponse, str]:
        """Send exactly these headers, and Content-Length unless they say how long the body is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.hub.server_port, timeout=20)
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

    def post(self, document: object, host_id: str = "pve1") -> int:
        headers = {**HEADERS, "Authorization": f"Bearer {KEYS[host_id]}"}
        response, _ = self.request(headers=headers, body=json.dumps(document).encode())
        return response.status

    def page(self) -> str:
        response, text = self.request("GET", "/", {})
        assert response.status == 200
        return text

    def stored(self) -> list[tuple[str, float]]:
        with self.hub.lock:
            rows = self.hub.database.execute("SELECT host_id, received_at FROM history")
            return rows.fetchall()


@contextlib.contextmanager
def run_hub(folder: Path, clock: Clock, keys: Mapping[str, str] = KEYS) -> Iterator[Running]:
    hub = example.Hub("127.0.0.1:0", folder / "hub.sqlite3", dict(keys), INTERVAL, clock)
    thread = threading.Thread(target=hub.serve_forever, args=[0.01])
    thread.start()
    try:
        yield Running(hub, clock)
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
        hub.database.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with run_hub(tmp_path, Clock()) as running:
        yield running


def test_the_example_stays_small() -> None:
    lines = SCRIPT.read_text("utf-8").splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 100


# ---- answers -------------------------------------------------------------------------------------


def test_a_report_is_stored_and_answered_with_the_interval(running: Running) -> None:
    response, text = running.request(body=json.dumps(make_document()).encode())
    assert (response.status, json.loads(text)) == (200, {"poll_interval_seconds": INTERVAL})
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Content-Length"] == str(len(text))
    assert running.stored() == [("pve1", running.clock.now)]


def test_the_agent_can_report_to_it(running: Running) -> None:
    url = f"http://127.0.0.1:{running.hub.server_port}"
    config = agent.HubConfig(url=url, host_id="pve1", api_key="key-1")
    envelope = agent.HubClient(config, logger=LOG).report(make_report())
    assert envelope.poll_interval_seconds == INTERVAL


GOOD: Final = json.dumps(make_document()).encode()
TOO_LARGE: Final = b" " * (example.MAX_BODY_BYTES + 1)
REFUSED: Final = {
    "not-json": (400, {}, b'{"host_id": '),
    "not-utf-8": (400, {}, GOOD.replace(b"pve1", b"pv\xe91")),
    "too-deep": (400, {}, b"[" * 100_000),
    "length-no-number": (400, {"Content-Length": "+5"}, b""),
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
    response, text = running.request(headers={**HEADERS, **headers}, body=body)
    assert (response.status, list(json.loads(text))) == (status, ["error"])
    assert json.loads(text)["error"]
    assert running.stored() == []


HOST: Final = make_document()["host"]
INVALID: Final = {
    "no-guests": {"guests": None},
    "guests-an-object": {"guests": {}},
    "guest-without-name": {"guests": [{"vmid": 100, "type": "lxc", "status": "running"}]},
    "vmid-a-string": {"guests": [make_guest(vmid="100")]},
    "vmid-true": {"guests": [make_guest(vmid=True)]},
    "cpu-a-string": {"host": {**HOST, "cpu_usage": "0.5"}},
    "cpu-negative": {"host": {**HOST, "cpu_usage": -1}},
    "cpu-nan": {"host": {**HOST, "cpu_usage": float("nan")}},
    "memory-infinite": {"host": {**HOST, "memory_total_bytes": float("inf")}},
    "memory-huge": {"host": {**HOST, "memory_total_bytes": 10**400}},
    "backup-time": {"backups": [{"vmid": 100, "created_at": "yesterday"}]},
    "backup-time-with-no-zone": {"backups": [{"vmid": 100, "created_at": "0001-01-01"}]},
    "no-host_id": {"host_id": 1},
}


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID)
def test_what_the_page_could_not_show_is_refused(changes: dict[str, Any], running: Running) -> None:
    assert running.post(make_document(guests=[make_guest()]) | changes) == 422
    assert running.stored() == []


def test_a_later_agent_may_say_more(running: Running) -> None:
    guest = make_guest(type="oci", status="paused", tags=["x"])
    document = make_document(guests=[guest], disks=[1], cloudflared={"status": "x", "y": None})
    assert running.post(document) == 200
    assert "paused" in running.page()


def test_a_silent_client_does_not_keep_others_waiting(running: Running) -> None:
    assert example.Handler.timeout == 30
    with socket.create_connection(("127.0.0.1", running.hub.server_port)) as silent:
        silent.sendall(b"POST /api/v1/host-report HTTP/1.1\r\n")
        assert running.post(make_document()) == 200


def test_200_hosts_report_at_once(tmp_path: Path) -> None:
    keys = {f"pve{number}": f"key-{number}" for number in range(200)}
    together = threading.Barrier(len(keys))
    # Otherwise the kernel makes some of them try again a second later.
    assert example.Hub.request_queue_size >= len(keys)
    with run_hub(tmp_path, Clock(), keys) as running, ThreadPoolExecutor(len(keys)) as pool:

        def report(host_id: str) -> int:
            body = json.dumps(make_document(host_id=host_id)).encode()
            headers = {**HEADERS, "Authorization": f"Bearer {keys[host_id]}"}
            together.wait(20)
            return running.request(headers=headers, body=body)[0].status

        assert list(pool.map(report, keys)) == [200] * len(keys)
        assert sorted(host_id for host_id, _ in running.stored()) == sorted(keys)


# ---- store ---------------------------------------------------------------------------------------


def test_what_is_stored_survives_a_power_cut(running: Running) -> None:
    """As far as SQLite can see to it, which says this of write-ahead logging with 2, FULL."""
    with running.hub.lock:
        values = [
            running.hub.database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous")
        ]
    assert values == ["wal", 2]


def test_history_is_kept_for_a_week_and_the_newest_report_for_ever(running: Running) -> None:
    start = running.clock.now
    assert running.post(make_document(host_id="pve2"), "pve2") == 200
    for day in range(9):
        running.clock.now = start + day * DAY
        assert running.post(make_document()) == 200
    assert running.stored() == [("pve1", start + day * DAY) for day in range(1, 9)]
    assert "Last report 8 days ago" in running.page()


@contextlib.contextmanager
def run_process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    keys = folder / "keys.json"
    keys.touch(mode=0o600)
    keys.write_text(json.dumps(KEYS), "utf-8")
    command = [sys.executable, str(SCRIPT), f"--keys={keys}", f"--database={folder}/hub.sqlite3"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_no_acknowledged_report_is_lost_when_it_is_killed(tmp_path: Path) -> None:
    acknowledged = 0
    for reports in (1, 20, 50):
        with run_process(tmp_path, "--listen=127.0.0.1:0") as process:
            assert process.stderr
            port = int(process.stderr.readline().rpartition(":")[2].strip("/\n"))
            for _ in range(reports + 1):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                with contextlib.closing(connection):
                    body = json.dumps(make_document(reported_at=str(acknowledged)))
                    connection.request("POST", PATH, body, HEADERS)
                    # The last one is killed while it is being stored.
                    if reports:
                        assert connection.getresponse().status == 200
                        acknowledged += 1
                    reports -= 1
            process.kill()
    with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite3")) as database:
        rows = database.execute("SELECT json_extract(report, '$.reported_at') FROM history")
        assert {str(number) for number in range(acknowledged)} <= {row[0] for row in rows}
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize(
    ("mode", "text", "problem"),
    [(0o644, "{}", "chmod 600"), (0o600, '{"pve1": ""}', '"pve1"'), (0o600, "{", "line 1")],
)
def test_unusable_keys_are_refused_at_the_start(
    mode: int, text: str, problem: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(text, "utf-8")
    keys.chmod(mode)
    command = [sys.executable, str(SCRIPT), f"--keys={keys}", f"--database={tmp_path}/x"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, problem in ended.stderr) == (2, True)


# ---- alarms --------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> str:
    path = tmp_path / "alarm"
    path.write_text(f'#!/bin/sh\necho "$1 $2 $#" >>{tmp_path}/told\n', "utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def told(tmp_path: Path) -> Callable[[], list[str]]:
    """Return what the command was told since the last call."""

    def read() -> list[str]:
        path = tmp_path / "told"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return read


def test_an_alarm_is_raised_once_and_taken_back_once(
    running: Running, command: str, told: Callable[[], list[str]]
) -> None:
    running.clock.now += DAY
    running.post(make_document())
    for seconds, expected in ((OVERDUE_AFTER, []), (1, ["pve1 overdue 2"]), (DAY, [])):
        running.clock.now += seconds
        running.hub.announce(command)
        assert told() == expected
    running.post(make_document())
    for expected in (["pve1 back 2"], []):
        running.hub.announce(command)
        assert told() == expected


def test_a_restart_neither_repeats_nor_forgets_an_alarm(
    tmp_path: Path, command: str, told: Callable[[], list[str]]
) -> None:
    clock = Clock()
    with run_hub(tmp_path, clock) as running:
        running.post(make_document())
        running.post(make_document(host_id="pve2"), "pve2")
        clock.now += OVERDUE_AFTER + 1
        running.post(make_document(host_id="pve2"), "pve2")
        running.hub.announce(command)
        assert told() == ["pve1 overdue 2"]
    # pve2 falls silent while the hub is down, and has its time to report from the start on.
    clock.now += DAY
    with run_hub(tmp_path, clock) as running:
        for seconds, expected in ((0, []), (OVERDUE_AFTER - 1, []), (1, ["pve2 overdue 2"])):
            clock.now += seconds
            running.hub.announce(command)
            assert told() == expected
    with run_hub(tmp_path, clock) as running:
        running.post(make_document())
        running.hub.announce(command)
        assert told() == ["pve1 back 2"]


# ---- page ----------------------------------------------------------------------------------------


def test_hosts_are_shown_with_their_state_the_overdue_first(running: Running) -> None:
    assert running.page().count("<b class='never reported'>") == 2
    running.post(make_document(host_id="pve2"), "pve2")
    running.clock.now += OVERDUE_AFTER + 1
    running.post(make_document())
    page = running.page()
    assert re.findall(r"<bdi>(\w+)</bdi></h2><b class='(.*?)'>", page) == [
        ("pve2", "overdue"),
        ("pve1", "well"),
    ]
    assert "Hosts: 1 overdue, 1 well" in page
    assert "Next one due in 5 min" in page


def test_null_is_unknown_and_zero_is_zero(running: Running) -> None:
    running.post(make_document(host={**HOST, "cpu_usage": None}))
    assert "<bdi>CPU</bdi><span class=unknown>unknown" in running.page()
    running.post(make_document(host={**HOST, "cpu_usage": 0, "cpu_count": 8}))
    assert "<bdi>CPU</bdi><span><small>of 8 cores</small> 0 %" in running.page()


def test_guests_backups_and_storages_are_shown(running: Running) -> None:
    at = [
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(running.clock.now - age))
        for age in (3 * 3600, 5 * DAY)
    ]
    backups = [{"vmid": 100, "storage": "nas", "created_at": time_} for time_ in at]
    storage = {"storage": "nas", "type": "nfs", "status": "available"}
    running.post(
        make_document(
            guests=[make_guest(), make_guest(vmid=101, status="unknown")],
            backups=backups,
            storage_targets=[{**storage, "total_bytes": 8 * 2**30, "used_bytes": 2 * 2**30}],
        )
    )
    page = running.page()
    assert "<caption>2 guests: 1 running, 1 unknown" in page
    assert page.count("backup 3 h ago") == page.count("backup") == 1
    assert page.count("<td class='unknown'>unknown") == 1
    assert "<bdi>nas</bdi><span><small>2.0 of 8.0 GiB</small> 25 %" in page


HOSTILE: Final = "<script>alert('1')</script>\"' onload=x \u202e\ud800"


def test_everything_a_report_says_is_escaped(running: Running) -> None:
    guest = make_guest(name=HOSTILE, type=HOSTILE, status=HOSTILE)
    storage = {"storage": HOSTILE, "type": HOSTILE, "status": HOSTILE}
    running.post(
        make_document(
            agent_version=HOSTILE,
            cloudflared={"status": HOSTILE},
            host={**HOST, "pve_version": HOSTILE},
            guests=[guest],
            storage_targets=[{**storage, "total_bytes": 1, "used_bytes": 1}],
        )
    )
    response, page = running.request("GET", "/", {})
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)") == 9
    assert not re.search(r"<[^>]*onload[^>']*>", page)
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_a_report_that_cannot_be_shown_does_not_break_the_page(running: Running) -> None:
    running.post(make_document())
    with running.hub.lock, running.hub.database as database:
        database.execute("UPDATE hosts SET report = '{\"host\": 1}'")
    page = running.page()
    assert "This report cannot be shown: host is missing or invalid" in page
    assert "pve2" in page
