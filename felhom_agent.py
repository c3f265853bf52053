"""felhom-agent: report the state of one Proxmox VE node to a hub.

Once per interval the agent reads the node through the Proxmox API (GET requests only), asks systemd
whether the cloudflared tunnel is running, and posts one JSON report to the hub.  The report is the
heartbeat: if it stops, the hub raises the alarm.

The agent changes nothing, writes no file (the archive that carries it unpacks itself before this
code runs), follows no redirect, and runs no command but `systemctl is-active UNIT`.  The token
secret goes only to Proxmox, the API key only to the hub; both are masked in every message.  The hub
can only change the interval (60 to 3600 seconds) and, as Proxmox can, lengthen the wait after a
failure by Retry-After (to at most two hours).

Each section uses only those above it.  `Loop.cycle` is one heartbeat: `Collector.collect` builds
the report, `HubClient.report` sends it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import http.client
import ipaddress
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

__version__: Final = "0.3.0"

MIN_POLL_SECONDS: Final = 60
MAX_POLL_SECONDS: Final = 3600
FIRST_RETRY_SECONDS: Final = 15
SYSTEMCTL_SECONDS: Final = 5
# One address of a server has this long to connect.
CONNECT_SECONDS: Final = 5
# All requests of a collect together have this many times proxmox.timeout_seconds.
COLLECT_TIMEOUT_FACTOR: Final = 6
# pvestatd refreshes /cluster/resources every 10 s.  If a NAS is off, a round takes up to 85 s.
MAX_LIST_AGE_SECONDS: Final = 120
# A storage is asked for its backups only if pvestatd has just found it available.
MAX_STORAGE_AGE_SECONDS: Final = 30
STORAGE_PAUSE_SECONDS: Final = 86400
# After a boot, pvestatd's first round may take this long.
BOOT_SECONDS: Final = 300
TASK_SECONDS: Final = 86400
MAX_TASKS: Final = 50
DEFAULT_PATH: Final = "/etc/felhom-agent/agent.json"
REPORT_PATH: Final = "/api/v1/host-report"

# What proxmox.extras may name; the descriptions are for you.  A further extra takes five places: a
# line here; a class or fields in "wire contract", and a function there that builds them; a call in
# "Proxmox client", unless its replies are read anyway; and a method that collect calls.
EXTRAS: Final[Mapping[str, str]] = {
    "qemu": "virtual machines, too, among the guests",
    "storage": "the node's storages and how full they are",
    "backups": "the newest backup of each guest on each storage; includes storage",
    "details": "what each guest is meant to be, and what it uses",
    "tasks": "the node's tasks of the last 24 hours, and how they ended",
}

LOG: Final = logging.getLogger("felhom-agent")

T = TypeVar("T")
Check: TypeAlias = Callable[[Any], bool]
# Objects in a list that Proxmox sent
Entries: TypeAlias = Sequence[Mapping[str, object]]


# ---- errors and logging --------------------------------------------------------------------------


class ConfigError(Exception):
    """The configuration is invalid; one line per problem."""


class AgentError(Exception):
    """An expected failure.  The message says what to do."""


class TransportError(AgentError):
    """The server sent no usable response."""


class RequestTimeout(TransportError):
    """The server did not respond in time."""


class HTTPError(AgentError):
    """The server answered with an error status; `retry_after` is in seconds."""

    def __init__(self, message: str, *, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


# The token secret and the API key, once they are known
SECRETS: Final[set[str]] = set()


def sanitize(text: str, max_length: int = 300) -> str:
    """Return `text` as one printable line with the secrets masked."""
    # The longest first, because one secret may be a part of the other.
    for secret in sorted(SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    # What is not printable could forge a line, or drive a terminal.
    if not text.isprintable():
        text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    if len(text) > max_length:
        text = text[: max_length - 1] + "…"
    return text


def plural(number: int, noun: str) -> str:
    """Return "1 guest" or "2 guests"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def describe(exc: BaseException) -> str:
    """Return what happened, without "[Errno 111]", "[SSL: …]" and "(_ssl.c:1006)"."""
    text = getattr(exc, "strerror", None)
    if not text:
        text = str(exc)
    if not text:
        text = type(exc).__name__

    text = re.sub(r"^\[[^]]*\] ", "", text)
    return re.sub(r" \(_ssl\.c:[0-9]+\)$", "", text)


def is_bug(exc: Exception) -> bool:
    """Return whether a failure was not expected, so that its traceback belongs into the log."""
    return not isinstance(exc, AgentError)


def describe_failure(exc: Exception) -> str:
    """Return an error's message, or only the type of a bug."""
    if is_bug(exc):
        return f"bug in the agent, please report it: {type(exc).__name__}"
    return str(exc)


class LogFormatter(logging.Formatter):
    """Formats a record as sanitized lines, for the journal or for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        # A traceback has several lines.
        lines = [sanitize(line, 2000) for line in super().format(record).split("\n")]
        # systemd sets this if the journal reads standard error.  sd-daemon(3) explains the prefix.
        if "JOURNAL_STREAM" in os.environ:
            priorities = {"DEBUG": 7, "INFO": 6, "WARNING": 4}
            prefix = f"<{priorities.get(record.levelname, 3)}>"
            return prefix + f"\n{prefix}    ".join(lines)
        return f"{self.formatTime(record)} {record.levelname} " + "\n    ".join(lines)


class WarnOnce:
    """Logs a problem when it starts or changes, and once more when it is over."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._problems: dict[str, str] = {}

    def update(self, topic: str, problem: str, *, traceback: bool = False) -> None:
        """Log a topic's problem; an empty string says that there is none."""
        if not problem:
            self.resolve(topic)
        elif problem == self._problems.get(topic):
            self._logger.debug("%s", problem)
        else:
            self._problems[topic] = problem
            self._logger.warning("%s", problem, exc_info=traceback)

    def resolve(self, topic: str, detail: str = "") -> None:
        """Log that a topic's problem is over, if there was one."""
        if topic in self._problems:
            del self._problems[topic]
            self._logger.info("%s: problem resolved%s", topic, detail)


# ---- configuration -------------------------------------------------------------------------------


def setting(
    default: Any, expected: str, is_valid: Check, *, required: bool = False, secret: bool = False
) -> Any:
    """Return a field of the configuration with its rule.

    The rule is what a value must be, in words and as a check; whether there must be one; and
    whether it is masked.
    """
    rule = {"expected": expected, "is_valid": is_valid, "required": required, "secret": secret}
    return field(default=default, metadata=rule, repr=not secret)


def matches(pattern: str) -> Check:
    """Return a function that checks whether a pattern describes the whole of a text."""
    return lambda text: re.fullmatch(pattern, text, re.ASCII) is not None


def is_base_url(url: str) -> bool:
    """Return whether a URL consists of http or https, host, port and path alone."""
    # urlsplit drops tabs and line feeds, and takes almost anything for a host.  "%" in a host is
    # read differently by different programs.
    host, path = r"([\w.-]+|\[[\w:.]+\])", r"(/[\w.~!$&'()*+,;=:/-]*)?"
    if not re.fullmatch(f"https?://{host}(:[0-9]+)?{path}", url, re.ASCII):
        return False
    try:
        # None without a port.  Raises ValueError for an IPv6 address or a port that is none.
        return urllib.parse.urlsplit(url).port != 0
    except ValueError:
        return False


def is_root_url(url: str) -> bool:
    if not is_base_url(url):
        return False
    return urllib.parse.urlsplit(url).path in ("", "/")


def is_loopback(host: str | None) -> bool:
    """Return whether what is sent to a host stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def is_timeout_seconds(seconds: int) -> bool:
    return 1 <= seconds <= 300


def is_host_id(text: str) -> bool:
    return len(text) <= 255 and text.isprintable() and text == text.strip()


def are_extras(words: Sequence[str]) -> bool:
    return all(word in EXTRAS for word in words)


is_node_name: Final = matches("[A-Za-z0-9-]+")
# A user's name may hold any printable ASCII but slash and colon.
is_token_id: Final = matches(r"[!-.0-9;-~]+@[\w.-]+![\w.-]+")
is_secret: Final = matches("[!-~]+")
is_absolute_path: Final = matches(r"/[^\x00]*")
is_sha256: Final = matches("([0-9A-Fa-f]{2}:?){32}")
# systemctl would take a leading dash for an option.
is_unit_name: Final = matches(r"[\w:.@\\][\w:.@\\-]{0,254}")

SHORT_HOSTNAME: Final = socket.gethostname().partition(".")[0]

# Words that two settings share
HIDDEN: Final = "printable ASCII without spaces (not shown)"
TIMEOUT: Final = "an integer from 1 to 300"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxmoxConfig:
    """The Proxmox API; `timeout_seconds` limits each request."""

    url: str = setting("https://127.0.0.1:8006", "https://host[:port]", is_root_url)
    node: str = setting(SHORT_HOSTNAME, "the node's short name, without a domain", is_node_name)
    token_id: str = setting("", "user@realm!tokenname in ASCII", is_token_id, required=True)
    token_secret: str = setting("", HIDDEN, is_secret, required=True, secret=True)
    ca_file: str = setting("", "an absolute path", is_absolute_path)
    fingerprint: str = setting("", "a SHA-256, 64 hexadecimal digits", is_sha256)
    timeout_seconds: int = setting(10, TIMEOUT, is_timeout_seconds)
    extras: tuple[str, ...] = setting((), f"a list of {', '.join(EXTRAS)}", are_extras)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """The hub; `timeout_seconds` limits the whole POST."""

    url: str = setting(
        "",
        "https://host[:port][/path] in ASCII (xn--…), without user, query, fragment or %",
        is_base_url,
        required=True,
    )
    host_id: str = setting(
        "", "1 to 255 printable characters, without spaces at the ends", is_host_id, required=True
    )
    api_key: str = setting("", HIDDEN, is_secret, required=True, secret=True)
    # Any integer is accepted and then limited, see load_config.
    poll_seconds: int = setting(900, "an integer", lambda seconds: True)
    timeout_seconds: int = setting(30, TIMEOUT, is_timeout_seconds)
    ca_file: str = setting("", "an absolute path", is_absolute_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudflaredConfig:
    unit: str = setting("cloudflared.service", "the name of a systemd unit", is_unit_name)


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "proxmox": ProxmoxConfig,
    "hub": HubConfig,
    "cloudflared": CloudflaredConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The configuration, and its problems by key."""

    proxmox: ProxmoxConfig
    hub: HubConfig
    cloudflared: CloudflaredConfig
    problems: Mapping[str, str]

    def validate(self, *, hub: bool = True) -> None:
        """Raise ConfigError with every problem, the hub section's only if `hub`."""
        keys = list(self.problems)
        if not hub:
            keys = [key for key in keys if key.partition(".")[0] != "hub"]
        if keys:
            raise ConfigError("\n".join(f"config: {key}: {self.problems[key]}" for key in keys))

    def redacted(self) -> dict[str, Any]:
        """Return the sections with "***" for each secret that is set."""
        sections = {}
        for name in SECTIONS:
            sections[name] = dataclasses.asdict(getattr(self, name))
            for item in dataclasses.fields(SECTIONS[name]):
                if item.metadata["secret"] and sections[name][item.name]:
                    sections[name][item.name] = "***"
        return sections


def load_config(path: str | None, environ: Mapping[str, str]) -> Config:
    """Read the JSON file; FELHOM_AGENT_<SECTION>_<KEY> variables override it.

    The file is `path`, else $FELHOM_AGENT_CONFIG, else the systemd credential agent.json, else
    DEFAULT_PATH, which may be missing.  Raises ConfigError if the file cannot be read; what is
    wrong with its values is left to Config.validate.
    """
    credential = find_credential(environ, "agent.json")
    requested = path or environ.get("FELHOM_AGENT_CONFIG") or credential
    path = requested or DEFAULT_PATH
    document = read_config_file(path, may_be_missing=not requested)

    # Every value is read before anything is logged, so that the secrets are masked there.
    values = {name: read_section(name, document, environ) for name in SECTIONS}

    problems = check_names(document)
    sections: dict[str, Any] = {}
    for name, section_type in SECTIONS.items():
        for key, problem in find_problems(section_type, values[name]).items():
            problems[f"{name}.{key}"] = problem
            # Until validate raises, the default stands for it.
            values[name].pop(key, None)
        sections[name] = section_type(**values[name])

    proxmox, hub = sections["proxmox"], sections["hub"]
    for key, url in (("proxmox.url", proxmox.url), ("hub.url", hub.url)):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            problems[key] = f"must be https, got http://{parts.netloc}"

    poll_seconds = clamp_poll(hub.poll_seconds)
    if poll_seconds != hub.poll_seconds:
        text = "config: hub.poll_seconds: must be from 60 to 3600, using %d"
        LOG.warning(text, poll_seconds)
        sections["hub"] = dataclasses.replace(hub, poll_seconds=poll_seconds)
    if path != credential:
        check_config_file(path)
    return Config(**sections, problems=problems)


def read_config_file(path: str, *, may_be_missing: bool) -> dict[str, Any]:
    """Return the file's JSON object, empty if it may be missing.  Raises ConfigError."""
    subject = f"config: {sanitize(path)}"
    try:
        with open(path, encoding="utf-8-sig") as file:
            document = json.load(file)
    except FileNotFoundError:
        if may_be_missing:
            return {}
        hint = "see felhom-agent.pyz --print=config"
        raise ConfigError(f"{subject}: no such file; {hint}") from None
    except PermissionError as exc:
        raise ConfigError(f"{subject}: {describe(exc)}; run this as root") from None
    except (OSError, ValueError, RecursionError) as exc:
        # json says line and column, and quotes nothing.
        raise ConfigError(f"{subject}: {describe(exc)}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{subject}: must be a JSON object")
    return document


def check_config_file(path: str) -> None:
    """Log if the file is missing, or if others can read the secrets in it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        LOG.info("config: %s: no such file, using only the environment", sanitize(path))
        return
    if mode & 0o044:
        text = "config: %s: others can read it; run: chmod 600 %s"
        LOG.warning(text, sanitize(path), sanitize(shlex.quote(path)))


def read_section(
    section: str, document: Mapping[str, Any], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return the values that are set in a section, not yet judged; a variable overrides the file.

    As in the example, an empty text stands for the default.
    """
    in_file = document.get(section)
    if not isinstance(in_file, dict):
        in_file = {}

    values: dict[str, Any] = {}
    for item in dataclasses.fields(SECTIONS[section]):
        value = in_file.get(item.name, "")
        if isinstance(value, list):
            # JSON has no tuples, and a frozen section has no lists.
            value = tuple(str(word) for word in value)

        variable = f"FELHOM_AGENT_{section}_{item.name}".upper()
        text = environ.get(variable)
        if text:
            try:
                value = parse_variable(text, type(item.default))
            except ValueError:
                LOG.warning("config: %s is not an integer and is ignored", variable)

        if value != "":
            values[item.name] = value
            if item.metadata["secret"]:
                SECRETS.add(str(value))

    # The sandboxed service cannot see /etc/pve, so the unit passes it a copy of Proxmox's CA under
    # the same file name.
    ca_file = find_credential(environ, os.path.basename(str(values.get("ca_file", ""))))
    if ca_file:
        values["ca_file"] = ca_file
    return values


def parse_variable(text: str, expected_type: type) -> object:
    """Return the value of an environment variable.  Raises ValueError."""
    if expected_type is int:
        return int(text)
    if expected_type is tuple:
        return tuple(word.strip() for word in text.split(","))
    return text


def check_names(document: Mapping[str, Any]) -> dict[str, str]:
    """Warn of unknown keys, and return the problem of each section that is not an object."""
    problems = {}
    for section, values in document.items():
        # authz is reserved for a later version; this one has no use for it.
        if section not in (*SECTIONS, "authz"):
            LOG.warning("config: unknown key %s is ignored", sanitize(section))
        elif not isinstance(values, dict):
            problems[section] = "must be an object"
        elif section in SECTIONS:
            known = [item.name for item in dataclasses.fields(SECTIONS[section])]
            for key in values:
                if key not in known:
                    LOG.warning("config: unknown key %s.%s is ignored", section, sanitize(key))
    return problems


def find_problems(section_type: type[Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong with a section's values, by key, without showing them."""
    problems = {}
    for item in dataclasses.fields(section_type):
        rule = item.metadata
        if item.name not in values:
            if rule["required"]:
                problems[item.name] = "is required"
            continue

        value = values[item.name]
        # Not isinstance: True is an int.
        if type(value) is not type(item.default) or not rule["is_valid"](value):
            problems[item.name] = f"must be {rule['expected']}"
    return problems


def clamp_poll(seconds: int) -> int:
    return max(MIN_POLL_SECONDS, min(MAX_POLL_SECONDS, seconds))


def find_credential(environ: Mapping[str, str], name: str) -> str:
    """Return the path of a file that the unit passes with LoadCredential=, or an empty string."""
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    path = os.path.join(folder, name)
    if not folder or not name or not os.path.exists(path):
        return ""
    return path


# ---- values in JSON ------------------------------------------------------------------------------


def lookup(data: object, *keys: str) -> object:
    """Return data[key1][key2]…, or None if a key is missing."""
    for key in keys:
        if not isinstance(data, dict):
            return None
        data = data.get(key)
    return data


def get_text(data: object, *keys: str) -> str | None:
    """Return the string at `keys`, cut to 512 characters, or None if there is none."""
    value = lookup(data, *keys)
    if not isinstance(value, str):
        return None
    return value[:512]


def get_int(data: object, *keys: str) -> int | None:
    return parse_int(lookup(data, *keys))


def get_vmid(entry: object) -> int:
    """Return the guest's ID, or 0 if it is invalid."""
    vmid = get_int(entry, "vmid") or 0
    if not 100 <= vmid <= 999_999_999:
        return 0
    return vmid


def parse_number(value: object) -> float | None:
    """Return a number from 0 to 2^53, or None.  Proxmox sends some numbers as strings."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", value):
        value = float(value)
    # True is an int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Beyond that, a float no longer holds every integer.  NaN fails the comparison, too.
    if not 0 <= value < 2**53:
        return None
    return value


def parse_int(value: object) -> int | None:
    """Return an integer from 0 to 2^53, or None."""
    number = parse_number(value)
    if number is None or number != int(number):
        return None
    return int(number)


def parse_positive(value: object) -> int | None:
    """Return an integer from 1 to 2^53, or None; a size or count of 0 stands in for no value."""
    return parse_int(value) or None


def parse_flag(value: object) -> bool | None:
    """Return Proxmox's 0 or 1 as a boolean, or None for anything else."""
    number = parse_int(value)
    if number not in (0, 1):
        return None
    return number == 1


def parse_unix_time(value: object) -> int | None:
    """Return the seconds if they are after 1970 and before 2106, or None."""
    seconds = parse_int(value)
    # time.gmtime fails for some integers.
    if seconds is None or not 0 < seconds < 2**32:
        return None
    return seconds


def format_time(seconds: float | None = None) -> str:
    """Return a Unix time, by default now, in RFC 3339, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ---- wire contract -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMetrics:
    """The node's metrics; None if Proxmox sent no usable value."""

    node: str
    pve_version: str | None
    kernel_version: str | None
    uptime_seconds: int | None
    cpu_model: str | None
    cpu_count: int | None
    cpu_usage: float | None
    load_average: Sequence[float] | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    swap_total_bytes: int | None
    swap_used_bytes: int | None
    rootfs_total_bytes: int | None
    rootfs_used_bytes: int | None


def build_host(node: str, node_status: object, entry: object) -> HostMetrics:
    """Build the node's metrics from its status and its entry in /cluster/resources."""
    pve_version = None
    match = re.match(r"pve-manager/([^/\s]+)", get_text(node_status, "pveversion") or "")
    if match:
        pve_version = match[1]

    kernel_version = get_text(node_status, "current-kernel", "release")
    if not kernel_version:
        # Proxmox VE 8.0 has only "Linux 6.2.16-3-pve #1 SMP …".
        match = re.match(r"Linux (\S+)", get_text(node_status, "kversion") or "")
        if match:
            kernel_version = match[1]

    # The entry's, because the status's covers only the time since the same API worker was last
    # asked.  0 means that pvestatd has not measured it yet.
    cpu_usage = parse_number(lookup(entry, "cpu"))
    if cpu_usage is not None and not 0 < cpu_usage <= 1:
        cpu_usage = None

    return HostMetrics(
        node=node,
        pve_version=pve_version,
        kernel_version=kernel_version,
        uptime_seconds=get_int(node_status, "uptime"),
        cpu_model=get_text(node_status, "cpuinfo", "model"),
        cpu_count=parse_positive(lookup(node_status, "cpuinfo", "cpus")),
        cpu_usage=cpu_usage,
        load_average=parse_load_average(lookup(node_status, "loadavg")),
        memory_total_bytes=get_int(node_status, "memory", "total"),
        memory_used_bytes=get_int(node_status, "memory", "used"),
        swap_total_bytes=get_int(node_status, "swap", "total"),
        swap_used_bytes=get_int(node_status, "swap", "used"),
        rootfs_total_bytes=get_int(node_status, "rootfs", "total"),
        rootfs_used_bytes=get_int(node_status, "rootfs", "used"),
    )


def parse_load_average(loads: object) -> Sequence[float] | None:
    """Return the three load averages; None if one of them is invalid."""
    if not isinstance(loads, list) or len(loads) != 3:
        return None
    averages = []
    for load in loads:
        average = parse_number(load)
        if average is None:
            return None
        averages.append(average)
    return averages


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """A guest's configured resources, the same whether it runs or not.

    `disk_bytes`: of a container the root volume, without mount points; of a VM all disks but
    those for EFI and TPM.
    """

    cores: int | None
    memory_bytes: int | None
    disk_bytes: int | None


def build_spec(config: Mapping[str, object], guest_type: str, cpu_count: int | None) -> GuestSpec:
    """Build the spec from a guest's configuration and Proxmox's defaults."""
    # In MiB: a number, a string or "current=2048"
    memory = parse_int(str(config.get("memory", 512)).removeprefix("current=")) or 0
    if guest_type == "lxc":
        cores = parse_positive(config.get("cores", cpu_count))
        volumes = [str(config.get("rootfs"))]
    else:
        sockets = parse_int(config.get("sockets", 1)) or 0
        cores_per_socket = parse_int(config.get("cores", 1)) or 0
        cores = parse_positive(sockets * cores_per_socket)
        volumes = find_disks(config)

    memory_bytes = parse_positive(memory * 2**20)
    return GuestSpec(cores=cores, memory_bytes=memory_bytes, disk_bytes=sum_sizes(volumes))


def build_listed_spec(entry: object) -> GuestSpec:
    """Build the spec of a guest whose configuration the token may not read, from its entry.

    `maxcpu` may be a CPU limit; if that is a fraction, cores are unknown.  `maxdisk` may be the
    size of the host's file system.
    """
    return GuestSpec(
        cores=parse_positive(lookup(entry, "maxcpu")),
        memory_bytes=parse_positive(lookup(entry, "maxmem")),
        disk_bytes=None,
    )


def find_disks(config: Mapping[str, object]) -> list[str]:
    """Return the volumes of a VM's disks, without CD drives."""
    volumes = []
    for key, value in config.items():
        is_drive = re.fullmatch("(ide|sata|scsi|virtio)[0-9]+", key)
        if is_drive and "media=cdrom" not in str(value).split(","):
            volumes.append(str(value))
    return volumes


def sum_sizes(volumes: Sequence[str]) -> int | None:
    """Return the size of all volumes together; None if there are none, or one has no size."""
    total = 0
    for volume in volumes:
        size = parse_volume_size(volume)
        if not size:
            return None
        total += size
    return parse_positive(total)


def parse_volume_size(volume: str) -> int | None:
    """Return the bytes of "local:100/vm-100-disk-0.raw,size=8G"; None without a size."""
    match = re.search(r",size=([0-9]{1,15}(\.[0-9]{1,15})?)([KMGT]?)(,|$)", volume)
    if match is None:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return parse_int(int(float(match[1]) * units[match[3]]))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDetails:
    """What a guest is meant to be, and what it uses; the last three only while it runs."""

    template: bool | None
    onboot: bool | None
    lock: str | None
    tags: Sequence[str] | None
    ha_state: str | None
    uptime_seconds: int | None
    cpu_usage: float | None
    memory_used_bytes: int | None


def build_details(entry: object, config: object, *, status: str, is_fresh: bool) -> GuestDetails:
    """Build a guest's details from its entry, and `onboot` from its configuration if it was read.

    Proxmox keeps lock, tags and HA state exact; the rest is pvestatd's, and only true if fresh.
    `status` is the reported one: a guest whose entry is not fresh is unknown, not running.
    """
    template = None
    if is_fresh:
        template = parse_flag(lookup(entry, "template"))
    onboot = None
    if isinstance(config, dict):
        # Unset means no.
        onboot = parse_flag(config.get("onboot", 0))
    measured: object = {}
    if status == "running":
        measured = entry

    return GuestDetails(
        template=template,
        onboot=onboot,
        lock=get_text(entry, "lock"),
        tags=parse_tags(lookup(entry, "tags")),
        ha_state=get_text(entry, "hastate"),
        uptime_seconds=get_int(measured, "uptime"),
        cpu_usage=parse_number(lookup(measured, "cpu")),
        memory_used_bytes=get_int(measured, "mem"),
    )


def parse_tags(tags: object) -> Sequence[str] | None:
    """Return the tags, sorted; None for nonsense.  Older entries have commas or spaces."""
    if tags is None:
        return []
    if not isinstance(tags, str):
        return None
    return sorted({tag for tag in re.split("[;, ]+", tags) if tag})


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A container ("lxc") or VM ("qemu"); without `spec` if nothing tells it.

    In JSON, the fields of `details` are the guest's own.
    """

    vmid: int
    type: str = "lxc"
    name: str
    status: str
    # Reserved
    controller_version: str = ""
    spec: GuestSpec | None = None
    details: GuestDetails | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloudflared:
    """The unit's state as `systemctl is-active` prints it, or "unknown"."""

    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageTarget:
    """A storage of the node; sizes are None unless it is "available"."""

    storage: str
    type: str
    status: str
    total_bytes: int | None
    used_bytes: int | None


def build_storage(entry: object, *, is_fresh: bool) -> StorageTarget:
    """Build a storage, unknown if its entry in /cluster/resources is not fresh."""
    status, total_bytes, used_bytes = "unknown", None, None
    if is_fresh and get_text(entry, "status") == "available":
        status = "available"
        total_bytes = get_int(entry, "maxdisk")
        used_bytes = get_int(entry, "disk")
    if total_bytes == used_bytes == 0:
        # iSCSI and ESXi have no size; 0 only stands in for it.
        total_bytes = used_bytes = None

    return StorageTarget(
        storage=get_text(entry, "storage") or "",
        type=get_text(entry, "plugintype") or "",
        status=status,
        total_bytes=total_bytes,
        used_bytes=used_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """The newest backup of a guest on a storage."""

    vmid: int
    type: str
    storage: str
    volid: str
    created_at: str
    # Reserved
    size_bytes: int | None = None
    verified: bool | None = None


# vzdump's own name for an archive.  Only this says for sure whose backup it is.
ARCHIVE_NAME: Final = re.compile(
    r"/vzdump-(lxc|qemu|openvz)-([0-9]{3,9})-[0-9]{4}(_[0-9]{2}){2}-[0-9]{2}(_[0-9]{2}){2}\."
)


def build_backups(storage: str, archives: Sequence[object]) -> tuple[list[Backup], str]:
    """Return the newest backup of each guest on a storage, and a problem with others, if any.

    An ID may have been a VM's before it was a container's, so each type counts by itself.
    """
    newest: dict[tuple[int, str], tuple[int, str]] = {}
    undated = []
    for archive in archives:
        volid = get_text(archive, "volid") or ""
        match = ARCHIVE_NAME.search(volid)
        if match is None:
            continue
        created = parse_unix_time(lookup(archive, "ctime"))
        if created is None:
            undated.append(volid)
            continue
        guest = (int(match[2]), match[1].replace("openvz", "lxc"))
        newest[guest] = max(newest.get(guest, (0, "")), (created, volid))

    problem = ""
    if undated:
        problem = f"an archive without a valid date is not counted: {sanitize(undated[0])}"
    elif archives and not newest:
        count = plural(len(archives), "archive")
        problem = f"{count} not counted, because vzdump did not name them"
    backups = []
    for (vmid, guest_type), (created, volid) in newest.items():
        created_at = format_time(created)
        backups.append(
            Backup(vmid=vmid, type=guest_type, storage=storage, volid=volid, created_at=created_at)
        )
    return backups, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """A task that has ended: when, who started it, "vzdump 100", and "OK" or the error."""

    at: str
    actor: str
    operation: str
    result: str


def build_audit_tail(tasks: Sequence[object]) -> list[AuditEntry]:
    """Build the entries for the tasks that have ended, the newest last."""
    entries = []
    for task in tasks:
        ended = parse_unix_time(lookup(task, "endtime"))
        actor = lookup(task, "user")
        operation = lookup(task, "type")
        if ended is None or not isinstance(actor, str) or not isinstance(operation, str):
            continue

        if lookup(task, "tokenid"):
            actor = f"{actor}!{lookup(task, 'tokenid')}"
        # A vzdump of several guests has an empty ID.
        if lookup(task, "id"):
            operation = f"{operation} {lookup(task, 'id')}"

        entries.append(
            AuditEntry(
                at=format_time(ended),
                actor=sanitize(actor, 512),
                operation=sanitize(operation, 512),
                result=sanitize(str(lookup(task, "status") or "unknown"), 512),
            )
        )
    # Proxmox lists the newest first, and several may have ended in the same second.
    entries.reverse()
    return sorted(entries, key=lambda entry: entry.at)


# Reserved: neither is sent yet.
RestoreTest: TypeAlias = Mapping[str, object]
PBSSnapshot: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What is sent to the hub; `reported_at` is when the collect ended."""

    host_id: str
    agent_version: str
    reported_at: str
    host: HostMetrics
    guests: tuple[Guest, ...]
    cloudflared: Cloudflared
    storage_targets: tuple[StorageTarget, ...] = ()
    backups: tuple[Backup, ...] = ()
    restore_tests: tuple[RestoreTest, ...] = ()
    pbs_snapshots: tuple[PBSSnapshot, ...] = ()
    audit_tail: tuple[AuditEntry, ...] = ()

    def to_json(self) -> str:
        """Return compact JSON; a guest without a spec has no `spec` key."""
        document = dataclasses.asdict(self)
        for guest in document["guests"]:
            details = guest.pop("details")
            if details is not None:
                guest.update(details)
            if guest["spec"] is None:
                del guest["spec"]
        return json.dumps(document, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlEnvelope:
    """The hub's reply; None for what is missing or invalid.  Only the interval is acted on."""

    poll_interval_seconds: int | None
    blocked: bool | None
    desired_generation: int | None
    has_signed_ops: bool | None


def expect_int(value: object) -> int | None:
    # 900.0 is an integer, too; 1e99 is too large to be exact.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    # Not isinstance: True is an int.
    if type(value) is int:
        return value
    return None


def expect_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return None


def build_envelope(reply: Mapping[str, object]) -> ControlEnvelope:
    """Build the envelope with None for each value of another type than expected."""
    return ControlEnvelope(
        poll_interval_seconds=expect_int(reply.get("poll_interval_seconds")),
        blocked=expect_bool(reply.get("blocked")),
        desired_generation=expect_int(reply.get("desired_generation")),
        has_signed_ops=expect_bool(reply.get("has_signed_ops")),
    )


# ---- HTTP client ---------------------------------------------------------------------------------

# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH
WRONG_NAME_CODES: Final = (62, 64)
# X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT, _DEPTH_ZERO_SELF_SIGNED_CERT, _SELF_SIGNED_CERT_IN_CHAIN,
# _UNABLE_TO_GET_ISSUER_CERT_LOCALLY and _UNABLE_TO_VERIFY_LEAF_SIGNATURE
UNKNOWN_CA_CODES: Final = (2, 18, 19, 20, 21)


class TimeLimitExceeded(Exception):
    """A request takes too long.  Not an OSError: the standard library catches those."""


class ConnectFailure(Exception):
    """Connecting failed; `cause` is a key of the hints."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def find_cause(exc: Exception) -> str:
    """Return why a request got no response, as a key of the hints."""
    if isinstance(exc, ConnectFailure):
        return exc.cause
    if isinstance(exc, TimeLimitExceeded | TimeoutError):
        return "timeout"
    if isinstance(exc, ssl.SSLCertVerificationError):
        if exc.verify_code in WRONG_NAME_CODES:
            return "wrong name"
        if exc.verify_code in UNKNOWN_CA_CODES:
            return "unknown CA"
        return "bad certificate"
    if isinstance(exc, ssl.SSLError):
        return "tls"
    if isinstance(exc, socket.gaierror):
        return "unknown host"
    if isinstance(exc, ConnectionRefusedError):
        return "refused"
    if isinstance(exc, http.client.RemoteDisconnected):
        # It is a BadStatusLine, too, but there was no response at all.
        return "no response"
    if isinstance(exc, http.client.BadStatusLine | http.client.UnknownProtocol):
        return "not HTTP"
    return "no response"


def handle_alarm(*_: object) -> None:
    # Python runs this between two of its own steps, so perhaps only after the timer was switched
    # off.  Then the call has ended; or somebody else has sent the signal.  Neither counts.
    if signal.getitimer(signal.ITIMER_REAL) != (0, 0):
        raise TimeLimitExceeded("timed out")


def limit_time(seconds: float, call: Callable[..., T], *arguments: Any) -> T:
    """Return call(*arguments), or raise TimeLimitExceeded in the middle of it after `seconds`.

    A socket's own time-out bounds a single read, so a server that sends a byte now and then could
    go on for ever.  SIGALRM interrupts whatever blocks: connecting, the TLS handshake, sending,
    reading.  The exception comes out of that call.  Only the lookup of a name is not interrupted;
    there it comes out when the lookup has ended.

    It works in the main thread only, which is the only one here.
    """
    signal.signal(signal.SIGALRM, handle_alarm)
    try:
        # Again each second, because Python drops an exception that is raised in a finalizer.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        return call(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def open_socket(host: str, port: int) -> socket.socket:
    """Connect to the first address of a server that answers.

    Each address has CONNECT_SECONDS, so that one that swallows packets leaves time for the next.
    """
    try:
        sock = socket.create_connection((host, port), CONNECT_SECONDS, all_errors=True)
    except TimeLimitExceeded:
        raise ConnectFailure("connect timeout", "connection timed out") from None
    except ExceptionGroup as group:
        # One error for each address.  getaddrinfo puts those last to which this host has no route,
        # so the first says most.
        if isinstance(group.exceptions[0], TimeoutError):
            raise ConnectFailure("connect timeout", "connection timed out") from None
        raise group.exceptions[0] from None

    # From here on, limit_time alone decides: a slow TLS handshake may take longer.
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Connection(http.client.HTTPConnection):
    """Connects in a step of its own, and reads a refusal that comes early."""

    sock: Any

    def connect(self) -> None:
        self.sock = open_socket(self.host, self.port)

    def send(self, data: Any) -> None:
        # First, so that its errors are not passed over below.
        if self.sock is None:
            self.connect()
        # A server that refuses a request may close the connection before it has read all of it.
        # Its response is there to be read all the same, and says why.  If there is none, reading
        # raises the error.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            super().send(data)


class TLSConnection(Connection):
    """Checks the server's certificate before anything is sent."""

    default_port = 443

    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        super().__init__(address)
        self._context = context

    def connect(self) -> None:
        super().connect()
        self.start_tls()

    def start_tls(self) -> None:
        try:
            # The handshake by itself: wrap_socket would return without one, and so without TLS, if
            # the connection was just reset.
            self.sock = self._context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            problem = "connection closed or reset during the TLS handshake"
            raise ConnectFailure("handshake", problem) from None


class PinnedConnection(TLSConnection):
    """Accepts exactly one certificate, and sends nothing before it has seen that one."""

    def __init__(self, address: str, fingerprint: str) -> None:
        context = new_tls_context()
        # The fingerprint replaces the check of chain and host name.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(address, context)
        self._fingerprint = fingerprint.replace(":", "").lower()

    def connect(self) -> None:
        super().connect()
        certificate = self.sock.getpeercert(binary_form=True)
        fingerprint = hashlib.sha256(certificate).hexdigest()
        if fingerprint != self._fingerprint:
            self.close()
            raise ConnectFailure("pin", f"its certificate has the SHA-256 {fingerprint.upper()}")


def new_tls_context() -> ssl.SSLContext:
    """Return a context that checks chain and host name, but does not know any CA yet."""
    # Not ssl.create_default_context, which reads SSLKEYLOGFILE, and on Python 3.13 sets
    # VERIFY_X509_STRICT, which most CAs that Proxmox made before March 2026 fail.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def build_tls_context(section: str, ca_file: str) -> ssl.SSLContext:
    """Return a context with the CAs of a file, or of the system.  Raises ConfigError."""
    try:
        context = new_tls_context()
        if not ca_file:
            context.load_default_certs()
            return context
    except OSError as exc:
        problem = f"this host's OpenSSL refuses TLS ({describe(exc)})"
        raise ConfigError(f"config: {problem}; check openssl.cnf and $OPENSSL_CONF") from None

    try:
        context.load_verify_locations(ca_file)
    except (OSError, ValueError, TypeError) as exc:
        problem = f"{sanitize(ca_file)}: no usable PEM file ({describe(exc)})"
        if ca_file.startswith("/etc/pve/"):
            problem += "; check systemctl status pve-cluster, which provides this folder"
        raise ConfigError(f"config: {section}.ca_file: {problem}") from None
    return context


def read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the body, or the beginning of one that is too long; HTTPException if it is cut off."""
    body = response.read(max_bytes + 1)
    # With a limit, read() passes over a cut.  `length` is what is missing of Content-Length.
    if response.length and len(body) <= max_bytes:
        raise http.client.IncompleteRead(body, response.length)
    return body


def parse_reply(content: bytes, max_bytes: int, status: int) -> dict[str, Any]:
    """Return the JSON object in a response.  Raises ValueError or RecursionError."""
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes} bytes")
    if not content:
        if status != 204:
            # Some web servers answer an empty 200 to any path.
            raise ValueError("empty")
        return {}
    reply = json.loads(content.decode("utf-8-sig"))
    if not isinstance(reply, dict):
        raise ValueError("not a JSON object")
    return reply


def parse_retry_after(text: str) -> int | None:
    """Return Retry-After in seconds, at most an hour; None for a date, which is ignored."""
    # int() refuses thousands of digits.
    if not re.fullmatch("[0-9]{1,100}", text):
        return None
    return min(int(text), MAX_POLL_SECONDS)


class Client:
    """What both clients share: one request within a time limit, and errors with a hint."""

    method: str
    # What to do about a failure, by its cause or HTTP status; names in braces are filled in.
    hints: Mapping[str | int, str]
    # Of the body of a response
    max_bytes: int

    def __init__(
        self, section: str, config: ProxmoxConfig | HubConfig, logger: logging.Logger
    ) -> None:
        self.url = config.url.rstrip("/")
        # host[:port]
        self.address = urllib.parse.urlsplit(config.url).netloc
        # The address as messages say it
        self.route = self.address
        self.timeout_seconds = config.timeout_seconds
        self.context = build_tls_context(section, config.ca_file)
        self.logger = logger
        self._has_ca_file = bool(config.ca_file)
        # What stands for the names in braces
        self._hint_words = {"seconds": str(config.timeout_seconds)}

    def open_response(self, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Connect, send a request, and return the response with its body unread."""
        raise NotImplementedError

    def hint(self, cause: str | int, path: str = "") -> str:
        """Return what to do about a failure, by its cause or HTTP status."""
        if cause == "unknown CA" and self._has_ca_file:
            cause = "not from ca_file"
        hint = self.hints.get(cause, self.hints["other status"])
        return hint.format_map(self._hint_words)

    def message(self, path: str, problem: str, cause: str | int) -> str:
        """Return "GET /path: what happened; what to do", without the query, which often differs."""
        return f"{self.method} {path.partition('?')[0]}: {problem}; {self.hint(cause, path)}"

    def request(self, path: str, body: bytes | None, seconds: float) -> dict[str, Any]:
        """Return the JSON object that the server replies within this time.

        Raises TransportError or HTTPError.
        """
        start = time.monotonic()
        outcome: object = "no response"
        try:
            response, content = limit_time(seconds, self._exchange, path, body)
            outcome = response.status
        except (
            ConnectFailure,
            TimeLimitExceeded,
            http.client.HTTPException,
            OSError,
            UnicodeError,
        ) as exc:
            # UnicodeError if a label of the host's name is too long.  "from None", because the
            # original exception may quote what the server sent.
            raise self._transport_error(path, exc) from None
        finally:
            milliseconds = (time.monotonic() - start) * 1000
            self.logger.debug("%s %s: %s, %.0f ms", self.method, path, outcome, milliseconds)

        if not 200 <= response.status < 300:
            raise self._http_error(path, response)
        try:
            return parse_reply(content, self.max_bytes, response.status)
        except (ValueError, RecursionError) as exc:
            problem = str(exc)
            encoding = response.headers.get("Content-Encoding")
            if encoding:
                problem = f"compressed by {encoding}"
            raise self.unusable(path, problem, response.status) from None

    def _exchange(self, path: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """Return a response and its body, which stays unread if the status is an error."""
        content = b""
        with self.open_response(path, body) as response:
            if 200 <= response.status < 300:
                content = read_body(response, self.max_bytes)
        return response, content

    def unusable(self, path: str, reason: str, status: int = 200) -> TransportError:
        """Return the error for a success that this server would never send."""
        problem = f"{status}, but the reply is unusable ({sanitize(reason)})"
        return TransportError(self.message(path, problem, "unusable"))

    def _transport_error(self, path: str, exc: Exception) -> TransportError:
        cause = find_cause(exc)
        problem = sanitize(describe(exc))
        if cause == "not HTTP":
            problem = f"it does not answer in HTTP/1.1 ({sanitize(str(exc), 40)})"
        message = self.message(path, f"{self.route}: {problem}", cause)
        if cause == "timeout":
            return RequestTimeout(message)
        return TransportError(message)

    def _http_error(self, path: str, response: http.client.HTTPResponse) -> HTTPError:
        status = response.status
        problem = sanitize(f"{status} {response.reason}".rstrip())
        cause: str | int = status
        if 300 <= status < 400:
            cause = "redirect"
            problem += f" to {sanitize(response.headers.get('Location', 'nowhere'))}"
        retry_after = parse_retry_after(response.headers.get("Retry-After", "").strip())
        message = self.message(path, problem, cause)
        return HTTPError(message, status=status, retry_after=retry_after)


# ---- Proxmox client ------------------------------------------------------------------------------

# The types of guests, and what they are called in messages
GUEST_TYPES: Final[Mapping[str, str]] = {"lxc": "containers", "qemu": "virtual machines"}

PROXMOX_HINTS: Final[Mapping[str | int, str]] = {
    "unknown host": "check the host name in proxmox.url, and this host's name servers",
    "connect timeout": "check that the host in proxmox.url is up, firewalls on the way, and this "
    "host's name servers",
    "refused": "check systemctl status pveproxy, and host and port in proxmox.url",
    "tls": "check host and port in proxmox.url, and that Proxmox speaks TLS 1.2 or 1.3 and "
    "demands no client certificate",
    "handshake": "check systemctl status pveproxy, and ALLOW_FROM in /etc/default/pveproxy",
    "pin": "compare proxmox.fingerprint with pvenode cert info",
    "wrong name": "use a name from the certificate in proxmox.url (pvenode cert info lists them)",
    "unknown CA": "set proxmox.ca_file to the server's root CA (Proxmox's own is "
    "/etc/pve/pve-root-ca.pem); or the server does not send its intermediate certificates",
    "not from ca_file": "if the certificate was replaced by a public one, set proxmox.ca_file to "
    '"" and use a name from the certificate in proxmox.url; if that file has changed since the '
    "agent started, restart the agent; or the server does not send its intermediate certificates",
    "bad certificate": "renew the certificate or its CA, or fix this host's clock",
    "no time left": "raise proxmox.timeout_seconds ({seconds})",
    "timeout": "check systemctl status pveproxy pve-cluster, network and name servers, or raise "
    "proxmox.timeout_seconds ({seconds})",
    "no response": "check systemctl status pveproxy pve-cluster, and proxmox.url (http or https, "
    "host, port)",
    "not HTTP": "check host and port in proxmox.url",
    "unusable": "check proxmox.url, and what is in front of Proxmox",
    "redirect": "Proxmox must answer at this exact path, without a login; if only https or the "
    "host differs, change proxmox.url",
    "storage": "check pvesm status, and what the storage runs on; pveproxy gives up after 30 s",
    401: "check proxmox.token_id and proxmox.token_secret; pveum user token list {user} and pveum "
    "user list show what is expired or disabled",
    403: "run: pveum acl modify / --users {user} --tokens {token} --roles PVEAuditor; if pveum acl "
    "list shows it already, a role or NoAccess on a lower path overrides it",
    500: "check journalctl -u pveproxy -u pve-cluster, unless a guest was just removed or migrated",
    # pveproxy could not pass the request on to pvedaemon or to another node.
    **dict.fromkeys(
        range(595, 600), "check that node {node} is up, and systemctl status pvedaemon on it"
    ),
    "other status": "check systemctl status pveproxy pve-cluster",
}


class ProxmoxClient(Client):
    """Reads one node."""

    # The only one, whatever is asked
    method = "GET"
    hints = PROXMOX_HINTS
    max_bytes = 8 << 20

    def __init__(self, config: ProxmoxConfig) -> None:
        super().__init__("proxmox", config, LOG)
        self.node = config.node
        self.token_id = config.token_id
        self.extras = frozenset(config.extras)
        self._hint_words["node"] = config.node
        self._hint_words["user"] = shlex.quote(config.token_id.rpartition("!")[0])
        self._hint_words["token"] = shlex.quote(config.token_id)

        self._headers = {"Authorization": f"PVEAPIToken={config.token_id}={config.token_secret}"}
        self._fingerprint = config.fingerprint
        # Kept within a session, because a TLS handshake takes six times as long as a call
        self._connection: Connection | None = None
        # When the session has to end, by time.monotonic
        self._deadline = math.inf

    @contextlib.contextmanager
    def session(self, deadline: float) -> Iterator[None]:
        """Limit all requests together, by time.monotonic, and close the connection at the end."""
        self._deadline = deadline
        try:
            yield
        finally:
            self._deadline = math.inf
            # pveproxy would close it after 5 s.
            self.close()

    def get(self, path: str, expected: type[T]) -> T:
        """Return a response's `data`, a list or dict as expected.  Raises AgentError."""
        seconds = min(self.timeout_seconds, self._deadline - time.monotonic())
        if seconds <= 0:
            raise self._no_time_left(path)
        try:
            data = self.request(path, None, seconds).get("data")
        except AgentError:
            # A part of the request or of the response may still be to come on the connection.
            self.close()
            raise
        if not isinstance(data, expected):
            raise self.unusable(path, f"data is {type(data).__name__}")
        return data

    def open_response(self, path: str, body: bytes | None) -> http.client.HTTPResponse:
        if self._connection is not None:
            # The server may have closed a kept connection.  Then a new one decides.
            try:
                return self._send(self._connection, path)
            except (ConnectionError, ssl.SSLError):
                self.close()
        self._connection = self._new_connection()
        return self._send(self._connection, path)

    def _new_connection(self) -> Connection:
        if self._fingerprint:
            return PinnedConnection(self.address, self._fingerprint)
        if self.url.startswith("http:"):
            # For a loopback address alone, see load_config.
            return Connection(self.address)
        return TLSConnection(self.address, self.context)

    def _send(self, connection: Connection, path: str) -> http.client.HTTPResponse:
        connection.request(self.method, f"/api2/json{path}", headers=self._headers)
        return connection.getresponse()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _no_time_left(self, path: str) -> TransportError:
        return TransportError(self.message(path, "no time left in this cycle", "no time left"))

    def hint(self, cause: str | int, path: str = "") -> str:
        # Only these calls depend on the storage itself.
        is_storage_path = path.startswith(f"/nodes/{self.node}/storage/")
        if is_storage_path and cause in ("timeout", "no response", 500, 596):
            cause = "storage"
        return super().hint(cause, path)

    def version(self) -> str | None:
        """Return the version of Proxmox VE (`pvesh get /version`)."""
        return get_text(self.get("/version", dict), "version")

    def privileges(self, path: str = "") -> set[str]:
        """Return what the token may do at a path, or at any path that Proxmox shows.

        `pvesh get /access/permissions --path PATH`; needs no privilege.  Only with a path does it
        include what is inherited.
        """
        query = ""
        if path:
            query = f"?path={path}"
        names: set[str] = set()
        for privileges in self.get(f"/access/permissions{query}", dict).values():
            if isinstance(privileges, dict):
                names.update(privileges)
        return names

    def resources(self) -> Entries:
        """Return the cluster's entries in `pvesh get /cluster/resources`, this node's among them.

        Guests need VM.Audit, storages Datastore.Audit.  pveproxy answers this itself; /nodes/N/lxc
        costs pvedaemon 15 to 22 ms of CPU for each running container, and a container that hangs
        blocks one of its workers for good.
        """
        path = "/cluster/resources"
        entries = [entry for entry in self.get(path, list) if isinstance(entry, dict)]
        nodes = [entry.get("node") for entry in entries if entry.get("type") == "node"]
        if self.node not in nodes:
            names = ", ".join(sorted(str(node) for node in nodes))
            hint = f"set proxmox.node to one of (case-sensitive): {sanitize(names)}"
            raise AgentError(f"GET {path}: node {self.node} is not listed; {hint}")
        # To leave out a guest would claim that it does not exist.
        own = [entry for entry in entries if entry.get("node") == self.node]
        if not all(get_vmid(entry) for entry in own if str(entry.get("type")) in GUEST_TYPES):
            raise self.unusable(path, "a guest without a valid vmid")
        return entries

    def node_status(self) -> Mapping[str, object]:
        """Return `pvesh get /nodes/NODE/status` (Sys.Audit on /nodes/NODE)."""
        return self.get(f"/nodes/{self.node}/status", dict)

    def guest_config(self, vmid: int, guest_type: str = "lxc") -> Mapping[str, object]:
        """Return `pvesh get /nodes/NODE/TYPE/VMID/config --current 1` (VM.Audit on /vms/VMID)."""
        return self.get(f"/nodes/{self.node}/{guest_type}/{vmid}/config?current=1", dict)

    def archives(self, storage: str) -> Sequence[object]:
        """Return the backups on a storage (Datastore.Audit on it).

        `pvesh get /nodes/NODE/storage/STORAGE/prunebackups --prune-backups keep-all=1`: a GET
        prunes nothing, and it is the only call that shows backups to a read-only token.
        """
        name = urllib.parse.quote(storage, safe="")
        path = f"/nodes/{self.node}/storage/{name}/prunebackups?prune-backups=keep-all%3D1"
        if self._deadline - time.monotonic() < self.timeout_seconds:
            # A healthy storage might not answer in what is left, and be taken for one that hangs.
            raise self._no_time_left(path)
        return self.get(path, list)

    def tasks(self, since: int) -> Sequence[object]:
        """Return the newest tasks that have ended and began after a Unix time (Sys.Audit).

        `pvesh get /nodes/NODE/tasks --source archive --since SECONDS --limit 50`; pveproxy answers
        it itself.
        """
        query = f"source=archive&since={since}&limit={MAX_TASKS}"
        return self.get(f"/nodes/{self.node}/tasks?{query}", list)


# ---- systemd -------------------------------------------------------------------------------------


class CloudflaredProber(Protocol):
    def probe(self) -> str:
        """Return the unit's state.  Raises AgentError."""


class SystemctlProber:
    """Asks systemd."""

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def probe(self) -> str:
        """Ask `systemctl is-active UNIT`.  Raises AgentError."""
        command = ["systemctl", "is-active", "--", self.unit]
        try:
            done = subprocess.run(
                command,
                # No secret from our environment reaches the child.
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SYSTEMCTL_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise AgentError(f"{' '.join(command)}: {sanitize(describe(exc))}") from None

        # The exit status does not decide: it is not 0 for most states.
        state = done.stdout.decode(errors="replace").strip()
        if not re.fullmatch("[a-z-]{2,20}", state):
            reason = done.stderr.decode(errors="replace").partition("\n")[0] or "printed no state"
            raise AgentError(f"{' '.join(command)}: {sanitize(reason)}")
        return state


def notify(message: str) -> None:
    """Send a message to systemd if it listens (sd_notify(3)); never waits, never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        # systemd's notation for the abstract namespace
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message.encode(), socket.MSG_DONTWAIT, address)


def notify_status(summary: str) -> None:
    """Tell systemd that the agent is alive, and how it goes."""
    notify(f"READY=1\nWATCHDOG=1\nSTATUS={summary}")


# ---- collector -----------------------------------------------------------------------------------

# Where the configuration has a guest's name
CONFIG_NAME: Final = {"lxc": "hostname", "qemu": "name"}


def select(entries: Entries, *types: str) -> Entries:
    """Return the entries of these types, sorted as in the report."""
    chosen = [entry for entry in entries if entry.get("type") in types]
    return sorted(chosen, key=lambda entry: (get_vmid(entry), str(entry.get("storage"))))


def get_list_age(node_status: object, node_entry: object) -> float:
    """Return how many seconds ago pvestatd measured what is listed; infinity if that is unknown.

    The status has the node's uptime now, the list its uptime at pvestatd's last round; the
    difference is the list's age.
    """
    now = get_int(node_status, "uptime")
    measured = get_int(node_entry, "uptime")
    if now is None or measured is None:
        return math.inf
    if now < measured:
        # The list is from before a reboot.
        return math.inf
    return now - measured


def are_unknown(guests: Entries) -> bool:
    return all(entry.get("status") == "unknown" for entry in guests)


def find_unmeasured(guests: Entries) -> str:
    """Return which guests pvestatd does not measure, in words, or an empty string.

    A single guest that is listed as unknown may just be new.
    """
    if guests and are_unknown(guests):
        return "guests"
    for guest_type, kind in GUEST_TYPES.items():
        of_type = select(guests, guest_type)
        if len(of_type) > 1 and are_unknown(of_type):
            return kind
    return ""


def holds_backups(entry: Mapping[str, object]) -> bool:
    """Return whether a storage may be asked; a Proxmox Backup Server has its own API and tokens."""
    if not get_text(entry, "storage") or entry.get("plugintype") == "pbs":
        return False
    content = get_text(entry, "content") or ""
    return "backup" in content.split(",")


class Collector:
    """Reads the node once and builds the report.

    If the list or the node's status cannot be read, or a list is empty and the token may be the
    reason, there is no report.  A guest whose configuration fails, and a storage whose backups
    fail, is unknown; a guest whose configuration is only refused is what the list says.  Figures
    that are old or invalid are None.  Tasks that fail are left out.  A check of the token that
    fails is a warning.
    """

    def __init__(
        self,
        proxmox: ProxmoxClient,
        cloudflared: CloudflaredProber,
        *,
        host_id: str,
        agent_version: str = __version__,
        logger: logging.Logger = LOG,
    ) -> None:
        self.proxmox = proxmox
        self.cloudflared = cloudflared
        self.host_id = host_id
        self.agent_version = agent_version
        self._logger = logger
        self._warn = WarnOnce(logger)
        # The storage that did not answer in time, and when storages may be asked again
        self._hung_storage = ""
        self._pause_end = 0.0

        self._guest_types = ["lxc"]
        if "qemu" in proxmox.extras:
            self._guest_types.append("qemu")
        self._reads_backups = "backups" in proxmox.extras
        self._reads_storages = self._reads_backups or "storage" in proxmox.extras

    def collect(self, *, is_selftest: bool = False) -> HostReport:
        """Return the report.

        A self-test also looks for excess privileges on paths that the agent does not read, and says
        which guests are not reported.  Raises AgentError if the list or the node's status cannot be
        read, if a list is empty and the token may be the reason, or if the node has just booted.
        """
        seconds = COLLECT_TIMEOUT_FACTOR * self.proxmox.timeout_seconds
        with self.proxmox.session(time.monotonic() + seconds):
            cluster = self.proxmox.resources()
            node_status = self.proxmox.node_status()

            entries = [entry for entry in cluster if entry.get("node") == self.proxmox.node]
            node_entry = select(entries, "node")[0]
            guest_entries = select(entries, *self._guest_types)
            storage_entries: Entries = []
            if self._reads_storages:
                storage_entries = select(entries, "storage")
            self._check_token(guest_entries, storage_entries, all_paths=is_selftest)
            self._check_rename(cluster, entries)
            if is_selftest:
                self._log_unreported(entries)

            age = get_list_age(node_status, node_entry)
            is_fresh = age <= MAX_LIST_AGE_SECONDS
            self._check_pvestatd(is_fresh, node_status, node_entry, guest_entries)
            if not is_fresh:
                node_entry = {}
            host = build_host(self.proxmox.node, node_status, node_entry)
            guests = self._read_guests(guest_entries, host.cpu_count, is_fresh)
            storages, backups = self._read_storages(storage_entries, age, is_fresh)
            tasks = self._attempt("audit_tail", self._fetch_tasks)

        unit_state = self._attempt("cloudflared.status", self.cloudflared.probe)
        return HostReport(
            host_id=self.host_id,
            agent_version=self.agent_version,
            reported_at=format_time(),
            host=host,
            guests=tuple(guests),
            cloudflared=Cloudflared(status=unit_state or "unknown"),
            storage_targets=tuple(storages),
            backups=tuple(backups),
            # There is no other way to say that the tasks are unknown; the warning does.
            audit_tail=tuple(tasks or ()),
        )

    def _attempt(self, topic: str, read: Callable[..., T], *arguments: object) -> T | None:
        """Return read(*arguments), or None with a warning: a missing part stops no report."""
        try:
            value = read(*arguments)
        except Exception as exc:
            problem = f"{topic} is unknown: {describe_failure(exc)}"
            self._warn.update(topic, problem, traceback=is_bug(exc))
            return None
        self._warn.resolve(topic)
        return value

    def _check_token(self, guests: Entries, storages: Entries, *, all_paths: bool) -> None:
        """Warn if the token may see too little, or can do more than read.

        Raises AgentError if a list is empty and the token may be the reason.
        """
        on_guests: set[str] = set()
        on_storages: set[str] = set()
        try:
            # A guest or storage that does not exist shows what each one inherits from /vms or
            # /storage, unless the ACL has an entry of its own for it.  One that is hidden by such
            # an entry is not noticed: Proxmox shows it nowhere.
            on_guests = self.proxmox.privileges("/vms/999999999")
            if self._reads_storages:
                on_storages = self.proxmox.privileges("/storage/999999999")
            # Sys.Audit is not checked: without it, reading the status would have failed.
            others = self.proxmox.privileges(f"/nodes/{self.proxmox.node}")
            if all_paths:
                others |= self.proxmox.privileges()
        except AgentError as exc:
            # An empty list proves nothing now; otherwise this serves only warnings.
            if not guests or (self._reads_storages and not storages):
                raise
            self._warn.update("token", f"the token could not be checked: {exc}")
            return

        self._warn.resolve("token")
        self._check_visibility("VM.Audit", "/vms", on_guests, guests)
        if self._reads_storages:
            self._check_visibility("Datastore.Audit", "/storage", on_storages, storages)
        self._check_excess(on_guests | on_storages | others)

    def _check_visibility(
        self, privilege: str, area: str, privileges: set[str], entries: Entries
    ) -> None:
        """Warn if the token may not see all entries.  Raises AgentError if there are none.

        Proxmox does not refuse to list what a token may not see, it silently omits it.
        """
        topic = f"{privilege} on {area}"
        problem = ""
        if privilege not in privileges:
            lacks = f"token {self.proxmox.token_id} lacks {topic}, so entries may be missing"
            problem = f"{lacks}; {self.proxmox.hint(403)}"
            if not entries:
                raise AgentError(problem)
        self._warn.update(topic, problem)

    def _check_excess(self, privileges: set[str]) -> None:
        """Warn if the token can do more than read."""
        excess = sorted(name for name in privileges if not name.endswith(".Audit"))
        problem = ""
        if excess:
            hint = "remove every role except PVEAuditor; pveum acl list shows them"
            if self.proxmox.token_id.startswith("root@pam!"):
                # root has all privileges, without any role.
                hint = "use a token of a user of its own"
            can = f"token {self.proxmox.token_id} can do more than read"
            problem = f"{can}: {sanitize(', '.join(excess))}; {hint}"
        self._warn.update("excess privileges", problem)

    def _check_rename(self, cluster: Entries, entries: Entries) -> None:
        """Warn if the node has no guests, but another one that is offline has."""
        nodes = select(cluster, "node")
        offline = [node.get("node") for node in nodes if node.get("status") == "offline"]
        guests = select(cluster, *GUEST_TYPES)
        names = {str(guest.get("node")) for guest in guests if guest.get("node") in offline}

        problem = ""
        if names and not select(entries, *GUEST_TYPES):
            others = sanitize(", ".join(sorted(names)))
            problem = (
                f"node {self.proxmox.node} has no guests, but {others}, which is offline, has; was "
                "this host renamed? check proxmox.node, and the folders in /etc/pve/nodes"
            )
        self._warn.update("renamed node", problem)

    def _log_unreported(self, entries: Entries) -> None:
        machines = select(entries, "qemu")
        if machines and "qemu" not in self._guest_types:
            machine_count = plural(len(machines), "virtual machine")
            self._logger.info("not reported: %s; add qemu to proxmox.extras", machine_count)

    def _check_pvestatd(
        self, is_fresh: bool, node_status: object, node_entry: object, guests: Entries
    ) -> None:
        """Warn if pvestatd does not measure.

        Proxmox repeats pvestatd's last values for 5 minutes, and then lists all guests as unknown.
        Raises AgentError after a boot until pvestatd's first round is over.
        """
        if get_text(node_entry, "status") == "offline":
            problem = (
                f"Proxmox lists node {self.proxmox.node} as offline; check pvecm status, and "
                "systemctl status corosync pve-cluster"
            )
            self._warn.update("pvestatd", problem)
            return

        hint = "check systemctl status pvestatd (usual cause: a storage that does not answer)"
        unmeasured = find_unmeasured(guests)
        problem = ""
        if not is_fresh:
            problem = f"pvestatd has measured nothing in the last {MAX_LIST_AGE_SECONDS} s, so "
            problem += f"all guests are unknown; {hint}"
        elif unmeasured:
            problem = f"pvestatd does not measure the {unmeasured}, so all are unknown; {hint}"

        uptime = get_int(node_status, "uptime")
        if problem and uptime is not None and uptime < BOOT_SECONDS:
            raise AgentError(f"Proxmox has not measured its guests yet; {hint} if this lasts")
        self._warn.update("pvestatd", problem)

    def _read_guests(self, entries: Entries, cpu_count: int | None, is_fresh: bool) -> list[Guest]:
        """Read each guest, and warn once of all that fail, because they mostly have one cause."""
        failures: list[str] = []
        guests = [self._read_guest(entry, cpu_count, is_fresh, failures) for entry in entries]

        problem = ""
        if len(failures) == 1:
            problem = f"a guest's configuration cannot be read, so it is unknown: {failures[0]}"
        elif failures:
            count = f"the configurations of {len(failures)} guests cannot be read"
            problem = f"{count}, so they are unknown; the first: {failures[0]}"
        self._warn.update("guests", problem)
        return guests

    def _read_guest(
        self,
        entry: Mapping[str, object],
        cpu_count: int | None,
        is_fresh: bool,
        failures: list[str],
    ) -> Guest:
        """Return a guest; if its configuration fails, it is unknown; `failures` gets the message.

        If that is only refused, the list has what is needed.
        """
        guest_type = str(entry["type"])
        status = "unknown"
        if is_fresh:
            status = get_text(entry, "status") or "unknown"

        config = None
        spec = None
        try:
            config = self.proxmox.guest_config(get_vmid(entry), guest_type)
            spec = build_spec(config, guest_type, cpu_count)
        except AgentError as exc:
            self._logger.debug("%s", exc)
            if status == "unknown":
                # A new guest, or one that pvestatd's warning covers: there is nothing to add.
                pass
            elif isinstance(exc, HTTPError) and exc.status == 403:
                # A guest that is listed may be seen, so this is not about VM.Audit.  Proxmox VE
                # 9.1 refuses a configuration that holds a container's environment variables.
                spec = build_listed_spec(entry)
            else:
                status = "unknown"
                # Its message alone: the error itself holds on to all that was read.
                failures.append(str(exc))

        details = None
        if "details" in self.proxmox.extras:
            details = build_details(entry, config, status=status, is_fresh=is_fresh)
        # A new guest has its name only in its configuration.
        name = get_text(entry, "name") or get_text(config, CONFIG_NAME[guest_type])
        return Guest(
            vmid=get_vmid(entry),
            type=guest_type,
            name=name or "",
            status=status,
            spec=spec,
            details=details,
        )

    def _read_storages(
        self, entries: Entries, age: float, is_fresh: bool
    ) -> tuple[list[StorageTarget], list[Backup]]:
        """Return the storages and, if that extra is on, the newest backups on them."""
        available = [
            entry.get("storage") for entry in entries if entry.get("status") == "available"
        ]
        if self._hung_storage not in available or time.monotonic() >= self._pause_end:
            # Proxmox lists it as not available, or a day has passed.
            self._hung_storage = ""

        storages = []
        backups: list[Backup] = []
        for entry in entries:
            storage = build_storage(entry, is_fresh=is_fresh)
            if self._reads_backups and holds_backups(entry) and storage.status == "available":
                name = storage.storage
                newest = self._attempt(f"storage {name}", self._fetch_backups, name, age)
                if newest is None:
                    # An available storage without backups would claim that there are none.
                    storage = build_storage(entry, is_fresh=False)
                else:
                    backups += newest
            storages.append(storage)
        return storages, sorted(backups, key=lambda item: (item.vmid, item.type, item.storage))

    def _fetch_backups(self, storage: str, age: float) -> list[Backup]:
        """Return the newest backups on a storage.  Raises AgentError.

        pvedaemon has three workers, and each request to a storage that hangs blocks one for good.
        So after one that hung, and if the list is not quite new, no storage is asked.
        """
        if self._hung_storage:
            raise AgentError(
                f"storage {self._hung_storage} did not answer in time, so no storage is asked for "
                "its backups until Proxmox lists that one as not available, a day has passed, or "
                "the agent is restarted; check pvesm status"
            )
        if age > MAX_STORAGE_AGE_SECONDS:
            raise AgentError(
                "no storage is asked for its backups, since pvestatd has measured none in the last "
                f"{MAX_STORAGE_AGE_SECONDS} s"
            )
        try:
            archives = self.proxmox.archives(storage)
        except AgentError as exc:
            # 596: pveproxy itself has waited for 30 s.
            is_596 = isinstance(exc, HTTPError) and exc.status == 596
            if is_596 or isinstance(exc, RequestTimeout):
                self._hung_storage = storage
                self._pause_end = time.monotonic() + STORAGE_PAUSE_SECONDS
            raise
        backups, problem = build_backups(storage, archives)
        if problem:
            problem = f"storage {storage}: {problem}"
        self._warn.update(f"archives on {storage}", problem)
        return backups

    def _fetch_tasks(self) -> list[AuditEntry]:
        """Return the tasks of the last day, if that extra is on.  Raises AgentError."""
        if "tasks" not in self.proxmox.extras:
            return []
        since = int(time.time()) - TASK_SECONDS
        return build_audit_tail(self.proxmox.tasks(since))


# ---- hub client ----------------------------------------------------------------------------------

HUB_HINTS: Final[Mapping[str | int, str]] = {
    "unknown host": "check the host name in hub.url, and this host's name servers",
    "connect timeout": "check that the host in hub.url is up, firewalls on the way, and this "
    "host's name servers",
    "refused": "check that the hub is running, and host and port in hub.url",
    "handshake": "check the web server in front of the hub, and hub.url",
    "proxy": "check https_proxy and hub.url, and that the proxy allows and reaches the hub; or set "
    "no_proxy",
    "proxy login": "check user and password in https_proxy",
    "tls": "check host and port in hub.url, and that the hub speaks TLS 1.2 or 1.3 and demands no "
    "client certificate",
    "wrong name": "use a name from the certificate in hub.url",
    "unknown CA": "set hub.ca_file to the server's root CA; or the server does not send its "
    "intermediate certificates",
    "not from ca_file": "check that hub.ca_file has the server's root CA; if that file has changed "
    "since the agent started, restart the agent; or the server does not send its intermediate "
    "certificates",
    "bad certificate": "renew the certificate or its CA, or fix this host's clock",
    "timeout": "check the hub's log, network and name servers, or raise hub.timeout_seconds "
    "({seconds})",
    "no response": "check the hub's log, and hub.url (http or https, host, port)",
    "not HTTP": "check host and port in hub.url",
    "unusable": "check hub.url, and what is in front of the hub",
    "redirect": "the hub must answer at this exact path, without a login; if only https or the "
    "host differs, change hub.url",
    401: "check hub.api_key and hub.host_id, or remove another login in front of the hub",
    403: "check hub.api_key and hub.host_id, or remove another login in front of the hub",
    404: f"check hub.url, to which {REPORT_PATH} is added",
    405: f"check hub.url, to which {REPORT_PATH} is added",
    413: "let the hub, and the web server in front of it, accept 4 MiB",
    421: "the web server in front of the hub does not serve this name; check hub.url",
    429: "the hub asks the agent to wait",
    511: "this network wants a login before it lets anything through",
    # 520 to 530 are Cloudflare's.
    **dict.fromkeys(
        (502, 503, 504, *range(520, 528), 530), "the web server in front of the hub cannot reach it"
    ),
    "other status": "check the hub's log",
}


@dataclass(frozen=True, slots=True)
class Proxy:
    host: str
    port: int
    # user:password, percent-encoded, or empty
    login: str = field(repr=False)


def find_proxy(address: str) -> Proxy | None:
    """Return the proxy to the hub, if there is one.  Raises ConfigError."""
    url = urllib.request.getproxies().get("https", "")
    host = urllib.parse.urlsplit(f"//{address}").hostname
    if not url or is_loopback(host) or urllib.request.proxy_bypass(address):
        return None

    # TunnelConnection speaks to no others, so that the proxy's password goes nowhere else.
    login, host, port = r"(?P<login>[^@/:\s]+:[^@/\s]+)@", r"(?P<host>[^@/\s]+)", "(?P<port>[0-9]+)"
    match = re.fullmatch(f"http://({login})?{host}:{port}/?", url)
    if match is None or not is_root_url(f"http://{match['host']}:{match['port']}"):
        expected = "http://[user:password@]host:port, with @ as %40 and / as %2F"
        raise ConfigError(f"config: https_proxy: must be {expected}; or set no_proxy")
    return Proxy(match["host"].strip("[]"), int(match["port"]), match["login"] or "")


class TunnelConnection(TLSConnection):
    """Speaks TLS with the hub through a proxy, which is sent nothing but CONNECT before that."""

    def __init__(self, address: str, context: ssl.SSLContext, proxy: Proxy) -> None:
        super().__init__(address, context)
        self._proxy = proxy

    def connect(self) -> None:
        # Not http.client's own tunnel: Python 3.11 sends no Host, which some proxies demand, and
        # tells the proxy's status only in the text of an OSError.
        hub = f"{self.host}:{self.port}"
        if ":" in self.host:
            hub = f"[{self.host}]:{self.port}"
        lines = [f"CONNECT {hub} HTTP/1.1", f"Host: {hub}"]
        if self._proxy.login:
            login = urllib.parse.unquote_to_bytes(self._proxy.login)
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}")

        try:
            self.sock = open_socket(self._proxy.host, self._proxy.port)
            self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
            # Leaving this block closes the file from which the response is read, not the socket,
            # which is the tunnel.  Nothing of TLS is lost with it: there the client speaks first.
            with http.client.HTTPResponse(self.sock, method="CONNECT") as response:
                response.begin()
                status = response.status
        except (ConnectFailure, OSError) as exc:
            raise ConnectFailure("proxy", describe(exc)) from None
        except http.client.HTTPException:
            raise ConnectFailure("proxy", "it does not answer as a proxy") from None

        # Without its reason, which may be an echo of the password.
        problem = f"the proxy answers {status}"
        if status in (401, 407):
            raise ConnectFailure("proxy login", problem)
        if not 200 <= status < 300:
            raise ConnectFailure("proxy", problem)
        self.start_tls()


class HubClient(Client):
    """Posts reports, over a new connection each."""

    method = "POST"
    hints = HUB_HINTS
    max_bytes = 1 << 20

    def __init__(self, config: HubConfig, *, logger: logging.Logger = LOG) -> None:
        super().__init__("hub", config, logger)
        self._proxy = find_proxy(self.address)
        if self._proxy:
            self.route += f" through the proxy {self._proxy.host}:{self._proxy.port}"
        self._warn = WarnOnce(logger)
        self._headers = {
            "Authorization": f"Bearer {config.api_key}",
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": f"felhom-agent/{__version__}",
        }

    def open_response(self, path: str, body: bytes | None) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url + path, body, self._headers, method=self.method)
        # limit_time alone decides.
        request.timeout = None
        # Not urlopen, which would follow redirects, and use connections that leave a refused tunnel
        # open and give one address all the time.  do_open is what it calls in the end.
        try:
            return urllib.request.HTTPHandler().do_open(self._new_connection, request)
        except urllib.error.URLError as exc:
            # It wraps the error that says what happened.
            raise cast(OSError, exc.reason) from None

    def _new_connection(self, *_: object, **__: object) -> Connection:
        """Return a connection; do_open also passes the host and a time-out."""
        if self.url.startswith("http:"):
            # For a loopback address alone, see load_config.
            return Connection(self.address)
        if self._proxy:
            return TunnelConnection(self.address, self.context, self._proxy)
        return TLSConnection(self.address, self.context)

    def report(self, report: HostReport) -> ControlEnvelope:
        """Send one report and return the hub's reply.  Raises TransportError or HTTPError."""
        reply = self.request(REPORT_PATH, report.to_json().encode(), self.timeout_seconds)
        envelope = build_envelope(reply)
        self.logger.debug("%s", envelope)
        problem = ""
        if "poll_interval_seconds" in reply and envelope.poll_interval_seconds is None:
            problem = "the hub's poll_interval_seconds is not an integer and is ignored"
        self._warn.update("poll_interval_seconds", problem)
        return envelope


# ---- loop ----------------------------------------------------------------------------------------


def retry_delay(interval: float, failures: int, retry_after: int | None) -> float:
    """Return the seconds to wait after this number of failures in a row.

    15, 60, 240, … up to the interval, times 0.5 to 1.  Retry-After, of either server and at most an
    hour, times 1 to 2 can only lengthen that.  Random, so that agents do not return together.
    """
    # After six steps every interval is reached; without a limit a float would overflow some day.
    steps = min(failures - 1, 6)
    delay = min(interval, FIRST_RETRY_SECONDS * 4.0**steps) * random.uniform(0.5, 1)
    if retry_after is not None:
        delay = max(delay, retry_after * random.uniform(1, 2))
    return delay


class Loop:
    """Collects and reports forever."""

    def __init__(
        self,
        collector: Collector,
        client: HubClient,
        interval: float,
        *,
        logger: logging.Logger = LOG,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.collector = collector
        self.client = client
        self.interval = interval
        self.clock = clock
        self.wait = wait
        self._logger = logger
        self._warn = WarnOnce(logger)
        self._failures = 0

    def run(self, cycles: float = math.inf) -> None:
        """Run the first cycle at once, each further one when due."""
        while cycles > 0:
            cycles -= 1
            delay, summary = self.cycle()
            # The unit's WatchdogSec= is 3h.  No wait exceeds 2 h (Retry-After), and no cycle 36 min
            # (time-outs of 300 s: six times that for the collect, and once for the POST).
            notify_status(f"{summary}, next in {delay:.0f} s")
            self.wait(delay)

    def cycle(self) -> tuple[float, str]:
        """Collect and report once; return the seconds to wait, and a summary for systemd."""
        start = self.clock()
        try:
            report = self.collector.collect()
            envelope = self.client.report(report)
        except Exception as exc:
            # A bug must not stop the heartbeat either.
            return self._after_failure(exc)

        self._warn.resolve("report", f" after {plural(self._failures, 'failed attempt')}")
        self._failures = 0
        guests = plural(len(report.guests), "guest")
        self._logger.debug("report accepted, %s", guests)

        requested = envelope.poll_interval_seconds
        if requested is not None and clamp_poll(requested) != self.interval:
            self.interval = clamp_poll(requested)
            text = "interval is now %d s, the hub asked for %d s"
            self._logger.info(text, self.interval, requested)

        delay = max(0.0, start + self.interval - self.clock())
        return delay, f"last report {time.strftime('%H:%M:%S')} accepted, {guests}"

    def _after_failure(self, exc: Exception) -> tuple[float, str]:
        """Log the failure; return the seconds to wait, and a summary for systemd."""
        self._failures += 1
        problem = describe_failure(exc)
        self._warn.update("report", problem, traceback=is_bug(exc))

        retry_after = None
        if isinstance(exc, HTTPError):
            retry_after = exc.retry_after
        delay = retry_delay(self.interval, self._failures, retry_after)
        return delay, f"{plural(self._failures, 'failed attempt')}: {sanitize(problem, 200)}"


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 on success, 1 if collect or report failed, 2 if the configuration is invalid."""
    arguments = parse_arguments(argv)
    if arguments.print:
        # The files stand beside this one; the archive unpacks itself before it runs this.
        name = {"unit": "felhom-agent.service", "config": "agent.example.json"}[arguments.print]
        with open(os.path.join(os.path.dirname(__file__), name), "rb") as file:
            sys.stdout.buffer.write(file.read())
        return 0

    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    LOG.handlers = [handler]
    LOG.propagate = False
    LOG.setLevel(arguments.log_level.upper())

    hub = None
    try:
        config = load_config(arguments.config, os.environ)
        config.validate(hub=arguments.selftest != "proxmox")
        proxmox = ProxmoxClient(config.proxmox)
        if arguments.selftest != "proxmox":
            hub = HubClient(config.hub)
    except ConfigError as exc:
        for line in str(exc).split("\n"):
            LOG.error("%s", line)
        return 2

    if arguments.selftest == "config":
        print(json.dumps(config.redacted(), indent=2))
        LOG.info("the configuration is valid")
        return 0

    prober = SystemctlProber(config.cloudflared.unit)
    collector = Collector(proxmox, prober, host_id=config.hub.host_id)
    if hub is None:
        return selftest_proxmox(collector)
    if arguments.selftest:
        return selftest_hub(collector, hub)
    run_daemon(collector, hub, config.hub)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Report a Proxmox VE node to a hub, until a signal ends it."
    parser = argparse.ArgumentParser("felhom-agent", description=about, allow_abbrev=False)
    parser.add_argument("--config", metavar="PATH", help=f"default: {DEFAULT_PATH}")
    parser.add_argument(
        "--selftest",
        choices=("config", "proxmox", "hub"),
        help="config: check the configuration; proxmox: also read the node, and print the report; "
        "hub: also send it; then exit",
    )
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default="info")
    parser.add_argument(
        "--print",
        choices=("unit", "config"),
        help="unit: print felhom-agent.service; config: print agent.example.json; then exit",
    )
    parser.add_argument("--version", action="version", version=f"felhom-agent {__version__}")
    return parser.parse_args(argv)


def selftest_proxmox(collector: Collector) -> int:
    """Collect once, and print the report as JSON."""
    proxmox = collector.proxmox
    try:
        LOG.info("Proxmox VE %s", proxmox.version())
        with contextlib.suppress(AgentError):
            # collect would only say that it was refused.
            if "Sys.Audit" not in proxmox.privileges(f"/nodes/{proxmox.node}"):
                text = "without Sys.Audit on /nodes/%s, its metrics and tasks cannot be read"
                LOG.warning(text, proxmox.node)
        report = collector.collect(is_selftest=True)
    except Exception as exc:
        LOG.error("%s", describe_failure(exc), exc_info=is_bug(exc))
        return 1

    document = json.loads(report.to_json())
    if not report.host_id:
        # There need not be a hub section.
        del document["host_id"]
    print(json.dumps(document, indent=2))
    LOG.info("node %s was read", proxmox.node)
    return 0


def selftest_hub(collector: Collector, hub: HubClient) -> int:
    """Collect and report once, and print both the report and the hub's reply as JSON."""
    result: dict[str, Any] = {}
    try:
        report = collector.collect(is_selftest=True)
        result["report"] = json.loads(report.to_json())
        result["envelope"] = dataclasses.asdict(hub.report(report))
    except Exception as exc:
        result["error"] = describe_failure(exc)
        LOG.error("%s", result["error"], exc_info=is_bug(exc))

    if "report" in result:
        print(json.dumps(result, indent=2))
    if "error" in result:
        return 1
    LOG.info("report accepted by %s", hub.url)
    return 0


def run_daemon(collector: Collector, hub: HubClient, config: HubConfig) -> None:
    """Report until a signal ends the process."""

    def stop(*_: object) -> None:
        # Nothing is logged, because standard error may be a pipe that nobody reads; systemd logs
        # it anyway.  Not sys.exit: it raises an exception, which a finalizer can swallow.
        notify("STOPPING=1")
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    text = "started version=%s host_id=%s url=%s interval=%d"
    LOG.info(text, __version__, config.host_id, config.url, config.poll_seconds)
    notify_status("preparing the first report")
    Loop(collector, hub, config.poll_seconds).run()


if __name__ == "__main__":
    sys.exit(main())
