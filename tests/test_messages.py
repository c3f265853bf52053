"""docs/messages.md explains each message of the module, and no message that the module never says.

The first half reads the messages from the module and looks for them on the page.  The second half
makes the module say them, and compares what it said with the page, row by row.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
from support import MODULE, SOON, Daemon, Prober, raw_server

PAGE: Final = (MODULE.parent / "docs" / "messages.md").read_text("utf-8")
# Under this heading stands what the module does not say.
OTHERS_WORDS: Final = "## What systemd, shiv and Python say"
PLAIN_PAGE: Final = " ".join(PAGE.replace("`", "").split())
# For what the page calls USER, NODE and so on
NODE: Final = "pve1"
TOKEN: Final = "felhom-agent@pve!agent"
PLACEHOLDERS: Final = (
    "HOST|KEY|KIND|METHOD|N|NAME|NODE|OTHER|PATH|PORT|PRIVILEGE|SECONDS|STATUS|TIME|TOPIC|URL|USER"
    "|VARIABLE|VERSION"
)


# ---- each message of the module is on the page ---------------------------------------------------


def all_hints() -> Iterator[str]:
    """What the clients say to do, with the page's words for what varies."""
    words = {"user": "USER", "token": "'USER!NAME'", "node": "NODE", "seconds": "SECONDS"}
    for client in (agent.ProxmoxClient, agent.HubClient):
        for hint in client.hints.values():
            yield hint.format(section=client.section, server=client.server, **words)


@pytest.mark.parametrize("hint", sorted(set(all_hints())))
def test_page_has_each_hint(hint: str) -> None:
    assert hint in PLAIN_PAGE


def find_exempt(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what holds texts that are no messages: docstrings, the hints' keys, `--help`."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield part.body[0]
        if isinstance(part, ast.FunctionDef) and part.name == "parse_arguments":
            yield from ast.walk(part)
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.target).endswith("HINTS"):
            yield from ast.walk(part)
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "EXTRAS":
            yield from ast.walk(part)


def all_sentences() -> Iterator[str]:
    """Yield each text of three words and more, without what is filled in."""
    tree = ast.parse(MODULE.read_text("utf-8"))
    exempt: set[ast.AST] = set()
    for part in find_exempt(tree):
        exempt.add(part)
        if isinstance(part, ast.Expr):
            exempt.add(part.value)

    causes = {*agent.PROXMOX_HINTS, *agent.HUB_HINTS}
    for part in ast.walk(tree):
        if part in exempt or not isinstance(part, ast.Constant) or not isinstance(part.value, str):
            continue
        for piece in re.split(r"%[.\d]*[dfs]|\n", part.value):
            sentence = piece.strip(" ,;:(")
            if len(sentence.split()) >= 3 and sentence not in causes:
                yield sentence


@pytest.mark.parametrize("sentence", sorted(set(all_sentences())))
def test_page_has_each_message(sentence: str) -> None:
    assert sentence in PLAIN_PAGE


def test_page_says_what_each_setting_must_be() -> None:
    documented = {}
    table = PAGE.partition("| key | must be |")[2].partition("\n\n")[0]
    for line in table.strip().split("\n")[1:]:
        keys, expected = line.strip("| ").split(" | ")
        for key in keys.split("`")[1::2]:
            documented[key] = expected
    rules = {}
    for section, settings in agent.SECTIONS.items():
        for item in dataclasses.fields(settings):
            rules[f"{section}.{item.name}"] = item.metadata["expected"]
    assert documented == rules


# ---- the module says what is on the page ---------------------------------------------------------


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


def proxmox_client(url: str, **changes: Any) -> agent.ProxmoxClient:
    values = {"url": url, "node": NODE, "token_id": TOKEN, "token_secret": "the-token", **changes}
    return agent.ProxmoxClient(agent.ProxmoxConfig(**values))


def hub_client(url: str, **changes: Any) -> agent.HubClient:
    values = {"url": url, "host_id": NODE, "api_key": "the-key", **changes}
    return agent.HubClient(agent.HubConfig(**values))


def ask_proxmox(recorder: Recorder, url: str, **changes: Any) -> None:
    with contextlib.closing(proxmox_client(url, **changes)) as proxmox:
        recorder.attempt(proxmox.node_status)


def ask_hub(recorder: Recorder, url: str, **changes: Any) -> None:
    client = hub_client(url, **changes)
    recorder.attempt(client.request, "POST", agent.REPORT_PATH, b"{}")


def answering(data: bytes) -> Callable[[socket.socket], None]:
    """A server that sends this, whatever it was asked, and closes the connection."""

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        # Closing with something unread would reset the connection.
        while connection.recv(65536):
            pass

    return talk


def certificates_refused(recorder: Recorder, folder: Path) -> None:
    good = lab.make_certificates(folder / "good")
    misnamed = lab.make_certificates(folder / "misnamed", names=("elsewhere.example",))
    expired = lab.make_certificates(folder / "expired", not_before_days=-30, days=10)
    for certificates, ca_file in (
        (misnamed, misnamed.ca_file),
        (expired, expired.ca_file),
        (good, ""),
        (good, misnamed.ca_file),
    ):
        with lab.SimulatedNode(certificates) as server:
            ask_proxmox(recorder, server.url, ca_file=str(ca_file))
            ask_hub(recorder, server.url, ca_file=str(ca_file))
    with lab.SimulatedNode(good) as server:
        ask_proxmox(recorder, server.url, fingerprint="00" * 32)


def no_usable_response(recorder: Recorder) -> None:
    for scheme, data in (
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("https", b""),
        ("http", b""),
        ("http", b"SSH-2.0-OpenSSH_9.2\r\n"),
        ("http", b"HTTP/1.1 200 OK\r\n\r\n"),
    ):
        for ask in (ask_proxmox, ask_hub):
            with raw_server(answering(data)) as port:
                ask(recorder, f"{scheme}://127.0.0.1:{port}")
    with lab.SimulatedNode(None) as silent, lab.black_hole() as port:
        silent.script("", lab.Forever(lab.Stall()))
        for url in (silent.url, f"http://127.0.0.1:{port}"):
            ask_proxmox(recorder, url, timeout_seconds=SOON)
            ask_hub(recorder, url, timeout_seconds=SOON)

    proxmox = proxmox_client("http://127.0.0.1:1")
    with proxmox.session(time.monotonic()):
        recorder.attempt(proxmox.node_status)


class Raises:
    """A function that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> object:
        raise self.error


NO_SUCH_HOST: Final = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def not_reached(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", Raises(NO_SUCH_HOST))
        ask_proxmox(recorder, "https://pve1.example.com:8006")
        ask_hub(recorder, "https://hub.example.com")
    url = f"http://127.0.0.1:{closed_port()}"
    ask_proxmox(recorder, url)
    ask_hub(recorder, url)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def proxies(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://hub.example.com"
    for status in (401, 403, 407, 502):
        with raw_server(answering(b"HTTP/1.1 %d No\r\n\r\n" % status)) as port:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
            ask_hub(recorder, url)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port()}")
    ask_hub(recorder, url)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", Raises(NO_SUCH_HOST))
        ask_hub(recorder, url)
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1080")
    recorder.attempt(hub_client, url)
    monkeypatch.delenv("https_proxy")


ELSEWHERE: Final = {"Location": "https://elsewhere.example/"}
TOKEN_REASONS: Final = ("No ticket", "Authentication failed!", "token 'agent' access expired")
FORBIDDEN: Final = "Permission check failed (/nodes/pve1, Sys.Audit)"


def statuses(recorder: Recorder) -> None:
    replies = [lab.Reply(401, reason) for reason in TOKEN_REASONS]
    replies += [lab.Reply(403, FORBIDDEN), lab.Reply(301, "Moved", headers=ELSEWHERE)]
    replies += [lab.Reply(status, "Reason") for status in (500, 503, *range(595, 600))]
    with lab.SimulatedNode(None) as node:
        node.script("/nodes/pve1/status", *replies)
        node.script("/nodes/pve1/storage", lab.Reply(500, "Reason"), lab.Reply(596, "Reason"))
        with contextlib.closing(proxmox_client(node.url)) as proxmox:
            for _ in replies:
                recorder.attempt(proxmox.node_status)
            recorder.attempt(proxmox.archives, "bak")
            recorder.attempt(proxmox.archives, "bak")

    numbers = (401, 403, 404, 405, 413, 421, 429, 500, 502, 503, 504, *range(520, 528), 511, 530)
    replies = [lab.Reply(status, "Reason") for status in numbers]
    replies.append(lab.Reply(301, "Moved", headers=ELSEWHERE))
    with lab.SimulatedHub(None) as hub:
        hub.script("", *replies)
        client = hub_client(hub.url)
        for _ in replies:
            recorder.attempt(client.request, "POST", agent.REPORT_PATH, b"{}")


# What /cluster/resources lists.  The node's status has an uptime of 1000 s.
OWN_NODE: Final = {"type": "node", "node": NODE, "status": "online", "uptime": 995}
LXC: Final = {"type": "lxc", "node": NODE, "vmid": 100, "status": "running"}
OTHER_LXC: Final = {**LXC, "vmid": 101}
BACKUP_STORAGE: Final = {"type": "storage", "node": NODE, "storage": "bak", "content": "backup"}
AVAILABLE: Final = {**BACKUP_STORAGE, "status": "available", "plugintype": "dir"}
FAILURE: Final = lab.Forever(lab.Reply(500, "Reason"))


def collect(
    recorder: Recorder,
    *entries: Mapping[str, object],
    uptime: int = 1000,
    extras: Sequence[str] = (),
    prober: Prober | None = None,
    timeout_seconds: Any = 10,
    **answers: lab.Answer | lab.Forever,
) -> None:
    """Read a node that lists these entries; `answers` replace those under some paths."""
    paths = {
        "config": f"/nodes/{NODE}/lxc",
        "archives": f"/nodes/{NODE}/storage",
        "tasks": f"/nodes/{NODE}/tasks",
        "permissions": "/access/permissions",
    }
    with lab.SimulatedNode(None) as node:
        for name, answer in answers.items():
            node.script(paths[name], answer)
        node.script("/cluster/resources", lab.json_reply({"data": entries}))
        node.script(f"/nodes/{NODE}/status", lab.json_reply({"data": {"uptime": uptime}}))
        node.script(f"/nodes/{NODE}/lxc", lab.Forever(lab.json_reply({"data": {}})))
        client = proxmox_client(
            node.url,
            token_secret=node.token_secret,
            extras=tuple(extras),
            timeout_seconds=timeout_seconds,
        )
        collector = agent.Collector(client, prober or Prober(), host_id=NODE)
        recorder.attempt(collector.collect)


def privileges(*names: str) -> lab.Forever:
    return lab.Forever(lab.json_reply({"data": {"/": dict.fromkeys(names, 1)}}))


def collects(recorder: Recorder) -> None:
    collect(recorder, {**OWN_NODE, "node": "PVE1"})
    collect(recorder, OWN_NODE, LXC, permissions=privileges("Sys.Audit"))
    collect(recorder, OWN_NODE, LXC, permissions=privileges("VM.Audit", "VM.PowerMgmt"))
    collect(recorder, OWN_NODE, LXC, permissions=FAILURE)
    renamed = {**OWN_NODE, "node": "old", "status": "offline"}
    collect(recorder, OWN_NODE, renamed, {**LXC, "node": "old"})
    collect(recorder, {**OWN_NODE, "status": "offline"}, LXC)
    collect(recorder, {**OWN_NODE, "uptime": 0}, LXC, uptime=200)
    collect(recorder, {**OWN_NODE, "uptime": 0}, LXC)
    unmeasured = {"status": "unknown"}
    collect(recorder, OWN_NODE, {**LXC, **unmeasured}, {**OTHER_LXC, **unmeasured})
    collect(recorder, OWN_NODE, LXC, config=FAILURE)
    collect(recorder, OWN_NODE, LXC, OTHER_LXC, config=FAILURE)
    collect(recorder, OWN_NODE, {**LXC, "vmid": 0})
    collect(recorder, OWN_NODE, LXC, prober=Prober(agent.AgentError("printed no state")))


def extras(recorder: Recorder) -> None:
    def read_backups(answer: lab.Answer, **changes: Any) -> None:
        entries = ({**OWN_NODE, **changes}, LXC, AVAILABLE)
        limit = {"timeout_seconds": SOON} if isinstance(answer, lab.Stall) else {}
        collect(recorder, *entries, extras=["backups"], archives=answer, **limit)

    read_backups(lab.Reply(500, "Reason"))
    read_backups(lab.Stall())
    read_backups(lab.Reply(500), uptime=960)
    own_name = {"volid": "bak:backup/mine.tar.zst", "ctime": 1790000000}
    read_backups(lab.json_reply({"data": [own_name, own_name]}))
    undated = {"volid": "bak:backup/vzdump-lxc-100-2026_10_01-02_00_03.tar", "ctime": -1}
    read_backups(lab.json_reply({"data": [undated]}))
    collect(recorder, OWN_NODE, LXC, extras=["tasks"], tasks=FAILURE)


def selftests(recorder: Recorder) -> None:
    with lab.SimulatedNode(None) as node, lab.SimulatedHub(None) as hub:
        proxmox = proxmox_client(node.url, token_secret=node.token_secret)
        collector = agent.Collector(proxmox, Prober(), host_id=NODE)
        assert agent.selftest(collector, None) == 0
        node.vms = node.vms[:1]
        assert agent.selftest(collector, hub_client(hub.url, api_key=hub.api_key)) == 0
        recorder.lines.append(agent.describe_failure(ZeroDivisionError()))


def daemon(recorder: Recorder, folder: Path) -> None:
    with lab.SimulatedNode(None) as node, lab.SimulatedHub(None) as hub:
        hub.script("", lab.Reply(503), lab.Reply(503))
        hub.envelope = {"poll_interval_seconds": 300}
        path = folder / "agent.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(lab.configuration(node, hub)), "utf-8")
        with Daemon(folder, path, "--log-level", "debug") as running:
            running.await_cycle()
            running.step()
            running.step()
            hub.envelope = {"poll_interval_seconds": "soon"}
            node.script("/nodes/pve1/status", lab.Cut())
            running.step()
        for message in running.notified:
            recorder.lines.append(message.partition("STATUS=")[2])
        for line in running.log.read_text("utf-8").splitlines():
            # Without date, time and level
            recorder.lines.append(line.split(maxsplit=3)[-1])
        check = [sys.executable, str(MODULE), "--config", str(path), "--selftest=config"]
        recorder.lines += read_errors(check, {})


def read_errors(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return what the program writes to standard error, without date, time and level."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return [line.split(maxsplit=3)[-1] for line in done.stderr.splitlines()]


# Refuses what is not approved, and has no provider for what is.
FIPS: Final = """\
openssl_conf = init
[init]
alg_section = algorithms
[algorithms]
default_properties = fips=yes
"""


def configurations(recorder: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(text: str, mode: int = 0o600, **environment: str) -> None:
        path = folder / "loaded.json"
        path.write_text(text, "utf-8")
        path.chmod(mode)
        recorder.attempt(lambda: agent.load_config(str(path), environment).validate())

    load("{}")
    load('{"proxmox": 1, "extra": 1, "hub": {"url": "http://192.0.2.1", "poll_seconds": 1}}')
    load('{"proxmox": {"timeout_seconds": 0}}', FELHOM_AGENT_HUB_POLL_SECONDS="often")
    load("[]", mode=0o644)
    load("{}", mode=0o644)
    load("{nonsense")
    recorder.attempt(agent.load_config, str(folder / "missing.json"), {})
    with monkeypatch.context() as patch:
        # This machine may have one.
        patch.setattr(agent, "DEFAULT_PATH", str(folder / "missing.json"))
        recorder.attempt(agent.load_config, None, {})
        patch.setattr("builtins.open", Raises(PermissionError(13, "Permission denied")))
        recorder.attempt(agent.load_config, str(folder / "secret.json"), {})
    recorder.attempt(lambda: proxmox_client("https://127.0.0.1", ca_file="/etc/pve/missing.pem"))

    (folder / "openssl.cnf").write_text(FIPS, "utf-8")
    path = folder / "agent.json"
    check = [sys.executable, str(MODULE), "--config", str(path), "--selftest=config"]
    recorder.lines += read_errors(check, {"OPENSSL_CONF": str(folder / "openssl.cnf")})


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Everything that the module says in these scenes."""
    folder, recorder = tmp_path_factory.mktemp("messages"), Recorder()
    handlers, level, secrets = agent.LOG.handlers, agent.LOG.level, set(agent.SECRETS)
    agent.LOG.handlers = [recorder]
    agent.LOG.setLevel("DEBUG")
    with pytest.MonkeyPatch.context() as monkeypatch:
        certificates_refused(recorder, folder)
        no_usable_response(recorder)
        not_reached(recorder, monkeypatch)
        proxies(recorder, monkeypatch)
        statuses(recorder)
        collects(recorder)
        extras(recorder)
        selftests(recorder)
        daemon(recorder, folder)
        configurations(recorder, folder, monkeypatch)
    agent.LOG.handlers = handlers
    agent.LOG.setLevel(level)
    agent.SECRETS.clear()
    agent.SECRETS.update(secrets)
    return recorder.lines


# ---- the page's rows -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the page: messages, and how the lines with a hint begin and end."""

    messages: tuple[str, ...]
    # Of these one is enough: the words are OpenSSL's, the resolver's or the kernel's.
    are_alternatives: bool
    ends: tuple[tuple[str, str], ...]


def find_rows() -> Iterator[Row]:
    heading, columns = "", list[str]()
    for line in PAGE.partition(OTHERS_WORDS)[0].split("\n"):
        if line.startswith("## "):
            heading = line
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not columns:
            columns = cells
        elif columns[0] == "message" and not line.startswith("|---"):
            ends = {"from Proxmox": "GET ", "from the hub": "POST ", "hint": ""}
            yield Row(
                messages=tuple(cells[0].split("`")[1::2]),
                are_alternatives=heading == "## No response",
                ends=tuple(
                    (ends[column], cell)
                    for column, cell in zip(columns[1:], cells[1:], strict=True)
                    if column in ends and cell
                ),
            )


def to_pattern(text: str) -> str:
    """Return the regular expression for a text of the page."""
    pattern = re.escape(text).replace("…", ".*")
    return re.sub(rf"\b({PLACEHOLDERS})\b", ".+", pattern)


@pytest.mark.parametrize("row", list(find_rows()), ids=lambda row: row.messages[0])
def test_module_says_each_row_of_the_page(row: Row, said: list[str]) -> None:
    for begin, hint in row.ends or (("", ""),):
        found = []
        for message in row.messages:
            pattern = rf"(?<!\w){to_pattern(message)}"
            if hint:
                pattern += f".*; {to_pattern(hint)}$"
            if any(line.startswith(begin) and re.search(pattern, line) for line in said):
                found.append(message)
        if row.are_alternatives:
            assert found, (row.messages, begin)
        else:
            assert found == list(row.messages), begin
