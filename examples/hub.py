#!/usr/bin/env python3
"""A small hub for felhom-agent: takes host reports, shows them on one page, and raises alarms.

    python3 hub.py --keys keys.json --database hub.sqlite3

An example to start with and to learn from: the standard library, one SQLite file, no users and no
settings. It speaks plain HTTP; docs/hub.md shows how to put a web server with TLS in front of it.
"""

import argparse
import contextlib
import hmac
import http.server
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

LOG = logging.getLogger("hub")
MAX_BODY_BYTES = 4 * 1024 * 1024
# How late a report may be before its host is overdue; docs/hub.md says why.
TOLERANCE_SECONDS = 360
HISTORY_SECONDS = 7 * 86400
MAX_GUESTS_SHOWN = 200
TIME = "<small>%a %H:%M:%S</small>"
HEAD = """<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=30>
<meta name=viewport content='width=device-width, initial-scale=1'><style>
:root { color-scheme: light dark; --page: #f3f4f6; --card: #fff; --text: #1b1f24; --dim: #57606a;
  --line: #8884; --bar: #2f6fd0; --green: #1a7f37; --red: #c4161c; --amber: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #1a1f26; --text: #e8ebee;
  --dim: #9aa5b1; --bar: #5b9bf5; --green: #4cc265; --red: #ff7b72; --amber: #e3a92b } }
body { margin: 0 auto; padding: 1rem; max-width: 88rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; font-variant: tabular-nums; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h1, h2, p { margin: 0 0 .6rem } .well { border-left-color: var(--green) }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr));
  gap: 1rem; align-items: start } b.well { color: var(--green) }
b.overdue { padding: 0 .6rem; border-radius: 4px; background: var(--red); color: var(--card) }
article { padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-left-width: 5px; border-radius: 8px } small { color: var(--dim) }
header, .bar { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 1rem;
  align-items: baseline } .bar { margin-top: .4rem } .unknown { color: var(--amber) }
.bar i { flex: 1 0 100%; height: .5rem; border-radius: .3rem;
  background: linear-gradient(90deg, var(--bar) var(--used), var(--line) 0) }
caption { padding: .9rem 0 .3rem; text-align: left } table { width: 100%; border-spacing: 0 }
td { padding: .2rem 0; border-top: 1px solid var(--line) } .overdue { border-color: var(--red) }
td + td { padding-left: .7rem; text-align: right; white-space: nowrap }
</style>"""
# What json and the functions below raise for a report that is invalid.
INVALID = (ValueError, ArithmeticError, RecursionError)


class Refusal(Exception):
    """A request is answered with this status and this reason."""


class Hub(http.server.ThreadingHTTPServer):
    """Stores the reports and judges, by its own clock, which host is overdue."""

    # So many hosts may connect in the same moment; the default is 5.
    request_queue_size = 512

    def __init__(
        self, listen: str, path: Path, keys: dict[str, str], interval: int, clock: Any = time.time
    ) -> None:
        self.keys = {host_id: f"Bearer {key}".encode() for host_id, key in keys.items()}
        self.interval, self.clock, self.started_at = min(max(interval, 60), 3600), clock, clock()
        self.lock = threading.Lock()
        self.database = sqlite3.connect(path, check_same_thread=False)
        # FULL: a commit is on the disk when it returns, whatever is killed or unplugged after that.
        self.database.executescript("""
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = FULL;
            CREATE TABLE IF NOT EXISTS hosts (host_id PRIMARY KEY, received_at, due_at, report,
                told DEFAULT 'well'); -- the state that was announced last
            CREATE TABLE IF NOT EXISTS history (host_id, received_at, report);
            CREATE INDEX IF NOT EXISTS history_by_time ON history (received_at);
        """)
        address, _, port = listen.rpartition(":")
        super().__init__((address, int(port)), Handler)

    def accept(self, host_id: str, body: bytes) -> str:
        """Return the envelope once the report is on the disk. Raises Refusal."""
        now, report = self.clock(), None
        try:
            text = body.decode()
            report = json.loads(text)
            if get(report, "host_id", str) != host_id:
                raise Refusal(403, "this key is for another host_id")
            show_report(report, now)
        except INVALID as exc:
            raise Refusal(400 if report is None else 422, str(exc)) from exc
        update = "UPDATE hosts SET received_at = ?, due_at = ?, report = ? WHERE host_id = ?"
        with self.lock, self.database as database:
            database.execute("INSERT OR IGNORE INTO hosts (host_id) VALUES (?)", (host_id,))
            database.execute(update, (now, now + self.interval, text, host_id))
            database.execute("INSERT INTO history VALUES (?, ?, ?)", (host_id, now, text))
            database.execute("DELETE FROM history WHERE received_at < ?", (now - HISTORY_SECONDS,))
        return json.dumps({"poll_interval_seconds": self.interval})

    def hosts(self) -> list[tuple[Any, ...]]:
        """Return every host that has a key with its state, the overdue first."""
        with self.lock:
            return self.database.execute(
                "SELECT value, received_at, due_at, report, told, CASE WHEN report IS NULL THEN"
                " 'never reported' WHEN due_at + ? < ? THEN 'overdue' ELSE 'well' END AS state FROM"
                " json_each(?) LEFT JOIN hosts ON host_id = value ORDER BY state <> 'overdue', id",
                (TOLERANCE_SECONDS, self.clock(), json.dumps(list(self.keys))),
            ).fetchall()

    def announce(self, command: str) -> None:
        """Run the command for each host that became overdue or came back since it last ran."""
        # Nobody could report while the hub was down, so every host gets its time anew.
        just_started = self.clock() < self.started_at + self.interval + TOLERANCE_SECONDS
        for host_id, _, _, _, told, state in self.hosts():
            if state in (told, "never reported") or (state == "overdue" and just_started):
                continue
            change = "overdue" if state == "overdue" else "back"
            LOG.warning("%s is %s", host_id, change)
            try:
                subprocess.run([command, host_id, change], timeout=60, check=True)
            except (OSError, subprocess.SubprocessError) as exc:
                LOG.error("%s", exc)
            with self.lock, self.database as database:
                database.execute("UPDATE hosts SET told = ? WHERE host_id = ?", (state, host_id))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request a connection, so no proxy can send one into a connection that closes."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: Hub

    def respond(self) -> tuple[str, str]:
        """Return content type and body of a successful answer. Raises Refusal."""
        if self.path not in ("/", "/api/v1/host-report"):
            raise Refusal(404, "no such path")
        if self.command != ("GET" if self.path == "/" else "POST"):
            raise Refusal(405, "this path does not take this method")
        if self.path == "/":
            return "text/html; charset=utf-8", show_page(self.server.hosts(), self.server.clock())
        given = self.headers.get("Authorization", "").encode()
        owners = [name for name, key in self.server.keys.items() if hmac.compare_digest(given, key)]
        if not owners:
            raise Refusal(401, "no key, or an unknown one")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "Content-Type is not application/json")
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "Content-Length is required")
        if not length.isdecimal():
            raise Refusal(400, "Content-Length is not a number")
        if len(length) > 7 or int(length) > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        return "application/json", self.server.accept(owners[0], self.rfile.read(int(length)))

    def answer(self) -> None:
        self.close_connection, status = True, 200
        try:
            content_type, text = self.respond()
        except Refusal as exc:
            status, reason = exc.args
            self.log_error("%s", reason)
            content_type, text = "application/json", json.dumps({"error": reason})
        body = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Allow", "GET" if self.path == "/" else "POST")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("X-Content-Type-Options", "nosniff")
        with contextlib.suppress(OSError):
            self.end_headers()
            self.wfile.write(body)
            if status != 200:
                # To close while a body is coming in would reset the connection: the answer is lost.
                self.connection.shutdown(socket.SHUT_WR)
                any(not self.rfile.read1(65536) for _ in range(200))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815


def get(parent: Any, name: str, *kinds: type) -> Any:
    """Return a field of a report; without a type, a number or None. Raises ValueError."""
    value = parent.get(name) if isinstance(parent, dict) else None
    is_valid = type(value) in (kinds or (int, float, type(None)))
    if not is_valid or (isinstance(value, int | float) and not 0 <= value < 1e18):
        raise ValueError(f"{name} is missing or invalid")
    return value


def show_ago(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    units = ((86400, "days"), (3600, "h"), (60, "min"))
    size, unit = next((unit for unit in units if abs(seconds) >= 2 * unit[0]), (1, "s"))
    return f"in {-seconds / size:.0f} {unit}" if seconds < 0 else f"{seconds / size:.0f} {unit} ago"


def show_bar(label: str, used: float | None, total: float | None, text: str = "") -> str:
    bar = "<span class=unknown>unknown</span>"
    if used is not None and total:
        percent = min(100, round(100 * used / total))
        text = text or f"{used / 2**30:,.1f} of {total / 2**30:,.1f} GiB"
        bar = f"<span><small>{text}</small> {percent} %</span><i style='--used:{percent}%'></i>"
    return f"<div class=bar><bdi>{escape(label)}</bdi>{bar}</div>"


def show_report(report: Any, now: float) -> str:
    """Return a report as HTML. Raises ValueError or ArithmeticError if it is invalid."""
    host, guests = get(report, "host", dict), get(report, "guests", list)
    facts = f"Proxmox VE {get(host, 'pve_version', str, type(None)) or 'unknown'}, booted "
    facts += f"{show_ago(get(host, 'uptime_seconds'))}, agent {get(report, 'agent_version', str)}"
    facts += f", cloudflared {get(get(report, 'cloudflared', dict), 'status', str)}"
    bars = show_bar("CPU", get(host, "cpu_usage"), 1, f"of {get(host, 'cpu_count') or '?'} cores")
    for label, name in (("Memory", "memory"), ("Root disk", "rootfs")):
        bars += show_bar(label, get(host, f"{name}_used_bytes"), get(host, f"{name}_total_bytes"))
    for storage in get(report, "storage_targets", list):
        sizes = get(storage, "used_bytes"), get(storage, "total_bytes")
        bars += show_bar(get(storage, "storage", str), *sizes)
    backups = sorted(get(report, "backups", list), key=lambda item: get(item, "created_at", str))
    newest = {get(b, "vmid", int): datetime.fromisoformat(b["created_at"]) for b in backups}
    counts = sorted(Counter(get(guest, "status", str) for guest in guests).items())
    rows = f"<caption>{len(guests)} guests: {', '.join(f'{n} {escape(s)}' for s, n in counts)}"
    for guest in guests[:MAX_GUESTS_SHOWN]:
        vmid, status = get(guest, "vmid", int), escape(guest["status"])
        name, kind = escape(get(guest, "name", str)), escape(get(guest, "type", str))
        backup = f"backup {show_ago(now - newest[vmid].timestamp())}" if vmid in newest else ""
        rows += f"<tr><td>{vmid} <bdi>{name}</bdi> <small>{kind}</small><td><small>{backup}</small>"
        rows += f"<td class='{status}'>{status}"
    return f"<p><small>{escape(facts)}</small></p>{bars}<table>{rows}</table>"


def show_page(hosts: list[tuple[Any, ...]], now: float) -> str:
    counts = Counter(state for *_, state in hosts)
    summary = ", ".join(f"{number} {state}" for state, number in counts.items())
    page = f"{HEAD}<title>{summary}</title><header><h1>Hosts: {summary}</h1>"
    page += f"{time.strftime(TIME, time.localtime(now))}</header><main>"
    for host_id, received_at, due_at, report, _, state in hosts:
        title = f"<h2><bdi>{escape(host_id)}</bdi></h2><b class='{state}'>{state}</b>"
        page += f"<article class='{state}'><header>{title}</header>"
        if report:
            times = (time.strftime(TIME, time.localtime(at)) for at in (received_at, due_at))
            page += f"<p>Last report {show_ago(now - received_at)} {next(times)}<br>"
            page += f"Next one due {show_ago(now - due_at)} {next(times)}</p>"
            try:
                page += show_report(json.loads(report), now)
            except INVALID as exc:  # accepted by an earlier version of this file
                page += f"<p class=unknown>This report cannot be shown: {escape(str(exc))}</p>"
        page += "</article>"
    return page + "</main>"


def load_keys(path: Path) -> dict[str, str]:
    """Return the key of each host. Raises OSError or ValueError."""
    if path.stat().st_mode & 0o077:
        raise ValueError(f"others can read it: chmod 600 {path}")
    keys = json.loads(path.read_text("utf-8"))
    if not isinstance(keys, dict) or not all(isinstance(key, str) and key for key in keys.values()):
        raise ValueError('it must be like {"pve1": "its key"}')
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description="A small hub for felhom-agent.")
    parser.add_argument("--keys", type=Path, required=True, help='{"pve1": "its key"}, mode 600')
    parser.add_argument("--database", type=Path, required=True, help="SQLite file, made if missing")
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="ADDRESS:PORT")
    parser.add_argument("--interval", type=int, default=300, metavar="SECONDS", help="60 to 3600")
    parser.add_argument("--on-change", metavar="COMMAND", default="true", help="gets HOST STATE")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    os.umask(0o077)
    try:
        keys = load_keys(arguments.keys)
    except (OSError, ValueError) as exc:
        parser.error(f"{arguments.keys}: {exc}")
    hub = Hub(arguments.listen, arguments.database, keys, arguments.interval)
    # What is acknowledged is on the disk, so there is nothing to do at the end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    LOG.info("listening on http://%s:%d/", *hub.server_address)
    while True:
        time.sleep(5)
        hub.announce(arguments.on_change)


if __name__ == "__main__":
    main()
