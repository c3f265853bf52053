"""build.sh, and the archive that it builds, run as an administrator or a service runs it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import felhom_agent

ROOT = Path(__file__).parent.parent
# Not that of the virtual environment, whose packages could stand in for a missing one.
PYTHON = os.path.realpath(sys.executable)
PACKED = ("agent.example.json", "felhom-agent.service", "felhom_agent.py")
# What the archive does with these variables changes how it unpacks, but not what it runs.
HARMLESS = {"SHIV_FORCE_EXTRACT", "SHIV_COMPILE_PYC", "SHIV_COMPILE_WORKERS"}
HARMLESS |= {"SHIV_EXTEND_PYTHONPATH"}


@pytest.fixture(scope="session")
def pyz() -> Path:
    """The archive: the one that `./build.sh test` has just built, or a new one."""
    if built := os.environ.get("FELHOM_AGENT_PYZ"):
        return Path(built)
    build(ROOT)
    return ROOT / "dist" / "felhom-agent.pyz"


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a service has: a PATH, no HOME, and a folder for shiv to unpack to."""
    return {"PATH": os.environ["PATH"], "SHIV_ROOT": str(tmp_path_factory.mktemp("shiv"))}


@pytest.fixture
def environment(bare_environment: dict[str, str], agent_config: Path) -> dict[str, str]:
    """The same with a configuration that names the simulated node and hub."""
    return {**bare_environment, "FELHOM_AGENT_CONFIG": str(agent_config)}


def build(folder: Path, *arguments: str, umask: int = -1, **environment: str) -> str:
    return subprocess.run(
        ["sh", folder / "build.sh", *arguments],
        env={**os.environ, "PYTHON": PYTHON, **environment},
        cwd="/",
        umask=umask,
        stdout=subprocess.PIPE,
        text=True,
        timeout=50,
        check=True,
    ).stdout


def run(
    pyz: Path, *arguments: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-I", str(pyz), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=30, check=False
    )


# --- the archive ---------------------------------------------------------------------------------


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


def test_archive_is_executable_with_the_isolated_python_of_a_node(pyz: Path) -> None:
    assert pyz.stat().st_mode & 0o777 == 0o755
    assert pyz.read_bytes().partition(b"\n")[0] == b"#!/usr/bin/python3 -I"


def test_unit_unsets_each_variable_that_makes_the_archive_run_other_code(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        variables = set(re.findall("SHIV_[A-Z_]+", str(archive.read("_bootstrap/environment.py"))))
    unit = (ROOT / "felhom-agent.service").read_text("utf-8").replace("\\\n", "")
    unset = re.findall("SHIV_[A-Z_]+", re.findall("^UnsetEnvironment=.*", unit, re.MULTILINE)[0])
    assert variables - HARMLESS - set(unset) == {"SHIV_ROOT"}


# --- the archive, run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "name"), [("unit", "felhom-agent.service"), ("config", "agent.example.json")]
)
def test_archive_prints_the_files_that_it_carries(
    pyz: Path, bare_environment: dict[str, str], what: str, name: str
) -> None:
    done = run(pyz, f"--print={what}", environment=bare_environment)
    assert (done.returncode, done.stdout) == (0, (ROOT / name).read_text("utf-8"))


def test_archive_writes_nothing_beside_itself(
    pyz: Path, bare_environment: dict[str, str], tmp_path: Path
) -> None:
    copy = Path(shutil.copy(pyz, tmp_path))
    done = run(copy, "--version", environment=bare_environment)
    assert done.stdout == f"felhom-agent {felhom_agent.__version__}\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [copy]


# --- build.sh ------------------------------------------------------------------------------------


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
