"""What several test files use: builders of sample objects, and the agent as a process."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import felhom_agent as agent
import lab

LOG: Final = logging.getLogger("tests")
MODULE: Final = Path(agent.__file__)
# All that proxmox.extras may name, as documented.
EXTRAS: Final = ("qemu", "storage", "backups", "details", "tasks")
# A client's time for a server that never answers; the second if others do answer in that test.
SOON: Final[Any] = 0.2
SOON_IF_BUSY: Final = 1
# On a busy machine, too, what does not hang has ended by then.
HANG_SECONDS: Final = 5.0
# The command line as it is, but the wait says so, and ends with a line on standard input.
STEPPED: Final = """
import functools, sys
import felhom_agent as agent
wait = lambda seconds: print("waits", flush=True) or sys.stdin.readline()
agent.Loop = functools.partial(agent.Loop, wait=wait)
sys.exit(agent.main(sys.argv[1:]))
"""


def make_report(**changes: Any) -> agent.HostReport:
    """A report of a node about which nothing is known."""
    report = agent.HostReport(
        host_id="pve1",
        agent_version=agent.__version__,
        reported_at="2026-06-08T14:20:09Z",
        host=agent.build_host("pve1", {}, {}),
        guests=(),
        cloudflared=agent.Cloudflared(status="active"),
    )
    return replace(report, **changes)


def find_problems(report: agent.HostReport) -> list[str]:
    """What a hub would object to in the report as it is sent."""
    text = report.to_json()
    assert text.isascii()
    document = json.loads(text, parse_constant=lab.refuse_constant)
    errors = lab.report_schema().iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def proxmox_config(node: lab.SimulatedNode, /, **changes: Any) -> agent.ProxmoxConfig:
    sections: dict[str, Any] = lab.configuration(node, lab.SimulatedHub(None))
    config = agent.ProxmoxConfig(**sections["proxmox"] | changes)
    agent.SECRETS.add(config.token_secret)
    return config


def make_hub_client(hub: lab.SimulatedHub, /, **changes: Any) -> agent.HubClient:
    sections: dict[str, Any] = lab.configuration(lab.SimulatedNode(None), hub)
    config = agent.HubConfig(**sections["hub"] | changes)
    agent.SECRETS.add(config.api_key)
    return agent.HubClient(config, logger=LOG)


class Prober:
    """Returns the state, or raises the exception, that it was given."""

    def __init__(self, state: str | Exception = "active") -> None:
        self.state = state

    def probe(self) -> str:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


def make_collector(
    node: lab.SimulatedNode, prober: Prober | None = None, /, **changes: Any
) -> agent.Collector:
    """A collector that reads this node; `changes` are keys of proxmox in the configuration."""
    client = agent.ProxmoxClient(proxmox_config(node, **changes))
    return agent.Collector(client, prober or Prober(), host_id="pve1", logger=LOG)


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of what was logged, but for the debug line of each request."""
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    return [line for line in lines if not re.search("^(GET|POST) .* ms$", line[1])]


def levels(caplog: pytest.LogCaptureFixture, pattern: str = "") -> list[str]:
    """The levels of the messages that have this pattern."""
    return [level for level, text in messages(caplog) if re.search(pattern, text)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for level, text in messages(caplog) if level == "WARNING"]


@contextlib.contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port on loopback; the first who connects gets `talk`, everybody after that nothing."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def install_systemctl(folder: Path, script: str = "echo active") -> str:
    """Write a systemctl of our own; returns the PATH on which it is found first."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    (commands / "systemctl").write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    (commands / "systemctl").chmod(0o755)
    return f"{commands}:/usr/bin:/bin"


class Outcome(NamedTuple):
    """How a call of the program ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Daemon(contextlib.AbstractContextManager["Daemon"]):
    """The agent as a process, which `with` ends; if `stepped`, `step` starts each further cycle."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        *arguments: str,
        stepped: bool = True,
        systemctl: str = "echo active",
        stderr: int | None = None,
        shell: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = folder / "log"
        self.notified: list[str] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.setblocking(False)
        variables = {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "PATH": install_systemctl(folder, systemctl),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(MODULE.parent),
            **(environment or {}),
        }
        program = ["-c", STEPPED] if stepped else [str(MODULE)]
        command = [sys.executable, *program, "--config", str(config), *arguments]
        if shell:
            command = ["/bin/sh", "-c", shell, "sh", *command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=variables,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log if stderr is None else stderr,
                text=True,
            )

    def __exit__(self, *_exc: object) -> None:
        with self.process, self._notify:
            self.process.kill()

    def await_cycle(self) -> str:
        """Return the last status that systemd got once the current cycle is over."""
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], 20)[0], "the cycle does not end"
        assert self.process.stdout.readline() == "waits\n"
        return self.receive_status()

    def receive_status(self) -> str:
        """Return the last status that systemd got since the last call, or an empty string."""
        count = len(self.notified)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.notified.append(self._notify.recv(65536).decode())
        return "".join(self.notified[count:][-1:]).partition("STATUS=")[2]

    def step(self) -> str:
        """Start the next cycle and return the status after it."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.await_cycle()
