"""Ten thousand agents and one hub: the real loop on a simulated clock, one agent after the other.

What the hub answers depends on the time alone and not on the other agents, so each agent can be run to its end before the next one begins,
and the tries of all of them are put together afterwards.
"""

from __future__ import annotations

import email.utils
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import pytest

import felhom_agent as fa

AGENTS = 10_000
INTERVAL = 900
EVEN_RATE = AGENTS / INTERVAL
OUTAGE_BEGINS = 1800  # by then each agent has reported twice

Hub = Callable[[float], fa.ControlEnvelope]
Answer = Callable[[float, float], Exception]  # now, and when the outage will be over
Row = Callable[..., None]

QUIET = logging.getLogger("test.fleet")
QUIET.setLevel(logging.CRITICAL)
REPORT = fa.HostReport(
    host_id="", agent_version="", reported_at="", host=fa.build_host("pve1", {}, []), guests=(), cloudflared=fa.Cloudflared(status="active")
)


class TheEnd(Exception):
    """The simulated time is over."""


class Agent(fa.Collector, fa.HubClient):
    """Clock, node and hub of one loop, as cheap as can be: the loop is what is real here."""

    def __init__(self, hub: Hub, booted: float, end: float) -> None:
        self.hub, self.now, self.end = hub, booted, end
        self.tries: list[float] = []
        self.accepted: list[float] = []

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.end:
            raise TheEnd

    def tell(self, status: str, seconds: float) -> None:
        pass

    def collect(self) -> fa.HostReport:
        return REPORT

    def report(self, report: fa.HostReport) -> fa.ControlEnvelope:
        self.tries.append(self.now)
        envelope = self.hub(self.now)
        self.accepted.append(self.now)
        return envelope


def simulate(hub: Hub, boots: Iterable[float], end: float, chance: random.Random) -> list[Agent]:
    fleet = [Agent(hub, booted, end) for booted in boots]
    for agent in fleet:
        loop = fa.Loop(agent, agent, INTERVAL, logger=QUIET, clock=agent.clock, wait=agent.wait, fraction=chance.random, tell=agent.tell)
        with suppress(TheEnd):
            loop.run()
    return fleet


def boots_over(seconds: float, agents: int, chance: random.Random) -> list[float]:
    return [chance.random() * seconds for _ in range(agents)]


def tries_between(fleet: Iterable[Agent], start: float, end: float) -> list[float]:
    return [at for agent in fleet for at in agent.tries if start <= at < end]


def busiest_second(fleet: Iterable[Agent], start: float, end: float) -> int:
    return max(Counter(map(int, tries_between(fleet, start, end))).values())


def least_gap(fleet: Iterable[Agent]) -> float:
    return min(later - earlier for agent in fleet for earlier, later in pairwise(agent.tries))


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Adds a row to the table, which is shown once, at the end."""
    rows: list[str] = []

    def add(name: str, tries: float | None, busiest: float | None, back: float | None, gap: float) -> None:
        cells = [f"{number:.{digits}f}" if number is not None else "" for number, digits in ((tries, 2), (busiest, 2), (back, 0), (gap, 1))]
        rows.append(f"{name:58}" + "".join(f"{cell:>16}" for cell in cells))

    yield add
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{AGENTS} agents, a report in {INTERVAL} s each; tries and busiest second as multiples of the normal, even rate")
        print(f"{'':58}" + "".join(f"{head:>16}" for head in ("tries during it", "busiest second", "all back after", "least gap")))
        print(*rows, sep="\n")


def test_normal_operation_is_one_beat_in_an_interval(row: Row) -> None:
    chance = random.Random(1)
    fleet = simulate(lambda _now: fa.ControlEnvelope(), boots_over(INTERVAL, AGENTS, chance), 8 * INTERVAL, chance)
    busiest = busiest_second(fleet, 0, 8 * INTERVAL) / EVEN_RATE
    row("normal operation", None, busiest, None, least_gap(fleet))
    assert busiest <= 3
    for agent in fleet:
        assert all(round(later - earlier, 6) == INTERVAL for earlier, later in pairwise(agent.tries))


# ---- outages ----------------------------------------------------------------------------------------------------------------


def is_down(_now: float, _recovery: float) -> Exception:
    return fa.TransportError("connection refused")


def says_503(_now: float, _recovery: float) -> Exception:
    return fa.HTTPError("", status=503)


def says_in(seconds: int) -> Answer:
    return lambda now, _recovery: fa.HTTPError("", status=503, retry_after=fa.parse_retry_after(str(seconds), now))


def says_when(now: float, recovery: float) -> Exception:
    """All are told the same instant, the one at which it is over."""
    return fa.HTTPError("", status=503, retry_after=fa.parse_retry_after(email.utils.formatdate(recovery, usegmt=True), now))


def down_between(begin: float, end: float, answer: Answer) -> Hub:
    def hub(now: float) -> fa.ControlEnvelope:
        if begin <= now < end:
            raise answer(now, end)
        return fa.ControlEnvelope()

    return hub


@dataclass(frozen=True, kw_only=True)
class Outage:
    """What the hub does for so long, and the bounds: tries from the second interval on and the busiest second afterwards, both as
    multiples of the normal rate, and the seconds until the last agent that had failed is accepted again."""

    name: str
    seconds: float
    answer: Answer = is_down
    tries: float = 1.5
    busiest: float = 3.0
    back: float = INTERVAL


OUTAGES = [
    Outage(name="hub down for 20 s", seconds=20, back=60),
    Outage(name="hub down for 30 min", seconds=1800),
    Outage(name="hub down for 6 h", seconds=6 * 3600),
    Outage(name="hub says 503 for 20 s", seconds=20, answer=says_503, back=60),
    Outage(name="hub says 503 for 30 min", seconds=1800, answer=says_503),
    Outage(name="hub says 503 and the time of its end, for 20 s", seconds=20, answer=says_when, back=80),
    Outage(name="hub says 503 and the time of its end, for 30 min", seconds=1800, answer=says_when),
    Outage(name="hub says 503 and the time of its end, for 6 h", seconds=6 * 3600, answer=says_when),
    # The hub itself asks for more tries than there would be without its word: they come 120 to 600 s apart until 900 s are due.
    Outage(name="hub says 503 and Retry-After: 120, for 30 min", seconds=1800, answer=says_in(120), tries=2.2),
    Outage(name="hub says 503 and Retry-After: 120, for 3 h", seconds=3 * 3600, answer=says_in(120)),
    # From 1 to 15 min it is worse: the due tries, and those 15, 60 and 240 s after a failure, four even rates, meet in the same seconds.
    Outage(name="hub down for 5 min", seconds=300, busiest=6.5),
]


@pytest.mark.parametrize("outage", OUTAGES, ids=lambda outage: outage.name)
def test_an_outage_costs_seconds_and_ends_without_a_stampede(outage: Outage, row: Row) -> None:
    recovery = OUTAGE_BEGINS + outage.seconds
    chance = random.Random(1)
    hub = down_between(OUTAGE_BEGINS, recovery, outage.answer)
    fleet = simulate(hub, boots_over(INTERVAL, AGENTS, chance), recovery + 2 * INTERVAL, chance)

    second_interval = OUTAGE_BEGINS + INTERVAL
    long = recovery > second_interval
    tries = len(tries_between(fleet, second_interval, recovery)) / (EVEN_RATE * (recovery - second_interval)) if long else None
    busiest = busiest_second(fleet, recovery, recovery + 2 * INTERVAL) / EVEN_RATE
    failed = [agent for agent in fleet if len(agent.accepted) < len(agent.tries)]
    back = max(next(at for at in agent.accepted if at >= recovery) for agent in failed) - recovery
    gap = least_gap(fleet)
    row(outage.name, tries, busiest, back, gap)
    assert tries is None or tries <= outage.tries
    assert busiest <= outage.busiest
    assert back <= outage.back
    assert gap >= 7
    assert all(recovery <= agent.accepted[-1] for agent in fleet)


# ---- power restored to a quarter of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [120, 1], ids=["booted over two minutes", "booted in the same second"])
def test_who_boots_together_neither_gathers_nor_spreads(seconds: float, row: Row) -> None:
    """First reports are immediate and the interval is kept exactly, both by contract: each later interval is as busy as the boots were.

    So those who booted in the same second stay together, until the hub turns them away (the next test).
    """
    chance = random.Random(1)
    boots = boots_over(seconds, AGENTS // 4, chance)
    fleet = simulate(lambda _now: fa.ControlEnvelope(), boots, 5 * INTERVAL, chance)
    assert [agent.tries[0] for agent in fleet] == boots
    per_interval = [busiest_second(fleet, number * INTERVAL, (number + 1) * INTERVAL) for number in range(5)]
    row(f"power restored to a quarter, booted within {seconds} s", None, per_interval[1] / EVEN_RATE, None, least_gap(fleet))
    assert len(set(per_interval)) == 1
    assert max(per_interval) <= 3 * len(fleet) / seconds
    assert (max(per_interval) == len(fleet)) == (seconds == 1)


@pytest.mark.parametrize(
    ("name", "seconds", "answer"),
    [
        pytest.param("the same, turned away once with Retry-After: 225", 1, says_in(INTERVAL // 4), id="Retry-After"),
        pytest.param("the same, while the hub was down for 30 min", 1800, is_down, id="down"),
    ],
)
def test_who_booted_in_the_same_second_spreads_once_the_hub_turns_them_away(name: str, seconds: float, answer: Answer, row: Row) -> None:
    chance = random.Random(1)
    fleet = simulate(down_between(0, seconds, answer), boots_over(1, AGENTS // 4, chance), seconds + 5 * INTERVAL, chance)
    busiest = busiest_second(fleet, seconds, seconds + 5 * INTERVAL) / EVEN_RATE
    row(name, None, busiest, None, least_gap(fleet))
    assert busiest <= 1.5


# ---- another interval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [60, 3600])
def test_another_interval_takes_effect_within_one(interval: int, row: Row) -> None:
    chance = random.Random(1)
    changed = 2 * INTERVAL
    end = changed + INTERVAL + 3 * interval
    fleet = simulate(
        lambda now: fa.ControlEnvelope(poll_interval_seconds=INTERVAL if now < changed else interval),
        boots_over(INTERVAL, AGENTS, chance),
        end,
        chance,
    )
    row(f"the hub asks for {interval} s", None, busiest_second(fleet, changed, end) / (AGENTS / interval), None, least_gap(fleet))
    for agent in fleet:
        gaps = [(earlier, round(later - earlier, 6)) for earlier, later in pairwise(agent.tries)]
        assert all(gap == (INTERVAL if at < changed else interval) for at, gap in gaps)
        assert any(changed <= at < changed + INTERVAL for at, _ in gaps)
