"""felhom-agent.service as it lies here; tests/systemd runs it in a booted Debian."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "felhom-agent.service"
SETTINGS = [line for line in UNIT.read_text("utf-8").splitlines() if line and line[0] not in "#["]

# With these the exposure is 1.1.  It does not count the last block.
HARDENING = """
User=felhom-agent
DynamicUser=yes
UMask=0077
CapabilityBoundingSet=
AmbientCapabilities=
SecureBits=noroot-locked
NoNewPrivileges=yes
RestrictSUIDSGID=yes
PrivateUsers=yes
KeyringMode=private
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateMounts=yes
PrivateIPC=yes
RemoveIPC=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources

NotifyAccess=main
ReadOnlyPaths=/run
InaccessiblePaths=/tmp /var/tmp -/dev/shm -/dev/mqueue -/sys/fs/cgroup
SocketBindDeny=any
SystemCallErrorNumber=EPERM
MemoryMax=512M
TasksMax=16
LimitNOFILE=256
LimitCORE=0
""".splitlines()

needs_systemd_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=30, check=False)


def test_every_restriction_is_there() -> None:
    assert set(HARDENING) - {"", *SETTINGS} == set()


def test_no_later_line_takes_an_earlier_one_back() -> None:
    counts = Counter(line.partition("=")[0] for line in SETTINGS)
    assert {name for name, count in counts.items() if count > 1} == {"LoadCredential", "UnsetEnvironment", "SystemCallFilter"}


def test_the_example_configuration_names_the_credential_with_the_ca() -> None:
    ca_file = json.loads((ROOT / "agent.example.json").read_text("utf-8"))["proxmox"]["ca_file"]
    assert f"LoadCredential={ca_file}:/etc/pve/pve-root-ca.pem" in SETTINGS


def test_no_variable_makes_shiv_run_something_else() -> None:
    environment = pytest.importorskip("shiv.bootstrap.environment").Environment
    variables = {value for value in vars(environment).values() if isinstance(value, str) and value.startswith("SHIV_")}
    unset = {name for line in SETTINGS if line.startswith("UnsetEnvironment=") for name in line.partition("=")[2].split()}
    assert variables - unset == {"SHIV_ROOT"}, "the unit itself sets SHIV_ROOT"


@needs_systemd_analyze
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text("utf-8").replace("/usr/local/bin/felhom-agent.pyz", "/bin/true"), "utf-8")
    faults = analyze("verify", "--man=no", unit).stderr.splitlines()
    version = int(analyze("--version").stdout.split()[1])
    unknown = ("'RestartSteps'", "'RestartMaxDelaySec'") if version < 254 else ()
    assert [fault for fault in faults if not any(key in fault for key in unknown)] == []


@needs_systemd_analyze
def test_exposure_is_at_most_1_2() -> None:
    rating = analyze("security", "--offline=true", "--no-pager", "--threshold=12", UNIT)
    assert rating.returncode == 0, rating.stdout[-200:] + rating.stderr
