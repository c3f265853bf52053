#!/usr/bin/env python3
"""A small hub for felhom-agent: takes host reports, shows them on one page, and raises alarms.

An example to start with: the standard library, one SQLite file, no users and no settings. It speaks
plain HTTP; docs/hub.md shows how to run it, and how to put a web server with TLS in front of it.
"""

import argparse
import contextlib
import http.server
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

LOG = logging.getLogger("hub")

# How late a report may be before its host is overdue; docs/hub.md says why.
TOLERANCE_SECONDS = 360
# A turn of the loop takes a second. If it seems to take longer than this, it was suspended.
AWAY_SECONDS = 60


def should_run(guest: dict[str, Any]) -> bool | None:
    """Return whether a guest is meant to run; None without the agent's extra `details`."""
    return guest.get("onboot") and not guest.get("template") and not guest.get("lock")


def is_failed(task: dict[str, Any]) -> bool:
    # To Proxmox, a console that was closed failed, too.
    is_console = re.match(r"(vnc|spice|term)(proxy|shell)\b", task["operation"])
    return not is_console and not re.match(r"(OK|WARNINGS: \d+|unknown)$", task["result"])


class Hub:
    """Stores reports, and looks every second, by its own clock, who is overdue."""

    def __init__(self, options: argparse.Namespace, database: sqlite3.Connection) -> None:
        self.options = options
        self.keys = load_keys(options.keys)
        self.keys_problem = ""
        self.database = database
        # Whoever has it uses the database, or has a report of up to 4 MiB, which can take 100 MiB.
        self.lock = threading.RLock()
        self.clock: Callable[[], float] = time.time
        self.wait: Callable[[float], None] = time.sleep
        # No host could report before this: the hub was not running.
        self.alive_since = self.stepped_at = self.clock()
        # What there is to tell, whom a thread is telling of, and how many commands may run at once.
        self.words: dict[str, str | None] = {}
        self.telling: set[str] = set()
        self.commands = threading.Semaphore(16)

    def state(self, host: sqlite3.Row) -> str:
        if host["received_at"] is None:
            return "never reported"
        silent_since = host["received_at"]
        patience = host["interval"] + self.options.tolerance
        # Only a report ends an alarm, so nothing else gives an overdue host more time.
        if host["told"] != "overdue":
            silent_since = max(silent_since, self.alive_since, host["muted_until"] - patience)
        if self.clock() > silent_since + patience:
            return "overdue"
        if self.clock() > host["received_at"] + host["interval"]:
            return "late"
        return "on time"

    def word(self, host: sqlite3.Row) -> str | None:
        """Return what the command has yet to be told of a host, or None."""
        if self.state(host) != "overdue":
            return "back" if host["told"] == "overdue" else None
        if host["told"] != "overdue":
            return "overdue"
        pause = 3600 * self.options.remind
        if pause > 0 and self.clock() >= max(host["told_at"] + pause, host["muted_until"]):
            return "reminder"
        return None

    def step(self) -> None:
        """Do what the loop does at each turn. Raises sqlite3.Error."""
        now = self.clock()
        # After a suspension, in which only the wall clock goes on, or a jump of the clock:
        if abs(now - self.stepped_at) > AWAY_SECONDS:
            LOG.info("every host gets its time anew")
            self.alive_since = now
        self.stepped_at = now
        # What was received ahead of the clock counts as received now.
        update = "UPDATE hosts SET due_at = due_at - received_at + ?1, received_at = ?1"
        self.sql(f"{update} WHERE received_at > ?1", now)
        try:
            self.keys = load_keys(self.options.keys)
            self.keys_problem = ""
        except (OSError, ValueError) as exc:
            if str(exc) != self.keys_problem:
                LOG.error("%s: %s; the keys read before remain valid", self.options.keys, exc)
            self.keys_problem = str(exc)
        # Read before the hosts: a command that ends in between has told what they still ask for.
        telling = set(self.telling)
        self.words = {host["host_id"]: self.word(host) for host in self.load_hosts()}
        for host_id, word in self.words.items():
            if word and host_id not in telling:
                self.telling.add(host_id)
                threading.Thread(target=self.tell, args=[host_id, word], daemon=True).start()

    def tell(self, host_id: str, word: str) -> None:
        """Run the command until it succeeds or there is something else to tell."""
        command = [self.options.on_change, host_id, word]
        told = "well" if word == "back" else "overdue"
        update = "UPDATE hosts SET told = ?, told_at = ? WHERE host_id = ?"
        pause = 5
        while self.words.get(host_id) == word:
            LOG.warning("%s: %s", host_id, word)
            try:
                if self.options.on_change:
                    with self.commands:
                        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=True)
                self.sql(update, told, self.clock(), host_id)
                break
            except (OSError, ValueError, subprocess.SubprocessError, sqlite3.Error) as exc:
                LOG.error("%s: %s; next try in %d s", host_id, exc, pause)
            for _ in range(pause):
                if self.words.get(host_id) == word:
                    self.wait(1)
            pause = min(2 * pause, 600)
        self.telling.discard(host_id)

    def sql(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self.lock, self.database:
            return self.database.execute(query, values).fetchall()

    def load_hosts(self) -> list[sqlite3.Row]:
        """Return every host that has a key, without its report, which may be large."""
        return self.sql(
            "SELECT value AS host_id, received_at, due_at - received_at AS interval, told, told_at,"
            " muted_until, nodes FROM json_each(?) LEFT JOIN hosts ON host_id = value ORDER BY id",
            json.dumps(list(self.keys.values())),
        )

    def load_report(self, host_id: str) -> dict[str, Any]:
        """Raises Refusal if it was accepted by an earlier version of this file."""
        [row] = self.sql("SELECT report FROM hosts WHERE host_id = ?", host_id)
        return parse_report(row["report"].encode())

    def accept(self, host_id: str, body: bytes) -> None:
        """Return once the report is on the disk. Raises Refusal or sqlite3.Error."""
        report = parse_report(body)
        if report["host_id"] != host_id:
            raise Refusal(403, f"this key is for {host_id}")
        node = report["host"]["node"]
        now = self.clock()
        self.sql("INSERT OR IGNORE INTO hosts (host_id) VALUES (?)", host_id)
        [row] = self.sql("SELECT nodes FROM hosts WHERE host_id = ?", host_id)
        seen = json.loads(row["nodes"])
        nodes = {name: seen[name] for name in seen if seen[name] > now - 86400}
        if nodes and node not in nodes:
            LOG.warning("%s: reports come from the nodes %s", host_id, ascii([*nodes, node]))
        nodes[node] = now
        values = (host_id, now, self.options.interval, body.decode(), json.dumps(nodes))
        update = "UPDATE hosts SET received_at = ?2, due_at = ?2 + ?3, report = ?4, nodes = ?5"
        self.sql(f"{update} WHERE host_id = ?1", *values)


# What this hub uses of a report; with a question mark it may be null, or missing as of old agents.
SHAPE = json.loads("""{
    "host_id": "text", "agent_version": "text", "cloudflared": {"status": "text"},
    "host": {"node": "text", "pve_version": "text?", "cpu_usage": "number?",
        "uptime_seconds": "number?", "memory_used_bytes": "number?",
        "memory_total_bytes": "number?", "rootfs_used_bytes": "number?",
        "rootfs_total_bytes": "number?"},
    "guests": [{"vmid": "number", "type": "text", "name": "text", "status": "text",
        "onboot": "flag?", "template": "flag?", "lock": "text?"}],
    "storage_targets": [{"storage": "text", "used_bytes": "number?", "total_bytes": "number?"}],
    "backups": [{"vmid": "number", "type": "text?", "storage": "text", "created_at": "time"}],
    "audit_tail": [{"at": "time", "operation": "text", "result": "text"}]
}""")
MAX_BODY_BYTES = 4 * 1024 * 1024
REPORT_PATH = "/api/v1/host-report"


class Refusal(Exception):
    """A request is answered with this status and this reason."""


def parse_report(body: bytes) -> dict[str, Any]:
    """Return a report in which everything is valid that this hub uses. Raises Refusal."""
    try:
        report: dict[str, Any] = json.loads(body.decode())
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, str(exc)) from exc
    check("report", report, SHAPE)
    return report


def check(name: str, value: Any, shape: Any) -> None:
    if isinstance(shape, dict) and isinstance(value, dict):
        for key in shape:
            check(key, value.get(key), shape[key])
    elif isinstance(shape, list) and isinstance(value, list):
        for item in value:
            check(name, item, shape[0])
    elif not isinstance(shape, str) or not is_valid(value, shape):
        raise Refusal(422, f"{name} is missing or invalid")


def is_valid(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith("?")
    if kind == "time":
        try:
            return datetime.fromisoformat(value).timestamp() > 0
        except (TypeError, ValueError, OverflowError):
            return False
    if kind.startswith("number"):
        # Not isinstance, because to that a bool is a number.
        return type(value) in (int, float) and 0 <= value < 1e18
    return isinstance(value, {"text": str, "flag": bool}[kind.rstrip("?")])


def load_keys(path: Path) -> dict[str, str]:
    """Return hosts by what they send as Authorization. Raises OSError or ValueError."""
    if path.stat().st_mode & 0o077:
        raise ValueError(f"others can read it: chmod 600 {path}")
    keys = json.loads(path.read_text("utf-8"))
    if not isinstance(keys, dict) or not all(isinstance(key, str) and key for key in keys.values()):
        raise ValueError('it must be like {"pve1": "its key"}')
    hosts: dict[str, str] = {}
    for host_id, key in keys.items():
        other = hosts.setdefault(f"Bearer {key}", host_id)
        if other != host_id:
            raise ValueError(f"the same key for {other} and {host_id}")
    return hosts


def open_database(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    database.row_factory = sqlite3.Row
    # FULL: a commit is on the disk when it returns, whatever is killed or unplugged after that.
    database.executescript("""
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = FULL;
        CREATE TABLE IF NOT EXISTS hosts (
            host_id PRIMARY KEY, received_at, due_at, report, told DEFAULT 'well');
    """)
    existing = {row["name"] for row in database.execute("PRAGMA table_info(hosts)")}
    for column, default in (("told_at", "0"), ("muted_until", "0"), ("nodes", "'{}'")):
        if column not in existing:
            database.execute(f"ALTER TABLE hosts ADD COLUMN {column} DEFAULT {default}")
    return database


class Server(http.server.ThreadingHTTPServer):
    # So many hosts may connect in the same moment; the default is 5.
    request_queue_size = 512
    hub: Hub


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers in HTTP/1.0: no proxy can send a second request into a connection that closes."""

    # Whoever connects and says nothing for so many seconds must not keep reports out.
    timeout = 5
    server: Server
    body = b""

    def handle(self) -> None:
        # A client that hangs up is no news.
        with contextlib.suppress(OSError):
            super().handle()

    def answer(self) -> None:
        status = 200
        try:
            content_type, text = self.respond()
        except (Refusal, sqlite3.Error) as exc:
            status, reason = exc.args if isinstance(exc, Refusal) else (503, f"database: {exc}")
            content_type, text = "application/json", json.dumps({"error": reason})
        body = text.encode(errors="replace")
        self.send_response_only(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.path == "/":
            self.send_header("Refresh", "30")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if status == 200:
            return
        # To close while a body is coming in would reset the connection: the answer is lost.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(100):
                received = self.rfile.read1(65536)
                if not received:
                    break
                self.body = self.body or received
        # The report says, true or not, who it is from. Page views are not logged at all.
        host_ids = re.findall(rb'"host_id": *"([^"]{1,256})"', self.body) or [b"unknown"]
        request = f"{self.command} {self.path} of host {host_ids[0].decode(errors='replace')}"
        LOG.warning("refused %s: %d %s", ascii(request), status, reason)

    do_GET = do_HEAD = do_POST = answer  # noqa: N815

    def respond(self) -> tuple[str, str]:
        """Return content type and text of a successful answer. Raises Refusal or sqlite3.Error."""
        hub = self.server.hub
        path = self.path.partition("?")[0]
        if path not in ("/", "/healthz", "/metrics", "/favicon.ico", REPORT_PATH):
            raise Refusal(404, "no such path")
        if (self.command == "POST") != (path == REPORT_PATH):
            raise Refusal(405, "this path does not take this method")
        if path == "/favicon.ico":
            return "image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'/>"
        if path == "/metrics":
            with hub.lock:
                return "text/plain; version=0.0.4; charset=utf-8", show_metrics(hub)
        if path == "/":
            with hub.lock:
                return "text/html; charset=utf-8", show_page(hub, self.path == "/")
        if path == "/healthz":
            if abs(hub.clock() - hub.stepped_at) > AWAY_SECONDS:
                raise Refusal(503, "the loop that looks for overdue hosts has stopped")
            # A write, because a full disk can be read.
            hub.sql("PRAGMA user_version = 1")
            return "text/plain", "ok\n"
        # A dict compares hashes, so the time that it takes tells nothing about a key.
        host_id = hub.keys.get(self.headers.get("Authorization", ""))
        if host_id is None:
            raise Refusal(401, "no key, or an unknown one")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "Content-Type is not application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "Content-Length is required")
        if len(length) > 7 or int(length) > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        self.connection.settimeout(30)
        self.body = self.rfile.read(int(length))
        with hub.lock:
            hub.accept(host_id, self.body)
        return "application/json", json.dumps({"poll_interval_seconds": hub.options.interval})


STATES = ("overdue", "late", "never reported", "on time")
HEAD = """<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content='width=device-width, initial-scale=1'><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif } a { color: inherit }
h1, h2 { margin: 0; font-size: 1.3rem } h2 b { float: right } summary { margin-top: .5rem }
main { columns: 22rem; margin-top: 1rem } article { break-inside: avoid; overflow-wrap: anywhere;
  margin-bottom: 1rem; padding: 1rem; border: 1px solid #8888; border-radius: 6px }
div { display: flex; justify-content: space-between; gap: 1rem; border-top: 1px solid #8883 }
b { unicode-bidi: isolate; text-align: right; color: light-dark(#8a5a00, #e3a92b) }
.on-time h2 b { color: light-dark(#1a7f37, #4cc265) } .overdue { border-color: #c4161c }
.overdue, .overdue b { color: light-dark(#57606a, #9aa5b1) }
.overdue h2, .overdue h2 b { color: light-dark(#c4161c, #ff7b72) }</style>"""


def show(label: str, value: str, is_bad: bool = False) -> str:
    """Return a line of HTML; its value stands out if it is bad or unknown."""
    tag = "b" if is_bad or value == "unknown" else "bdi"
    return f"<div><bdi>{escape(label)}</bdi> <{tag}>{escape(value)}</{tag}></div>"


def show_time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def show_counts(words: Iterable[str]) -> str:
    return ", ".join(f"{number} {word}" for word, number in Counter(words).items())


def show_share(label: str, used: float | None, total: float | None, full: float = 0.9) -> str:
    if used is None or not total:
        return show(label, "unknown")
    return show(label, f"{used / total:.0%}", used / total >= full)


def show_host(hub: Hub, host: sqlite3.Row) -> str:
    if host["received_at"] is None:
        text = "On the node, set <code>hub.host_id</code> and <code>hub.api_key</code>, then run"
        return f"{text} <code>felhom-agent.pyz --selftest=hub</code>"
    text = show("last report", show_time(host["received_at"]))
    if host["muted_until"] > hub.clock():
        text += show("muted until", show_time(host["muted_until"]), True)
    nodes = sorted(json.loads(host["nodes"]))
    if len(nodes) > 1:
        text += show("in the last day, reports came from the nodes", " and ".join(nodes), True)
    try:
        report = hub.load_report(host["host_id"])
    except Refusal as exc:
        return text + show("This report cannot be shown:", exc.args[1], True)
    facts, tunnel = report["host"], report["cloudflared"]["status"]
    text += show("Proxmox VE", facts.get("pve_version") or "unknown")
    text += show("agent", report["agent_version"])
    text += show("cloudflared", tunnel, tunnel == "failed")
    text += show_share("CPU", facts.get("cpu_usage"), 1, full=2)
    # Memory is never full: ZFS's cache counts as used.
    text += show_share("Memory", facts.get("memory_used_bytes"), facts.get("memory_total_bytes"), 2)
    text += show_share("Root disk", facts.get("rootfs_used_bytes"), facts.get("rootfs_total_bytes"))
    for disk in report["storage_targets"]:
        text += show_share(disk["storage"], disk.get("used_bytes"), disk.get("total_bytes"))
    for task in filter(is_failed, report["audit_tail"]):
        text += show(task["operation"], f"failed at {task['at']}: {task['result']}", True)
    guests = ""
    for guest in report["guests"]:
        name, status = f"{guest['vmid']} {guest['name']}", guest["status"]
        guests += show(name, status)
        if should_run(guest) and status not in ("running", "unknown"):
            text += show(name, f"should run, but is {status}", True)
    counts = show_counts(sorted(guest["status"] for guest in report["guests"])) or "none"
    fold = "" if len(report["guests"]) > 12 else "open"
    return text + f"<details {fold}><summary>Guests: {escape(counts)}</summary>{guests}</details>"


def show_page(hub: Hub, is_refreshing: bool) -> str:
    hosts = sorted(hub.load_hosts(), key=lambda host: STATES.index(hub.state(host)))
    counts = show_counts(hub.state(host) for host in hosts) or "none yet, add one to the keys"
    link = "<a href='/?refresh=off'>Stop refreshing</a>"
    if not is_refreshing:
        link = "<a href='/'>Refresh every 30 s</a>"
    page = f"{HEAD}<title>Hosts: {counts}</title><h1>Hosts: {counts}</h1>"
    page += f"{show_time(hub.clock())} {link}<main>"
    for host in hosts:
        state = hub.state(host)
        page += f"<article class={state.replace(' ', '-')}><h2><bdi>{escape(host['host_id'])}</bdi>"
        page += f" <b>{state}</b></h2>{show_host(hub, host)}</article>"
    return f"{page}</main>"


def show_metrics(hub: Hub) -> str:
    """Return what is known in Prometheus's text format; what is null is missing."""
    families: dict[str, list[str]] = {}
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    for host in hub.load_hosts():
        for name, value, labels in measure(hub, host):
            if value is None:
                continue
            labels = {"host_id": host["host_id"], **labels}
            pairs = [f'{label}="{str(labels[label]).translate(escapes)}"' for label in labels]
            head = f"# HELP felhom_{name} {name.replace('_', ' ')}\n# TYPE felhom_{name} gauge\n"
            line = f"felhom_{name}{{{','.join(pairs)}}} {float(value)!r}\n"
            families.setdefault(name, [head]).append(line)
    return "".join("".join(lines) for lines in families.values())


def measure(hub: Hub, host: sqlite3.Row) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    state = hub.state(host)
    if state == "never reported":
        return
    yield "host_overdue", state == "overdue", {}
    yield "host_nodes", len(json.loads(host["nodes"])), {}
    yield "poll_interval_seconds", host["interval"], {}
    yield "report_received_timestamp_seconds", host["received_at"], {}
    # What an overdue host said last need not be true any more.
    if state == "overdue":
        return
    with contextlib.suppress(Refusal):
        report = hub.load_report(host["host_id"])
        facts, tunnel = report["host"], report["cloudflared"]["status"]
        for name, kind in SHAPE["host"].items():
            if kind == "number?":
                yield name.replace("cpu_usage", "cpu_usage_ratio"), facts.get(name), {}
        if tunnel != "unknown":
            yield "tunnel_up", tunnel == "active", {}
        for guest in report["guests"]:
            labels = {name: guest[name] for name in ("vmid", "name", "type")}
            yield "guest_should_run", should_run(guest), labels
            if guest["status"] != "unknown":
                yield "guest_running", guest["status"] == "running", labels
        for storage in report["storage_targets"]:
            for name in ("used_bytes", "total_bytes"):
                yield f"storage_{name}", storage.get(name), {"storage": storage["storage"]}
        for backup in report["backups"]:
            labels = {name: backup.get(name) or "" for name in ("vmid", "type", "storage")}
            created_at = datetime.fromisoformat(backup["created_at"]).timestamp()
            yield "backup_created_timestamp_seconds", created_at, labels
        yield "tasks_failed", sum(map(is_failed, report["audit_tail"])), {}


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
    address, _, port = options.listen.rpartition(":")
    if not 60 <= options.interval <= 3600:
        parser.error("--interval must be from 60 to 3600")
    if options.tolerance < -options.interval:
        parser.error("--tolerance must be at least minus the interval")
    if not address:
        parser.error("--listen must be ADDRESS:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    if options.mute and not options.database.exists():
        parser.error(f"--mute: there is no {options.database}")
    subject = "--on-change"
    try:
        if options.test_alarm:
            command = [options.on_change, "test-alarm", "overdue"]
            return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        subject = options.database
        database = open_database(options.database)
        if options.mute:
            subject = "--mute (such as pve1=2.5)"
            host_id, _, hours = options.mute.rpartition("=")
            until = time.time() + 3600 * float(hours)
            # This refuses what is no time, such as nan.
            muted = f"{host_id}: no alarm until {show_time(until)}"
            query = "UPDATE hosts SET muted_until = ? WHERE host_id = ?"
            with database:
                if not database.execute(query, (until, host_id)).rowcount:
                    raise ValueError(f"no report of {host_id} yet")
            print(muted)
            return 0
        subject = options.keys
        hub = Hub(options, database)
        subject = options.listen
        if ":" in address:
            Server.address_family = socket.AF_INET6
        server = Server((address.strip("[]"), int(port)), Handler)
    except (OSError, ValueError, OverflowError, sqlite3.Error) as exc:
        parser.error(f"{subject}: {exc}")
    server.hub = hub
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    LOG.info("listening on http://%s:%d/", address, server.server_port)
    while True:
        try:
            hub.step()
        except (OSError, sqlite3.Error) as exc:
            LOG.error("cannot look for overdue hosts: %s", exc)
        time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main())
