"""The hub client: what it sends, what it makes of each answer, and what it never shows."""

from __future__ import annotations

import base64
import json
import logging
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

import felhom_agent as agent
import lab
from support import LOG, REPORT, SOON, hub_config, said

PATH = "/api/v1/host-report"
KEY = 'k"1/\\+&9=~%41-is-a-secret'
NO_WISH = agent.ControlEnvelope()


@pytest.fixture
def client(httpserver: HTTPServer) -> agent.HubClient:
    config = agent.HubConfig(url=httpserver.url_for("").rstrip("/"), host_id="pve1", api_key=KEY, timeout_seconds=5)
    return agent.HubClient(config, logger=LOG)


@pytest.fixture
def plain_hub() -> Iterator[lab.SimulatedHub]:
    with lab.SimulatedHub(None, api_key=KEY) as hub:
        yield hub


# --- what is sent -------------------------------------------------------------------------------------------------------------------


def test_report_is_posted_with_these_headers_and_no_others(client: agent.HubClient, httpserver: HTTPServer) -> None:
    httpserver.expect_ordered_request(PATH, method="POST").respond_with_json({})
    client.report(REPORT)
    ((request, _),) = httpserver.log
    body = REPORT.to_json().encode()
    assert request.get_data() == body
    assert dict(request.headers) == {
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": f"felhom-agent/{agent.__version__}",
        "Content-Length": str(len(body)),
        "Host": f"localhost:{httpserver.port}",
    }


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        pytest.param("", PATH, id="none"),
        pytest.param("/", PATH, id="slash"),
        pytest.param("/felhom/hub", "/felhom/hub" + PATH, id="prefix"),
        pytest.param("/felhom/", "/felhom" + PATH, id="prefix-and-slash"),
    ],
)
def test_path_prefix_of_the_url_is_kept(httpserver: HTTPServer, prefix: str, path: str) -> None:
    httpserver.expect_ordered_request(path, method="POST").respond_with_json({"poll_interval_seconds": 60})
    config = agent.HubConfig(url=f"http://localhost:{httpserver.port}{prefix}", host_id="pve1", api_key=KEY)
    assert agent.HubClient(config, logger=LOG).report(REPORT).poll_interval_seconds == 60


# --- what is made of the answer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Response(status=204), id="204"),
        pytest.param(Response(status=200), id="empty"),
        pytest.param(Response(" \r\n\t ", status=200), id="white-space"),
        pytest.param(Response("{}", status=201), id="empty-object"),
        pytest.param(Response('{"further": {"poll_interval_seconds": 60}}', status=299), id="unknown-field"),
        pytest.param(Response("{}".ljust(1 << 20), status=200), id="1-mib"),
    ],
)
def test_success_without_a_wish_is_an_envelope_without_one(client: agent.HubClient, httpserver: HTTPServer, answer: Response) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_response(answer)
    assert client.report(REPORT) == NO_WISH


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("<!doctype html><title>Log in</title>", id="html"),
        pytest.param("[]", id="array"),
        pytest.param("null", id="null"),
        pytest.param('"{}"', id="string"),
        pytest.param('{"blocked": false', id="cut-json"),
        pytest.param("{} {}", id="two-objects"),
        pytest.param('{"poll_interval_seconds": NaN}', id="nan"),
        pytest.param('{"a":' * 100_000, id="nested-without-end"),
        pytest.param("1" * 100_000, id="digits-without-end"),
        pytest.param(b"\xff\xfe{}", id="no-utf-8"),
        pytest.param("{}".ljust((1 << 20) + 1), id="1-mib-and-a-byte"),
    ],
)
def test_success_that_is_no_envelope_was_not_the_hub(client: agent.HubClient, httpserver: HTTPServer, body: str | bytes) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data(body, content_type="application/json")
    with pytest.raises(agent.TransportError, match=f"POST {PATH}: .*; check hub.url: this is not hub"):
        client.report(REPORT)


@pytest.mark.parametrize("status", [*range(300, 309), *range(400, 432), 451, *range(500, 512), 520, 599])
def test_other_status_is_an_error_that_has_it(client: agent.HubClient, httpserver: HTTPServer, status: int) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data("<h1>no</h1>" * 100, status, {"Location": PATH, "Retry-After": "7"})
    with pytest.raises(agent.HTTPError, match=f"POST {PATH}: {status}") as caught:
        client.report(REPORT)
    assert caught.value.status == status
    assert caught.value.retryable is (status < 400 or status >= 500 or status in (408, 425, 429))
    assert caught.value.retry_after == (7.0 if status in (429, 503) else None)
    assert len(httpserver.log) == 1


@pytest.mark.parametrize(
    ("status", "mend"),
    [(401, "check hub.api_key"), (403, "check hub.api_key and hub.host_id"), (404, f"check hub.url, to which the agent adds {PATH}")],
)
def test_refusal_says_what_to_check(client: agent.HubClient, httpserver: HTTPServer, status: int, mend: str) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data(status=status)
    with pytest.raises(agent.HTTPError) as caught:
        client.report(REPORT)
    assert str(caught.value).endswith(f"; {mend}")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        pytest.param(lab.Cut(), "the connection was closed before the answer was complete", id="cut"),
        pytest.param(
            lab.Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"), "closed before the answer was complete", id="cut-in-the-body"
        ),
        pytest.param(lab.Stall(), "no complete answer in time; .*hub.timeout_seconds is the limit", id="time-out"),
        pytest.param(lab.Raw(b"220 mail.example.com ESMTP\r\n"), "no answer in HTTP; check hub.url: this is not hub", id="no-http"),
    ],
)
def test_no_answer_is_a_transport_error(plain_hub: lab.SimulatedHub, answer: lab.Answer, complaint: str) -> None:
    plain_hub.script("", answer)
    with pytest.raises(agent.TransportError, match=f"POST {PATH}: 127.0.0.1:{plain_hub.port}: .*{complaint}"):
        agent.HubClient(hub_config(plain_hub, timeout_seconds=SOON), logger=LOG).report(REPORT)


def test_refused_connection_is_a_transport_error() -> None:
    with lab.SimulatedHub(None) as hub:
        config = hub_config(hub)
    with pytest.raises(agent.TransportError, match=r"connection refused; check host and port in hub.url"):
        agent.HubClient(config, logger=LOG).report(REPORT)


# --- the envelope -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "seconds"), [("60", 60), ("900.0", 900), ("-1", -1), ("0", 0), ("1e3", 1000)])
def test_whole_number_is_the_hubs_wish(
    client: agent.HubClient, httpserver: HTTPServer, caplog: pytest.LogCaptureFixture, value: str, seconds: int
) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data(f'{{"poll_interval_seconds":{value}}}')
    wish = client.report(REPORT).poll_interval_seconds
    assert (wish, type(wish), said(caplog)) == (seconds, int, [])


@pytest.mark.parametrize("digits", [30, 400, 4000])
def test_huge_whole_number_is_one_too(client: agent.HubClient, httpserver: HTTPServer, digits: int) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data(f'{{"poll_interval_seconds":{"9" * digits}}}')
    wish = client.report(REPORT).poll_interval_seconds
    assert wish is not None
    assert wish > agent.MAX_POLL_SECONDS


NO_WHOLE_NUMBERS = [
    '"900"',
    "true",
    "false",
    "null",
    "1e99",
    "1e999",
    "-1e999",
    "0.5",
    "[900]",
    '{"seconds":900}',
    '"' + "x" * 5000 + '"',
    '"\\ud800"',
]


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS, ids=lambda value: value[:12])
def test_anything_else_is_ignored_with_one_warning(
    client: agent.HubClient, httpserver: HTTPServer, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        httpserver.expect_ordered_request(PATH).respond_with_data(f'{{"poll_interval_seconds":{value},"blocked":true}}')
        assert client.report(REPORT) == agent.ControlEnvelope(blocked=True)
    ((level, text),) = said(caplog)
    assert (level, "poll_interval_seconds is no whole number" in text, len(text) < 200) == ("WARNING", True, True)
    httpserver.expect_ordered_request(PATH).respond_with_data('{"poll_interval_seconds":60}')
    client.report(REPORT)
    assert [level for level, _ in said(caplog)] == ["WARNING", "INFO"]


def test_other_fields_are_read_leniently_and_said_at_debug_level(
    client: agent.HubClient, httpserver: HTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    full = {"poll_interval_seconds": 900, "blocked": True, "desired_generation": 7, "has_signed_ops": True}
    wrong = {"poll_interval_seconds": 900, "blocked": 1, "desired_generation": True, "has_signed_ops": "yes"}
    for answer in (full, wrong):
        httpserver.expect_ordered_request(PATH).respond_with_json(answer)
    assert client.report(REPORT) == agent.ControlEnvelope(**full)  # type: ignore[arg-type]
    assert client.report(REPORT) == agent.ControlEnvelope(poll_interval_seconds=900)
    (level, text), (other_level, _) = said(caplog)
    assert (level, other_level) == ("DEBUG", "DEBUG")
    assert "blocked=True, desired_generation=7, has_signed_ops=True" in text


# --- Retry-After --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        pytest.param("120", 120, 120, id="seconds"),
        pytest.param("0", 0, 0, id="zero"),
        pytest.param("999999", 3600, 3600, id="more-than-an-hour"),
        pytest.param("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0, id="past"),
        pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", 3600, 3600, id="far-future"),
    ],
)
def test_retry_after_is_heard(client: agent.HubClient, httpserver: HTTPServer, status: int, value: str, least: float, most: float) -> None:
    httpserver.expect_ordered_request(PATH).respond_with_data("", status, {"Retry-After": value})
    with pytest.raises(agent.HTTPError) as caught:
        client.report(REPORT)
    assert caught.value.retry_after is not None
    assert least <= caught.value.retry_after <= most


def test_answer_without_a_body_has_no_chunks(plain_hub: lab.SimulatedHub) -> None:
    plain_hub.script("", lab.Raw(b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"))
    assert agent.HubClient(hub_config(plain_hub), logger=LOG).report(REPORT) == agent.ControlEnvelope()


def test_retry_after_may_be_a_date(client: agent.HubClient, httpserver: HTTPServer) -> None:
    soon = formatdate(time.time() + 600, usegmt=True)  # here: at collection it would be minutes old when the test runs
    httpserver.expect_ordered_request(PATH).respond_with_data("", 503, {"Retry-After": soon})
    with pytest.raises(agent.HTTPError) as caught:
        client.report(REPORT)
    assert caught.value.retry_after is not None
    assert 540 <= caught.value.retry_after <= 600


@pytest.mark.parametrize("value", ["soon", "", "-1", "1.5", "1e3", "12 monkeys", "Mon, 99 Foo 2026 99:99:99 GMT", "9" * 5000, "٣"])
def test_retry_after_that_says_nothing_is_none(value: str) -> None:
    assert agent.parse_retry_after(value, 0.0) is None


# --- the key ------------------------------------------------------------------------------------------------------------------------

FORMS: list[Callable[[str], str]] = [
    str,
    lambda key: json.dumps(key)[1:-1],
    lambda key: repr(key)[1:-1],
    lambda key: urllib.parse.quote(key, safe=""),
    lambda key: base64.b64encode(key.encode()).decode(),
]


def everything_said(exc: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    """Of the error and of all that led to it, also what a traceback leaves out."""
    shown = [caplog.text, *traceback.format_exception(exc)]
    todo: list[BaseException | None] = [exc]
    while todo:
        if (each := todo.pop()) is not None:
            shown += [str(each), repr(each), repr(vars(each))]
            todo += [each.__cause__] if each.__suppress_context__ else [each.__cause__, each.__context__]
    return "\n".join(shown)


@pytest.mark.parametrize("form", FORMS, ids=["plain", "json", "python", "url", "base64"])
@pytest.mark.parametrize(
    "echo",
    [
        pytest.param(lambda key: lab.Reply(400, f"no {key}"), id="reason"),
        pytest.param(lambda key: lab.Reply(302, "Found", headers={"Location": f"/?{key}"}), id="location"),
        pytest.param(lambda key: lab.Reply(503, headers={"Retry-After": key}), id="retry-after"),
        pytest.param(lambda key: lab.Reply(200, body=key.encode()), id="body"),
        pytest.param(lambda key: lab.Reply(500, body=key.encode()), id="error-body"),
        pytest.param(lambda key: lab.json_reply({"poll_interval_seconds": key}), id="wish"),
        pytest.param(lambda key: lab.json_reply({"blocked": key, "desired_generation": key, "has_signed_ops": key}), id="flags"),
        pytest.param(lambda key: lab.Raw(key.encode() + b"\r\n\r\n"), id="status-line"),
        pytest.param(lambda key: lab.Raw(f"HTTP/1.1 {key} no\r\n\r\n".encode()), id="status"),
        pytest.param(lambda key: lab.Raw(f"{key}/1.1 200 OK\r\n\r\n{{}}".encode()), id="version"),
        pytest.param(lambda key: lab.Raw(f"HTTP/1.1 200 OK\r\nContent-Length: {key}\r\n\r\n".encode()), id="length"),
        pytest.param(lambda key: lab.Raw(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{key}\r\n".encode()), id="chunk"),
        pytest.param(lambda key: lab.Raw(f"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{key}".encode()), id="cut-body"),
        pytest.param(lambda key: lab.Raw(b"HTTP/1.1 200 OK\r\n\r\n" + key.encode() + b"\xff"), id="no-utf-8"),
    ],
)
def test_key_that_comes_back_goes_no_further(
    plain_hub: lab.SimulatedHub, caplog: pytest.LogCaptureFixture, echo: Callable[[str], lab.Answer], form: Callable[[str], str]
) -> None:
    caplog.set_level(logging.DEBUG)
    plain_hub.script("", echo(form(KEY)))
    client = agent.HubClient(hub_config(plain_hub), logger=LOG)
    try:
        shown = repr(client.report(REPORT))
    except agent.AgentError as exc:
        shown = everything_said(exc, caplog)
    for each in FORMS:
        assert each(KEY).rstrip("=") not in shown + caplog.text + repr(client)


def test_key_is_in_no_error_of_the_connection(caplog: pytest.LogCaptureFixture, hub: lab.SimulatedHub) -> None:
    caplog.set_level(logging.DEBUG)
    changes: list[dict[str, Any]] = [{"ca_file": ""}, {"url": "http://127.0.0.1:1"}, {"url": f"http://127.0.0.1:{hub.port}"}]
    for change in changes:
        config = hub_config(hub, api_key=KEY, **change)
        with pytest.raises(agent.TransportError) as caught:
            agent.HubClient(config, logger=LOG).report(REPORT)
        assert KEY not in everything_said(caught.value, caplog) + repr(config)
