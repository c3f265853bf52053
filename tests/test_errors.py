"""Errors, and what is said of them: no secret, no forged line, nothing twice."""

from __future__ import annotations

import base64
import json
import logging
import urllib.parse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import felhom_agent
from felhom_agent import AgentError, Changes, ConfigError, HTTPError, TransportError, clean, secret_forms

UUID = "5f0e9a7c-2d41-4c8b-9d7e-0a1b2c3d4e5f"
AWKWARD = "a'b\"c\\d/e+f=g%h&i$j<k~>?"  # each means something to JSON, a URL, a shell or base64


# ---- clean ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("403 Permission check failed", "403 Permission check failed", id="plain"),
        pytest.param("Zugriff verweigert für Grüße ☃", "Zugriff verweigert für Grüße ☃", id="umlauts"),
        pytest.param("a\nERROR forged", "a\\x0aERROR forged", id="line feed"),
        pytest.param("a\r\tb", "a\\x0d\\x09b", id="carriage return and tab"),
        pytest.param("\x1b[2Jgone", "\\x1b[2Jgone", id="terminal escape"),
        pytest.param("a\x00\x7f\x9bb", "a\\x00\\x7f\\x9bb", id="NUL, DEL and C1"),
        pytest.param("a\u2028b\u202eb", "a\\x2028b\\x202eb", id="line separator and text direction"),
        pytest.param("a\ud800b", "a\\xd800b", id="lone surrogate"),
        pytest.param("x" * 300, "x" * 300, id="just short enough"),
        pytest.param("x" * 301, "x" * 300 + "…", id="too long"),
    ],
)
def test_text_from_elsewhere_is_one_printable_line(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(st.text())
def test_any_text_is_one_printable_line(text: str) -> None:
    shown = clean(text, limit=20)
    assert shown.isprintable()
    assert len(shown) <= 20 * len("\\x10ffff") + 1


def test_half_a_secret_does_not_stay_at_the_cut() -> None:
    assert clean("x" * 295 + UUID, secret_forms(UUID)) == "x" * 295 + "***"


def test_one_secret_inside_the_other_does_not_leave_the_rest() -> None:
    assert clean("key=abcdef", secret_forms("abc", "abcdef")) == "key=***"


def test_no_secret_hides_nothing() -> None:
    assert secret_forms("", "") == ()


WRITERS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": json.dumps,
    "repr": repr,
    "repr of bytes": lambda secret: repr(secret.encode()),
    "URL path": urllib.parse.quote,
    "URL query": lambda secret: urllib.parse.quote(secret, safe=""),
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 for URLs": lambda secret: base64.urlsafe_b64encode(secret.encode()).decode(),
}


@pytest.mark.parametrize("secret", [UUID, AWKWARD, "k?>~~", "~"], ids=["uuid", "awkward", "short", "one character"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_secret_is_replaced_in_every_form(write: Callable[[str], str], secret: str) -> None:
    written = write(secret)
    shown = clean(f"[{written}] [{written}]", secret_forms(secret))
    assert shown.count("***") == 2
    assert not [form for form in secret_forms(secret) if form in shown]


def test_secret_that_is_no_text_at_all_has_forms_too() -> None:
    """An environment variable may hold any byte, and it is refused only after this."""
    assert "k\udcffy" in secret_forms("k\udcffy")


@given(st.text(), st.text(), st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="*x\\"), min_size=12))
def test_secret_is_replaced_wherever_it_stands(before: str, after: str, secret: str) -> None:
    for write in WRITERS.values():
        assert secret not in clean(before + write(secret) + after, secret_forms(secret), limit=100)


# ---- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "retryable", "retry_after"),
    [
        *((status, False, None) for status in (400, 401, 403, 404, 405, 409, 411, 413, 415, 422, 451)),
        *((status, True, None) for status in (301, 302, 304, 307, 308, 408, 425, 500, 501, 502, 504, 595, 596, 599)),
        (429, True, 7.0),
        (503, True, 7.0),
    ],
)
def test_asking_again_helps_after_these_statuses(status: int, retryable: bool, retry_after: float | None) -> None:
    error = HTTPError(f"GET /: {status}", status=status, headline="H", retry_after=7.0)
    assert (error.status, error.headline, str(error)) == (status, "H", f"GET /: {status}")
    assert (error.retryable, error.retry_after) == (retryable, retry_after)


def test_both_errors_of_a_server_are_the_agents_own() -> None:
    assert issubclass(TransportError, AgentError)
    assert issubclass(HTTPError, AgentError)
    assert TransportError("cut off").retryable


def test_configuration_error_has_a_line_for_each_problem() -> None:
    assert str(ConfigError("hub.url: is required", "proxmox: must be an object")).splitlines() == [
        "config: hub.url: is required",
        "config: proxmox: must be an object",
    ]


# ---- changes ----------------------------------------------------------------------------------------------------------------


class Told:
    """Changes, and what they logged since one last looked, as level and text."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        self._caplog = caplog
        self.changes = Changes(logging.getLogger("changes"))

    def lines(self) -> list[tuple[str, str]]:
        lines = [(record.levelname, record.getMessage()) for record in self._caplog.records]
        self._caplog.clear()
        return lines


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    return Told(caplog)


def test_what_stays_wrong_warns_once(told: Told) -> None:
    for _ in range(3):
        told.changes.tell("cycle", "refused")
    assert told.lines() == [("WARNING", "refused"), ("DEBUG", "refused"), ("DEBUG", "refused")]


def test_what_goes_wrong_in_another_way_warns_again(told: Told) -> None:
    for text in ("refused", "timed out", "refused"):
        told.changes.tell("cycle", text)
    assert told.lines() == [("WARNING", "refused"), ("WARNING", "timed out"), ("WARNING", "refused")]


def test_topics_do_not_hide_each_other(told: Told) -> None:
    told.changes.tell("nodes", "refused")
    told.changes.tell("cycle", "refused")
    told.changes.tell("nodes", "", "nodes again")
    assert told.lines() == [("WARNING", "refused"), ("WARNING", "refused"), ("INFO", "nodes again")]


def test_end_is_told_once_and_only_after_a_beginning(told: Told) -> None:
    told.changes.tell("cycle", "", "again")
    assert told.lines() == []
    told.changes.tell("cycle", "refused")
    told.changes.tell("cycle", "", "again")
    told.changes.tell("cycle", "", "again")
    assert told.lines() == [("WARNING", "refused"), ("INFO", "again")]
    told.changes.tell("cycle", "refused")
    assert told.lines() == [("WARNING", "refused")]


def test_traceback_of_a_fault_is_shown_once(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    bug = ValueError("of our own")
    told.changes.tell("cycle", "a fault", bug=bug)
    told.changes.tell("cycle", "a fault", bug=bug)
    shown = [record.exc_info[1] if record.exc_info else None for record in caplog.records]
    assert shown == [bug, None]


def test_percent_signs_in_a_text_are_no_format(told: Told) -> None:
    told.changes.tell("cycle", "100 %s full")
    told.changes.tell("cycle", "", "100 %d fine")
    assert told.lines() == [("WARNING", "100 %s full"), ("INFO", "100 %d fine")]


def test_version_is_the_released_one() -> None:
    assert felhom_agent.__version__ == "0.3.0"
