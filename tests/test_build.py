"""build.sh, and the file that it builds, run as an administrator or a service runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import felhom_agent
import lab

ROOT = Path(__file__).parent.parent
PYTHON = os.path.realpath(sys.executable)  # not the virtual environment's, whose packages could stand in for something missing


@pytest.fixture(scope="session")
def pyz() -> Path:
    """The built file: the one that `build.sh test` has just made, else a new one."""
    if built := os.environ.get("FELHOM_AGENT_PYZ"):
        return Path(built)
    subprocess.run(["sh", ROOT / "build.sh"], env={**os.environ, "PYTHON": PYTHON}, stdout=subprocess.PIPE, check=True)
    return ROOT / "dist" / "felhom-agent.pyz"


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a service has: a PATH, no HOME, and here a place for shiv to unpack to."""
    return {"PATH": os.environ["PATH"], "SHIV_ROOT": str(tmp_path_factory.mktemp("shiv"))}


@pytest.fixture
def environment(bare_environment: dict[str, str], agent_config: Path) -> dict[str, str]:
    """The same with a configuration that names the simulated node and hub."""
    return {**bare_environment, "FELHOM_AGENT_CONFIG": str(agent_config)}


def run(pyz: Path, *arguments: str, environment: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-I", str(pyz), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)


def build_elsewhere(folder: Path, **environment: str) -> bytes:
    """Build in a copy of the checkout, with file modes that nobody but its owner may read, and return the file."""
    (folder / "tests").mkdir(parents=True)
    for name in ("build.sh", "felhom_agent.py", "tests/requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
        (folder / name).chmod(0o600)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    everything = {**os.environ, "PYTHON": PYTHON, **environment}
    subprocess.run(["sh", folder / "build.sh"], env=everything, cwd="/", umask=0o077, stdout=subprocess.PIPE, check=True)
    return (folder / "dist" / "felhom-agent.pyz").read_bytes()


def tree(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


# --- the archive ----------------------------------------------------------------------------------------------------------------------


def test_every_build_is_the_same_byte_for_byte(pyz: Path, tmp_path: Path) -> None:
    other = {"TZ": "Pacific/Auckland", "SOURCE_DATE_EPOCH": "1700000000", "CDPATH": "/", "PYTHONPATH": "/nowhere", "LC_ALL": "C"}
    assert build_elsewhere(tmp_path / "a path with spaces", **other) == pyz.read_bytes()


def test_archive_holds_the_module_and_the_start_code_of_shiv_and_nothing_else(pyz: Path) -> None:
    found = importlib.util.find_spec("shiv.bootstrap")
    assert found is not None
    assert found.origin is not None
    expected = {f"_bootstrap/{path.name}": path.read_bytes() for path in Path(found.origin).parent.glob("*.py")}
    expected["site-packages/felhom_agent.py"] = (ROOT / "felhom_agent.py").read_bytes()
    with zipfile.ZipFile(pyz) as archive:
        names = [name for name in archive.namelist() if name.startswith("_bootstrap/")]
        content = {name: archive.read(name) for name in archive.namelist()}
    assert names == sorted(names)  # not in the order of the file system
    settings = json.loads(content.pop("environment.json"))
    assert content.pop("__main__.py").splitlines()[1:] == [b"import _bootstrap", b"_bootstrap.bootstrap()"]
    assert content == expected
    assert settings["entry_point"] == "felhom_agent:main"
    assert settings["built_at"].startswith("1980-01-01 ")  # no date of today
    assert not [value for value in settings.values() if "/" in str(value)]  # no path of the machine that built it


def test_packed_files_are_readable_for_a_service_and_writable_for_their_owner_only(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist() if "/" in entry.filename}
    assert set(modes.values()) == {0o644}, modes


def test_file_is_executable_with_the_isolated_python_of_a_node(pyz: Path) -> None:
    assert pyz.stat().st_mode & 0o777 == 0o755
    assert pyz.read_bytes().partition(b"\n")[0] == b"#!/usr/bin/python3 -I"


# --- the built file, run --------------------------------------------------------------------------------------------------------------


def test_version_is_told_without_home_and_nothing_is_written_beside_the_file(
    pyz: Path, bare_environment: dict[str, str], tmp_path: Path
) -> None:
    installed = tmp_path / "read-only"
    installed.mkdir()
    copy = Path(shutil.copy(pyz, installed))
    installed.chmod(0o555)
    done = run(copy, "--version", environment=bare_environment, cwd=installed)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"felhom-agent {felhom_agent.__version__}\n", "")
    assert list(installed.iterdir()) == [copy]


def test_second_start_writes_nothing_where_the_first_unpacked(pyz: Path, bare_environment: dict[str, str], tmp_path: Path) -> None:
    environment = {**bare_environment, "SHIV_ROOT": str(tmp_path)}
    run(pyz, "--version", environment=environment)
    unpacked = tree(tmp_path)
    assert run(pyz, "--version", environment=environment).returncode == 0
    assert tree(tmp_path) == unpacked


def test_exit_status_of_main_is_the_exit_status(pyz: Path, bare_environment: dict[str, str], tmp_path: Path) -> None:
    done = run(pyz, "--selftest=config", "--config", str(tmp_path / "missing.json"), environment=bare_environment)
    assert (done.returncode, done.stdout) == (2, "")


def test_selftest_proxmox_prints_the_report_and_sends_none(pyz: Path, environment: dict[str, str], hub: lab.SimulatedHub) -> None:
    done = run(pyz, "--selftest=proxmox", environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["guests"]
    assert hub.requests == []


def test_selftest_hub_sends_the_one_report_that_it_prints(pyz: Path, environment: dict[str, str], hub: lab.SimulatedHub) -> None:
    done = run(pyz, "--selftest=hub", environment=environment)
    assert done.returncode == 0, done.stderr
    assert [json.loads(done.stdout)["report"]] == hub.reports


def test_daemon_reports_at_once_and_sigterm_ends_it_with_0(pyz: Path, environment: dict[str, str], hub: lab.SimulatedHub) -> None:
    with subprocess.Popen([PYTHON, "-I", pyz], env=environment, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            hub.wait_for_reports(1, 20)
            daemon.send_signal(signal.SIGTERM)
            _, log = daemon.communicate(timeout=2)
        finally:
            daemon.kill()
    assert daemon.returncode == 0, log
    assert len(hub.reports) == 1


# --- build.sh -------------------------------------------------------------------------------------------------------------------------


def test_unknown_call_shows_the_usage_and_ends_with_2() -> None:
    done = subprocess.run(["sh", ROOT / "build.sh", "frobnicate"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ./build.sh ")


def test_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3.10 14 /usr\n", "utf-8")
    old.chmod(0o755)
    done = subprocess.run(["sh", ROOT / "build.sh"], env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{old} is Python 3.10, this needs 3.11 or newer" in done.stderr
