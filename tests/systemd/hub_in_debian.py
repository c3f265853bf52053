#!/usr/bin/python3
"""Tests the example hub's unit and its alarms, installed and removed by docs/hub.md's own lines.

`tests/systemd/run` runs it as root in a booted Debian, which is thrown away afterwards.  There
mail.example.com and ntfy.sh are this script.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import os
import queue
import re
import shutil
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from pathlib import Path

import lab
from booted import follow, list_files, read_blocks, run, run_checks

HERE = Path(__file__).parent
PAGE = HERE / "docs" / "hub.md"
AGENT = HERE / "dist" / "felhom-agent.pyz"

UNIT = Path("/etc/systemd/system/felhom-hub.service")
EDITED = Path("/run/systemd/system/felhom-hub.service.d/override.conf")
COMMAND = Path("/usr/local/bin/felhom-alarm")
FOLDER = Path("/var/lib/felhom-hub")
KEYS = FOLDER / "keys.json"
PASSWORD_FILE = FOLDER / "mail.conf"
BACKUPS = (Path("/root/felhom-hub.sqlite3"), Path("/root/felhom-hub-keys.json"))
URL = "http://127.0.0.1:8080"
MAX_BODY_BYTES = 4 * 1024 * 1024
# A message that does not come is a failure; only then does anything here take so long.
LONG_SECONDS = 90


# --- who is told ---------------------------------------------------------------------------------


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mail over TLS after a login, as a provider does, into a queue."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 465), MailSession)
        self.context = context
        self.messages: queue.Queue[bytes] = queue.Queue()


class MailSession(socketserver.BaseRequestHandler):
    """One SMTP dialogue (RFC 5321)."""

    server: MailServer

    def handle(self) -> None:
        # A client that is refused just hangs up.
        with contextlib.suppress(OSError):
            self.talk()

    def talk(self) -> None:
        connection = self.server.context.wrap_socket(self.request, server_side=True)
        stream = connection.makefile("rwb", buffering=0)
        with connection, stream:
            is_known = False
            answer = "220 mail.example.com"
            while True:
                stream.write(f"{answer}\r\n".encode())
                line = stream.readline().decode()
                verb, _, argument = line.strip().partition(" ")
                if verb in ("EHLO", "HELO"):
                    answer = "250-mail.example.com\r\n250 AUTH PLAIN"
                elif verb == "AUTH":
                    is_known = self.log_in(stream, argument)
                    answer = "235 welcome" if is_known else "535 wrong password"
                elif verb in ("MAIL", "RCPT"):
                    answer = "250 fine" if is_known else "530 log in first"
                elif verb == "DATA":
                    stream.write(b"354 go on\r\n")
                    answer = self.take_message(stream)
                else:
                    stream.write(b"221 bye\r\n")
                    return

    def log_in(self, stream: socket.SocketIO, argument: str) -> bool:
        mechanism, _, response = argument.partition(" ")
        if not response:
            stream.write(b"334 \r\n")
            response = stream.readline().decode()
        expected = b"\0hub@example.com\0PASSWORD"
        return mechanism == "PLAIN" and base64.b64decode(response) == expected

    def take_message(self, stream: socket.SocketIO) -> str:
        message = b""
        while (line := stream.readline()) not in (b".\r\n", b""):
            # Many servers refuse a line that ends otherwise, since SMTP smuggling.
            if not line.endswith(b"\r\n"):
                return "550 bare line feed"
            message += line
        self.server.messages.put(message)
        return "250 taken"


class PushServer(http.server.ThreadingHTTPServer):
    """Takes what is posted over TLS, as ntfy.sh does, into a queue."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 443), PushSession)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.messages: queue.Queue[tuple[str, str]] = queue.Queue()


class PushSession(http.server.BaseHTTPRequestHandler):
    server: PushServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.messages.put((self.path, body.decode()))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


# --- what an administrator does ------------------------------------------------------------------


def show(name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, "felhom-hub")


def read_status(name: str) -> int:
    """Return a number of /proc/PID/status of the hub."""
    text = Path(f"/proc/{show('MainPID')}/status").read_text()
    return int(re.findall(rf"(?m)^{name}:\s+(\d+)", text)[0])


def save_command(heading: str) -> None:
    [script] = [text for text in read_blocks(PAGE, heading, "sh") if text.startswith("#!")]
    COMMAND.write_text(script)


def save_unit() -> None:
    [unit] = read_blocks(PAGE, "Start it", "ini")
    UNIT.write_text(unit)


def set_options(*options: str) -> None:
    """Add options to the unit, as `systemctl edit` does, and restart the hub."""
    [line] = re.findall(r"(?m)^Environment=.*HUB=.*$", UNIT.read_text())
    EDITED.parent.mkdir(exist_ok=True)
    EDITED.write_text(f"[Service]\n{line[:-1]} {' '.join(options)}{line[-1]}\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "felhom-hub")
    wait_for("/healthz", "ok")


def post(body: bytes, key: str) -> int:
    """Return the hub's status for a body."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=LONG_SECONDS)
    connection.request("POST", "/api/v1/host-report", body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def wait_for(path: str, text: str) -> None:
    """Poll a page of the hub, which may only be starting, until it has the text."""
    deadline = time.monotonic() + LONG_SECONDS
    page = ""
    while text not in page:
        assert time.monotonic() < deadline, page
        with contextlib.suppress(OSError), urllib.request.urlopen(URL + path, timeout=5) as reply:
            page = reply.read().decode()
        time.sleep(0.1)


class Checks:
    """Each test_ method is one check; they run in this order, and all of them run."""

    def __init__(self, node: lab.SimulatedNode, mail: MailServer, push: PushServer) -> None:
        self.node, self.mail, self.push = node, mail, push
        self.files = list_files()

    def report(self, host_id: str = "pve1") -> None:
        """Let the agent send one report."""
        hub = lab.SimulatedHub(None)
        hub.api_key = json.loads(KEYS.read_text())[host_id]
        variables = lab.environment(self.node, hub)
        variables["FELHOM_AGENT_HUB_URL"] = URL
        variables["FELHOM_AGENT_HUB_HOST_ID"] = host_id
        settings = [f"{name}={value}" for name, value in variables.items()]
        run("env", f"SHIV_ROOT={HERE}/shiv", *settings, AGENT, "--selftest=hub")

    def next_subject(self) -> str:
        message = message_from_bytes(self.mail.messages.get(timeout=LONG_SECONDS))
        assert (message["From"], message["To"]) == ("hub@example.com", "admin@example.com")
        return str(message["Subject"])

    def test_the_page_installs_it_and_a_test_alarm_arrives_by_mail(self) -> None:
        shutil.copy(HERE / "examples" / "hub.py", HERE)
        follow(PAGE, "Install it")
        save_command("By mail")
        follow(PAGE, "By mail")
        save_unit()
        follow(PAGE, "Start it")
        assert self.next_subject() == "test-alarm: overdue"
        assert run("systemctl", "is-enabled", "felhom-hub") == "enabled"

    def test_a_test_alarm_that_cannot_be_delivered_fails(self) -> None:
        text = PASSWORD_FILE.read_text()
        PASSWORD_FILE.write_text(text.replace("PASSWORD", "outdated"))
        try:
            shown = run("systemctl", "reload", "felhom-hub", check=False)
        finally:
            PASSWORD_FILE.write_text(text)
        assert "failed" in shown, shown
        assert show("ActiveState") == "active"
        run("journalctl", "--sync")
        assert "curl: (67)" in run("journalctl", "-u", "felhom-hub"), shown

    def test_a_test_alarm_arrives_by_push_message(self) -> None:
        save_command("By push message")
        follow(PAGE, "By push message")
        run("systemctl", "reload", "felhom-hub")
        message = self.push.messages.get(timeout=LONG_SECONDS)
        assert message == ("/YOUR-TOPIC", "Host test-alarm: overdue"), message
        save_command("By mail")

    def test_systemd_finds_no_fault_in_the_unit(self) -> None:
        assert run("systemd-analyze", "verify", UNIT) == ""

    def test_exposure_is_at_most_2_0(self) -> None:
        rating = run("systemd-analyze", "security", "--threshold=20", "felhom-hub")
        print("   ", rating.splitlines()[-1])

    def test_a_host_that_falls_silent_is_told_of_by_mail_and_so_is_its_return(self) -> None:
        # Overdue two seconds after its last report, until its next one.
        set_options("--interval", "60", "--tolerance", "-58")
        self.report()
        assert self.next_subject() == "pve1: overdue"
        self.report()
        assert self.next_subject() == "pve1: back"
        assert self.next_subject() == "pve1: overdue"
        # With the page's own options it is not overdue yet.
        set_options()
        assert self.next_subject() == "pve1: back"

    def test_a_host_is_added_without_a_restart(self) -> None:
        process = show("MainPID")
        keys = json.loads(KEYS.read_text())
        KEYS.write_text(json.dumps({**keys, "pve2": "key-of-pve2"}))
        wait_for("/", "pve2")
        self.report("pve2")
        assert show("MainPID") == process

    def test_the_lines_to_mute_a_host_work(self) -> None:
        follow(PAGE, "Alarms")
        wait_for("/", "muted")

    def test_silent_connections_keep_no_report_out(self) -> None:
        silent = [socket.create_connection(("127.0.0.1", 8080)) for _ in range(400)]
        try:
            self.report()
            threads = read_status("Threads")
        finally:
            for connection in silent:
                connection.close()
        print(f"    {threads} threads")
        assert threads < int(show("TasksMax")) - 50

    def test_six_of_the_largest_bodies_at_once_fit_its_memory(self) -> None:
        key = json.loads(KEYS.read_text())["pve1"]
        count = MAX_BODY_BYTES // len("{},") - 1
        body = b"[" + b",".join([b"{}"] * count) + b"]"
        with ThreadPoolExecutor(6) as pool:
            statuses = list(pool.map(lambda _: post(body, key), range(6)))
        assert set(statuses) <= {400, 422}, statuses
        # Where a container is booted, MemoryMax= itself may not be in effect.
        peak = read_status("VmHWM") * 1024
        print(f"    peak {peak >> 20} of {int(show('MemoryMax')) >> 20} MiB")
        assert peak < 0.9 * int(show("MemoryMax"))
        assert show("NRestarts") == "0"

    def test_the_page_makes_a_backup_that_has_every_host(self) -> None:
        follow(PAGE, "Back it up")
        hosts = run("sqlite3", BACKUPS[0], "SELECT host_id FROM hosts ORDER BY host_id")
        assert hosts.split() == ["pve1", "pve2"], hosts
        # Root has opened the database meanwhile.
        self.report()

    def test_the_page_upgrades_it(self) -> None:
        process = show("MainPID")
        follow(PAGE, "Upgrade it")
        assert self.next_subject() == "test-alarm: overdue"
        assert show("MainPID") != process
        self.report()

    def test_the_page_removes_it_and_leaves_nothing(self) -> None:
        shutil.rmtree(EDITED.parent)
        for backup in BACKUPS:
            backup.unlink()
        follow(PAGE, "Remove it")
        assert show("LoadState") == "not-found", show("LoadState")
        assert run("getent", "passwd", "felhom-hub", check=False) == ""
        left = list_files() - self.files
        assert left == set(), left


def main() -> int:
    certificates = lab.make_certificates(HERE / "told", names=("mail.example.com", "ntfy.sh"))
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write("127.0.0.1 mail.example.com ntfy.sh\n")
    # As the page says for a private CA.
    shutil.copy(certificates.ca_file, "/usr/local/share/ca-certificates/mail.crt")
    run("update-ca-certificates")
    os.environ["FELHOM_AGENT_CONFIG"] = str(HERE / "agent.json")
    (HERE / "agent.json").write_text("{}")
    (HERE / "agent.json").chmod(0o600)

    release = Path("/etc/os-release").read_text("utf-8")
    print(re.findall('PRETTY_NAME="(.*)"', release)[0], flush=True)
    context = certificates.server_context()
    node = lab.SimulatedNode(lab.make_certificates(HERE / "node"))
    with node, MailServer(context) as mail, PushServer(context) as push:
        for server in (mail, push):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        passed = run_checks(Checks(node, mail, push))
        for server in (mail, push):
            server.shutdown()
    if passed:
        return 0
    print(run("journalctl", "-u", "felhom-hub", "-o", "short-monotonic", check=False))
    return 1


if __name__ == "__main__":
    sys.exit(main())
