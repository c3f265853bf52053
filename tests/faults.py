"""Wrong responses as a table, and a search for secrets."""

from __future__ import annotations

import gzip
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import lab

# The requests without which there is no report; only the self-test asks for the version.
ESSENTIAL: Final[Mapping[str, str]] = {
    "version": "/version",
    "resources": "/cluster/resources",
    "status": "/nodes/pve1/status",
    "hub": "/api/v1/host-report",
}
# All requests of a cycle
PLACES: Final[Mapping[str, str]] = {
    **ESSENTIAL,
    "permissions": "/access/permissions?path=/vms/999999999",
    "configuration": "/nodes/pve1/lxc/100/config?current=1",
}
TOKEN_SECRET: Final = "7c0d5a1e-9b3f-4e82-a6d4-f1c2b3a49587"
API_KEY: Final = "Zk9+hub/key~4f8=41&x"
SECRETS: Final = (TOKEN_SECRET, API_KEY)

# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What a server sends instead of its response, and how it ends the connection.

    In `data`, @BODY@ stands for the right body, @LENGTH@ and @HEX@ for its length, @MORE@ for one
    byte more, @SECRET@ for the secret that the client sent, @FLOOD@ for more than any client
    reads.  The request fails with a TransportError, or with an HTTPError if there is a `status`;
    its message has `problem`, a pattern, behind the operation.
    """

    name: str
    data: bytes
    ending: Literal["close", "reset", "silence"] = "close"
    status: int = 0
    problem: str = ""

    def answer(self, body: bytes, secret: str) -> lab.Answer:
        values = {
            b"@BODY@": body,
            b"@LENGTH@": b"%d" % len(body),
            b"@HEX@": b"%x" % len(body),
            b"@MORE@": b"%d" % (len(body) + 1),
            b"@SECRET@": secret.encode(),
            b"@FLOOD@": FLOOD,
        }
        data = self.data
        for name, value in values.items():
            data = data.replace(name, value)
        return lab.Raw(data, self.ending)


OK: Final = b"HTTP/1.1 200 OK\r\n"
SIZED: Final = OK + b"Content-Length: @LENGTH@\r\n"
CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"
FLOOD: Final = b" " * (9 << 20)


def reply(body: bytes, headers: bytes = b"") -> bytes:
    return OK + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def status_line(status: int, reason: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d %s\r\n%sContent-Length: 0\r\n\r\n" % (status, reason, headers)


STOPS: Final = {
    "before the status line": b"",
    "inside the status line": OK[:10],
    "inside the headers": OK + b"Content-Le",
    "inside the body": OK + b"Content-Length: @MORE@\r\n\r\n@BODY@",
    "inside a chunk": CHUNKED + b"fffff\r\n@BODY@",
    "before the last chunk": CHUNKED + b"@HEX@\r\n@BODY@\r\n",
}
NOT_HTTP: Final = {
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a TLS alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "a frame of HTTP/2": b"\0\0\6\4\0\0\0\0\0\0\4\x40\0\0\0",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "status OK": b"HTTP/1.1 OK\r\n\r\n",
}
CHUNK_SIZES: Final = {"not a number": b"zz", "negative": b"-1", "endless": b"0" * 99999}
FLOODS: Final = {
    "behind a Content-Length of 100 GB": OK + b"Content-Length: 100000000000\r\n\r\n@FLOOD@",
    "without a Content-Length": OK + b"\r\n@FLOOD@",
    "in a chunk of 16 EiB": CHUNKED + b"ffffffffffffffff\r\n@FLOOD@",
    "in chunks": CHUNKED + b"100000\r\n%b\r\n" % bytes(1 << 20) * 9,
    "in small chunks": CHUNKED + b"1\r\n \r\n" * 100_000,
    "in a header": OK + b"X: @FLOOD@",
    "of headers": OK + b"X: x\r\n" * 100_000,
    "of preliminary responses": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
}
UNUSABLE: Final = {
    # Some web servers give it to whatever path they do not know.
    "nothing": (b"", "empty"),
    "HTML": (b"<!DOCTYPE html><title>Log in</title>", "line 1 column 1"),
    "null": (b"null", "not a JSON object"),
    "an array": (b"[]", "not a JSON object"),
    "two objects": (b"{}{}", "line 1 column 3"),
    "100,000 brackets": (b"[" * 100_000, ""),
    "10,000 digits": (b'{"data":' + b"9" * 10_000 + b"}", ""),
    "latin-1": (b'{"data":"\xfc"}', "utf-8"),
    "UTF-16": ("{}".encode("utf-16"), "utf-8"),
    "gzip": (gzip.compress(b"{}"), "utf-8"),
}
UNUSUAL: Final = {
    "no Content-Length": OK + b"\r\n@BODY@",
    "Content-Length twice": SIZED + b"content-length: @LENGTH@\r\n\r\n@BODY@",
    "HTTP/1.0": SIZED.replace(b"1.1", b"1.0") + b"\r\n@BODY@",
    "no reason phrase": SIZED.replace(b" OK", b"") + b"\r\n@BODY@",
    "preliminary response": b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED + b"\r\n@BODY@",
    "byte order mark": OK + b"\r\n\xef\xbb\xbf@BODY@",
    "chunks": CHUNKED + b"1;x=y\r\n \r\n" * 99 + b"@HEX@\r\n@BODY@\r\n0\r\nTrailer: x\r\n\r\n",
    "text/html": SIZED + b"Content-Type: text/html\r\n\r\n@BODY@",
    "binary header": SIZED + b"X: \x00\x1b\xff\r\n\r\n@BODY@",
}
ECHOES: Final = {
    "in the status line": b"@SECRET@\r\n\r\n",
    "as status": b"HTTP/1.1 @SECRET@\r\n\r\n",
    "as version": b"HTTP/@SECRET@ 200 OK\r\n\r\n",
    "as Content-Encoding": reply(b"\xff", b"Content-Encoding: @SECRET@\r\n"),
    "as chunk size": CHUNKED + b"@SECRET@\r\n",
    "as body": OK + b"\r\n@SECRET@",
}
STATUSES: Final = (301, 304, 401, 403, 407, 429, 500, 999)
FORGED: Final = b"a\rb\x1b[2Jc\x85d\xe2\x80\xa8e<0>f" + b"g" * 60_000
HEADERS: Final = b"Location: /?@SECRET@\r\nRetry-After: @SECRET@\r\n"

FAULTS: Final = (
    *(Fault(f"closed {where}", data) for where, data in STOPS.items()),
    *(Fault(f"reset {where}", data, "reset") for where, data in STOPS.items()),
    # Of silence at other moments see the time limits in test_http.py.
    Fault("silent inside the body", STOPS["inside the body"], "silence"),
    *(
        Fault(
            f"not HTTP but {what}",
            data,
            problem=r".* does not answer in HTTP/1\.1 \(.{2,99}\); .*url",
        )
        for what, data in NOT_HTTP.items()
    ),
    *(
        Fault(f"chunk size {what}", CHUNKED + size + b"\r\n@BODY@")
        for what, size in CHUNK_SIZES.items()
    ),
    *(Fault(f"flood {where}", data) for where, data in FLOODS.items()),
    *(
        Fault(f"body is {what}", reply(body), problem=f"200, .*unusable .*{problem}.*; .*url")
        for what, (body, problem) in UNUSABLE.items()
    ),
    Fault(
        "gzip is announced",
        reply(gzip.compress(b"{}"), b"Content-Encoding: gzip\r\n"),
        problem="200, .*compressed by gzip.*; .*url",
    ),
    *(Fault(f"secret {where}", data) for where, data in ECHOES.items()),
    *(
        Fault(f"status {status}", status_line(status, b"No @SECRET@", HEADERS), status=status)
        for status in STATUSES
    ),
    Fault("forged lines in a reason phrase", status_line(500, FORGED), status=500),
)

HARMLESS: Final = tuple(Fault(name, data) for name, data in UNUSUAL.items())


# ---- the servers ---------------------------------------------------------------------------------


def make_node() -> lab.SimulatedNode:
    """A node with the containers 100 and 101, without TLS."""
    token = f"felhom-agent@pve!agent={TOKEN_SECRET}"
    return lab.SimulatedNode(None, guests=lab.many_guests(2), token=token)


def make_hub() -> lab.SimulatedHub:
    """A hub without TLS."""
    return lab.SimulatedHub(None, api_key=API_KEY)


def break_server(node: lab.SimulatedNode, hub: lab.SimulatedHub, place: str, fault: Fault) -> None:
    """Answer every request at this place with the fault."""
    path = PLACES[place]
    if place == "hub":
        body = lab.json_reply(hub.envelope).body or b""
        hub.script(path, lab.Forever(fault.answer(body, API_KEY)))
    else:
        body = node.usual_reply(path).body or b""
        node.script(PLACES[place], lab.Forever(fault.answer(body, TOKEN_SECRET)))


# ---- secrets -------------------------------------------------------------------------------------


def find_secrets(text: str, secrets: Iterable[str] = SECRETS) -> list[str]:
    """Return the secrets that are in the text."""
    return [secret for secret in secrets if secret in text]


def show_error(exc: BaseException) -> str:
    """Return all that can be shown of an error and of those that led to it."""
    shown = [str(exc), repr(exc), repr(vars(exc)), *traceback.format_exception(exc)]
    causes = [exc.__cause__, None if exc.__suppress_context__ else exc.__context__]
    return "\n".join(shown + [show_error(cause) for cause in causes if cause])
