"""Errors and logging: no secret, no forged line, no repetition."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

import felhom_agent as agent
from support import LOG, messages

SECRET = "5f0e9a7c-2d41-4c8b-9d7e-0a1b2c3d4e5f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Zugriff für Grüße verweigert ☃", "Zugriff für Grüße verweigert ☃"),
        ("a\r\n\tERROR forged", "a\\x0d\\x0a\\x09ERROR forged"),
        ("\x1b[2J a\x00\x7f\x9bb", "\\x1b[2J a\\x00\\x7f\\x9bb"),
        # A line separator, a change of the text's direction, and half a surrogate pair
        ("a\u2028b\u202ec\ud800d", "a\\x2028b\\x202ec\\xd800d"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
        ("x" * 295 + SECRET, "x" * 295 + "***"),
        (f"[{SECRET}] [{SECRET}]", "[***] [***]"),
        # One secret begins with the other.
        (f"a {SECRET}-b", "a ***"),
    ],
    ids=lambda text: ascii(text)[:24],
)
def test_text_is_shown_as_one_printable_line(text: str, shown: str) -> None:
    agent.SECRETS.update({SECRET, f"{SECRET}-b"})
    assert agent.sanitize(text) == shown


def format_line(level: str, text: str, error: Exception | None = None) -> str:
    agent.SECRETS.add(SECRET)
    traceback = (type(error), error, None) if error else None
    number = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("tests", number, __file__, 1, "%s", (text,), traceback)
    return agent.LogFormatter().format(record)


@pytest.mark.parametrize(
    ("level", "priority"),
    [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 3)],
)
def test_line_has_a_priority_for_the_journal_else_time_and_level(
    monkeypatch: pytest.MonkeyPatch, level: str, priority: int
) -> None:
    line = format_line(level, "100 %s full")
    assert line.startswith("20")
    assert line.endswith(f" {level} 100 %s full")
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    assert format_line(level, "100 %s full") == f"<{priority}>100 %s full"


def test_traceback_is_indented_masked_and_forges_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError(f"a\n<0>forged\r\x1b[2J\u2028forged {SECRET}")
    forged = "<0>forged\\x0d\\x1b[2J\\x2028forged ***"
    _, *others = format_line("WARNING", "a bug", error).split("\n")
    assert others == ["    ValueError: a", f"    {forged}"]
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    lines = format_line("WARNING", "a bug", error).split("\n")
    assert lines == ["<4>a bug", "<4>    ValueError: a", f"<4>    {forged}"]


@pytest.fixture
def warn(log: pytest.LogCaptureFixture) -> agent.WarnOnce:
    return agent.WarnOnce(LOG)


def test_problem_is_a_warning_when_it_starts_or_changes(
    warn: agent.WarnOnce, log: pytest.LogCaptureFixture
) -> None:
    for text in ("refused", "refused", "100 %s", "refused"):
        warn.update("hub", text)
    # Another topic has its own problem.
    warn.update("list", "refused")
    levels = ["WARNING", "DEBUG", "WARNING", "WARNING", "WARNING"]
    texts = ["refused", "refused", "100 %s", "refused", "refused"]
    assert messages(log) == list(zip(levels, texts, strict=True))


@pytest.mark.parametrize(
    "end", [agent.WarnOnce.resolve, lambda warn, topic: warn.update(topic, "")]
)
def test_end_is_logged_once_and_only_after_a_beginning(
    warn: agent.WarnOnce,
    log: pytest.LogCaptureFixture,
    end: Callable[[agent.WarnOnce, str], None],
) -> None:
    end(warn, "hub")
    assert messages(log) == []
    warn.update("hub", "refused")
    end(warn, "hub")
    end(warn, "hub")
    warn.update("hub", "refused")
    refused = ("WARNING", "refused")
    assert messages(log) == [refused, ("INFO", "hub: problem resolved"), refused]


def test_traceback_of_a_bug_is_shown_once(
    warn: agent.WarnOnce, log: pytest.LogCaptureFixture
) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        warn.update("cycle", "a bug", traceback=True)
        warn.update("cycle", "a bug", traceback=True)
    assert [bool(record.exc_info) for record in log.records] == [True, False]
