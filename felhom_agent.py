"""felhom-agent: report the state of one Proxmox VE node to a hub.

Once per interval the agent reads the node through the Proxmox API (GET requests only), asks systemd
whether the cloudflared tunnel is running, and posts one JSON document (`HostReport`) to `hub.url`.
Nothing else leaves the host.  The report is the heartbeat: if it stops, the hub raises the alarm.

The agent never changes the node, writes no file, follows no redirect, and runs no command other
than `systemctl is-active UNIT`.  The token secret is sent only to Proxmox and the API key only to
the hub; both are masked in everything the agent prints.  The hub can change the interval (60 to
3600 seconds) and, with Retry-After, postpone the next report by at most two hours; nothing else.

Read it from top to bottom: each section uses only those above it.  `main` at the end picks the
mode.  `Loop.cycle` is one heartbeat: `Collector.collect` builds the report, `HubClient.report`
sends it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import errno
import hashlib
import http.client
import ipaddress
import json
import logging
import math
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

__version__: Final = "0.3.0"

MIN_POLL_SECONDS: Final = 60
MAX_POLL_SECONDS: Final = 3600
FIRST_RETRY_SECONDS: Final = 15
SYSTEMCTL_SECONDS: Final = 5
# All calls of a collect together, as a multiple of proxmox.timeout_seconds.
COLLECT_TIMEOUTS: Final = 6
# pvestatd refreshes /cluster/resources every 10 s; an older list is not believed.
MAX_AGE_SECONDS: Final = 60
# What the watchdog allows for name lookups, which Python cannot interrupt; see resolv.conf(5).
LOOKUP_SECONDS: Final = 120
DEFAULT_PATH: Final = "/etc/felhom-agent/agent.json"
REPORT_PATH: Final = "/api/v1/host-report"

LOG: Final = logging.getLogger("felhom-agent")

T = TypeVar("T")


# ---- errors and logging --------------------------------------------------------------------------


class ConfigError(Exception):
    """The configuration is invalid; one line per problem."""


class AgentError(Exception):
    """A report could not be made or sent.  The message says what failed and how to mend it."""

    retry_after: int | None = None


class TransportError(AgentError):
    """The server sent no response, or one that this server would not send."""


class HTTPError(AgentError):
    """The server answered with an error status; `retry_after` is its Retry-After, in seconds."""

    def __init__(self, message: str, *, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def secret_forms(secret: str) -> tuple[str, ...]:
    """Return the forms in which a secret is masked: as it is and in base64."""
    encoded = base64.b64encode(secret.encode(errors="replace")).decode().rstrip("=")
    return (secret, encoded) if secret else ()


def sanitize(text: str, secrets: Iterable[str] = (), maximum: int = 300) -> str:
    """Return `text` as one printable line of limited length, with the secrets masked."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = text if len(text) <= maximum else text[:maximum] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class LogFormatter(logging.Formatter):
    """Mask secrets, escape control characters, and indent what follows the first line."""

    secrets: tuple[str, ...] = ()

    def format(self, record: logging.LogRecord) -> str:
        """Return the record, with a priority for the journal (sd-daemon(3)) or with its time."""
        lines = [sanitize(line, self.secrets, 2000) for line in super().format(record).split("\n")]
        if "JOURNAL_STREAM" not in os.environ:
            return f"{self.formatTime(record)} {record.levelname} " + "\n    ".join(lines)
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
        return f"<{priority}>" + f"\n<{priority}>    ".join(lines)


class WarnOnce:
    """Log a problem when it starts or changes, and once more when it is over."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._current: dict[str, str] = {}

    def problem(self, topic: str, message: str, *, key: str = "", bug: bool = False) -> None:
        """Log a warning, or at debug level while `key` (by default the message) stays the same.

        With `bug` the warning shows the traceback of the current exception.
        """
        known = self._current.get(topic) == (key or message)
        self._current[topic] = key or message
        level = logging.DEBUG if known else logging.WARNING
        self._logger.log(level, "%s", message, exc_info=bug and not known)

    def resolved(self, topic: str, detail: str = "") -> None:
        """Log that the problem with `topic`, if there was one, is over."""
        if self._current.pop(topic, None):
            self._logger.info("%s: problem resolved%s", topic, detail)


# ---- configuration -------------------------------------------------------------------------------


def is_loopback(host: str | None) -> bool:
    """Return whether `host` is localhost or a loopback address."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def check_url(url: str, form: str) -> str:
    """Return the problem with a base URL of this form, or an empty string."""
    if not url.isascii():
        return "must be ASCII: write the host name as xn--…"
    try:
        parts = urllib.parse.urlsplit(url)
        # `port` raises ValueError above 65535.
        valid = parts.hostname and parts.port != 0 and parts.scheme in ("http", "https")
    except ValueError:
        valid = False
    # Not shown: people put secrets into user, password and query.
    if not valid or not re.fullmatch(r"[^@?#%\s\x00-\x1f\x7f]+", url):
        return f"must be {form}, without user, query and fragment" if url else "is required"
    if parts.path.strip("/") and "path" not in form:
        return f"must be {form}, got {url}"
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        return f"must be https, got {url}"
    return ""


def clamp_poll(seconds: int) -> int:
    """Return `seconds` limited to the allowed poll interval."""
    return max(MIN_POLL_SECONDS, min(MAX_POLL_SECONDS, seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxmoxConfig:
    """The node's API and the token to use; `timeout_seconds` limits each request."""

    url: str = "https://127.0.0.1:8006"
    node: str = field(default_factory=lambda: socket.gethostname().partition(".")[0])
    token_id: str = ""
    token_secret: str = field(default="", repr=False)
    ca_file: str = ""
    fingerprint: str = ""
    timeout_seconds: int = 10
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """Where to send reports, how often, and with which key."""

    url: str = ""
    host_id: str = ""
    api_key: str = field(default="", repr=False)
    poll_seconds: int = 900
    timeout_seconds: int = 30
    ca_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudflaredConfig:
    """The systemd unit that runs the tunnel."""

    unit: str = "cloudflared.service"


SECRET: Final = (r"[!-~]+", "printable ASCII without spaces (not shown)")
ABSOLUTE: Final = (r"(/.*)?", "an absolute path")
TIMEOUT: Final = (r"[1-9][0-9]?|[12][0-9]{2}|300", "from 1 to 300")
# What each value must match, and how to say so.  No value is shown: it may be a misplaced secret.
FORMS: Final = {
    "proxmox.node": (r"[A-Za-z0-9-]+", "the node's short name, without a domain"),
    "proxmox.token_id": (r"[!-.0-9;-~]+@[\w.-]+![\w.-]+", "user@realm!tokenname"),
    "proxmox.token_secret": SECRET,
    "proxmox.ca_file": ABSOLUTE,
    "proxmox.fingerprint": (r"(([0-9A-Fa-f]{2}:?){32})?", "a SHA-256, 64 hexadecimal digits"),
    "proxmox.timeout_seconds": TIMEOUT,
    "proxmox.extras": (r"((qemu|storage|backups)(,|$))*", "a list of qemu, storage, backups"),
    "hub.host_id": (
        r"(?!\s)[^\x00-\x1f\x7f\ud800-\udfff]{1,255}(?<!\s)",
        "1 to 255 characters, without spaces at the ends",
    ),
    "hub.api_key": SECRET,
    "hub.ca_file": ABSOLUTE,
    "hub.timeout_seconds": TIMEOUT,
    # Not a dash first: systemctl would take it for an option.
    "cloudflared.unit": (r"[\w:.@\\][\w:.@\\-]{0,254}", "the name of a systemd unit"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration; `problems` names the values that had a wrong type, by key."""

    proxmox: ProxmoxConfig
    hub: HubConfig
    cloudflared: CloudflaredConfig
    problems: Mapping[str, str] = field(default_factory=dict)

    def validate(self, *, hub: bool = True) -> None:
        """Raise ConfigError with every problem; without `hub` that section is ignored."""
        problems = {
            "proxmox.url": check_url(self.proxmox.url, "https://host[:port]"),
            "hub.url": check_url(self.hub.url, "https://host[:port][/path]"),
        }
        for key, (pattern, expected) in FORMS.items():
            section, _, name = key.partition(".")
            value = getattr(getattr(self, section), name)
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            if not re.fullmatch(pattern, text, re.ASCII):
                problems[key] = f"must be {expected}" if text else "is required"
        problems.update(self.problems)
        lines = [f"config: {key}: {problem}" for key, problem in problems.items() if problem]
        lines = [line for line in lines if hub or not line.startswith("config: hub")]
        if lines:
            raise ConfigError("\n".join(lines))

    def redacted(self) -> dict[str, dict[str, object]]:
        """Return the configuration as a JSON object with the secrets masked."""
        proxmox, hub = dataclasses.asdict(self.proxmox), dataclasses.asdict(self.hub)
        proxmox["token_secret"] = "***" if self.proxmox.token_secret else ""
        hub["api_key"] = "***" if self.hub.api_key else ""
        return {"proxmox": proxmox, "hub": hub, "cloudflared": dataclasses.asdict(self.cloudflared)}


def find_credential(environ: Mapping[str, str], name: str) -> str:
    """Return the path of the systemd credential with this name, or an empty string."""
    path = os.path.join(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)
    return path if name and os.path.exists(path) else ""


def load_config(path: str | None, environ: Mapping[str, str]) -> Config:
    """Read the JSON file and let FELHOM_AGENT_<SECTION>_<KEY> variables override it.

    The file is `path`, else $FELHOM_AGENT_CONFIG, else the systemd credential agent.json, else
    DEFAULT_PATH, which may be missing.  Raises ConfigError if it is not a JSON object.
    """
    credential = find_credential(environ, "agent.json")
    named = path or environ.get("FELHOM_AGENT_CONFIG") or credential
    path = named or DEFAULT_PATH
    shown = f"config: {sanitize(path)}"
    document: object = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            if os.fstat(file.fileno()).st_mode & 0o044 and path != credential:
                LOG.warning("%s is readable by others; run: chmod 600 %s", shown, sanitize(path))
            document = json.load(file)
    except FileNotFoundError:
        if named:
            hint = "felhom-agent.pyz --print=config prints an example"
            raise ConfigError(f"{shown}: no such file; {hint}") from None
        LOG.info("%s does not exist, only the environment is read", shown)
    except (OSError, ValueError, RecursionError) as exc:
        # Of JSON, line and column but no content.
        raise ConfigError(f"{shown}: {getattr(exc, 'strerror', None) or exc}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{shown}: must be a JSON object")
    problems: dict[str, str] = {}
    # authz is reserved for signed operations: accepted, not read.
    known = ("proxmox", "hub", "cloudflared", "authz")
    for key in document.keys() - known:
        LOG.warning("config: unknown key %s is ignored", sanitize(key))
    for key in known:
        if not isinstance(document.setdefault(key, {}), dict):
            problems[key] = "must be an object"
            document[key] = {}
    proxmox = load_section(ProxmoxConfig(), "proxmox", document, environ, problems)
    hub = load_section(HubConfig(), "hub", document, environ, problems)
    cloudflared = load_section(CloudflaredConfig(), "cloudflared", document, environ, problems)
    seconds = clamp_poll(hub.poll_seconds)
    if seconds != hub.poll_seconds:
        LOG.warning("config: hub.poll_seconds: must be from 60 to 3600, using %d", seconds)
        hub = dataclasses.replace(hub, poll_seconds=seconds)
    return Config(proxmox=proxmox, hub=hub, cloudflared=cloudflared, problems=problems)


def load_section(
    defaults: T,
    section: str,
    document: Mapping[str, dict[str, object]],
    environ: Mapping[str, str],
    problems: dict[str, str],
) -> T:
    """Return `defaults` with the values of file and environment; an empty value counts as unset."""
    values: dict[str, Any] = dataclasses.asdict(defaults)  # type: ignore[call-overload]
    given = document[section]
    for key in given.keys() - values.keys():
        LOG.warning("config: unknown key %s.%s is ignored", section, sanitize(key))
    for key, default in values.items():
        value = given.get(key, "")
        variable = f"FELHOM_AGENT_{section}_{key}".upper()
        text = environ.get(variable, "")
        if text and isinstance(default, tuple):
            value = re.split(r"\s*,\s*", text.strip())
        elif text and isinstance(default, str):
            value = text
        elif re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
            value = int(text)
        elif text:
            LOG.warning("config: %s is not an integer and is ignored", variable)
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            value = tuple(value)
        # Not isinstance: True is an int.
        if type(value) is not type(default) and value != "":
            expected = {str: "a string", int: "an integer"}.get(type(default), "a list of strings")
            problems[f"{section}.{key}"] = f"must be {expected}"
        elif value != "":
            values[key] = value
    if "ca_file" in values:
        # The sandboxed service cannot see /etc/pve; systemd hands it the file as a credential.
        credential = find_credential(environ, os.path.basename(values["ca_file"]))
        values["ca_file"] = credential or values["ca_file"]
    return dataclasses.replace(defaults, **values)  # type: ignore[type-var]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """A guest's configured resources, the same whether it runs or not."""

    cores: int | None
    memory_bytes: int | None
    disk_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A container ("lxc") or VM ("qemu"); without `spec` if its configuration cannot be read."""

    vmid: int
    type: str = "lxc"
    name: str
    status: str
    controller_version: str = ""
    spec: GuestSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloudflared:
    """The unit's state as `systemctl is-active` prints it, or "unknown"."""

    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageTarget:
    """A storage of the node (`storage` in proxmox.extras); sizes are None unless "available"."""

    storage: str
    type: str
    status: str
    total_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """The newest backup of a guest on a storage (`backups` in proxmox.extras)."""

    vmid: int
    storage: str
    volid: str
    created_at: str
    size_bytes: int | None
    verified: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTest:
    """A backup that was restored on trial; this and the next two are not filled yet."""

    vmid: int
    volid: str
    tested_at: str
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PBSSnapshot:
    """A snapshot on a Proxmox Backup Server."""

    datastore: str
    backup_type: str
    backup_id: str
    backup_time: str
    size_bytes: int | None
    verified: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """An operation that was carried out on the host."""

    at: str
    actor: str
    operation: str
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What is sent to the hub; `reported_at` is UTC in RFC 3339, when the collect ended."""

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
        """Return the report as compact JSON; a guest without a spec has no `spec` key."""

        def fields(part: Any) -> dict[str, object]:
            names = (name for name in part.__slots__ if name != "spec" or part.spec is not None)
            return {name: getattr(part, name) for name in names}

        return json.dumps(self, default=fields, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlEnvelope:
    """The hub's reply; None for what it did not say.  Only `poll_interval_seconds` is acted on."""

    poll_interval_seconds: int | None
    blocked: bool | None
    desired_generation: int | None
    has_signed_ops: bool | None


def lookup(data: object, *keys: str) -> object:
    """Return data[key1][key2]…, or None if a key is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def get_text(data: object, *keys: str) -> str | None:
    """Return the string at `keys`, at most 256 characters that UTF-8 can hold, or None."""
    value = lookup(data, *keys)
    return value[:256].encode(errors="replace").decode() if isinstance(value, str) else None


def parse_number(value: object) -> float | None:
    """Return a number from 0 to 2^53, or None.  Proxmox sends some numbers as strings."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", value):
        value = float(value) if "." in value else int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53:
        return value
    return None


def parse_int(value: object) -> int | None:
    """Return an integer from 0 to 2^53, or None."""
    number = parse_number(value)
    return int(number) if number is not None and number == int(number) else None


def get_int(data: object, *keys: str) -> int | None:
    """Return the integer at `keys`, or None."""
    return parse_int(lookup(data, *keys))


def format_time(seconds: float | None = None) -> str:
    """Return a Unix time, by default now, in RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def build_host(node: str, status: object, entry: object) -> HostMetrics:
    """Build the node's metrics from /nodes/NODE/status and its entry in /cluster/resources.

    The entry has the CPU usage: in the status it covers only the time since the same API worker
    was last asked, and is 0 the first time.  Exactly 0 means "not measured yet".
    """
    version = re.match(r"pve-manager/([^/\s]+)", get_text(status, "pveversion") or "")
    # Proxmox VE 8.0 has only `kversion`: "Linux 6.2.16-3-pve #1 SMP …".
    kernel = re.match(r"Linux (\S+)", get_text(status, "kversion") or "")
    usage = parse_number(lookup(entry, "cpu"))
    loads = lookup(status, "loadavg")
    averages = [parse_number(load) for load in loads] if isinstance(loads, list) else []
    known = [average for average in averages if average is not None]
    return HostMetrics(
        node=node,
        pve_version=version[1] if version else None,
        kernel_version=get_text(status, "current-kernel", "release") or (kernel and kernel[1]),
        uptime_seconds=get_int(status, "uptime"),
        cpu_model=get_text(status, "cpuinfo", "model"),
        cpu_count=get_int(status, "cpuinfo", "cpus") or None,
        cpu_usage=usage if usage and usage <= 1 else None,
        load_average=known if len(known) == len(averages) == 3 else None,
        memory_total_bytes=get_int(status, "memory", "total"),
        memory_used_bytes=get_int(status, "memory", "used"),
        swap_total_bytes=get_int(status, "swap", "total"),
        swap_used_bytes=get_int(status, "swap", "used"),
        rootfs_total_bytes=get_int(status, "rootfs", "total"),
        rootfs_used_bytes=get_int(status, "rootfs", "used"),
    )


def build_guest(entry: object, config: object, cpu_count: int | None, *, old: bool) -> Guest:
    """Build a guest from its entry in /cluster/resources and its configuration.

    Without a configuration (None) its status is unknown; so it is if the entry is too `old`.
    """
    guest_type = get_text(entry, "type") or ""
    listed, configured = get_text(entry, "name"), {"lxc": "hostname", "qemu": "name"}[guest_type]
    status = get_text(entry, "status") if config is not None and not old else None
    return Guest(
        vmid=get_int(entry, "vmid") or 0,
        type=guest_type,
        name=listed or get_text(config, configured) or "",
        status=status or "unknown",
        spec=build_spec(config, guest_type, cpu_count) if isinstance(config, dict) else None,
    )


def build_spec(config: Mapping[str, object], guest_type: str, cpu_count: int | None) -> GuestSpec:
    """Build the spec from a guest's configuration; an unset key has Proxmox's default."""
    # In MiB: a number, a string or "current=2048".
    memory = parse_int(str(config.get("memory", 512)).removeprefix("current="))
    if guest_type == "lxc":
        cores = parse_int(config.get("cores", cpu_count))
        volumes = [str(config.get("rootfs"))]
    else:
        sockets, cores = (parse_int(config.get(key, 1)) for key in ("sockets", "cores"))
        cores = (sockets or 0) * (cores or 0)
        disk = re.compile("(ide|sata|scsi|virtio)[0-9]+")
        volumes = [str(volume) for key, volume in config.items() if disk.fullmatch(key)]
        volumes = [volume for volume in volumes if "media=cdrom" not in volume.split(",")]
    sizes = [parse_volume_size(volume) for volume in volumes]
    return GuestSpec(
        cores=cores or None,
        memory_bytes=parse_int(memory * 2**20) if memory else None,
        disk_bytes=parse_int(sum(size or 0 for size in sizes)) if sizes and all(sizes) else None,
    )


def parse_volume_size(volume: str) -> int | None:
    """Return the size of a volume such as `local:100/vm-100-disk-0.raw,size=8G` in bytes.

    None if it says none, as for a bind mount, or 0, as for some subvolumes.
    """
    match = re.search(r",size=([0-9]{1,15}(?:\.[0-9]{1,15})?)([KMGT]?)(?:,|$)", volume)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2] or " ") if match else 0
    return parse_int(int(size)) or None


def build_storage(entry: object, *, old: bool) -> StorageTarget:
    """Build a storage from its entry in /cluster/resources, which may be too `old`."""
    available = get_text(entry, "status") == "available" and not old
    return StorageTarget(
        storage=get_text(entry, "storage") or "",
        type=get_text(entry, "plugintype") or "",
        status="available" if available else "unknown",
        total_bytes=get_int(entry, "maxdisk") if available else None,
        used_bytes=get_int(entry, "disk") if available else None,
    )


def build_envelope(reply: Mapping[str, object]) -> ControlEnvelope:
    """Build the envelope from the hub's reply; None for a value of another type."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(ControlEnvelope):
        value = reply.get(item.name)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        # Not isinstance: True is an int.
        expected = int if item.name in ("poll_interval_seconds", "desired_generation") else bool
        values[item.name] = value if type(value) is expected else None
    return ControlEnvelope(**values)


# ---- HTTP client ---------------------------------------------------------------------------------


class PinMismatch(OSError):
    """The certificate is not the one in proxmox.fingerprint."""


class Connection(http.client.HTTPSConnection):
    """An HTTPS connection that compares a pinned certificate before anything is sent."""

    def __init__(self, *args: Any, fingerprint: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = create_connection
        self._fingerprint = fingerprint

    def connect(self) -> None:
        super().connect()
        digest = hashlib.sha256(self.sock.getpeercert(True) or b"").hexdigest()
        if self._fingerprint not in ("", digest):
            self.close()
            raise PinMismatch(f"its certificate has the SHA-256 {digest.upper()}")


def create_connection(*args: Any) -> socket.socket:
    """Connect to the first address that answers, or raise the failure that says most.

    socket.create_connection raises the last one, often "Network is unreachable" for IPv6 where the
    first says "Connection refused".
    """
    vague = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    try:
        return socket.create_connection(*args, all_errors=True)
    except ExceptionGroup as group:
        raise min(group.exceptions, key=lambda exc: getattr(exc, "errno", 0) in vague) from None


class HTTPSHandler(urllib.request.HTTPSHandler):
    """urllib.request's handler, with our connection."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(Connection, req, context=self._context)  # type: ignore


def build_context(key: str, ca_file: str) -> ssl.SSLContext:
    """Return a context that checks chain and host name.  Raises ConfigError.

    Unlike ssl.create_default_context it reads no SSLKEYLOGFILE, and does not set
    VERIFY_X509_STRICT on Python 3.13: most CAs that Proxmox made before March 2026 fail that.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs()
    except OSError as exc:
        problem = "no PEM certificate in it" if isinstance(exc, ssl.SSLError) else exc.strerror
        raise ConfigError(f"config: {key}: {sanitize(ca_file)}: {problem}") from None
    return context


def expire(*_: object) -> None:
    """Raise TimeoutError (the handler of SIGALRM)."""
    raise TimeoutError("timed out")


def describe(exc: Exception) -> str:
    """Return what went wrong, in the words of OpenSSL, the resolver or the kernel."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate refused: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        return f"TLS failed: {(exc.reason or str(exc)).replace('_', ' ').lower()}"
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


class Client:
    """What both clients share: one request within a time limit, and errors with a hint."""

    # For messages: the section of the configuration, the server, and where it says what is wrong.
    section = server = log = ""
    certificate_hint = ca_hint = ""
    # What to do about an error status.
    hints: Mapping[int, str]
    max_bytes = 0
    # On the clock of time.monotonic.
    deadline = math.inf

    def __init__(self, config: ProxmoxConfig | HubConfig, authorization: str, secret: str) -> None:
        self.url = urllib.parse.urlsplit(config.url)
        self.address = self.url.netloc
        self.timeout_seconds = config.timeout_seconds
        self.context = build_context(f"{self.section}.ca_file", config.ca_file)
        self.secrets = secret_forms(secret)
        self.headers = {
            "Authorization": authorization,
            "Accept": "application/json",
            "User-Agent": f"felhom-agent/{__version__}",
        }

    def send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Send a request and return the response, its body unread."""
        raise NotImplementedError

    def parse(self, response: http.client.HTTPResponse, content: bytes) -> Any:
        """Return the decoded body.  Raises ValueError, LookupError or TypeError."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what is kept open."""

    def request(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Send a request and return the decoded response.  Raises TransportError or HTTPError."""
        operation = f"{method} {path}"
        limit = f"{self.section}.timeout_seconds ({self.timeout_seconds})"
        seconds = min(self.timeout_seconds, self.deadline - time.monotonic())
        if seconds <= 0:
            raise TransportError(f"{operation}: no time left in this cycle; raise {limit}")
        content = b""
        try:
            # A socket's timeout applies to each read, so a slow server could take for ever.  The
            # alarm bounds all of it, CONNECT included.  It comes again each second: an exception
            # in a finalizer is lost, and one in a connect only leads to the next address.
            signal.signal(signal.SIGALRM, expire)
            signal.setitimer(signal.ITIMER_REAL, seconds, 1)
            try:
                with self.send(method, path, body) as response:
                    # Not read(n): it allocates whatever size a chunk claims to have.
                    while 200 <= response.status < 300 and len(content) <= self.max_bytes:
                        if not (piece := response.read1(65536)):
                            break
                        content += piece
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self.close()
            # urllib.request wraps what happens before the response.
            wrapped = exc.reason if isinstance(exc, urllib.error.URLError) else None
            cause = wrapped if isinstance(wrapped, Exception) else exc
            problem, hint = self.clean(describe(cause)), self.failure_hint(cause)
            # "from None": the cause may quote what the server sent.
            raise TransportError(f"{operation}: {self.address}: {problem}; {hint}") from None
        if not 200 <= response.status < 300:
            self.close()
            raise self._http_error(operation, path, response)
        try:
            if len(content) > self.max_bytes:
                raise ValueError(f"it is longer than {self.max_bytes} bytes")
            return self.parse(response, content)
        except (ValueError, LookupError, TypeError, RecursionError) as exc:
            self.close()
            raise self.unexpected(f"{operation}: {response.status}", str(exc)) from None

    def clean(self, text: str) -> str:
        """Return text of the server as it may be shown."""
        return sanitize(text, self.secrets)

    def unexpected(self, operation: str, problem: str) -> TransportError:
        """Return the error for a response that this server would not send."""
        reply = f"but the reply is not {self.server}'s: {self.clean(problem)}"
        return TransportError(f"{operation}, {reply}; check {self.section}.url")

    def _http_error(
        self, operation: str, path: str, response: http.client.HTTPResponse
    ) -> HTTPError:
        status = self.clean(f"{response.status} {response.reason}".rstrip())
        hint = self.hints.get(response.status, f"check {self.log}")
        if 300 <= response.status < 400:
            target = response.headers.get("Location", "")
            status += f" to {self.clean(target)}"
            base, found, _ = urllib.parse.urljoin(self.url.geturl(), target).partition(path)
            hint = "the server must answer under this path itself, without redirect or login page"
            if found and base.rstrip("/") != self.url.geturl().rstrip("/"):
                hint = f"redirects are not followed, set {self.section}.url to {self.clean(base)}"
        seconds = response.headers.get("Retry-After", "")
        retry_after = int(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else None
        message = f"{operation}: {status}; {hint}"
        return HTTPError(message, status=response.status, retry_after=retry_after)

    def failure_hint(self, exc: Exception) -> str:
        """Return what to do about a request that got no response."""
        url = f"{self.section}.url"
        match exc:
            case PinMismatch():
                return "compare proxmox.fingerprint with pvenode cert info"
            # X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH
            case ssl.SSLCertVerificationError(verify_code=62 | 64):
                return f"use a name from the certificate in {url}{self.certificate_hint}"
            # X509_V_ERR_CERT_NOT_YET_VALID and _CERT_HAS_EXPIRED
            case ssl.SSLCertVerificationError(verify_code=9 | 10):
                return "renew the server's certificate, or set this host's clock"
            case ssl.SSLCertVerificationError():
                ca_file = f"set {self.section}.ca_file to the CA that signed it{self.ca_hint}"
                return f"{ca_file}; if it is set, the server may not send intermediate certificates"
            case ssl.SSLError():
                tls = "the server must speak TLS 1.2 or 1.3 and demand no client certificate"
                return f"check host and port in {url}; {tls}"
            case TimeoutError():
                limit = f"{self.section}.timeout_seconds ({self.timeout_seconds})"
                return f"check {self.log}, the network and the name servers, or raise {limit}"
            case socket.gaierror():
                return f"check the host name in {url}, and this host's name servers"
        return f"check {url} (http or https, host, port), and {self.log}"


# ---- Proxmox client ------------------------------------------------------------------------------


class ProxmoxClient(Client):
    """Reads one node, with GET requests only."""

    section = "proxmox"
    server = "Proxmox"
    log = "systemctl status pveproxy pve-cluster"
    certificate_hint = " (pvenode cert info lists them)"
    ca_hint = " (Proxmox's own is /etc/pve/pve-root-ca.pem)"
    max_bytes = 8 << 20

    def __init__(self, config: ProxmoxConfig) -> None:
        authorization = f"PVEAPIToken={config.token_id}={config.token_secret}"
        super().__init__(config, authorization, config.token_secret)
        self.node = config.node
        self.token_id = config.token_id
        self.extras = config.extras
        self.collect_seconds = COLLECT_TIMEOUTS * config.timeout_seconds
        user = config.token_id.partition("!")[0]
        # A token with privilege separation has only the privileges that its user has too.
        self.grant = (
            f"run: pveum acl modify / --users {user} --tokens '{config.token_id}' --roles "
            "PVEAuditor; if pveum acl list shows it already, another role or a NoAccess further "
            "down takes it back"
        )
        other_node = f"check that node {config.node} is up, and systemctl status pvedaemon on it"
        self.hints = {
            401: "check proxmox.token_id and proxmox.token_secret; pveum user token list "
            f"{user} shows an expired token, pveum user list a disabled or expired user",
            403: self.grant,
            500: "a guest that was just removed or migrated is right in the next report; else "
            f"check {self.log}, and journalctl -u pveproxy",
            501: "check proxmox.url; the agent needs Proxmox VE 8 or later",
            # pveproxy's own, for what it passes on.
            **dict.fromkeys(range(595, 600), other_node),
        }
        fingerprint = config.fingerprint.replace(":", "").lower()
        if fingerprint:
            # It replaces the check of chain and host name.
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE
        self._connection: http.client.HTTPConnection = Connection(
            self.url.netloc, context=self.context, fingerprint=fingerprint
        )
        # check_url allows http for a loopback address only.
        if self.url.scheme == "http":
            self._connection = http.client.HTTPConnection(self.url.netloc)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Limit all requests within to `collect_seconds`; close the connection at the end.

        pveproxy closes an idle connection after 5 s, so none is kept from cycle to cycle.
        """
        self.deadline = time.monotonic() + self.collect_seconds
        try:
            yield
        finally:
            self.deadline = math.inf
            self.close()

    def send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Send a request over the kept connection: a TLS handshake costs six times the call.

        The server may close that at any time; then it is replaced, once.  Only GET is ever sent,
        so nothing is done twice.
        """
        reused = self._connection.sock is not None
        try:
            self._connection.request(method, f"/api2/json{path}", body, self.headers)
            return self._connection.getresponse()
        except (ConnectionError, ssl.SSLError):
            self.close()
            if not reused:
                raise
        return self.send(method, path, body)

    def parse(self, response: http.client.HTTPResponse, content: bytes) -> Any:
        text = content.decode()
        # What Proxmox says of a guest goes on to the hub.
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return json.loads(text)["data"]

    def close(self) -> None:
        self._connection.close()

    def get(self, path: str, expected: type[T]) -> T:
        """Return `data` of a response, a list or dict as expected.  Raises AgentError."""
        data = self.request("GET", path)
        if not isinstance(data, expected):
            raise self.unexpected(f"GET {path}: 200", f"data is {type(data).__name__}")
        return data

    def version(self) -> str | None:
        """Return the version of Proxmox VE (`pvesh get /version`)."""
        return get_text(self.get("/version", dict), "version")

    def permissions(self, path: str = "") -> Mapping[str, object]:
        """Return path → privilege → 1 if it holds below that path too, else 0.

        With `path` (`pvesh get /access/permissions --path PATH`) the answer is exact; without, it
        has every path that grants something, but not what others inherit from it.
        """
        return self.get("/access/permissions" + (f"?path={path}" if path else ""), dict)

    def resources(self) -> list[dict[str, object]]:
        """Return this node's entries in `pvesh get /cluster/resources`: node, guests, storages.

        Guests without VM.Audit and storages without Datastore.Audit are missing.  pveproxy answers
        this itself; /nodes/NODE/lxc would cost pvedaemon 15 to 22 ms of CPU for each running
        container, and one that hangs would hold one of its three workers for good.
        """
        path = "/cluster/resources"
        entries = [entry for entry in self.get(path, list) if isinstance(entry, dict)]
        nodes = sorted(str(entry.get("node")) for entry in entries if entry.get("type") == "node")
        if self.node not in nodes:
            hint = f"set proxmox.node to one of (case-sensitive): {self.clean(', '.join(nodes))}"
            raise AgentError(f"GET {path}: node {self.node} is not listed; {hint}")
        return [entry for entry in entries if entry.get("node") == self.node]

    def list_lxc(self) -> list[dict[str, object]]:
        """Return this node's containers in /cluster/resources."""
        return [entry for entry in self.resources() if entry.get("type") == "lxc"]

    def node_status(self) -> Mapping[str, object]:
        """Return `pvesh get /nodes/NODE/status` (Sys.Audit on /nodes/NODE)."""
        return self.get(f"/nodes/{self.node}/status", dict)

    def guest_config(self, vmid: int, guest_type: str = "lxc") -> Mapping[str, object]:
        """Return `pvesh get /nodes/NODE/TYPE/VMID/config --current 1` (VM.Audit on /vms/VMID).

        Without `current` pending changes would be mixed in.
        """
        return self.get(f"/nodes/{self.node}/{guest_type}/{vmid}/config?current=1", dict)

    def backups(self, storage: str) -> list[Backup]:
        """Return the newest backup of each guest on a storage (Datastore.Audit on it).

        A dry run of pruning is the only call that shows backups to a token that can only read:
        `pvesh get /nodes/NODE/storage/STORAGE/prunebackups --prune-backups keep-all=1`.
        """
        name = urllib.parse.quote(storage, safe="")
        path = f"/nodes/{self.node}/storage/{name}/prunebackups?prune-backups=keep-all%3D1"
        newest: dict[int, tuple[int, str]] = {}
        for entry in self.get(path, list):
            # A file that somebody renamed has no guest, and not the date of the backup.
            if lookup(entry, "mark") == "renamed":
                continue
            vmid, created = get_int(entry, "vmid") or 0, get_int(entry, "ctime") or 0
            volid = get_text(entry, "volid") or ""
            # Up to 2106; strftime cannot do every integer.
            if not (vmid and volid and 0 < created < 2**32):
                raise self.unexpected(f"GET {path}: 200", "a backup without guest, name or date")
            newest[vmid] = max(newest.get(vmid, (0, "")), (created, volid))
        unread: dict[str, Any] = {"size_bytes": None, "verified": None}
        return [
            Backup(vmid=vmid, storage=storage, volid=volid, created_at=format_time(at), **unread)
            for vmid, (at, volid) in newest.items()
        ]


# ---- systemd -------------------------------------------------------------------------------------


class CloudflaredProber(Protocol):
    """Whatever can say how the tunnel is doing."""

    def probe(self) -> str:
        """Return the unit's state.  An exception means that it is unknown."""


class SystemctlProber:
    """Asks `systemctl is-active UNIT`."""

    def __init__(self, unit: str) -> None:
        self._command = ["systemctl", "is-active", "--", unit]

    def probe(self) -> str:
        """Return the unit's state.  Raises AgentError, OSError or subprocess.TimeoutExpired."""
        done = subprocess.run(
            self._command,
            # Nothing else of our environment: no secret reaches the child.
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SYSTEMCTL_SECONDS,
            # The exit status differs between releases; the state on standard output does not.
            check=False,
        )
        state = done.stdout.decode(errors="replace").strip()
        if not re.fullmatch("[a-z-]{2,20}", state):
            reason = done.stderr.decode(errors="replace").strip() or "printed no state"
            raise AgentError(f"{' '.join(self._command)}: {sanitize(reason)}")
        return state


def notify(message: str) -> None:
    """Send a message to systemd (sd_notify(3)) if it listens; never waits, never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message.encode(), socket.MSG_DONTWAIT, re.sub("^@", "\0", address))


def notify_status(status: str, watchdog_seconds: float) -> None:
    """Send the status, and how soon systemd must hear from the agent again or restart it.

    One message per cycle is enough: it moves the watchdog's deadline.
    """
    watchdog = f"WATCHDOG=1\nWATCHDOG_USEC={watchdog_seconds * 1e6:.0f}\n"
    notify(f"READY=1\n{watchdog if 'WATCHDOG_USEC' in os.environ else ''}STATUS={status}")


# ---- collector -----------------------------------------------------------------------------------


class Collector:
    """Reads the node once and builds the report."""

    def __init__(
        self,
        proxmox: ProxmoxClient,
        cloudflared: CloudflaredProber,
        *,
        host_id: str,
        agent_version: str,
        logger: logging.Logger,
    ) -> None:
        self.proxmox = proxmox
        self._cloudflared = cloudflared
        self._host_id = host_id
        self._agent_version = agent_version
        self._logger = logger
        self._warn = WarnOnce(logger)
        self._guest_types = ("lxc", "qemu") if "qemu" in proxmox.extras else ("lxc",)
        # A backup is on a storage, so backups bring storages along.
        self._reads_storages = bool({"storage", "backups"} & set(proxmox.extras))

    def collect(self, *, thorough: bool = False) -> HostReport:
        """Return the report; `thorough` also judges the token by all it may do elsewhere.

        Raises AgentError if the list or the node's status cannot be read: a report without guests
        would claim that there are none.
        """
        with self.proxmox.session():
            resources = self.proxmox.resources()
            status = self.proxmox.node_status()
            node = next(entry for entry in resources if entry.get("type") == "node")
            storages = [entry for entry in resources if entry.get("type") == "storage"]
            entries = self._find_guests(resources)
            self._check_token(entries, storages, thorough=thorough)
            old = self._check_age(status, node, entries)
            host = build_host(self.proxmox.node, status, None if old else node)
            guests = self._read_guests(entries, host.cpu_count, old=old)
            targets, backups = self._read_storages(storages, old=old)
        return HostReport(
            host_id=self._host_id,
            agent_version=self._agent_version,
            reported_at=format_time(),
            host=host,
            guests=guests,
            cloudflared=Cloudflared(status=self._probe()),
            storage_targets=targets,
            backups=backups,
        )

    def _find_guests(self, resources: Iterable[dict[str, object]]) -> list[dict[str, object]]:
        guests: dict[int, dict[str, object]] = {}
        for entry in resources:
            if entry.get("type") in self._guest_types:
                vmid = get_int(entry, "vmid") or 0
                # To leave it out would claim that it does not exist.
                if not 100 <= vmid <= 999_999_999:
                    where = "GET /cluster/resources: 200"
                    raise self.proxmox.unexpected(where, "a guest without a valid vmid")
                guests[vmid] = entry
        return [guests[vmid] for vmid in sorted(guests)]

    def _check_token(
        self, guests: Sequence[object], storages: Sequence[object], *, thorough: bool
    ) -> None:
        """Warn if the token may not see everything, or may do more than read.

        Proxmox leaves out what the token may not see, and does not say so.  Raises AgentError if
        that can be why there are no guests or no storages.
        """
        needed: dict[str, tuple[str, Sequence[object]]] = {"/vms": ("VM.Audit", guests)}
        if self._reads_storages:
            needed["/storage"] = ("Datastore.Audit", storages)
        granted: set[str] = set()
        # Without Sys.Audit on the node, its status could not have been read.
        for path in [*needed, f"/nodes/{self.proxmox.node}", *([""] if thorough else [])]:
            reply = self.proxmox.permissions(path)
            granted.update(*(value for value in reply.values() if isinstance(value, dict)))
            privilege, listed = needed.get(path, ("", ()))
            # 0 means that it holds for the path itself, not for what is below.
            if not privilege or lookup(reply, path, privilege):
                self._warn.resolved(f"{privilege} on {path}")
                continue
            lacks = f"token {self.proxmox.token_id} does not have {privilege} on {path}"
            problem = f"{lacks}, so the list may not be complete; {self.proxmox.grant}"
            if not listed:
                raise AgentError(problem)
            self._warn.problem(f"{privilege} on {path}", problem)
        excess = ", ".join(sorted(name for name in granted if not name.endswith(".Audit")))
        if excess:
            can = f"token {self.proxmox.token_id} can do more than read: {sanitize(excess)}"
            hint = "leave it only the role PVEAuditor of those that pveum acl list shows"
            self._warn.problem("excess privileges", f"{can}; {hint}")
        else:
            self._warn.resolved("excess privileges")

    def _check_age(self, status: object, node: object, guests: Iterable[object]) -> bool:
        """Return whether the list is too old to believe; warn if pvestatd does not refresh it.

        Proxmox repeats pvestatd's last values for 5 minutes as if they were true.  Then everything
        is listed as unknown, the node without an uptime.
        """
        now, then = get_int(status, "uptime"), get_int(node, "uptime")
        age = now - then if now is not None and then is not None else -1
        old = not 0 <= age <= MAX_AGE_SECONDS
        if old or {lookup(guest, "status") for guest in guests} == {"unknown"}:
            since = f"for {age} s" if age > MAX_AGE_SECONDS else "for 5 minutes or since its start"
            self._warn.problem(
                "pvestatd",
                f"pvestatd has not reported {since}, so guests and storages are unknown; check "
                "systemctl status pvestatd (mostly, a storage does not answer)",
                key="unknown",
            )
        else:
            self._warn.resolved("pvestatd")
        return old

    def _read_guests(
        self, entries: Sequence[dict[str, object]], cpu_count: int | None, *, old: bool
    ) -> tuple[Guest, ...]:
        guests, failures = [], []
        for entry in entries:
            vmid, config = get_int(entry, "vmid") or 0, None
            try:
                config = self.proxmox.guest_config(vmid, str(entry.get("type")))
            except AgentError as exc:
                failures.append((vmid, str(exc)))
            if entry.get("status") == "unknown":
                self._logger.debug("guest %d is listed as unknown", vmid)
            guests.append(build_guest(entry, config, cpu_count, old=old))
        if failures:
            vmids = ", ".join(str(vmid) for vmid, _ in failures[:10]) + ", …" * (len(failures) > 10)
            count = f"{len(failures)} of {len(entries)} guests are unknown ({vmids})"
            self._warn.problem("guests", f"{count}: {failures[0][1]}")
        else:
            self._warn.resolved("guests")
        return tuple(guests)

    def _read_storages(
        self, entries: Iterable[object], *, old: bool
    ) -> tuple[tuple[StorageTarget, ...], tuple[Backup, ...]]:
        """Return storages and newest backups; without its backups a storage is unknown.

        pvedaemon lists backups, and a storage that hangs holds one of its three workers.  So only
        storages are asked that pvestatd has just found available.
        """
        targets: list[StorageTarget] = []
        backups: list[Backup] = []
        failures = []
        for entry in entries if self._reads_storages else ():
            target = build_storage(entry, old=old)
            contents = (get_text(entry, "content") or "").split(",")
            # A Proxmox Backup Server has its own API, and its own token.
            is_asked = (
                target.status == "available" and "backup" in contents and target.type != "pbs"
            )
            if is_asked and "backups" in self.proxmox.extras:
                try:
                    backups += self.proxmox.backups(target.storage)
                except AgentError as exc:
                    failures.append(f"storage {target.storage} is unknown: {exc}")
                    target = build_storage(entry, old=True)
            targets.append(target)
        if failures:
            self._warn.problem("backups", "; ".join(failures))
        else:
            self._warn.resolved("backups")
        return (
            tuple(sorted(targets, key=lambda target: target.storage)),
            tuple(sorted(backups, key=lambda backup: (backup.vmid, backup.storage))),
        )

    def _probe(self) -> str:
        try:
            state = self._cloudflared.probe()
        except Exception as exc:
            # No prober may stop the heartbeat.
            reason = sanitize(str(exc) or type(exc).__name__)
            self._warn.problem("cloudflared.status", f"cloudflared.status is unknown: {reason}")
            return "unknown"
        self._warn.resolved("cloudflared.status")
        return state


# ---- hub client ----------------------------------------------------------------------------------


class HubClient(Client):
    """Posts reports to the hub with urllib.request, which can also use a proxy."""

    section = "hub"
    server = "the hub"
    log = "the hub's log"
    max_bytes = 1 << 20

    def __init__(self, config: HubConfig, *, logger: logging.Logger) -> None:
        super().__init__(config, f"Bearer {config.api_key}", config.api_key)
        self.headers["Content-Type"] = "application/json"
        gateway = "the web server in front of the hub cannot reach it"
        self.hints = {
            401: "check hub.api_key and hub.host_id",
            403: "check hub.api_key and hub.host_id",
            404: f"check hub.url, to which the agent adds {REPORT_PATH}, and that the hub runs",
            405: f"check hub.url, to which the agent adds {REPORT_PATH}, and that the hub runs",
            413: "let the hub, and the web server in front of it, accept 4 MiB",
            429: "the hub asks the agent to wait",
            # 520 to 526 are Cloudflare's.
            **dict.fromkeys((502, 503, 504, *range(520, 527)), gateway),
        }
        self._base = config.url.rstrip("/")
        self._logger = logger
        self._warn = WarnOnce(logger)
        # urllib.request.build_opener would add a handler that follows redirects.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.HTTPHandler())
        self._opener.add_handler(HTTPSHandler(context=self.context))
        proxy = urllib.request.getproxies().get("https", "")
        bypass = urllib.request.proxy_bypass(self.url.netloc) or is_loopback(self.url.hostname)
        self._is_proxied = bool(proxy and not bypass)
        if self._is_proxied:
            # With any other scheme the password would go to the proxy unencrypted all the same.
            form = r"http://([^@/:\s]+(:[^@/\s]*)?@)?([^@/\s]*[^@/:\s]:[0-9]{1,5})/?"
            match = re.fullmatch(form, proxy)
            if not match:
                expected = "http://[user:password@]host:port, with @ as %40 and / as %2F"
                raise ConfigError(f"config: https_proxy: must be {expected}; or set no_proxy")
            self.address = f"{self.url.netloc} through the proxy {match[3]}"
            self._opener.add_handler(urllib.request.ProxyHandler())

    def report(self, report: HostReport) -> ControlEnvelope:
        """Send one report and return the hub's reply.  Raises TransportError or HTTPError."""
        reply = self.request("POST", REPORT_PATH, report.to_json().encode())
        envelope = build_envelope(reply)
        self._logger.debug("%s", envelope)
        name = "poll_interval_seconds"
        if name in reply and envelope.poll_interval_seconds is None:
            self._warn.problem(name, f"the hub's {name} is not an integer and is ignored")
        else:
            self._warn.resolved(name)
        return envelope

    def send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._base + path, body, self.headers, method=method)
        response: http.client.HTTPResponse = self._opener.open(request)
        return response

    def parse(self, response: http.client.HTTPResponse, content: bytes) -> Any:
        # 204 No Content
        if response.status == 204:
            return {}
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise ValueError(f"it is compressed ({encoding}), and nobody asked for that")
        # Some web servers answer an empty 200 to every path that they do not know.
        if not content:
            raise ValueError("it is empty")
        reply = json.loads(content.decode("utf-8-sig"))
        if not isinstance(reply, dict):
            raise TypeError("it is not a JSON object")
        return reply

    def failure_hint(self, exc: Exception) -> str:
        if not self._is_proxied or isinstance(exc, ssl.SSLError):
            return super().failure_hint(exc)
        # http.client tells the proxy's status only in its message.
        match = re.search(r"Tunnel connection failed: ([0-9]+)", str(exc))
        status = match[1] if match else ""
        if status == "407":
            return "check user and password in https_proxy"
        if status in ("502", "503", "504"):
            return "the proxy cannot reach the hub: check hub.url, and that the hub is running"
        return "check https_proxy, and that the proxy allows this host and port; or set no_proxy"


# ---- loop ----------------------------------------------------------------------------------------


def retry_delay(interval: float, failures: int, retry_after: int | None, fraction: float) -> float:
    """Return how many seconds to wait after `failures` in a row.

    15, 60, 240, … seconds, at most the interval, shortened at random by up to half; or what
    Retry-After says, at most an hour, lengthened at random up to twofold, so that agents which
    were told the same do not return together.  `fraction` is a random number from 0 to 1.
    """
    if retry_after:
        return min(retry_after, MAX_POLL_SECONDS) * (1 + fraction)
    return min(interval, FIRST_RETRY_SECONDS * 4.0 ** min(failures - 1, 6)) * (0.5 + fraction / 2)


class Loop:
    """Collects and reports for ever; clock, wait, random numbers and systemd are handed in."""

    def __init__(
        self,
        collector: Collector,
        client: HubClient,
        interval: float,
        *,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        fraction: Callable[[], float] = random.random,
        notify: Callable[[str, float], None] = notify_status,
    ) -> None:
        self.interval = interval
        self._collector, self._client, self._logger = collector, client, logger
        self._clock, self._wait, self._fraction, self._notify = clock, wait, fraction, notify
        self._warn = WarnOnce(logger)
        self._failures = 0
        self._failing_since = 0.0

    def run(self, cycles: float = math.inf) -> None:
        """Run the first cycle at once and each further one when it is due."""
        while cycles > 0:
            cycles -= 1
            delay, status = self.cycle()
            self._notify(f"{status}; next in {delay:.0f} s", delay)
            self._wait(delay)

    def cycle(self) -> tuple[float, str]:
        """Collect and send one report; return the seconds to wait, and how it went."""
        began = self._clock()
        try:
            report = self._collector.collect()
            requested = self._client.report(report).poll_interval_seconds
        except Exception as exc:
            return self._fail(began, exc)
        lasted = self._clock() - self._failing_since
        self._warn.resolved("report", f", after {self._failures} failures in {lasted:.0f} s")
        self._failures = 0
        self._logger.debug("report accepted, %d guests", len(report.guests))
        if requested is not None:
            self._set_interval(requested)
        accepted = f"last report {time.strftime('%H:%M:%S')} accepted, {len(report.guests)} guests"
        return max(0.0, began + self.interval - self._clock()), accepted

    def _fail(self, began: float, exc: Exception) -> tuple[float, str]:
        # A bug must not stop the heartbeat either: the next cycle may do better.
        bug = not isinstance(exc, AgentError)
        text = f"bug in the agent, please report it: {type(exc).__name__}" if bug else str(exc)
        self._failing_since = self._failing_since if self._failures else began
        self._failures += 1
        self._warn.problem("report", text, bug=bug)
        retry_after = getattr(exc, "retry_after", None)
        delay = retry_delay(self.interval, self._failures, retry_after, self._fraction())
        return delay, f"{self._failures} failed in a row, the last: {text}"

    def _set_interval(self, requested: int) -> None:
        interval = clamp_poll(requested)
        if interval != requested:
            text = (
                f"the hub asks for an interval of {requested} s, which is limited to {interval} s"
            )
            self._warn.problem("requested interval", text)
        else:
            self._warn.resolved("requested interval")
        if interval != self.interval:
            self._logger.info("interval is now %d s, it was %d s", interval, self.interval)
            self.interval = interval


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 on success, 1 if collect or report failed, 2 for wrong usage or configuration."""
    about = "Report a Proxmox VE node to a hub."
    parser = argparse.ArgumentParser("felhom-agent", description=about, allow_abbrev=False)
    parser.add_argument("--config", metavar="PATH", help=f"default: {DEFAULT_PATH}")
    parser.add_argument("--selftest", choices=("config", "proxmox", "hub"), help="check and exit")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default="info")
    parser.add_argument("--print", choices=("unit", "config"), help="print this file and exit")
    parser.add_argument("--version", action="version", version=f"felhom-agent {__version__}")
    arguments = parser.parse_args(argv)
    if arguments.print:
        name = {"unit": "felhom-agent.service", "config": "agent.example.json"}[arguments.print]
        with open(os.path.join(os.path.dirname(__file__), name), "rb") as file:
            sys.stdout.buffer.write(file.read())
        return 0
    formatter = LogFormatter()
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(arguments.log_level.upper())
    # A standard error that cannot be written to is no reason to stop.
    logging.raiseExceptions = False
    hub = None
    try:
        config = load_config(arguments.config, os.environ)
        secrets = (config.proxmox.token_secret, config.hub.api_key)
        formatter.secrets = tuple(form for secret in secrets for form in secret_forms(secret))
        config.validate(hub=arguments.selftest != "proxmox")
        collector = Collector(
            ProxmoxClient(config.proxmox),
            SystemctlProber(config.cloudflared.unit),
            host_id=config.hub.host_id,
            agent_version=__version__,
            logger=LOG,
        )
        if arguments.selftest != "proxmox":
            hub = HubClient(config.hub, logger=LOG)
    except ConfigError as exc:
        for line in str(exc).split("\n"):
            LOG.error("%s", line)
        return 2
    if arguments.selftest == "config":
        print(json.dumps(config.redacted(), indent=2))
        return 0
    if arguments.selftest or hub is None:
        return selftest(collector, hub, formatter.secrets)
    return run_daemon(collector, hub, config.hub)


def selftest(collector: Collector, hub: HubClient | None, secrets: Iterable[str]) -> int:
    """Collect once, send the report if there is a hub, and print both as JSON."""
    result: dict[str, Any] = {}
    try:
        if hub is None:
            LOG.info("Proxmox VE %s", collector.proxmox.version())
        report = collector.collect(thorough=hub is None)
        result["report"] = json.loads(report.to_json())
        if hub is not None:
            result["envelope"] = dataclasses.asdict(hub.report(report))
    except AgentError as exc:
        # Masked once more: a client knows only its own secret.
        result["error"] = sanitize(str(exc), secrets, 2000)
        LOG.error("%s", exc)
    except Exception:
        # The log masks secrets, Python's own traceback would not.
        result["error"] = "bug in the agent, please report it"
        LOG.exception("%s", result["error"])
    if "report" in result:
        # Without a hub section there is no host_id yet.
        if not report.host_id:
            del result["report"]["host_id"]
        print(json.dumps(result["report"] if hub is None else result, indent=2))
    return 1 if "error" in result else 0


def run_daemon(collector: Collector, hub: HubClient, config: HubConfig) -> int:
    """Report until SIGTERM or SIGINT; return 0."""

    def stop(number: int, _: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        # Not an Exception, so nothing catches it on its way.
        raise SystemExit(signal.Signals(number).name)

    limits = collector.proxmox.collect_seconds + SYSTEMCTL_SECONDS + hub.timeout_seconds
    cycle_seconds = limits + LOOKUP_SECONDS

    def notify_wait(status: str, seconds: float) -> None:
        notify_status(sanitize(status), seconds + cycle_seconds)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        started = "started version=%s host_id=%s url=%s interval=%d"
        LOG.info(started, __version__, config.host_id, config.url, config.poll_seconds)
        notify_wait("first report on its way", 0)
        Loop(collector, hub, config.poll_seconds, logger=LOG, notify=notify_wait).run()
    except SystemExit as exc:
        notify("STOPPING=1")
        LOG.info("stopped by %s", exc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
