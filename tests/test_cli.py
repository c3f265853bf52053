"""The command line: exit statuses, what goes to standard output, and how the daemon ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

import felhom_agent as agent
import lab
from support import (
    HANG_SECONDS,
    MODULE,
    Daemon,
    Outcome,
    install_systemctl,
    make_hub_client,
    messages,
)

OK, FAILED, INVALID = 0, 1, 2
TOKEN_SECRET: Final = lab.SimulatedNode(None).token_secret
# Python's own, if it cannot flush standard error at the end.
UNFLUSHED: Final = 120
CONFIG, PROXMOX, HUB = "--selftest=config", "--selftest=proxmox", "--selftest=hub"
ALL_MODES: Final = pytest.mark.parametrize(
    "mode", ["", CONFIG, PROXMOX, HUB], ids=["daemon", CONFIG, PROXMOX, HUB]
)
COLLECTING: Final = pytest.mark.parametrize("mode", [PROXMOX, HUB])
Run = Callable[..., Outcome]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Call main() with arguments; what that changes in this process is put back."""
    monkeypatch.setenv("PATH", install_systemctl(tmp_path))
    before = agent.LOG.handlers, agent.LOG.propagate, agent.LOG.level, logging.raiseExceptions

    def call_main(*arguments: str) -> Outcome:
        try:
            status = agent.main(arguments)
        except SystemExit as exc:
            # argparse's own.
            status = cast(int, exc.code)
        return Outcome(status, *capfd.readouterr())

    yield call_main
    agent.LOG.handlers, agent.LOG.propagate, agent.LOG.level, logging.raiseExceptions = before


@pytest.fixture
def run(call: Run, write_config: Callable[..., Path]) -> Run:
    """Call main() with a mode, and changes to a configuration that works."""
    return lambda mode, *options, **changes: call(
        *mode.split(), *options, "--config", str(write_config(**changes))
    )


def errors(outcome: Outcome) -> list[str]:
    """Return the errors on standard error; there must be nothing else, nor on standard output."""
    assert (outcome.status, outcome.out) == (INVALID, "")
    lines = [line.partition(" ERROR ") for line in outcome.err.splitlines()]
    assert all(level for _, level, _ in lines), outcome.err
    return [text for _, _, text in lines]


# ---- usage and configuration ---------------------------------------------------------------------


def test_version(call: Run) -> None:
    assert call("--version") == Outcome(OK, "felhom-agent 0.3.0\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        *("--nonsense", "positional", "--config", "--selftest", "--selftest=", "--selftest all"),
        *("--log-level loud", "--log-level=DEBUG", "--conf x", "--self config", "--vers"),
        *("--print", "--print=all"),
    ],
)
def test_wrong_usage(call: Run, arguments: str) -> None:
    outcome = call(*arguments.split())
    assert (outcome.status, outcome.out) == (INVALID, "")
    assert outcome.err.startswith("usage: felhom-agent ")


def test_help_says_what_each_choice_does(call: Run) -> None:
    outcome = call("--help")
    assert (outcome.status, outcome.err) == (OK, "")
    told = " ".join(outcome.out.split())
    assert "config: check the configuration; proxmox: also read the node, and print" in told
    assert "hub: also send it; then exit" in told
    assert "unit: print felhom-agent.service; config: print agent.example.json" in told


@pytest.mark.parametrize(
    ("name", "file"), [("unit", "felhom-agent.service"), ("config", "agent.example.json")]
)
def test_print_needs_no_configuration(call: Run, name: str, file: str) -> None:
    outcome = call(f"--print={name}", "--config=/nonexistent")
    assert (outcome.status, outcome.err) == (OK, "")
    assert outcome.out.encode() == MODULE.with_name(file).read_bytes()


def test_selftest_of_the_configuration_prints_what_is_in_effect(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FELHOM_AGENT_HUB_HOST_ID", "of the environment")
    outcome = run(CONFIG, proxmox={"token_secret": "hunter2"}, hub={"api_key": "hunter3"})
    assert outcome.status == OK
    config = agent.load_config(str(tmp_path / "agent.json"), os.environ)
    assert outcome.document == json.loads(json.dumps(config.redacted()))
    assert outcome.document["hub"]["host_id"] == "of the environment"
    assert "hunter" not in outcome.out


@ALL_MODES
def test_invalid_configuration_has_a_line_for_each_problem(run: Run, mode: str) -> None:
    outcome = run(
        mode,
        proxmox={"token_secret": "hunter 2", "timeout_seconds": "10"},
        hub={"url": "http://hub.example.com", "api_key": "hunter 3"},
        cloudflared={"unit": "--version"},
    )
    keys = ["cloudflared.unit", "proxmox.timeout_seconds", "proxmox.token_secret"]
    keys += [] if mode == PROXMOX else ["hub.api_key", "hub.url"]
    found = [re.match(r"config: (\S+): ", line) for line in errors(outcome)]
    assert sorted(match[1] for match in found if match) == sorted(keys)
    assert "hunter" not in outcome.err


@ALL_MODES
@pytest.mark.parametrize("section", ["proxmox", "hub"])
@pytest.mark.parametrize("path", ["/nonexistent/ca.pem", "/\ud800"], ids=ascii)
def test_ca_file_is_read_at_the_start(run: Run, mode: str, section: str, path: str) -> None:
    outcome = run(mode, **{section: {"ca_file": path}})
    if (mode, section) == (PROXMOX, "hub"):
        assert outcome.status == OK
    else:
        (line,) = errors(outcome)
        shown = path.replace("\ud800", "\\xd800")
        assert line.startswith(f"config: {section}.ca_file: {shown}: no usable PEM file (")


# No provider has the algorithms that this demands.
FIPS: Final = "openssl_conf = a\n[a]\nalg_section = b\n[b]\ndefault_properties = fips=yes\n"


@pytest.mark.parametrize("mode", ["", CONFIG], ids=["daemon", CONFIG])
def test_openssl_that_refuses_is_an_invalid_configuration(
    agent_config: Path, tmp_path: Path, mode: str
) -> None:
    (tmp_path / "openssl.cnf").write_text(FIPS, "ascii")
    done = subprocess.run(
        [sys.executable, str(MODULE), "--config", str(agent_config), *mode.split()],
        env={"OPENSSL_CONF": str(tmp_path / "openssl.cnf")},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    (line,) = errors(Outcome(done.returncode, done.stdout, done.stderr))
    assert line.startswith("config: this host's OpenSSL refuses TLS (")


# ---- the proxy -----------------------------------------------------------------------------------

ELSEWHERE: Final = {"url": "https://hub.example.com"}
BAD_PROXY: Final = "https://bob:hunter2@proxy.example.com:3128"


@ALL_MODES
@pytest.mark.parametrize(
    "proxy",
    [
        *(BAD_PROXY, "socks5://bob:hunter2@proxy:1080", "proxy:3128", "http://proxy", "http://"),
        *("http://bob:hunter2/3@proxy:3128", "http://bob:hunter@2@proxy:3128", "http://:3128"),
        *("http://proxy:3128/path", "http://proxy:x"),
    ],
)
def test_proxy_of_another_form_is_refused_at_the_start(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str, proxy: str
) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    outcome = run(mode, hub=ELSEWHERE)
    if mode == PROXMOX:
        assert outcome.status == OK
    else:
        (line,) = errors(outcome)
        assert line.startswith("config: https_proxy: must be http://")
    assert "hunter" not in outcome.err


# ---- self-tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "verdict"),
    [
        (CONFIG, "the configuration is valid"),
        (PROXMOX, "node pve1 was read"),
        (HUB, "report accepted by {url}"),
    ],
)
def test_selftest_ends_with_its_verdict(
    run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub, mode: str, verdict: str
) -> None:
    node.guests = lab.many_guests(1)
    outcome = run(mode, "--log-level=info")
    assert (outcome.status, bool(outcome.document)) == (OK, True)
    assert outcome.err.endswith(f" INFO {verdict.format(url=hub.url)}\n")
    assert run(mode, "--log-level=warning").err == ""


@COLLECTING
@pytest.mark.parametrize(
    ("count", "extras", "told"),
    [
        (0, [], None),
        (1, [], "1 virtual machine is not reported; add qemu to proxmox.extras"),
        (3, ["storage"], "3 virtual machines are not reported; add qemu to proxmox.extras"),
        (3, ["qemu"], None),
    ],
)
def test_selftest_says_which_machines_are_left_out(
    run: Run, node: lab.SimulatedNode, mode: str, count: int, extras: list[str], told: str | None
) -> None:
    node.vms = lab.many_vms(count)
    outcome = run(mode, proxmox={"extras": extras})
    found = [line.partition(" INFO ")[2] for line in outcome.err.splitlines() if "machine" in line]
    assert (outcome.status, found) == (OK, [told] if told else [])


def test_selftest_of_proxmox_prints_the_report(
    run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> None:
    outcome = run(PROXMOX)
    assert outcome.status == OK
    assert list(lab.report_schema().iter_errors(outcome.document)) == []
    assert outcome.document["cloudflared"] == {"status": "active"}
    assert "9.2.11" in outcome.err
    assert [request.method for request in node.requests] == ["GET"] * len(node.requests)
    assert hub.requests == []


@pytest.mark.parametrize("section", [None, {}, {"url": "http://h", "ca_file": "/x"}], ids=repr)
def test_selftest_of_proxmox_needs_no_hub(call: Run, agent_config: Path, section: object) -> None:
    document = {**json.loads(agent_config.read_text("utf-8")), "hub": section}
    if section is None:
        del document["hub"]
    agent_config.write_text(json.dumps(document), "utf-8")
    outcome = call(PROXMOX, "--config", str(agent_config))
    assert outcome.status == OK
    assert outcome.document["host"]["node"] == "pve1"
    assert "host_id" not in outcome.document


@COLLECTING
def test_only_the_selftest_of_proxmox_judges_the_token_everywhere(
    run: Run, node: lab.SimulatedNode, mode: str
) -> None:
    node.roles["Writer"] = ("Datastore.Audit", "Datastore.Allocate")
    node.acl.append(("/storage/local", "Writer", True))
    outcome = run(mode)
    assert outcome.status == OK
    assert ("Datastore.Allocate" in outcome.err) == (mode == PROXMOX)


def test_selftest_of_the_hub_prints_report_and_envelope(run: Run, hub: lab.SimulatedHub) -> None:
    outcome = run(HUB)
    assert outcome.status == OK
    fields = [item.name for item in dataclasses.fields(agent.ControlEnvelope)]
    envelope = {**dict.fromkeys(fields), **hub.envelope}
    assert outcome.document == {"report": hub.reports[0], "envelope": envelope}
    assert len(hub.requests) == 1


@pytest.mark.parametrize("level", ["info", "debug"])
def test_selftest_whose_report_fails_prints_the_report_and_why_without_secrets(
    run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub, level: str
) -> None:
    # The hub cannot know the token's secret; if it does, it is not shown either.
    hub.script("", lab.Reply(503, f"Bad keys {hub.api_key} {node.token_secret}"))
    outcome = run(HUB, "--log-level", level)
    assert (outcome.status, list(outcome.document)) == (FAILED, ["report", "error"])
    assert list(lab.report_schema().iter_errors(outcome.document["report"])) == []
    for text in (outcome.document["error"], outcome.err):
        assert "503 Bad keys *** ***" in text
    for secret in (hub.api_key, node.token_secret):
        assert secret not in outcome.out + outcome.err


@COLLECTING
@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("", lab.Reply(401, "Authentication failed!", None)),
        ("/nodes/pve1/status", lab.Reply(403, f"Permission check failed ({TOKEN_SECRET})")),
        ("/cluster/resources", lab.Cut()),
    ],
    ids=["wrong token", "missing privilege", "cut off"],
)
def test_selftest_whose_collect_fails_prints_nothing(
    run: Run, node: lab.SimulatedNode, mode: str, path: str, answer: lab.Answer
) -> None:
    node.script(path, lab.Forever(answer))
    outcome = run(mode)
    assert (outcome.status, outcome.out) == (FAILED, "")
    assert outcome.err.count(" ERROR GET /") == 1
    assert "Traceback" not in outcome.err
    assert node.token_secret not in outcome.err


class Broken:
    """A collector with a bug."""

    proxmox = SimpleNamespace(node="pve1")
    unreported_machines = 0

    def collect(self, **_options: object) -> agent.HostReport:
        raise ZeroDivisionError


def test_bug_in_a_selftest_fails_without_a_report_and_with_a_traceback(
    log: pytest.LogCaptureFixture,
) -> None:
    hub = make_hub_client(lab.SimulatedHub(None))
    assert agent.selftest(cast(agent.Collector, Broken()), hub) == FAILED
    ((level, text),) = messages(log)
    assert (level, "bug in the agent" in text) == ("ERROR", True)
    assert "ZeroDivisionError" in log.text.partition("Traceback")[2]


@pytest.mark.parametrize(
    ("answer", "result"),
    [(lab.Usual(), "200"), (lab.Reply(503), "503"), (lab.Cut(), "no response")],
    ids=["200", "503", "cut"],
)
def test_each_request_is_logged_at_the_debug_level_alone(
    run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub, answer: lab.Answer, result: str
) -> None:
    node.guests = lab.many_guests(2)
    hub.script("", lab.Forever(answer))
    assert " DEBUG " not in run(HUB).err
    node.requests.clear()
    log = run(HUB, "--log-level=debug").err
    found = re.findall(r" DEBUG (GET|POST) (\S+): (.*), \d+ ms\n", log)
    expected = [(each.method, each.path.removeprefix(node.base), "200") for each in node.requests]
    assert found == [*expected, ("POST", "/api/v1/host-report", result)]
    assert [secret for secret in (node.token_secret, hub.api_key) if secret in log] == []


# ---- the daemon ----------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path, write_config: Callable[..., Path]) -> Iterator[Callable[..., Daemon]]:
    """Start the agent as a process, which is ended at the latest with the test."""
    with contextlib.ExitStack() as stack:

        def start_daemon(
            *arguments: str, changes: dict[str, Any] | None = None, **options: Any
        ) -> Daemon:
            config = write_config(**(changes or {}))
            return stack.enter_context(
                Daemon(tmp_path, config, *arguments, stepped=False, **options)
            )

        yield start_daemon


Start = Callable[..., Daemon]


def await_blocked(daemon: Daemon) -> None:
    """Return once it has started and sleeps in a system call.

    A signal just before such a call interrupts nothing, so Python would notice it only afterwards.
    """
    state, deadline = Path(f"/proc/{daemon.process.pid}/stat"), time.monotonic() + 10
    while " INFO started " not in daemon.log.read_text("utf-8") or ") S " not in state.read_text():
        assert time.monotonic() < deadline, "it is always busy"


def assert_ends(daemon: Daemon, *numbers: signal.Signals) -> None:
    """It ends with 0 at once, and has printed nothing on standard output."""
    await_blocked(daemon)
    sent = time.monotonic()
    for number in numbers or [signal.SIGTERM]:
        daemon.process.send_signal(number)
    out, _ = daemon.process.communicate(timeout=10)
    assert (daemon.process.returncode, out) == (OK, "")
    assert time.monotonic() - sent < HANG_SECONDS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_wait(
    start: Start, node: lab.SimulatedNode, hub: lab.SimulatedHub, number: signal.Signals
) -> None:
    daemon = start("--log-level=debug")
    hub.wait_for_reports(1, 10)
    assert_ends(daemon, number)
    log = daemon.log.read_text("utf-8")
    assert f" INFO started version=0.3.0 host_id=pve1 url={hub.url} interval=900\n" in log
    assert node.token_secret not in log
    assert hub.api_key not in log
    daemon.receive_status()
    assert daemon.notified[-1] == "STOPPING=1"
    assert len(hub.reports) == 1


SLOW: Final = pytest.mark.parametrize(
    "answer",
    [lab.Stall(), lab.Drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + b"x" * 99, 0.2)],
    ids=["silent", "dripping"],
)


@SLOW
@pytest.mark.parametrize("answered", range(5))
def test_signal_ends_a_request_to_proxmox(
    start: Start, node: lab.SimulatedNode, answered: int, answer: lab.Answer
) -> None:
    node.script("", *[lab.Usual()] * answered, lab.Forever(answer))
    daemon = start()
    node.wait_for_requests(answered + 1, 10)
    assert_ends(daemon)


@SLOW
def test_signal_ends_a_request_to_the_hub(
    start: Start, hub: lab.SimulatedHub, answer: lab.Answer
) -> None:
    hub.script("", lab.Forever(answer))
    daemon = start()
    hub.wait_for_requests(1, 10)
    assert_ends(daemon)


@pytest.mark.parametrize("section", ["proxmox", "hub"])
def test_signal_ends_a_connect_that_nobody_accepts(start: Start, section: str) -> None:
    with lab.black_hole() as port:
        assert_ends(start(changes={section: {"url": f"https://127.0.0.1:{port}"}}))


@pytest.mark.parametrize("section", ["proxmox", "hub", "proxy"])
def test_signal_ends_a_handshake(start: Start, section: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        changes = {section: {"url": f"https://{address}"}}
        if section == "proxy":
            changes = {"hub": ELSEWHERE}
        daemon = start(changes=changes, environment={"https_proxy": f"http://{address}"})
        with listener.accept()[0] as connection:
            connection.settimeout(10)
            # A proxy gets CONNECT, a server a TLS handshake.
            assert connection.recv(1) == (b"C" if section == "proxy" else b"\x16")
            assert_ends(daemon)


def test_signal_ends_the_wait_for_systemctl(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "running")
    daemon = start(systemctl="echo here >running\nexec sleep 60")
    assert (tmp_path / "running").read_text("utf-8") == "here\n"
    assert_ends(daemon)


@pytest.mark.parametrize("numbers", ["TERM TERM", "TERM INT", "STOP TERM INT CONT"])
def test_second_signal_does_not_break_the_end(
    start: Start, hub: lab.SimulatedHub, numbers: str
) -> None:
    daemon = start()
    hub.wait_for_reports(1, 10)
    assert_ends(daemon, *(signal.Signals[f"SIG{name}"] for name in numbers.split()))
    assert "Traceback" not in daemon.log.read_text("utf-8")


def fill(pipe: int) -> None:
    """Write until the pipe takes no more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    os.set_blocking(pipe, True)


@pytest.mark.parametrize("is_writing", [True, False], ids=["while writing", "while waiting"])
def test_signal_ends_it_though_nobody_reads_its_log(
    start: Start, hub: lab.SimulatedHub, is_writing: bool
) -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb"), open(write_end, "wb") as pipe:
        if is_writing:
            fill(write_end)
        daemon = start(stderr=pipe.fileno())
        if is_writing:
            # Its first line does not get out.
            waits_in, deadline = Path(f"/proc/{daemon.process.pid}/wchan"), time.monotonic() + 10
            while "pipe_write" not in waits_in.read_text("utf-8"):
                assert time.monotonic() < deadline, "it does not write"
        else:
            hub.wait_for_reports(1, 10)
            fill(write_end)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(HANG_SECONDS) == OK


def test_alarm_from_elsewhere_ends_nothing(agent_config: Path, tmp_path: Path) -> None:
    with Daemon(tmp_path, agent_config) as daemon:
        daemon.await_cycle()
        daemon.process.send_signal(signal.SIGALRM)
        assert "accepted" in daemon.step()


@pytest.mark.parametrize("kind", ["full disk", "no reader", "closed"])
def test_log_that_takes_nothing_does_not_stop_the_heartbeat(
    start: Start, node: lab.SimulatedNode, hub: lab.SimulatedHub, kind: str
) -> None:
    # Something to warn of.
    node.script("/nodes/pve1/lxc", lab.Reply(500, "x"))
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open("/dev/full", "wb") as full, open(write_end, "wb") as pipe:
        stderr = {"full disk": full.fileno(), "no reader": pipe.fileno()}.get(kind)
        daemon = start(stderr=stderr, shell="" if stderr else 'exec "$@" 2>&-')
        hub.wait_for_reports(1, 10)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(10) in (OK, UNFLUSHED)


# Ends a Python that writes a file or runs anything but systemctl.
SITECUSTOMIZE: Final = """
import os, sys
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.remove"}
COMMANDS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"}
def watch(event, arguments):
    if event == "open" and arguments[0] != os.devnull:
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            os._exit(99)
    if event in CHANGES:
        os._exit(98)
    if event in COMMANDS or event == "subprocess.Popen" and arguments[0] != "systemctl":
        os._exit(97)
sys.addaudithook(watch)
"""


@ALL_MODES
def test_no_file_is_written_and_no_command_run_but_systemctl(
    start: Start, hub: lab.SimulatedHub, tmp_path: Path, mode: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, "utf-8")
    # To which the ssl module would write what decrypts each connection.
    environment = {"SSLKEYLOGFILE": str(tmp_path / "keys")}
    environment["PYTHONPATH"] = f"{tmp_path}:{MODULE.parent}"
    daemon = start(*mode.split(), environment=environment)
    if mode:
        daemon.process.communicate(timeout=10)
    else:
        hub.wait_for_reports(1, 10)
        assert_ends(daemon)
    assert daemon.process.returncode == OK
    names = ["agent.json", "commands", "log", "notify", "sitecustomize.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
