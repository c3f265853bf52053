"""What can go wrong with a server, as data, the servers that do it, and one walk through all of it.

`PYTHONPATH=. python tests/faults.py` says how many faults there are, and at how many places.
"""

from __future__ import annotations

import functools
import gzip
import json
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import felhom_agent as agent
import lab

# Where an answer can go wrong, and the path that is asked for there.
PLACES: Final[Mapping[str, str]] = {
    "version": "/version",
    "permissions": "/access/permissions",
    "nodes": "/nodes",
    "status": "/nodes/pve1/status",
    "list": "/nodes/pve1/lxc",
    "configuration": "/nodes/pve1/lxc/100/config",
    "hub": "/api/v1/host-report",
}
STATUSES: Final = range(200, 600)  # each is answered at each place, with a body and without

# Characters that JSON, a URL and a shell write differently.
TOKEN_SECRET: Final = "t0k3n\"\\%$`&<>+/='~secret"
API_KEY: Final = "k3y'\"\\%$`&<>+/=~hub"
TIMEOUT_SECONDS: Final[Any] = 0.8  # the configuration takes whole seconds, a client any
PATIENCE_SECONDS: Final = 5.0  # then a fault ends in any case, so that a client without a deadline is late and not for ever

# --- the faults ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What a scripted socket does: it sends `say` (bytes, or what becomes of the right body), then `again` without end, then the `ending`.

    `level`: in the answer to a request on a fresh connection, on one "kept" from before, in place of the TLS handshake ("connection"), or
    of the connection ("port"). A kept connection that is gone is replaced, so nobody notices. `status` is that of the HTTPError in which
    it has to end, 0 stands for a TransportError. At the places in `used` the answer does for a right one, or, where it `alters` figures,
    is a right one with other figures.
    """

    name: str
    say: bytes | Callable[[bytes], bytes] = b""
    ending: Literal["close", "cut", "reset", "silence"] = "cut"
    again: bytes = b""
    every_seconds: float = 0.0
    level: Literal["answer", "kept", "connection", "port"] = "answer"
    status: int = 0
    used: frozenset[str] = frozenset()
    alters: bool = False


OK: Final = b"HTTP/1.1 200 OK\r\n"
CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SERVER_HELLO: Final = b"\x16\x03\x03\x00\x7a\x02\x00"  # its first bytes
HELLO_REQUEST: Final = b"\x16\x03\x03\x00\x04\x00\x00\x00\x00"  # which a client passes over while it shakes hands
EVERYWHERE: Final = frozenset(PLACES)
HUB: Final = frozenset({"hub"})
UNLISTED: Final = EVERYWHERE - {"list"}  # a guest without a vmid is an error there, and a figure not known elsewhere
SCALARS: Final = (str, int, float, bool, type(None))
HUGE: Final = 10**400  # no float holds it
ENDINGS: Final[tuple[tuple[str, Literal["cut", "close", "reset"]], ...]] = (("cut", "cut"), ("closed", "close"), ("reset", "reset"))


def reply(body: bytes, *headers: str, status: str = "200 OK", length: object = None) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, f"Content-Length: {length or len(body)}", "", "")).encode() + body


def headed(*headers: str, start: str = "HTTP/1.1 200 OK") -> Callable[[bytes], bytes]:
    """The right body under these headers."""
    return lambda right: "\r\n".join((start, *headers, "", "")).encode("latin-1") + right


def bodied(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda right: reply(change(right))


def every(kinds: tuple[type, ...], stand_in: object) -> Callable[[bytes], bytes]:
    """The right body with each value of these types replaced."""

    def change(value: object) -> object:
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [change(inner) for inner in value]
        return stand_in if isinstance(value, kinds) else value

    return lambda right: reply(json.dumps(change(json.loads(right))).encode(), length="@LENGTH@")


def chunks(right: bytes) -> bytes:
    return b"3\r\n%s\r\n%x;extension=1\r\n%s\r\n" % (right[:3], len(right) - 3, right[3:])


# The first are walked over TLS; for the others it makes no difference, so they are walked over plain HTTP, which takes a third of the time.
# In the answers AUTHORIZATION, JSON, UNICODE, URL and BASE64 between at signs stand for what the request said and its other forms,
# SELF for the address that was asked for, SINK for one to which nobody may come, LENGTH for the number of bytes in the body.
BROKEN_CONNECTIONS: Final = (
    Fault("refused", level="port", ending="reset"),
    Fault("no answer to connect", level="port", ending="silence"),
    Fault("accepts and is silent", level="connection", ending="silence"),
    Fault("accepts and resets", level="connection", ending="reset"),
    Fault("TLS handshake stalls", SERVER_HELLO, "silence", level="connection"),
    Fault("TLS handshake drips", SERVER_HELLO, "silence", b"\0", 0.05, level="connection"),
    Fault("TLS handshake floods", level="connection", again=HELLO_REQUEST * 7281),
    Fault("TLS handshake is cut", SERVER_HELLO, level="connection"),
    Fault("TLS alert", b"\x15\x03\x03\x00\x02\x02\x28", level="connection"),
    Fault("plain HTTP", reply(b"speak TLS", status="400 Bad Request"), level="connection"),
    Fault("another protocol", b"SSH-2.0-OpenSSH_9.2\r\n", level="connection"),
    # where it ends
    *(
        Fault(f"{word} {where}", said, ending)
        for word, ending in ENDINGS
        for where, said in (
            ("before the status line", b""),
            ("inside the status line", OK[:7]),
            ("after the status line", OK),
            ("inside the headers", OK + b"Content-Le"),
            ("after the headers", OK + b"Content-Length: 9\r\n\r\n"),
            ("inside the body", OK + b'Content-Length: 9\r\n\r\n{"data'),
        )
    ),
    *(
        Fault(f"silent {where}", said, "silence")
        for where, said in (
            ("inside the status line", OK[:7]),
            ("inside the headers", OK),
            ("inside the body", OK + b"Content-Length: 9\r\n\r\n{"),
        )
    ),
    *(Fault(f"kept connection is {word}", ending=ending, level="kept") for word, ending in ENDINGS),
    Fault("status line drips", OK, "silence", b" OK", 0.05),
    Fault("headers drip", OK + b"Server: ", "silence", b"x", 0.05),
    Fault("body drips", OK + b"Content-Length: 999\r\n\r\n", "silence", b" ", 0.05),
    # length
    Fault("Content-Length too long", lambda right: reply(right, length=len(right) + 3)),
    Fault("Content-Length too long, then silence", lambda right: reply(right, length=len(right) + 3), "silence"),
    Fault("Content-Length too short", lambda right: reply(right, length=len(right) - 3)),
    Fault("Content-Length negative", headed("Content-Length: -1")),
    Fault("Content-Length with a sign", headed("Content-Length: +@LENGTH@")),
    Fault("Content-Length no number", headed("Content-Length: 0x10")),
    Fault("Content-Length of 5,000 digits", headed(f"Content-Length: {'9' * 5000}")),
    Fault("Content-Length twice, different", headed("Content-Length: @LENGTH@", "Content-Length: 1")),
    Fault("Content-Length twice, the same", headed("Content-Length: @LENGTH@", "Content-Length: @LENGTH@"), "close", used=EVERYWHERE),
    Fault("no Content-Length", headed(), "close", used=EVERYWHERE),
    Fault("no Content-Length, cut", headed()),
    Fault("100 MiB announced", headed(f"Content-Length: {100 << 20}"), again=b" " * 65536),
    Fault("100 MiB sent", OK + b"\r\n", again=b" " * 65536),
    Fault("body without end", OK + b'\r\n{"data":[', again=b"1," * 32768),
    # chunks
    Fault("chunked", lambda right: CHUNKED + chunks(right) + b"0\r\nTrailer: x\r\n\r\n", "close", used=EVERYWHERE),
    Fault("many answers at once", lambda right: reply(right) + 2000 * reply(b'{"data":"another"}'), "close", used=EVERYWHERE),
    Fault("chunked without a last chunk", lambda right: CHUNKED + chunks(right)),
    Fault("chunk cut", lambda right: CHUNKED + chunks(right)[:-9]),
    Fault("chunk size is no number", lambda right: CHUNKED + b"zz\r\n" + right),
    Fault("chunk size is negative", lambda right: CHUNKED + b"-5\r\n" + right),
    Fault("chunk size is -1", CHUNKED + b"-1\r\n", again=b" " * 65536),
    Fault("chunk size is 16 EiB", CHUNKED + b"ffffffffffffffff\r\n", again=b" " * 65536),
    Fault("chunk size without end", CHUNKED, again=b"0" * 65536),
    Fault("chunks without end", CHUNKED, again=b"1000\r\n" + b" " * 4096 + b"\r\n"),
    Fault("small chunks without end", CHUNKED, again=b"1\r\n \r\n" * 8192),
    Fault("trailers without end", lambda right: CHUNKED + chunks(right) + b"0\r\n", again=b"Trailer: x\r\n" * 4096),
    Fault("coded and chunked", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "close"),
    Fault("chunked twice", lambda right: OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunks(right) + b"0\r\n\r\n"),
    # headers
    Fault("headers without end", OK, again=b"X-Flood: flood\r\n" * 4096),
    Fault("101 header lines", headed(*(f"X-{number}: x" for number in range(100)), "Content-Length: @LENGTH@")),
    Fault("header of 1 MiB", headed(f"X-Long: {'x' * (1 << 20)}", "Content-Length: @LENGTH@")),
    Fault("header line without end", OK + b"X-Long: ", again=b"x" * 65536),
    Fault("header without a colon", headed("nonsense", "Content-Length: @LENGTH@"), "close", used=EVERYWHERE),
    Fault("binary header", headed("X: \x00\x1b\xff", "Content-Length: @LENGTH@"), "close", used=EVERYWHERE),
    Fault("status line of 1 MiB", headed("Content-Length: @LENGTH@", start=f"HTTP/1.1 200 {'x' * (1 << 20)}")),
    Fault("answer before the answer", lambda right: b"HTTP/1.1 103 Early Hints\r\n\r\n" * 9 + reply(right), "close", used=EVERYWHERE),
    Fault("1xx without end", again=b"HTTP/1.1 100 Continue\r\n\r\n" * 1024),
    Fault("switches protocols", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n\0\0\x12\x04\0\0\0\0\0"),
)
WRONG_ANSWERS: Final = (
    *(
        Fault(f"status line {line[:16]!r}", headed("Content-Length: @LENGTH@", start=line), "close", used=EVERYWHERE)
        for line in ("HTTP/1.1 200", "HTTP/1.0 200 OK", "HTTP/1.1 299 Odd")
    ),
    *(
        Fault(f"status line {line[:16]!r}", headed("Content-Length: @LENGTH@", start=line))
        for line in ("", "HTTP/1.1", "HTTP/1.1 OK", "HTTP/1.1 -200 OK", "HTTP/1.1 99 Odd", "HTTP/1.1 1000 Odd", "ICY 200 OK", "\0" * 99)
    ),
    *(
        Fault(f"status {status}", reply(b"{}", status=f"{status} Odd"), status=status)
        for status in (304, 401, 403, 404, 500, 595, 600, 999)
    ),
    *(
        Fault(f"status {status} and Retry-After: {value[:9]}", reply(b"", f"Retry-After: {value}", status=f"{status} Later"), status=status)
        for status in (429, 503)
        for value in ("1", "-1", "9" * 5000, "Thu, 01 Jan 2099 00:00:00 GMT", "Thu, 99 Jan")
    ),
    Fault("forged lines in a reason phrase", reply(b"", status="500 a\rb\x1b[31mc\x85d\u2028e\u202ef<0>g" + "h" * 60000), status=500),
    # redirects
    *(
        Fault(f"{status} to {target[:17]}", reply(b"", f"Location: {target}", status=f"{status} Elsewhere"), status=status)
        for status in (301, 302, 303, 307, 308)
        for target in ("@SELF@", "https://@SINK@/", "http://@SINK@/", "file:///etc/passwd")
    ),
    # coding
    Fault("gzip", bodied(gzip.compress)),
    Fault("gzip, announced", lambda right: reply(gzip.compress(right), "Content-Encoding: gzip")),
    Fault("gzip bomb", reply(gzip.compress(bytes(100 << 20)), "Content-Encoding: gzip")),
    Fault("Content-Type text/html", headed("Content-Type: text/html", "Content-Length: @LENGTH@"), "close", used=EVERYWHERE),
    Fault(
        "Content-Type in UTF-16",
        headed("Content-Type: application/json;charset=UTF-16", "Content-Length: @LENGTH@"),
        "close",
        used=EVERYWHERE,
    ),
    Fault("two answers at once", lambda right: reply(right) + reply(b'{"data":"second"}'), "close", used=EVERYWHERE),
    # body
    Fault("empty", reply(b""), used=HUB),
    Fault("blank", reply(b" \r\n"), used=HUB),
    *(
        Fault(name, reply(body.encode("utf-8")))
        for name, body in (
            ("HTML", "<!DOCTYPE html><title>Login</title>"),
            ("null", "null"),
            ("an array", "[]"),
            ("a string", '"data"'),
            ("true", "true"),
            ("100,000 brackets", "[" * 100_000),
            ("100,000 objects", '{"data":' * 100_000),
            ("a 10,000-digit number", f'{{"data":{"9" * 10_000}}}'),
            ("NaN", '{"data":NaN}'),
            ("Infinity", '{"data":-Infinity}'),
            ("two documents", "{}{}"),
        )
    ),
    Fault("truncated JSON", bodied(lambda right: right[:-1])),
    Fault("invalid UTF-8", bodied(lambda right: right[:-1] + b',"x":"\xff"}')),
    Fault("byte-order mark", bodied(lambda right: b"\xef\xbb\xbf" + right)),
    Fault("UTF-16", bodied(lambda right: right.decode().encode("utf-16"))),
    Fault("duplicate keys", bodied(lambda right: b'{"data":1,"blocked":1,' + right[1:]), "close", used=EVERYWHERE),
    Fault("half a surrogate pair", bodied(lambda right: right[:-1] + b',"x":"\\ud800"}'), "close", used=EVERYWHERE),
    Fault("no data", reply(b"{}"), used=HUB),
    Fault("data is null", reply(b'{"data":null}'), used=frozenset({"version", "hub"})),
    Fault("data is an object", reply(b'{"data":{}}'), used=EVERYWHERE - {"nodes", "list"}, alters=True),
    Fault("data is an array", reply(b'{"data":[]}'), used=frozenset({"version", "nodes", "list", "hub"}), alters=True),
    Fault("data is an array of arrays", reply(b'{"data":[[],[]]}'), used=frozenset({"version", "hub"})),
    Fault("data is a text", reply(b'{"data":"text"}'), used=frozenset({"version", "hub"})),
    *(
        Fault(f"every value is {name}", every(SCALARS, value), used=UNLISTED, alters=True)
        for name, value in (
            ("null", None),
            ("true", True),
            ("a text", "text"),
            ("an array", []),
            ("an object", {}),
            ("-1", -1),
            ("1e308", 1e308),
            ("0.5", 0.5),
            ("a 401-digit number", HUGE),
            ("a long text", "x" * 100_000),
            ("half a surrogate pair", "\ud800"),
        )
    ),
    # what was sent comes back
    *(
        Fault(f"echo in a reason phrase as {form}", reply(b"", status=f"403 No right for @{form}@"), status=403)
        for form in ("AUTHORIZATION", "URL", "BASE64", "JSON")
    ),
    *(Fault(f"echo in the status line as {form}", f"@{form}@\r\n\r\n".encode()) for form in ("AUTHORIZATION", "BASE64")),
    Fault("echo in Content-Length", headed("Content-Length: @AUTHORIZATION@")),
    Fault("echo in Retry-After", reply(b"", "Retry-After: @AUTHORIZATION@", status="503 Later"), status=503),
    Fault("echo in Location", reply(b"", "Location: http://@SINK@/?@URL@", status="302 Elsewhere"), status=302),
    Fault("echo in a chunk size", CHUNKED + b"@AUTHORIZATION@\r\n"),
    Fault("echo in the body", reply(b"@AUTHORIZATION@", length="@LENGTH@")),
    *(
        Fault(f"echo in every text as {form}", every((str,), f"@{form}@"), used=EVERYWHERE, alters=True)
        for form in ("JSON", "UNICODE", "URL", "BASE64")
    ),
    *(Fault(f"echo in every value as {form}", every(SCALARS, f"@{form}@"), used=UNLISTED, alters=True) for form in ("JSON", "UNICODE")),
)
FAULTS: Final = (*BROKEN_CONNECTIONS, *WRONG_ANSWERS)
COUNT: Final = len(FAULTS) * len(PLACES) + 2 * len(STATUSES) * len(PLACES)

# --- the servers that do it ---------------------------------------------------------------------------------------------------------


def as_sent(text: str) -> Mapping[str, str]:
    """The forms in which a server may send back what it was told."""
    secret = text.rpartition("agent=")[2].removeprefix("Bearer ")
    return {
        "@AUTHORIZATION@": text,
        "@JSON@": json.dumps(text)[1:-1],
        "@UNICODE@": "".join(f"\\u{ord(character):04x}" for character in text),
        "@URL@": quote(secret, ""),
        "@BASE64@": b64encode(secret.encode()).decode(),
    }


class Breakable(lab.Server):
    """A server of the lab that, once armed, does one thing wrong at one place, once; `struck` tells that it has."""

    sink = ""
    struck = False
    reused = False  # it struck on a connection that had been used before
    _fault: Fault | None = None
    _connecting = False
    _queued: Sequence[socket.socket] = ()

    def arm(self, fault: Fault, place: str) -> None:
        before = ("", *order())
        self._path = PLACES[place]
        self._before = PLACES.get(before[before.index(place) - 1], "") if place in before else ""
        self._fault = fault
        self.struck = self.reused = False
        self._connecting = not self._before and fault.level in ("connection", "port")
        if self._connecting and fault.level == "port":
            self._break_port(fault)

    def mend(self, fault: Fault) -> None:
        """Do nothing wrong any more."""
        self._fault = None
        if fault.level == "port":
            with self._hold_port():
                self.__exit__()
                self.__enter__()

    def _hold_port(self) -> socket.socket:
        """Nobody else may take the port while it changes hands: the walks around this one open many."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", self.port))
        return sock

    def _break_port(self, fault: Fault) -> None:
        """Nobody listens any more, or nobody takes what comes: then the kernel answers no further connection."""
        self._fault, self.struck = None, True
        held = self._hold_port()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._listener = held
        if fault.ending == "silence":
            self._listener.listen(0)
            self._queued = [socket.socket() for _ in range(3)]
            for queued in self._queued:
                queued.setblocking(False)
                queued.connect_ex(("127.0.0.1", self.port))

    def __exit__(self, *exc: object) -> None:
        for queued in self._queued:
            queued.close()
        self._queued = ()
        self._listener.listen()  # the one of a broken port may not
        super().__exit__(*exc)

    def _serve(self, connection: socket.socket, number: int) -> None:
        fault = self._fault
        if fault is None or not self._connecting:
            super()._serve(connection, number)
            return
        self._fault, self.struck = None, True
        with connection, suppress(OSError):
            connection.settimeout(PATIENCE_SECONDS)
            connection.recv(65536)  # the ClientHello
            self._act(connection, fault, {}, b"")

    def _exchange(self, connection: socket.socket, request: lab.Request, *, last: bool) -> bool:
        fault = self._fault
        path = request.path.removeprefix(self.base).partition("?")[0]
        if fault is None or path not in (self._path, self._before):
            return super()._exchange(connection, request, last=last)
        if path == self._before:
            self._connecting = fault.level == "connection"
            if fault.level == "port":
                self._break_port(fault)
            return super()._exchange(connection, request, last=fault.level != "kept")
        self._fault, self.struck = None, True
        self.reused = any(earlier.connection == request.connection for earlier in self.requests)
        self.requests.append(request)
        right = self.answer(request).body or b""
        stands_for = {"@SELF@": self.url + request.path, "@SINK@": self.sink, **as_sent(request.headers["authorization"])}
        return self._act(connection, fault, stands_for, right)

    def _act(self, connection: socket.socket, fault: Fault, stands_for: Mapping[str, str], right: bytes) -> bool:
        data = fault.say if isinstance(fault.say, bytes) else fault.say(right)
        for name, text in stands_for.items():
            data = data.replace(name.encode(), text.encode())
        data = data.replace(b"@LENGTH@", b"%d" % len(data.partition(b"\r\n\r\n")[2]))
        ends = time.monotonic() + PATIENCE_SECONDS
        if fault.every_seconds:
            data, more = data + fault.again * 999, b""
            for position in range(len(data)):
                connection.sendall(data[position : position + 1])
                if time.monotonic() > ends or select.select([connection], [], [], fault.every_seconds)[0]:
                    return False
        else:
            more = fault.again
            connection.sendall(data)
        while more and time.monotonic() < ends:
            connection.sendall(more)
        if fault.ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault.ending == "silence":
            select.select([connection], [], [], PATIENCE_SECONDS)
        if fault.ending in ("reset", "cut"):
            raise ConnectionAbortedError
        return False


class BreakableNode(Breakable, lab.SimulatedNode):
    """A node with guests 100 and 101."""

    def __init__(self, certificates: lab.Certificates | None) -> None:
        token = f"felhom-agent@pve!agent={TOKEN_SECRET}"
        super().__init__(certificates, guests=lab.many_guests(2), token=token)


class BreakableHub(Breakable, lab.SimulatedHub):
    """A hub without a wish for an interval of its own."""

    def __init__(self, certificates: lab.Certificates | None) -> None:
        super().__init__(certificates, api_key=API_KEY)


# --- one walk -----------------------------------------------------------------------------------------------------------------------


class Active:
    """A prober that always can tell."""

    def probe(self) -> str:
        return "active"


class Lines(logging.Handler):
    """Keeps what is logged, as it is before the agent's own formatter redacts and escapes it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.exc_info and record.exc_info[1]:
            self.lines += traceback.format_exception(record.exc_info[1])


@dataclass(slots=True)
class Agent:
    """The agent's own parts, with the two servers that it talks to."""

    node: BreakableNode
    hub: BreakableHub
    proxmox: agent.ProxmoxClient
    client: agent.HubClient
    collector: agent.Collector
    logger: logging.Logger
    loop: agent.Loop
    log: Lines

    def cycle(self, place: str = "") -> Exception | None:
        if place == "version":  # only the self-test asks for it
            try:
                self.proxmox.version()
            except agent.AgentError as exc:
                return exc
        return self.loop.cycle()[0]

    @property
    def report(self) -> dict[str, object]:
        """The last one that the hub took, without its time."""
        return {key: value for key, value in self.hub.reports[-1].items() if key != "reported_at"}


@contextmanager
def running(certificates: lab.Certificates | None, hub_certificates: lab.Certificates | None) -> Iterator[Agent]:
    """The agent between a node and a hub that can be broken."""
    log = Lines()
    logger = logging.Logger("walk", logging.DEBUG)  # noqa: LOG001  # one for each thread, which ends with it
    logger.addHandler(log)
    with BreakableNode(certificates) as node, BreakableHub(hub_certificates) as hub:
        sections = lab.configuration(node, hub)
        ca_files = [str(section.get("ca_file", "")) for section in sections.values()]
        proxmox = agent.ProxmoxClient(
            agent.ProxmoxConfig(
                url=node.url,
                node=node.name,
                token_id=node.token_id,
                token_secret=TOKEN_SECRET,
                ca_file=ca_files[0],
                timeout_seconds=TIMEOUT_SECONDS,
            )
        )
        to_hub = agent.HubConfig(url=hub.url, host_id="pve1", api_key=API_KEY, ca_file=ca_files[1], timeout_seconds=TIMEOUT_SECONDS)
        collector = agent.Collector(proxmox, Active(), host_id="pve1", agent_version="0.3.0", logger=logger)
        client = agent.HubClient(to_hub, logger=logger)
        loop = agent.Loop(collector, client, 900, logger=logger)
        yield Agent(node, hub, proxmox, client, collector, logger, loop, log)


@functools.cache
def order() -> tuple[str, ...]:
    """The places in the order in which a cycle comes to them."""
    with running(None, None) as parts:
        parts.cycle()
        paths = [request.path.removeprefix(parts.node.base).partition("?")[0] for request in parts.node.requests]
    return tuple(sorted((place for place, path in PLACES.items() if path in paths), key=lambda place: paths.index(PLACES[place])))


@dataclass(slots=True, kw_only=True)
class Visit:
    """What came of one fault at one place, and of the next cycle, in which nothing is wrong."""

    place: str
    struck: bool
    reused: bool
    seconds: float
    error: Exception | None
    report: dict[str, object]
    next_error: Exception | None
    next_report: dict[str, object]
    logged: list[str]
    said: list[str]  # what was logged, and the error in each form
    to_node: str
    to_hub: str


@dataclass(slots=True, kw_only=True)
class Walk:
    """One fault at every place; `strays` is what came to a server that nobody may come to, `left` what did not end."""

    visits: list[Visit]
    strays: int
    left: set[str]


def resources() -> set[str]:
    """The threads and descriptors of this process."""
    return {*(thread.name for thread in threading.enumerate()), *os.listdir("/proc/self/fd")}


def visit(fault: Fault, place: str, sink: str, certificates: lab.Certificates, hub_certificates: lab.Certificates) -> Visit:
    encrypted = fault in BROKEN_CONNECTIONS
    chosen = [None if place == "hub" else certificates, hub_certificates if place == "hub" else None] if encrypted else [None, None]
    with running(*chosen) as parts:
        broken: Breakable = parts.hub if place == "hub" else parts.node
        broken.sink = sink
        broken.arm(fault, place)
        began = time.monotonic()
        error = parts.cycle(place)
        seconds = time.monotonic() - began
        report = parts.report if parts.hub.reports else {}
        broken.mend(fault)
        next_error = parts.cycle(place)
        said = [*parts.log.lines, repr(parts.proxmox), repr(parts.client), repr(parts.loop)]
        if error is not None:
            said += [str(error), repr(error), repr(error.args), repr(vars(error)), *traceback.format_exception(error)]
        return Visit(
            place=place,
            struck=broken.struck,
            reused=broken.reused,
            seconds=seconds,
            error=error,
            report=report,
            next_error=next_error,
            next_report=parts.report,
            logged=parts.log.lines,
            said=said,
            to_node=repr(parts.node.requests),
            to_hub=repr(parts.hub.requests),
        )


SILENT: Final = tuple(fault for fault in FAULTS if fault.ending == "silence")


@functools.cache
def walk_together(
    group: tuple[Fault, ...], certificates: lab.Certificates, hub_certificates: lab.Certificates, places: tuple[str, ...]
) -> dict[Fault, Walk]:
    order()
    before = resources()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sink = f"127.0.0.1:{listener.getsockname()[1]}"
        with ThreadPoolExecutor(6 * len(places)) as pool:
            pending = {
                fault: [pool.submit(visit, fault, place, sink, certificates, hub_certificates) for place in places] for fault in group
            }
            visits = {fault: [each.result() for each in futures] for fault, futures in pending.items()}
        strays = len(select.select([listener], [], [], 0)[0])
    left = resources() - before
    return {fault: Walk(visits=visits[fault], strays=strays, left=left) for fault in group}


def walk(fault: Fault, certificates: lab.Certificates, hub_certificates: lab.Certificates, places: tuple[str, ...] = tuple(PLACES)) -> Walk:
    """Meet the fault at all places at once, and those together that take their time. One walk serves all tests that look at it."""
    group = SILENT if fault.ending == "silence" else (fault,)
    return walk_together(group, certificates, hub_certificates, places)[fault]


# --- the daemon ---------------------------------------------------------------------------------------------------------------------

# The command line as it is, but for the wait, which says so and ends when there is a line on standard input.
STEPPED: Final = """
import functools, sys
import felhom_agent as agent
agent.Loop = functools.partial(agent.Loop, wait=lambda seconds: print("waits", flush=True) or sys.stdin.readline())
sys.exit(agent.main(sys.argv[1:]))
"""


class Daemon:
    """The agent as a process of its own, whose next cycle comes when the test says so; a context manager."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        *,
        systemctl: str = "echo active",
        stderr: int | None = None,
        shell: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        commands = folder / "commands"
        commands.mkdir()
        (commands / "systemctl").write_text(f"#!/bin/sh\n{systemctl}\n", "utf-8")
        (commands / "systemctl").chmod(0o755)
        self.log = folder / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.setblocking(False)
        self.told: list[str] = []  # by it to systemd
        variables = {
            "HOME": str(folder),
            "NOTIFY_SOCKET": str(folder / "notify"),
            "PATH": f"{commands}:/usr/bin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(Path(agent.__file__).parent),
            "TMPDIR": str(folder),
            "WATCHDOG_USEC": "1",
            **(environment or {}),
        }
        command = [sys.executable, "-c", STEPPED, "--config", str(config), "--log-level=debug"]
        if shell:
            command = ["/bin/sh", "-c", shell, "sh", *command]
        pipe = subprocess.PIPE
        with self.log.open("wb") as log:
            error = log if stderr is None else stderr
            self.process = subprocess.Popen(command, env=variables, cwd=folder, stdin=pipe, stdout=pipe, stderr=error, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with self.process, self._notify:
            self.process.terminate()

    def await_cycle(self) -> str:
        """What systemd was told last when the cycle that is under way has ended, "" for nothing."""
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], 10)[0], "the cycle does not end"
        assert self.process.stdout.readline() == "waits\n"
        told = len(self.told)
        with suppress(BlockingIOError):
            while True:
                self.told.append(self._notify.recv(65536).decode())
        return "".join(self.told[told:][-1:]).partition("STATUS=")[2]

    def step(self) -> str:
        """The same after one more cycle."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.await_cycle()


def main() -> None:
    print(f"{COUNT} combinations: {len(FAULTS)} faults and {2 * len(STATUSES)} statuses, each at {len(PLACES)} places")


if __name__ == "__main__":
    main()
