"""felhom-agent: report the state of one Proxmox VE node to a hub.

Once per interval the agent reads the node through the Proxmox API (GET requests only), asks systemd
whether the cloudflared tunnel is running, and posts one JSON report to the hub.  The report is the
heartbeat: if it stops, the hub raises the alarm.

The agent changes nothing, writes no file, follows no redirect, and runs no command but
`systemctl is-active UNIT`.  The token secret goes only to Proxmox, the API key only to the hub;
both are masked in all output.  The hub can only change the interval (60 to 3600 seconds) and, with
Retry-After, the wait after a failure (at most two hours).

Each section uses only those above it.  `Loop.cycle` is one heartbeat: `Collector.collect` builds
the report, `HubClient.report` sends it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.client
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, Protocol, TypeAlias, TypeVar

__version__: Final = "0.3.0"

MIN_POLL_SECONDS: Final = 60
MAX_POLL_SECONDS: Final = 3600
FIRST_RETRY_SECONDS: Final = 15
SYSTEMCTL_SECONDS: Final = 5
# A collect may take this many times proxmox.timeout_seconds.
COLLECT_TIMEOUTS: Final = 6
# pvestatd refreshes /cluster/resources every 10 s; an older list is treated as unknown.
MAX_LIST_AGE_SECONDS: Final = 60
# For name lookups, which Python cannot interrupt; see resolv.conf(5).
DNS_SECONDS: Final = 120
DEFAULT_PATH: Final = "/etc/felhom-agent/agent.json"
REPORT_PATH: Final = "/api/v1/host-report"

LOG: Final = logging.getLogger("felhom-agent")

T = TypeVar("T")
Entries: TypeAlias = Sequence[dict[str, object]]


# ---- errors and logging --------------------------------------------------------------------------


class ConfigError(Exception):
    """The configuration is invalid; one line per problem."""


class AgentError(Exception):
    """An expected failure.  The message says what to do."""


class TransportError(AgentError):
    """The server sent no usable response."""


class HTTPError(AgentError):
    """The server answered with an error status; `retry_after` is in seconds."""

    def __init__(self, message: str, *, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


# The token secret and the API key, by section of the configuration; the clients set them.
SECRETS: Final[dict[str, str]] = {}


def sanitize(text: str, max_length: int = 300) -> str:
    """Return `text` as one printable line with the secrets masked."""
    for secret in sorted(filter(None, SECRETS.values()), key=len, reverse=True):
        encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
        text = text.replace(secret, "***").replace(encoded, "***")
    if len(text) > max_length:
        text = text[:max_length] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def describe(exc: BaseException) -> str:
    """Return what happened, without "[Errno 111]", "[SSL: …]" and "(_ssl.c:1006)"."""
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", text)


def failure_message(exc: Exception) -> str:
    is_bug = not isinstance(exc, AgentError)
    return f"bug in the agent, please report it: {type(exc).__name__}" if is_bug else str(exc)


class LogFormatter(logging.Formatter):
    """Masks secrets and control characters, adds the priority for the journal (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [sanitize(line, 2000) for line in super().format(record).split("\n")]
        if "JOURNAL_STREAM" not in os.environ:
            return f"{self.formatTime(record)} {record.levelname} " + "\n    ".join(lines)
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
        return f"<{priority}>" + f"\n<{priority}>    ".join(lines)


@dataclass
class WarnOnce:
    """Logs a problem when it starts or changes, and once more when it is over."""

    logger: logging.Logger
    current: dict[str, str] = field(default_factory=dict)

    def problem(self, topic: str, message: str, *, traceback: bool = False) -> None:
        """Log a warning, or at debug level while the message stays the same; "" is no problem."""
        if message:
            is_new = self.current.get(topic) != message
            self.current[topic] = message
            level = logging.WARNING if is_new else logging.DEBUG
            self.logger.log(level, "%s", message, exc_info=traceback and is_new)
        else:
            self.resolved(topic)

    def resolved(self, topic: str, detail: str = "") -> None:
        if self.current.pop(topic, None):
            self.logger.info("%s: problem resolved%s", topic, detail)


# ---- configuration -------------------------------------------------------------------------------


def clamp_poll(seconds: int) -> int:
    return max(MIN_POLL_SECONDS, min(MAX_POLL_SECONDS, seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxmoxConfig:
    """The Proxmox API; `timeout_seconds` limits each request."""

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
    url: str = ""
    host_id: str = ""
    api_key: str = field(default="", repr=False)
    poll_seconds: int = 900
    timeout_seconds: int = 30
    ca_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudflaredConfig:
    unit: str = "cloudflared.service"


PORT: Final = r"(:([1-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]))?"
PATH: Final = r"(/[\w.~!$&'()*+,;=:/-]*)?"
HOST: Final = r"([\w.-]+|\[[0-9A-Fa-f:.]+\])"
LOOPBACK: Final = r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])"
URL: Final = f"(https://{HOST}|http://{LOOPBACK})"
SECRET_FORM: Final = (r"[!-~]+", "printable ASCII without spaces (not shown)")
ABSOLUTE_FORM: Final = (r"(/[^\x00]*)?", "an absolute path")
TIMEOUT_FORM: Final = (r"[1-9][0-9]?|[12][0-9]{2}|300", "an integer from 1 to 300")
# Each value's pattern and description.  No value is shown: it may be a misplaced secret.
FORMS: Final = {
    "proxmox.url": (f"{URL}{PORT}/?", "https://host[:port]"),
    "proxmox.node": (r"[A-Za-z0-9-]+", "the node's short name, without a domain"),
    "proxmox.token_id": (r"[!-.0-9;-~]+@[\w.-]+![\w.-]+", "user@realm!tokenname"),
    "proxmox.token_secret": SECRET_FORM,
    "proxmox.ca_file": ABSOLUTE_FORM,
    "proxmox.fingerprint": (r"(([0-9A-Fa-f]{2}:?){32})?", "a SHA-256, 64 hexadecimal digits"),
    "proxmox.timeout_seconds": TIMEOUT_FORM,
    "proxmox.extras": (r"((qemu|storage|backups)(\n|$))*", "a list of qemu, storage, backups"),
    "hub.url": (URL + PORT + PATH, "https://host[:port][/path] in ASCII (xn--…)"),
    "hub.host_id": (r"\S(.{0,253}\S)?", "1 to 255 characters, without spaces at the ends"),
    "hub.api_key": SECRET_FORM,
    "hub.poll_seconds": (r"-?[0-9]+", "an integer"),
    "hub.timeout_seconds": TIMEOUT_FORM,
    "hub.ca_file": ABSOLUTE_FORM,
    # No leading dash: systemctl would take it for an option.
    "cloudflared.unit": (r"[\w:.@\\][\w:.@\\-]{0,254}", "the name of a systemd unit"),
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
        keys = [key for key in self.problems if hub or not key.startswith("hub")]
        if keys:
            raise ConfigError("\n".join(f"config: {key}: {self.problems[key]}" for key in keys))

    def redacted(self) -> dict[str, Any]:
        sections = dataclasses.asdict(self)
        del sections["problems"]
        for section, key in (("proxmox", "token_secret"), ("hub", "api_key")):
            sections[section][key] = "***" if sections[section][key] else ""
        return sections


def find_credential(environ: Mapping[str, str], name: str) -> str:
    """Return the path of a systemd credential, or an empty string."""
    path = os.path.join(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)
    return path if name and os.path.exists(path) else ""


def load_config(path: str | None, environ: Mapping[str, str]) -> Config:
    """Read the JSON file; FELHOM_AGENT_<SECTION>_<KEY> variables override it.

    The file is `path`, else $FELHOM_AGENT_CONFIG, else the systemd credential agent.json, else
    DEFAULT_PATH, which may be missing.  Raises ConfigError.
    """
    credential = find_credential(environ, "agent.json")
    named = path or environ.get("FELHOM_AGENT_CONFIG") or credential
    path = named or DEFAULT_PATH
    shown = f"config: {sanitize(path)}"
    document: object = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            if os.fstat(file.fileno()).st_mode & 0o044 and path != credential:
                LOG.warning("%s: others can read it; run: chmod 600 %s", shown, sanitize(path))
            document = json.load(file)
    except FileNotFoundError:
        if named:
            hint = "see felhom-agent.pyz --print=config"
            raise ConfigError(f"{shown}: no such file; {hint}") from None
        LOG.info("%s: no such file, using only the environment", shown)
    except (OSError, ValueError, RecursionError) as exc:
        # json gives line and column, and quotes no content.
        raise ConfigError(f"{shown}: {describe(exc)}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{shown}: must be a JSON object")
    problems: dict[str, str] = {}
    for section, values in document.items():
        # authz is reserved for signed operations.
        if section not in ("proxmox", "hub", "cloudflared", "authz"):
            LOG.warning("config: unknown key %s is ignored", sanitize(section))
        elif not isinstance(values, dict):
            problems[section] = "must be an object"
            document[section] = {}
    proxmox = load_section(ProxmoxConfig(), "proxmox", document, environ, problems)
    hub = load_section(HubConfig(), "hub", document, environ, problems)
    cloudflared = load_section(CloudflaredConfig(), "cloudflared", document, environ, problems)
    seconds = clamp_poll(hub.poll_seconds)
    if seconds != hub.poll_seconds:
        LOG.warning("config: hub.poll_seconds: must be from 60 to 3600, using %d", seconds)
        hub = dataclasses.replace(hub, poll_seconds=seconds)
    return Config(proxmox=proxmox, hub=hub, cloudflared=cloudflared, problems=problems)


def load_section(
    defaults: Any,
    section: str,
    document: Mapping[str, Any],
    environ: Mapping[str, str],
    problems: dict[str, str],
) -> Any:
    """Return `defaults` with the values from file and environment."""
    values: dict[str, Any] = dataclasses.asdict(defaults)
    given = document.get(section, {})
    for name in given.keys() - values.keys():
        LOG.warning("config: unknown key %s.%s is ignored", section, sanitize(name))
    for name, default in values.items():
        key, expected_type = f"{section}.{name}", type(default)
        value = default if given.get(name, "") == "" else given[name]
        variable = f"FELHOM_AGENT_{section}_{name}".upper()
        if override := environ.get(variable, ""):
            try:
                value = override.split(",") if expected_type is tuple else expected_type(override)
            except ValueError:
                LOG.warning("config: %s is not an integer and is ignored", variable)
        if isinstance(value, list):
            value = tuple(str(word).strip() for word in value)
        # Not isinstance: True is an int.
        is_typed = type(value) is expected_type
        values[name] = value if is_typed else default
        pattern, expected = FORMS[key]
        text = "\n".join(value) if isinstance(value, tuple) else str(value)
        if not is_typed or not re.fullmatch(pattern, text, re.ASCII):
            problems[key] = f"must be {expected}" if text or not is_typed else "is required"
            # Not more of it: a secret may be in the path.
            insecure = re.fullmatch(f"(http://{HOST}{PORT}){PATH}", text, re.ASCII)
            if name == "url" and insecure:
                problems[key] = f"must be https, got {insecure[1]}"
        if name == "ca_file":
            # The sandboxed service cannot see /etc/pve; systemd passes it a copy.
            values[name] = find_credential(environ, os.path.basename(values[name])) or values[name]
    return dataclasses.replace(defaults, **values)


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
    """A storage of the node; sizes are None unless it is "available"."""

    storage: str
    type: str
    status: str
    total_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """The newest backup of a guest on a storage."""

    vmid: int
    storage: str
    volid: str
    created_at: str
    size_bytes: int | None = None
    verified: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTest:
    """Reserved, as are the next two."""

    vmid: int
    volid: str
    tested_at: str
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PBSSnapshot:
    datastore: str
    backup_type: str
    backup_id: str
    backup_time: str
    size_bytes: int | None
    verified: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    at: str
    actor: str
    operation: str
    result: str


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

        def fields(part: Any) -> dict[str, object]:
            names = (name for name in part.__slots__ if name != "spec" or part.spec is not None)
            return {name: getattr(part, name) for name in names}

        return json.dumps(self, default=fields, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlEnvelope:
    """The hub's reply; None for what is missing or invalid.  Only the interval is acted on."""

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
    """Return the string at `keys`, at most 512 characters that UTF-8 can hold, or None."""
    value = lookup(data, *keys)
    return value[:512].encode(errors="replace").decode() if isinstance(value, str) else None


def parse_number(value: object) -> float | None:
    """Return a number from 0 to 2^53, or None.  Proxmox sends some numbers as strings."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53:
        return value
    return None


def parse_int(value: object) -> int | None:
    """Return an integer from 0 to 2^53, or None."""
    number = parse_number(value)
    return int(number) if number is not None and number == int(number) else None


def get_int(data: object, *keys: str) -> int | None:
    return parse_int(lookup(data, *keys))


def get_vmid(data: object) -> int:
    """Return the guest's ID, or 0 if it is invalid."""
    vmid = get_int(data, "vmid") or 0
    return vmid if 100 <= vmid <= 999_999_999 else 0


def format_time(seconds: float | None = None) -> str:
    """Return a Unix time, by default now, in RFC 3339, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def build_host(node: str, status: object, entry: object) -> HostMetrics:
    """Build the node's metrics from its status and its entry in /cluster/resources.

    The entry has the CPU usage, 0 if not measured yet; the status's covers only the time since the
    same API worker was last asked.
    """
    version = re.match(r"pve-manager/([^/\s]+)", get_text(status, "pveversion") or "")
    # Proxmox VE 8.0 has only `kversion`: "Linux 6.2.16-3-pve #1 SMP …".
    kernel = re.match(r"Linux (\S+)", get_text(status, "kversion") or "")
    usage = parse_number(lookup(entry, "cpu"))
    loads = lookup(status, "loadavg")
    numbers = [parse_number(load) for load in loads] if isinstance(loads, list) else []
    averages = [number for number in numbers if number is not None]
    return HostMetrics(
        node=node,
        pve_version=version[1] if version else None,
        kernel_version=get_text(status, "current-kernel", "release") or (kernel and kernel[1]),
        uptime_seconds=get_int(status, "uptime"),
        cpu_model=get_text(status, "cpuinfo", "model"),
        cpu_count=get_int(status, "cpuinfo", "cpus") or None,
        cpu_usage=usage if usage and usage <= 1 else None,
        load_average=averages if len(averages) == len(numbers) == 3 else None,
        memory_total_bytes=get_int(status, "memory", "total"),
        memory_used_bytes=get_int(status, "memory", "used"),
        swap_total_bytes=get_int(status, "swap", "total"),
        swap_used_bytes=get_int(status, "swap", "used"),
        rootfs_total_bytes=get_int(status, "rootfs", "total"),
        rootfs_used_bytes=get_int(status, "rootfs", "used"),
    )


def build_guest(entry: object, config: object, cpu_count: int | None, *, stale: bool) -> Guest:
    """Build a guest, unknown without a configuration or if its entry is stale."""
    guest_type = get_text(entry, "type") or ""
    name = get_text(entry, "name") or get_text(config, "hostname") or get_text(config, "name")
    status = get_text(entry, "status") if config is not None and not stale else None
    return Guest(
        vmid=get_vmid(entry),
        type=guest_type,
        name=name or "",
        status=status or "unknown",
        spec=build_spec(config, guest_type, cpu_count) if isinstance(config, dict) else None,
    )


def build_spec(config: Mapping[str, object], guest_type: str, cpu_count: int | None) -> GuestSpec:
    """Build the spec from a guest's configuration and Proxmox's defaults."""
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
        cores=parse_int(cores) or None,
        memory_bytes=parse_int(memory * 2**20) if memory else None,
        disk_bytes=parse_int(sum(size or 0 for size in sizes)) if sizes and all(sizes) else None,
    )


def parse_volume_size(volume: str) -> int | None:
    """Return the bytes of `local:100/vm-100-disk-0.raw,size=8G`; None without a size."""
    match = re.search(r",size=([0-9]{1,15}(?:\.[0-9]{1,15})?)([KMGT]?)(?:,|$)", volume)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2] or " ") if match else 0
    return parse_int(int(size)) or None


def build_storage(entry: object, *, stale: bool) -> StorageTarget:
    available = get_text(entry, "status") == "available" and not stale
    return StorageTarget(
        storage=get_text(entry, "storage") or "",
        type=get_text(entry, "plugintype") or "",
        status="available" if available else "unknown",
        total_bytes=get_int(entry, "maxdisk") if available else None,
        used_bytes=get_int(entry, "disk") if available else None,
    )


def build_envelope(reply: Mapping[str, object]) -> ControlEnvelope:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(ControlEnvelope):
        value = reply.get(item.name)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        expected = int if item.name in ("poll_interval_seconds", "desired_generation") else bool
        values[item.name] = value if type(value) is expected else None
    return ControlEnvelope(**values)


# ---- HTTP client ---------------------------------------------------------------------------------


class PinMismatch(OSError):
    """The certificate is not the one in proxmox.fingerprint."""


class Connection(http.client.HTTPSConnection):
    """Compares a pinned certificate before anything is sent, and reads early refusals."""

    fingerprint = ""

    def connect(self) -> None:
        # Its failure is an ExceptionGroup, see _no_response.
        self._create_connection = functools.partial(socket.create_connection, all_errors=True)
        try:
            super().connect()
        except BaseException:
            # A failed tunnel or handshake would leave a socket without TLS.
            self.close()
            raise
        digest = hashlib.sha256(self.sock.getpeercert(True) or b"").hexdigest()
        if self.fingerprint not in ("", digest):
            self.close()
            raise PinMismatch(f"its certificate has the SHA-256 {digest.upper()}")

    def send(self, data: Any) -> None:
        # Before the rest, because only errors of sending may be passed over, not of connecting.
        if self.sock is None:
            self.connect()
        # A server that refuses may close before it has read everything; getresponse says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            super().send(data)


class HubHTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(Connection, req, context=self._context)  # type: ignore


def raise_timeout(*_: object) -> None:
    raise TimeoutError("timed out")


def read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the body.  Raises ValueError if it is too long, HTTPException if it is cut off."""
    body = b""
    # Not read(n), which believes whatever size a chunk claims to have.
    while piece := response.read1(65536):
        body += piece
        if len(body) > max_bytes:
            raise ValueError(f"the reply is longer than {max_bytes} bytes")
    if response.length:
        raise http.client.IncompleteRead(body, response.length)
    return body


def parse_reply(content: bytes, status: int) -> dict[str, Any]:
    """Return the JSON object in a response.  Raises ValueError or RecursionError."""
    # Some web servers answer an empty 200 to any path; an intentional empty reply is 204.
    if not content and status != 204:
        raise ValueError("empty")
    reply = json.loads(content.decode("utf-8-sig") or "{}")
    if not isinstance(reply, dict):
        raise ValueError("not a JSON object")
    return reply


class Client:
    """What both clients share: one request within a time limit, and errors with a hint."""

    # The section of the configuration, and words for messages
    section = server = where_to_look = certificate_hint = ca_hint = via = ""
    hints: Mapping[int, str]
    max_bytes = 0
    # By time.monotonic
    deadline = math.inf

    def __init__(self, config: ProxmoxConfig | HubConfig, scheme: str, secret: str) -> None:
        self.url = config.url.rstrip("/")
        self.netloc = config.url.split("/")[2]
        self.timeout_seconds = config.timeout_seconds
        self.timeout_hint = f"raise {self.section}.timeout_seconds ({self.timeout_seconds})"
        # Unlike ssl.create_default_context: no SSLKEYLOGFILE, and no VERIFY_X509_STRICT on Python
        # 3.13, which most CAs that Proxmox made before March 2026 fail.
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if config.ca_file:
                self.context.load_verify_locations(config.ca_file)
            else:
                self.context.load_default_certs()
        except OSError as exc:
            shown = f"{self.section}.ca_file: {sanitize(config.ca_file)}"
            raise ConfigError(f"config: {shown}: no usable PEM file ({describe(exc)})") from None
        SECRETS[self.section] = secret
        self.headers = {"Authorization": f"{scheme}{secret}"}
        signal.signal(signal.SIGALRM, raise_timeout)

    def open_response(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Send a request and return the response with its body unread."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what is kept open."""

    def request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Send a request and return the decoded response.  Raises TransportError or HTTPError."""
        operation = f"{method} {path}"
        seconds = min(self.timeout_seconds, self.deadline - time.monotonic())
        if seconds <= 0:
            raise TransportError(f"{operation}: no time left in this cycle; {self.timeout_hint}")
        try:
            # A socket's timeout bounds one read, the alarm everything, CONNECT included.  It
            # repeats: a finalizer swallows it, a connect goes on to the next address.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1)
            with self.open_response(method, path, body) as response:
                is_success = 200 <= response.status < 300
                content = read_body(response, self.max_bytes) if is_success else b""
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Exception as exc:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.close()
            # "from None": the cause may quote what the server sent.
            raise self._no_response(operation, exc) from None
        if not is_success:
            self.close()
            raise self._http_error(operation, response)
        # What Proxmox says of a guest goes on to the hub.  A short secret would match by chance.
        if len(secret := SECRETS[self.section]) > 7:
            content = content.replace(secret.encode(), b"***")
        try:
            return parse_reply(content, response.status)
        except (ValueError, RecursionError) as exc:
            self.close()
            encoding = response.headers.get("Content-Encoding")
            problem = f"compressed by {encoding}" if encoding else str(exc)
            raise self.unexpected(operation, problem, response.status) from None

    def unexpected(self, operation: str, problem: str, status: int = 200) -> TransportError:
        """Return the error for a response that this server would never send."""
        reply = f"{operation}: {status}, but the reply is unusable ({sanitize(problem)})"
        hint = f"check {self.section}.url, and what is in front of {self.server}"
        return TransportError(f"{reply}; {hint}")

    def _no_response(self, operation: str, exc: Exception) -> TransportError:
        if isinstance(exc, urllib.error.URLError) and isinstance(exc.reason, Exception):
            exc = exc.reason
        if isinstance(exc, ExceptionGroup):
            # One for each address.  A refusal or a time-out says more than "unreachable".
            exc = max(exc.exceptions, key=lambda e: isinstance(e, ConnectionError | TimeoutError))
        problem = f"{sanitize(describe(exc))}; {self.failure_hint(exc)}"
        return TransportError(f"{operation}: {self.netloc}{self.via}: {problem}")

    def _http_error(self, operation: str, response: http.client.HTTPResponse) -> HTTPError:
        status = sanitize(f"{response.status} {response.reason}".rstrip())
        hint = self.hints.get(response.status, f"check {self.where_to_look}")
        if 300 <= response.status < 400:
            status += f" to {sanitize(response.headers.get('Location', 'nowhere'))}"
            rule = f"{self.server} must answer under this path itself, without login"
            hint = f"{rule}; if only https or the host differs, change {self.section}.url"
        retry_after = parse_int(response.headers.get("Retry-After"))
        message = f"{operation}: {status}; {hint}"
        return HTTPError(message, status=response.status, retry_after=retry_after)

    def failure_hint(self, exc: Exception) -> str:
        """Return what to do about a request that got no response."""
        url = f"{self.section}.url"
        match exc:
            case PinMismatch():
                return "compare proxmox.fingerprint with pvenode cert info"
            # X509_V_ERR_*: hostname or IP address mismatch
            case ssl.SSLCertVerificationError(verify_code=62 | 64):
                return f"use a name from the certificate in {url}{self.certificate_hint}"
            # X509_V_ERR_*: no chain to a known CA
            case ssl.SSLCertVerificationError(verify_code=2 | 18 | 19 | 20 | 21):
                ca_file = f"set {self.section}.ca_file to the server's root CA{self.ca_hint}"
                return f"{ca_file}; if set, perhaps the server sends no intermediate certificates"
            case ssl.SSLCertVerificationError():
                return "renew the certificate or its CA's, or set this host's clock"
            case ssl.SSLError():
                tls = f"{self.server} speaks TLS 1.2 or 1.3 and demands no client certificate"
                return f"check host and port in {url}, and that {tls}"
            case TimeoutError():
                look = f"{self.where_to_look}, network and name servers"
                return f"check {look}, or {self.timeout_hint}"
            case socket.gaierror():
                return f"check the host name in {url}, and this host's name servers"
        return f"check {self.where_to_look}, and {url} (http or https, host, port)"


# ---- Proxmox client ------------------------------------------------------------------------------


class ProxmoxClient(Client):
    """Reads one node, with GET requests only."""

    section = "proxmox"
    server = "Proxmox"
    where_to_look = "systemctl status pveproxy pve-cluster"
    certificate_hint = " (pvenode cert info lists them)"
    ca_hint = " (Proxmox's own is /etc/pve/pve-root-ca.pem)"
    max_bytes = 8 << 20

    def __init__(self, config: ProxmoxConfig) -> None:
        super().__init__(config, f"PVEAPIToken={config.token_id}=", config.token_secret)
        self.node, self.token_id = config.node, config.token_id
        # Types of entries in the list; backups need their storages.
        self.entry_types = ["node", "lxc", *config.extras]
        if "backups" in config.extras:
            self.entry_types.append("storage")
        user = config.token_id.partition("!")[0]
        # A token with privilege separation has only the privileges that its user has too.
        self.grant_hint = (
            f"run: pveum acl modify / --users {user} --tokens '{config.token_id}' --roles "
            "PVEAuditor; if pveum acl list shows it already, another role or a NoAccess further "
            "down takes it back"
        )
        node_hint = f"check that node {config.node} is up, and systemctl status pvedaemon on it"
        self.hints = {
            401: "check proxmox.token_id and proxmox.token_secret; pveum user token list "
            f"{user} and pveum user list show what is expired or disabled",
            403: self.grant_hint,
            500: "check journalctl -u pveproxy -u pve-cluster, unless a guest was just removed or "
            "migrated",
            # pveproxy's own, for what it passes on
            **dict.fromkeys(range(595, 600), node_hint),
        }
        if config.fingerprint:
            # It replaces the check of chain and host name.
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE
        connection = Connection(self.netloc, context=self.context)
        connection.fingerprint = config.fingerprint.replace(":", "").lower()
        # For loopback addresses only, see FORMS
        is_http = self.url.startswith("http:")
        self._connection = http.client.HTTPConnection(self.netloc) if is_http else connection

    def open_response(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Send a request over a kept connection: a TLS handshake takes six times as long as a call.

        If the server has closed it meanwhile, the GET is repeated once, on a new one.
        """
        reused = self._connection.sock is not None
        try:
            self._connection.request(method, f"/api2/json{path}", body, self.headers)
            return self._connection.getresponse()
        except (ConnectionError, ssl.SSLError):
            self.close()
            if not reused:
                raise
        return self.open_response(method, path, body)

    def close(self) -> None:
        self._connection.close()

    def get(self, path: str, expected: type[T]) -> T:
        """Return a response's `data`, a list or dict as expected.  Raises AgentError."""
        data = self.request("GET", path).get("data")
        if not isinstance(data, expected):
            raise self.unexpected(f"GET {path}", f"data is {type(data).__name__}")
        return data

    def version(self) -> str | None:
        """Return the version of Proxmox VE (`pvesh get /version`)."""
        return get_text(self.get("/version", dict), "version")

    def permissions(self, path: str = "") -> Mapping[str, object]:
        """Return path → privilege → 1 if it also holds below the path, else 0.

        `pvesh get /access/permissions --path PATH`; only with a path are inherited ones included.
        """
        return self.get("/access/permissions" + (f"?path={path}" if path else ""), dict)

    def resources(self) -> Entries:
        """Return this node's entries in `pvesh get /cluster/resources`, sorted.

        Guests need VM.Audit, storages Datastore.Audit.  pveproxy answers this itself; /nodes/N/lxc
        costs pvedaemon 15 to 22 ms of CPU for each running container, and one that hangs blocks a
        worker for good.
        """
        path = "/cluster/resources"
        entries = [entry for entry in self.get(path, list) if isinstance(entry, dict)]
        nodes = sorted(str(entry.get("node")) for entry in entries if entry.get("type") == "node")
        if self.node not in nodes:
            hint = f"set proxmox.node to one of (case-sensitive): {sanitize(', '.join(nodes))}"
            raise AgentError(f"GET {path}: node {self.node} is not listed; {hint}")
        own = [entry for entry in entries if entry.get("node") == self.node]
        entries = [entry for entry in own if entry.get("type") in self.entry_types]
        # Omitting a guest would claim that it does not exist.
        if not all(get_vmid(entry) for entry in entries if entry["type"] in ("lxc", "qemu")):
            raise self.unexpected(f"GET {path}", "a guest without a valid vmid")
        return sorted(entries, key=lambda entry: (get_vmid(entry), str(entry.get("storage"))))

    def list_lxc(self) -> Entries:
        """Return this node's containers; the agent itself uses `resources`."""
        return [entry for entry in self.resources() if entry["type"] == "lxc"]

    def node_status(self) -> Mapping[str, object]:
        """Return `pvesh get /nodes/NODE/status` (Sys.Audit on /nodes/NODE)."""
        return self.get(f"/nodes/{self.node}/status", dict)

    def guest_config(self, vmid: int, guest_type: str = "lxc") -> Mapping[str, object]:
        """Return `pvesh get /nodes/NODE/TYPE/VMID/config --current 1` (VM.Audit on /vms/VMID)."""
        return self.get(f"/nodes/{self.node}/{guest_type}/{vmid}/config?current=1", dict)

    def backups(self, storage: str) -> list[Backup]:
        """Return the newest backup of each guest on a storage (Datastore.Audit on it).

        Only a dry run of pruning shows backups to a read-only token:
        `pvesh get /nodes/NODE/storage/STORAGE/prunebackups --prune-backups keep-all=1`.
        """
        name = urllib.parse.quote(storage, safe="")
        path = f"/nodes/{self.node}/storage/{name}/prunebackups?prune-backups=keep-all%3D1"
        newest: dict[int, tuple[int, str]] = {}
        for entry in self.get(path, list):
            # A renamed file has no guest, and not the backup's date.
            if lookup(entry, "mark") == "renamed":
                continue
            vmid, created = get_vmid(entry), get_int(entry, "ctime") or 0
            volid = get_text(entry, "volid") or ""
            # strftime cannot do every integer.
            if not (vmid and volid and 0 < created < 2**32):
                raise self.unexpected(f"GET {path}", "a backup without guest, name or date")
            newest[vmid] = max(newest.get(vmid, (0, "")), (created, volid))
        return [
            Backup(vmid=vmid, storage=storage, volid=volid, created_at=format_time(created))
            for vmid, (created, volid) in newest.items()
        ]


# ---- systemd -------------------------------------------------------------------------------------


class CloudflaredProber(Protocol):
    def probe(self) -> str:
        """Return the unit's state, or raise any exception."""


@dataclass
class SystemctlProber:
    unit: str

    def probe(self) -> str:
        """Ask `systemctl is-active UNIT`.  Raises AgentError, OSError or TimeoutExpired."""
        command = ["systemctl", "is-active", "--", self.unit]
        done = subprocess.run(
            command,
            # No secret from our environment reaches the child.
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SYSTEMCTL_SECONDS,
        )
        state = done.stdout.decode(errors="replace").strip()
        if not re.fullmatch("[a-z-]{2,20}", state):
            reason = done.stderr.decode(errors="replace").partition("\n")[0] or "printed no state"
            raise AgentError(f"{' '.join(command)}: {sanitize(reason)}")
        return state


def notify(message: str) -> None:
    """Send a message to systemd if it listens (sd_notify(3)); never waits, never fails."""
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message.encode(), socket.MSG_DONTWAIT, address)


def notify_status(status: str, watchdog_seconds: float) -> None:
    """Send the status, and when systemd is to restart a silent agent."""
    watchdog = f"WATCHDOG=1\nWATCHDOG_USEC={watchdog_seconds * 1e6:.0f}\n"
    notify(f"READY=1\n{watchdog if 'WATCHDOG_USEC' in os.environ else ''}STATUS={status}")


# ---- collector -----------------------------------------------------------------------------------


@dataclass
class Collector:
    """Reads the node once and builds the report."""

    proxmox: ProxmoxClient
    cloudflared: CloudflaredProber
    _: KW_ONLY
    host_id: str
    agent_version: str = __version__
    logger: logging.Logger = LOG

    def __post_init__(self) -> None:
        self._warn = WarnOnce(self.logger)

    def collect(self, *, thorough: bool = False) -> HostReport:
        """Return the report; `thorough` also checks the token's privileges on all other paths.

        Raises AgentError if the list, the node's status or the token's privileges cannot be read.
        """
        self.proxmox.deadline = time.monotonic() + COLLECT_TIMEOUTS * self.proxmox.timeout_seconds
        # Not kept from cycle to cycle: pveproxy closes an idle connection after 5 s.
        with contextlib.closing(self.proxmox):
            resources = self.proxmox.resources()
            status = self.proxmox.node_status()
            node = next(entry for entry in resources if entry["type"] == "node")
            guests = [entry for entry in resources if entry["type"] in ("lxc", "qemu")]
            storages = [entry for entry in resources if entry["type"] == "storage"]
            self._check_token(guests, storages, thorough=thorough)
            stale = self._check_age(status, node, guests)
            host = build_host(self.proxmox.node, status, None if stale else node)
            reported = self._read_guests(guests, host.cpu_count, stale)
            targets, backups = self._read_storages(storages, stale)
        return HostReport(
            host_id=self.host_id,
            agent_version=self.agent_version,
            host=host,
            guests=tuple(reported),
            cloudflared=Cloudflared(status=self._probe()),
            reported_at=format_time(),
            storage_targets=tuple(targets),
            backups=tuple(backups),
        )

    def _check_token(self, guests: Entries, storages: Entries, *, thorough: bool) -> None:
        """Warn if the token may see too little, or do more than read.

        Proxmox silently omits what it may not see.  Raises AgentError if that may be why a list is
        empty.
        """
        token = f"token {self.proxmox.token_id}"
        granted: dict[str, object] = {}
        needed = [("VM.Audit", "/vms", guests)]
        if "storage" in self.proxmox.entry_types:
            needed.append(("Datastore.Audit", "/storage", storages))
        for privilege, path, entries in needed:
            granted |= self.proxmox.permissions(path)
            lacks = f"{token} lacks {privilege} on {path}, so entries may be missing"
            # 0 holds for the path alone.
            holds = lookup(granted, path, privilege)
            problem = "" if holds else f"{lacks}; {self.proxmox.grant_hint}"
            if problem and not entries:
                raise AgentError(problem)
            self._warn.problem(f"{privilege} on {path}", problem)
        # For the excess alone: without Sys.Audit, reading the status would have failed.
        granted |= self.proxmox.permissions(f"/nodes/{self.proxmox.node}")
        if thorough:
            granted |= self.proxmox.permissions()
        found = {name for names in granted.values() if isinstance(names, dict) for name in names}
        excess = ", ".join(sorted(name for name in found if not name.endswith(".Audit")))
        hint = "remove every role except PVEAuditor; pveum acl list shows them"
        problem = f"{token} can do more than read: {sanitize(excess)}; {hint}" if excess else ""
        self._warn.problem("excess privileges", problem)

    def _check_age(self, status: object, node: object, guests: Entries) -> bool:
        """Return whether the list is too old to believe; warn if pvestatd does not refresh it.

        Proxmox repeats the last values for 5 minutes, then says unknown.
        """
        age = (get_int(status, "uptime") or 0) - (get_int(node, "uptime") or math.inf)
        stale = not 0 <= age <= MAX_LIST_AGE_SECONDS
        unknown = stale or {get_text(guest, "status") for guest in guests} == {"unknown"}
        hint = "check systemctl status pvestatd (usual cause: a storage that does not answer)"
        problem = f"pvestatd has reported no guests in the last {MAX_LIST_AGE_SECONDS} s, so they"
        self._warn.problem("pvestatd", f"{problem} are unknown; {hint}" if unknown else "")
        return stale

    def _read_guests(self, entries: Entries, cpu_count: int | None, stale: bool) -> list[Guest]:
        guests, failures = [], []
        for entry in entries:
            config = None
            try:
                config = self.proxmox.guest_config(get_vmid(entry), str(entry["type"]))
            except AgentError as exc:
                failures.append(exc)
            guests.append(build_guest(entry, config, cpu_count, stale=stale))
        count = f"{len(failures)} of {len(guests)} guests are unknown"
        self._warn.problem("guests", f"{count}, the first: {failures[0]}" if failures else "")
        return guests

    def _read_storages(
        self, entries: Entries, stale: bool
    ) -> tuple[list[StorageTarget], list[Backup]]:
        """Return storages and newest backups; a storage whose backups cannot be read is unknown.

        Only what pvestatd has just found available is asked: a storage that hangs blocks a worker
        of pvedaemon for good.
        """
        targets: list[StorageTarget] = []
        backups: list[Backup] = []
        for entry in entries:
            target = build_storage(entry, stale=stale)
            topic = f"storage {target.storage}"
            holds_backups = "backup" in (get_text(entry, "content") or "").split(",")
            # A Proxmox Backup Server has its own API, and its own token.
            is_asked = holds_backups and target.status == "available" and target.type != "pbs"
            try:
                if is_asked and "backups" in self.proxmox.entry_types:
                    backups += self.proxmox.backups(target.storage)
                    self._warn.resolved(topic)
            except AgentError as exc:
                self._warn.problem(topic, f"{topic} is unknown: {exc}")
                target = build_storage(entry, stale=True)
            targets.append(target)
        backups.sort(key=lambda backup: (backup.vmid, backup.storage))
        return targets, backups

    def _probe(self) -> str:
        state, problem = "unknown", ""
        try:
            state = self.cloudflared.probe()
        except Exception as exc:
            # No prober may stop the heartbeat.
            problem = f"cloudflared.status is unknown: {sanitize(describe(exc))}"
        self._warn.problem("cloudflared.status", problem)
        return state


# ---- hub client ----------------------------------------------------------------------------------


class HubClient(Client):
    """Posts reports by urllib.request, which can also use a proxy."""

    section = "hub"
    server = "the hub"
    where_to_look = "the hub's log"
    max_bytes = 1 << 20

    def __init__(self, config: HubConfig, *, logger: logging.Logger = LOG) -> None:
        super().__init__(config, "Bearer ", config.api_key)
        self.headers |= dict.fromkeys(("Accept", "Content-Type"), "application/json")
        self.headers["User-Agent"] = f"felhom-agent/{__version__}"
        login = "check hub.api_key and hub.host_id, or remove another login in front of the hub"
        gateway = "the web server in front of the hub cannot reach it"
        self.hints = {
            **dict.fromkeys((401, 403), login),
            **dict.fromkeys((404, 405), f"check hub.url, to which {REPORT_PATH} is added"),
            413: "let the hub, and the web server in front of it, accept 4 MiB",
            429: "the hub asks the agent to wait",
            # 520 to 526 are Cloudflare's.
            **dict.fromkeys((502, 503, 504, *range(520, 527)), gateway),
        }
        self._logger = logger
        self._warn = WarnOnce(logger)
        # urllib.request.build_opener would add a handler that follows redirects.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.HTTPHandler())
        self._opener.add_handler(HubHTTPSHandler(context=self.context))
        proxy, host = urllib.request.getproxies().get("https", ""), self.netloc
        bypass = urllib.request.proxy_bypass(host) or re.fullmatch(LOOPBACK + PORT, host)
        if proxy and not bypass:
            # Any other scheme would not encrypt the password either.
            form = r"http://([^@/:\s]+(:[^@/\s]*)?@)?(?P<address>[^@/\s]*[^@/:\s]:[0-9]{1,5})/?"
            match = re.fullmatch(form, proxy)
            if not match:
                expected = "http://[user:password@]host:port, with @ as %40 and / as %2F"
                raise ConfigError(f"config: https_proxy: must be {expected}; or set no_proxy")
            self.via = f" through the proxy {match['address']}"
            self._opener.add_handler(urllib.request.ProxyHandler())

    def report(self, report: HostReport) -> ControlEnvelope:
        """Send one report and return the hub's reply.  Raises TransportError or HTTPError."""
        reply = self.request("POST", REPORT_PATH, report.to_json().encode())
        envelope = build_envelope(reply)
        self._logger.debug("%s", envelope)
        name, problem = "poll_interval_seconds", ""
        if name in reply and envelope.poll_interval_seconds is None:
            problem = f"the hub's {name} is not an integer and is ignored"
        self._warn.problem(name, problem)
        return envelope

    def open_response(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url + path, body, self.headers, method=method)
        response: http.client.HTTPResponse = self._opener.open(request)
        return response

    def failure_hint(self, exc: Exception) -> str:
        # http.client has the proxy's status only in its message.
        refused = re.search(r"Tunnel connection failed: ([0-9]+)", str(exc))
        status = refused[1] if refused else ""
        if status in ("401", "407"):
            return "check user and password in https_proxy"
        if status.startswith("5"):
            return "the proxy cannot reach the hub; check hub.url"
        if refused or (self.via and isinstance(exc, ConnectionRefusedError | socket.gaierror)):
            return "check https_proxy, and that the proxy allows host and port; or set no_proxy"
        return super().failure_hint(exc)


# ---- loop ----------------------------------------------------------------------------------------


def retry_delay(interval: float, failures: int, retry_after: int | None) -> float:
    """Return the seconds to wait after `failures` in a row.

    15, 60, 240, … up to the interval, times 0.5 to 1; or Retry-After, up to an hour, times 1 to 2.
    The random factor keeps agents from returning together.
    """
    if retry_after:
        return min(retry_after, MAX_POLL_SECONDS) * random.uniform(1, 2)
    return min(interval, FIRST_RETRY_SECONDS * 4.0 ** min(failures - 1, 6)) * random.uniform(0.5, 1)


@dataclass
class Loop:
    """Collects and reports forever."""

    collector: Collector
    client: HubClient
    interval: float
    _: KW_ONLY
    logger: logging.Logger = LOG
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = time.sleep
    # How long a cycle may take, for systemd's watchdog
    cycle_seconds: float = 0

    def __post_init__(self) -> None:
        self._warn = WarnOnce(self.logger)
        self._failures = 0

    def run(self, cycles: float = math.inf) -> None:
        """Run the first cycle at once, each further one when due."""
        while cycles > 0:
            cycles -= 1
            delay, status = self.cycle()
            notify_status(f"{status}, next in {delay:.0f} s", delay + self.cycle_seconds)
            self.wait(delay)

    def cycle(self) -> tuple[float, str]:
        """Collect and report once; return the seconds to wait, and how it went."""
        began = self.clock()
        try:
            report = self.collector.collect()
            requested = self.client.report(report).poll_interval_seconds
        except Exception as exc:
            return self._after_failure(exc)
        self._warn.resolved("report", f", accepted after failed tries: {self._failures}")
        self._failures = 0
        self.logger.debug("report accepted, %d guests", len(report.guests))
        interval = self.interval if requested is None else clamp_poll(requested)
        if interval != self.interval:
            self.logger.info("interval is now %d s, the hub asked for %d s", interval, requested)
            self.interval = interval
        accepted = f"last report {time.strftime('%H:%M:%S')} accepted, {len(report.guests)} guests"
        return max(0.0, began + self.interval - self.clock()), accepted

    def _after_failure(self, exc: Exception) -> tuple[float, str]:
        # A bug must not stop the heartbeat either.
        text = failure_message(exc)
        self._failures += 1
        self._warn.problem("report", text, traceback=not isinstance(exc, AgentError))
        retry_after = getattr(exc, "retry_after", None)
        delay = retry_delay(self.interval, self._failures, retry_after)
        return delay, f"failed tries: {self._failures}, the last: {sanitize(text, 200)}"


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 on success, 1 if collect or report failed, 2 if the configuration is invalid."""
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
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(arguments.log_level.upper())
    hub = None
    try:
        config = load_config(arguments.config, os.environ)
        config.validate(hub=arguments.selftest != "proxmox")
        prober = SystemctlProber(config.cloudflared.unit)
        collector = Collector(ProxmoxClient(config.proxmox), prober, host_id=config.hub.host_id)
        if arguments.selftest != "proxmox":
            hub = HubClient(config.hub)
    except ConfigError as exc:
        for line in str(exc).split("\n"):
            LOG.error("%s", line)
        return 2
    if arguments.selftest == "config":
        print(json.dumps(config.redacted(), indent=2))
        return 0
    if arguments.selftest or hub is None:
        return selftest(collector, hub)
    run_daemon(collector, hub, config.hub)
    return 0


def selftest(collector: Collector, hub: HubClient | None) -> int:
    """Collect once, send the report if there is a hub, and print both as JSON."""
    result: dict[str, Any] = {}
    try:
        if hub is None:
            LOG.info("Proxmox VE %s", collector.proxmox.version())
        report = collector.collect(thorough=hub is None)
        result["report"] = json.loads(report.to_json())
        if hub is not None:
            result["envelope"] = dataclasses.asdict(hub.report(report))
    except Exception as exc:
        result["error"] = failure_message(exc)
        LOG.error("%s", result["error"], exc_info=not isinstance(exc, AgentError))
    if "report" in result:
        # Empty if there is no hub section.
        if not report.host_id:
            del result["report"]["host_id"]
        print(json.dumps(result["report"] if hub is None else result, indent=2))
    return 1 if "error" in result else 0


def run_daemon(collector: Collector, hub: HubClient, config: HubConfig) -> None:
    def stop(number: int, _: object) -> None:
        notify("STOPPING=1")
        LOG.info("stopped by %s", signal.Signals(number).name)
        # Not sys.exit, whose exception a finalizer can lose.
        os._exit(0)

    cycle_seconds = COLLECT_TIMEOUTS * collector.proxmox.timeout_seconds + hub.timeout_seconds
    cycle_seconds += SYSTEMCTL_SECONDS + DNS_SECONDS
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    started = "started version=%s host_id=%s url=%s interval=%d"
    LOG.info(started, __version__, config.host_id, config.url, config.poll_seconds)
    notify_status("preparing the first report", cycle_seconds)
    Loop(collector, hub, config.poll_seconds, cycle_seconds=cycle_seconds).run()


if __name__ == "__main__":
    sys.exit(main())
