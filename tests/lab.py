"""A simulated Proxmox VE node and a simulated hub, both on loopback, for the tests and the demo.

The node answers as Proxmox's own daemons do (pve-manager 9.2): field names, value types, reason
phrases, headers, and when it closes a connection. It refuses whatever it does not know, as they do.
The hub checks every report against docs/host-report.schema.json.

    python tests/lab.py --env-file lab.env &      then: . ./lab.env; python felhom_agent.py
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import ipaddress
import json
import re
import select
import shlex
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.client import NO_CONTENT, responses
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, Self
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    import jsonschema
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

REQUESTS_PER_CONNECTION: Final = 100
IDLE_SECONDS: Final = 5.0

# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """A CA and a server certificate, as PEM files.

    `fingerprint` is the SHA-256 of the server certificate, upper case with colons.
    """

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


# One key for all node certificates saves time; each CA has its own, or it would vouch for others.
node_certificate_key = functools.cache(new_key)


def make_certificates(
    folder: Path,
    *,
    generation: Literal["current", "old"] = "old",
    names: Sequence[str] = ("127.0.0.1", "::1", "localhost", "pve1", "pve1.example.lan"),
    days: int = 730,
    not_before_days: int = 0,
) -> Certificates:
    """Write a new CA and a node certificate as Proxmox makes them.

    "current" is a CA made since March 2026, with the keyUsage extension, "old" one from before.
    `not_before_days` and `days` date the node certificate: -30 and 10 give an expired one.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID

    ca_key, node_key = new_key(), node_certificate_key()
    ca_name = x509.Name.from_rfc4514_string("O=PVE Cluster Manager CA,OU=00000000-lab")
    node_name = x509.Name.from_rfc4514_string("CN=pve1.example.lan,OU=PVE Cluster Node")
    ca_identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier)

    def build(
        subject: x509.Name, key: RSAPrivateKey, start: datetime, days: int
    ) -> x509.CertificateBuilder:
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        end, serial = start + timedelta(days=days), x509.random_serial_number()
        builder = x509.CertificateBuilder(ca_name, subject, key.public_key(), serial, start, end)
        return builder.add_extension(identifier, False).add_extension(issuer, False)

    now = datetime.now(UTC)
    ca_builder = build(ca_name, ca_key, now - timedelta(days=365), 3650)
    ca_builder = ca_builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    if generation == "current":
        # keyCertSign and cRLSign.
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        ca_builder = ca_builder.add_extension(usage, True)

    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    builder = build(node_name, node_key, now + timedelta(days=not_before_days, hours=-1), days)
    for extension in (
        x509.BasicConstraints(ca=False, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName(alternatives),
    ):
        builder = builder.add_extension(extension, False)

    ca, own = (each.sign(ca_key, hashes.SHA256()) for each in (ca_builder, builder))
    folder.mkdir(parents=True, exist_ok=True)
    ca_file, cert_file = folder / "pve-root-ca.pem", folder / "pve-ssl.pem"
    key_file = folder / "pve-ssl.key"
    key_file.touch(mode=0o600)
    ca_file.write_bytes(ca.public_bytes(Encoding.PEM))
    cert_file.write_bytes(own.public_bytes(Encoding.PEM))
    key_file.write_bytes(node_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return Certificates(
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
        fingerprint=own.fingerprint(hashes.SHA256()).hex(":").upper(),
    )


# --- requests and answers -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as received: `path` with base and query, header names in lower case.

    `connection` counts the server's connections from 1.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response.

    Body None: neither body nor Content-Length. `close` None: as the real server would.
    """

    status: int = 200
    reason: str = ""
    body: bytes | None = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing until the client leaves or the server stops, then close."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Send these bytes as they are, then close or reset the connection, or say nothing more."""

    data: bytes
    ending: Literal["close", "reset", "silence"] = "close"


@dataclass(frozen=True, slots=True)
class Cut:
    """Close without an answer and without TLS's closing alert."""


@dataclass(frozen=True, slots=True)
class Usual:
    """Answer as without a script."""


Answer = Reply | Stall | Raw | Cut | Usual


@dataclass(frozen=True, slots=True)
class Forever:
    """Give this answer to every later match too."""

    answer: Answer


def json_reply(value: object, status: int = 200, reason: str = "") -> Reply:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Reply(status, reason, body)


class Refused(Exception):
    """Refuse a request with this reply."""

    def __init__(self, reply: Reply, why: str = "") -> None:
        super().__init__(why)
        self.reply = reply


def read_request(stream: BinaryIO, connection: int) -> Request | None:
    """Return the next request, None if the client has left. Raises ValueError if it is not HTTP."""
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
    if len(body) < length:
        return None
    return Request(method=method, path=path, headers=headers, body=body, connection=connection)


# --- a server on loopback -------------------------------------------------------------------------


class Server:
    """A keep-alive HTTP/1.1 server with one thread for each connection, to be used by `with`.

    Entered again, it comes back on the same port.
    """

    server_name = ""
    content_type = "application/json"
    base = ""

    def __init__(self, certificates: Certificates | None) -> None:
        self.certificates = certificates
        self.port = 0
        self.requests: list[Request] = []
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._script: list[tuple[str, deque[Answer | Forever]]] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificates else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._stopping.clear()
        self._tls = self.certificates.server_context() if self.certificates else None
        self._listener = socket.create_server(
            ("127.0.0.1", self.port), backlog=128, reuse_port=True
        )
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        # Wakes accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._changed:
            for connection in self._open:
                # Reading ends; an answer on its way still goes out. SSLSocket's own drops the TLS.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RD)
        for thread in self._threads:
            thread.join()

    def script(self, match: str, *answers: Answer | Forever) -> None:
        """Give these answers, one each, to the next requests whose path begins with `match`.

        The path is the one below /api2/json (or the hub's prefix). "" matches every request,
        "/nodes$" exactly /nodes, whatever its query.
        """
        with self._changed:
            self._script.append((match, deque(answers)))

    def clear_script(self) -> None:
        with self._changed:
            self._script.clear()

    def wait_for_requests(self, count: int, timeout_seconds: float) -> None:
        """Return once so many requests have come in all. Raises TimeoutError."""
        self._wait_for(self.requests, count, "requests", timeout_seconds)

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def _wait_for(
        self, items: Sequence[object], count: int, what: str, timeout_seconds: float
    ) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(items) >= count, timeout_seconds):
                raise TimeoutError(f"{len(items)} of {count} {what} within {timeout_seconds} s")

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(
                target=self._serve, args=(connection, self.connections), daemon=True
            )
            self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            connection.settimeout(IDLE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            with self._changed:
                self._open.add(connection)
                if self._stopping.is_set():
                    return
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            with connection.makefile("rb") as stream:
                for served in range(1, REQUESTS_PER_CONNECTION + 1):
                    request = read_request(stream, number)
                    last = served == REQUESTS_PER_CONNECTION
                    if request is None or not self._exchange(connection, request, last=last):
                        break
            if isinstance(connection, ssl.SSLSocket):
                # Announce the end without waiting for the client to agree.
                connection.setblocking(False)
                connection.unwrap()
        except (OSError, ValueError):
            # The client has left, was idle for too long, or does not speak TLS or HTTP.
            pass
        finally:
            with self._changed:
                self._open.discard(connection)
                connection.close()

    def _exchange(self, connection: socket.socket, request: Request, *, last: bool) -> bool:
        """Answer one request. Return whether the connection stays open."""
        with self._changed:
            self.requests.append(request)
            answer = self._scripted(request)
            self._changed.notify_all()
        if isinstance(answer, Usual):
            answer = self.answer(request)
        last = last or request.headers.get("connection", "").lower() == "close"
        return self._send(connection, answer, last)

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
                close = last or endless or answer.status >= 400
                close = close if answer.close is None else answer.close
                connection.sendall(self._head(answer, body, close) + (body or b""))
                return not close
            case Stall():
                # Readable once the client, or __exit__, has closed it.
                select.select([connection], [], [], 600)
            case Raw(data, ending):
                connection.sendall(data)
                if ending == "reset":
                    reset_when_closed(connection)
                elif ending == "silence":
                    self._send(connection, Stall(), last)
            case Cut():
                raise ConnectionAbortedError
        return False

    def _head(self, reply: Reply, body: bytes | None, close: bool) -> bytes:
        headers = {
            "Connection": "close" if close else "Keep-Alive",
            "Date": formatdate(usegmt=True),
            "Server": self.server_name,
        }
        if body is not None:
            headers |= {"Content-Length": str(len(body)), "Content-Type": self.content_type}
        headers.update(reply.headers)
        reason = reply.reason or responses.get(reply.status, "")
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        return f"HTTP/1.1 {reply.status} {reason}\r\n{''.join(lines)}\r\n".encode()


def reset_when_closed(connection: socket.socket) -> None:
    """Make close() send RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port on which connecting never ends: its queue is full, and nobody takes from it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# --- guests and storages --------------------------------------------------------------------------

# What the list says of a running guest; of a stopped one each is 0.
FIGURES: Final[dict[str, object]] = json.loads("""{
    "cpu": 0.245004192691072, "disk": 28216639488, "diskread": 1048576, "diskwrite": 2097152,
    "mem": 134217728, "memhost": 0, "netin": 0, "netout": 0, "uptime": 123
}""")


def usual_config(vmid: int, name: str, **changes: object) -> dict[str, object]:
    """Return the configuration of an ordinary container."""
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


def leading_number(value: object) -> float:
    """Return the number that a value begins with, 0 if there is none, as Perl reads it."""
    number = re.match(r"(current=)?(\d+(?:\.\d+)?)", str(value))
    return float(number[2]) if number else 0


@dataclass(slots=True)
class Guest:
    """A container or a VM, and its configuration file.

    The status of a guest that was just created is "unknown". One that has `vanished` is still
    listed, but its configuration file is gone. A container with `env` in its configuration shows
    that only to who may change it. `list_extra` overrides what the list says.
    """

    vmid: int
    name: str
    status: str = "running"
    config: dict[str, object] = field(default_factory=dict)
    type: Literal["lxc", "qemu"] = "lxc"
    lock: str | None = None
    template: bool = False
    vanished: bool = False
    list_extra: dict[str, object] = field(default_factory=dict)

    def resource(self, node: str, *, stale: bool = False) -> dict[str, object]:
        """Return the guest's entry in /cluster/resources; a stale one is "unknown"."""
        status = "unknown" if stale else self.status
        entry: dict[str, object] = {"id": f"{self.type}/{self.vmid}", "node": node}
        entry |= {"status": status, "type": self.type, "vmid": self.vmid}
        entry |= {"lock": self.lock} if self.lock else {}
        entry |= {"tags": self.config["tags"]} if "tags" in self.config else {}
        if status != "unknown":
            entry |= FIGURES if status == "running" else dict.fromkeys(FIGURES, 0)
            memory = int(leading_number(self.config.get("memory", 512)))
            # Where neither is set, a container has the node's cores.
            cores = leading_number(self.config.get("cores", self.config.get("cpulimit"))) or 2
            # Of a container that runs, the size of the host's file system.
            entry |= {"maxcpu": cores, "maxdisk": 270553174016, "maxmem": memory << 20}
            # Proxmox encodes names twice, which shows in those that are not ASCII.
            entry |= {"name": self.name.encode().decode("latin-1"), "template": int(self.template)}
        return entry | self.list_extra

    def config_entry(self) -> dict[str, object]:
        config = self.config | ({"lock": self.lock} if self.lock else {})
        return config | ({"template": 1} if self.template else {})


def default_guests() -> list[Guest]:
    """Return one container of every kind, unsorted."""
    broken: dict[str, object] = {"cores": "many", "hostname": "bro ken", "memory": "12x"}
    weird_name = "xn--weird-host.Example-1"
    weird = usual_config(106, weird_name, cores=2, tags="grün;prod", description="Grüße ☃ 😀\n%<b>")
    return [
        Guest(107, "broken", "stopped", {**broken, "rootfs": "???"}),
        Guest(100, "web", config=usual_config(100, "web", cores=2, onboot=1, tags="prod;web")),
        Guest(101, "nocores", config=usual_config(101, "nocores")),
        Guest(105, "snappy", "stopped", usual_config(105, "snappy", cores=2)),
        Guest(104, "locked", "stopped", usual_config(104, "locked", cores=1), lock="backup"),
        Guest(103, "tmpl", "stopped", usual_config(103, "tmpl", cores=1), template=True),
        Guest(102, "limitonly", "stopped", usual_config(102, "limitonly", cpulimit="1.5")),
        Guest(999, "vanished", config=usual_config(999, "vanished"), vanished=True),
        Guest(106, weird_name, config=weird),
        Guest(109, "CT109", "stopped"),
    ]


def many_guests(count: int) -> list[Guest]:
    """Return ordinary containers from 100 on, two of three running, unsorted."""

    def build(vmid: int) -> Guest:
        config = usual_config(vmid, f"ct{vmid}", cores=1 + vmid % 4)
        return Guest(vmid, f"ct{vmid}", "running" if vmid % 3 else "stopped", config)

    return [build(vmid) for vmid in sorted(range(100, 100 + count), key=lambda i: i * 7919 % 10007)]


VM_CONFIGS: Final = """{
    "vm-one": {
        "boot": "order=scsi0;ide2", "cores": 4, "cpulimit": "3", "memory": "4096", "sockets": 2,
        "efidisk0": "local:200/vm-200-disk-0.qcow2,efitype=4m,size=4M",
        "ide2": "local:iso/debian.iso,media=cdrom,size=600M",
        "scsi0": "local:200/vm-200-disk-1.qcow2,iothread=1,size=32G",
        "scsi1": "local:200/vm-200-disk-2.qcow2,backup=0,size=100G",
        "scsihw": "virtio-scsi-single", "unused0": "local:200/vm-200-disk-9.qcow2"
    },
    "template": {"scsi0": "local:201/base-201-disk-0.qcow2,size=10G"},
    "diskless": {"cores": 2, "ide2": "none,media=cdrom", "memory": "current=2048", "vcpus": 1}
}"""


def default_vms() -> list[Guest]:
    """Return one VM of every kind, unsorted."""
    configs = json.loads(VM_CONFIGS)

    def build(vmid: int, name: str, status: str, **changes: Any) -> Guest:
        return Guest(vmid, name, status, {**configs[name], "name": name}, type="qemu", **changes)

    return [
        build(202, "diskless", "stopped", lock="migrate"),
        build(200, "vm-one", "running"),
        build(201, "template", "stopped", template=True),
    ]


def many_vms(count: int) -> list[Guest]:
    """Return ordinary VMs, unsorted; their IDs lie beyond those of `many_guests`."""

    def build(vmid: int) -> Guest:
        config: dict[str, object] = {"boot": "order=scsi0", "memory": "2048", "name": f"vm{vmid}"}
        config |= {"cores": 2, "scsi0": f"local:{vmid}/vm-{vmid}-disk-0.qcow2,size=32G"}
        return Guest(vmid, f"vm{vmid}", config=config, type="qemu")

    return [build(vmid) for vmid in reversed(range(50_000, 50_000 + count))]


@dataclass(slots=True)
class Storage:
    name: str
    content: str = "backup"
    plugintype: str = "dir"
    status: str = "available"
    total_bytes: int = 4294967296
    used_bytes: int = 31494144
    backups: list[dict[str, object]] = field(default_factory=list)

    def resource(self, node: str, *, stale: bool = False) -> dict[str, object]:
        """Return the storage's entry in /cluster/resources."""
        status = "unknown" if stale else self.status
        entry: dict[str, object] = {"id": f"storage/{node}/{self.name}", "type": "storage"}
        entry |= {"content": self.content, "node": node, "plugintype": self.plugintype}
        entry |= {"status": status, "storage": self.name}
        sizes = {"disk": self.used_bytes, "maxdisk": self.total_bytes}
        return entry | (sizes if status == "available" else {})


def backup(
    volid: str, ctime: int, vmid: int | str | None, guest_type: str = "lxc", mark: str = "keep"
) -> dict[str, object]:
    """Return an entry of a storage's backups; a renamed one has a string for `vmid`, or none."""
    entry: dict[str, object] = {"ctime": ctime, "mark": mark, "type": guest_type, "volid": volid}
    return entry | ({} if vmid is None else {"vmid": vmid})


BACKUPS: Final = """[
    ["bak:backup/my-vzdump-lxc-100-2026_11_23-02_00_03.tar.zst", 1795572194, "100", "unknown",
     "renamed"],
    ["bak:backup/vzdump-lxc-100-2026_11_22-02_00_03.tar.zst", 1795312803, 100, "lxc", "protected"],
    ["bak:backup/vzdump-lxc-100-2026_11_24-02_00_03.tar.zst", 1795485603, 100, "lxc", "keep"],
    ["bak:backup/vzdump-lxc-100-2026_11_23-02_00_03.tar.zst", 1795399203, 100, "lxc", "keep"],
    ["bak:backup/vzdump-lxc-100-before-upgrade.tar.zst", 1795572194, "100", "lxc", "protected"],
    ["bak:backup/vzdump-lxc-101-2026_11_21-02_00_40.tar.zst", 1795226440, 101, "lxc", "keep"],
    ["bak:backup/vzdump-openvz-106-2014_01_01-00_00_00.tar.gz", 1388534400, 106, "openvz", "keep"],
    ["bak:backup/vzdump-qemu-101-2026_11_22-02_00_40.vma.zst", 1795312840, 101, "qemu", "keep"],
    ["bak:backup/vzdump-qemu-200-2026_11_24-02_01_00.vma.zst", 1795485660, 200, "qemu", "keep"],
    ["bak:backup/vzdump-qemu-nixos.vma.zst", 1790000000, null, "qemu", "protected"]
]"""


def task(
    kind: str, guest: int | str, end: int | None, status: str | None = "OK", **changes: object
) -> dict[str, object]:
    """Return an entry of the task list; without `end` or `status` it has no such key."""
    entry: dict[str, object] = {"type": kind, "id": str(guest), "user": "root@pam", "node": "pve1"}
    entry |= {"pid": 2070, "pstart": 478668, "starttime": (end or int(time.time())) - 1}
    entry |= {} if end is None else {"endtime": end}
    entry |= {} if status is None else {"status": status}
    return entry | changes


def default_tasks() -> list[dict[str, object]]:
    """Return tasks of the last hours, the newest first."""
    now = int(time.time())
    console = "connection timed out"
    return [
        task("vncproxy", 100, now - 60, console, user="op@pve", tokenid="auto"),
        # Of several guests.
        task("vzdump", "", now - 7200, "job errors"),
        task("vzdump", 100, now - 7300),
    ]


def default_storages() -> list[Storage]:
    """Return one storage of every kind, unsorted; `bak` has every kind of backup."""
    bak = [backup(*entry) for entry in json.loads(BACKUPS)]
    nas = [backup("nas:backup/vzdump-lxc-100-2026_11_21-02_00_03.tar.zst", 1795226403, 100)]
    pbs = [backup("pbs:backup/ct/100/2026-11-24T01:00:00Z", 1795482000, 100)]
    return [
        Storage("local", "iso,backup,images,rootdir,vztmpl,snippets"),
        Storage("gone", status="unknown"),
        Storage("bak", backups=bak),
        Storage("nobackup", "vztmpl,iso"),
        Storage("nas", "backup,iso", "nfs", backups=nas),
        Storage("pbs", "backup", "pbs", backups=pbs),
    ]


@dataclass(slots=True)
class OtherNode:
    """Another node of the cluster. Status None: the cluster does not know it, only its guests."""

    name: str
    status: Literal["online", "offline"] | None = "online"
    guests: list[Guest] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)


# --- the node -------------------------------------------------------------------------------------

AREAS: Final = ("Datastore", "Mapping", "Pool", "SDN", "Sys", "VM", "VM.GuestAgent")
PRIVILEGES: Final = tuple(f"{area}.Audit" for area in AREAS)
ROLES: Final[Mapping[str, Sequence[str]]] = {
    "NoAccess": (),
    "NoVM": ("Datastore.Audit", "Sys.Audit"),
    "PVEAuditor": PRIVILEGES,
    "VMAudit": ("VM.Audit",),
}
# A path, a role, and whether it propagates to the paths below.
ACL = list[tuple[str, str, bool]]
AUDITOR: Final = ("/", "PVEAuditor", True)

# Values that pvestatd sent are shown for so long.
EXPIRY_SECONDS: Final = 300
NODE_RESOURCES: Final = """{
    "cpu": 0.0167285119344523, "disk": 28216639488, "maxcpu": 2, "maxdisk": 270553174016,
    "maxmem": 25276510208, "mem": 1403052032
}"""
ZONE: Final = """{
    "id": "network/pve1/zone/localnetwork", "network": "localnetwork", "network-type": "zone",
    "node": "pve1", "status": "ok", "type": "network"
}"""
NODE_STATUS: Final = """{
    "boot-info": {"mode": "legacy-bios"},
    "cpu": 0,
    "cpuinfo": {
        "cores": 2, "cpus": 2, "family": "26", "flags": "fpu vme de pse tsc msr pae mce cx8 apic",
        "hvm": "", "mhz": "2596.122", "model": "AMD EPYC", "sockets": 1, "user_hz": 100,
        "vendor": "AuthenticAMD"
    },
    "current-kernel": {
        "machine": "x86_64", "release": "6.14.11-4-pve", "sysname": "Linux",
        "version": "#1 SMP PREEMPT_DYNAMIC @0"
    },
    "idle": 0,
    "ksm": {"shared": 0},
    "kversion": "Linux 6.14.11-4-pve #1 SMP PREEMPT_DYNAMIC @0",
    "loadavg": ["2.54", "1.74", "1.20"],
    "memory": {
        "available": 23897747456, "free": 22470807552, "total": 25276510208, "used": 1378762752
    },
    "pveversion": "pve-manager/9.2.11/14a22df35955d97d",
    "rootfs": {
        "avail": 80727584768, "free": 242336464896, "total": 270553174016, "used": 28216709120
    },
    "swap": {"free": 0, "total": 0, "used": 0},
    "uptime": 2574,
    "wait": 0.00235079639224717
}"""


def refused(status: int, reason: str) -> Refused:
    return Refused(json_reply({"data": None, "message": reason + "\n"}, status, reason))


def bad_parameter() -> Refused:
    return refused(400, "Parameter verification failed.")


class SimulatedNode(Server):
    """One Proxmox VE node.

    `status` is the reply to /nodes/NAME/status, `resources` what Sys.Audit adds to the node's own
    entry in /cluster/resources. That list is `resources_age_seconds` old; beyond 5 minutes whatever
    it says of this node is "unknown".

    `acl` is that of the token's user, `token_acl` that of a token with privilege separation, which
    has what both allow. `pools` maps the path of a member to its pool. In `tasks` the newest comes
    first.
    """

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
    ) -> None:
        super().__init__(certificates)
        self.name = name
        self.token_id, _, self.token_secret = token.partition("=")
        # Guests that a test brings are all there are, or an ID could be taken twice.
        self.guests = default_guests() if guests is None else list(guests)
        self.vms = default_vms() if guests is None else []
        self.storages = default_storages()
        self.tasks = default_tasks()
        self.other_nodes: list[OtherNode] = []
        self.acl: ACL = [AUDITOR]
        self.token_acl: ACL | None = None
        self.roles = dict(ROLES)
        self.pools: dict[str, str] = {}
        self.resources: dict[str, object] = json.loads(NODE_RESOURCES)
        self.resources_age_seconds = 9
        self.status: dict[str, object] = json.loads(NODE_STATUS)

    def answer(self, request: Request) -> Reply:
        try:
            self._authenticate(request.headers.get("authorization", ""))
            return self._route(request)
        except Refused as exc:
            return exc.reply

    def usual_reply(self, path: str) -> Reply:
        """Return the answer to GET with the node's own token."""
        token = {"authorization": f"PVEAPIToken={self.token_id}={self.token_secret}"}
        path = self.base + path
        return self.answer(Request(method="GET", path=path, headers=token, body=b"", connection=0))

    def _authenticate(self, authorization: str) -> None:
        if authorization != f"PVEAPIToken={self.token_id}={self.token_secret}":
            is_token = re.match("PVEAPIToken=.", authorization)
            raise Refused(Reply(401, "Authentication failed!" if is_token else "No ticket", None))

    def _route(self, request: Request) -> Reply:
        path, _, query = request.path.removeprefix(self.base).partition("?")
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        readable = request.method == "GET" and request.path.startswith(self.base)
        headers: dict[str, str] = {}
        data: object
        match path.split("/")[1:] if readable else []:
            case ["version"]:
                data = {"release": "9.2", "repoid": "14a22df35955d97d", "version": "9.2.11"}
            case ["access", "permissions"]:
                data = self._permissions_reply(parameters.pop("path", None))
            case ["cluster", "resources"]:
                data = self._resources()
            case ["nodes", self.name, "status"]:
                self._require(f"/nodes/{self.name}", "Sys.Audit")
                data = self.status
            case ["nodes", self.name, "lxc" | "qemu" as kind, vmid, "config"]:
                self._require(f"/vms/{vmid}", "VM.Audit")
                data = self._guest_config(kind, vmid)
                # Without it, changes that are pending would be mixed in.
                parameters.pop("current", "1")
            case ["nodes", self.name, "tasks"]:
                data = self._finished_tasks(parameters)
            case ["nodes", self.name, "storage", storage, "prunebackups"]:
                self._require(f"/storage/{storage}", "Datastore.Audit", "Datastore.AllocateSpace")
                data = self._backups(storage, parameters.pop("prune-backups", "keep-all=1"))
                # pveproxy passes on pvedaemon's header, then adds its own.
                headers = {"Connection": "close\r\nConnection: Keep-Alive"}
            case _:
                reason = f"Method '{request.method} {path}' not implemented"
                raise Refused(json_reply({"data": None, "message": reason}, 501, reason))
        if parameters:
            raise bad_parameter()
        reply = json_reply({"data": data})
        return replace(reply, headers=headers, close=bool(headers) or None)

    def permissions(self, path: str) -> set[str]:
        """Return what the token may do at a path."""
        user = self._granted(self.acl, path)
        return user if self.token_acl is None else user & self._granted(self.token_acl, path)

    def _granted(self, acl: ACL, path: str) -> set[str]:
        roles = self._find_roles(acl, path)
        if path in self.pools:
            roles |= self._find_roles(acl, f"/pool/{self.pools[path]}")
        if "NoAccess" in roles:
            return set()
        return {privilege for role in roles for privilege in self.roles[role]}

    @staticmethod
    def _find_roles(acl: ACL, path: str) -> set[str]:
        """Return the roles at a path: the deepest entry of the list decides."""
        roles: set[str] = set()
        steps = [path[: slash.start()] for slash in re.finditer("/", path)]
        for step in ("/", *steps[1:], path):
            here = {
                role
                for place, role, propagates in acl
                if place == step and (propagates or step == path)
            }
            roles = here or roles
        return roles

    def _permissions_reply(self, path: str | None) -> dict[str, dict[str, int]]:
        if path is not None:
            return {path: dict.fromkeys(self.permissions(path), 1)}
        paths = ["/", "/access", "/nodes", "/pool", "/storage", "/vms", *self.pools]
        paths += [place for place, _, _ in (*self.acl, *(self.token_acl or []))]
        found = {path: dict.fromkeys(self.permissions(path), 1) for path in paths}
        return {path: privileges for path, privileges in found.items() if privileges}

    def _require(self, path: str, *any_of: str) -> None:
        if not any(privilege in self.permissions(path) for privilege in any_of):
            raise refused(403, f"Permission check failed ({path}, {'|'.join(any_of)})")

    def _resources(self) -> list[dict[str, object]]:
        """Return the entries of /cluster/resources that the token may see."""
        expired = self.resources_age_seconds > EXPIRY_SECONDS
        own = OtherNode(self.name, None, [*self.guests, *self.vms], self.storages)
        # Path, privilege that its entry takes, entry.
        entries: list[tuple[str, str, dict[str, object]]] = []
        for node in (own, *self.other_nodes):
            stale = expired if node is own else node.status != "online"
            for guest in node.guests:
                path = f"/vms/{guest.vmid}"
                entry = guest.resource(node.name, stale=stale)
                entries.append((path, "VM.Audit", entry))
            for storage in node.storages:
                entry = storage.resource(node.name, stale=stale)
                entries.append((f"/storage/{storage.name}", "Datastore.Audit", entry))
        entries.append(("/sdn/zones/localnetwork", "SDN.Audit", json.loads(ZONE)))
        nodes = [self._node_entry(self.name, "unknown" if expired else "online")]
        nodes += [
            self._node_entry(node.name, node.status) for node in self.other_nodes if node.status
        ]
        allowed = [entry for path, needed, entry in entries if needed in self.permissions(path)]
        return allowed + nodes

    def _node_entry(self, name: str, status: str) -> dict[str, object]:
        entry: dict[str, object] = {"cgroup-mode": 2, "id": f"node/{name}", "node": name}
        entry |= {"status": status, "type": "node"}
        if status != "online":
            return entry
        entry["level"] = ""
        if "Sys.Audit" not in self.permissions(f"/nodes/{name}"):
            return entry
        if name != self.name:
            return entry | self.resources | {"cpu": 0.75, "uptime": 86400}
        uptime = self.status.get("uptime")
        if isinstance(uptime, int):
            entry["uptime"] = uptime - self.resources_age_seconds
        return entry | self.resources

    def _guest_config(self, kind: str, vmid: str) -> dict[str, object]:
        for guest in (*self.guests, *self.vms):
            if str(guest.vmid) == vmid and guest.type == kind and not guest.vanished:
                if "env" in guest.config:
                    self._require(f"/vms/{vmid}", "VM.Config.Options")
                return guest.config_entry()
        folder = "lxc" if kind == "lxc" else "qemu-server"
        path = f"nodes/{self.name}/{folder}/{vmid}.conf"
        raise refused(500, f"Configuration file '{path}' does not exist")

    def _finished_tasks(self, parameters: dict[str, str]) -> list[dict[str, object]]:
        if parameters.pop("source", "active") != "archive":
            raise bad_parameter()
        since, limit = int(parameters.pop("since", "0")), int(parameters.pop("limit", "50"))
        tasks = self.tasks
        if "Sys.Audit" not in self.permissions(f"/nodes/{self.name}"):
            # A token sees its own all the same.
            tasks = [t for t in tasks if f"{t['user']}!{t.get('tokenid')}" == self.token_id]
        return [t for t in tasks if int(str(t["starttime"])) >= since][:limit]

    def _backups(self, name: str, keep: str) -> list[dict[str, object]]:
        if keep != "keep-all=1":
            raise bad_parameter()
        storage = next((storage for storage in self.storages if storage.name == name), None)
        if storage is None:
            raise refused(500, f"storage '{name}' does not exist")
        if "backup" not in storage.content.split(","):
            raise refused(500, f"storage '{name}' does not support backups")
        return storage.backups


# --- the hub --------------------------------------------------------------------------------------


SCHEMA: Final = next(
    path
    for folder in Path(__file__).parents
    if (path := folder / "docs/host-report.schema.json").exists()
)
# Each collection in its report is sorted by these keys and names nothing twice.
SORT_KEYS: Final = {
    "guests": ("vmid",),
    "storage_targets": ("storage",),
    "backups": ("vmid", "type", "storage"),
}


def refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


@functools.cache
def report_schema() -> jsonschema.protocols.Validator:
    """Return a validator for draft 2020-12, but with the types of draft 4.

    Newer drafts take 1.0 for an integer; a hub with typed fields does not.  Fields that the schema
    does not describe are left to test_docs.py, which names all the places of a new one.
    """
    import jsonschema

    strict = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        jsonschema.Draft202012Validator, type_checker=jsonschema.Draft4Validator.TYPE_CHECKER
    )
    schema = json.loads(SCHEMA.read_text("utf-8"), object_hook=drop_additional)
    validator: jsonschema.protocols.Validator = strict(schema)
    return validator


def drop_additional(part: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in part.items() if name != "additionalProperties"}


class SimulatedHub(Server):
    """A hub that takes host reports.

    `reports` has those it accepted, `rejected` the reasons why it refused others; `envelope` is its
    reply.
    """

    server_name = "hub"

    def __init__(
        self,
        certificates: Certificates | None,
        *,
        api_key: str = "lab-hub-key",
        log: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(certificates)
        self.api_key = api_key
        self.envelope: dict[str, object] = {"poll_interval_seconds": 900, "blocked": False}
        self.envelope |= {"desired_generation": 0, "has_signed_ops": False}
        self.reports: list[dict[str, object]] = []
        self.rejected: list[str] = []
        self._schema = report_schema()
        self._log = log or (lambda _line: None)

    @property
    def url(self) -> str:
        return super().url + self.base

    def wait_for_reports(self, count: int, timeout_seconds: float) -> None:
        """Return once so many reports have been accepted in all. Raises TimeoutError."""
        self._wait_for(self.reports, count, "reports", timeout_seconds)

    def answer(self, request: Request) -> Reply:
        try:
            report = self._judge(request)
        except Refused as exc:
            line, reply = str(exc), exc.reply
            with self._changed:
                self.rejected.append(line)
        else:
            line = f"report {len(self.reports) + 1}, {len(request.body)} bytes"
            reply = json_reply(self.envelope)
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
            raise refuse(400, f"not JSON: {exc}") from exc
        errors = self._schema.iter_errors(report)
        if problems := [f"{error.json_path}: {error.message}" for error in errors]:
            raise refuse(422, "; ".join(problems))
        valid: dict[str, Any] = report
        for collection, keys in SORT_KEYS.items():
            places = [tuple(entry[key] for key in keys) for entry in valid[collection]]
            if places != sorted(set(places)):
                raise refuse(
                    422, f"$.{collection}: not sorted by {' and '.join(keys)}, or one twice"
                )
        return valid


# --- command line ---------------------------------------------------------------------------------


def configuration(node: SimulatedNode, hub: SimulatedHub) -> dict[str, dict[str, object]]:
    """Return the configuration with which the agent reaches both."""
    proxmox: dict[str, object] = {"url": node.url, "node": node.name, "token_id": node.token_id}
    proxmox["token_secret"] = node.token_secret
    to_hub: dict[str, object] = {"url": hub.url, "host_id": node.name, "api_key": hub.api_key}
    if node.certificates:
        proxmox["ca_file"] = str(node.certificates.ca_file)
    if hub.certificates:
        to_hub["ca_file"] = str(hub.certificates.ca_file)
    return {"proxmox": proxmox, "hub": to_hub}


def environment(node: SimulatedNode, hub: SimulatedHub) -> dict[str, str]:
    """Return the same as FELHOM_AGENT_* variables."""
    return {
        f"FELHOM_AGENT_{section}_{key}".upper(): str(value)
        for section, keys in configuration(node, hub).items()
        for key, value in keys.items()
    }


def write_at_once(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="A simulated Proxmox VE node and a hub on loopback, until Ctrl-C."
    )
    parser.add_argument("--guests", type=int, metavar="N", help="N ordinary containers, no VMs")
    parser.add_argument(
        "--env-file", type=Path, metavar="PATH", help="write the environment here when ready"
    )
    arguments = parser.parse_args(argv)
    for module in ("cryptography", "jsonschema"):
        if importlib.util.find_spec(module) is None:
            hint = "run ./build.sh test once, then ./build.sh lab"
            parser.exit(2, f"lab: this needs the package {module}: {hint}\n")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="felhom-lab-")
        folder = Path(stack.enter_context(temporary))
        certificates = make_certificates(folder)
        hub_certificates = make_certificates(folder / "hub", generation="current")
        guests = None if arguments.guests is None else many_guests(arguments.guests)
        log = functools.partial(print, file=sys.stderr, flush=True)
        node = SimulatedNode(certificates, guests=guests)
        hub = SimulatedHub(hub_certificates, log=log)
        stack.enter_context(node)
        stack.enter_context(hub)
        variables = environment(node, hub).items()
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables)
        if arguments.env_file:
            write_at_once(arguments.env_file, exports)
        print(exports, end="", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
