"""The heartbeat as a hub sees it: the real loop on a simulated clock, against docs/hub.md.

What the hub answers depends on the time alone and not on the other agents, so one agent after the
other runs to its end, and what arrives from all of them is put together afterwards.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import pytest

import felhom_agent as agent
from examples import hub as example
from support import make_report

PAGE: Final = (Path(__file__).parent.parent / "docs/hub.md").read_text("utf-8")
# The longest cycle with the agent's defaults: six requests' time to collect, systemctl, the POST.
LONGEST_CYCLE: Final = 6 * 10 + 5 + 30
# As long as a cycle may last so that even three lost reports in a row raise no alarm.
USUAL_CYCLE: Final = 11
TOLERANCE: Final = example.TOLERANCE_SECONDS
AGENTS: Final = 2000
INTERVAL: Final = 900
EVEN_RATE: Final = AGENTS / INTERVAL

QUIET: Final = logging.getLogger("test.heartbeat")
QUIET.setLevel(logging.CRITICAL + 1)

REPORT: Final = make_report()
ACCEPTED: Final = agent.build_envelope({})
Answer = Callable[[float], agent.ControlEnvelope]


class TheEnd(BaseException):
    """The simulated time is over."""


class Agent:
    """A loop with its clock, its node and its hub; `answer` is what the hub does with a report."""

    def __init__(self, answer: Answer, end: float, *, booted: float = 0.0) -> None:
        self.answer, self.end, self.now = answer, end, booted
        self.cycle_seconds: Callable[[], float] = lambda: 0.0
        self.sent: list[float] = []
        self.received: list[float] = []

    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.end:
            raise TheEnd

    def deliver(self, _report: agent.HostReport) -> agent.ControlEnvelope:
        self.now += self.cycle_seconds()
        self.sent.append(self.now)
        envelope = self.answer(self.now)
        self.received.append(self.now)
        return envelope

    def run(self, interval: float) -> Agent:
        seams: dict[str, Any] = {"clock": lambda: self.now, "wait": self.wait}
        collector: Any = SimpleNamespace(collect=lambda: REPORT)
        client: Any = SimpleNamespace(report=self.deliver)
        with suppress(TheEnd):
            agent.Loop(collector, client, interval, logger=QUIET, **seams).run()
        return self

    def longest_silence(self) -> float:
        return max(later - earlier for earlier, later in pairwise(self.received))


def accept(_now: float) -> agent.ControlEnvelope:
    return ACCEPTED


def longest_silence(
    interval: float, lost: int, cycle: float, *, retry_after: int | None = None
) -> float:
    """Return the seconds between two reports with so many lost between them, at worst.

    At worst the report before them took no time at all, and every later cycle takes as long as it
    may.
    """
    left = [lost]

    def answer(_now: float) -> agent.ControlEnvelope:
        if len(host.received) == 1 and left[0]:
            left[0] -= 1
            raise agent.HTTPError("", status=503, retry_after=retry_after)
        return ACCEPTED

    host = Agent(answer, end=30 * interval)
    host.cycle_seconds = lambda: cycle if host.received else 0.0
    with mock.patch.object(random, "uniform", lambda _, longest: longest):
        host.run(interval)
    assert left == [0]
    return host.longest_silence()


@pytest.mark.parametrize(
    ("lost", "longest", "usual"), [(0, 95, 11), (1, 205, 37), (2, 360, 108), (3, 695, 359)]
)
def test_a_report_is_late_by_no_more_than_the_page_says(
    lost: int, longest: int, usual: int
) -> None:
    assert f"\n| {lost} | {longest} s | {usual} s |\n" in PAGE
    for cycle, late in ((LONGEST_CYCLE, longest), (USUAL_CYCLE, usual)):
        for interval in (300, 900, 3600):
            silence = longest_silence(interval, lost, cycle)
            assert silence == pytest.approx(interval + late)


@pytest.mark.parametrize("interval", [60, 61, 94, 95, 96, 200, 300, 900, 3600])
def test_two_lost_reports_raise_no_alarm_however_slow_the_node_is(interval: float) -> None:
    assert f"`I + {TOLERANCE // 60} minutes`" in PAGE
    assert longest_silence(interval, 2, LONGEST_CYCLE) <= interval + TOLERANCE
    assert longest_silence(interval, 3, USUAL_CYCLE) <= interval + TOLERANCE


@pytest.mark.parametrize("seconds", [30, 600, 3600])
def test_retry_after_of_r_seconds_makes_a_report_late_by_up_to_two_r_more(seconds: int) -> None:
    late = longest_silence(INTERVAL, 1, LONGEST_CYCLE, retry_after=seconds) - INTERVAL
    assert late == 2 * LONGEST_CYCLE + 2 * seconds


def run_fleet(answer: Answer, boots: Iterable[float], end: float, seed: int = 1) -> list[Agent]:
    random.seed(seed)
    return [Agent(answer, end, booted=booted).run(INTERVAL) for booted in boots]


def spread_boots(seconds: float, seed: int = 2) -> list[float]:
    chance = random.Random(seed)
    return [chance.random() * seconds for _ in range(AGENTS)]


def busiest_second(fleet: Iterable[Agent], start: float, end: float) -> int:
    return max(Counter(int(at) for one in fleet for at in one.sent if start <= at < end).values())


def down_between(start: float, end: float, retry_after: int | None = None) -> Answer:
    def answer(now: float) -> agent.ControlEnvelope:
        if start <= now < end:
            raise agent.HTTPError("", status=503, retry_after=retry_after)
        return ACCEPTED

    return answer


@pytest.mark.parametrize(
    ("down_seconds", "retry_after", "back_seconds", "busiest"),
    [
        pytest.param(20, None, 60, 4, id="20-s"),
        pytest.param(1800, None, INTERVAL, 4.5, id="30-min"),
        pytest.param(6 * 3600, None, INTERVAL, 4, id="6-h"),
        # It can only lengthen a wait.
        pytest.param(1800, 120, INTERVAL, 4.5, id="30-min-with-Retry-After"),
    ],
)
def test_an_outage_ends_without_a_stampede(
    down_seconds: float, retry_after: int | None, back_seconds: float, busiest: float
) -> None:
    start = 2 * INTERVAL
    back = start + down_seconds
    answer = down_between(start, back, retry_after)
    fleet = run_fleet(answer, spread_boots(INTERVAL), back + 2 * INTERVAL)
    failed = [one for one in fleet if len(one.received) < len(one.sent)]
    assert failed
    latest = max(next(at for at in one.received if at >= back) for one in failed)
    assert latest - back <= back_seconds
    assert busiest_second(fleet, back, back + 2 * INTERVAL) <= busiest * EVEN_RATE


def test_those_that_start_together_stay_together_until_the_hub_spreads_them() -> None:
    boots = spread_boots(1)
    together = run_fleet(accept, boots, 5 * INTERVAL)
    assert busiest_second(together, 3 * INTERVAL, 4 * INTERVAL) == AGENTS
    chance = random.Random(3)
    first_answers = 5.0

    def spread_once(now: float) -> agent.ControlEnvelope:
        seconds = chance.randrange(60, INTERVAL) if now < first_answers else INTERVAL
        return agent.build_envelope({"poll_interval_seconds": seconds})

    spread = run_fleet(spread_once, boots, 5 * INTERVAL)
    assert busiest_second(spread, 3 * INTERVAL, 4 * INTERVAL) <= 4 * EVEN_RATE + 3
