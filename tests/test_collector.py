"""The collector: what fails a cycle, what is left out of a report instead, and what is said of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any, Final

import hypothesis
import pytest
from hypothesis import strategies

import felhom_agent as agent
import lab
from support import Prober, build_collector, said

NODES: Final = "/nodes$"
STATUS: Final = "/nodes/pve1/status"
LIST: Final = "/nodes/pve1/lxc$"
RIGHTS: Final = "/access/permissions"
GONE: Final = lab.Reply(500, "gone")


@pytest.fixture
def node() -> Iterator[lab.SimulatedNode]:
    """Without TLS, which loopback addresses may do, and with two guests."""
    with lab.SimulatedNode(None, guests=lab.many_guests(2)) as running:
        yield running


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def asked_for_rights(node: lab.SimulatedNode) -> int:
    return sum(request.path.endswith(RIGHTS) for request in node.requests)


def listing(*entries: object) -> lab.Reply:
    return lab.json_reply({"data": list(entries)})


def entry(vmid: object, name: str = "web") -> dict[str, object]:
    return {**lab.Guest(100, name, config=lab.usual_config(100, name)).list_entry(2), "vmid": vmid}


# --- partial failure ----------------------------------------------------------------------------------------------------------------

FAILURES = [
    pytest.param(GONE, id="refused"),
    pytest.param(lab.Cut(), id="cut"),
    pytest.param(lab.Raw(b"nonsense"), id="no-http"),
    pytest.param(lab.Reply(body=b"<html>"), id="html"),
    pytest.param(lab.json_reply({"data": "nonsense"}), id="other-shape"),
    pytest.param(lab.json_reply({"data": None}), id="null"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_nodes_that_cannot_be_read_leave_cpu_usage_unknown(node: lab.SimulatedNode, failure: lab.Answer) -> None:
    node.script(NODES, lab.Forever(failure))
    report = build_collector(node).collect()
    assert report.host.cpu_usage is None
    assert report.host.uptime_seconds == 2574
    assert [guest.status for guest in report.guests] == ["running", "running"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("path", [STATUS, LIST], ids=["status", "list"])
def test_without_status_or_list_there_is_no_report(node: lab.SimulatedNode, path: str, failure: lab.Answer) -> None:
    node.script(path, lab.Forever(failure))
    with pytest.raises(agent.AgentError, match=f"^GET {path.rstrip('$')}: "):
        build_collector(node).collect()
    assert not [request for request in node.requests if request.path.endswith("config?current=1")]


@pytest.mark.parametrize("failure", FAILURES)
def test_guest_that_cannot_be_read_is_unknown_and_without_spec(node: lab.SimulatedNode, failure: lab.Answer) -> None:
    node.script("/nodes/pve1/lxc/100/", lab.Forever(failure))
    first, second = json.loads(build_collector(node).collect().to_json())["guests"]
    assert first == {"vmid": 100, "type": "lxc", "name": "ct100", "status": "unknown", "controller_version": ""}
    assert (second["status"], second["spec"]["cores"]) == ("running", 2)


@pytest.mark.parametrize("error", [OSError("no"), ValueError("no"), RuntimeError("no")], ids=["OSError", "ValueError", "RuntimeError"])
def test_prober_that_fails_is_no_reason_to_be_silent(node: lab.SimulatedNode, log: pytest.LogCaptureFixture, error: Exception) -> None:
    collector = build_collector(node, Prober(error))
    assert [collector.collect().cloudflared.status for _ in range(2)] == ["unknown", "unknown"]
    assert [level for level, text in said(log) if "cloudflared" in text] == ["WARNING", "DEBUG"]


def test_prober_that_fails_again_is_told_again(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    prober = Prober(RuntimeError("broken"))
    collector = build_collector(node, prober)
    for answer in (prober.answer, "active", prober.answer):
        prober.answer = answer
        collector.collect()
    assert [level for level, text in said(log) if "cloudflared" in text] == ["WARNING", "INFO", "WARNING"]


def test_prober_is_asked_for_each_report(node: lab.SimulatedNode) -> None:
    prober = Prober()
    collector = build_collector(node, prober)
    assert collector.collect().cloudflared.status == "active"
    prober.answer = "failed"
    assert collector.collect().cloudflared.status == "failed"


def test_rights_on_nodes_and_guests_alone_are_enough(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    """As README.md says."""
    node.permissions = {path: dict.fromkeys(lab.PRIVILEGES, 1) for path in ("/nodes", "/vms")}
    report = build_collector(node).collect()
    assert report.host.cpu_usage is not None
    assert [guest.vmid for guest in report.guests if guest.spec is not None] == [guest.vmid for guest in node.guests]
    assert said(log) == []


# --- the list -----------------------------------------------------------------------------------------------------------------------


def test_guests_are_in_the_order_of_their_vmids(node: lab.SimulatedNode) -> None:
    node.guests = lab.many_guests(40)
    assert [guest.vmid for guest in node.guests] != list(range(100, 140))
    assert [guest.vmid for guest in build_collector(node).collect().guests] == list(range(100, 140))


def test_vmid_may_be_a_string_and_a_guest_listed_twice_is_reported_once(node: lab.SimulatedNode) -> None:
    node.script(LIST, listing(entry("101", "other"), entry(100, "first"), entry("100", "second"), entry(100.0, "third")))
    guests = build_collector(node).collect().guests
    assert [(guest.vmid, guest.name) for guest in guests] == [(100, "first"), (101, "other")]
    assert sum("/lxc/100/" in request.path for request in node.requests) == 1


@pytest.mark.parametrize("vmid", [None, "", "abc", "1e3", True, -100, 99, 1_000_000_000, 100.5, [100], "100/../101"], ids=str)
def test_guest_without_a_vmid_fails_the_cycle(node: lab.SimulatedNode, vmid: object) -> None:
    node.script(LIST, listing(entry(100), entry(vmid)))
    with pytest.raises(agent.TransportError, match="GET /nodes/pve1/lxc: a guest without a vmid"):
        build_collector(node).collect()


def test_guest_that_vanished_since_the_list_is_unknown(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    node.guests[0].vanished = True
    assert {guest.vmid: guest.status for guest in build_collector(node).collect().guests} == {100: "unknown", 101: "running"}
    ((level, text),) = said(log)
    assert level == "WARNING"
    assert text.startswith("1 of 2 guests are unknown (100): GET /nodes/pve1/lxc/100/config?current=1: 500 Configuration file")


# --- the diagnosis ------------------------------------------------------------------------------------------------------------------


def test_token_is_diagnosed_in_the_first_cycle_only(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    collector = build_collector(node)
    for _ in range(3):
        collector.collect()
    assert (asked_for_rights(node), said(log)) == (1, [])


def test_diagnosis_that_fails_does_not_stop_the_collect_and_is_made_up_for(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    node.script(RIGHTS, GONE, GONE)
    collector = build_collector(node)
    for _ in range(4):
        assert len(collector.collect().guests) == 2
    assert asked_for_rights(node) == 3
    assert [level for level, _ in said(log)] == ["WARNING", "DEBUG", "INFO"]
    assert said(log)[0][1].startswith("the token's rights are not known: GET /access/permissions: 500 gone")


@pytest.mark.parametrize("path", [STATUS, LIST, "/nodes/pve1/lxc/100/"], ids=["status", "list", "configuration"])
def test_refused_call_is_followed_by_a_diagnosis(node: lab.SimulatedNode, path: str, log: pytest.LogCaptureFixture) -> None:
    collector = build_collector(node)
    collector.collect()
    node.permissions = {"/": {"Datastore.Audit": 1}}
    node.script(path, lab.Reply(403, "Permission check failed"))
    node.script(LIST, listing(entry(100)))
    node.script(STATUS, lab.json_reply({"data": node.status}))
    with contextlib.suppress(agent.HTTPError):
        collector.collect()
    assert asked_for_rights(node) == 2
    assert "lacks Sys.Audit on /nodes/pve1 and VM.Audit on /vms; pveum acl modify" in log.text


def test_empty_list_with_the_right_to_see_all_means_no_guests(node: lab.SimulatedNode) -> None:
    node.guests = []
    collector = build_collector(node)
    for _ in range(2):
        assert json.loads(collector.collect().to_json())["guests"] == []
    assert asked_for_rights(node) >= 2  # in each of these cycles


@pytest.mark.parametrize(
    "rights",
    [
        pytest.param({}, id="none"),
        pytest.param({"/": {"Sys.Audit": 1}}, id="no-vm-audit"),
        pytest.param({"/": {"Sys.Audit": 1}, "/vms/500": {"VM.Audit": 1}}, id="one-guest-that-is-not-here"),
    ],
)
def test_empty_list_without_that_right_fails_the_cycle(node: lab.SimulatedNode, rights: dict[str, dict[str, int]]) -> None:
    node.permissions = rights
    node.script(STATUS, lab.json_reply({"data": node.status}))
    with pytest.raises(agent.AgentError, match=r"GET /nodes/pve1/lxc: an empty list, .* VM.Audit on /vms; pveum acl modify") as caught:
        build_collector(node).collect()
    assert not caught.value.retryable


def test_empty_list_with_unknown_rights_fails_the_cycle(node: lab.SimulatedNode) -> None:
    node.guests = []
    node.script(RIGHTS, lab.Forever(GONE))
    with pytest.raises(agent.AgentError, match="an empty list"):
        build_collector(node).collect()


def test_right_that_is_lost_later_fails_the_cycle(node: lab.SimulatedNode) -> None:
    collector = build_collector(node)
    collector.collect()
    node.permissions = {"/": {"Sys.Audit": 1}}  # the list is then empty, and says nothing
    with pytest.raises(agent.AgentError, match="an empty list"):
        collector.collect()


# --- what is said -------------------------------------------------------------------------------------------------------------------


def test_failing_guests_are_one_warning_and_their_recovery_another_line(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    node.guests = lab.many_guests(12)
    collector = build_collector(node)
    node.script("/nodes/pve1/lxc/", lab.Forever(GONE))
    collector.collect()
    collector.collect()
    node.clear_script()
    collector.collect()
    collector.collect()
    (level, text), (repeated, same), recovery = said(log)
    assert (level, repeated, recovery) == ("WARNING", "DEBUG", ("INFO", "all guests can be read again"))
    assert text == same
    assert text.startswith("12 of 12 guests are unknown (100, 101, 102, 103, 104, 105, 106, 107, 108, 109, …): GET /nodes/pve1/lxc/100/")


def test_cpu_usage_that_cannot_be_read_is_one_warning_and_a_recovery(node: lab.SimulatedNode, log: pytest.LogCaptureFixture) -> None:
    collector = build_collector(node)
    node.script(NODES, GONE, GONE)
    for _ in range(4):
        collector.collect()
    assert [level for level, _ in said(log)] == ["WARNING", "DEBUG", "INFO"]
    assert said(log)[0][1] == "cpu_usage is unknown: GET /nodes: 500 gone"


# --- whatever comes -----------------------------------------------------------------------------------------------------------------

PATHS: Final = (RIGHTS, NODES, STATUS, LIST, "/nodes/pve1/lxc/100/config", "/nodes/pve1/lxc/101/config")
ODD: Final[tuple[object, ...]] = (
    *(None, True, False, 0, -1, 1, 99, 100, 2**53, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "1.5", "-1", "many", "NaN", "1e5", "9" * 400, "\ud800", "a\x00\x1b[2J\u202e", "x" * 1000, "12x", "unknown"),
    *("local:1/x,size=8G", "local:1/x,size=9999999T", "/mnt,size=0", "pve-manager/", "Linux ", [], {}, [[]], {"": {}}),
)
VALUES: Final = strategies.sampled_from(ODD) | strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each place inside a JSON value."""
    yield way
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*way, key))


def mutated(draw: strategies.DrawFn, value: Any) -> Any:
    """With one place replaced, left out or doubled."""
    way = draw(strategies.sampled_from(list(places(value))))
    if not way:
        return copy.deepcopy(draw(VALUES))  # it may be changed further, and is drawn again
    *before, last = way
    inner = value
    for key in before:
        inner = inner[key]
    match draw(strategies.sampled_from(["replace", "replace", "leave-out", "double"])):
        case "replace":
            inner[last] = copy.deepcopy(draw(VALUES))
        case "leave-out":
            del inner[last]
        case "double" if isinstance(inner, list):
            inner.append(copy.deepcopy(inner[last]))
        case "double":
            inner[draw(strategies.text())] = copy.deepcopy(inner[last])
    return value


def test_list_of_more_than_there_can_be_is_an_error(node: lab.SimulatedNode) -> None:
    node.script(f"/nodes/{node.name}/lxc$", odd_reply([{"vmid": 100 + number} for number in range(agent.MAX_CONTAINERS)]))
    with pytest.raises(agent.TransportError, match="no answer of the Proxmox API"):
        build_collector(node).collect()


def odd_reply(data: object) -> lab.Reply:
    return lab.Reply(body=json.dumps({"data": data}).encode())


@strategies.composite
def scripts(draw: strategies.DrawFn) -> dict[str, lab.Reply]:
    """For some paths, the real reply, mutated in its JSON, its bytes or its status."""
    real = lab.SimulatedNode(None, guests=lab.default_guests()[1:3])
    headers = {"authorization": f"PVEAPIToken={real.token_id}={real.token_secret}"}
    found = {}
    for path in sorted(draw(strategies.sets(strategies.sampled_from(PATHS), min_size=1))):
        request = lab.Request(method="GET", path=real.base + path.rstrip("$"), headers=headers, body=b"", connection=1)
        reply = real.answer(request)
        body = reply.body or b""
        match draw(strategies.sampled_from(["json", "json", "json", "json", "bytes", "status"])):
            case "json":
                document = json.loads(body)
                for _ in range(draw(strategies.integers(1, 3))):
                    document = mutated(draw, document)
                reply = dataclasses.replace(reply, body=json.dumps(document).encode())
            case "bytes":
                start = draw(strategies.integers(0, len(body)))
                end = draw(strategies.integers(start, min(len(body), start + 20)))
                reply = dataclasses.replace(reply, body=body[:start] + draw(strategies.binary(max_size=5)) + body[end:])
            case _:
                reply = lab.Reply(draw(strategies.sampled_from([204, 301, 400, 401, 403, 500, 501, 595])), body=body)
        found[path] = reply
    return found


@pytest.fixture(scope="module")
def lasting_node() -> Iterator[lab.SimulatedNode]:
    with lab.SimulatedNode(None, guests=lab.default_guests()[1:3]) as running:
        running.auth_delay_seconds = 0
        yield running


@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(script=scripts())
@hypothesis.example({LIST: odd_reply([{"vmid": 100, "name": "\ud800", "status": "running", "maxdisk": -1}])})
@hypothesis.example({NODES: odd_reply([{"node": "pve1", "cpu": -0.5}])})
@hypothesis.example({STATUS: odd_reply({"uptime": 2**53, "memory": {"total": 1e308, "used": -1}, "loadavg": ["NaN", "1", "1"]})})
def test_whatever_proxmox_says_ends_in_a_valid_report_or_an_error_of_ours(
    lasting_node: lab.SimulatedNode, script: dict[str, lab.Reply]
) -> None:
    lasting_node.clear_script()
    for path, reply in script.items():
        lasting_node.script(path, lab.Forever(reply))
    try:
        report = build_collector(lasting_node).collect()
    except agent.AgentError:
        return
    document = json.loads(report.to_json(), parse_constant=lab.refuse_constant)
    assert [f"{error.json_path}: {error.message}" for error in lab.report_schema().iter_errors(document)] == []
    json.dumps(document, ensure_ascii=False).encode()  # no lone surrogates
    vmids = [guest["vmid"] for guest in document["guests"]]
    assert vmids == sorted(set(vmids))
