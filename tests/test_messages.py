"""docs/messages.md explains each message of the module, and no message that the module never says.

The first half reads the messages from the module and looks for them on the page.  The second half
asks the clients for the page's hints, and makes the module say the page's messages.
"""

from __future__ import annotations

import ast
import dataclasses
import http.client
import json
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
from support import LOG, MODULE, Daemon, Prober, make_collector, make_hub_client

PAGE: Final = (MODULE.parent / "docs" / "messages.md").read_text("utf-8")
# Under this heading stands what the module does not say.
OTHERS_WORDS: Final = "## What systemd, shiv and Python say"
PLAIN_PAGE: Final = " ".join(PAGE.replace("`", "").split())
PLACEHOLDERS: Final = (
    "HOST|KEY|KIND|METHOD|N|NAME|NODE|OTHER|PATH|PORT|PRIVILEGE|SECONDS|STATUS|TIME|TOPIC|URL|USER"
    "|VARIABLE|VERSION"
)
# Its hints have the page's words for what varies.
WORDS: Final[dict[str, Any]] = {
    "node": "NODE",
    "token_id": "USER!NAME",
    "timeout_seconds": "SECONDS",
}


# ---- each message of the module is on the page ---------------------------------------------------


def find_exempt(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what holds texts that are no messages: docstrings, `--help`, the hints, extras."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from ast.walk(part.body[0]) if isinstance(part.body[0], ast.Expr) else ()
        if isinstance(part, ast.FunctionDef) and part.name == "parse_arguments":
            yield from ast.walk(part)
        if isinstance(part, ast.AnnAssign) and re.search("HINTS|EXTRAS", ast.unparse(part.target)):
            yield from ast.walk(part)


def all_sentences() -> Iterator[str]:
    """Yield each text of three words and more, without what is filled in."""
    tree = ast.parse(MODULE.read_text("utf-8"))
    exempt = set(find_exempt(tree))
    for part in ast.walk(tree):
        if part in exempt or not isinstance(part, ast.Constant) or not isinstance(part.value, str):
            continue
        for piece in re.split(r"%[.\d]*[dfs]|\n", part.value):
            sentence = piece.strip(" ,;:(")
            if len(sentence.split()) >= 3:
                yield sentence


def test_page_has_each_message() -> None:
    sentences = [text for text in all_sentences() if text not in agent.HUB_HINTS]
    assert len(sentences) > 50
    assert [text for text in sentences if text not in PLAIN_PAGE] == []


def test_page_has_each_hint(clients: Mapping[str, agent.Client]) -> None:
    for client in clients.values():
        hints = [client.hint(cause) for cause in client.hints]
        assert [hint for hint in hints if hint not in PLAIN_PAGE] == []


def test_page_says_what_each_setting_must_be() -> None:
    documented = {}
    for cells in find_rows("key"):
        for key in cells["key"].split("`")[1::2]:
            documented[key] = cells["must be"]
    rules = {}
    for section, settings in agent.SECTIONS.items():
        for item in dataclasses.fields(settings):
            rules[f"{section}.{item.name}"] = item.metadata["expected"]
    assert documented == rules


# ---- each hint is the page's ---------------------------------------------------------------------


def find_rows(column: str, heading: str = "") -> list[dict[str, str]]:
    """Return the rows under a heading of the tables whose first column is this."""
    rows, titles, current = list[dict[str, str]](), list[str](), ""
    for line in PAGE.partition(OTHERS_WORDS)[0].split("\n"):
        if line.startswith("## "):
            current = line
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not line.startswith("|"):
            titles = []
        elif not titles:
            titles = cells
        elif titles[0] == column and not line.startswith("|---") and current.startswith(heading):
            rows.append(dict(zip(titles, cells, strict=True)))
    return rows


@pytest.fixture(params=["no ca_file", "ca_file"])
def clients(request: pytest.FixtureRequest, certificates: lab.Certificates) -> dict[str, Any]:
    """Those that speak of Proxmox and of the hub."""
    changes: Any = {"ca_file": str(certificates.ca_file)} if request.param == "ca_file" else {}
    hub_words = {"timeout_seconds": WORDS["timeout_seconds"], **changes}
    return {
        "Proxmox": agent.ProxmoxClient(agent.ProxmoxConfig(**WORDS, **changes)),
        "the hub": agent.HubClient(agent.HubConfig(url="https://127.0.0.1", **hub_words)),
    }


def find_statuses(text: str) -> list[int]:
    """Return the numbers in a message's cell, with all of "`595 …` to `599 …`"."""
    statuses: list[int] = []
    for first, last in re.findall(r"`(\d{3}) [^`]*`(?: to `(\d{3}) …`)?", text):
        statuses += range(int(first), int(last or first) + 1)
    return statuses


@pytest.mark.parametrize("server", ["Proxmox", "the hub"])
def test_each_status_has_the_hint_of_its_row(clients: Mapping[str, Any], server: str) -> None:
    client, documented, other = clients[server], dict[int, str](), ""
    for cells in find_rows("message", f"## A status from {server}"):
        message, hint = cells["message"], cells["hint"]
        statuses = find_statuses(message)
        if message.startswith("any other"):
            other = hint
        elif "redirect" in message:
            assert client.hint("redirect") == hint
        elif "for a storage's backups" in message:
            path = "/nodes/NODE/storage/bak/prunebackups"
            for cause in (*statuses, "no response", "timeout"):
                assert client.hint(cause, path) == hint
        else:
            documented |= dict.fromkeys(statuses, hint)
    for status in range(400, 1000):
        assert client.hint(status) == documented.get(status, other), status


def verify_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError()
    error.verify_code = code
    return error


# What stands for each message of the table of missing responses: a key of the hints, if the words
# are the module's own.  The words of OpenSSL, the resolver and the kernel are in test_http.py.
REFUSED: Final = "certificate verify failed: "
CAUSES: Final[Mapping[str, Exception | str]] = {
    f"{REFUSED}Hostname mismatch, …": verify_error(62),
    f"{REFUSED}IP address mismatch, …": verify_error(64),
    f"{REFUSED}unable to get local issuer certificate": verify_error(20),
    f"{REFUSED}self-signed certificate …": verify_error(18),
    f"{REFUSED}certificate has expired": verify_error(10),
    f"{REFUSED}certificate is not yet valid": verify_error(9),
    f"{REFUSED}EE certificate key too weak": verify_error(66),
    "its certificate has the SHA-256 …": "pin",
    **dict.fromkeys(("wrong version number", "record layer failure"), ssl.SSLError()),
    **dict.fromkeys(("tlsv1 alert …", "EOF …"), ssl.SSLEOFError()),
    "connection closed or reset during the TLS handshake": "handshake",
    "connection timed out": "connect timeout",
    "timed out": TimeoutError(),
    "no time left in this cycle": "no time left",
    "Name or service not known": socket.gaierror(socket.EAI_NONAME),
    "Temporary failure in name resolution": socket.gaierror(socket.EAI_AGAIN),
    "Connection refused": ConnectionRefusedError(),
    "Remote end closed connection without response": http.client.RemoteDisconnected(""),
    "Connection reset by peer": ConnectionResetError(),
    "IncompleteRead(…)": http.client.IncompleteRead(b""),
    "Network is unreachable": OSError(),
    "it does not answer in HTTP/1.1 (…)": http.client.BadStatusLine(""),
    "200, but the reply is unusable (…)": ValueError(),
    "the proxy answers 401 …": "proxy login",
    "the proxy answers 407 …": "proxy login",
    "the proxy answers 502 …": "behind the proxy",
    "the proxy answers 403 …": "proxy",
}


def test_each_missing_response_has_the_hint_of_its_row(clients: Mapping[str, Any]) -> None:
    # Of two rows, one is for each.
    other_row = ", if there is no ca_file"
    if clients["Proxmox"].hint("unknown CA") == agent.PROXMOX_HINTS["unknown CA"]:
        other_row = ", if ca_file is set"
    found = set()
    for cells in find_rows("message", "## No response"):
        if cells["message"].endswith(other_row):
            continue
        for message in cells["message"].split(": the reason is")[0].split("`")[1::2]:
            if "hint" in cells and not message.startswith("the proxy"):
                # Of the proxy's address
                continue
            cause = CAUSES[message]
            found.add(message)
            if isinstance(cause, Exception):
                cause = agent.find_cause(cause)
            else:
                assert re.sub(r" (\d{3} )?…$", "", message) in MODULE.read_text("utf-8")
            for column, server in (
                *(("from Proxmox", "Proxmox"), ("from the hub", "the hub")),
                ("hint", "the hub"),
            ):
                hint = cells.get(column)
                assert not hint or clients[server].hint(cause) == hint
    assert found == CAUSES.keys()


# ---- the module says each message ----------------------------------------------------------------


class Recorder(logging.Handler):
    """Keeps what the module says: what it logs, and the errors that it raises."""

    def __init__(self) -> None:
        super().__init__("DEBUG")
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def attempt(self, call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
        except (agent.AgentError, agent.ConfigError) as exc:
            self.lines += str(exc).split("\n")

    def run(self, path: Path, *arguments: str, **environment: str) -> None:
        """Keep what the program writes to standard error, without date, time and level."""
        command = [sys.executable, str(MODULE), "--config", str(path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        self.lines += [line.split(maxsplit=3)[-1] for line in done.stderr.splitlines()]


# What /cluster/resources lists.  The node's status has an uptime of 1000 s.
OWN: Final[dict[str, object]] = {"type": "node", "node": "pve1", "status": "online", "uptime": 995}
LXC: Final[dict[str, object]] = {"type": "lxc", "node": "pve1", "vmid": 100, "status": "running"}
NEW: Final[dict[str, object]] = {**LXC, "status": "unknown"}
FULL: Final = lab.Storage("bak").resource("pve1")
NAS: Final = lab.Storage("nas").resource("pve1")
FAILURE: Final = lab.Reply(500, "Reason")
NAMED: Final = {"volid": "bak:backup/mine.tar.zst", "ctime": 1790000000}
UNDATED: Final = {"volid": "bak:backup/vzdump-lxc-100-2026_10_01-02_00_03.tar", "ctime": -1}
# What is listed, and what is answered below another path
SCENES: Final[tuple[tuple[list[dict[str, object]], str, object], ...]] = (
    ([{**OWN, "node": "PVE1"}], "", None),
    ([OWN, {**OWN, "node": "old", "status": "offline"}, {**LXC, "node": "old"}], "", None),
    ([{**OWN, "status": "offline"}, LXC], "", None),
    ([{**OWN, "uptime": 0}, LXC], "", None),
    ([{**OWN, "uptime": 0}, LXC], "/nodes/pve1/status", {"uptime": 200}),
    ([OWN, NEW, {**NEW, "vmid": 101}], "", None),
    ([OWN, {**LXC, "vmid": 0}], "", None),
    ([{**OWN, "uptime": 960}, LXC, FULL], "", None),
    ([OWN, LXC], "/access", {"/": {"Sys.Audit": 1}}),
    ([OWN, LXC, FULL], "/access", {"/": {"VM.Audit": 1, "VM.PowerMgmt": 1}}),
    ([OWN, LXC, FULL], "/access", FAILURE),
    ([OWN, LXC], "/nodes/pve1/lxc", FAILURE),
    ([OWN, LXC, {**LXC, "vmid": 101}], "/nodes/pve1/lxc", FAILURE),
    ([OWN, LXC, FULL], "/nodes/pve1/storage", FAILURE),
    ([OWN, LXC, FULL, NAS], "/nodes/pve1/storage", lab.Reply(596)),
    ([OWN, LXC, FULL], "/nodes/pve1/storage", [NAMED, NAMED]),
    ([OWN, LXC, FULL], "/nodes/pve1/storage", [UNDATED]),
    ([OWN, LXC], "/nodes/pve1/tasks", FAILURE),
)


def collects(recorder: Recorder) -> None:
    prober = Prober(agent.AgentError("printed no state"))
    for entries, path, sent in SCENES:
        with lab.SimulatedNode(None) as node:
            answer = sent if isinstance(sent, lab.Reply) else lab.json_reply({"data": sent})
            if path:
                node.script(path, lab.Forever(answer))
            node.script("/cluster/resources", lab.json_reply({"data": entries}))
            node.script("/nodes/pve1/status", lab.json_reply({"data": {"uptime": 1000}}))
            node.script("/nodes/pve1/lxc", lab.Forever(lab.json_reply({"data": {}})))
            collector = make_collector(node, prober, extras=["backups", "tasks"])
            recorder.attempt(collector.collect)


def runs(recorder: Recorder, folder: Path) -> None:
    with lab.SimulatedNode(None) as node, lab.SimulatedHub(None) as hub:
        hub.script("", lab.Reply(503), lab.Reply(503))
        hub.envelope = {"poll_interval_seconds": 300}
        node.vms = node.vms[:2]
        path = folder / "agent.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(lab.configuration(node, hub)), "utf-8")
        with Daemon(folder, path, "--log-level", "debug") as running:
            running.await_cycle()
            running.step()
            running.step()
            hub.envelope = {"poll_interval_seconds": "soon"}
            node.script("/nodes/pve1/status", lab.Cut(), lab.Cut())
            running.step()
            for message in running.notified:
                recorder.lines.append(message.partition("STATUS=")[2])
            for line in running.log.read_text("utf-8").splitlines():
                recorder.lines.append(line.split(maxsplit=3)[-1])
        collector = make_collector(node)
        assert agent.selftest(collector, None) == 0
        assert agent.selftest(collector, make_hub_client(hub)) == 0
        node.acl = [("/vms", "PVEAuditor", True)]
        assert agent.selftest(collector, None) == 1
        recorder.run(path, "--selftest=config")
        recorder.run(path, FELHOM_AGENT_HUB_POLL_SECONDS="often", OPENSSL_CONF=str(folder / "fips"))
    recorder.lines.append(agent.describe_failure(ZeroDivisionError()))


# OpenSSL then refuses what is not approved, and has no provider for what is.
FIPS: Final = "openssl_conf = a\n[a]\nalg_section = b\n[b]\ndefault_properties = fips=yes\n"
FILES: Final = (
    "{}",
    '{"proxmox": 1, "extra": 1, "hub": {"url": "http://192.0.2.1", "poll_seconds": 1}}',
    '{"proxmox": {"timeout_seconds": 0, "ca_file": "/etc/pve/missing.pem"}}',
    "[]",
    "{nonsense",
)


def configurations(recorder: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "loaded.json"
    for text in FILES:
        path.write_text(text, "utf-8")
        path.chmod(0o644)
        recorder.attempt(lambda: agent.load_config(str(path), os.environ).validate())
    missing = str(folder / "missing.json")
    recorder.attempt(agent.load_config, missing, {})
    recorder.attempt(agent.build_tls_context, "proxmox", "/etc/pve/missing.pem")
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1080")
    recorder.attempt(agent.find_proxy, "hub.example.com")

    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    # This machine may have one.
    monkeypatch.setattr(agent, "DEFAULT_PATH", missing)
    recorder.attempt(agent.load_config, None, {})
    monkeypatch.setattr("builtins.open", refuse)
    recorder.attempt(agent.load_config, missing, {})


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Everything that the module says in these scenes."""
    folder, recorder = tmp_path_factory.mktemp("messages"), Recorder()
    (folder / "fips").write_text(FIPS, "utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for logger in (agent.LOG, LOG):
            monkeypatch.setattr(logger, "handlers", [recorder])
            # Not by setattr: a logger remembers for which levels it is on.
            logger.setLevel(logging.DEBUG)
        collects(recorder)
        runs(recorder, folder)
        configurations(recorder, folder, monkeypatch)
    for logger in (agent.LOG, LOG):
        logger.setLevel(logging.NOTSET)
    return recorder.lines


def find_messages() -> list[str]:
    """Return the page's messages, but for those under which the reasons of others are quoted."""
    rows = find_rows("message", "## About") + find_rows("message", "## How")
    rows += find_rows("message", "## Configuration")
    return [message for cells in rows for message in cells["message"].split("`")[1::2]]


@pytest.mark.parametrize("message", find_messages())
def test_module_says_each_message_of_the_page(message: str, said: list[str]) -> None:
    pattern = re.escape(message).replace("…", ".*")
    pattern = re.sub(rf"\b({PLACEHOLDERS})\b", ".+", pattern)
    assert [line for line in said if re.search(rf"(?<!\w){pattern}", line)]
