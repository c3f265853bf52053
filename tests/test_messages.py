"""docs/messages.md explains each message of the module, and no message that the module has not."""

from __future__ import annotations

import ast
import dataclasses
import http.client
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

import pytest

import felhom_agent as agent
import lab
from support import MODULE

# With each text that stands in several pieces as one
SOURCE: Final = re.sub(r'"\s+f?"', "", MODULE.read_text("utf-8"))
PAGE: Final = (MODULE.parent / "docs" / "messages.md").read_text("utf-8")
# Under this heading stands what the module does not say.
OTHERS_WORDS: Final = "## What systemd, shiv and Python say"
PLAIN_PAGE: Final = " ".join(PAGE.replace("`", "").split())
PLACEHOLDERS: Final = (
    "HOST|KEY|KIND|METHOD|N|NAME|NODE|OTHER|PATH|PORT|PRIVILEGE|SECONDS|STATUS|TIME|TOPIC|URL|USER"
    "|VARIABLE|VERSION"
)
# Its hints have the page's words for what varies.
WORDS: Final[dict[str, Any]] = {
    "node": "NODE",
    "token_id": "USER!NAME",
    "timeout_seconds": "SECONDS",
}


# ---- each message of the module is on the page ---------------------------------------------------


def find_exempt(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what holds texts that are no messages: docstrings, `--help`, the hints, extras."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from ast.walk(part.body[0]) if isinstance(part.body[0], ast.Expr) else ()
        if isinstance(part, ast.FunctionDef) and part.name == "parse_arguments":
            yield from ast.walk(part)
        if isinstance(part, ast.AnnAssign) and re.search("HINTS|EXTRAS", ast.unparse(part.target)):
            yield from ast.walk(part)


def all_sentences() -> Iterator[str]:
    """Yield each text of three words and more, without what is filled in."""
    tree = ast.parse(MODULE.read_text("utf-8"))
    exempt = set(find_exempt(tree))
    for part in ast.walk(tree):
        if part in exempt or not isinstance(part, ast.Constant) or not isinstance(part.value, str):
            continue
        for piece in re.split(r"%[.\d]*[dfs]|\n", part.value):
            sentence = piece.strip(" ,;:(")
            if len(sentence.split()) >= 3:
                yield sentence


def test_page_has_each_message() -> None:
    sentences = [text for text in all_sentences() if text not in agent.HUB_HINTS]
    assert len(sentences) > 50
    assert [text for text in sentences if text not in PLAIN_PAGE] == []


def test_page_has_each_hint(clients: Mapping[str, agent.Client]) -> None:
    for client in clients.values():
        hints = [client.hint(cause) for cause in client.hints]
        assert [hint for hint in hints if hint not in PLAIN_PAGE] == []


def test_page_says_what_each_setting_must_be() -> None:
    documented = {}
    for cells in find_rows("key"):
        for key in cells["key"].split("`")[1::2]:
            documented[key] = cells["must be"]
    rules = {}
    for section, settings in agent.SECTIONS.items():
        for item in dataclasses.fields(settings):
            rules[f"{section}.{item.name}"] = item.metadata["expected"]
    assert documented == rules


# ---- each hint is the page's ---------------------------------------------------------------------


def find_rows(column: str, heading: str = "") -> list[dict[str, str]]:
    """Return the rows under a heading of the tables whose first column is this."""
    rows, titles, current = list[dict[str, str]](), list[str](), ""
    for line in PAGE.partition(OTHERS_WORDS)[0].split("\n"):
        if line.startswith("## "):
            current = line
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not line.startswith("|"):
            titles = []
        elif not titles:
            titles = cells
        elif titles[0] == column and not line.startswith("|---") and current.startswith(heading):
            rows.append(dict(zip(titles, cells, strict=True)))
    return rows


@pytest.fixture(params=["no ca_file", "ca_file"])
def clients(request: pytest.FixtureRequest, certificates: lab.Certificates) -> dict[str, Any]:
    """Those that speak of Proxmox and of the hub."""
    changes: Any = {"ca_file": str(certificates.ca_file)} if request.param == "ca_file" else {}
    hub_words = {"timeout_seconds": WORDS["timeout_seconds"], **changes}
    return {
        "Proxmox": agent.ProxmoxClient(agent.ProxmoxConfig(**WORDS, **changes)),
        "the hub": agent.HubClient(agent.HubConfig(url="https://127.0.0.1", **hub_words)),
    }


def find_statuses(text: str) -> list[int]:
    """Return the numbers in a message's cell, with all of "`595 …` to `599 …`"."""
    statuses: list[int] = []
    for first, last in re.findall(r"`(\d{3}) [^`]*`(?: to `(\d{3}) …`)?", text):
        statuses += range(int(first), int(last or first) + 1)
    return statuses


@pytest.mark.parametrize("server", ["Proxmox", "the hub"])
def test_each_status_has_the_hint_of_its_row(clients: Mapping[str, Any], server: str) -> None:
    client, documented, other = clients[server], dict[int, str](), ""
    for cells in find_rows("message", f"## A status from {server}"):
        message, hint = cells["message"], cells["hint"]
        statuses = find_statuses(message)
        if message.startswith("any other"):
            other = hint
        elif "redirect" in message:
            assert client.hint("redirect") == hint
        elif "for a storage's backups" in message:
            path = "/nodes/NODE/storage/bak/prunebackups"
            for cause in (*statuses, "no response", "timeout"):
                assert client.hint(cause, path) == hint
        else:
            documented |= dict.fromkeys(statuses, hint)
    for status in range(400, 1000):
        assert client.hint(status) == documented.get(status, other), status


def verify_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError()
    error.verify_code = code
    return error


# What stands for each message of the table of missing responses: a key of the hints, if the words
# are the module's own.  The words of OpenSSL, the resolver and the kernel are in test_http.py.
REFUSED: Final = "certificate verify failed: "
CAUSES: Final[Mapping[str, Exception | str]] = {
    f"{REFUSED}Hostname mismatch, …": verify_error(62),
    f"{REFUSED}IP address mismatch, …": verify_error(64),
    f"{REFUSED}unable to get local issuer certificate": verify_error(20),
    f"{REFUSED}self-signed certificate …": verify_error(18),
    f"{REFUSED}certificate has expired": verify_error(10),
    f"{REFUSED}certificate is not yet valid": verify_error(9),
    f"{REFUSED}EE certificate key too weak": verify_error(66),
    "its certificate has the SHA-256 …": "pin",
    **dict.fromkeys(("wrong version number", "record layer failure"), ssl.SSLError()),
    **dict.fromkeys(("tlsv1 alert …", "EOF …"), ssl.SSLEOFError()),
    "connection closed or reset during the TLS handshake": "handshake",
    "connection timed out": "connect timeout",
    "timed out": TimeoutError(),
    "no time left in this cycle": "no time left",
    "Name or service not known": socket.gaierror(socket.EAI_NONAME),
    "Temporary failure in name resolution": socket.gaierror(socket.EAI_AGAIN),
    "Connection refused": ConnectionRefusedError(),
    "Remote end closed connection without response": http.client.RemoteDisconnected(""),
    "Connection reset by peer": ConnectionResetError(),
    "IncompleteRead(…)": http.client.IncompleteRead(b""),
    "Network is unreachable": OSError(),
    "it does not answer in HTTP/1.1 (…)": http.client.BadStatusLine(""),
    "200, but the reply is unusable (…)": "unusable",
    "the proxy answers 401": "proxy login",
    "the proxy answers 407": "proxy login",
    "the proxy answers 403": "proxy",
}


def test_each_missing_response_has_the_hint_of_its_row(clients: Mapping[str, Any]) -> None:
    # Of two rows, one is for each.
    other_row = ", if there is no ca_file"
    if clients["Proxmox"].hint("unknown CA") == agent.PROXMOX_HINTS["unknown CA"]:
        other_row = ", if ca_file is set"
    found = set()
    for cells in find_rows("message", "## No response"):
        if cells["message"].endswith(other_row):
            continue
        for message in cells["message"].split(": the reason is")[0].split("`")[1::2]:
            if "hint" in cells and not message.startswith("the proxy"):
                # Of the proxy's address
                continue
            cause = CAUSES[message]
            found.add(message)
            if isinstance(cause, Exception):
                cause = agent.find_cause(cause)
            else:
                assert re.sub(r"^200| (\d{3}|…|\(…\))$", "", message) in MODULE.read_text("utf-8")
            for column, server in (
                *(("from Proxmox", "Proxmox"), ("from the hub", "the hub")),
                ("hint", "the hub"),
            ):
                hint = cells.get(column)
                assert not hint or clients[server].hint(cause) == hint
    assert found == CAUSES.keys()


# ---- each message of the page is the module's ----------------------------------------------------


def find_messages() -> list[str]:
    """Return the page's messages, but for those under which the reasons of others are quoted."""
    rows = find_rows("message", "## About") + find_rows("message", "## How")
    rows += find_rows("message", "## Configuration")
    return [message for cells in rows for message in cells["message"].split("`")[1::2]]


# In one of them only json speaks.
@pytest.mark.parametrize("message", [each for each in find_messages() if "Expecting" not in each])
def test_module_has_each_message_of_the_page(message: str) -> None:
    """Most of its pairs of words, for some are somebody else's or filled in."""
    pairs = []
    for phrase in re.split(rf"…|\b(?:{PLACEHOLDERS})\b", message):
        pairs += [" ".join(pair) for pair in pairwise(phrase.split())]
    found = [pair for pair in pairs if pair.rstrip("s") in SOURCE]
    assert len(found) >= len(pairs) / 2
