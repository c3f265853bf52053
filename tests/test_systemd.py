"""What the agent asks systemd, and what it tells it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

import felhom_agent as agent
from support import install_systemctl

UNIT: Final = "cloudflared.service"
Install = Callable[[str], None]


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a `systemctl` with this script on PATH; it runs in the folder of the test."""

    def install(script: str) -> None:
        monkeypatch.setenv("PATH", install_systemctl(tmp_path, f"cd {tmp_path}\n{script}"))

    return install


# Twenty letters are the longest.
@pytest.mark.parametrize(
    "state", ["active", "inactive", "failed", "deactivating", "not-found", "a" * 20]
)
def test_state_counts_whatever_the_exit_status(state: str, systemctl: Install) -> None:
    for status in (0, 3, 4):
        systemctl(f"echo {state}; exit {status}")
        assert agent.SystemctlProber(UNIT).probe() == state


@pytest.mark.parametrize(
    "script",
    [
        *(":", "echo", "echo ACTIVE", "echo active; echo inactive", f"echo {'a' * 21}", "echo a"),
        # Terminal escapes, a zero byte, what is not ASCII, what is not UTF-8
        *(r"printf '\033[31mactive'", r"printf 'active\0'", r"printf '\303\244ctive'"),
        *(r"printf '\377'", "kill -SEGV $$"),
    ],
)
def test_anything_else_is_not_a_state(script: str, systemctl: Install) -> None:
    systemctl(script)
    with pytest.raises(agent.AgentError, match=f"systemctl is-active .*{re.escape(UNIT)}: ."):
        agent.SystemctlProber(UNIT).probe()


def test_error_says_in_one_line_what_systemctl_said(systemctl: Install) -> None:
    reason = "Failed to connect to bus: No such file or directory"
    systemctl(f"printf '{reason}\\n\\033[0mmore\\n' >&2; exit 1")
    with pytest.raises(agent.AgentError) as caught:
        agent.SystemctlProber(UNIT).probe()
    assert str(caught.value).endswith(f": {reason}")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("echo active; exec sleep 600", id="does not end"),
        pytest.param("trap '' TERM INT HUP; exec sleep 600", id="ignores signals"),
        pytest.param("exec >&- 2>&-; exec sleep 600", id="closes its output"),
        pytest.param("sleep 5 & exec sleep 600", id="has a child"),
    ],
)
def test_systemctl_that_hangs_is_ended(
    script: str, systemctl: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "SYSTEMCTL_SECONDS", 0.2)
    systemctl(script)
    with pytest.raises(agent.AgentError, match="timed out"):
        agent.SystemctlProber(UNIT).probe()
    # No child is left, running or dead.
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_child_gets_the_unit_as_such_and_nothing_of_ours(
    systemctl: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = "cp /proc/$$/environ environ; ls -l /proc/$$/fd >files"
    systemctl(f"printf '%s\\n' \"$@\" >arguments; {files}; echo active")
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "FELHOM_AGENT_HUB_API_KEY", "LANG", "HOME"):
        monkeypatch.setenv(name, "ours")
    with (tmp_path / "our-file").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        standard_input = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            assert agent.SystemctlProber("--help").probe() == "active"
        finally:
            os.dup2(standard_input, 0)
            os.close(standard_input)
    assert (tmp_path / "arguments").read_text("utf-8").split() == ["is-active", "--", "--help"]
    environment = (tmp_path / "environ").read_text("utf-8").rstrip("\0").split("\0")
    assert sorted(environment) == ["LC_ALL=C", f"PATH={os.environ['PATH']}"]
    assert "our-file" not in (tmp_path / "files").read_text("utf-8")


@pytest.fixture(params=["path", "abstract"])
def listener(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The socket of systemd."""
    address = str(tmp_path / "notify")
    if request.param == "abstract":
        address = f"@felhom-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield sock


def test_systemd_gets_a_sign_of_life_with_each_status(listener: socket.socket) -> None:
    agent.notify_status("all is well")
    assert listener.recv(4096) == b"READY=1\nWATCHDOG=1\nSTATUS=all is well"
    agent.notify("STOPPING=1")
    assert listener.recv(4096) == b"STOPPING=1"


def test_full_socket_is_not_waited_for(listener: socket.socket) -> None:
    # More than systemd's queue takes; pytest-timeout ends what waits.
    for _ in range(5000):
        agent.notify("x" * 200)
    listener.setblocking(False)
    received = 0
    with suppress(BlockingIOError):
        while listener.recv(4096):
            received += 1
    assert 0 < received < 5000


@pytest.mark.parametrize(
    "address",
    ["/nonexistent/notify", "@felhom-agent-nobody", "/" + "x" * 200, "/dev/null", "vsock:2:1", ""],
)
def test_socket_that_is_not_there_ends_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    agent.notify_status("fine")
