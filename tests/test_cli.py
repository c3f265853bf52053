"""The command line: exit statuses, what goes to standard output, and how the daemon ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
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
CONFIG, PROXMOX, HUB = "--selftest=config", "--selftest=proxmox", "--selftest=hub"
ALL_MODES: Final = pytest.mark.parametrize(
    "mode", ["", CONFIG, PROXMOX, HUB], ids=["daemon", CONFIG, PROXMOX, HUB]
)
Run = Callable[..., Outcome]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Call main() with arguments; what that changes in this process is put back."""
    monkeypatch.setenv("PATH", install_systemctl(tmp_path))
    before = agent.LOG.handlers, agent.LOG.propagate, agent.LOG.level

    def call_main(*arguments: str) -> Outcome:
        try:
            status = agent.main(arguments)
        except SystemExit as exc:
            # argparse's own.
            status = cast(int, exc.code)
        return Outcome(status, *capfd.readouterr())

    yield call_main
    agent.LOG.handlers, agent.LOG.propagate, agent.LOG.level = before


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


@pytest.mark.parametrize(
    "arguments",
    [
        *("--nonsense", "positional", "--config", "--selftest", "--selftest=", "--selftest all"),
        *("--log-level loud", "--log-level=DEBUG", "--conf x", "--self config", "--print=all"),
    ],
)
def test_wrong_usage(call: Run, arguments: str) -> None:
    outcome = call(*arguments.split())
    assert (outcome.status, outcome.out) == (INVALID, "")
    assert outcome.err.startswith("usage: felhom-agent ")


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


PROXIES: Final = (
    *("https://bob:hunter2@proxy:3128", "socks5://bob:hunter2@proxy:1080", "proxy:3128", "http://"),
    *("http://bob:hunter2/3@proxy:3128", "http://bob:hunter@2@proxy:3128", "http://:3128"),
    *("http://proxy", "http://proxy:3128/path", "http://proxy:x"),
)
CA_FILES: Final = ("/nonexistent/ca.pem", "/\ud800")


@ALL_MODES
@pytest.mark.parametrize(
    ("section", "value"),
    [*((section, path) for section in ("proxmox", "hub") for path in CA_FILES)]
    + [("https_proxy", proxy) for proxy in PROXIES],
    ids=ascii,
)
def test_ca_files_and_proxy_are_judged_at_the_start(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str, section: str, value: str
) -> None:
    """Whatever is sent nowhere in this mode is not judged."""
    start = f"config: {section}.ca_file: {ascii(value)[1:-1]}: no usable PEM file ("
    changes: dict[str, dict[str, str]] = {section: {"ca_file": value}}
    if section == "https_proxy":
        monkeypatch.setenv("https_proxy", value)
        start = "config: https_proxy: must be http://"
        changes = {"hub": {"url": "https://hub.example.com"}}

    outcome = run(mode, **changes)
    assert "hunter" not in outcome.err
    if mode == PROXMOX and section != "proxmox":
        assert outcome.status == OK
    else:
        (line,) = errors(outcome)
        assert line.startswith(start.replace("\\ud800", "\\xd800"))


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
    assert len(hub.requests) == (mode == HUB)
    assert run(mode, "--log-level=warning").err == ""


@pytest.mark.parametrize(
    ("count", "extras", "told"),
    [
        (0, [], []),
        (1, [], ["not reported: 1 virtual machine; add qemu to proxmox.extras"]),
        (3, ["storage"], ["not reported: 3 virtual machines; add qemu to proxmox.extras"]),
        (3, ["qemu"], []),
    ],
)
def test_selftest_says_which_machines_are_left_out(
    run: Run, node: lab.SimulatedNode, count: int, extras: list[str], told: list[str]
) -> None:
    node.vms = lab.many_vms(count)
    outcome = run(HUB, proxmox={"extras": extras})
    found = [line.partition(" INFO ")[2] for line in outcome.err.splitlines() if "machine" in line]
    assert (outcome.status, found) == (OK, told)


@pytest.mark.parametrize(
    "section", [None, {}, {"url": "http://h", "ca_file": "/x"}, {"host_id": "pve9"}], ids=repr
)
def test_selftest_of_proxmox_prints_the_report_and_needs_no_hub(
    call: Run, node: lab.SimulatedNode, agent_config: Path, section: dict[str, str] | None
) -> None:
    document = json.loads(agent_config.read_text("utf-8"))
    del document["hub"]
    if section is not None:
        document["hub"] = section
    agent_config.write_text(json.dumps(document), "utf-8")
    outcome = call(PROXMOX, "--config", str(agent_config))
    assert (outcome.status, "Proxmox VE 9.2.11" in outcome.err) == (OK, True)
    report = outcome.document
    assert report.get("host_id") == (section or {}).get("host_id")
    assert list(lab.report_schema().iter_errors({"host_id": "pve1", **report})) == []
    assert (report["host"]["node"], report["cloudflared"]["status"]) == ("pve1", "active")
    assert {request.method for request in node.requests} == {"GET"}


def test_selftest_of_proxmox_says_what_a_token_without_sys_audit_cannot_see(
    run: Run, node: lab.SimulatedNode
) -> None:
    node.acl = [("/vms", "PVEAuditor", True)]
    outcome = run(PROXMOX)
    assert (outcome.status, outcome.out) == (FAILED, "")
    assert outcome.err.count(" ERROR GET /nodes/pve1/status: 403 ") == 1
    assert "Traceback" not in outcome.err
    told = "without Sys.Audit on /nodes/pve1, its metrics and tasks cannot be read"
    assert outcome.err.count(f" WARNING {told}\n") == 1
    node.acl = [("/", "PVEAuditor", True)]
    assert "without Sys.Audit" not in run(PROXMOX).err


def test_selftest_of_the_hub_prints_report_and_envelope(run: Run, hub: lab.SimulatedHub) -> None:
    outcome = run(HUB)
    assert outcome.status == OK
    fields = [item.name for item in dataclasses.fields(agent.ControlEnvelope)]
    envelope = {**dict.fromkeys(fields), **hub.envelope}
    assert outcome.document == {"report": hub.reports[0], "envelope": envelope}
    assert len(hub.requests) == 1


def test_selftest_whose_report_fails_prints_the_report_and_why_without_secrets(
    run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> None:
    # The hub cannot know the token's secret; if it does, it is not shown either.
    hub.script("", lab.Reply(503, f"Bad keys {hub.api_key} {node.token_secret}"))
    outcome = run(HUB, "--log-level=debug")
    assert (outcome.status, list(outcome.document)) == (FAILED, ["report", "error"])
    assert list(lab.report_schema().iter_errors(outcome.document["report"])) == []
    for text in (outcome.document["error"], outcome.err):
        assert "503 Bad keys *** ***" in text
    for secret in (hub.api_key, node.token_secret):
        assert secret not in outcome.out + outcome.err


def test_bug_in_a_selftest_fails_without_a_report_and_with_a_traceback(
    log: pytest.LogCaptureFixture,
) -> None:
    def collect(**_options: object) -> agent.HostReport:
        raise ZeroDivisionError

    proxmox = SimpleNamespace(node="pve1")
    collector: Any = SimpleNamespace(proxmox=proxmox, collect=collect)
    assert agent.selftest_hub(collector, make_hub_client(lab.SimulatedHub(None))) == FAILED
    ((level, text),) = messages(log)
    assert (level, "bug in the agent" in text) == ("ERROR", True)
    assert "ZeroDivisionError" in log.text.partition("Traceback")[2]


def test_each_request_is_logged_at_the_debug_level_alone(
    run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> None:
    node.guests = lab.many_guests(2)
    hub.script("", *[lab.Reply(503)] * 2, lab.Cut())
    assert " DEBUG " not in run(HUB).err
    for result in ("503", "no response"):
        node.requests.clear()
        log = run(HUB, "--log-level=debug").err
        found = re.findall(r" DEBUG (GET|POST) (\S+): (.*), \d+ ms\n", log)
        paths = [request.path.removeprefix(node.base) for request in node.requests]
        expected = [("GET", path, "200") for path in paths]
        assert found == [*expected, ("POST", "/api/v1/host-report", result)]


# ---- the daemon ----------------------------------------------------------------------------------

Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path, write_config: Callable[..., Path]) -> Iterator[Start]:
    """Start the agent as a process, which is ended at the latest with the test."""
    with contextlib.ExitStack() as stack:

        def start_daemon(*arguments: str, **options: Any) -> Daemon:
            config = write_config(**options.pop("changes", {}))
            daemon = Daemon(tmp_path, config, *arguments, stepped=False, **options)
            return stack.enter_context(daemon)

        yield start_daemon


def await_blocked(daemon: Daemon, system_call: str = "") -> None:
    """Return once it sleeps in a system call, by default after it has started.

    A signal just before such a call interrupts nothing, so Python would notice it only afterwards.
    """
    process, deadline = Path(f"/proc/{daemon.process.pid}"), time.monotonic() + 10
    while True:
        assert time.monotonic() < deadline, "it is always busy"
        if system_call:
            is_blocked = system_call in (process / "wchan").read_text("utf-8")
        else:
            is_blocked = ") S " in (process / "stat").read_text("utf-8")
            is_blocked &= " INFO started " in daemon.log.read_text("utf-8")
        if is_blocked:
            return


def assert_ends(daemon: Daemon, *numbers: signal.Signals) -> None:
    """It ends with 0 at once, and has printed nothing on standard output."""
    await_blocked(daemon)
    sent = time.monotonic()
    for number in numbers or [signal.SIGTERM]:
        daemon.process.send_signal(number)
    out, _ = daemon.process.communicate(timeout=10)
    assert (daemon.process.returncode, out) == (OK, "")
    assert time.monotonic() - sent < HANG_SECONDS


@pytest.mark.parametrize("numbers", ["TERM", "INT", "TERM TERM", "TERM INT", "STOP TERM INT CONT"])
def test_signal_ends_the_wait_and_a_second_one_does_not_break_that(
    start: Start, node: lab.SimulatedNode, hub: lab.SimulatedHub, numbers: str
) -> None:
    daemon = start("--log-level=debug")
    hub.wait_for_reports(1, 10)
    assert_ends(daemon, *(signal.Signals[f"SIG{name}"] for name in numbers.split()))
    log = daemon.log.read_text("utf-8")
    assert f" INFO started version=0.3.0 host_id=pve1 url={hub.url} interval=900\n" in log
    assert [text for text in ("Traceback", node.token_secret, hub.api_key) if text in log] == []
    daemon.receive_status()
    assert daemon.notified[-1] == "STOPPING=1"
    assert len(hub.reports) == 1


@pytest.mark.parametrize("answered", [0, 1, 4, None])
def test_signal_ends_a_request(
    start: Start, node: lab.SimulatedNode, hub: lab.SimulatedHub, answered: int | None
) -> None:
    """To Proxmox after so many that were answered, or to the hub."""
    server: lab.Server = hub if answered is None else node
    server.script("", *[lab.Usual()] * (answered or 0), lab.Forever(lab.Stall()))
    daemon = start()
    server.wait_for_requests((answered or 0) + 1, 10)
    assert_ends(daemon)


def test_signal_ends_the_wait_for_systemctl(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "running")
    daemon = start(systemctl="echo here >running\nexec sleep 60")
    assert (tmp_path / "running").read_text("utf-8") == "here\n"
    assert_ends(daemon)


def fill(pipe: int) -> None:
    """Write until the pipe takes no more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    os.set_blocking(pipe, True)


@pytest.mark.parametrize("reader", ["is full at once", "is full later", "is gone"])
def test_signal_ends_it_though_nobody_reads_its_log(
    start: Start, node: lab.SimulatedNode, hub: lab.SimulatedHub, reader: str
) -> None:
    # Something to warn of
    node.script("/nodes/pve1/lxc", lab.Reply(500, "x"))
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as unread, open(write_end, "wb") as pipe:
        if reader == "is full at once":
            fill(write_end)
        if reader == "is gone":
            unread.close()
        daemon = start(stderr=pipe.fileno())
        if reader == "is full at once":
            # Its first line does not get out.
            await_blocked(daemon, "pipe_write")
        else:
            hub.wait_for_reports(1, 10)
        if reader == "is full later":
            fill(write_end)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(HANG_SECONDS) == OK


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
