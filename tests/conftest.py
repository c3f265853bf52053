"""Fixtures: certificates, a simulated node and hub, and a configuration that reaches both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import felhom_agent as agent
import lab

# Nothing in this terminal configures the agent, as do the lines that the lab prints.
for name in list(os.environ):
    if name.startswith("FELHOM_AGENT_") and name != "FELHOM_AGENT_PYZ":
        del os.environ[name]
for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "JOURNAL_STREAM"):
    os.environ.pop(name, None)
# No test trusts the machine's own CAs, and a client takes 50 ms to read them.
os.environ["SSL_CERT_FILE"] = os.environ["SSL_CERT_DIR"] = os.devnull

# Hypothesis finds the same every time.
checks = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
settings.register_profile(
    "usual", max_examples=60, derandomize=True, deadline=None, suppress_health_check=checks
)
settings.load_profile("usual")


@pytest.fixture(autouse=True)
def forget_secrets() -> None:
    """What another test has registered is not masked in this one."""
    agent.SECRETS.clear()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> lab.Certificates:
    return lab.make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def hub_certificates(tmp_path_factory: pytest.TempPathFactory) -> lab.Certificates:
    """The hub has a CA of its own."""
    return lab.make_certificates(tmp_path_factory.mktemp("hub-certificates"))


@pytest.fixture
def node(certificates: lab.Certificates) -> Iterator[lab.SimulatedNode]:
    with lab.SimulatedNode(certificates) as running:
        yield running


@pytest.fixture
def hub(hub_certificates: lab.Certificates) -> Iterator[lab.SimulatedHub]:
    with lab.SimulatedHub(hub_certificates) as running:
        yield running


@pytest.fixture
def plain_node() -> Iterator[lab.SimulatedNode]:
    """Without TLS, which saves most of a test's time."""
    with lab.SimulatedNode(None) as running:
        yield running


@pytest.fixture
def plain_hub() -> Iterator[lab.SimulatedHub]:
    with lab.SimulatedHub(None) as running:
        yield running


@pytest.fixture
def write_config(tmp_path: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> Any:
    """Write agent.json for node and hub; `write_config(hub={"poll_seconds": 60})` changes it."""

    def write(**changes: dict[str, object]) -> Path:
        sections: dict[str, Any] = lab.configuration(node, hub)
        for section, keys in changes.items():
            sections[section] = sections.get(section, {}) | keys
        path = tmp_path / "agent.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(sections), "utf-8")
        return path

    return write


@pytest.fixture
def agent_config(write_config: Callable[..., Path]) -> Path:
    """A configuration file that works."""
    return write_config()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, from the debug level on."""
    caplog.set_level("DEBUG")
    return caplog
