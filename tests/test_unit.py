"""felhom-agent.service as a file; tests/systemd runs it in a booted Debian."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path, PurePath

import pytest

import felhom_agent as agent

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "felhom-agent.service"
LINES = UNIT.read_text("utf-8").replace("\\\n", "").splitlines()
SETTINGS = [line.partition("=")[::2] for line in LINES if line and line[0] not in "#["]
# Each line of these adds to the one before.
LISTS = {"LoadCredential", "SystemCallFilter"}

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_nothing_runs_outside_the_sandbox() -> None:
    commands = {name: value for name, value in SETTINGS if name.startswith("Exec")}
    assert commands == {"ExecStart": "/usr/local/bin/felhom-agent.pyz"}


def test_no_setting_is_given_twice() -> None:
    counts = Counter(name for name, _ in SETTINGS)
    assert {name for name, count in counts.items() if count > 1} == LISTS


def test_service_gets_the_ca_of_the_example_under_its_own_name() -> None:
    example = json.loads((ROOT / "agent.example.json").read_text("utf-8"))
    ca_file = example["proxmox"]["ca_file"]
    assert ("LoadCredential", f"{PurePath(ca_file).name}:{ca_file}") in SETTINGS


def test_watchdog_outlasts_the_longest_wait() -> None:
    """After Retry-After of an hour the agent waits two, and one message a cycle is all it sends."""
    assert ("WatchdogSec", "3h") in SETTINGS
    assert max(agent.retry_delay(3600, 9, 3600) for _ in range(100)) <= 2 * 3600


@needs_systemd_analyze
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    text = UNIT.read_text("utf-8").replace("/usr/local/bin/felhom-agent.pyz", "/bin/true")
    unit.write_text(text, "utf-8")
    assert analyze("verify", "--man=no", unit).stderr == ""


@needs_systemd_analyze
def test_exposure_is_at_most_1_3() -> None:
    rating = analyze("security", "--offline=true", "--no-pager", "--threshold=13", UNIT)
    assert rating.returncode == 0, rating.stdout[-200:] + rating.stderr
