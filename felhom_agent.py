"""felhom-agent: reads one Proxmox VE node and reports it to a hub.

What leaves the host: one JSON document per interval (`HostReport`), by POST to `hub.url` and nowhere else: figures of the node,
its LXC containers with what each is given, and the state of the cloudflared unit.  The hub's answer (`ControlEnvelope`) can
change the interval, between one minute and one hour, and nothing else.

What it never does: change anything on the node (Proxmox only ever gets GET), write a file, follow a redirect, run a command
other than `systemctl is-active`, or show its two secrets.  The token's secret goes to Proxmox alone, the API key to the hub alone.

How to read it: top to bottom, each part uses only those above it; `main` at the end ties them together.  A guest comes from
`ProxmoxClient.list_lxc` and `guest_configs` through `build_guest` into the report of `Collector.collect`, which
`HubClient.report` sends.  The interval in the answer goes through `Loop._adopt` to `next_try`, which says when to go on.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import contextlib
import dataclasses
import email.utils
import errno
import functools
import gc
import hashlib
import http.client
import io
import ipaddress
import json
import logging
import math
import os
import random
import re
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, Self, TypeVar, cast

__version__: Final = "0.3.0"

MIN_POLL_SECONDS: Final = 60
MAX_POLL_SECONDS: Final = 3600
RETRY_SECONDS: Final = 15
PROBE_SECONDS: Final = 5
# A collect ends after this many of proxmox.timeout_seconds: that is enough for each call before the guests, and leaves the guests some.
COLLECT_TIMEOUTS: Final = 6
# pveproxy has three workers, so a fourth request in flight only queues; and a TLS handshake costs as much as some ten
# configuration calls, so few guests are read over one connection.
MAX_IN_FLIGHT: Final = 3
GUESTS_PER_CONNECTION: Final = 20
MAX_PROXMOX_BYTES: Final = 8 << 20
MAX_ENVELOPE_BYTES: Final = 1 << 20
MAX_CONTAINERS: Final = 10_000  # objects and arrays in one answer, of which each takes far more memory than its two characters
MAX_FILE_BYTES: Final = 4 << 20
MAX_HEADER_BYTES: Final = 1 << 20
MAX_HEADERS: Final = 100  # this and the next as in http.client
MAX_HEADER_LINE_BYTES: Final = 65536
PIECE_BYTES: Final = 65536
MAX_FIGURE: Final = 2**53 - 1  # above it a JSON number is not exact in every language; in bytes it is 8 PiB
DEFAULT_PATH: Final = "/etc/felhom-agent/agent.json"
GRANT: Final = "pveum acl modify / --users {user} --roles PVEAuditor"

LOG: Final = logging.getLogger("felhom-agent")


# ---- errors, and what is said of them ---------------------------------------------------------------------------------------


class AgentError(Exception):
    """A cycle failed.  The text says operation, result and mend and holds no secret; `headline` is for `systemctl status`."""

    def __init__(self, text: str, *, headline: str = "collect failed", retryable: bool = True, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.headline = headline
        self.retryable = retryable  # whether asking again before the next interval can help
        self.retry_after = retry_after  # seconds, where the server named them


class TransportError(AgentError):
    """No answer from the server that was meant: connect, TLS, time-out, cut off, or an answer of another shape."""


class HTTPError(AgentError):
    """The server answered with the `status` of a failure."""

    def __init__(self, text: str, *, status: int, headline: str = "", retry_after: float | None = None) -> None:
        passing = status in (408, 425, 429) or not 400 <= status < 500
        super().__init__(text, headline=headline, retryable=passing, retry_after=retry_after if status in (429, 503) else None)
        self.status = status


class ConfigError(Exception):
    """The configuration cannot be used; one problem a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(f"config: {problem}" for problem in problems))


def explain(exc: Exception) -> tuple[str, Exception | None]:
    """Return what to say of `exc`; a fault of our own comes with itself, for its traceback."""
    return (str(exc), None) if isinstance(exc, AgentError) else (f"a fault of the agent, please report it: {type(exc).__name__}", exc)


def clean(text: str, secrets: Iterable[str] = (), limit: int = 300) -> str:
    """Return `text` fit for a log line: secrets replaced, control characters escaped, cut at `limit` characters."""
    for form in secrets:
        text = text.replace(form, "***")
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def secret_forms(*secrets: str) -> tuple[str, ...]:
    """Return each secret as it is and as JSON, Python, a URL and base64 write it, the longest first."""
    forms = set()
    for secret in secrets:
        encoded = secret.encode("utf-8", "surrogatepass")
        forms |= {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], urllib.parse.quote(encoded, ""), urllib.parse.quote(encoded)}
        forms |= {base64.b64encode(encoded).decode().rstrip("="), base64.urlsafe_b64encode(encoded).decode().rstrip("=")}
    return tuple(sorted(forms - {""}, key=len, reverse=True))


class Changes:
    """Says what is wrong when it begins or changes, repeats it at debug level, and says when it is over."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told: dict[str, str] = {}

    def tell(self, topic: str, wrong: str, right: str = "", bug: Exception | None = None) -> None:
        """Warn of what is `wrong`, with the traceback of a `bug`; say that it is `right` where nothing is wrong any more."""
        before = self._told.pop(topic, "")
        if wrong:
            self._told[topic] = wrong
            again = before == wrong
            self._logger.log(logging.DEBUG if again else logging.WARNING, "%s", wrong, exc_info=None if again else bug)
        elif before:
            self._logger.info("%s", right)


# ---- configuration ----------------------------------------------------------------------------------------------------------


def read_file(path: str) -> tuple[bytes, int]:
    """Return content and mode bits of a regular file; OSError or ValueError for anything else, and never a wait."""
    # O_NONBLOCK: opening a FIFO would wait for its writer.  O_NOFOLLOW: who can plant a link must not choose what is read.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    return content, mode


def explain_file(exc: Exception) -> str:
    """Return why a file cannot be used, in the operator's words."""
    if isinstance(exc, ssl.SSLError):
        return "holds no PEM certificate"
    if isinstance(exc, OSError):
        return "is a symbolic link, name the file itself" if exc.errno == errno.ELOOP else str(exc.strerror)
    return str(exc)  # of read_file or json: what and where, never the content


def is_loopback(host: str | None) -> bool:
    """Tell whether `host` is `localhost` or a loopback address."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def check_url(url: str, *, prefix: bool = False) -> str:
    """Return what is wrong with a base address, "" where nothing is; with `prefix` it may have a path."""
    form = "https://host[:port]" + ("[/prefix]" if prefix else "")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return f"must be {form}"
    if re.search("[@?#]", url):  # not shown: this is where people put passwords
        return f"must be {form}, without user, query and fragment"
    if not host or "%" in parts.netloc or not re.fullmatch(r"[!-~]+", url) or (parts.path.strip("/") and not prefix):
        return f"must be {form}, got {clean(url)}"
    return "" if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)) else f"must be https, got {clean(url)}"


def check_timeout(seconds: int) -> str:
    """Return what is wrong with a time-out."""
    return "" if 1 <= seconds <= 300 else f"must be from 1 to 300, got {seconds}"


def check_match(pattern: str, meaning: str) -> Callable[[str], str]:
    """Return a check that a text matches `pattern` as a whole; what does not is not shown, it may be a secret in the wrong place."""
    return lambda text: "" if re.fullmatch(pattern, text) else f"must be {meaning}"


def setting(default: str | int, check: Callable[[Any], str] = lambda _: "", *, secret: bool = False) -> Any:
    """Return a configuration key with its default and what checks it; a secret is not shown."""
    return field(default=default, repr=not secret, metadata={"check": check})


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the configuration; the environment has FELHOM_AGENT_SECTION_KEY for each key."""

    section: ClassVar[str]

    @classmethod
    def load(cls, document: Mapping[str, object], environ: Mapping[str, str], file: str, problems: dict[str, str]) -> Self:
        """Return the section from the file's document and the environment; `problems` gets what is wrong, by section and key."""
        given = document.get(cls.section)
        given = given if isinstance(given, dict) else {}
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            value = given.pop(item.name, item.default)
            kind: type[str] | type[int] = type(item.default)  # type: ignore[assignment]
            variable = f"FELHOM_AGENT_{cls.section}_{item.name}".upper()
            overlay = environ.get(variable)
            if overlay and (kind is str or re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", overlay)):
                value = kind(overlay)
            elif overlay:
                LOG.warning("config: %s is not an integer and is ignored", variable)
            if type(value) is not kind:  # a boolean is no integer
                problems[f"{cls.section}.{item.name}"] = f"must be {'a string' if kind is str else 'an integer'}"
                value = item.default
            values[item.name] = value
        for key in given:
            LOG.warning("config: unknown key %s.%s is ignored", cls.section, clean(key))
        if values.get("ca_file"):
            values["ca_file"] = os.path.join(os.path.dirname(os.path.abspath(file)), values["ca_file"])
        loaded = cls(**values).with_defaults()
        for item in dataclasses.fields(cls):
            if problem := item.metadata["check"](getattr(loaded, item.name)):
                problems.setdefault(f"{cls.section}.{item.name}", problem if getattr(loaded, item.name) != "" else "is required")
        return loaded

    def with_defaults(self) -> Self:
        """Return it with those defaults that no constant is."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxmoxConfig(Section):
    """How to reach the node's API, and who asks; `timeout_seconds` bounds one request from connect to last byte."""

    section: ClassVar[str] = "proxmox"
    url: str = setting("https://127.0.0.1:8006", check_url)
    node: str = setting("", check_match(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?", "a node name"))
    token_id: str = setting("", check_match(r"[!-.0-9;-~]+@[A-Za-z0-9._-]+![A-Za-z0-9._-]+", "user@realm!tokenname"))
    token_secret: str = setting("", check_match(r"[!-~]+", "printable ASCII without spaces (not shown)"), secret=True)
    ca_file: str = setting("")
    fingerprint: str = setting("", check_match(r"(([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2})?", "64 hexadecimal digits, colons or not"))
    timeout_seconds: int = setting(10, check_timeout)

    def with_defaults(self) -> Self:
        """Return it with the short host name as node where none is named."""
        return dataclasses.replace(self, node=self.node or socket.gethostname().partition(".")[0])


def clamp_poll(seconds: int) -> int:
    """Return `seconds` inside the bounds of a poll interval."""
    return max(MIN_POLL_SECONDS, min(MAX_POLL_SECONDS, seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig(Section):
    """Where reports go, as whom and how often; `timeout_seconds` bounds the whole POST."""

    section: ClassVar[str] = "hub"
    url: str = setting("", functools.partial(check_url, prefix=True))
    host_id: str = setting("", check_match(r"(?!.*[\x00-\x1f\ud800-\udfff])\S(.{0,253}\S)?", "1 to 255 characters"))
    api_key: str = setting("", check_match(r"[!-~]+", "printable ASCII without spaces (not shown)"), secret=True)
    poll_seconds: int = setting(900)
    timeout_seconds: int = setting(30, check_timeout)
    ca_file: str = setting("")

    def with_defaults(self) -> Self:
        """Return it with the interval inside its bounds."""
        used = clamp_poll(self.poll_seconds)
        if used != self.poll_seconds:
            LOG.warning("config: hub.poll_seconds: %d is not from 60 to 3600, using %d", self.poll_seconds, used)
        return dataclasses.replace(self, poll_seconds=used)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudflaredConfig(Section):
    """Which systemd unit carries the tunnel."""

    section: ClassVar[str] = "cloudflared"
    # A leading dash would be an option of systemctl.
    unit: str = setting("cloudflared.service", check_match(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]{0,254}", "the name of a systemd unit"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration; `problems` is what is wrong, by section and key; a value of a wrong type has its default here."""

    proxmox: ProxmoxConfig
    hub: HubConfig
    cloudflared: CloudflaredConfig
    problems: Mapping[str, str]

    def validate(self, *, hub: bool = True) -> None:
        """Raise ConfigError with every problem at once; without `hub` that section is not looked at."""
        found = [f"{key}: {problem}" for key, problem in self.problems.items() if hub or key.partition(".")[0] != "hub"]
        if found:
            raise ConfigError(*found)

    def redacted(self) -> dict[str, dict[str, object]]:
        """Return it as a JSON object, as "***" each secret, and what is refused: it may be a secret in the wrong place."""
        shown: dict[str, dict[str, object]] = {}
        for part in (self.proxmox, self.hub, self.cloudflared):
            for item in dataclasses.fields(part):
                value = getattr(part, item.name)
                hide = value and (not item.repr or f"{part.section}.{item.name}" in self.problems)
                shown.setdefault(part.section, {})[item.name] = "***" if hide else value
        return shown


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object; ValueError for a key that stands twice, of which one would silently win."""
    document: dict[str, object] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"duplicate key {clean(key)}")
        document[key] = value
    return document


def load_config(path: str | None, environ: Mapping[str, str]) -> Config:
    """Read the configuration file, lay the environment over it, fill in defaults; ConfigError where the file cannot be used.

    `path` None: $FELHOM_AGENT_CONFIG, else $CREDENTIALS_DIRECTORY/agent.json where it exists, else the default path.
    """
    credential = os.path.join(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", "agent.json")
    named = path or environ.get("FELHOM_AGENT_CONFIG") or (credential if os.path.lexists(credential) else "")
    file = named or DEFAULT_PATH
    document: object = {}
    try:
        content, mode = read_file(file)
        if mode & 0o044 and file != credential:  # systemd itself gives a credential to the service's user alone
            LOG.warning("config: %s can be read by others than its owner: chmod 600 %s", clean(file), clean(file))
        document = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except FileNotFoundError as exc:
        if named:  # else the environment may supply everything
            raise ConfigError(f"{clean(file)}: no such file") from exc
        LOG.info("config: %s does not exist, the environment alone counts", file)
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{clean(file)}: {explain_file(exc)}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{clean(file)}: must be a JSON object")
    known = ("proxmox", "hub", "cloudflared", "authz")
    for key in document.keys() - known:
        LOG.warning("config: unknown key %s is ignored", clean(key))
    problems = {key: "must be an object" for key in known if not isinstance(document.get(key, {}), dict)}
    return Config(
        proxmox=ProxmoxConfig.load(document, environ, file, problems),
        hub=HubConfig.load(document, environ, file, problems),
        cloudflared=CloudflaredConfig.load(document, environ, file, problems),
        problems=problems,
    )


# ---- wire contract ----------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> object:
    """Return what `text` says; ValueError for all that is no JSON, NaN and nesting without end included, and for a flood."""
    if text.count("{") + text.count("[") > MAX_CONTAINERS:
        raise ValueError("too many objects and arrays")
    try:
        return json.loads(text, parse_constant=int)  # of NaN and the infinities alone: no integers, so int raises
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_number(value: object, most: int = MAX_FIGURE) -> float | None:
    """Return a number from 0 to `most`, also from a string as Proxmox sends many; None for all else, a boolean too."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", value):
        value = float(value) if "." in value else int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
        return value  # NaN fails both comparisons
    return None


def parse_integer(value: object, least: int = 0, most: int = MAX_FIGURE) -> int | None:
    """Return a whole number inside the bounds, None for all else."""
    number = parse_number(value, most)
    return int(number) if number is not None and number == int(number) and number >= least else None


def parse_whole(value: object) -> int | None:
    """Return a JSON whole number, held inside ±MAX_FIGURE; None for all else, a boolean and an inexact float (1e99) included."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_FIGURE:
        value = int(value)
    return max(-MAX_FIGURE, min(MAX_FIGURE, value)) if type(value) is int else None  # a boolean is no integer


def parse_flag(value: object) -> bool | None:
    """Return a boolean, None for all else."""
    return value if isinstance(value, bool) else None


def parse_text(value: object) -> str | None:
    """Return a string of at most 256 characters that every JSON reader takes (lone surrogates replaced), None for all else."""
    return value[:256].encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else None


def parse_cores(value: object) -> int | None:
    """Return a number of cores; None for what Proxmox does not allow."""
    return parse_integer(value, 1, 8192)


def parse_version(value: object) -> str | None:
    """Return the version in `pve-manager/9.2.11/14a22df3`."""
    match = re.match(r"pve-manager/([^/\s]+)", parse_text(value) or "")
    return match[1] if match else None


def parse_load(value: object) -> list[float] | None:
    """Return the three load averages, which Proxmox sends as strings; None unless all can be read."""
    numbers: list[Any] = [parse_number(each) for each in value] if isinstance(value, list) else []
    return numbers if len(numbers) == 3 and None not in numbers else None


def parse_object(value: object) -> Mapping[str, object]:
    """Return a JSON object, an empty one for all else: its figures are then not known."""
    return value if isinstance(value, dict) else {}


def parse_volume_size(volume: object) -> int | None:
    """Return the size in bytes of a volume such as `local:100/vm-100-disk-0.raw,size=8G`, 0 where it names none (a bind mount).

    None where it cannot be read.  Source: PVE::JSONSchema, format `disk-size`.
    """
    first, *options = volume.split(",") if isinstance(volume, str) else ("",)
    if not re.match(r"(volume=)?(/|[^:/]+:)", first):
        return None
    option = next((option for option in options if option.startswith("size=")), None)
    if option is None:
        return 0
    match = re.fullmatch(r"size=([0-9]{1,15}(?:\.[0-9]{1,15})?)([KMGT]?)", option)
    return parse_integer(int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")), 1) if match else None


def figure(parse: Callable[[Any], Any], *path: str) -> Any:
    """Return a field that `parse` reads from an answer, where `path` leads."""

    def read(answer: object) -> Any:
        for key in path:
            answer = parse_object(answer).get(key)
        return parse(answer)

    return field(default=None, metadata={"read": read})


def parse_figures(kind: type[HostMetrics | ControlEnvelope], answer: Mapping[str, object]) -> dict[str, Any]:
    """Return the figures of `kind` as an answer says them."""
    return {item.name: item.metadata["read"](answer) for item in dataclasses.fields(kind) if item.metadata}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMetrics:
    """The node's figures (`pvesh get /nodes/NODE/status`); None is what Proxmox did not say."""

    node: str
    pve_version: str | None = figure(parse_version, "pveversion")
    kernel_version: str | None = figure(parse_text, "current-kernel", "release")
    uptime_seconds: int | None = figure(parse_integer, "uptime")
    cpu_model: str | None = figure(parse_text, "cpuinfo", "model")
    cpu_count: int | None = figure(parse_cores, "cpuinfo", "cpus")
    cpu_usage: float | None  # not from the status: there it is since the answering worker's last look, and 0 on its first
    load_average: Sequence[float] | None = figure(parse_load, "loadavg")
    memory_total_bytes: int | None = figure(parse_integer, "memory", "total")
    memory_used_bytes: int | None = figure(parse_integer, "memory", "used")
    swap_total_bytes: int | None = figure(parse_integer, "swap", "total")
    swap_used_bytes: int | None = figure(parse_integer, "swap", "used")
    rootfs_total_bytes: int | None = figure(parse_integer, "rootfs", "total")
    rootfs_used_bytes: int | None = figure(parse_integer, "rootfs", "used")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """What a guest is given, running or not."""

    cores: int | None
    memory_bytes: int | None
    disk_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """One LXC container; where its configuration cannot be read its status is `unknown` and it has no `spec`."""

    vmid: int
    type: str = "lxc"
    name: str
    status: str
    controller_version: str = ""
    spec: GuestSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloudflared:
    """The tunnel's unit, in systemd's word for its state."""

    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageTarget:
    """A storage for backups (`pvesh get /nodes/NODE/storage`); this and the next four are defined, not filled yet."""

    storage: str
    type: str
    status: str
    total_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A backup in a storage (`pvesh get /nodes/NODE/storage/STORAGE/content`)."""

    vmid: int
    storage: str
    volid: str
    created_at: str
    size_bytes: int | None
    verified: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTest:
    """A backup that was restored to see whether it can be."""

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
    """What leaves the host; `reported_at` is UTC in RFC 3339, whole seconds, when the collect ended."""

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
        """Return the report as compact JSON in ASCII; a `spec` that is not known is left out."""

        def fields(part: Any) -> dict[str, object]:
            return {name: getattr(part, name) for name in part.__slots__ if name != "spec" or part.spec is not None}

        return json.dumps(self, default=fields, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlEnvelope:
    """The hub's answer.  Only `poll_interval_seconds` is acted on; None is what the hub did not say."""

    poll_interval_seconds: int | None = figure(parse_whole, "poll_interval_seconds")
    blocked: bool | None = figure(parse_flag, "blocked")
    desired_generation: int | None = figure(parse_whole, "desired_generation")
    has_signed_ops: bool | None = figure(parse_flag, "has_signed_ops")


def build_host(node: str, status: Mapping[str, object], nodes: Iterable[Mapping[str, object]]) -> HostMetrics:
    """Return the node's figures from `/nodes/NODE/status`, and its CPU usage from its own entry in `/nodes`."""
    usage = next((entry.get("cpu") for entry in nodes if entry.get("node") == node), None)
    return HostMetrics(node=node, cpu_usage=parse_number(usage, 1), **parse_figures(HostMetrics, status))


def build_guest(vmid: int, listed: Mapping[str, object], config: Mapping[str, object] | None, cpu_count: int | None) -> Guest:
    """Return a container from its entry in the list and its configuration, None where that cannot be read."""
    name, status = parse_text(listed.get("name")) or "", (parse_text(listed.get("status")) or "unknown")[:64]
    if config is None or status == "unknown":
        return Guest(vmid=vmid, name=name, status="unknown")
    memory = parse_integer(config.get("memory", 512), 1, MAX_FIGURE >> 20)  # MiB; 512 is Proxmox's own default
    disk = parse_volume_size(config["rootfs"]) if "rootfs" in config else 0
    spec = GuestSpec(
        cores=parse_cores(config.get("cores", cpu_count)),  # unset: all that the node has
        memory_bytes=None if memory is None else memory << 20,
        disk_bytes=parse_integer(listed.get("maxdisk")) if disk == 0 else disk,
    )
    return Guest(vmid=vmid, name=name, status=status, spec=spec)


# ---- HTTPS transport --------------------------------------------------------------------------------------------------------

NOT_THIS: Final = "check {section}.url: this is not {server}"
# How to mend what may go wrong with either server, by the words with which it is told; README.md has them all for the operator.
MENDS: Final[Mapping[str, str]] = {
    "connection refused": "check host and port in {section}.url, and whether {daemon} runs there",
    "no complete answer in time": "see whether that host or the network is overloaded; {section}.timeout_seconds is the limit",
    "the name cannot be resolved": "check the host name in {section}.url, and this host's resolver",
    "the connection was closed": "check {section}.url, http or https and the port; else see the log of {daemon}",
    "TLS failed": "check the port in {section}.url, and the log of {daemon}",
    "no TLS there": "check the port in {section}.url: it must be the one for https",
    "the certificate is not signed": "name the CA that signed it in {section}.ca_file",
    "the certificate is valid": "renew it, or set the clock of this host",
    "the certificate is for": "use one of these names in {section}.url",
    "no answer": NOT_THIS,
    "the answer is too large": NOT_THIS,
    "3": "set {section}.url to the address itself, nothing is followed",
}
# What shows that the server has closed a kept connection meanwhile; the question is then asked once more on a new one.
GONE: Final = (ConnectionResetError, BrokenPipeError)
# The words for what Python raises; the first type that fits counts.
FAILURES: Final[Sequence[tuple[tuple[type[Exception], ...], str]]] = (
    ((TimeoutError,), "no complete answer in time"),
    ((socket.gaierror,), "the name cannot be resolved"),
    ((ConnectionRefusedError,), "connection refused"),
    ((ConnectionError, ssl.SSLZeroReturnError, http.client.IncompleteRead), "the connection was closed before the answer was complete"),
    ((ssl.SSLError,), "TLS failed"),
    ((http.client.HTTPException, ValueError), "no answer in HTTP"),
)


T = TypeVar("T")


class Failure(Exception):
    """What went wrong with a request, in words that `mends` may know."""


def words_for(exc: Exception) -> str:
    """Return what to say of what Python raised while a server was asked."""
    if isinstance(exc, Failure):
        return str(exc)
    if isinstance(exc, ssl.SSLError) and exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "no TLS there"
    words = next((words for types, words in FAILURES if isinstance(exc, types)), "")
    return words or getattr(exc, "strerror", None) or type(exc).__name__


def parse_retry_after(value: str, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks to wait, at most an hour; None where it says nothing."""
    if re.fullmatch(r"[0-9]{1,100}", value):
        return float(min(int(value), MAX_POLL_SECONDS))
    try:
        when = email.utils.parsedate_to_datetime(value).utctimetuple()  # one without a zone is UTC (RFC 9110, 5.6.7)
        return max(0.0, min(calendar.timegm(when) - now, MAX_POLL_SECONDS))
    except (ValueError, OverflowError, TypeError):
        return None


def trust_all() -> ssl.SSLContext:
    """Return a context that accepts every certificate, for those who look at it themselves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def seconds_left(deadline: float) -> float:
    """Return the seconds until `deadline` (monotonic); TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def dial(host: str | None, port: int, deadline: float) -> socket.socket:
    """Connect until `deadline` to the first address of `host` that answers; OSError.

    Name resolution is the one step that Python cannot bound: `main` bounds it through the resolver's own settings.
    """
    seconds_left(deadline)  # else each guest that is left at the end of a cycle would wait for a silent name server
    addresses = [cast("tuple[str, int]", address[:2]) for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    failure = OSError()
    for number, address in enumerate(addresses):
        try:  # an address that does not answer leaves time for the next
            sock = socket.create_connection(address, seconds_left(deadline) / (len(addresses) - number))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as exc:
            failure = exc
    raise failure


class Channel:
    """A TCP connection, with TLS from `start_tls` on.

    TLS goes through memory, a piece at a time.  With the socket in its hands OpenSSL reads on by itself for as long as a server
    floods it with messages of TLS's own, and neither a deadline nor a signal is heard.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.tls: ssl.SSLObject | None = None
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()  # by TLS
        self.fileno, self.close = sock.fileno, sock.close

    def has_more(self) -> bool:
        """Tell whether TLS holds what has come and nobody has read: select knows of the socket alone."""
        return bool(self._received.pending or (self.tls and self.tls.pending()))

    def is_quiet(self) -> bool:
        """Tell whether the connection is open, and nothing has come on it that nobody has read."""
        return not self.has_more() and not select.select([self], [], [], 0)[0]

    def start_tls(self, context: ssl.SSLContext, host: str | None, deadline: float) -> ssl.SSLObject:
        """Shake hands until `deadline`; OSError.  What TLS then has to say goes with the first that is sent."""
        self.tls = tls = context.wrap_bio(self._received, self._to_send, server_hostname=host)

        def shake_hands() -> bool:
            tls.do_handshake()
            return True

        self._step(shake_hands, deadline, wait=True)
        return tls

    def send(self, data: bytes, deadline: float) -> None:
        """Send all of `data` until `deadline`; OSError."""
        if self.tls is not None:
            view = memoryview(data)
            while view:
                view = view[self._step(functools.partial(self.tls.write, view), deadline, wait=True) :]
            data = self._to_send.read()
        self._sock.settimeout(seconds_left(deadline))  # which bounds sendall as a whole
        self._sock.sendall(data)

    def receive(self, size: int, deadline: float, *, wait: bool) -> bytes | None:
        """Return what has come, b"" at the end; OSError.  Without `wait` None where nothing has come yet."""
        if self.tls is None:
            return self._receive(size, deadline, wait=wait)
        return self._step(functools.partial(self.tls.read, size), deadline, wait=wait)

    def _step(self, step: Callable[[], T], deadline: float, *, wait: bool) -> T | None:
        """Return what a step of TLS gives, having passed on what it has to say; without `wait` it gets one piece and no more."""
        piece: bytes | None = None
        while True:
            try:
                return step()
            except ssl.SSLError as exc:
                if self._to_send.pending:  # a message of its own, or the alert that tells the server what is wrong
                    with contextlib.suppress(OSError):
                        self.send(b"", deadline)
                if not isinstance(exc, ssl.SSLWantReadError):
                    raise
            if piece and not wait:
                return None
            piece = self._receive(PIECE_BYTES, deadline, wait=wait)
            if piece is None:
                return None
            if not piece:
                raise ConnectionResetError(errno.ECONNRESET, "closed without the end of TLS")
            self._received.write(piece)

    def _receive(self, size: int, deadline: float, *, wait: bool) -> bytes | None:
        self._sock.settimeout(seconds_left(deadline) if wait else 0)
        with contextlib.suppress(BlockingIOError):
            return self._sock.recv(size)
        return None


class Incoming(io.RawIOBase):
    """What comes on a channel until `deadline`, at most `allowance` bytes; nothing is waited for before the answer has `begun`.

    A socket's own time-out bounds one call only: a server that sends a byte a second would hold it for ever.
    """

    def __init__(self, channel: Channel, deadline: float, allowance: int, *, begun: bool = False) -> None:
        self._channel, self._deadline, self._allowance, self.begun = channel, deadline, allowance, begun

    def readable(self) -> bool:  # io.BufferedReader asks
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Receive what has come; OSError, Failure."""
        data = self._channel.receive(len(buffer), self._deadline, wait=self.begun)
        if data is None:
            seconds_left(self._deadline)  # only now: what has come in time is taken, even if it is read late
            return None
        self.begun = True
        self._allowance -= len(data)
        if self._allowance < 0:
            raise Failure("the answer is too large")
        buffer[: len(data)] = data
        return len(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the file that http.client reads from."""
        return io.BufferedReader(self)


class Answer(http.client.HTTPResponse):
    """An answer of http.client.  Its header is read here: the email package there costs more than all the rest of a call."""

    fp: Any = None  # for http.client's own clean-up, where a signal comes before there is a file
    text = ""  # the body of a success

    def begin(self) -> None:
        """Read status line and header; OSError, http.client.HTTPException."""
        self.status = 100
        while 100 <= self.status < 200:  # those announce the answer
            version, self.status, self.reason = self._read_status()  # type: ignore[attr-defined]
            self.fields = self._read_fields()
        length = self.fields.get("content-length", "")
        if not re.fullmatch(r"[0-9]{0,15}", length):
            raise http.client.HTTPException("content-length")
        coding = self.fields.get("transfer-encoding", "").lower()
        if coding not in ("", "chunked"):
            raise http.client.HTTPException("transfer-encoding")
        self.chunked = self.status not in (204, 304) and coding == "chunked"
        self.chunk_left = None
        self.length = 0 if self.status in (204, 304) else int(length) if length and not self.chunked else None
        keeps = self.fields.get("connection", "" if version == "HTTP/1.1" else "close").lower() != "close"
        self.will_close = not keeps or (self.length is None and not self.chunked)

    def _read_fields(self) -> dict[str, str]:
        fields: dict[str, str] = {}
        for _ in range(MAX_HEADERS):
            line = self.fp.readline(MAX_HEADER_LINE_BYTES + 1)
            if line in (b"\r\n", b"\n"):
                return fields
            if not line.endswith(b"\n"):
                raise http.client.LineTooLong("header") if len(line) > MAX_HEADER_LINE_BYTES else http.client.IncompleteRead(b"")
            name, _, value = line.decode("latin-1").partition(":")
            name, value = name.strip().lower(), value.strip()
            # The first counts, as in http.client: pveproxy says `close` and then `Keep-Alive`, and closes.
            if fields.setdefault(name, value) != value and name == "content-length":
                raise http.client.HTTPException("two lengths")
        raise http.client.HTTPException("too many header lines")

    def read_text(self, limit_bytes: int) -> None:
        """Read the body of a success; no other is read, so its connection ends.  OSError, ValueError, HTTPException, Failure."""
        if not 200 <= self.status < 300:
            self.will_close = True
            return
        body = bytearray()
        # In pieces: http.client makes a buffer of the length that is announced, and an object of each chunk.
        while len(body) <= limit_bytes and (piece := self.read(65536)):
            body += piece
        if len(body) > limit_bytes or (self.length or 0) > limit_bytes:
            raise Failure("the answer is too large")
        if self.length:
            raise http.client.IncompleteRead(b"")
        self.text = body.decode()


class Question(urllib.request.Request):
    """A request, and of which type its answer has to be."""

    kind: type[object] = object


# A question under way: yields where and until when its answer is waited for, and returns what the answer says.
Exchange = Generator[tuple[Channel, float], None, object]


class Server(urllib.request.BaseHandler):
    """One server: kept connections, hard deadlines, capped answers, and every failure as one of two errors.

    It is a handler of urllib.request, which brings the proxy rules.  No other handler is installed that does anything with an
    answer, so nothing follows a redirect, opens a file or asks for a password.
    """

    name = daemon = misfit = ""  # what it is called, what serves there, and what an answer of another shape is not
    mends: Mapping[str, str] = MENDS
    limit_bytes = 0
    strict = True  # of the check of certificates, as ssl.VERIFY_X509_STRICT

    def __init__(self, config: ProxmoxConfig | HubConfig, authorization: str, secret: str, *, path: str = "", pin: str = "") -> None:
        self.url = config.url.rstrip("/") + path
        self.ends = math.inf  # of the cycle; outside of one no connection is kept
        self.facts = {"section": config.section, "server": self.name, "daemon": self.daemon}  # what stands for the names in `mends`
        self.secrets = secret_forms(secret)
        self._parts = urllib.parse.urlsplit(self.url)
        self._timeout = config.timeout_seconds
        self._pin = pin  # SHA-256 of the only certificate that is accepted, whoever signed it and whatever name it bears
        self.context = self._build_context(config.ca_file) if self._parts.scheme == "https" else None
        self._header = (
            f"Host: {self._parts.netloc}\r\nAuthorization: {authorization}\r\nUser-Agent: felhom-agent/{__version__}\r\n"
            "Accept: application/json\r\nAccept-Encoding: identity\r\n"
        )
        self._proxy = ("", "")  # its address, and a header line for it
        self._idle: list[Channel] = []
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(self)

    def _build_context(self, ca_file: str) -> ssl.SSLContext:
        """Return what checks the server's certificate, chain and host name; ConfigError."""
        try:
            # cadata: the file is read once.  The line end: for empty cadata Python would take the system's roots.
            roots = read_file(ca_file)[0].decode("ascii", "ignore") + "\n" if ca_file and not self._pin else None
            context = trust_all() if self._pin else ssl.create_default_context(cadata=roots)  # _connect compares the pin: stricter
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{self.facts['section']}.ca_file: {clean(ca_file)}: {explain_file(exc)}") from exc
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.strict:
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    def fetch(self, path: str, kind: type[T], body: bytes | None = None) -> T:
        """Return what the answer to a GET says, or to a POST of `body` as JSON; TransportError, HTTPError."""
        question = Question(self.url + path, body)
        question.kind = kind
        try:
            exchange: Exchange = self.opener.open(question)
        except ValueError:  # it quotes the address, which may hold a password
            raise self._explain(Failure("the proxy's address cannot be used"), f"{question.get_method()} {path}", 0) from None
        ((_, said),) = self.run([exchange], 1)
        if isinstance(said, AgentError):
            raise said
        return cast(T, said)

    def http_open(self, question: Question) -> Exchange:
        """Return the exchange, with the proxy to which urllib.request has directed the question; ValueError."""
        if question.host != self._parts.netloc:  # always for https: plain http goes to loopback addresses only
            there = urllib.parse.urlsplit(f"//{question.host}")  # urllib.request looks neither at it nor for what is not escaped
            unescaped = re.search(r"@.*@|//[^/@]*/.*@", urllib.request.getproxies().get("https", ""))  # and would make it the host
            if unescaped or not there.hostname or there.port == 0:  # a port above 65535 raises here
                raise ValueError("no address")
            header = "".join(f"{name}: {value}\r\n" for name, value in question.header_items() if name == "Proxy-authorization")
            self._proxy = question.host, header
        return self.exchange(question.selector.removeprefix(self._parts.path), question.kind, cast("bytes | None", question.data))

    https_open = http_open

    def run(self, exchanges: Iterable[Exchange], in_flight: int) -> Iterator[tuple[int, object]]:
        """Yield the number of each exchange with what its answer says, or the AgentError, in the order in which they come.

        One thread asks on several connections and reads whichever begins to answer first, so a slow one holds no other up.  One that
        stops in the middle does, until its time is over, but costs the others nothing: they are read then.
        """
        todo = enumerate(exchanges)
        waiting: dict[Channel, tuple[float, int, Exchange]] = {}
        try:
            while True:
                if len(waiting) < in_flight and (item := next(todo, None)):
                    number, exchange = item
                elif waiting:
                    first = min(waiting, key=lambda channel: waiting[channel][0])  # where none answers in time, it has failed
                    ready, _, _ = select.select(waiting, [], [], max(0.0, waiting[first][0] - time.monotonic()))
                    _, number, exchange = waiting.pop(ready[0] if ready else first)
                else:
                    return
                try:
                    channel, deadline = next(exchange)
                    waiting[channel] = deadline, number, exchange
                except StopIteration as done:
                    yield number, done.value
                except AgentError as exc:
                    yield number, exc
        finally:
            for _, _, exchange in waiting.values():
                exchange.close()
            if self.ends == math.inf:
                self.close()

    def exchange(self, path: str, kind: type[object], body: bytes | None = None) -> Exchange:
        """Ask, on a kept connection where there is one, and return what the answer says, of type `kind`; TransportError, HTTPError."""
        deadline = min(time.monotonic() + self._timeout, self.ends)
        method, length = "GET", ""
        if body is not None:
            method, length = "POST", f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        label = f"{method} {path}"
        data = f"{method} {self._parts.path}{path} HTTP/1.1\r\n{self._header}{length}\r\n".encode("latin-1") + (body or b"")
        try:
            kept = self._take_idle()
            try:
                answer = yield from self._ask(kept or self._connect(deadline), data, deadline)
            except GONE:
                if kept is None or body is not None:  # what is posted may have been received
                    raise
                answer = yield from self._ask(self._connect(deadline), data, deadline)
        except (http.client.HTTPException, ValueError) as exc:
            raise self._explain(exc, label, deadline) from None  # they quote the server
        except (OSError, Failure) as exc:
            raise self._explain(exc, label, deadline) from exc
        if not 200 <= answer.status < 300:
            reason = clean(answer.reason.strip().encode("latin-1", "replace").decode("utf-8", "replace"), self.secrets)
            raise HTTPError(
                f"{label}: {self._mended(f'{answer.status} {reason}'.rstrip())}",
                status=answer.status,
                headline=f"{self.name} answered {answer.status}",
                retry_after=parse_retry_after(answer.fields.get("retry-after", ""), time.time()),
            )
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = self.parse(answer.text)
            if isinstance(said, kind):
                return said
        raise self.other_shape(label)

    def _take_idle(self) -> Channel | None:
        while self._idle:
            channel = self._idle.pop()
            if channel.is_quiet():
                return channel
            channel.close()  # the server has closed it, or sent what nobody asked for, which would pass for the next answer
        return None

    def _reach(self, deadline: float) -> Channel:
        """Connect, through the proxy's tunnel if there is one; OSError, Failure."""
        usual = 443 if self.context else 80
        proxy, header = self._proxy
        if not proxy:
            return Channel(dial(self._parts.hostname, self._parts.port or usual, deadline))
        there = urllib.parse.urlsplit(f"//{proxy}")
        tunnel = self._parts.netloc if self._parts.port else f"{self._parts.netloc}:{usual}"
        with contextlib.ExitStack() as undone:
            try:
                channel = Channel(dial(there.hostname, there.port or usual, deadline))
                undone.callback(channel.close)
                channel.send(f"CONNECT {tunnel} HTTP/1.1\r\nHost: {tunnel}\r\n{header}\r\n".encode("latin-1"), deadline)
                with Answer(Incoming(channel, deadline, MAX_HEADER_BYTES, begun=True)) as answer:  # type: ignore[arg-type]
                    answer.begin()
            except (Failure, OSError, ValueError, http.client.HTTPException) as exc:
                raise Failure(f"the proxy cannot be used: {words_for(exc)}") from None
            if answer.status != 200:
                raise Failure("the proxy does not let us through")
            undone.pop_all()
        return channel

    def _connect(self, deadline: float, context: ssl.SSLContext | None = None) -> Channel:
        """Connect and shake hands; OSError, Failure."""
        channel = self._reach(deadline)
        with contextlib.ExitStack() as undone:
            undone.callback(channel.close)
            if self.context is not None:
                tls = channel.start_tls(context or self.context, self._parts.hostname, deadline)
                if self._pin and context is None and hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest() != self._pin:
                    raise Failure("the certificate is not the pinned one")
            undone.pop_all()
        return channel

    def _ask(self, channel: Channel, data: bytes, deadline: float) -> Generator[tuple[Channel, float], None, Answer]:
        """Send the question, yield until the answer has begun, and read it; the connection is kept after a success alone."""
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who refuses a report may do so before he has read it all
                channel.send(data, deadline)
            incoming = Incoming(channel, deadline, self.limit_bytes + MAX_HEADER_BYTES)
            with Answer(incoming) as answer:  # type: ignore[arg-type]  # makefile is all it asks of a socket
                while not incoming.begun:
                    if not channel.has_more():
                        yield channel, deadline
                    answer.fp.peek()
                answer.begin()
                answer.read_text(self.limit_bytes)
        except BaseException:
            channel.close()
            raise
        if answer.will_close:
            channel.close()
        else:
            self._idle.append(channel)
        return answer

    def close(self) -> None:
        """Close the kept connections."""
        while self._idle:
            self._idle.pop().close()

    def parse(self, body: str) -> object:
        """Return what an answer says; ValueError, KeyError or TypeError where it is of another shape than this server's."""
        return parse_json(body)

    def read_certificate(self, deadline: float) -> tuple[Mapping[str, Any], str]:
        """Return what the server's certificate says (as ssl.SSLObject.getpeercert) and its SHA-256; OSError, ValueError, Failure.

        Nothing is sent on these connections.  The ssl module decodes only what it has verified, so the second one trusts the
        very certificate that the first one met, even if it has expired.
        """
        context = trust_all()
        with contextlib.closing(self._connect(deadline, context)) as channel:
            encoded = cast(ssl.SSLObject, channel.tls).getpeercert(binary_form=True) or b""
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | 0x200000  # X509_V_FLAG_NO_CHECK_TIME
        context.load_verify_locations(cadata=encoded)
        with contextlib.closing(self._connect(deadline, context)) as channel:
            return cast(ssl.SSLObject, channel.tls).getpeercert() or {}, hashlib.sha256(encoded).digest().hex(":").upper()

    def other_shape(self, label: str, text: str = "") -> TransportError:
        """Return the error for an answer that this server would not have given."""
        text = f"{label}: {text or self.misfit}; {NOT_THIS.format(**self.facts)}"
        return TransportError(text, headline=f"{self.name} answered nonsense")

    def _explain(self, exc: Exception, label: str, deadline: float) -> TransportError:
        """Return the operator's error for what went wrong."""
        words = self._explain_certificate(exc, deadline) if isinstance(exc, ssl.SSLCertVerificationError) else words_for(exc)
        via = f" (through the proxy {clean(self._proxy[0])})" if self._proxy[0] else ""
        return TransportError(f"{label}: {self._parts.netloc}{via}: {self._mended(words)}", headline=f"{self.name} unreachable")

    def _explain_certificate(self, exc: ssl.SSLCertVerificationError, deadline: float) -> str:
        """Return what is wrong with a certificate that was refused, with what it says itself."""
        try:
            said, _ = self.read_certificate(deadline)
        except (OSError, ValueError, http.client.HTTPException, Failure):
            said = {}
        if exc.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            names = ", ".join(str(name) for _, name in said.get("subjectAltName", ()))
            return f"the certificate is for {clean(names) or 'another host'}"
        if exc.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
            return f"the certificate is valid from {said.get('notBefore', '?')} to {said.get('notAfter', '?')} only"
        return f"the certificate is not signed by a CA that is trusted here ({exc.verify_message})"

    def _mended(self, text: str) -> str:
        """Return the words with their mend."""
        mend = next((mend for words, mend in self.mends.items() if text.startswith(words)), "")
        return f"{text}; {mend.format(**self.facts)}" if mend else text


# ---- Proxmox client ---------------------------------------------------------------------------------------------------------

# What else may be wrong where no node has the name that is asked for: pveproxy then takes it for another node's, and cannot reach it.
OTHER_NODE_MENDS: Final = dict.fromkeys(
    ("500 hostname lookup", "595", "596", "599"),
    "proxmox.node is {node}, but `pvesh get /nodes` lists {nodes} (upper and lower case differ)",
)


class ProxmoxClient(Server):
    """Reads one node, with GET only."""

    name, daemon, misfit, limit_bytes = "Proxmox", "pveproxy", "no answer of the Proxmox API", MAX_PROXMOX_BYTES
    # Python 3.13 refuses a CA without keyUsage or authority key identifier, as Proxmox made them until March 2026.  Only that is
    # waived: https://docs.python.org/3/library/ssl.html#ssl.create_default_context
    strict = False
    mends: Mapping[str, str] = {
        **MENDS,
        "401": "check proxmox.token_id and proxmox.token_secret; `pveum user token list {user}` shows the tokens and when they expire",
        "403": GRANT,
        **dict.fromkeys(("595", "596", "599"), "see whether it runs: systemctl status pvedaemon"),
        "500 RPCEnvironment init request failed": "see whether it runs: systemctl status pve-cluster",
        "501": "this Proxmox VE does not have the call, versions 8 and 9 do; check proxmox.url",
        "the certificate is not signed": "name its CA in proxmox.ca_file, /etc/pve/pve-root-ca.pem where it is Proxmox's own",
        "the certificate is not the pinned one": "compare proxmox.fingerprint with `pvenode cert info`",
    }

    def __init__(self, config: ProxmoxConfig) -> None:
        authorization = f"PVEAPIToken={config.token_id}={config.token_secret}"
        pin = config.fingerprint.replace(":", "").lower()
        super().__init__(config, authorization, config.token_secret, path="/api2/json", pin=pin)
        self.node = config.node
        self.token_id = config.token_id
        self.user = config.token_id.partition("!")[0]
        self.collect_seconds = COLLECT_TIMEOUTS * config.timeout_seconds
        self.facts |= {"user": self.user, "node": self.node}
        self._echoes = [form for form in self.secrets if len(form) > 7]  # shorter ones would match by chance

    @contextlib.contextmanager
    def cycle(self) -> Iterator[None]:
        """Bound all calls within to `collect_seconds` together, and close the connections at the end."""
        self.ends = time.monotonic() + self.collect_seconds
        try:
            yield
        finally:
            self.ends = math.inf
            self.close()

    def version(self) -> Mapping[str, object]:
        """Return `version` and more (`pvesh get /version`); needs no privilege."""
        return parse_object(self.fetch("/version", object))

    def permissions(self) -> Mapping[str, object]:
        """Return path → privilege → 1 of this token (`pvesh get /access/permissions`); needs no privilege."""
        return self.fetch("/access/permissions", dict)

    def nodes(self) -> list[Mapping[str, object]]:
        """Return an entry for each node of the cluster (`pvesh get /nodes`); `cpu` in it needs Sys.Audit."""
        entries = [parse_object(entry) for entry in self.fetch("/nodes", list)]
        names = sorted(str(entry.get("node")) for entry in entries)
        self.facts["nodes"] = clean(", ".join(names))
        known = not names or self.node in ("localhost", *names)
        self.mends = ProxmoxClient.mends if known else {**ProxmoxClient.mends, **OTHER_NODE_MENDS}
        return entries

    def node_status(self) -> Mapping[str, object]:
        """Return the node's figures (`pvesh get /nodes/NODE/status`); needs Sys.Audit on /nodes/NODE."""
        return self.fetch(f"/nodes/{self.node}/status", dict)

    def list_lxc(self) -> list[Mapping[str, object]]:
        """Return an entry for each container that the token may see (`pvesh get /nodes/NODE/lxc`); needs VM.Audit."""
        return [parse_object(entry) for entry in self.fetch(f"/nodes/{self.node}/lxc", list)]

    def guest_config(self, vmid: int) -> Mapping[str, object]:
        """Return a container's configuration (`pvesh get /nodes/NODE/lxc/VMID/config --current 1`); needs VM.Audit on /vms/VMID."""
        return self.fetch(self._config_path(vmid), dict)

    def guest_configs(self, vmids: Sequence[int]) -> Iterator[tuple[int, Mapping[str, object] | AgentError]]:
        """Yield each container's configuration, or why it cannot be read, in the order in which they come."""
        in_flight = min(MAX_IN_FLIGHT, 1 + len(vmids) // GUESTS_PER_CONNECTION)
        for number, said in self.run((self.exchange(self._config_path(vmid), dict) for vmid in vmids), in_flight):
            yield vmids[number], cast("dict[str, object] | AgentError", said)

    def parse(self, body: str) -> object:
        """Return `data` of an answer, as Server.parse says."""
        if "\\u" in body or "\\/" in body:  # Proxmox writes neither; whoever does may hide a secret from the search below
            body = json.dumps(parse_json(body))
        for form in self._echoes:  # a secret that comes back goes no further
            body = body.replace(form, "***")
        return cast("Any", parse_json(body))["data"]

    def _config_path(self, vmid: int) -> str:
        return f"/nodes/{self.node}/lxc/{vmid}/config?current=1"  # current=1: else changes that wait for its next start are mixed in


def diagnose_token(permissions: Mapping[str, object], token_id: str, node: str) -> tuple[bool, list[str]]:
    """Return whether the token sees all guests, and what is wrong with its rights, in the operator's words.

    Judged as Proxmox does: the deepest path that is listed decides, and what is granted there with 1 holds below it, with 0 only
    there.  Source: PVE::AccessControl, `roles`.
    """

    def holds(privilege: str, path: str) -> bool:
        if path in permissions:
            return privilege in parse_object(permissions[path])
        while path != "/":
            path = path.rpartition("/")[0] or "/"
            handed_down = [name for name, value in parse_object(permissions.get(path)).items() if value]
            if handed_down:
                return privilege in handed_down
        return False

    user, _, name = token_id.partition("!")
    grant = GRANT.format(user=user)
    sees_all = holds("VM.Audit", "/vms")
    lacking = [f"{right} on {path}" for right, path in (("Sys.Audit", f"/nodes/{node}"), ("VM.Audit", "/vms")) if not holds(right, path)]
    some = sorted(path.removeprefix("/vms/") for path in permissions if path.startswith("/vms/") and holds("VM.Audit", path))
    more = {right for granted in permissions.values() for right in parse_object(granted) if not right.endswith(".Audit")}
    wrong = []
    if not permissions:
        wrong.append(
            f"token {token_id} has no rights at all; with privilege separation it has only those that its user {user} has too: "
            f"{grant} && pveum user token modify {user} {name} --privsep 0"
        )
    elif lacking:
        wrong.append(f"token {token_id} lacks {' and '.join(lacking)}; {grant}")
    if some and not sees_all:
        wrong.append(f"only these guests are reported, the token has VM.Audit on no others: {clean(', '.join(some))}")
    if more:
        wrong.append(f"token {token_id} can do more than read: {clean(', '.join(sorted(more)))}; the role PVEAuditor is enough")
    return sees_all, wrong


# ---- systemd ----------------------------------------------------------------------------------------------------------------


class CloudflaredProber(Protocol):
    """Whatever can tell the state of the tunnel."""

    def probe(self) -> str:
        """Return systemd's word for the state, `unknown` where it cannot be asked."""


class SystemctlProber:
    """Asks `systemctl is-active UNIT`.  Its word counts, not its exit status, which differs between releases."""

    def __init__(self, unit: str, *, logger: logging.Logger = LOG) -> None:
        self._command = ["systemctl", "is-active", "--", unit]
        self._changes = Changes(logger)

    def probe(self) -> str:
        """Return the word, `unknown` where systemd cannot be asked."""
        try:
            said, why = self._ask().decode("ascii", "replace").strip(), "says nothing that can be used"
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            said, why = "", getattr(exc, "strerror", None) or type(exc).__name__
        known, command = re.fullmatch(r"[a-z-]{2,20}", said), " ".join(self._command)
        self._changes.tell("", "" if known else f"{command}: {why}; cloudflared.status is unknown", f"{command}: answers again")
        return said if known else "unknown"

    def _ask(self) -> bytes:
        """Return what the child prints, at most 256 bytes; OSError, TimeoutError after PROBE_SECONDS."""
        deadline = time.monotonic() + PROBE_SECONDS
        # No shell, and nothing of our environment but the path, so no secret reaches the child.
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        with subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as child:
            output = cast(io.FileIO, child.stdout).fileno()
            try:
                said = b""
                while len(said) < 256 and select.select([output], [], [], seconds_left(deadline))[0] and (more := os.read(output, 256)):
                    said += more
                seconds_left(deadline)
                return said
            finally:
                with contextlib.suppress(ProcessLookupError):  # whoever started us may have SIGCHLD ignored, so that nobody is there
                    os.killpg(child.pid, signal.SIGKILL)  # it is not reaped yet, so the group is still its own: it and all that it started


def notify(text: str) -> None:
    """Send a message to systemd (sd_notify(3)) where it listens; never waits, never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(text.encode(), socket.MSG_DONTWAIT, re.sub("^@", "\0", address))


def notify_wait(status: str, seconds: float) -> None:
    """Tell systemd how it goes, and that the agent hangs if it says nothing more for `seconds`."""
    watchdog = f"WATCHDOG=1\nWATCHDOG_USEC={math.ceil(seconds) * 1_000_000}\n" if "WATCHDOG_USEC" in os.environ else ""
    notify(f"READY=1\n{watchdog}STATUS={clean(status)}")


class LineFormatter(logging.Formatter):
    """Lines that nobody else can forge: secrets replaced, control characters escaped, all after the first indented."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self.journal = journal
        self.secrets: tuple[str, ...] = ()

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as lines, for the journal with their priority in front (sd-daemon(3)), else with time and level."""
        traceback = self.formatException(record.exc_info).split("\n") if record.exc_info else []
        lines = [clean(line, self.secrets, 2000) for line in (record.getMessage(), *traceback)]
        priority = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
        prefix, head = (f"<{priority}>", "") if self.journal else ("", f"{self.formatTime(record)} {record.levelname} ")
        return prefix + head + f"\n{prefix}    ".join(lines) + "\n"


class StderrHandler(logging.Handler):
    """Writes to standard error, and drops what cannot be written: a log that is full or not read must not stop the heartbeat."""

    patience_seconds = 0.5

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, waiting half a second at most, and not again until something has been written."""
        if sys.stderr is None:  # it was closed when we started, and its descriptor may be another file's by now
            return
        with contextlib.suppress(OSError):
            for line in self.format(record).encode("utf-8", "backslashreplace").splitlines(keepends=True):
                if not select.select([], [2], [], self.patience_seconds)[1]:
                    self.patience_seconds = 0.0
                    return
                os.write(2, line if len(line) <= 4096 else line[:4095] + b"\n")  # a pipe that is writable takes that much
            self.patience_seconds = 0.5


def is_journal(stream: str) -> bool:
    """Tell whether standard error is the journal's `stream`, $JOURNAL_STREAM of systemd.exec(5)."""
    with contextlib.suppress(OSError):
        status = os.fstat(2)
        return stream == f"{status.st_dev}:{status.st_ino}"
    return False


# ---- collector --------------------------------------------------------------------------------------------------------------


class Collector:
    """Reads the node once and builds the report."""

    def __init__(
        self, proxmox: ProxmoxClient, cloudflared: CloudflaredProber, *, host_id: str, agent_version: str, logger: logging.Logger
    ) -> None:
        self.proxmox = proxmox
        self._cloudflared = cloudflared
        self._host_id = host_id
        self._agent_version = agent_version
        self._changes = Changes(logger)
        self._diagnosed = False

    def collect(self) -> HostReport:
        """Return the report; AgentError where node status or guest list cannot be read, for then there is nothing true to say."""
        with self.proxmox.cycle():
            nodes, lack = [], ""
            try:
                nodes = self.proxmox.nodes()
            except AgentError as exc:
                lack = f"cpu_usage is unknown: {exc}"
            try:
                status = self.proxmox.node_status()
                listed = self._list_guests()
            except HTTPError as exc:
                if exc.status == 403:
                    self._diagnose()
                raise
            if not self._diagnosed:
                self._diagnose()
            host = build_host(self.proxmox.node, status, nodes)
            guests = self._read_guests(listed, host.cpu_count)
        self._changes.tell("nodes", lack, "cpu_usage can be read again")  # only now: where nothing can be read, one line is enough
        cloudflared = Cloudflared(status=self._probe())
        return HostReport(
            host_id=self._host_id,
            agent_version=self._agent_version,
            reported_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            host=host,
            guests=guests,
            cloudflared=cloudflared,
        )

    def _diagnose(self) -> bool:
        """Diagnose the token, warn of what is wrong with it, and tell whether it is known to see all guests."""
        try:
            permissions = self.proxmox.permissions()
        except AgentError as exc:
            self._changes.tell("rights", f"the token's rights are not known: {exc}")
            return False
        sees_all, wrong = diagnose_token(permissions, self.proxmox.token_id, self.proxmox.node)
        self._diagnosed = True
        self._changes.tell("rights", " | ".join(wrong), "the token's rights are as they should be")
        return sees_all

    def _list_guests(self) -> dict[int, Mapping[str, object]]:
        """Return the entries of the guest list by vmid, in their order."""
        path = f"/nodes/{self.proxmox.node}/lxc"
        listed: dict[int, Mapping[str, object]] = {}
        for entry in self.proxmox.list_lxc():
            vmid = parse_integer(entry.get("vmid"), 100, 999_999_999)
            if vmid is None:  # to leave it out would claim that it does not exist
                raise self.proxmox.other_shape(f"GET {path}", "a guest without a vmid")
            listed.setdefault(vmid, entry)
        # Proxmox leaves out what the token may not see and says nothing, so an empty list alone does not mean no guests.
        if not listed and not self._diagnose():
            text = f"GET {path}: an empty list, and the token is not known to have VM.Audit on /vms; {GRANT.format(user=self.proxmox.user)}"
            raise AgentError(text, headline="token lacks VM.Audit", retryable=False)
        return dict(sorted(listed.items()))

    def _read_guests(self, listed: Mapping[int, Mapping[str, object]], cpu_count: int | None) -> tuple[Guest, ...]:
        guests: dict[int, Guest] = {}
        failed: dict[int, str] = {}  # the texts alone: an error holds its traceback
        refused = False
        for vmid, config in self.proxmox.guest_configs(list(listed)):
            if isinstance(config, AgentError):
                failed[vmid] = str(config)
                refused = refused or (isinstance(config, HTTPError) and config.status == 403)
            guests[vmid] = build_guest(vmid, listed[vmid], None if isinstance(config, AgentError) else config, cpu_count)
        named = ", ".join(str(vmid) for vmid in sorted(failed)[:10]) + (", …" if len(failed) > 10 else "")
        lack = f"{len(failed)} of {len(listed)} guests are unknown ({named}): {failed[min(failed)]}" if failed else ""
        self._changes.tell("guests", lack, "all guests can be read again")
        if refused:
            self._diagnose()
        return tuple(guests[vmid] for vmid in listed)

    def _probe(self) -> str:
        try:
            status = self._cloudflared.probe()
        except Exception as exc:  # a prober is handed in, and whatever is wrong with it is no reason to be silent
            self._changes.tell("prober", f"cloudflared.status is unknown: {type(exc).__name__}", bug=exc)
            return "unknown"
        self._changes.tell("prober", "", "cloudflared.status can be read again")
        return status


# ---- hub client -------------------------------------------------------------------------------------------------------------


class HubClient(Server):
    """Posts reports."""

    name, daemon, misfit, limit_bytes = "hub", "the hub", "no envelope", MAX_ENVELOPE_BYTES
    mends: Mapping[str, str] = {
        **MENDS,
        "401": "check hub.api_key",
        "403": "check hub.api_key and hub.host_id",
        "404": "check hub.url, to which the agent adds /api/v1/host-report",
        "the proxy": "check https_proxy and no_proxy",
    }

    def __init__(self, config: HubConfig, *, logger: logging.Logger) -> None:
        super().__init__(config, f"Bearer {config.api_key}", config.api_key)
        if not is_loopback(self._parts.hostname):
            self.opener.add_handler(urllib.request.ProxyHandler())
        self._logger = logger
        self._changes = Changes(logger)

    def report(self, report: HostReport) -> ControlEnvelope:
        """Send one report and return the hub's answer; TransportError, HTTPError."""
        document = self.fetch("/api/v1/host-report", dict, report.to_json().encode())
        envelope = ControlEnvelope(**parse_figures(ControlEnvelope, document))
        ignored = envelope.poll_interval_seconds is None and "poll_interval_seconds" in document
        wish = clean(json.dumps(document.get("poll_interval_seconds")), self.secrets, 40)
        wrong = f"the hub's poll_interval_seconds is no whole number and is ignored: {wish}"
        self._changes.tell("interval", wrong if ignored else "", "the hub's poll_interval_seconds is as it should be")
        self._logger.debug("%s", envelope)
        return envelope

    def parse(self, body: str) -> object:
        """Return the answer's JSON, of an empty one an envelope without a wish; else as Server.parse."""
        return parse_json(body) if body.strip() else {}


# ---- loop -------------------------------------------------------------------------------------------------------------------


def next_try(*, started: float, now: float, interval: float, failures: int, error: Exception | None, fraction: float) -> float:
    """Return when to try next, on the clock of `started` (when this cycle was due) and `now` (its end); all in seconds.

    After a success, and after an error that asking again cannot mend: the next whole interval after `started`, so that nothing
    drifts; a tick that has passed or is less than 7.5 s away is skipped.  After any other: min(interval, 15 · 4^failures) from now,
    times a factor from 0.5 to 1 (`fraction` goes from 0 to 1), `failures` being those in a row before this one.  Where the server
    said Retry-After, not before that, and spread over four times as long again, an interval at most, so that agents told the same
    do not return together.
    """
    if error is None or not getattr(error, "retryable", True):
        return started + interval * (math.floor((now - started + RETRY_SECONDS / 2) / interval) + 1)
    delay = min(interval, RETRY_SECONDS * 4.0 ** min(failures, 6)) * (0.5 + fraction / 2)
    told: float | None = getattr(error, "retry_after", None)
    return now + (delay if told is None else max(delay, told + min(interval, 4 * told) * fraction))


def rest(seconds: float) -> None:
    """Wait, without what a failed cycle has left: its error leads to the frames that it came through, and these to its report."""
    gc.collect()
    time.sleep(seconds)


def count_tries(number: int) -> str:
    """Return `1 try`, `2 tries`."""
    return f"{number} {'try' if number == 1 else 'tries'}"


class Loop:
    """Collects and reports for ever.  Clock, wait, randomness and the word to systemd are handed in."""

    def __init__(
        self,
        collector: Collector,
        client: HubClient,
        interval: float,
        *,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = rest,
        fraction: Callable[[], float] = random.random,
        tell: Callable[[str, float], None] = notify_wait,
    ) -> None:
        self.interval = interval
        self._collector, self._client, self._logger = collector, client, logger
        self._clock, self._wait, self._fraction, self._tell = clock, wait, fraction, tell
        self._changes = Changes(logger)
        self._failures = 0
        self._failing_since = (0.0, "")

    def run(self, cycles: float = math.inf) -> None:
        """Run the first cycle at once and each further one when it is due, `cycles` of them or without end."""
        due = self._clock()
        while cycles > 0:
            cycles -= 1
            failures = self._failures
            error, status = self.cycle()
            now = self._clock()
            due = next_try(started=due, now=now, interval=self.interval, failures=failures, error=error, fraction=self._fraction())
            del error  # `rest` says why
            self._tell(f"{status}, next in {due - now:.0f} s", due - now)
            self._wait(due - now)

    def cycle(self) -> tuple[Exception | None, str]:
        """Collect, report and adopt the hub's interval; return what failed, and how it goes in half a line."""
        started = self._clock()
        try:
            report = self._collector.collect()
            self._adopt(self._client.report(report).poll_interval_seconds)
        except Exception as exc:  # faults of our own too: the next cycle may do better, an agent that has ended never will
            if not self._failures:
                self._failing_since = (started, time.strftime("%H:%M"))
            self._failures += 1
            text, bug = explain(exc)
            self._changes.tell("cycle", text, bug=bug)
            headline = exc.headline if isinstance(exc, AgentError) else "fault of the agent"
            return exc, f"{headline} since {self._failing_since[1]}, {count_tries(self._failures)}"
        lasted = self._clock() - self._failing_since[0]
        self._changes.tell("cycle", "", f"report accepted again, after {count_tries(self._failures)} that failed in {lasted:.0f} s")
        self._failures = 0
        self._logger.debug("report accepted, %d guests", len(report.guests))
        return None, f"last report {time.strftime('%H:%M:%S')} accepted, {len(report.guests)} guests"

    def _adopt(self, wish: int | None) -> None:
        if wish is None:
            return
        interval = clamp_poll(wish)
        if interval != wish:
            self._changes.tell(f"clamp to {interval}", f"the hub asks for {wish} s, using {interval} s")
        if interval != self.interval:
            self._logger.info("interval %d s adopted, it was %d s", interval, self.interval)
            self.interval = interval


# ---- command line -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when it worked, 1 when collect or report failed, 2 for usage and configuration."""
    parser = argparse.ArgumentParser(prog="felhom-agent", description="Reports a Proxmox VE node to a hub.", allow_abbrev=False)
    parser.add_argument("--config", metavar="PATH", help=f"the configuration file, {DEFAULT_PATH} by default")
    parser.add_argument("--selftest", choices=("config", "proxmox", "hub"), help="check one thing, print it as JSON and end")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--version", action="version", version=f"felhom-agent {__version__}")
    arguments = parser.parse_args(argv)
    formatter = LineFormatter(journal=is_journal(os.environ.get("JOURNAL_STREAM", "")))
    handler = StderrHandler()
    handler.setFormatter(formatter)
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(arguments.log_level.upper())
    # resolv.conf(5): glibc would look for a name for half a minute, and no signal ends that.  Now it takes four seconds with two name
    # servers that are silent, and as many again for a search list.
    os.environ.setdefault("RES_OPTIONS", "timeout:2 attempts:1")
    os.environ.pop("SSLKEYLOGFILE", None)  # to which the ssl module would write the keys of each connection
    try:
        config = load_config(arguments.config, os.environ)
        formatter.secrets = secret_forms(config.proxmox.token_secret, config.hub.api_key)
        if arguments.selftest == "config":
            print(json.dumps(config.redacted(), indent=2))
        config.validate(hub=arguments.selftest != "proxmox")
        if arguments.selftest == "config":
            return 0
        prober = SystemctlProber(config.cloudflared.unit)
        collector = Collector(ProxmoxClient(config.proxmox), prober, host_id=config.hub.host_id, agent_version=__version__, logger=LOG)
        hub = None if arguments.selftest == "proxmox" else HubClient(config.hub, logger=LOG)
    except ConfigError as exc:
        for line in str(exc).splitlines():
            LOG.error("%s", line)
        return 2
    if arguments.selftest or hub is None:
        return selftest(collector, hub)
    return run_daemon(collector, hub, config.hub)


def selftest(collector: Collector, hub: HubClient | None) -> int:
    """Collect once, report it to the `hub` if there is one, and print what was sent and answered."""
    result: dict[str, object] = {}
    try:
        if hub is None:
            show_server(collector.proxmox)
        report = collector.collect()
        result["report"] = json.loads(report.to_json())
        if hub is not None:
            result["envelope"] = dataclasses.asdict(hub.report(report))
    except Exception as exc:  # a fault of our own is logged too: the log hides secrets, Python's own traceback does not
        result["error"], bug = explain(exc)
        LOG.error("%s", result["error"], exc_info=bug)
    except KeyboardInterrupt:
        return 130
    if "report" in result:
        print(json.dumps(result["report"] if hub is None else result, indent=2))
    return 1 if "error" in result else 0


def show_server(proxmox: ProxmoxClient) -> None:
    """Log what certificate, trusted or not, and what version the server has; AgentError."""
    if proxmox.context is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):  # what is wrong is said when the node is read
            said, fingerprint = proxmox.read_certificate(time.monotonic() + proxmox.collect_seconds / COLLECT_TIMEOUTS)
            days = (ssl.cert_time_to_seconds(said["notAfter"]) - time.time()) / 86400
            subject = clean(", ".join(f"{key}={value}" for part in said.get("subject", ()) for key, value in part))
            LOG.info("certificate %s, valid until %s, SHA-256 %s", subject, said["notAfter"], fingerprint)
            if days < 14:
                LOG.warning("the certificate ends in %d days: renew it", days)
    LOG.info("Proxmox VE %s at %s", parse_text(proxmox.version().get("version")), proxmox.url)


def run_daemon(collector: Collector, hub: HubClient, config: HubConfig) -> int:
    """Report until SIGTERM or SIGINT; return 0."""
    # What a cycle may take at most: its bounds, and as much again as the name resolution may take and a busy host needs.
    cycle_seconds = collector.proxmox.collect_seconds + PROBE_SECONDS + config.timeout_seconds + 30

    names: list[str] = []

    def stop(number: int, _: object) -> None:
        names.append(signal.Signals(number).name)
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # and once more: what is raised in the middle of a finalizer is lost
        # Blocked, not ignored: Python restores the default before it has ended.  One that had come already finds it so, and does nothing.
        if number not in signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT)):
            raise SystemExit(names[0])  # no Exception, so nothing else catches it

    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, stop)
        LOG.info("started version=%s host_id=%s url=%s interval=%d", __version__, config.host_id, config.url, config.poll_seconds)
        notify_wait("first report on its way", cycle_seconds)
        loop = Loop(collector, hub, config.poll_seconds, logger=LOG, tell=lambda status, wait: notify_wait(status, wait + cycle_seconds))
        loop.run()
    except SystemExit as exc:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        notify("STOPPING=1")
        LOG.info("stopped by %s", exc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
