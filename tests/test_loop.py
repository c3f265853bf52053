"""When the agent reports, what it does about failures, and what it says of them. Time is a number here: nothing sleeps."""

from __future__ import annotations

import email.utils
import gc
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import felhom_agent as fa
import lab

LOGGER = logging.getLogger("test.loop")
DOWN = fa.TransportError("POST /report: hub:443: connection refused; check the port", headline="hub unreachable")
BUSY = fa.HTTPError("POST /report: 503 Busy", status=503, headline="hub answered 503")

Lines = list[tuple[str, str]]


class World(fa.Collector, fa.HubClient):
    """Clock, node, hub and systemd of one loop. The clock moves when the loop waits, and by `takes` with each collect.

    The node fails with the errors in `node` one after the other, then works; the hub answers with what is in `answers`: an error, a wish
    for an interval, or None for an envelope without one, and with the last of them for ever.
    """

    def __init__(self, *answers: Exception | int | None, node: Sequence[BaseException] = (), takes: float = 0.0, late: float = 0.0) -> None:
        self.now, self.takes, self.late = 5000.0, takes, late
        self.answers = list(answers) or [None]
        self.node = list(node)
        self.tries: list[float] = []
        self.waits: list[float] = []
        self.told: list[tuple[str, float]] = []
        self.collected: list[fa.HostReport] = []
        self.reported: list[fa.HostReport] = []

    def loop(self, interval: float = 900, fraction: Callable[[], float] = lambda: 1.0) -> fa.Loop:
        def tell(status: str, seconds: float) -> None:
            self.told.append((status, seconds))

        clock, wait = (lambda: self.now), self.wait
        return fa.Loop(self, self, interval, logger=LOGGER, clock=clock, wait=wait, fraction=fraction, tell=tell)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds + self.late

    def collect(self) -> fa.HostReport:
        self.tries.append(self.now)
        self.now += self.takes
        if self.node:
            raise self.node.pop(0)
        guests = tuple(fa.Guest(vmid=vmid, name="", status="running") for vmid in range(100, 112))
        host = fa.build_host("pve1", {}, [])
        report = fa.HostReport(
            host_id="pve1", agent_version="", reported_at="", host=host, guests=guests, cloudflared=fa.Cloudflared(status="active")
        )
        self.collected.append(report)
        return report

    def report(self, report: fa.HostReport) -> fa.ControlEnvelope:
        self.reported.append(report)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return fa.ControlEnvelope(poll_interval_seconds=answer)

    @property
    def gaps(self) -> list[float]:
        return [round(later - earlier, 6) for earlier, later in zip(self.tries, self.tries[1:], strict=False)]


@pytest.fixture(autouse=True)
def every_line(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG, LOGGER.name):
        yield


def lines(caplog: pytest.LogCaptureFixture, least: int = logging.INFO) -> Lines:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == LOGGER.name and record.levelno >= least]


def assert_lines(said: Lines, *expected: tuple[str, str]) -> None:
    """Each line has this level and matches this pattern as a whole."""
    assert [level for level, _ in said] == [level for level, _ in expected], said
    for (_, line), (_, pattern) in zip(said, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


# ---- the beat ---------------------------------------------------------------------------------------------------------------


def test_first_report_goes_out_before_any_wait() -> None:
    world = World()
    world.loop().run(1)
    assert world.tries == [5000.0]
    assert world.reported == world.collected != []
    assert world.waits == [900]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(DOWN, id="transport"),
        *(pytest.param(fa.HTTPError("", status=status), id=str(status)) for status in (302, 400, 401, 404, 413, 429, 500, 503, 595)),
        pytest.param(fa.AgentError("token lacks VM.Audit", retryable=False), id="cannot be mended"),
        *(pytest.param(kind("ours"), id=kind.__name__) for kind in (OSError, KeyError, TypeError, ZeroDivisionError, MemoryError)),
        pytest.param(RecursionError(), id="RecursionError"),
        pytest.param(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogate"), id="UnicodeEncodeError"),
    ],
)
@pytest.mark.parametrize("where", ["collect", "report"])
def test_goes_on_after_any_error(error: Exception, where: str) -> None:
    world = World(None, node=[error] * 3) if where == "collect" else World(error, error, error, None)
    world.loop().run(5)
    assert len(world.tries) == 5
    assert "accepted" not in "".join(status for status, _ in world.told[:3])
    assert all("accepted" in status for status, _ in world.told[3:])


def test_ends_when_it_is_told_to() -> None:
    world = World(node=[KeyboardInterrupt()])  # as a signal's handler raises it
    with pytest.raises(KeyboardInterrupt):
        world.loop().run(2)
    assert len(world.tries) == 1


def test_every_try_collects_anew() -> None:
    world = World(DOWN, DOWN, DOWN, None)
    world.loop().run(4)
    assert len({id(report) for report in world.reported}) == 4
    assert all(sent is collected for sent, collected in zip(world.reported, world.collected, strict=True))


@pytest.mark.parametrize("late", [0.0, 0.4, 2.0], ids=lambda late: f"waits {late} s too long")
def test_does_not_drift(late: float) -> None:
    world = World(takes=1.5, late=late)
    world.loop().run(1000)
    assert [round(at - late * (number > 0), 3) for number, at in enumerate(world.tries)] == [5000 + 900 * number for number in range(1000)]


@pytest.mark.parametrize(
    ("takes", "gap"),
    [
        pytest.param(892, 900, id="just in time"),
        pytest.param(893, 1800, id="too near"),
        pytest.param(901, 1800, id="one missed"),
        pytest.param(2800, 3600, id="three missed"),
    ],
)
def test_missed_ticks_are_skipped_not_made_up(takes: float, gap: float) -> None:
    world = World(takes=takes)
    world.loop().run(4)
    assert world.gaps == [gap] * 3


def test_overslept_ticks_are_skipped_not_made_up() -> None:
    world = World(late=2000)
    world.loop().run(3)
    assert world.tries == [5000, 5900 + 2000, 8600 + 2000]  # due with the ticks of 5000: at 5900, and at 8600 as 6800 and 7700 are missed


def test_a_host_that_has_just_booted_is_asked_again_within_15_seconds() -> None:
    refused = fa.TransportError("GET /nodes/pve1/status: 127.0.0.1:8006: connection refused")
    for seed in range(100):
        world = World(node=[refused])
        world.loop(fraction=random.Random(seed).random).run(2)
        assert 7.5 <= world.gaps[0] <= 15
        assert len(world.reported) == 1


def test_tries_of_an_outage_come_ever_later_and_never_less_often_than_the_interval() -> None:
    world = World(*[DOWN] * 6, None)
    world.loop().run(9)
    assert world.gaps == [15, 60, 240, 900, 900, 900, 900, 900]
    world = World(DOWN, DOWN, None, DOWN, None)
    world.loop().run(6)
    assert world.gaps == [15, 60, 900, 15, 900]  # a success begins the count anew


# ---- the hub's interval -----------------------------------------------------------------------------------------------------

WISHES = [
    *((300, 300), (60, 60), (3600, 3600), (59, 60), (0, 60), (-5, 60), (3601, 3600), (None, 900), (900, 900)),
    pytest.param(10**400, 3600, id="10**400"),  # more than a float holds
]


@pytest.mark.parametrize(("wish", "interval"), WISHES)
def test_cycle_adopts_the_interval_within_its_bounds(wish: int | None, interval: int) -> None:
    loop = World(wish).loop()
    error, _ = loop.cycle()
    assert error is None
    assert loop.interval == interval


@pytest.mark.parametrize(("wish", "interval"), WISHES)
def test_run_waits_for_the_interval_of_this_very_answer(wish: int | None, interval: int) -> None:
    world = World(wish, takes=2)
    world.loop().run(4)
    assert world.gaps == [interval] * 3


def test_the_adopted_interval_outlives_failures_and_answers_without_a_wish() -> None:
    world = World(120, DOWN, None, None)
    world.loop().run(5)
    assert world.gaps == [120, 15, 120, 120]


# ---- next_try: the policy ---------------------------------------------------------------------------------------------------


def wait_after(error: Exception | None, *, failures: int = 0, interval: float = 900, fraction: float = 1.0, took: float = 3) -> float:
    """How long after the end of a cycle that began at 100 the next one comes."""
    now = 100 + took
    return fa.next_try(started=100, now=now, interval=interval, failures=failures, error=error, fraction=fraction) - now


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(None, id="success"),
        *(pytest.param(fa.HTTPError("", status=status), id=str(status)) for status in (400, 401, 403, 404, 405, 410, 413, 418, 422, 451)),
        pytest.param(fa.AgentError("", retryable=False), id="AgentError"),
    ],
)
@pytest.mark.parametrize(("took", "wait"), [(0, 900), (3, 897), (892, 8), (893, 907), (900, 900), (901, 899), (2000, 700)])
def test_nothing_to_gain_means_the_next_tick(error: Exception | None, took: float, wait: float) -> None:
    for failures, fraction in ((0, 0.0), (0, 1.0), (7, 0.5)):
        assert wait_after(error, failures=failures, fraction=fraction, took=took) == wait


@pytest.mark.parametrize(
    "error",
    [
        *(pytest.param(fa.HTTPError("", status=status), id=str(status)) for status in (302, 408, 425, 429, 500, 502, 503, 504, 595, 599)),
        pytest.param(DOWN, id="TransportError"),
        pytest.param(fa.AgentError(""), id="AgentError"),
        pytest.param(ValueError("ours"), id="fault of the agent"),
    ],
)
def test_what_may_pass_is_asked_again_earlier(error: Exception) -> None:
    assert wait_after(error) == 15
    assert wait_after(error, took=100) == 15


@pytest.mark.parametrize(
    ("interval", "waits"),
    [
        (60, [15, 60, 60, 60, 60, 60, 60]),
        (900, [15, 60, 240, 900, 900, 900, 900]),
        (3600, [15, 60, 240, 960, 3600, 3600, 3600]),
    ],
)
def test_waits_grow_fourfold_up_to_the_interval(interval: float, waits: list[float]) -> None:
    assert [wait_after(DOWN, failures=k, interval=interval) for k in range(7)] == waits
    assert [wait_after(DOWN, failures=k, interval=interval, fraction=0) for k in range(7)] == [wait / 2 for wait in waits]
    assert wait_after(DOWN, failures=2, interval=interval, fraction=0.5) == 0.75 * waits[2]


def test_an_outage_of_years_overflows_nothing() -> None:
    assert wait_after(DOWN, failures=100_000) == 900


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("told", [0, 1, 30, 120, 900, 3600])
def test_retry_after_is_honoured_and_spread(status: int, told: float) -> None:
    error = fa.HTTPError("", status=status, retry_after=told)
    for failures in range(7):
        waits = [wait_after(error, failures=failures, fraction=step / 50) for step in range(51)]
        assert min(waits) >= told
        assert max(waits) <= told + 900
        assert waits == sorted(waits)
        assert waits[-1] - waits[0] >= min(told, 450)  # agents told the same do not return together


@pytest.mark.parametrize("status", [404, 408, 425, 500, 502, 504])
def test_retry_after_counts_with_429_and_503_alone(status: int) -> None:
    assert wait_after(fa.HTTPError("", status=status, retry_after=3000)) == wait_after(fa.HTTPError("", status=status))


AT = 784111777  # Sun, 06 Nov 1994 08:49:37 GMT, the example in RFC 9110, section 5.6.7


@pytest.mark.parametrize(
    ("value", "now", "seconds"),
    [
        ("0", AT, 0),
        ("120", AT, 120),
        ("3600", AT, 3600),
        ("3601", AT, 3600),
        ("9999999999", AT, 3600),
        ("Sun, 06 Nov 1994 08:49:37 GMT", AT - 60, 60),
        ("Sunday, 06-Nov-94 08:49:37 GMT", AT - 60, 60),
        ("Sun Nov  6 08:49:37 1994", AT - 60, 60),
        ("Sun, 06 Nov 1994 08:49:37 -0000", AT - 60, 60),
        ("Sun, 06 Nov 1994 09:49:37 +0100", AT - 60, 60),
        ("Sun, 06 Nov 1994 08:49:37 GMT", AT + 60, 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", AT - 86400, 3600),
        *((value, AT, None) for value in ("", "soon", "-5", "1.5", "٣", "Sun, 99 Nov 1994 08:49:37 GMT", "1e3", "0x10", "120 s", "12:30")),
        ("Sun, 06 Nov 99999999999 08:49:37 GMT", AT, None),
    ],
)
def test_retry_after_in_seconds_or_as_a_date(value: str, now: float, seconds: float | None) -> None:
    assert fa.parse_retry_after(value, now) == seconds


# ---- the log ----------------------------------------------------------------------------------------------------------------


def test_an_outage_is_told_when_it_begins_changes_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    """First failure, repeat, other cause, repeat, recovery: tries at 0, 15, 75, 315 and 1215 s."""
    world = World(DOWN, DOWN, BUSY, BUSY, None)
    world.loop().run(6)
    assert_lines(
        lines(caplog, logging.DEBUG),
        ("WARNING", re.escape(str(DOWN))),
        ("DEBUG", re.escape(str(DOWN))),
        ("WARNING", re.escape(str(BUSY))),
        ("DEBUG", re.escape(str(BUSY))),
        ("INFO", r"report accepted again\D* 4 .*tries .*\b1215 s"),
        ("DEBUG", "report accepted, 12 guests"),
        ("DEBUG", "report accepted, 12 guests"),
    )


def test_the_next_outage_is_told_as_the_first_was(caplog: pytest.LogCaptureFixture) -> None:
    world = World(DOWN, None, DOWN, None)
    world.loop().run(4)
    recovery = ("INFO", r"report accepted again\D* 1 .*\b15 s")
    assert_lines(lines(caplog), ("WARNING", re.escape(str(DOWN))), recovery, ("WARNING", re.escape(str(DOWN))), recovery)


def test_an_hour_of_outage_is_at_most_three_lines(caplog: pytest.LogCaptureFixture) -> None:
    world = World(*[DOWN] * 8, None)
    world.loop(fraction=lambda: 0.5).run(10)
    assert world.tries[8] - world.tries[0] > 3600
    assert_lines(lines(caplog), ("WARNING", re.escape(str(DOWN))), ("INFO", r"report accepted again\D* 8 .*"))


def test_a_fault_of_our_own_is_told_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    world = World(node=[ZeroDivisionError("ours")] * 3)
    world.loop().run(4)
    assert_lines(
        lines(caplog, logging.DEBUG)[:4],
        ("WARNING", "a fault of the agent.*ZeroDivisionError"),
        ("DEBUG", "a fault of the agent.*ZeroDivisionError"),
        ("DEBUG", "a fault of the agent.*ZeroDivisionError"),
        ("INFO", "report accepted again.*"),
    )
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False, False, False]
    assert "in collect" in caplog.text


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        pytest.param([900, None, 900], [], id="the interval it has"),
        pytest.param([300] * 4, [("INFO", r"interval 300 s adopted\D*900 s")], id="another"),
        pytest.param([300, 900], [("INFO", "interval 300 s .*"), ("INFO", "interval 900 s .*")], id="there and back"),
        pytest.param([5] * 4, [("WARNING", r".*\b5 s.*\b60 s"), ("INFO", "interval 60 s .*")], id="too short"),
        pytest.param([99999] * 4, [("WARNING", r".*\b99999 s.*\b3600 s"), ("INFO", "interval 3600 s .*")], id="too long"),
        pytest.param(
            [5, 5, 6, 6],
            [("WARNING", r".*\b5 s.*\b60 s"), ("INFO", "interval 60 s .*"), ("WARNING", r".*\b6 s.*\b60 s")],
            id="two values too short",
        ),
        pytest.param(
            [5, 7200, 5, 7200, 5],
            [
                *[("WARNING", r".*\b5 s.*"), ("INFO", "interval 60 s .*"), ("WARNING", r".*\b7200 s.*"), ("INFO", "interval 3600 s .*")],
                *[("INFO", "interval 60 s .*"), ("INFO", "interval 3600 s .*"), ("INFO", "interval 60 s .*")],
            ],
            id="to and fro",
        ),
    ],
)
def test_an_interval_is_told_once(wishes: list[int | None], expected: Lines, caplog: pytest.LogCaptureFixture) -> None:
    world = World(*wishes)
    world.loop().run(len(wishes) + 2)
    assert_lines(lines(caplog), *expected)


def test_clamping_says_nothing_new_after_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    world = World(5, DOWN, 5, 5)
    world.loop().run(5)
    assert [level for level, _ in lines(caplog)] == ["WARNING", "INFO", "WARNING", "INFO"]


# ---- the word to systemd ----------------------------------------------------------------------------------------------------


def test_the_status_is_what_a_person_wants_to_read() -> None:
    world = World(None, DOWN, DOWN, DOWN, BUSY, ValueError("ours"), None, takes=1)
    world.loop(fraction=lambda: 0.0).run(7)
    clock = r"\d\d:\d\d"
    expected = [
        (rf"last report {clock}:\d\d accepted, 12 guests, next in 899 s", 899),
        (rf"hub unreachable since {clock}, 1 try, next in 8 s", 7.5),
        (rf"hub unreachable since {clock}, 2 tries, next in 30 s", 30),
        (rf"hub unreachable since {clock}, 3 tries, next in 120 s", 120),
        (rf"hub answered 503 since {clock}, 4 tries, next in 450 s", 450),
        (rf"fault of the agent since {clock}, 5 tries, next in 450 s", 450),
        (rf"last report {clock}:\d\d accepted, 12 guests, next in 899 s", 899),
    ]
    assert [seconds for _, seconds in world.told] == [seconds for _, seconds in expected] == world.waits
    for (status, _), (pattern, _) in zip(world.told, expected, strict=True):
        assert re.fullmatch(pattern, status), (status, pattern)


# ---- with the real clients --------------------------------------------------------------------------------------------------


class Active:
    """A prober."""

    def probe(self) -> str:
        return "active"


def test_real_failures_are_told_with_cause_and_mend(
    agent_config: Path, node: lab.SimulatedNode, hub: lab.SimulatedHub, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    config = fa.load_config(str(agent_config), {})
    collector = fa.Collector(fa.ProxmoxClient(config.proxmox), Active(), host_id="pve1", agent_version=fa.__version__, logger=LOGGER)
    client = fa.HubClient(config.hub, logger=LOGGER)
    loop = fa.Loop(collector, client, 900, logger=LOGGER, clock=lambda: world.now, wait=world.wait, fraction=lambda: 0.0)
    later = {"Retry-After": email.utils.formatdate(time.time() + 3000, usegmt=True)}
    hub.script("", lab.Reply(401), lab.Reply(503, headers={"Retry-After": "120"}), lab.Reply(503, headers=later), lab.Cut(), lab.Cut())
    node.script("/nodes/pve1/status", *[lab.Usual()] * 5, lab.Reply(595, "Connection refused", None))
    loop.run(8)
    assert_lines(
        [(level, line) for level, line in lines(caplog) if "guests are unknown" not in line],  # the node has one that vanishes
        ("WARNING", r"POST /api/v1/host-report: 401 .*; check hub\.api_key"),
        ("WARNING", r"POST /api/v1/host-report: 503 .*"),
        ("WARNING", rf"POST /api/v1/host-report: 127\.0\.0\.1:{hub.port}: the connection was closed .*"),
        ("WARNING", r"GET /nodes/pve1/status: 595 Connection refused; .*pvedaemon.*"),
        ("INFO", r"report accepted again\D* 6 .*"),
    )
    assert len(hub.reports) == 2
    assert world.waits[:2] == [900, 120]
    assert 2990 < world.waits[2] <= 3000
    assert world.waits[3:] == [450, 450, 450, 900, 900]


@pytest.mark.parametrize("answer", [lab.Reply(500), lab.Cut()], ids=["status", "cut"])
def test_report_that_was_not_accepted_is_not_kept_while_the_agent_waits(
    agent_config: Path, hub: lab.SimulatedHub, answer: lab.Answer
) -> None:
    config = fa.load_config(str(agent_config), {})
    collector = fa.Collector(fa.ProxmoxClient(config.proxmox), Active(), host_id="pve1", agent_version=fa.__version__, logger=LOGGER)
    kept: list[int] = []

    def wait(_seconds: float) -> None:
        fa.rest(0)
        kept.append(sum(type(each) is fa.HostReport for each in gc.get_objects()))

    hub.script("", lab.Forever(answer))
    gc.collect()
    gc.disable()  # which may not come by for a long time
    try:
        before = sum(type(each) is fa.HostReport for each in gc.get_objects())
        fa.Loop(collector, fa.HubClient(config.hub, logger=LOGGER), 900, logger=LOGGER, wait=wait).run(2)
    finally:
        gc.enable()
    assert kept == [before, before]
