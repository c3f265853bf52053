"""The command line: exit statuses, what goes to standard output, and how the daemon ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import pytest

import felhom_agent
import lab

MODULE: Final = Path(felhom_agent.__file__)
OK, FAILED, WRONG = 0, 1, 2
WRITE_OR_DIE: Final = """
import os, runpy, sys

def watch(event, arguments):
    writes = event == "open" and arguments[0] != os.devnull and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes:
        os._exit(99)
    if event in {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.remove"}:
        os._exit(98)

sys.argv.pop(0)
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A bare one: no HOME, and on PATH nothing but a systemctl that says active."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "systemctl").write_text("#!/bin/sh\necho active\n", "utf-8")
    (commands / "systemctl").chmod(0o755)
    return {"PATH": str(commands)}


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """Run the module as a program of its own."""

    def run_program(*arguments: str | Path, **env: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-W", "error", MODULE, *arguments],
            env={**environment, **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert "Exception ignored" not in done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run_program


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call main() here, where a process of its own shows nothing more; what it changes in this process is put back."""
    for name in ("RES_OPTIONS", "SSLKEYLOGFILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    log = felhom_agent.LOG
    before = log.handlers, log.propagate, log.level

    def call(*arguments: str | Path) -> Outcome:
        try:
            status = felhom_agent.main([str(argument) for argument in arguments])
        except SystemExit as exc:  # of argparse
            status = exc.code if isinstance(exc.code, int) else FAILED
        return Outcome(status, *capfd.readouterr())

    yield call
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


# ---- usage and configuration ------------------------------------------------------------------------------------------------


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(OK, "felhom-agent 0.3.0\n", "")


def test_help_names_every_option(main: Run) -> None:
    outcome = main("--help")
    assert outcome.status == OK
    assert set(re.findall(r"--[a-z-]+", outcome.out)) == {"--help", "--config", "--selftest", "--log-level", "--version"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["positional"],
        ["--config"],
        ["--selftest"],
        ["--selftest", "everything"],
        ["--selftest="],
        ["--log-level", "loud"],
        ["--log-level=DEBUG"],
        ["--conf", "x"],
        ["--self", "config"],
        ["--vers"],
    ],
    ids=" ".join,
)
def test_wrong_usage(main: Run, arguments: list[str]) -> None:
    outcome = main(*arguments)
    assert (outcome.status, outcome.out) == (WRONG, "")
    assert outcome.err.startswith("usage: felhom-agent ")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_log_level(main: Run, write_config: Callable[..., Path], level: str) -> None:
    outcome = main("--selftest=config", "--log-level", level, "--config", write_config(hub={"poll_seconds": 5}))
    assert outcome.status == OK
    assert felhom_agent.LOG.level == logging.getLevelNamesMapping()[level.upper()]
    assert ("WARNING config: hub.poll_seconds: 5" in outcome.err) == (level != "error")


def test_selftest_of_the_configuration_shows_what_is_in_effect(
    main: Run, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FELHOM_AGENT_HUB_HOST_ID", "of the environment")
    path = write_config(proxmox={"token_secret": "hunter2"}, hub={"api_key": "hunter3", "poll_seconds": 60})
    outcome = main("--selftest=config", "--config", path)
    assert outcome.status == OK
    assert outcome.document["proxmox"]["token_secret"] == outcome.document["hub"]["api_key"] == "***"
    assert outcome.document["hub"]["host_id"] == "of the environment"
    assert (outcome.document["hub"]["poll_seconds"], outcome.document["proxmox"]["timeout_seconds"]) == (60, 10)
    assert "hunter" not in outcome.out + outcome.err


def test_selftest_of_a_lacking_configuration_shows_it_and_what_is_wrong(main: Run, write_config: Callable[..., Path]) -> None:
    outcome = main("--selftest=config", "--config", write_config(proxmox={"token_secret": ""}, hub={"url": "http://hub.example.com"}))
    assert outcome.status == WRONG
    assert outcome.document["proxmox"]["token_secret"] == ""
    assert [line.partition(" ERROR ")[2] for line in outcome.err.splitlines()] == [
        "config: proxmox.token_secret: is required",
        "config: hub.url: must be https, got http://hub.example.com",
    ]


MODES: Final[list[list[str]]] = [[], ["--selftest=config"], ["--selftest=proxmox"], ["--selftest=hub"]]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(mode) or "daemon")
@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"proxmox": {}, "proxmox": {}}'], ids=["missing", "no JSON", "no object", "duplicate"]
)
def test_file_that_cannot_be_used(main: Run, tmp_path: Path, mode: list[str], content: str | None) -> None:
    path = tmp_path / "agent.json"
    if content is not None:
        path.touch(mode=0o600)
        path.write_text(content, "utf-8")
    outcome = main(*mode, "--config", path)
    assert (outcome.status, outcome.out) == (WRONG, "")
    assert re.fullmatch(rf"\S+ \S+ ERROR config: {path}: .+\n", outcome.err)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != ["--selftest=config"]], ids=lambda mode: " ".join(mode) or "daemon")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"proxmox": {"token_secret": ""}}, "proxmox.token_secret: is required"),
        ({"proxmox": {"timeout_seconds": "10"}}, "proxmox.timeout_seconds: must be an integer"),
        ({"proxmox": {"ca_file": "none.pem"}}, "proxmox.ca_file: {folder}/none.pem: No such file or directory"),
        ({"cloudflared": {"unit": "--version"}}, "cloudflared.unit: must be the name of a systemd unit"),
    ],
    ids=["missing secret", "wrong type", "missing CA", "wrong unit"],
)
def test_configuration_that_cannot_be_used(
    main: Run, write_config: Callable[..., Path], tmp_path: Path, mode: list[str], changes: Mapping[str, Any], problem: str
) -> None:
    outcome = main(*mode, "--config", write_config(**changes))
    assert (outcome.status, outcome.out) == (WRONG, "")
    assert outcome.err.endswith(f" ERROR config: {problem.format(folder=tmp_path)}\n")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(mode) or "daemon")
@pytest.mark.parametrize("as_ca", [False, True], ids=["configuration", "CA"])
def test_fifo_is_refused_at_once(run: Run, write_config: Callable[..., Path], tmp_path: Path, mode: list[str], as_ca: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    outcome = run(*mode, "--config", write_config(proxmox={"ca_file": str(fifo)}) if as_ca else fifo)
    if as_ca and mode == ["--selftest=config"]:
        assert outcome.status == OK  # it judges the configuration, and opens nothing else
    else:
        assert (outcome.status, outcome.out) == (WRONG, "")
        assert f"{fifo}: is not a regular file" in outcome.err


def test_environment_alone_is_enough(run: Run, node: lab.SimulatedNode, hub: lab.SimulatedHub, tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    path.touch(mode=0o600)
    path.write_text("{}", "utf-8")
    outcome = run("--selftest=hub", **lab.environment(node, hub), FELHOM_AGENT_CONFIG=str(path))
    assert outcome.status == OK
    assert hub.reports == [outcome.document["report"]]


# ---- self-tests -------------------------------------------------------------------------------------------------------------


def test_selftest_of_proxmox_prints_the_report(run: Run, agent_config: Path, hub: lab.SimulatedHub) -> None:
    outcome = run("--selftest=proxmox", "--config", agent_config)
    assert outcome.status == OK
    assert list(lab.report_schema().iter_errors(outcome.document)) == []
    assert outcome.document["cloudflared"] == {"status": "active"}
    assert hub.requests == []


def test_selftest_of_proxmox_needs_no_hub(run: Run, write_config: Callable[..., Path]) -> None:
    path = write_config()
    document = json.loads(path.read_text("utf-8"))
    for hub in (None, "x", {"url": "http://hub.example.com", "ca_file": "/none"}):
        path.write_text(json.dumps({**document, "hub": hub}), "utf-8")
        outcome = run("--selftest=proxmox", "--config", path)
        assert outcome.status == OK
        assert outcome.document["host"]["node"] == "pve1"


def test_selftest_of_the_hub_prints_report_and_envelope(run: Run, agent_config: Path, hub: lab.SimulatedHub) -> None:
    outcome = run("--selftest=hub", "--config", agent_config)
    assert outcome.status == OK
    assert outcome.document == {"report": hub.reports[0], "envelope": hub.envelope}
    assert len(hub.requests) == 1


@pytest.mark.parametrize("debug", [False, True], ids=["info", "debug"])
def test_selftest_whose_report_fails_prints_the_report_and_why(run: Run, agent_config: Path, hub: lab.SimulatedHub, debug: bool) -> None:
    hub.script("", lab.Forever(lab.Reply(503, "Out of order")))
    outcome = run("--selftest=hub", "--config", agent_config, *(["--log-level=debug"] if debug else []))
    assert outcome.status == FAILED
    assert set(outcome.document) == {"report", "error"}
    assert list(lab.report_schema().iter_errors(outcome.document["report"])) == []
    assert "503 Out of order" in outcome.document["error"]
    assert "503 Out of order" in outcome.err
    assert hub.api_key not in outcome.out + outcome.err


@pytest.mark.parametrize("mode", ["--selftest=proxmox", "--selftest=hub"])
@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("", lab.Reply(401, "Authentication failed!", None)),
        ("/nodes/pve1/status", lab.Reply(403, "Permission check failed (/nodes/pve1, Sys.Audit)")),
        ("/nodes/pve1/lxc$", lab.Reply(595, "Connection refused", None)),
        ("/nodes/pve1/lxc$", lab.Cut()),
    ],
    ids=["wrong token", "missing right", "pvedaemon down", "cut off"],
)
def test_selftest_whose_collect_fails(
    main: Run, agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub, mode: str, path: str, answer: lab.Answer
) -> None:
    node.script(path, lab.Forever(answer))
    outcome = main(mode, "--config", agent_config)
    assert (outcome.status, outcome.out) == (FAILED, "")
    assert " ERROR GET /" in outcome.err
    assert node.token_secret not in outcome.err
    assert hub.requests == []


def test_selftest_without_a_server(main: Run, write_config: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    outcome = main("--selftest=proxmox", "--config", write_config(proxmox={"url": f"https://127.0.0.1:{port}"}))
    assert (outcome.status, outcome.out) == (FAILED, "")
    assert "connection refused" in outcome.err


# ---- the daemon -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the daemon, its log in `daemon.log` unless it is to go elsewhere; it is ended at the latest with the test."""
    with contextlib.ExitStack() as stack:

        def start_daemon(
            config: Path, *arguments: str, prefix: Sequence[str] = (), log: IO[str] | int | None = None
        ) -> subprocess.Popen[str]:
            command: list[str | Path] = [*prefix, sys.executable, MODULE, "--config", config, *arguments]
            target = stack.enter_context((tmp_path / "daemon.log").open("w", encoding="utf-8")) if log is None else log
            daemon = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=target, text=True)
            stack.enter_context(daemon)
            stack.callback(daemon.kill)
            return daemon

        yield start_daemon


Start = Callable[..., subprocess.Popen[str]]


def assert_ends(daemon: subprocess.Popen[str], *numbers: signal.Signals) -> None:
    """It ends with 0 within a second, and has said nothing on standard output."""
    sent = time.monotonic()
    for number in numbers:
        daemon.send_signal(number)
    out, _ = daemon.communicate(timeout=10)
    assert (daemon.returncode, out) == (0, "")
    assert time.monotonic() - sent < 1


SIGNALS: Final = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


@SIGNALS
def test_signal_ends_the_wait(
    start: Start, agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub, tmp_path: Path, number: signal.Signals
) -> None:
    daemon = start(agent_config, "--log-level=debug")
    hub.wait_for_reports(1, 10)
    assert_ends(daemon, number)
    log = (tmp_path / "daemon.log").read_text("utf-8")
    assert log.splitlines()[0].endswith(f" INFO started version=0.3.0 host_id=pve1 url={hub.url} interval=900")
    assert log.splitlines()[-1].endswith(f" INFO stopped by {number.name}")
    assert node.token_secret not in log
    assert hub.api_key not in log
    assert len(hub.reports) == 1


@SIGNALS
@pytest.mark.parametrize("answered", range(5))
def test_signal_ends_the_wait_for_proxmox(
    start: Start, agent_config: Path, node: lab.SimulatedNode, answered: int, number: signal.Signals
) -> None:
    node.script("", *[lab.Usual()] * answered, lab.Forever(lab.Stall()))
    daemon = start(agent_config)
    node.wait_for_requests(answered + 1, 10)
    assert_ends(daemon, number)


# The command line as it is, but for a wait in which a signal comes while an object is finalized: what is raised there is lost.
FINALIZED: Final = """
import functools, os, signal, sys, time
import felhom_agent as agent

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def wait(seconds):
    Finalized()
    time.sleep(seconds)

agent.Loop = functools.partial(agent.Loop, wait=wait)
sys.exit(agent.main(sys.argv[1:]))
"""


def test_signal_in_a_finalizer_ends_it_too(agent_config: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
    command = [sys.executable, "-c", FINALIZED, "--config", str(agent_config)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=10, check=True)
    assert done.stderr.splitlines()[-1].endswith(" INFO stopped by SIGTERM")


@SIGNALS
def test_signal_ends_the_wait_for_the_hub(start: Start, agent_config: Path, hub: lab.SimulatedHub, number: signal.Signals) -> None:
    hub.script("", lab.Forever(lab.Stall()))
    daemon = start(agent_config)
    hub.wait_for_requests(1, 10)
    assert_ends(daemon, number)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Listens, and accepts nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


@pytest.mark.parametrize("accept", [False, True], ids=["never accepts", "handshake stalls"])
@pytest.mark.parametrize("section", ["proxmox", "hub"])
def test_signal_ends_the_handshake(
    start: Start, write_config: Callable[..., Path], silent: socket.socket, section: str, accept: bool
) -> None:
    url = f"https://127.0.0.1:{silent.getsockname()[1]}"
    daemon = start(write_config(**{section: {"url": url}}))
    assert select.select([silent], [], [], 10)[0]
    with silent.accept()[0] if accept else contextlib.nullcontext() as connection:
        if connection:
            connection.settimeout(10)
            assert connection.recv(1)[0] == 22  # a TLS handshake has begun
        assert_ends(daemon, signal.SIGTERM)


def test_signal_ends_the_wait_for_a_connection(start: Start, write_config: Callable[..., Path], tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # fills the queue, then the kernel lets nobody in and says nothing
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        log, write_end = os.pipe()
        stack.callback(os.close, log)
        daemon = start(write_config(proxmox={"url": f"https://127.0.0.1:{listener.getsockname()[1]}"}), log=write_end)
        os.close(write_end)
        assert b"started" in os.read(log, 4096)
        assert_ends(daemon, signal.SIGTERM)


def test_signal_ends_the_wait_for_systemctl(start: Start, agent_config: Path, environment: dict[str, str], tmp_path: Path) -> None:
    running = tmp_path / "running"
    os.mkfifo(running)
    script = f"#!/bin/sh\necho here >{running}\nexec {shutil.which('sleep')} 60\n"
    (Path(environment["PATH"]) / "systemctl").write_text(script, "utf-8")
    daemon = start(agent_config)
    assert running.read_text("utf-8") == "here\n"
    assert_ends(daemon, signal.SIGTERM)


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_second_signal_does_not_break_the_end(
    start: Start, agent_config: Path, hub: lab.SimulatedHub, tmp_path: Path, numbers: list[signal.Signals], together: bool
) -> None:
    daemon = start(agent_config)
    hub.wait_for_reports(1, 10)
    assert_ends(daemon, *([signal.SIGSTOP, *numbers, signal.SIGCONT] if together else numbers))
    log = (tmp_path / "daemon.log").read_text("utf-8")
    assert "Traceback" not in log
    assert log.count(" INFO stopped by ") == 1


def open_log(kind: str, stack: contextlib.ExitStack) -> int:
    """A standard error that takes nothing."""
    if kind == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, descriptor = os.pipe()
        if kind == "pipe that nobody reads":
            stack.callback(os.close, read_end)
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(descriptor, b"x" * 4096)
            os.set_blocking(descriptor, True)
        else:
            os.close(read_end)
    stack.callback(os.close, descriptor)
    return descriptor


@pytest.mark.parametrize("kind", ["full disk", "pipe that nobody reads", "pipe without a reader", "closed"])
def test_log_that_takes_nothing_does_not_stop_the_heartbeat(
    start: Start, agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub, kind: str
) -> None:
    node.script("/nodes$", lab.Forever(lab.Reply(500, "x")))  # something to warn of
    with contextlib.ExitStack() as stack:
        closing = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh"] if kind == "closed" else []
        log = subprocess.DEVNULL if kind == "closed" else open_log(kind, stack)
        daemon = start(agent_config, "--log-level=debug", prefix=closing, log=log)
        hub.wait_for_reports(1, 10)
        assert_ends(daemon, signal.SIGTERM)


# ---- the environment --------------------------------------------------------------------------------------------------------


def test_resolver_is_given_little_time(main: Run, agent_config: Path) -> None:
    assert main("--selftest=config", "--config", agent_config).status == OK
    assert os.environ["RES_OPTIONS"] == "timeout:2 attempts:1"


def test_resolver_options_of_the_operator_stay(main: Run, agent_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RES_OPTIONS", "timeout:5")
    assert main("--selftest=config", "--config", agent_config).status == OK
    assert os.environ["RES_OPTIONS"] == "timeout:5"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("mode", ["--selftest=proxmox", "--selftest=hub"])
def test_no_file_is_written(
    environment: dict[str, str], write_config: Callable[..., Path], hub: lab.SimulatedHub, tmp_path: Path, mode: str
) -> None:
    program = tmp_path / MODULE.name
    shutil.copy(MODULE, program)
    config = write_config(proxmox={"timeout_seconds": 9})
    env = environment | {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    env["SSLKEYLOGFILE"] = str(tmp_path / "keys")  # to which the ssl module would write what decrypts each connection
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        command: list[str | Path] = [sys.executable, "-c", WRITE_OR_DIE, program, mode, "--config", config, "--log-level=debug"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
    finally:
        tmp_path.chmod(0o755)
    assert (done.returncode, contents(tmp_path)) == (OK, before), done.stderr
    assert json.loads(done.stdout)


def test_secret_is_not_shown_when_the_other_server_sends_it(
    run: Run, agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> None:
    node.script("/nodes/pve1/status", lab.Forever(lab.Reply(500, f"Bad key {hub.api_key}")))
    outcome = run("--selftest=hub", "--config", agent_config)
    assert (outcome.status, outcome.out) == (FAILED, "")
    assert "Bad key ***" in outcome.err
    assert hub.api_key not in outcome.err


def test_secrets_are_not_shown_when_they_come_back(run: Run, agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
    hub.script("", lab.Forever(lab.Reply(500, f"Bad key {hub.api_key}")))
    outcome = run("--selftest=hub", "--log-level=debug", "--config", agent_config)
    assert outcome.status == FAILED
    assert "Bad key ***" in outcome.document["error"]
    assert hub.api_key not in outcome.out + outcome.err
    assert node.token_secret not in outcome.out + outcome.err


class Broken:
    """A collector with a fault of its own, which quotes a secret."""

    def collect(self) -> felhom_agent.HostReport:
        raise ZeroDivisionError("hunter2hunter2")


def test_fault_of_the_agent_in_a_selftest_shows_no_secret(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = felhom_agent.LineFormatter(journal=False)
    formatter.secrets = felhom_agent.secret_forms("hunter2hunter2")
    handler = felhom_agent.StderrHandler()
    handler.setFormatter(formatter)
    monkeypatch.setattr(felhom_agent.LOG, "handlers", [handler])
    hub = felhom_agent.HubClient(felhom_agent.HubConfig(url="http://127.0.0.1:1", api_key="a-key"), logger=felhom_agent.LOG)
    assert felhom_agent.selftest(cast(felhom_agent.Collector, Broken()), hub) == 1
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "ZeroDivisionError: ***" in shown.err
    assert "hunter2" not in shown.err
