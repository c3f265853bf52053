"""What several test files use to set the agent on the lab."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab

LOG: Final = logging.getLogger("tests")
# So long a client waits in tests; the configuration takes whole seconds, a client any.
SOON: Final = 0.4

REPORT: Final = agent.HostReport(
    host_id="pve1",
    agent_version=agent.__version__,
    reported_at="2026-06-08T14:20:09Z",
    host=agent.build_host("pve1", {}, []),
    guests=(),
    cloudflared=agent.Cloudflared(status="active"),
)


def proxmox_config(node: lab.SimulatedNode, /, **changes: Any) -> agent.ProxmoxConfig:
    keys: dict[str, Any] = {**lab.configuration(node, lab.SimulatedHub(None))["proxmox"], **changes}
    return agent.ProxmoxConfig(**keys)


def hub_config(hub: lab.SimulatedHub, **changes: Any) -> agent.HubConfig:
    keys: dict[str, Any] = {**lab.configuration(lab.SimulatedNode(None), hub)["hub"], **changes}
    return agent.HubConfig(**keys)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of what the agent logged."""
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == LOG.name]


class Prober:
    """Answers so, or raises so."""

    def __init__(self, answer: str | Exception = "active") -> None:
        self.answer = answer

    def probe(self) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def build_collector(node: lab.SimulatedNode, prober: Prober | None = None, /, **changes: Any) -> agent.Collector:
    client = agent.ProxmoxClient(proxmox_config(node, **changes))
    return agent.Collector(client, prober or Prober(), host_id="pve1", agent_version=agent.__version__, logger=LOG)


@contextlib.contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port on loopback; whoever connects first gets `talk`, and everybody after that nothing."""

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
