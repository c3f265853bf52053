"""What the agent asks systemd, what it tells systemd, and the lines that it writes for the journal."""

from __future__ import annotations

import errno
import io
import logging
import os
import pty
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import felhom_agent as agent
from support import LOG, said

Fake = Callable[..., Path]

# --- the prober ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a `systemctl` with these lines on PATH; the folder of the test, where it may leave something, is $0's own."""

    def put(*lines: str, mode: int = 0o755, shebang: str = "#!/bin/sh") -> Path:
        path = tmp_path / "systemctl"
        path.write_text("\n".join((shebang, f"cd {tmp_path}", *lines, "")), "utf-8")
        path.chmod(mode)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return put


@pytest.fixture
def probe(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Ask once, and see that no child is left."""

    def ask() -> str:
        with caplog.at_level(logging.DEBUG, LOG.name):
            word = agent.SystemctlProber("cloudflared.service", logger=LOG).probe()
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return word

    return ask


@pytest.mark.parametrize("word", ["active", "inactive", "failed", "activating", "deactivating", "reloading", "maintenance", "not-found"])
@pytest.mark.parametrize("status", [0, 3, 4])
def test_the_word_counts_whatever_the_exit_status(word: str, status: int, fake_systemctl: Fake, probe: Callable[[], str]) -> None:
    fake_systemctl(f"echo {word}", f"exit {status}")
    assert probe() == word


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="says nothing"),
        pytest.param(["echo"], id="blank"),
        pytest.param(["echo ACTIVE"], id="upper case"),
        pytest.param(["echo active; echo inactive"], id="two words"),
        pytest.param(["echo 'Failed to connect to bus: Permission denied'"], id="an error"),
        pytest.param(["printf '\\033]0;title\\007\\033[31mactive'"], id="terminal escapes"),
        pytest.param(["printf 'active\\0'"], id="a zero byte"),
        pytest.param(["printf '\\303\\244ctive'"], id="not ASCII"),
        pytest.param(["printf aaaaaaaaaaaaaaaaaaaaa"], id="too long"),
        pytest.param(["yes active"], id="flood of words"),
        pytest.param(["cat /dev/zero"], id="flood of zeros"),
        pytest.param(["exec 1>&-", "kill -SEGV $$"], id="killed by a signal"),
        pytest.param(["kill -TERM -$$"], id="ends its group"),
    ],
)
def test_what_is_no_word_is_unknown(
    lines: list[str], fake_systemctl: Fake, probe: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    fake_systemctl(*lines)
    began = time.monotonic()
    assert probe() == "unknown"
    assert time.monotonic() - began < 2  # a flood is not read to its end
    ((level, text),) = said(caplog)
    assert level == "WARNING"
    assert text == "systemctl is-active -- cloudflared.service: says nothing that can be used; cloudflared.status is unknown"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda path: path.unlink(), errno.ENOENT, id="none"),
        pytest.param(lambda path: path.chmod(0o644), errno.EACCES, id="not executable"),
        pytest.param(lambda path: path.write_bytes(b"\x7fELF"), errno.ENOEXEC, id="no program"),
        pytest.param(lambda path: path.write_bytes(b"#!/nonexistent\n"), errno.ENOENT, id="no interpreter"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), errno.EACCES, id="a directory"),
    ],
)
def test_no_systemctl_is_unknown(
    spoil: Callable[[Path], object],
    why: int,
    fake_systemctl: Fake,
    probe: Callable[[], str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    spoil(fake_systemctl("echo active"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe() == "unknown"
    assert [text for _, text in said(caplog)] == [
        f"systemctl is-active -- cloudflared.service: {os.strerror(why)}; cloudflared.status is unknown"
    ]


def test_no_process_can_be_started_is_unknown(fake_systemctl: Fake, probe: Callable[[], str]) -> None:
    fake_systemctl("echo active")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # no descriptor for the pipe: a limit on processes does not bind root
    try:
        assert probe() == "unknown"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert probe() == "active"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["sleep 60 & echo $! >>pids", "wait"], id="hangs, with a child"),
        pytest.param(["sleep 60 & echo $! >>pids", "echo active"], id="has ended, a child keeps standard output open"),
        pytest.param(["trap '' TERM INT HUP", "echo active", "while :; do sleep 1; done"], id="takes no signal"),
        pytest.param(["while :; do printf a; sleep 0.1; done"], id="drips"),
        pytest.param(["exec >&-", "sleep 60"], id="has closed standard output and hangs"),
    ],
)
def test_what_hangs_is_ended_with_all_that_it_started(
    lines: list[str], fake_systemctl: Fake, probe: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "PROBE_SECONDS", 1)
    (tmp_path / "pids").touch()
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    fake_systemctl("exec 9>alive", *lines)  # all that it starts inherits this
    began = time.monotonic()
    assert probe() == "unknown"
    assert time.monotonic() - began < 3
    assert select.select([reader], [], [], 3)[0]  # it ends when the last writer is gone
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_prober_says_when_it_begins_and_when_it_ends(fake_systemctl: Fake, caplog: pytest.LogCaptureFixture) -> None:
    prober = agent.SystemctlProber("cloudflared.service", logger=LOG)
    with caplog.at_level(logging.INFO, LOG.name):
        for word in ("", "", "active", "active"):
            fake_systemctl(f"echo {word}")
            prober.probe()
    assert [level for level, _ in said(caplog)] == ["WARNING", "INFO"]


def test_child_gets_the_unit_as_such_and_nothing_of_ours(fake_systemctl: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_systemctl("printf '%s\\n' \"$@\" >arguments", "cp /proc/$$/environ environ", "ls -l /proc/$$/fd >fds", "cat >stdin", "echo active")
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "FELHOM_AGENT_HUB_API_KEY", "LD_PRELOAD", "LANG", "LC_MESSAGES", "HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SECRET", "in the environment")
    inherited = os.open(tmp_path / "inherited", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(inherited, True)
    kept, (reader, writer) = os.dup(0), os.pipe()
    os.write(writer, b"for us alone")
    os.close(writer)
    os.dup2(reader, 0)
    try:
        assert agent.SystemctlProber("a@b-c.service", logger=LOG).probe() == "active"
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, reader, inherited):
            os.close(descriptor)
    assert (tmp_path / "arguments").read_text().splitlines() == ["is-active", "--", "a@b-c.service"]
    environment = dict(entry.split("=", 1) for entry in (tmp_path / "environ").read_text().split("\0")[:-1])
    assert environment == {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    assert (tmp_path / "stdin").read_bytes() == b""
    assert "inherited" not in (tmp_path / "fds").read_text()


# --- what systemd is told -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def notify_socket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@felhom-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(3)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        yield sock


def test_systemd_is_told(notify_socket: socket.socket) -> None:
    agent.notify("STOPPING=1")
    assert notify_socket.recv(4096) == b"STOPPING=1"


def test_status_is_one_line_and_without_a_watchdog_there_is_none(notify_socket: socket.socket) -> None:
    agent.notify_wait("hub answered 503\nREADY=0", 900)
    assert notify_socket.recv(4096) == b"READY=1\nSTATUS=hub answered 503\\x0aREADY=0"


def test_watchdog_waits_for_as_long_as_the_agent_does(notify_socket: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    agent.notify_wait("fine", 900.25)
    assert notify_socket.recv(4096).splitlines() == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG_USEC=901000000", b"STATUS=fine"]


def test_full_socket_is_not_waited_for(notify_socket: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sender.sendto(b"x" * 4096, notify_socket.getsockname())
    began = time.monotonic()
    agent.notify("READY=1")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@felhom-agent-nobody", "/" + "x" * 200, "/dev/null", "vsock:2:1", "relative"])
def test_unreachable_socket_ends_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    agent.notify_wait("fine", 1)


def test_without_a_socket_nothing_is_sent(notify_socket: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET")
    agent.notify_wait("fine", 1)
    assert select.select([notify_socket], [], [], 0)[0] == []


# --- lines --------------------------------------------------------------------------------------------------------------------------


def record(level: int, text: str, error: Exception | None = None) -> logging.LogRecord:
    return logging.LogRecord("tests", level, __file__, 1, "%s", (text,), (type(error), error, None) if error else None)


@pytest.mark.parametrize(("level", "priority"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 3)])
def test_journal_gets_the_priority_and_no_time(level: str, priority: int) -> None:
    line = agent.LineFormatter(journal=True).format(record(logging.getLevelNamesMapping()[level], "it is so"))
    assert line == f"<{priority}>it is so\n"


def test_others_get_time_and_level() -> None:
    line = agent.LineFormatter(journal=False).format(record(logging.WARNING, "it is so"))
    assert line[:2] == "20"
    assert line.endswith(" WARNING it is so\n")


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "terminal"])
def test_all_after_the_first_line_is_indented_and_has_its_priority(journal: bool) -> None:
    formatter = agent.LineFormatter(journal=journal)
    formatter.secrets = ("s3cret",)
    error = ValueError("first\n<0>forged\rforged\x1b[31m\u2028forged s3cret")
    _, *more = formatter.format(record(logging.WARNING, "a bug", error)).splitlines()
    prefix = "<4>    " if journal else "    "
    assert more == [f"{prefix}ValueError: first", f"{prefix}<0>forged\\x0dforged\\x1b[31m\\x2028forged ***"]


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "terminal"])
def test_message_is_one_line_of_bounded_length(journal: bool) -> None:
    line = agent.LineFormatter(journal=journal).format(record(logging.INFO, "a\n<0>b\r\x1b[2Jc\u2028d\u202e" + "x" * 10000))
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert "a\\x0a<0>b\\x0d\\x1b[2Jc\\x2028d\\x202e" in line
    assert len(line) < 2100


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Make a descriptor standard error, as a shell does, until the test ends."""
    kept = os.dup(2)

    def make(descriptor: int) -> None:
        os.dup2(descriptor, 2)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.FileIO(2, "w", closefd=False)))

    yield make
    os.dup2(kept, 2)
    os.close(kept)


def handler() -> agent.StderrHandler:
    made = agent.StderrHandler()
    made.setFormatter(agent.LineFormatter(journal=True))
    return made


def test_only_the_stream_that_is_standard_error_is_the_journal(stderr: Callable[[int], None], tmp_path: Path) -> None:
    with (tmp_path / "stream").open("wb") as stream, (tmp_path / "other").open("wb") as other:
        status = os.fstat(stream.fileno())
        name = f"{status.st_dev}:{status.st_ino}"
        stderr(other.fileno())
        assert not agent.is_journal(name)
        stderr(stream.fileno())
        assert agent.is_journal(name)
        assert not agent.is_journal("")
        os.close(2)
        assert not agent.is_journal(name)


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "terminal"])
def test_lines_arrive(kind: str, stderr: Callable[[int], None], tmp_path: Path) -> None:
    if kind == "file":
        writer = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
        reader = os.open(tmp_path / "log", os.O_RDONLY)
    elif kind == "socket":  # the journal's
        ours, theirs = socket.socketpair()
        writer, reader = ours.detach(), theirs.detach()
    else:
        reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    stderr(writer)
    handler().emit(record(logging.INFO, "Grüße \udcff"))
    assert os.read(reader, 4096).replace(b"\r", b"") == "<6>Grüße \\xdcff\n".encode()
    os.close(writer)
    os.close(reader)


def test_log_that_nobody_reads_is_waited_for_once(stderr: Callable[[int], None]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    stderr(writer)
    full = handler()
    began = time.monotonic()
    for _ in range(100):
        full.emit(record(logging.INFO, "lost"))
    assert time.monotonic() - began < 2
    while select.select([reader], [], [], 0)[0]:
        os.read(reader, 65536)
    full.emit(record(logging.INFO, "there again"))
    assert os.read(reader, 4096) == b"<6>there again\n"
    assert full.patience_seconds == agent.StderrHandler.patience_seconds
    os.close(reader)
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    full.emit(record(logging.INFO, "nobody is there"))
    os.close(writer)


@pytest.mark.parametrize("where", ["full", "closed"])
def test_log_that_cannot_be_written_ends_nothing(where: str, stderr: Callable[[int], None]) -> None:
    with open("/dev/full", "wb") as full:
        stderr(full.fileno())
    if where == "closed":
        os.close(2)
    handler().emit(record(logging.INFO, "lost"))


def test_no_standard_error_at_all_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    handler().emit(record(logging.INFO, "lost"))
