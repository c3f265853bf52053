"""A Proxmox VE node and a hub that are not there: both on loopback, over TLS, for the tests, a demo, and whoever wants to look.

What the node answers was taken from Proxmox's own daemons (pve-manager 9.2): field names, value types, reason phrases, headers, when it
closes a connection. What it does not know, it refuses as they do. The hub holds every report against `host-report.schema.json`.

    python tests/lab.py --env-file lab.env &      then: . ./lab.env; python felhom_agent.py
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import ipaddress
import json
import re
import select
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.client import NO_CONTENT, responses
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, Self
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    import jsonschema
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

REQUESTS_PER_CONNECTION: Final = 100
IDLE_SECONDS: Final = 5.0
PRIVILEGES: Final = ("Datastore.Audit", "Mapping.Audit", "Pool.Audit", "SDN.Audit", "Sys.Audit", "VM.Audit", "VM.GuestAgent.Audit")
PERMISSION_PATHS: Final = ("/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms")

# --- certificates -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """A CA and one server certificate, on disk as PEM; `fingerprint` is the SHA-256 of the latter, upper case with colons."""

    ca_file: Path
    cert_file: Path
    key_file: Path
    fingerprint: str

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


def new_key() -> RSAPrivateKey:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


node_certificate_key = functools.cache(new_key)  # one for the process saves time; each CA has its own, or one would vouch for another's


def make_certificates(
    folder: Path,
    node: str = "pve1",
    generation: Literal["current", "old", "pve7"] = "old",
    *,
    names: Sequence[str] | None = None,
    days: int = 730,
    not_before_days: int = 0,
) -> Certificates:
    """Write a new CA and a node certificate as Proxmox makes them.

    "current" is a CA made since March 2026 (it has the keyUsage extension), "old" one from before, "pve7" a chain from Proxmox VE 7, whose
    node certificate has no key identifiers. `not_before_days` and `days` date the node certificate: -30 and 10 give an expired one.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def build_alternative(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    ca_key, node_key = new_key(), node_certificate_key()
    ca_name = x509.Name.from_rfc4514_string("O=PVE Cluster Manager CA,OU=00000000-lab,CN=Proxmox Virtual Environment")
    node_name = x509.Name.from_rfc4514_string(f"CN={node}.example.lan,O=Proxmox Virtual Environment,OU=PVE Cluster Node")

    def sign(subject: x509.Name, key: RSAPrivateKey, start: datetime, days: int, *extensions: x509.ExtensionType) -> x509.Certificate:
        end = start + timedelta(days=days)
        builder = x509.CertificateBuilder(ca_name, subject, key.public_key(), x509.random_serial_number(), start, end)
        for extension in extensions:
            critical = isinstance(extension, x509.KeyUsage) or (isinstance(extension, x509.BasicConstraints) and extension.ca)
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256())

    ca_identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier)
    ca_extensions = [x509.BasicConstraints(ca=True, path_length=None), ca_identifier, issuer_identifier]
    if generation == "current":
        ca_extensions.append(x509.KeyUsage(False, False, False, False, False, True, True, False, False))  # keyCertSign, cRLSign
    usual_names = ("127.0.0.1", "::1", "localhost", node, f"{node}.example.lan")
    node_extensions = [
        x509.BasicConstraints(ca=False, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([build_alternative(name) for name in (usual_names if names is None else names)]),
    ]
    if generation != "pve7":
        node_extensions += [x509.SubjectKeyIdentifier.from_public_key(node_key.public_key()), issuer_identifier]
    now = datetime.now(UTC)
    ca = sign(ca_name, ca_key, now - timedelta(days=365), 3650, *ca_extensions)
    own = sign(node_name, node_key, now + timedelta(days=not_before_days, hours=-1), days, *node_extensions)

    folder.mkdir(parents=True, exist_ok=True)
    ca_file, cert_file, key_file = folder / "pve-root-ca.pem", folder / "pve-ssl.pem", folder / "pve-ssl.key"
    key_file.touch(mode=0o600)
    ca_file.write_bytes(ca.public_bytes(Encoding.PEM))
    cert_file.write_bytes(own.public_bytes(Encoding.PEM))
    key_file.write_bytes(node_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    fingerprint = own.fingerprint(hashes.SHA256()).hex(":").upper()
    return Certificates(ca_file=ca_file, cert_file=cert_file, key_file=key_file, fingerprint=fingerprint)


# --- what a server may answer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it came: `path` with /api2/json and query, header names in lower case, `connection` counts from 1."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer. Body None: neither body nor Content-Length. A header None is left out. `close` None: as the real server would."""

    status: int = 200
    reason: str = ""
    body: bytes | None = b""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    close: bool | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing for so long (or until the client leaves or the server stops), then close."""

    seconds: float = 600.0


@dataclass(frozen=True, slots=True)
class Raw:
    """Send these bytes as they are, then close."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Drip:
    """Send these bytes one at a time, never silent for long, then close."""

    data: bytes
    every_seconds: float = 0.05


@dataclass(frozen=True, slots=True)
class Cut:
    """Close without an answer, and without the end that TLS wants to be told."""


@dataclass(frozen=True, slots=True)
class Usual:
    """What the server would answer without a script."""


Answer = Reply | Stall | Raw | Drip | Cut | Usual


@dataclass(frozen=True, slots=True)
class Forever:
    """This answer for every later match too."""

    answer: Answer


def json_reply(value: object, status: int = 200, reason: str = "") -> Reply:
    return Reply(status, reason, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


class Refused(Exception):
    """A request is refused with this reply."""

    def __init__(self, reply: Reply, why: str = "") -> None:
        super().__init__(why)
        self.reply = reply


def read_request(stream: BinaryIO, connection: int) -> Request | None:
    """The next request, or None where the client has left. ValueError: this is no HTTP."""
    line = stream.readline(8192)
    if not line:
        return None
    method, path, _version = line.decode("latin-1").split()
    headers = {}
    while (line := stream.readline(8192)) not in (b"\r\n", b"\n"):
        if not line:
            return None
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", "0"))
    body = stream.read(length)
    return Request(method=method, path=path, headers=headers, body=body, connection=connection) if len(body) == length else None


# --- a server on loopback -----------------------------------------------------------------------------------------------------------


class Server:
    """Keep-alive HTTP/1.1, one thread for each connection; a context manager. It comes back on the same port when entered again."""

    server_name = ""
    content_type = "application/json"
    base = ""

    def __init__(self, certificates: Certificates | None) -> None:
        self.certificates = certificates
        self.port = 0
        self.idle_seconds = IDLE_SECONDS
        self.requests: list[Request] = []
        self.connections = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self._open: set[socket.socket] = set()
        self._script: list[tuple[str, deque[Answer | Forever]]] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificates else 'http'}://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def __enter__(self) -> Self:
        self._stopping.clear()
        self._tls = self.certificates.server_context() if self.certificates else None
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128, reuse_port=True)
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._acceptor.join()
        self._listener.close()
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):  # reading ends, an answer on its way still goes out; not SSLSocket's: it drops the TLS
                    socket.socket.shutdown(connection, socket.SHUT_RD)
        for thread in self._threads:
            thread.join()

    def script(self, match: str, *answers: Answer | Forever) -> None:
        """Answer the next requests whose path begins with `match` in this way, one answer each.

        The path counts without /api2/json (or the hub's prefix); "" is every request, "/nodes$" is /nodes alone, whatever its query.
        """
        with self._changed:
            self._script.append((match, deque(answers)))

    def clear_script(self) -> None:
        with self._changed:
            self._script.clear()

    def wait_for_requests(self, count: int, timeout_seconds: float) -> None:
        """Return once this many requests have come in all; TimeoutError if they do not."""
        self._wait_for(lambda: len(self.requests) >= count, f"{len(self.requests)} of {count} requests", timeout_seconds)

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def _wait_for(self, condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout_seconds):
                raise TimeoutError(f"{what} within {timeout_seconds} s")

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection, self.connections), daemon=True)
            self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            connection.settimeout(self.idle_seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            with self._changed:
                self._open.add(connection)
                if self._stopping.is_set():
                    return
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            with connection.makefile("rb") as stream:
                for served in range(1, REQUESTS_PER_CONNECTION + 1):
                    request = read_request(stream, number)
                    if request is None or not self._exchange(connection, request, last=served == REQUESTS_PER_CONNECTION):
                        break
            if isinstance(connection, ssl.SSLSocket):
                connection.setblocking(False)
                connection.unwrap()  # tells the client that this is the end; does not wait for it to agree
        except (OSError, ValueError):
            pass  # the client has left, was idle for too long, or does not speak TLS or HTTP
        finally:
            with self._changed:
                self._open.discard(connection)
                connection.close()

    def _exchange(self, connection: socket.socket, request: Request, *, last: bool) -> bool:
        """Answer one request; whether the connection stays open."""
        with self._changed:
            self.requests.append(request)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            answer = self._scripted(request)
            self._changed.notify_all()
        try:
            if isinstance(answer, Usual):
                answer = self.answer(request)
            return self._send(connection, answer, last or request.headers.get("connection", "").lower() == "close")
        finally:
            with self._changed:
                self._in_flight -= 1

    def _scripted(self, request: Request) -> Answer:
        path = request.path.removeprefix(self.base)
        for match, answers in self._script:
            if answers and (path.partition("?")[0] + "$" == match or path.startswith(match)):
                answer = answers[0]
                if isinstance(answer, Forever):
                    return answer.answer
                answers.popleft()
                return answer
        return Usual()

    def _send(self, connection: socket.socket, answer: Answer, last: bool) -> bool:
        match answer:
            case Reply():
                body = None if answer.status == NO_CONTENT else answer.body
                endless = body is None and answer.status != NO_CONTENT
                close = last or endless or answer.status >= 400 if answer.close is None else answer.close
                connection.sendall(self._head(answer, body, close) + (body or b""))
                return not close
            case Stall(seconds):
                select.select([connection], [], [], seconds)  # readable: the client, or __exit__, has closed it
            case Raw(data):
                connection.sendall(data)
            case Drip(data, every_seconds):
                for position in range(len(data)):
                    connection.sendall(data[position : position + 1])
                    if select.select([connection], [], [], every_seconds)[0]:
                        break
            case Cut():
                raise ConnectionAbortedError
        return False

    def _head(self, reply: Reply, body: bytes | None, close: bool) -> bytes:
        now = formatdate(usegmt=True)
        headers: dict[str, str | None] = {
            "Cache-Control": "max-age=0",
            "Connection": "close" if close else "Keep-Alive",
            "Date": now,
            "Pragma": "no-cache",
            "Server": self.server_name,
        }
        if body is not None:
            headers |= {"Content-Length": str(len(body)), "Content-Type": self.content_type}
        headers |= {"Expires": now, **reply.headers}
        reason = reply.reason or responses.get(reply.status, "")
        lines = (f"HTTP/1.1 {reply.status} {reason}", *(f"{name}: {value}" for name, value in headers.items() if value is not None))
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


# --- guests -------------------------------------------------------------------------------------------------------------------------


def usual_config(vmid: int, name: str, **changes: object) -> dict[str, object]:
    return {
        "arch": "amd64",
        "hostname": name,
        "memory": 1024,
        "net0": f"name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:{vmid % 256:02X},ip=dhcp,type=veth",
        "ostype": "debian",
        "rootfs": f"local:{vmid}/vm-{vmid}-disk-0.raw,size=8G",
        "swap": 512,
        **changes,
    }


@dataclass(slots=True)
class Guest:
    """A container: its configuration file, what is pending, and what the list says otherwise than the configuration (`list_extra`)."""

    vmid: int
    name: str
    status: str = "running"
    config: dict[str, object] = field(default_factory=dict)
    pending: dict[str, object] = field(default_factory=dict)
    lock: str | None = None
    template: bool = False
    vanished: bool = False
    list_extra: dict[str, object] = field(default_factory=dict)

    @property
    def _flags(self) -> dict[str, object]:
        return ({"lock": self.lock} if self.lock else {}) | ({"template": 1} if self.template else {})

    def list_entry(self, node_cpus: object) -> dict[str, object]:
        """What the list says: `cpus` is a string where only a cpulimit is set, `maxdisk` the volume's size while the guest is stopped."""
        limit, memory, swap = (self.config.get(key, unset) for key, unset in (("cpulimit", "0"), ("memory", 512), ("swap", 0)))
        size = re.search(r"size=(\d+)G", str(self.config.get("rootfs")))
        entry: dict[str, object] = dict.fromkeys(("cpu", "disk", "diskread", "diskwrite", "mem", "netin", "netout", "swap", "uptime"), 0)
        entry |= {"cpus": self.config.get("cores") or (limit if limit != "0" else node_cpus), "maxdisk": int(size[1] if size else 4) << 30}
        entry |= {key: value << 20 for key, value in (("maxmem", memory), ("maxswap", swap)) if isinstance(value, int)}
        entry |= {"name": self.name, "status": self.status, "type": "lxc", "vmid": self.vmid}
        if self.status == "running":
            entry |= {"cpu": 0.245703323283864, "disk": 28216709120, "diskread": 1048576, "diskwrite": 2097152, "maxdisk": 270553174016}
            entry |= {"mem": 134217728, "pid": 50 + self.vmid, "swap": 4096, "uptime": 131}
            entry |= {f"pressure{of}some": "0.12" for of in ("cpu", "io", "memory")}
            entry |= {f"pressure{of}full": "0.00" for of in ("cpu", "io", "memory")}
        entry |= {key: self.config[key] for key in ("tags",) if key in self.config}
        return entry | self._flags | self.list_extra

    def config_entry(self, *, current: bool) -> dict[str, object]:
        """What the configuration call says: pending changes (None: a key goes) are mixed in unless the current values are asked for."""
        config = self.config | self._flags
        text = "".join(f"{key}: {value}\n" for key, value in config.items())
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        config |= ({} if current else self.pending) | {"digest": digest}
        return {key: value for key, value in config.items() if value is not None}


def default_guests() -> list[Guest]:
    """Every kind of container there is, in no order, as the list has none."""
    weird = {
        "cores": 2,
        "cpuunits": 200,
        "description": "Grüße ☃ from 😀\nsecond line\nencoded % and <b>\n",
        "features": "nesting=1,keyctl=1",
        "lxc": [["lxc.apparmor.profile", "unconfined"], ["lxc.cgroup2.devices.allow", "c 10:200 rwm"]],
        "mp0": "local:106/vm-106-disk-1.raw,mp=/srv,size=4G",
        "tags": "grün;prod",
        "unprivileged": 1,
    }
    broken: dict[str, object] = {"cores": "many", "hostname": "bro ken", "memory": "12x", "rootfs": "???"}
    return [
        Guest(107, "broken", "stopped", broken, list_extra={"maxmem": 12582912}),
        Guest(100, "web", config=usual_config(100, "web", cores=2, onboot=1, tags="prod;web")),
        Guest(101, "nocores", config=usual_config(101, "nocores")),
        Guest(105, "snappy", "stopped", usual_config(105, "snappy", cores=2, parent="before"), pending={"cores": 4, "swap": None}),
        Guest(104, "locked", "stopped", usual_config(104, "locked", cores=1), lock="backup"),
        Guest(103, "tmpl", "stopped", usual_config(103, "tmpl", cores=1), template=True),
        Guest(108, "both", "stopped", usual_config(108, "both", cores=4, cpulimit="2")),
        Guest(102, "limitonly", "stopped", usual_config(102, "limitonly", cpulimit="1.5")),
        Guest(999, "vanished", config=usual_config(999, "vanished"), vanished=True),
        Guest(110, "limzero", "stopped", usual_config(110, "limzero", cpulimit="0")),
        Guest(106, "xn--weird-host.Example-1", config=usual_config(106, "xn--weird-host.Example-1", **weird)),
        Guest(109, "CT109", "stopped"),
    ]


def many_guests(count: int) -> list[Guest]:
    """Ordinary containers from 100 on, two of three running, in no order."""
    vmids = sorted(range(100, 100 + count), key=lambda vmid: vmid * 7919 % 10007)
    return [Guest(i, f"ct{i}", "running" if i % 3 else "stopped", usual_config(i, f"ct{i}", cores=1 + i % 4)) for i in vmids]


# --- the node -----------------------------------------------------------------------------------------------------------------------

NODE_RESOURCES: Final = """{
    "cpu": 0.0167285119344523, "disk": 28216639488, "maxcpu": 2, "maxdisk": 270553174016, "maxmem": 25276510208, "mem": 1403052032,
    "uptime": 2565
}"""
NODE_STATUS: Final = """{
    "boot-info": {"mode": "legacy-bios"},
    "cpu": 0,
    "cpuinfo": {"cores": 2, "cpus": 2, "family": "26", "flags": "fpu vme de pse tsc msr pae mce cx8 apic sep", "hvm": "",
                "mhz": "2596.122", "model": "AMD EPYC", "sockets": 1, "user_hz": 100, "vendor": "AuthenticAMD"},
    "current-kernel": {"machine": "x86_64", "release": "6.14.11-4-pve", "sysname": "Linux", "version": "#1 SMP PREEMPT_DYNAMIC @0"},
    "idle": 0,
    "ksm": {"shared": 0},
    "kversion": "Linux 6.14.11-4-pve #1 SMP PREEMPT_DYNAMIC @0",
    "loadavg": ["2.54", "1.74", "1.20"],
    "memory": {"available": 23897747456, "free": 22470807552, "total": 25276510208, "used": 1378762752},
    "pveversion": "pve-manager/9.2.11/14a22df35955d97d",
    "rootfs": {"avail": 80727584768, "free": 242336464896, "total": 270553174016, "used": 28216709120},
    "swap": {"free": 0, "total": 0, "used": 0},
    "uptime": 2574,
    "wait": 0.00235079639224717
}"""


def refused(status: int, reason: str) -> Refused:
    return Refused(json_reply({"data": None, "message": reason + "\n"}, status, reason))


def bad_parameter(name: str, problem: str) -> Refused:
    reason = "Parameter verification failed."
    return Refused(json_reply({"data": None, "message": reason + "\n", "errors": {name: problem}}, 400, reason))


class SimulatedNode(Server):
    """One Proxmox VE node. `status` is what /nodes/NAME/status says, `resources` the figures that /nodes adds for Sys.Audit."""

    server_name = "pve-api-daemon/3.0"
    content_type = "application/json;charset=UTF-8"
    base = "/api2/json"

    def __init__(
        self,
        certificates: Certificates | None,
        *,
        name: str = "pve1",
        guests: Sequence[Guest] | None = None,
        token: str = "felhom-agent@pve!agent=11111111-2222-3333-4444-555555555555",
        latency_seconds: float = 0.0,
    ) -> None:
        super().__init__(certificates)
        self.name = name
        self.token_id, _, self.token_secret = token.partition("=")
        self.guests = default_guests() if guests is None else list(guests)
        self.latency_seconds = latency_seconds
        self.auth_delay_seconds = 0.05  # Proxmox takes 3 s
        self.permissions = {path: dict.fromkeys(PRIVILEGES, 1) for path in PERMISSION_PATHS}
        self.resources: dict[str, object] = json.loads(NODE_RESOURCES)
        self.status: dict[str, object] = json.loads(NODE_STATUS)

    def answer(self, request: Request) -> Reply:
        if self.latency_seconds:
            self._stopping.wait(self.latency_seconds)
        try:
            self._authenticate(request.headers.get("authorization", ""))
            return self._route(request)
        except Refused as exc:
            return exc.reply

    def _authenticate(self, authorization: str) -> None:
        if authorization != f"PVEAPIToken={self.token_id}={self.token_secret}":
            self._stopping.wait(self.auth_delay_seconds)
            raise Refused(Reply(401, "Authentication failed!" if re.match("PVEAPIToken=.", authorization) else "No ticket", None))

    def _route(self, request: Request) -> Reply:
        path, _, query = request.path.removeprefix(self.base).partition("?")
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        headers: dict[str, str | None] = {}
        data: object
        match path.split("/")[1:] if request.method == "GET" and request.path.startswith(self.base) else []:
            case ["version"]:
                data = {"release": "9.2", "repoid": "14a22df35955d97d", "version": "9.2.11"}
            case ["access", "permissions"]:
                data = self.permissions
            case ["nodes"]:
                data = [self._node_entry()]
            case ["nodes", node, "status"]:
                self._require("Sys.Audit", f"/nodes/{node}")
                self._require_node(node)
                data = self.status
            case ["nodes", node, "lxc"]:
                self._require_node(node)
                cpus = self.resources.get("maxcpu")
                data = [guest.list_entry(cpus) for guest in self.guests if self._has("VM.Audit", f"/vms/{guest.vmid}")]
                # pveproxy passes on what pvedaemon said about its own connection, then adds its own
                headers = {"Connection": "close\r\nConnection: Keep-Alive"}
            case ["nodes", node, "lxc", vmid, "config"]:
                self._require("VM.Audit", f"/vms/{vmid}")
                self._require_node(node)
                data = self._guest_config(vmid, parameters.pop("current", "0"))
            case _:
                reason = f"Method '{request.method} {path}' not implemented"
                raise Refused(json_reply({"data": None, "message": reason}, 501, reason))
        for name in parameters:
            raise bad_parameter(name, "property is not defined in schema and the schema does not allow additional properties")
        return replace(json_reply({"data": data}), headers=headers, close=True if headers else None)

    def _has(self, privilege: str, path: str) -> bool:
        """Whether the token has the privilege there: the deepest path with rights of its own decides."""
        while path not in self.permissions and path != "/":
            path = path.rpartition("/")[0] or "/"
        return bool(self.permissions.get(path, {}).get(privilege))

    def _require(self, privilege: str, path: str) -> None:
        if not self._has(privilege, path):
            raise refused(403, f"Permission check failed ({path}, {privilege})")

    def _require_node(self, node: str) -> None:
        """Any other name is another node's, which pveproxy looks up and cannot reach."""
        if node in (self.name, "localhost"):
            return
        if node.lower().partition(".")[0] == self.name.lower():
            raise Refused(Reply(595, "No route to host", None))
        problem = f"failed to get address info for: {node}: Temporary failure in name resolution"
        raise refused(500, f"hostname lookup '{node}' failed - {problem}")

    def _node_entry(self) -> dict[str, object]:
        entry: dict[str, object] = {"id": f"node/{self.name}", "level": "", "node": self.name, "status": "online", "type": "node"}
        if self.certificates:
            entry["ssl_fingerprint"] = self.certificates.fingerprint
        return entry | (self.resources if self._has("Sys.Audit", f"/nodes/{self.name}") else {})

    def _guest_config(self, vmid: str, current: str) -> dict[str, object]:
        if not re.fullmatch("-?[0-9]+", vmid):
            raise bad_parameter("vmid", f"type check ('integer') failed - got '{vmid}'")
        if not 100 <= int(vmid) <= 999_999_999:
            raise bad_parameter("vmid", "invalid format - value does not look like a valid VM ID\n")
        if current not in ("0", "1"):
            raise bad_parameter("current", f"type check ('boolean') failed - got '{current}'")
        for guest in self.guests:
            if guest.vmid == int(vmid) and not guest.vanished:
                return guest.config_entry(current=current == "1")
        raise refused(500, f"Configuration file 'nodes/{self.name}/lxc/{vmid}.conf' does not exist")


# --- the hub ------------------------------------------------------------------------------------------------------------------------


def refuse_constant(name: str) -> object:
    raise ValueError(f"{name} stands in it")


@functools.cache
def report_schema() -> jsonschema.protocols.Validator:
    """Draft 2020-12 with the types of draft 4: newer drafts take 1.0 for an integer, a hub with typed fields does not."""
    import jsonschema

    types = jsonschema.Draft4Validator.TYPE_CHECKER
    validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=types)  # type: ignore[no-untyped-call]
    schema: jsonschema.protocols.Validator = validator(json.loads((Path(__file__).parent / "host-report.schema.json").read_text("utf-8")))
    return schema


class SimulatedHub(Server):
    """Takes host reports: `reports` has those it accepted, `rejected` says why it took others not; `envelope` is what it answers."""

    server_name = "hub"

    def __init__(
        self,
        certificates: Certificates | None,
        *,
        api_key: str = "lab-hub-key",
        prefix: str = "",
        log: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(certificates)
        self.api_key = api_key
        self.base = prefix
        self.envelope: dict[str, object] = {
            "poll_interval_seconds": 900,
            "blocked": False,
            "desired_generation": 0,
            "has_signed_ops": False,
        }
        self.reports: list[dict[str, object]] = []
        self.rejected: list[str] = []
        self._schema = report_schema()
        self._log = log or (lambda _line: None)

    @property
    def url(self) -> str:
        return super().url + self.base

    def wait_for_reports(self, count: int, timeout_seconds: float) -> None:
        """Return once this many reports have been accepted in all; TimeoutError if they are not."""
        self._wait_for(lambda: len(self.reports) >= count, f"{len(self.reports)} of {count} reports", timeout_seconds)

    def answer(self, request: Request) -> Reply:
        try:
            report = self._judge(request)
        except Refused as exc:
            line, reply = str(exc), exc.reply
            with self._changed:
                self.rejected.append(line)
        else:
            line, reply = f"report {len(self.reports) + 1}, {len(request.body)} bytes", json_reply(self.envelope)
            with self._changed:
                self.reports.append(report)
                self._changed.notify_all()
        self._log(f"{request.method} {request.path}: {line}")
        return reply

    def _judge(self, request: Request) -> dict[str, object]:
        def refuse(status: int, why: str) -> Refused:
            return Refused(json_reply({"error": why}, status), f"{status} {why}")

        if request.path != f"{self.base}/api/v1/host-report":
            raise refuse(404, f"no such path: {request.path}")
        if request.method != "POST":
            raise refuse(405, f"{request.method} is not for this path")
        if request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise refuse(401, "wrong or no key")
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise refuse(415, "Content-Type is not application/json")
        if "content-length" not in request.headers:
            raise refuse(411, "no Content-Length")
        try:
            report = json.loads(request.body, parse_constant=refuse_constant)
        except ValueError as exc:
            raise refuse(400, f"no JSON: {exc}") from exc
        if problems := [f"{error.json_path}: {error.message}" for error in self._schema.iter_errors(report)]:
            raise refuse(422, "; ".join(problems))
        if not isinstance(report, dict) or (vmids := [guest["vmid"] for guest in report["guests"]]) != sorted(set(vmids)):
            raise refuse(422, "$.guests: not in the order of their vmids, or one twice")
        return report


# --- for whoever wants to look ------------------------------------------------------------------------------------------------------


def configuration(node: SimulatedNode, hub: SimulatedHub) -> dict[str, dict[str, object]]:
    """The agent's configuration with which it reaches both."""
    proxmox: dict[str, object] = {"url": node.url, "node": node.name, "token_id": node.token_id, "token_secret": node.token_secret}
    to_hub: dict[str, object] = {"url": hub.url, "host_id": node.name, "api_key": hub.api_key}
    return {
        "proxmox": proxmox | ({"ca_file": str(node.certificates.ca_file)} if node.certificates else {}),
        "hub": to_hub | ({"ca_file": str(hub.certificates.ca_file)} if hub.certificates else {}),
    }


def environment(node: SimulatedNode, hub: SimulatedHub) -> dict[str, str]:
    """The same as FELHOM_AGENT_* variables."""
    sections = configuration(node, hub).items()
    return {f"FELHOM_AGENT_{section}_{key}".upper(): str(value) for section, keys in sections for key, value in keys.items()}


def write_at_once(path: Path, text: str) -> None:
    """So that who waits for the file never reads half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A simulated Proxmox VE node and a hub on loopback, until Ctrl-C.")
    parser.add_argument("--folder", type=Path, help="where the certificates go; default: a temporary folder, removed at the end")
    parser.add_argument("--guests", type=int, metavar="N", help="so many ordinary containers instead of one of every kind")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="the node answers so late")
    parser.add_argument("--poll-seconds", type=int, default=900, metavar="N", help="the interval that the hub wishes for (default: 900)")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many accepted reports")
    parser.add_argument("--env-file", "--ready-file", type=Path, metavar="PATH", help="write the environment here once both listen")
    parser.add_argument("--report-file", type=Path, metavar="PATH", help="write the last accepted report here")
    arguments = parser.parse_args(argv)
    for module in ("cryptography", "jsonschema"):
        if importlib.util.find_spec(module) is None:
            parser.exit(2, f"lab: this needs the package {module}: run ./build.sh test once, then ./build.sh lab\n")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="felhom-lab-")))
        certificates = make_certificates(folder)
        hub_certificates = make_certificates(folder / "hub", generation="current")
        guests = None if arguments.guests is None else many_guests(arguments.guests)
        node = stack.enter_context(SimulatedNode(certificates, guests=guests, latency_seconds=arguments.latency))
        hub = stack.enter_context(SimulatedHub(hub_certificates, log=lambda line: print(line, file=sys.stderr, flush=True)))
        hub.envelope = {"poll_interval_seconds": arguments.poll_seconds}
        quoted = {name: value.replace("'", "'\\''") for name, value in environment(node, hub).items()}
        exports = "".join(f"export {name}='{value}'\n" for name, value in quoted.items())
        if arguments.env_file:
            write_at_once(arguments.env_file, exports)
        print(exports, end="", flush=True)
        seen = 0
        while arguments.count is None or seen < arguments.count:
            hub.wait_for_reports(seen + 1, threading.TIMEOUT_MAX)
            seen = len(hub.reports)
            if arguments.report_file:
                write_at_once(arguments.report_file, json.dumps(hub.reports[-1], indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
