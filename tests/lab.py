"""A simulated Proxmox VE node and a simulated hub, both on loopback, for the tests and the demo.

The node answers as Proxmox's own daemons do (pve-manager 9.2): field names, value types, reason
phrases, and when it closes a connection. It refuses whatever it does not know, as they do. The hub
checks every report against docs/host-report.schema.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import NO_CONTENT, parse_headers, responses
from pathlib import Path
from typing import BinaryIO, Final, Literal, Self
from urllib.parse import parse_qsl

import jsonschema
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

REQUESTS_PER_CONNECTION: Final = 100
IDLE_SECONDS: Final = 5.0

# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files of a CA and a server; `fingerprint` is the SHA-256 of the server's certificate."""

    ca_file: Path
    cert_file: Path
    key_file: Path
    fingerprint: str

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


@functools.cache
def private_key(owner: Path | str) -> rsa.RSAPrivateKey:
    """Return a key of its own for each CA, or it would vouch for others; nodes share one."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def make_certificates(
    folder: Path,
    *,
    names: Sequence[str] = ("127.0.0.1", "::1", "localhost", "pve1", "pve1.example.lan"),
    days: int = 730,
    not_before_days: int = 0,
) -> Certificates:
    """Write a new CA and a node certificate as Proxmox makes them.

    As most installations have it, the CA is from before March 2026, without keyUsage.
    `not_before_days` and `days` date the node certificate: -30 and 10 give an expired one.
    """
    ca_key, node_key = private_key(folder), private_key("node")
    ca_name = x509.Name.from_rfc4514_string("O=PVE Cluster Manager CA,OU=00000000-lab")
    node_name = x509.Name.from_rfc4514_string("CN=pve1.example.lan,OU=PVE Cluster Node")

    def sign(
        subject: x509.Name, key: rsa.RSAPrivateKey, start: int, days: int, *own: x509.ExtensionType
    ) -> x509.Certificate:
        begin = datetime.now(UTC) + timedelta(days=start, hours=-1)
        end, serial = begin + timedelta(days=days), x509.random_serial_number()
        builder = x509.CertificateBuilder(ca_name, subject, key.public_key(), serial, begin, end)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        for identifier in (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), issuer):
            builder = builder.add_extension(identifier, critical=False)
        for extension in own:
            builder = builder.add_extension(extension, critical=subject == ca_name)
        return builder.sign(ca_key, hashes.SHA256())

    is_ca = x509.BasicConstraints(ca=True, path_length=None)
    ca = sign(ca_name, ca_key, -365, 3650, is_ca)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    node = sign(
        *(node_name, node_key, not_before_days, days),
        x509.BasicConstraints(ca=False, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName(alternatives),
    )
    key = node_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    ca_file, cert_file = folder / "pve-root-ca.pem", folder / "pve-ssl.pem"
    key_file = folder / "pve-ssl.key"
    folder.mkdir(parents=True, exist_ok=True)
    ca_file.write_bytes(ca.public_bytes(Encoding.PEM))
    cert_file.write_bytes(node.public_bytes(Encoding.PEM))
    key_file.write_bytes(key)
    fingerprint = node.fingerprint(hashes.SHA256()).hex(":").upper()
    return Certificates(ca_file, cert_file, key_file, fingerprint)


# --- a server on loopback -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """`path` has base and query, the names of `headers` are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Body None: without Content-Length, too. `close` None: as the real server would."""

    status: int = 200
    reason: str = ""
    body: bytes | None = b""
    headers: dict[str, str] = field(default_factory=dict)
    close: bool | None = None


@dataclass(frozen=True, slots=True)
class Raw:
    """Send these bytes and end the connection; "cut" leaves out TLS's closing alert."""

    data: bytes
    ending: Literal["close", "reset", "silence", "cut"] = "close"


Stall: Final = functools.partial(Raw, b"", "silence")
Cut: Final = functools.partial(Raw, b"", "cut")


class Usual:
    """Answer as without a script."""


Answer = Reply | Raw | Usual


@dataclass(frozen=True, slots=True)
class Forever:
    """Give this answer to every later match too."""

    answer: Answer


def json_reply(value: object, status: int = 200, reason: str = "") -> Reply:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Reply(status, reason, body)


def read_request(stream: BinaryIO, connection: int) -> Request | None:
    """Return the next request, None if the client has left. Raises ValueError if it is not HTTP."""
    line = stream.readline(8192)
    if not line:
        return None
    method, path, _version = line.decode("latin-1").split()
    headers = {name.lower(): value for name, value in parse_headers(stream).items()}
    length = int(headers.get("content-length", "0"))
    body = stream.read(length)
    if len(body) < length:
        return None
    return Request(method, path, headers, body, connection)


def reset_when_closed(connection: socket.socket) -> None:
    """Make close() send RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Server:
    """A keep-alive HTTP/1.1 server for use by `with`; entered again, it has the same port."""

    # What stands before each path.
    base = ""

    def __init__(self, certificates: Certificates | None) -> None:
        self.certificates = certificates
        self.port = 0
        self.requests: list[Request] = []
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._script: list[tuple[str, list[Answer | Forever]]] = []
        self._changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificates else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._tls = self.certificates.server_context() if self.certificates else None
        address = ("127.0.0.1", self.port)
        self._listener = socket.create_server(address, backlog=128, reuse_port=True)
        self.port = self._listener.getsockname()[1]
        self._is_stopping = False
        self._threads: list[threading.Thread] = []
        self._start(self._accept)
        return self

    def __exit__(self, *_exc: object) -> None:
        # Wakes accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self._is_stopping = True
        for connection in list(self._open):
            # Reading ends; an answer on its way still goes out. SSLSocket's own drops the TLS.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RD)
        for thread in self._threads:
            thread.join()

    def script(self, match: str, *answers: Answer | Forever) -> None:
        """Answer so, in turn, the next requests whose path below `base` begins with `match`."""
        self._script.append((match, list(answers)))

    def clear_script(self) -> None:
        self._script.clear()

    def wait_for_requests(self, count: int, timeout_seconds: float) -> None:
        """Return once so many requests have come in all. Raises TimeoutError."""
        self._wait_for(self.requests, count, timeout_seconds)

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def _wait_for(self, items: Sequence[object], count: int, timeout_seconds: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(items) >= count, timeout_seconds):
                raise TimeoutError(f"{len(items)} instead of {count} within {timeout_seconds} s")

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _address = self._listener.accept()
                self.connections += 1
                self._start(self._serve, connection, self.connections)

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            connection.settimeout(IDLE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                # The handshake comes with the first read.
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            self._open.add(connection)
            if self._is_stopping:
                return
            with connection.makefile("rb") as stream:
                for left in reversed(range(REQUESTS_PER_CONNECTION)):
                    request = read_request(stream, number)
                    if request is None or not self._exchange(connection, request, last=left == 0):
                        break
            if isinstance(connection, ssl.SSLSocket):
                # Announce the end without waiting for the client to agree.
                connection.setblocking(False)
                connection.unwrap()
        except (OSError, ValueError):
            # The client has left, was idle for too long, or does not speak TLS or HTTP.
            pass
        finally:
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
        if isinstance(answer, Reply):
            stays_open = answer.body is not None and answer.status < 400 and not last
            if answer.close is not None:
                stays_open = not answer.close
            connection.sendall(self._head(answer, stays_open) + (answer.body or b""))
            return stays_open
        connection.sendall(answer.data)
        if answer.ending == "cut":
            raise ConnectionAbortedError
        if answer.ending == "reset":
            reset_when_closed(connection)
        if answer.ending == "silence":
            # Readable once the client, or __exit__, has closed it.
            select.select([connection], [], [], 600)
        return False

    def _scripted(self, request: Request) -> Answer:
        path = request.path.removeprefix(self.base)
        for match, answers in self._script:
            if answers and path.startswith(match):
                answer = answers[0]
                if isinstance(answer, Forever):
                    return answer.answer
                del answers[0]
                return answer
        return Usual()

    @staticmethod
    def _head(reply: Reply, stays_open: bool) -> bytes:
        headers = {"Connection": "Keep-Alive" if stays_open else "close"}
        if reply.body is not None and reply.status != NO_CONTENT:
            headers["Content-Length"] = str(len(reply.body))
            headers["Content-Type"] = "application/json;charset=UTF-8"
        lines = [f"{name}: {value}\r\n" for name, value in (headers | reply.headers).items()]
        reason = reply.reason or responses.get(reply.status, "")
        return f"HTTP/1.1 {reply.status} {reason}\r\n{''.join(lines)}\r\n".encode()


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
FIGURES: Final = {"cpu": 0.245004192691072, "disk": 28216639488, "mem": 134217728, "uptime": 123}


def usual_config(vmid: int, name: str, **changes: object) -> dict[str, object]:
    """Return the configuration of an ordinary container."""
    config: dict[str, object] = {"arch": "amd64", "hostname": name, "memory": 1024, "swap": 512}
    return config | {"rootfs": f"local:{vmid}/vm-{vmid}-disk-0.raw,size=8G"} | changes


def first_number(value: object) -> float:
    number = re.search(r"\d+(\.\d+)?", str(value))
    return float(number[0]) if number else 0


@dataclass(slots=True)
class Guest:
    """A container or a VM, and its configuration file.

    One that was just created is "unknown"; of one that has `vanished` only the file is gone. What
    has `env` in it is shown to who may change it alone. `list_extra` overrides what the list says.
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

    def resource(self, node: str, is_stale: bool) -> dict[str, object]:
        """Return the guest's entry in /cluster/resources; a stale one is "unknown"."""
        status = "unknown" if is_stale else self.status
        entry: dict[str, object] = {"id": f"{self.type}/{self.vmid}", "node": node}
        entry |= {"status": status, "type": self.type, "vmid": self.vmid}
        entry |= {"lock": self.lock} if self.lock else {}
        entry |= {"tags": self.config["tags"]} if "tags" in self.config else {}
        if status != "unknown":
            entry |= FIGURES if status == "running" else dict.fromkeys(FIGURES, 0)
            memory = int(first_number(self.config.get("memory", 512)))
            # Where neither is set, a container has the node's cores.
            cores = first_number(self.config.get("cores", self.config.get("cpulimit"))) or 2
            # Of a container that runs, the size of the host's file system.
            entry |= {"maxcpu": cores, "maxdisk": 270553174016, "maxmem": memory << 20}
            entry |= {"name": self.name, "template": int(self.template)}
        return entry | self.list_extra

    def config_entry(self) -> dict[str, object]:
        name = {"name": self.name} if self.type == "qemu" else {}
        lock = {"lock": self.lock} if self.lock else {}
        return self.config | name | lock | ({"template": 1} if self.template else {})


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
    vmids = sorted(range(100, 100 + count), key=lambda vmid: vmid * 7919 % 10007)
    guests = [Guest(vmid, f"ct{vmid}", "running" if vmid % 3 else "stopped") for vmid in vmids]
    for guest in guests:
        guest.config = usual_config(guest.vmid, guest.name, cores=1 + guest.vmid % 4)
    return guests


VM_ONE: Final = """{
    "cores": 4, "cpulimit": "3", "memory": "4096", "sockets": 2, "scsihw": "virtio-scsi-single",
    "efidisk0": "local:200/vm-200-disk-0.qcow2,efitype=4m,size=4M",
    "ide2": "local:iso/debian.iso,media=cdrom,size=600M",
    "scsi0": "local:200/vm-200-disk-1.qcow2,iothread=1,size=32G",
    "scsi1": "local:200/vm-200-disk-2.qcow2,backup=0,size=100G",
    "unused0": "local:200/vm-200-disk-9.qcow2"
}"""


def default_vms() -> list[Guest]:
    """Return one VM of every kind, unsorted."""
    diskless = {"cores": 2, "ide2": "none,media=cdrom", "memory": "current=2048", "vcpus": 1}
    template: dict[str, object] = {"scsi0": "local:201/base-201-disk-0.qcow2,size=10G"}
    return [
        Guest(202, "diskless", "stopped", diskless, "qemu", lock="migrate"),
        Guest(200, "vm-one", "running", json.loads(VM_ONE), "qemu"),
        Guest(201, "template", "stopped", template, "qemu", template=True),
    ]


def many_vms(count: int) -> list[Guest]:
    """Return ordinary VMs, unsorted; their IDs lie beyond those of `many_guests`."""
    vms = []
    for vmid in reversed(range(50_000, 50_000 + count)):
        config: dict[str, object] = {"cores": 2, "memory": "2048"}
        config["scsi0"] = f"local:{vmid}/vm-{vmid}-disk-0.qcow2,size=32G"
        vms.append(Guest(vmid, f"vm{vmid}", config=config, type="qemu"))
    return vms


@dataclass(slots=True)
class Storage:
    name: str
    content: str = "backup"
    plugintype: str = "dir"
    status: str = "available"
    total_bytes: int = 4294967296
    used_bytes: int = 31494144
    backups: list[dict[str, object]] = field(default_factory=list)

    def resource(self, node: str, is_stale: bool) -> dict[str, object]:
        """Return the storage's entry in /cluster/resources."""
        status = "unknown" if is_stale else self.status
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
    ["my-vzdump-lxc-100-2026_11_23-02_00_03.tar.zst", 1795572194, "100", "unknown", "renamed"],
    ["vzdump-lxc-100-2026_11_22-02_00_03.tar.zst", 1795312803, 100, "lxc", "protected"],
    ["vzdump-lxc-100-2026_11_24-02_00_03.tar.zst", 1795485603, 100],
    ["vzdump-lxc-100-2026_11_23-02_00_03.tar.zst", 1795399203, 100],
    ["vzdump-lxc-100-before-upgrade.tar.zst", 1795572194, "100", "lxc", "protected"],
    ["vzdump-lxc-101-2026_11_21-02_00_40.tar.zst", 1795226440, 101],
    ["vzdump-openvz-106-2014_01_01-00_00_00.tar.gz", 1388534400, 106, "openvz"],
    ["vzdump-qemu-101-2026_11_22-02_00_40.vma.zst", 1795312840, 101, "qemu"],
    ["vzdump-qemu-200-2026_11_24-02_01_00.vma.zst", 1795485660, 200, "qemu"],
    ["vzdump-qemu-nixos.vma.zst", 1790000000, null, "qemu", "protected"]
]"""


def default_storages() -> list[Storage]:
    """Return one storage of every kind, unsorted; `bak` has every kind of backup."""
    bak = [backup(f"bak:backup/{name}", *rest) for name, *rest in json.loads(BACKUPS)]
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


def task(
    kind: str, guest: int | str, end: int, status: str = "OK", **changes: object
) -> dict[str, object]:
    """Return an entry of the task list."""
    entry: dict[str, object] = {"type": kind, "id": str(guest), "user": "root@pam", "node": "pve1"}
    return entry | {"starttime": end - 1, "endtime": end, "status": status} | changes


@dataclass(slots=True)
class OtherNode:
    """Another node of the cluster. Status None: the cluster does not know it, only its guests."""

    name: str
    status: str | None = "online"
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

NODE_STATUS: Final = """{
    "cpu": 0,
    "cpuinfo": {"cores": 2, "cpus": 2, "hvm": "", "mhz": "2596.122", "model": "AMD EPYC"},
    "current-kernel": {"machine": "x86_64", "release": "6.14.11-4-pve", "sysname": "Linux"},
    "kversion": "Linux 6.14.11-4-pve #1 SMP @0", "loadavg": ["2.54", "1.74", "1.20"],
    "memory": {"free": 22470807552, "total": 25276510208, "used": 1378762752},
    "pveversion": "pve-manager/9.2.11/14a22df35955d97d",
    "rootfs": {"avail": 80727584768, "total": 270553174016, "used": 28216709120},
    "swap": {"free": 0, "total": 0, "used": 0}, "uptime": 2574, "wait": 0.00235079639224717
}"""


class Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        self.reply = json_reply({"data": None, "message": reason + "\n"}, status, reason)


class SimulatedNode(Server):
    """One Proxmox VE node.

    `status` is the reply to /nodes/NAME/status, `resources` what Sys.Audit adds to the node's entry
    in /cluster/resources. That list is `resources_age_seconds` old; beyond 5 minutes whatever it
    says of this node is "unknown". `acl` is that of the token's user, `token_acl` that of a token
    with privilege separation, which has what both allow. `pools` maps the path of a member to its
    pool. In `tasks` the newest comes first.
    """

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
        self.tasks = [task("vzdump", 100, int(time.time()) - 7300)]
        self.other_nodes: list[OtherNode] = []
        self.acl: ACL = [AUDITOR]
        self.token_acl: ACL | None = None
        self.roles = dict(ROLES)
        self.pools: dict[str, str] = {}
        self.resources: dict[str, object] = {"cpu": 0.0167285119344523, "maxcpu": 2}
        self.resources["maxmem"] = 25276510208
        self.resources_age_seconds = 9
        self.status: dict[str, object] = json.loads(NODE_STATUS)

    def answer(self, request: Request) -> Reply:
        if request.headers.get("authorization") != self._authorization:
            return Reply(401, "Authentication failed!", None)
        try:
            return self._route(request)
        except Refused as exc:
            return exc.reply

    def usual_reply(self, path: str) -> Reply:
        """Return the answer to GET with the node's own token."""
        headers = {"authorization": self._authorization}
        return self.answer(Request("GET", self.base + path, headers, b"", connection=0))

    @property
    def _authorization(self) -> str:
        return f"PVEAPIToken={self.token_id}={self.token_secret}"

    def _route(self, request: Request) -> Reply:
        path, _, query = request.path.removeprefix(self.base).partition("?")
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        readable = request.method == "GET" and request.path.startswith(self.base)
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
            case ["nodes", self.name, "tasks"] if parameters.pop("source", "") == "archive":
                since, limit = int(parameters.pop("since", "0")), int(parameters.pop("limit", "50"))
                tasks = [task for task in self.tasks if int(str(task["starttime"])) >= since]
                data = tasks[:limit]
            case ["nodes", self.name, "storage", name, "prunebackups"]:
                self._require(f"/storage/{name}", "Datastore.Audit", "Datastore.AllocateSpace")
                holding = [each for each in self.storages if "backup" in each.content.split(",")]
                found = {storage.name: storage.backups for storage in holding}
                if name not in found:
                    raise Refused(500, f"storage '{name}' does not support backups")
                data = found[name]
                if parameters.get("prune-backups") == "keep-all=1":
                    del parameters["prune-backups"]
            case _:
                raise Refused(501, f"Method '{request.method} {path}' not implemented")
        if parameters:
            raise Refused(400, "Parameter verification failed.")
        reply = json_reply({"data": data})
        if path.endswith("/prunebackups"):
            # pveproxy passes on pvedaemon's header, then adds its own.
            headers = {"Connection": "close\r\nConnection: Keep-Alive"}
            return Reply(body=reply.body, headers=headers, close=True)
        return reply

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
        roles: dict[str, set[str]] = {"": set()}
        for place, role, propagates in acl:
            is_above = path.startswith(place.rstrip("/") + "/")
            if place == path or (is_above and propagates):
                roles.setdefault(place, set()).add(role)
        return roles[max(roles, key=len)]

    def _permissions_reply(self, path: str | None) -> dict[str, dict[str, int]]:
        paths = ["/", "/access", "/nodes", "/pool", "/storage", "/vms", *self.pools]
        paths += [place for place, _, _ in (*self.acl, *(self.token_acl or []))]
        paths = paths if path is None else [path]
        found = {each: dict.fromkeys(self.permissions(each), 1) for each in paths}
        return {each: privileges for each, privileges in found.items() if privileges or path}

    def _require(self, path: str, *any_of: str) -> None:
        if not self.permissions(path) & set(any_of):
            raise Refused(403, f"Permission check failed ({path}, {'|'.join(any_of)})")

    def _resources(self) -> list[dict[str, object]]:
        """Return the entries of /cluster/resources that the token may see."""
        # Values that pvestatd sent are shown for 5 minutes.
        status = "unknown" if self.resources_age_seconds > 300 else "online"
        own = OtherNode(self.name, status, [*self.guests, *self.vms], self.storages)
        entries: list[dict[str, object]] = [{"type": "network", "node": self.name, "status": "ok"}]
        for node in (own, *self.other_nodes):
            is_stale = node.status != "online"
            entries += [guest.resource(node.name, is_stale) for guest in node.guests]
            entries += [storage.resource(node.name, is_stale) for storage in node.storages]
            if node.status:
                entries.append(self._node_entry(node.name, node.status))
        return [entry for entry in entries if self._is_shown(entry)]

    def _is_shown(self, entry: dict[str, object]) -> bool:
        match entry["type"]:
            case "node" | "network":
                return True
            case "storage":
                return "Datastore.Audit" in self.permissions(f"/storage/{entry['storage']}")
        return "VM.Audit" in self.permissions(f"/vms/{entry['vmid']}")

    def _node_entry(self, name: str, status: str) -> dict[str, object]:
        entry: dict[str, object] = {"id": f"node/{name}", "node": name}
        entry |= {"status": status, "type": "node"}
        if status != "online" or "Sys.Audit" not in self.permissions(f"/nodes/{name}"):
            return entry
        if name != self.name:
            return entry | self.resources | {"cpu": 0.75, "uptime": 86400}
        if isinstance(uptime := self.status.get("uptime"), int):
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
        raise Refused(500, f"Configuration file '{path}' does not exist")


# --- the hub --------------------------------------------------------------------------------------

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
    strict = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        jsonschema.Draft202012Validator, type_checker=jsonschema.Draft4Validator.TYPE_CHECKER
    )
    # In a booted Debian the folder stands beside this file.
    docs = next(found for folder in Path(__file__).parents for found in folder.glob("docs"))
    text = (docs / "host-report.schema.json").read_text("utf-8")
    text = text.replace('"additionalProperties": false', '"additionalProperties": true')
    validator: jsonschema.protocols.Validator = strict(json.loads(text))
    return validator


class SimulatedHub(Server):
    """Keeps the `reports` it takes, and why it `rejected` others; `envelope` is its reply."""

    def __init__(
        self,
        certificates: Certificates | None,
        *,
        api_key: str = "lab-hub-key",
        log: Callable[[str], object] = str,
    ) -> None:
        super().__init__(certificates)
        self.api_key = api_key
        self.envelope: dict[str, object] = {"poll_interval_seconds": 900, "blocked": False}
        self.envelope |= {"desired_generation": 0, "has_signed_ops": False}
        self.reports: list[dict[str, object]] = []
        self.rejected: list[str] = []
        self._log = log

    @property
    def url(self) -> str:
        return super().url + self.base

    def wait_for_reports(self, count: int, timeout_seconds: float) -> None:
        """Return once so many reports have been accepted in all. Raises TimeoutError."""
        self._wait_for(self.reports, count, timeout_seconds)

    def answer(self, request: Request) -> Reply:
        status, problem = self._judge(request)
        self._log(f"{request.method} {request.path}: {status} {problem}")
        if status == 200:
            return json_reply(self.envelope)
        self.rejected.append(f"{status} {problem}")
        return json_reply({"error": problem}, status)

    def _judge(self, request: Request) -> tuple[int, str]:
        """Keep a report that the contract allows. Return the status and what is wrong."""
        if (request.method, request.path) != ("POST", f"{self.base}/api/v1/host-report"):
            return 404, "no such path"
        if request.headers.get("authorization") != f"Bearer {self.api_key}":
            return 401, "wrong or no key"
        try:
            report = json.loads(request.body, parse_constant=refuse_constant)
        except ValueError as exc:
            return 400, f"not JSON: {exc}"
        errors = report_schema().iter_errors(report)
        if problems := [f"{error.json_path}: {error.message}" for error in errors]:
            return 422, "; ".join(problems)
        for collection, keys in SORT_KEYS.items():
            places = [tuple(entry[key] for key in keys) for entry in report[collection]]
            if places != sorted(set(places)):
                return 422, f"$.{collection}: not sorted by {' and '.join(keys)}, or one twice"
        with self._changed:
            self.reports.append(report)
            self._changed.notify_all()
        return 200, ""


# --- command line ---------------------------------------------------------------------------------


def configuration(node: SimulatedNode, hub: SimulatedHub) -> dict[str, dict[str, object]]:
    """Return the configuration with which the agent reaches both."""
    proxmox: dict[str, object] = {"url": node.url, "node": node.name, "token_id": node.token_id}
    proxmox["token_secret"] = node.token_secret
    to_hub: dict[str, object] = {"url": hub.url, "host_id": node.name, "api_key": hub.api_key}
    for section, certificates in ((proxmox, node.certificates), (to_hub, hub.certificates)):
        if certificates:
            section["ca_file"] = str(certificates.ca_file)
    return {"proxmox": proxmox, "hub": to_hub}


def environment(node: SimulatedNode, hub: SimulatedHub) -> dict[str, str]:
    """Return the same as FELHOM_AGENT_* variables."""
    return {
        f"FELHOM_AGENT_{section}_{key}".upper(): str(value)
        for section, keys in configuration(node, hub).items()
        for key, value in keys.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="lab", description="A simulated Proxmox VE node and a hub on loopback, until Ctrl-C."
    )
    parser.add_argument("--guests", type=int, metavar="N", help="N ordinary containers, no VMs")
    arguments = parser.parse_args()
    guests = None if arguments.guests is None else many_guests(arguments.guests)
    log = functools.partial(print, file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    temporary = tempfile.TemporaryDirectory(prefix="felhom-lab-")
    with contextlib.suppress(KeyboardInterrupt), temporary as name:
        node = SimulatedNode(make_certificates(Path(name)), guests=guests)
        hub = SimulatedHub(make_certificates(Path(name, "hub")), log=log)
        with node, hub:
            variables = environment(node, hub).items()
            exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables)
            print(exports, end="", flush=True)
            signal.pause()


if __name__ == "__main__":
    main()
