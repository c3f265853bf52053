"""build.sh, the archive that it builds, and the unit; tests/systemd runs both in a Debian."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path, PurePath

import pytest

import felhom_agent as agent

ROOT = Path(__file__).parent.parent
# Not that of the virtual environment, whose packages could stand in for a missing one.
PYTHON = os.path.realpath(sys.executable)
PACKED = ("agent.example.json", "felhom-agent.service", "felhom_agent.py")
# What the archive does with these variables changes how it unpacks, but not what it runs.
HARMLESS = {
    *("SHIV_FORCE_EXTRACT", "SHIV_COMPILE_PYC", "SHIV_COMPILE_WORKERS", "SHIV_EXTEND_PYTHONPATH")
}


UNIT = ROOT / "felhom-agent.service"
LINES = UNIT.read_text("utf-8").replace("\\\n", "").splitlines()
SETTINGS = [line.partition("=")[::2] for line in LINES if line and line[0] not in "#["]


@pytest.fixture(scope="session")
def pyz() -> Path:
    """The archive: the one that `./build.sh test` has just built, or a new one."""
    if built := os.environ.get("FELHOM_AGENT_PYZ"):
        return Path(built)
    build(ROOT)
    return ROOT / "dist" / "felhom-agent.pyz"


def build(folder: Path, umask: int = -1, **environment: str) -> None:
    subprocess.run(
        ["sh", folder / "build.sh"],
        env={**os.environ, "PYTHON": PYTHON, **environment},
        cwd="/",
        umask=umask,
        stdout=subprocess.DEVNULL,
        timeout=50,
        check=True,
    )


def test_build_is_the_same_byte_for_byte_in_another_folder(pyz: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a path with spaces"
    (folder / "tests").mkdir(parents=True)
    for name in ("build.sh", "tests/requirements-build.txt", *PACKED):
        shutil.copy(ROOT / name, folder / name)
        (folder / name).chmod(0o600)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    environment = {"TZ": "Pacific/Auckland", "SOURCE_DATE_EPOCH": "1700000000", "LC_ALL": "C"}
    build(folder, umask=0o077, CDPATH="/", PYTHONPATH="/nowhere", **environment)
    assert (folder / "dist" / "felhom-agent.pyz").read_bytes() == pyz.read_bytes()


def test_archive_holds_three_files_and_the_start_code_of_shiv(pyz: Path) -> None:
    """For the isolated Python of a node."""
    assert pyz.stat().st_mode & 0o777 == 0o755
    assert pyz.read_bytes().partition(b"\n")[0] == b"#!/usr/bin/python3 -I"
    with zipfile.ZipFile(pyz) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
        modes = {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
    start_code = [name for name in content if name.startswith("_bootstrap/")]
    for name in PACKED:
        assert content.pop(f"site-packages/{name}") == (ROOT / name).read_bytes()
    assert list(content) == [*start_code, "environment.json", "__main__.py"]
    # Not in the order of the file system.
    assert start_code == sorted(start_code)
    # 0o600: what zipfile gives to a file that it writes from memory.
    assert modes <= {0o644, 0o600}
    assert "/" not in content["environment.json"].decode()


def test_unit_unsets_each_variable_that_makes_the_archive_run_other_code(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        variables = set(re.findall("SHIV_[A-Z_]+", str(archive.read("_bootstrap/environment.py"))))
    unset = dict(SETTINGS)["UnsetEnvironment"].split()
    assert variables - HARMLESS - set(unset) == {"SHIV_ROOT"}


def test_archive_prints_the_files_that_it_carries_and_writes_nothing_beside_itself(
    pyz: Path, tmp_path: Path
) -> None:
    """Run as a service runs it: with a PATH, no HOME, and a folder to unpack to."""
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(tmp_path / "shiv")}
    (tmp_path / "bin").mkdir()
    copy = Path(shutil.copy(pyz, tmp_path / "bin"))
    for argument, out in (
        ("--print=unit", UNIT.read_text("utf-8")),
        ("--print=config", (ROOT / "agent.example.json").read_text("utf-8")),
        ("--version", f"felhom-agent {agent.__version__}\n"),
    ):
        command = [PYTHON, "-I", str(copy), argument]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, out, "")
    assert list(copy.parent.iterdir()) == [copy]


def test_demo_shows_report_and_alarm_and_leaves_no_process() -> None:
    with subprocess.Popen(
        ["sh", ROOT / "build.sh", "demo", "--keep"],
        env={**os.environ, "PYTHON": PYTHON},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as demo:
        try:
            assert demo.stdout
            shown = ""
            # The last that the agent of the third host logs.
            while "interval is now 60 s" not in shown:
                line = demo.stdout.readline()
                assert line, shown
                shown += line
            assert '"envelope"' in shown
            assert "ALARM: host pve1 is overdue" in shown
            assert "WARNING" not in shown
            page = re.search("the hub's page: (http://127.0.0.1:[0-9]+/)", shown)
            assert page
            with urllib.request.urlopen(page[1], timeout=10) as response:
                assert "Hosts: 1 overdue, 1 late, 1 on time" in response.read().decode()
            demo.terminate()
            assert demo.wait(10) == 130
            with pytest.raises(ProcessLookupError):
                os.killpg(demo.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(demo.pid, signal.SIGKILL)


def test_nothing_runs_outside_the_sandbox_and_no_setting_is_given_twice() -> None:
    commands = [(name, value) for name, value in SETTINGS if name.startswith("Exec")]
    assert commands == [("ExecStart", "/usr/local/bin/felhom-agent.pyz")]
    counts = Counter(name for name, _ in SETTINGS)
    # Each line of these adds to the one before.
    lists = {"LoadCredential", "SystemCallFilter"}
    assert {name for name, count in counts.items() if count > 1} == lists


def test_service_gets_the_ca_of_the_example_under_its_own_name() -> None:
    example = json.loads((ROOT / "agent.example.json").read_text("utf-8"))
    ca_file = example["proxmox"]["ca_file"]
    assert ("LoadCredential", f"{PurePath(ca_file).name}:{ca_file}") in SETTINGS


def test_watchdog_outlasts_the_longest_wait() -> None:
    """After Retry-After of an hour the agent waits two, and one message a cycle is all it sends."""
    assert ("WatchdogSec", "3h") in SETTINGS
    assert max(agent.retry_delay(3600, 9, 3600) for _ in range(100)) <= 2 * 3600
