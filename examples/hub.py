#!/usr/bin/env python3
"""A small hub for felhom-agent: takes host reports, shows them on one page, and raises alarms.

An example to start with: the standard library, one SQLite file, no users and no settings. It speaks
plain HTTP; docs/hub.md shows how to run it, and how to put a web server with TLS in front of it.
"""

import argparse
import contextlib
import hmac
import http.server
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from sqlite3 import Connection, Row
from typing import Any

LOG = logging.getLogger("hub")
DAY = 86400
# How late a report may be before its host is overdue; docs/hub.md says why.
TOLERANCE_SECONDS = 360
MAX_BODY_BYTES = 4 * 1024 * 1024
# A turn of the loop takes a second. If it seems to take longer than this, it was suspended.
AWAY_SECONDS = 60
REPORT_PATH = "/api/v1/host-report"

# ---- rules: who is overdue, who is told, what deserves a look ------------------------------------


@dataclass(slots=True)
class Rules:
    """What the hub says of a host, which is a row of Hub.load_hosts."""

    interval: int
    tolerance: int
    remind_seconds: float
    # No host could report before this: the hub was not running.
    alive_since: float = 0

    def state(self, host: Row, now: float) -> str:
        """Return "overdue", "late", "never reported" or "on time"."""
        if host["received_at"] is None:
            return "never reported"
        silent_since = host["received_at"]
        # Only a report ends an alarm, so a host that is overdue already gets no new time.
        if host["told"] != "overdue":
            silent_since = max(silent_since, self.alive_since)
        if now > silent_since + host["interval"] + self.tolerance:
            return "overdue"
        if now > host["received_at"] + host["interval"]:
            return "late"
        return "on time"

    def word(self, host: Row, now: float) -> str | None:
        """Return what the command has yet to be told: "overdue", "back", "reminder" or nothing."""
        is_overdue = self.state(host, now) == "overdue"
        was_overdue = host["told"] == "overdue"
        if was_overdue and not is_overdue:
            return "back"
        if not is_overdue or now < host["muted_until"]:
            return None
        if not was_overdue:
            return "overdue"
        if self.remind_seconds and now >= host["told_at"] + self.remind_seconds:
            return "reminder"
        return None


def should_run(guest: dict[str, Any]) -> bool | None:
    """Return whether a guest is meant to run; None without the agent's extra `details`."""
    if guest.get("onboot") is None:
        return None
    return bool(guest["onboot"]) and not guest.get("template") and not guest.get("lock")


def is_failed(task: dict[str, Any]) -> bool:
    """Return whether a task failed; to Proxmox, a console that was closed did so too."""
    is_console = re.match(r"(vnc|spice|term)(proxy|shell)\b", task["operation"])
    return not is_console and not re.match(r"(OK|WARNINGS: \d+|unknown)$", task["result"])


# ---- receiving -----------------------------------------------------------------------------------

KINDS = {"text": str, "time": str, "flag": bool, "vmid": int, "number": int | float}
# What this hub uses of a report. With a question mark it may be null, or missing as in the reports
# of older agents.
FIELDS = {
    "host": "node:text pve_version:text? kernel_version:text? uptime_seconds:number?"
    " cpu_usage:number? memory_used_bytes:number? memory_total_bytes:number?"
    " rootfs_used_bytes:number? rootfs_total_bytes:number?",
    "cloudflared": "status:text",
    "guests": "vmid:vmid type:text name:text status:text onboot:flag? template:flag? lock:text?",
    "storage_targets": "storage:text used_bytes:number? total_bytes:number?",
    "backups": "vmid:vmid type:text? storage:text created_at:time",
    "audit_tail": "at:time operation:text result:text",
}
# A report of 4 MiB can take 100 MiB as objects, so only one is parsed at a time.
PARSING = threading.Lock()


class Refusal(Exception):
    """A request is answered with this status and this reason."""


def parse_report(body: bytes) -> dict[str, Any]:
    """Return a report in which everything is valid that this hub uses. Raises Refusal."""
    status = 400
    try:
        report: dict[str, Any] = json.loads(body.decode())
        status = 422
        check(report, "host_id:text agent_version:text")
        for part, fields in FIELDS.items():
            items = report.get(part)
            if part in ("host", "cloudflared"):
                items = [items]
            if not isinstance(items, list):
                raise ValueError(f"{part} is missing or not a list")
            for item in items:
                check(item, fields)
    except (ValueError, ArithmeticError, RecursionError) as exc:
        raise Refusal(status, str(exc)) from exc
    return report


def check(item: object, fields: str) -> None:
    """Raises ValueError or ArithmeticError."""
    for field in fields.split():
        name, _, kind = field.partition(":")
        value = item.get(name) if isinstance(item, dict) else None
        if value is None and kind.endswith("?"):
            continue
        is_valid = isinstance(value, KINDS[kind.rstrip("?")])
        if isinstance(value, bool):
            is_valid = kind == "flag?"
        elif isinstance(value, int | float):
            is_valid = is_valid and 0 <= value < 1e18
        if not is_valid:
            raise ValueError(f"{name} is missing or invalid")
        if kind == "time":
            parse_time(str(value))


def parse_time(text: str) -> float:
    """Return seconds since 1970. Raises ValueError or OverflowError."""
    return datetime.fromisoformat(text).timestamp()


def load_keys(path: Path) -> dict[str, bytes]:
    """Return what each host sends as Authorization. Raises OSError or ValueError."""
    if path.stat().st_mode & 0o077:
        raise ValueError(f"others can read it: chmod 600 {path}")
    keys = json.loads(path.read_text("utf-8"))
    if not isinstance(keys, dict) or not all(isinstance(key, str) and key for key in keys.values()):
        raise ValueError('it must be like {"pve1": "its key"}')
    shared = [host_id for host_id in keys if list(keys.values()).count(keys[host_id]) > 1]
    if shared:
        raise ValueError(f"the same key for {' and '.join(shared)}")
    return {host_id: f"Bearer {key}".encode() for host_id, key in keys.items()}


def open_database(path: Path) -> Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    database.row_factory = Row
    # FULL: a commit is on the disk when it returns, whatever is killed or unplugged after that.
    database.executescript("""
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = FULL;
        CREATE TABLE IF NOT EXISTS hosts (host_id PRIMARY KEY, received_at, due_at, report,
            told DEFAULT 'well', told_at DEFAULT 0, muted_until DEFAULT 0);
        CREATE TABLE IF NOT EXISTS nodes (host_id, node, seen_at, PRIMARY KEY (host_id, node));
        CREATE TABLE IF NOT EXISTS history (host_id, received_at, report);
        CREATE INDEX IF NOT EXISTS history_by_time ON history (received_at);
    """)
    # The hub of version 0.3.0 made the table without these two.
    columns = {row["name"] for row in database.execute("PRAGMA table_info(hosts)")}
    for column in {"told_at", "muted_until"} - columns:
        database.execute(f"ALTER TABLE hosts ADD COLUMN {column} DEFAULT 0")
    return database


def run_command(command: str, host_id: str, word: str) -> None:
    """Raises OSError, ValueError or SubprocessError."""
    if command:
        subprocess.run([command, host_id, word], stdin=subprocess.DEVNULL, timeout=60, check=True)


class Hub:
    """Stores reports, and looks every second, by its own clock, who is overdue."""

    def __init__(self, keys: Path, database: Connection, rules: Rules, command: str) -> None:
        self.keys_path, self.keys_changed_at = keys, keys.stat().st_ctime_ns
        self.keys, self.database = load_keys(keys), database
        self.rules, self.command = rules, command
        self.clock: Callable[[], float] = time.time
        self.stepped_at, self.lock = 0.0, threading.Lock()
        # Hosts that the command is being told of, and how many such commands may run at once.
        self.telling: set[str] = set()
        self.commands = threading.Semaphore(16)

    def load_hosts(self) -> list[Row]:
        """Return every host that has a key, without its report, which may be large."""
        with self.lock, self.database as database:
            return database.execute(
                "SELECT value AS host_id, received_at, due_at - received_at AS interval, told,"
                " told_at, muted_until, (SELECT json_group_array(node) FROM nodes"
                " WHERE nodes.host_id = value AND seen_at > ?) AS nodes"
                " FROM json_each(?) LEFT JOIN hosts ON hosts.host_id = value ORDER BY id",
                (self.clock() - DAY, json.dumps(list(self.keys))),
            ).fetchall()

    def load_report(self, host_id: str) -> dict[str, Any]:
        """Raises Refusal if it was accepted by an earlier version of this file."""
        query = "SELECT report FROM hosts WHERE host_id = ?"
        with self.lock, self.database as database:
            text: str = database.execute(query, (host_id,)).fetchone()["report"]
        return parse_report(text.encode())

    def accept(self, host_id: str, body: bytes) -> str:
        """Return the envelope once the report is on the disk. Raises Refusal or sqlite3.Error."""
        with PARSING:
            report = parse_report(body)
            claimed, node = report["host_id"], ascii(report["host"]["node"])[1:-1]
            del report
        if claimed != host_id:
            raise Refusal(403, f"this key is for {host_id}")
        now, interval, text = self.clock(), self.rules.interval, body.decode()
        update = "UPDATE hosts SET received_at = ?, due_at = ?, report = ? WHERE host_id = ?"
        with self.lock, self.database as database:
            query = "SELECT node FROM nodes WHERE host_id = ? AND seen_at > ?"
            nodes = {row["node"] for row in database.execute(query, (host_id, now - DAY))}
            database.execute("INSERT OR IGNORE INTO hosts (host_id) VALUES (?)", (host_id,))
            database.execute(update, (now, now + interval, text, host_id))
            database.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?, ?)", (host_id, node, now))
            database.execute("INSERT INTO history VALUES (?, ?, ?)", (host_id, now, text))
            database.execute("DELETE FROM history WHERE received_at < ?", (now - 7 * DAY,))
        if nodes and node not in nodes:
            LOG.warning("%s: reports come from the nodes %s", host_id, sorted({node, *nodes}))
        return json.dumps({"poll_interval_seconds": interval})

    def step(self) -> None:
        """Do what the loop does at each turn. Raises sqlite3.Error."""
        now = self.clock()
        self.reload_keys()
        # At the start, after a suspension (in which only the wall clock goes on), after a jump:
        if abs(now - self.stepped_at) > AWAY_SECONDS:
            LOG.info("every host gets its time anew")
            self.rules.alive_since = now
        self.stepped_at = now
        # What was received ahead of the clock counts as received now.
        update = (
            "UPDATE hosts SET due_at = min(due_at, due_at - received_at + :now),"
            " received_at = min(received_at, :now), told_at = min(told_at, :now)"
            " WHERE received_at > :now OR told_at > :now"
        )
        with self.lock, self.database as database:
            database.execute(update, {"now": now})
        for host in self.load_hosts():
            host_id = host["host_id"]
            if self.rules.word(host, now) and host_id not in self.telling:
                self.telling.add(host_id)
                threading.Thread(target=self.tell, args=[host_id], name="tell", daemon=True).start()

    def reload_keys(self) -> None:
        """Read the keys if the file has changed. If it is unusable, the keys of before remain."""
        path = self.keys_path
        changed_at = path.stat().st_ctime_ns if path.exists() else 0
        if changed_at == self.keys_changed_at:
            return
        self.keys_changed_at = changed_at
        try:
            self.keys = load_keys(path)
            LOG.info("%s has changed: %d hosts", path, len(self.keys))
        except (OSError, ValueError) as exc:
            LOG.error("%s: %s; the keys read before remain valid", path, exc)

    def tell(self, host_id: str) -> None:
        """Run the command until there is nothing more to tell of this host."""
        update = "UPDATE hosts SET told = ?, told_at = ? WHERE host_id = ?"
        failures = 0
        while True:
            try:
                rows = [row for row in self.load_hosts() if row["host_id"] == host_id]
                word = self.rules.word(rows[0], self.clock()) if rows else None
                if word is None:
                    break
                LOG.warning("%s: %s", host_id, word)
                with self.commands:
                    run_command(self.command, host_id, word)
                told = "well" if word == "back" else "overdue"
                with self.lock, self.database as database:
                    database.execute(update, (told, self.clock(), host_id))
                failures = 0
            except (OSError, ValueError, subprocess.SubprocessError, sqlite3.Error) as exc:
                pause = min(5 * 2**failures, 600)
                LOG.error("%s: %s; next try in %d s", host_id, exc, pause)
                time.sleep(pause)
                failures = min(failures + 1, 7)
        self.telling.discard(host_id)


# ---- HTTP ----------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    # So many hosts may connect in the same moment; the default is 5.
    request_queue_size = 512
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is no news.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request a connection, so no proxy can send one into a connection that closes."""

    protocol_version = "HTTP/1.1"
    # Whoever connects and says nothing for so many seconds must not keep reports out.
    timeout = 5
    server: Server
    body = b""

    def respond(self) -> tuple[str, str]:
        """Return content type and text of a successful answer. Raises Refusal or sqlite3.Error."""
        hub, path = self.server.hub, self.path.partition("?")[0]
        if path not in ("/", "/healthz", "/metrics", "/favicon.ico", REPORT_PATH):
            raise Refusal(404, "no such path")
        if (self.command == "POST") != (path == REPORT_PATH):
            raise Refusal(405, "this path does not take this method")
        if path == "/":
            return "text/html; charset=utf-8", show_page(hub, self.path == "/")
        if path == "/metrics":
            return "text/plain; version=0.0.4; charset=utf-8", show_metrics(hub)
        if path == "/favicon.ico":
            return "image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'/>"
        if path == "/healthz":
            if abs(hub.clock() - hub.stepped_at) > AWAY_SECONDS:
                raise Refusal(503, "the loop that looks for overdue hosts has stopped")
            with hub.lock, hub.database as database:
                # A write, because a full disk can be read.
                database.execute("PRAGMA user_version = 1")
            return "text/plain", "ok\n"
        given = self.headers.get("Authorization", "").encode()
        owners = [name for name, key in hub.keys.items() if hmac.compare_digest(given, key)]
        if not owners:
            raise Refusal(401, "no key, or an unknown one")
        self.body = self.read_body()
        return "application/json", hub.accept(owners[0], self.body)

    def read_body(self) -> bytes:
        """Raises Refusal or OSError."""
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "Content-Type is not application/json")
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "Content-Length is required")
        if not length.isdecimal():
            raise Refusal(400, "Content-Length is not a number")
        if len(length) > 7 or int(length) > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        self.connection.settimeout(30)
        return self.rfile.read(int(length))

    def answer(self) -> None:
        self.close_connection, status, reason = True, 200, ""
        try:
            content_type, text = self.respond()
        except Refusal as exc:
            status, reason = exc.args
        except sqlite3.Error as exc:
            status, reason = 503, f"database: {exc}"
        if reason:
            content_type, text = "application/json", json.dumps({"error": reason})
        body = text.encode(errors="replace")
        self.send_response_only(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Allow", "POST" if self.path == REPORT_PATH else "GET, HEAD")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.path == "/":
            self.send_header("Refresh", "30")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if reason:
            self.log_refusal(status, reason)

    def log_refusal(self, status: int, reason: str) -> None:
        """Log who the report says it is from, true or not; page views are not logged at all."""
        # To close while a body is coming in would reset the connection: the answer is lost.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(100):
                received = self.rfile.read1(65536)
                if not received:
                    break
                self.body = self.body or received
        match = re.search(rb'"host_id": *"([^"]{1,256})"', self.body)
        host_id = match[1].decode(errors="replace") if match else "unknown"
        request = f"{self.command} {self.path} of host {host_id}"
        LOG.warning("refused %s: %d %s", ascii(request), status, reason)

    do_GET = do_HEAD = do_POST = answer  # noqa: N815


# ---- page ----------------------------------------------------------------------------------------

STATES = ("overdue", "late", "never reported", "on time")
HEAD = """<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content='width=device-width, initial-scale=1'><style>
:root { color-scheme: light dark; --page: #f3f4f6; --card: #fff; --text: #1b1f24; --dim: #57606a;
  --green: #1a7f37; --red: #c4161c; --amber: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #1a1f26; --text: #e8ebee;
  --dim: #9aa5b1; --green: #4cc265; --red: #ff7b72; --amber: #e3a92b } }
body { margin: 1rem auto; padding: 0 1rem; max-width: 88rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h1, h2 { margin: 0 } a { color: inherit } small { color: var(--dim) }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr));
  gap: 1rem; align-items: start } header { display: flex; justify-content: space-between;
  align-items: baseline; margin-bottom: .6rem } section { margin-top: .6rem }
article { padding: 1rem; border: 1px solid #8886; border-radius: 8px; background: var(--card) }
b { color: var(--amber) } .on-time header b { color: var(--green) } .full { color: var(--red) }
.overdue { border-color: var(--red) } .overdue section { color: var(--dim); filter: grayscale(1) }
.overdue header b { padding: 0 .6rem; background: var(--red); color: var(--card) }
meter, table { width: 100% } table { border-spacing: 0 } th { font-weight: 400; text-align: left }
th, td { border-top: 1px solid #8886 } td { padding-left: .7rem; text-align: right;
  white-space: nowrap }
</style>"""


def show_time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def show_ago(seconds: float) -> str:
    size, unit = 1, "s"
    for longer, name in ((60, "min"), (3600, "h"), (DAY, "days")):
        if abs(seconds) >= 2 * longer:
            size, unit = longer, name
    return f"in {-seconds / size:.0f} {unit}" if seconds < 0 else f"{seconds / size:.0f} {unit} ago"


def show_bar(label: str, used: float | None, total: float | None, full: float = 0.9) -> str:
    if used is None or not total:
        return f"<div><bdi>{escape(label)}</bdi> <b>unknown</b></div>"
    share = min(1, used / total)
    text = f"{share:.0%}"
    if total > 1:
        text += f" of {total / 2**30:,.1f} GiB"
    shown = f"<small>{text}</small>"
    if share >= full:
        shown = f"<b class=full>{text}</b>"
    edge = full - 0.001
    meter = f"<meter aria-label='{escape(label)}' low={edge} high={edge} optimum=0 value={share}>"
    return f"<div><bdi>{escape(label)}</bdi> {shown}{meter}</meter></div>"


def show_guests(report: dict[str, Any], now: float) -> str:
    newest: dict[Any, float] = {}
    for backup in sorted(report["backups"], key=lambda backup: parse_time(backup["created_at"])):
        # Agents before version 0.4 do not report the type.
        newest[backup["vmid"], backup.get("type")] = parse_time(backup["created_at"])
    rows = ""
    for guest in report["guests"]:
        vmid, kind, status = guest["vmid"], guest["type"], guest["status"]
        notes = f"{kind} {'template' if guest.get('template') else guest.get('lock') or ''}"
        rows += f"<tr><th scope=row>{vmid} <bdi>{escape(guest['name'])}</bdi>"
        rows += f" <small>{escape(notes)}</small><td>"
        made_at = newest.get((vmid, kind), newest.get((vmid, None)))
        if made_at is not None:
            # Whoever makes backups makes one a week.
            mark = "b" if now - made_at > 8 * DAY else "small"
            rows += f"<{mark}>backup {show_ago(now - made_at)}</{mark}>"
        rows += "<td><b>unknown</b>" if status == "unknown" else f"<td>{escape(status)}"
    counts = Counter(guest["status"] for guest in report["guests"])
    summary = ", ".join(f"{number} {escape(status)}" for status, number in sorted(counts.items()))
    total = counts.total()
    noun = "guest" if total == 1 else "guests"
    is_open = "open" if total <= 12 else ""
    head = f"<details {is_open}><summary>{total} {noun}: {summary or 'none'}</summary>"
    return f"{head}<table>{rows}</table></details>"


def show_report(report: dict[str, Any], now: float) -> str:
    host, tunnel = report["host"], escape(report["cloudflared"]["status"])
    version, uptime = host.get("pve_version") or "unknown", host.get("uptime_seconds")
    booted = "unknown" if uptime is None else show_ago(uptime)
    text = f"<small>Proxmox VE {escape(version)}, booted {booted},"
    text += f" agent {escape(report['agent_version'])}</small><br>cloudflared "
    text += f"<b>{tunnel}</b>" if tunnel in ("failed", "unknown") else tunnel
    for guest in report["guests"]:
        if should_run(guest) and guest["status"] not in ("running", "unknown"):
            name = escape(f"{guest['vmid']} {guest['name']}")
            text += f"<br><b>{name} should run, but is {escape(guest['status'])}</b>"
    for task in filter(is_failed, report["audit_tail"]):
        failed = f"{task['operation']} failed at {show_time(parse_time(task['at']))}"
        text += f"<br><b>{escape(failed)}: {escape(task['result'])}</b>"
    text += show_bar("CPU", host.get("cpu_usage"), 1, full=2)
    # Memory is never full: ZFS's cache counts as used.
    memory = host.get("memory_used_bytes"), host.get("memory_total_bytes")
    text += show_bar("Memory", *memory, full=2)
    text += show_bar("Root disk", host.get("rootfs_used_bytes"), host.get("rootfs_total_bytes"))
    for storage in report["storage_targets"]:
        text += show_bar(storage["storage"], storage.get("used_bytes"), storage.get("total_bytes"))
    return text + show_guests(report, now)


def show_host(hub: Hub, host: Row, state: str, now: float) -> str:
    host_id, received_at = host["host_id"], host["received_at"]
    text = f"<article class={state.replace(' ', '-')}><header><h2><bdi>{escape(host_id)}</bdi></h2>"
    text += f"<b>{state}</b></header>"
    if received_at is None:
        text += "On the node, set <code>hub.host_id</code> and <code>hub.api_key</code>, then run"
        return f"{text} <code>felhom-agent.pyz --selftest=hub</code></article>"
    due_at, nodes = received_at + host["interval"], " and ".join(json.loads(host["nodes"]))
    text += f"last report {show_ago(now - received_at)} <small>{show_time(received_at)}</small><br>"
    text += f"next one due {show_ago(now - due_at)} <small>{show_time(due_at)}</small><section>"
    if host["muted_until"] > now:
        text += f"<b>muted until {show_time(host['muted_until'])}</b><br>"
    if " and " in nodes:
        text += f"<b>in the last day, reports came from the nodes {escape(nodes)}</b><br>"
    try:
        with PARSING:
            text += show_report(hub.load_report(host_id), now)
    except Refusal as exc:
        text += f"<b>This report cannot be shown: {escape(exc.args[1])}</b>"
    return f"{text}</section></article>"


def show_page(hub: Hub, is_refreshing: bool) -> str:
    now = hub.clock()
    hosts = [(hub.rules.state(host, now), host) for host in hub.load_hosts()]
    hosts.sort(key=lambda pair: STATES.index(pair[0]))
    counts = Counter(state for state, _ in hosts)
    summary = (
        ", ".join(f"{number} {state}" for state, number in counts.items())
        or "none yet, add one to the keys"
    )
    link = "<a href='/?refresh=off'>Stop refreshing</a>"
    if not is_refreshing:
        link = "<a href='/'>Refresh every 30 s</a>"
    page = f"{HEAD}<title>Hosts: {summary}</title><header><h1>Hosts: {summary}</h1>"
    page += f"<small>{show_time(now)} {link}</small></header><main>"
    return page + "".join(show_host(hub, host, state, now) for state, host in hosts) + "</main>"


# ---- metrics -------------------------------------------------------------------------------------


def show_metrics(hub: Hub) -> str:
    """Return what is known in Prometheus's text format; what is null is missing."""
    families: dict[str, dict[str, float]] = {}

    def add(metric: str, value: float | None, /, **labels: object) -> None:
        shown = []
        for label, text in {"host_id": host["host_id"], **labels}.items():
            escaped = str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            shown.append(f'{label}="{escaped}"')
        if value is not None:
            families.setdefault(f"felhom_{metric}", {})[",".join(shown)] = float(value)

    for host in hub.load_hosts():
        if host["received_at"] is None:
            continue
        is_overdue = hub.rules.state(host, hub.clock()) == "overdue"
        add("host_overdue", is_overdue)
        add("host_nodes", len(json.loads(host["nodes"])))
        add("poll_interval_seconds", host["interval"])
        add("report_received_timestamp_seconds", host["received_at"])
        # What an overdue host said last need not be true any more.
        if not is_overdue:
            with PARSING, contextlib.suppress(Refusal):
                add_report(add, hub.load_report(host["host_id"]))
    text = ""
    for name, values in families.items():
        text += f"# HELP {name} {name.replace('_', ' ')}\n# TYPE {name} gauge\n"
        text += "".join(f"{name}{{{labels}}} {values[labels]!r}\n" for labels in values)
    return text


def add_report(add: Callable[..., None], report: dict[str, Any]) -> None:
    host, tunnel = report["host"], report["cloudflared"]["status"]
    versions = {name: host.get(name) or "" for name in ("node", "pve_version", "kernel_version")}
    add("host_info", 1, **versions, agent_version=report["agent_version"])
    add("cpu_usage_ratio", host.get("cpu_usage"))
    add("uptime_seconds", host.get("uptime_seconds"))
    for name in re.findall(r"\w+_bytes", FIELDS["host"]):
        add(name, host.get(name))
    if tunnel != "unknown":
        add("tunnel_up", tunnel == "active")
    for guest in report["guests"]:
        labels = {name: guest[name] for name in ("vmid", "name", "type")}
        add("guest_should_run", should_run(guest), **labels)
        if guest["status"] != "unknown":
            add("guest_running", guest["status"] == "running", **labels)
    for storage in report["storage_targets"]:
        add("storage_used_bytes", storage.get("used_bytes"), storage=storage["storage"])
        add("storage_total_bytes", storage.get("total_bytes"), storage=storage["storage"])
    for backup in report["backups"]:
        labels = {name: backup.get(name) or "" for name in ("vmid", "type", "storage")}
        add("backup_created_timestamp_seconds", parse_time(backup["created_at"]), **labels)
    add("tasks_failed", sum(map(is_failed, report["audit_tail"])))


# ---- command line --------------------------------------------------------------------------------


def main() -> int:
    # Without its usage lines, an error is one line.
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    add = parser.add_argument
    add("--keys", type=Path, default="keys.json", metavar="FILE", help="mode 600, like {host: key}")
    add("--database", type=Path, default="hub.sqlite3", metavar="FILE", help="made if missing")
    add("--listen", default="127.0.0.1:8080", metavar="ADDRESS:PORT")
    add("--interval", type=int, default=300, metavar="SECONDS", help="60 to 3600")
    add("--tolerance", type=int, default=TOLERANCE_SECONDS, metavar="SECONDS", help="may be late")
    add("--on-change", default="", metavar="COMMAND", help="gets HOST overdue|back|reminder")
    add("--remind", type=float, default=24, metavar="HOURS", help="0: never")
    add("--test-alarm", action="store_true", help="run the command once, exit with its status")
    add("--mute", metavar="HOST=HOURS", help="no alarms of this host for so long; 0 ends that")
    options = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    # The reports are nobody else's business.
    os.umask(0o077)
    if not 60 <= options.interval <= 3600:
        parser.error("--interval must be from 60 to 3600")
    if not options.remind >= 0:
        parser.error("--remind must be 0 or more")
    if options.tolerance < -options.interval:
        parser.error("--tolerance must be at least minus the interval")
    listen = re.fullmatch(r"(\[(.+)\]|[^:]+):(\d{1,5})", options.listen)
    if not listen:
        parser.error("--listen must be ADDRESS:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    if options.test_alarm and not options.on_change:
        parser.error("--test-alarm needs --on-change")
    if options.mute and not options.database.exists():
        parser.error(f"--mute: there is no {options.database}")
    rules = Rules(options.interval, options.tolerance, 3600 * options.remind)
    subject = "--on-change"
    try:
        if options.test_alarm:
            run_command(options.on_change, "test-alarm", "overdue")
            return 0
        subject = options.database
        database = open_database(options.database)
        if options.mute:
            subject = "--mute"
            host_id, _, hours = options.mute.rpartition("=")
            if not 0 <= float(hours) <= 100_000:
                raise ValueError("must be like pve1=2.5, with at most 100000 hours")
            until = time.time() + 3600 * float(hours)
            with database:
                update = "UPDATE hosts SET muted_until = ? WHERE host_id = ?"
                if not database.execute(update, (until, host_id)).rowcount:
                    raise ValueError(f"no report of {host_id} yet")
            print(f"{host_id}: no alarm until {show_time(until)}")
            return 0
        subject = options.keys
        hub = Hub(options.keys, database, rules, options.on_change)
        subject = options.listen
        Server.address_family = socket.AF_INET6 if listen[2] else socket.AF_INET
        server = Server((listen[2] or listen[1], int(listen[3])), Handler)
    except subprocess.CalledProcessError as exc:
        return exc.returncode
    except (OSError, ValueError, OverflowError, sqlite3.Error, subprocess.SubprocessError) as exc:
        parser.error(f"{subject}: {exc}")
    server.hub = hub
    # What is acknowledged is on the disk, so there is nothing to do at the end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    LOG.info("listening on http://%s:%d/", listen[1], server.server_port)
    while True:
        try:
            hub.step()
        except (OSError, sqlite3.Error) as exc:
            LOG.error("cannot look for overdue hosts: %s", exc)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
