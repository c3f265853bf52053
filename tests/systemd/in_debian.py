#!/usr/bin/python3
"""The unit under a real systemd: installed, broken, upgraded and removed by README.md's own lines, with a simulated node and hub.

`tests/systemd/run` runs it as root inside a booted Debian that is thrown away afterwards, beside the files that it names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import lab

UNIT = Path("/etc/systemd/system/felhom-agent.service")
CONFIGURATION = Path("/etc/felhom-agent/agent.json")
PROGRAM = Path("/usr/local/bin/felhom-agent.pyz")
UNPACKED = Path("/run/felhom-agent")
PROXMOX_CA = Path("/etc/pve/pve-root-ca.pem")
HUB_CA = Path("/usr/local/share/ca-certificates/hub.crt")
HERE = Path(__file__).parent

UNITS = {
    "cloudflared.service": "/bin/sleep infinity",
    "tunnel-active.service": "/bin/sleep infinity",
    "tunnel-inactive.service": "/bin/sleep infinity",
    "tunnel-failed.service": "/bin/false",
}
# The service's own sandbox with another program in it.
PROBE = f"""
[Service]
Type=oneshot
Restart=no
WatchdogSec=0
ExecStartPre=
ExecStart=
ExecStart={__file__} WHAT
StandardOutput=truncate:{HERE}/out/probe.json
StandardError=journal
"""


# --- in the sandbox of the service --------------------------------------------------------------------------------------------------


def find_writable() -> list[str]:
    """Return each folder in which a file can be made, and each file that can be written; /proc aside, where a process has its own."""
    writable = []
    for folder, folders, files in os.walk("/"):
        if folder == "/proc":
            folders.clear()
            continue
        regular = (path for name in files if stat.S_ISREG(os.lstat(path := f"{folder}/{name}").st_mode))
        writable += [path for path in regular if os.access(path, os.W_OK)]
        try:
            os.close(os.open(f"{folder}/felhom-probe", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError:
            continue
        writable.append(folder)
    return writable


def find_readable() -> list[str]:
    """Return which of the files and folders that are not for the service it can read all the same."""
    secrets = ("/etc/felhom-agent", CONFIGURATION, PROXMOX_CA, "/etc/shadow", "/root", "/home", "/tmp", "/proc/1/environ")
    return [str(path) for path in secrets if os.access(path, os.R_OK)]


def probe_units() -> dict[str, str]:
    """Return the word of the installed agent's own prober for a unit of each kind."""
    sys.path.insert(0, str(next(UNPACKED.glob("*/site-packages"))))
    import felhom_agent

    return {kind: felhom_agent.SystemctlProber(f"tunnel-{kind}.service").probe() for kind in ("active", "inactive", "failed", "missing")}


# --- outside ------------------------------------------------------------------------------------------------------------------------


def run(*command: str | Path, check: bool = True) -> str:
    """Return what a command prints, standard error included."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90, check=False)
    assert not check or done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}: {done.stdout}"
    return done.stdout.strip()


def readme_lines(heading: str, language: str) -> str:
    """Return the lines in a language below a heading of README.md, to the next heading of any level."""
    sections = re.split(r"^#+ (.+)\n", (HERE / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    section = dict(zip(sections[1::2], sections[2::2], strict=True))[heading]
    lines = "".join(re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    assert lines, f"README.md has no lines for {heading}"
    return lines


def follow_readme(heading: str) -> None:
    """Run the shell lines below a heading of README.md as an administrator pastes them."""
    run("bash", "-euc", readme_lines(heading, "sh"))


def show(name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, "felhom-agent")


def state() -> str:
    return run("systemctl", "is-active", "felhom-agent", check=False)


def restart(check: bool = True) -> None:
    """Start it anew; the start has ended well when systemd has read READY=1."""
    run("systemctl", "restart", "felhom-agent", check=check)


def journal_end() -> str:
    """Return where the journal ends now."""
    return run("journalctl", "-n0", "--show-cursor").rpartition("-- cursor: ")[2]


def journal(after: str) -> list[tuple[int, str]]:
    """Return priority and text of each line that the service itself wrote or that systemd wrote of it."""
    run("journalctl", "--sync")
    lines = map(json.loads, run("journalctl", "-u", "felhom-agent", "-o", "json", f"--after-cursor={after}").splitlines())
    return [(int(line["PRIORITY"]), line["MESSAGE"]) for line in lines if "MESSAGE" in line]


def until(condition: Callable[[], object], seconds: float) -> None:
    """Return once the condition holds; systemd has no event for most of what is awaited here."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s; state {state()}, status {show('StatusText')}"
        time.sleep(0.1)


def in_sandbox(what: str, *settings: str) -> object:
    """Return what a function of this file returns in the sandbox of the service."""
    text = "\n".join((UNIT.read_text(), PROBE.replace("WHAT", what), *settings, ""))
    Path("/run/systemd/system/probe.service").write_text(text)
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "probe")
    found: object = json.loads((HERE / "out" / "probe.json").read_text())
    return found


def write_next_version(source: Path, target: Path) -> None:
    """Write the archive anew, as the build of another version."""
    with zipfile.ZipFile(source) as old, target.open("wb") as file:
        file.write(b"#!/usr/bin/python3 -I\n")
        with zipfile.ZipFile(file, "w") as new:
            for item in old.infolist():
                text = old.read(item)
                if item.filename == "environment.json":
                    text = json.dumps({**json.loads(text), "build_id": "next"}).encode()
                new.writestr(item, re.sub(rb"(?m)^(__version__.*) = .*", rb'\1 = "next"', text))


class Checks:
    """Each test_ method is one check; they run in this order, and one that fails does not stop the others."""

    def __init__(self, node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
        self.node, self.hub = node, hub
        self.start = journal_end()

    def report_after(self, action: Callable[[], object], seconds: float = 20) -> dict[str, object]:
        """Return the first report that comes after the action."""
        count = len(self.hub.reports)
        action()
        self.hub.wait_for_reports(count + 1, seconds)
        return self.hub.reports[count]

    def test_it_is_installed_by_the_lines_of_the_readme_and_reports(self) -> None:
        report = self.report_after(lambda: follow_readme("Install"))
        assert report["cloudflared"] == {"status": "active"}, report["cloudflared"]
        assert state() == "active", state()
        assert run("systemctl", "is-enabled", "felhom-agent") == "enabled"
        assert run("stat", "-c", "%A %U:%G", CONFIGURATION) == "-rw------- root:root"
        assert run("getent", "passwd", "felhom-agent").endswith(":/usr/sbin/nologin")

    def test_status_says_how_the_last_report_went(self) -> None:
        until(lambda: re.fullmatch(r"last report \d\d:\d\d:\d\d accepted, \d+ guests, next in \d+ s", show("StatusText")), 5)
        shown = run("systemctl", "status", "felhom-agent")
        assert f'Status: "{show("StatusText")}"' in shown, shown
        print(re.sub("^", "    ", shown, flags=re.MULTILINE))

    def test_the_lines_of_the_readme_to_look_at_it_work(self) -> None:
        follow_readme("Look at it")

    def test_the_edit_of_the_readme_shows_each_step(self) -> None:
        folder = Path("/etc/systemd/system/felhom-agent.service.d")
        folder.mkdir()
        (folder / "override.conf").write_text(readme_lines("Look at it", "ini"))  # as `systemctl edit` does
        after = journal_end()
        run("systemctl", "daemon-reload")
        self.report_after(restart)
        until(lambda: [text for priority, text in journal(after) if priority == 7 and text.startswith("report accepted")], 5)
        shutil.rmtree(folder)
        run("systemctl", "daemon-reload")

    def test_the_self_tests_of_the_readme_work(self) -> None:
        self.report_after(lambda: follow_readme("Self-tests"))

    def test_systemd_finds_no_fault_in_the_unit(self) -> None:
        faults = run("systemd-analyze", "verify", UNIT).splitlines()
        old = int(run("systemctl", "--version").split()[1]) < 254
        assert all(old and re.search("Unknown key '(RestartSteps|RestartMaxDelaySec)'", fault) for fault in faults), faults

    def test_exposure_is_at_most_1_2(self) -> None:
        print("   ", run("systemd-analyze", "security", "--threshold=12", "felhom-agent").splitlines()[-1])

    def test_it_has_no_capability_and_cannot_get_one(self) -> None:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{show('MainPID')}/status").read_text().splitlines())
        capabilities = {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert not any(capabilities.values()), capabilities
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), status
        assert status["Uid"].split() == [run("id", "-u", "felhom-agent")] * 4, status["Uid"]
        print(f"    VmHWM {' '.join(status['VmHWM'].split())}, MemoryPeak {show('MemoryPeak')}")

    def test_it_can_write_nowhere(self) -> None:
        found = in_sandbox("find_writable")
        assert found == [], found

    def test_it_cannot_read_what_is_not_for_it(self) -> None:
        found = in_sandbox("find_readable")
        assert found == [], found

    def test_its_code_belongs_to_root_alone(self) -> None:
        modes = [path.stat() for path in (UNPACKED, *UNPACKED.rglob("*"))]
        assert {(mode.st_uid, mode.st_mode & 0o022) for mode in modes} == {(0, 0)}, modes

    def test_it_can_ask_for_the_state_of_a_unit(self) -> None:
        found = in_sandbox("probe_units")
        assert found == {"active": "active", "inactive": "inactive", "failed": "failed", "missing": "inactive"}, found

    def test_without_the_bus_the_state_is_unknown(self) -> None:
        found = in_sandbox("probe_units", "InaccessiblePaths=/run/dbus")
        assert found == dict.fromkeys(("active", "inactive", "failed", "missing"), "unknown"), found

    def test_it_comes_back_when_it_is_killed(self) -> None:
        self.report_after(restart)
        self.report_after(lambda: os.kill(int(show("MainPID")), signal.SIGKILL))
        assert (state(), show("NRestarts")) == ("active", "1"), (state(), show("NRestarts"))

    def test_the_watchdog_brings_it_back_when_it_hangs(self) -> None:
        self.node.script("", lab.Forever(lab.Stall()))  # so that it stays in its first cycle, whose deadline is near
        end = journal_end()
        restart()
        os.kill(int(show("MainPID")), signal.SIGSTOP)
        self.node.clear_script()
        self.report_after(lambda: None, 80)
        assert any("Watchdog timeout" in text for _, text in journal(end)), journal(end)
        assert (state(), show("NRestarts")) == ("active", "1"), (state(), show("NRestarts"))

    def test_a_stop_takes_less_than_two_seconds_also_during_a_request(self) -> None:
        self.node.script("", lab.Forever(lab.Stall()))
        count = len(self.node.requests)
        restart()
        self.node.wait_for_requests(count + 1, 10)
        started = time.monotonic()
        run("systemctl", "stop", "felhom-agent")
        lasted = time.monotonic() - started
        self.node.clear_script()
        print(f"    {lasted:.2f} s")
        assert lasted < 2, lasted
        assert (state(), show("Result")) == ("inactive", "success"), (state(), show("Result"))

    def test_it_starts_while_the_hub_is_down_and_recovers(self) -> None:
        self.hub.__exit__()
        end = journal_end()
        try:
            restart()
            until(lambda: re.fullmatch(r"hub .+ since \d\d:\d\d, \d+ (try|tries), next in \d+ s", show("StatusText")), 10)
            assert state() == "active", state()
            print(f"    {show('StatusText')}")
        finally:
            self.hub.__enter__()
        self.report_after(lambda: None, 40)
        until(lambda: any(priority == 6 and "accepted again" in text for priority, text in journal(end)), 5)
        assert any(priority == 4 and "connection refused" in text for priority, text in journal(end)), journal(end)

    def test_a_broken_configuration_fails_and_says_why(self) -> None:
        text = CONFIGURATION.read_text()
        CONFIGURATION.write_text(text.replace(",", ";", 1))
        end = journal_end()
        restart(check=False)
        found = (state(), show("ExecMainStatus"), show("NRestarts"))
        CONFIGURATION.write_text(text)
        self.report_after(restart)
        assert found == ("failed", "2", "0"), found
        assert any(priority == 3 and re.match(r"config: .+: line \d+ column \d+", text) for priority, text in journal(end)), journal(end)

    def test_a_missing_ca_is_waited_for(self) -> None:
        aside = PROXMOX_CA.rename(PROXMOX_CA.with_suffix(".aside"))
        end = journal_end()
        restart(check=False)
        waiting = state()
        self.report_after(lambda: aside.rename(PROXMOX_CA))
        assert waiting == "activating", waiting
        assert any("status=243/CREDENTIALS" in text for _, text in journal(end)), journal(end)

    def test_the_environment_does_not_choose_what_runs(self) -> None:
        variables = {"SHIV_ENTRY_POINT": "os:getcwd", "SHIV_INTERPRETER": "1", "PYTHONPATH": "/lab", "SSLKEYLOGFILE": "/tmp/keys"}
        run("systemctl", "set-environment", *(f"{name}={value}" for name, value in variables.items()))
        try:
            self.report_after(restart)
        finally:
            run("systemctl", "unset-environment", *variables)
        environment = Path(f"/proc/{show('MainPID')}/environ").read_text()
        assert not [name for name in variables if name in environment], environment

    def test_an_unpacking_that_was_cut_off_heals(self) -> None:
        run("systemctl", "stop", "felhom-agent")
        next(UNPACKED.glob("*/site-packages/felhom_agent.py")).unlink()
        self.report_after(restart)

    def test_an_upgrade_by_the_lines_of_the_readme_leaves_nothing_of_the_old_build(self) -> None:
        write_next_version(PROGRAM, HERE / "felhom-agent.pyz")
        report = self.report_after(lambda: follow_readme("Upgrade"))
        assert report["agent_version"] == "next", report["agent_version"]
        unpacked = [path.name for path in UNPACKED.iterdir() if path.is_dir()]
        assert unpacked == ["felhom-agent.pyz_next"], unpacked

    def test_the_journal_holds_priorities_and_no_secret(self) -> None:
        started = {priority for priority, text in journal(self.start) if text.startswith("started version=")}
        assert started == {6}, started
        everything = run("journalctl", "-o", "export") + run("systemctl", "show", "felhom-agent")
        assert [secret for secret in (self.node.token_secret, self.hub.api_key) if secret in everything] == []

    def test_the_hub_refused_no_report(self) -> None:
        assert self.hub.rejected == [], self.hub.rejected

    def test_it_is_removed_by_the_lines_of_the_readme(self) -> None:
        follow_readme("Remove")
        left = [path for path in (UNIT, CONFIGURATION.parent, PROGRAM, UNPACKED) if path.exists()]
        assert left == [], left
        assert show("LoadState") == "not-found", show("LoadState")
        assert run("getent", "passwd", "felhom-agent", check=False) == ""


def prepare(node: lab.SimulatedNode, hub: lab.SimulatedHub) -> None:
    """Make of this Debian what the README supposes: the CAs, a tunnel, a `pveum`, and an editor that knows what to write."""
    assert node.certificates
    assert hub.certificates
    PROXMOX_CA.parent.mkdir()
    shutil.copy(node.certificates.ca_file, PROXMOX_CA)
    PROXMOX_CA.chmod(0o640)
    shutil.copy(hub.certificates.ca_file, HUB_CA)
    run("update-ca-certificates")
    for name, program in UNITS.items():
        Path(f"/run/systemd/system/{name}").write_text(f"[Service]\nExecStart={program}\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "start", *(name for name in UNITS if "inactive" not in name))
    pveum = Path("/usr/local/sbin/pveum")
    pveum.write_text("#!/bin/sh\n")
    pveum.chmod(0o755)
    configuration = json.loads((HERE / "agent.example.json").read_text())
    configuration["proxmox"] |= {"token_secret": node.token_secret, "timeout_seconds": 2}
    configuration["hub"] |= {"url": hub.url, "api_key": hub.api_key, "timeout_seconds": 2}
    (HERE / "agent.json").write_text(json.dumps(configuration, indent=2))
    os.environ["EDITOR"] = f"cp {HERE}/agent.json"


def main() -> int:
    failed = []
    certificates, hub_certificates = lab.make_certificates(HERE / "node"), lab.make_certificates(HERE / "hub", generation="current")
    node, hub = lab.SimulatedNode(certificates, name=socket.gethostname()), lab.SimulatedHub(hub_certificates)
    node.port = 8006
    with node, hub:
        prepare(node, hub)
        checks = Checks(node, hub)
        names = [name for name in vars(Checks) if name.startswith("test_")]
        for name in names:
            try:
                getattr(checks, name)()
                print(f"ok     {name}", flush=True)
            except Exception as exc:
                failed.append(name)
                print(f"FAILED {name}: {type(exc).__name__}: {exc}", flush=True)
    if failed:
        print(run("journalctl", "-u", "felhom-agent", "-u", "probe", "-o", "short-monotonic", check=False))
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]]()))
    else:
        sys.exit(main())
