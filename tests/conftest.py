"""Fixtures: certificates, a simulated node and hub, and a configuration that reaches both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import felhom_agent as agent
import lab

# Whoever has pasted the lab's lines into this terminal tests the agent all the same, and not with
# that configuration.
for name in [name for name in os.environ if name.startswith("FELHOM_AGENT_")]:
    if name != "FELHOM_AGENT_PYZ":
        del os.environ[name]
for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "JOURNAL_STREAM"):
    os.environ.pop(name, None)
# No test trusts the machine's own CAs, and a client takes 50 ms to read them.
os.environ["SSL_CERT_FILE"] = os.environ["SSL_CERT_DIR"] = os.devnull

# The short profile finds the same every time; HYPOTHESIS_PROFILE=long looks further on each run.
usual = settings(
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
)
settings.register_profile("short", usual, max_examples=60, derandomize=True)
settings.register_profile("long", usual, max_examples=3000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture(autouse=True)
def forget_secrets() -> None:
    """What another test has registered is not masked in this one."""
    agent.SECRETS.clear()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> lab.Certificates:
    """As most installations have them: a CA from before March 2026."""
    return lab.make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def hub_certificates(tmp_path_factory: pytest.TempPathFactory) -> lab.Certificates:
    """The hub has a CA of its own, and one that passes the strict check."""
    return lab.make_certificates(tmp_path_factory.mktemp("hub-certificates"), generation="current")


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
    """Without TLS, where it makes no difference: that saves most of a test's time."""
    with lab.SimulatedNode(None) as running:
        yield running


@pytest.fixture
def plain_hub() -> Iterator[lab.SimulatedHub]:
    with lab.SimulatedHub(None) as running:
        yield running


@pytest.fixture
def write_config(
    tmp_path: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub
) -> Callable[..., Path]:
    """Write agent.json for node and hub; `write_config(hub={"poll_seconds": 60})` changes it."""

    def write(**changes: Mapping[str, object]) -> Path:
        sections = lab.configuration(node, hub)
        for section, keys in changes.items():
            sections[section] = {**sections.get(section, {}), **keys}
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
