"""When the agent reports, what it does about failures, and what it says of them.

Time is a number here: nothing sleeps.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, Final, Literal
from unittest import mock

import pytest

import felhom_agent as agent
from support import LOG, make_report, messages

DOWN: Final = agent.TransportError("POST /report: hub.example: Connection refused; check the port")
BUSY: Final = agent.HTTPError("POST /report: 503 Busy; wait", status=503)
START: Final = 5000.0
Place = Literal["collect", "report"]


class World:
    """Clock, collector, hub and systemd of one loop, and lists of what it does with them.

    `notified` has the status that systemd got before each wait.  The clock moves when the loop
    waits, and by `takes` with each collect.  Each collect or report, depending on `place`, has one
    of the `replies` (an exception, a requested interval, or None for no request); the last of them
    is repeated for ever.
    """

    systemd: socket.socket

    def __init__(
        self, *replies: BaseException | int | None, place: Place = "report", takes: float = 0.0
    ) -> None:
        self.now, self.takes, self.place = START, takes, place
        self.replies = list(replies) or [None]
        self.did: list[str] = []
        self.tries: list[float] = []
        self.waits: list[float] = []
        self.notified: list[str] = []
        # When the reports that were sent had been made.
        self.sent: list[str] = []

    def loop(self) -> agent.Loop:
        own: Any = self
        return agent.Loop(own, own, 900, logger=LOG, clock=lambda: self.now, wait=self.wait)

    def reply(self, place: Place) -> int | None:
        self.did.append(place)
        if place != self.place:
            return None
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def collect(self) -> agent.HostReport:
        self.tries.append(self.now)
        self.now += self.takes
        self.reply("collect")
        guest = agent.Guest(vmid=100, name="", status="running")
        return make_report(guests=(guest,) * 12, reported_at=str(self.tries[-1]))

    def report(self, report: agent.HostReport) -> agent.ControlEnvelope:
        self.sent.append(report.reported_at)
        return agent.build_envelope({"poll_interval_seconds": self.reply("report")})

    def wait(self, seconds: float) -> None:
        message = self.systemd.recv(4096).decode()
        assert message.startswith("READY=1\nWATCHDOG=1\nSTATUS=")
        self.notified.append(message.partition("STATUS=")[2])
        self.did.append("wait")
        self.waits.append(seconds)
        self.now += seconds

    @property
    def gaps(self) -> list[float]:
        """Seconds from the beginning of one cycle to that of the next."""
        return [later - earlier for earlier, later in pairwise(self.tries)]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A listening systemd, and random numbers that make the longest delays."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, drawn(1):
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        World.systemd = sock
        yield


def drawn(*fractions: float) -> AbstractContextManager[object]:
    """Let random numbers be at these fractions of their range, one after the other."""
    numbers = cycle(fractions)
    return mock.patch("random.uniform", lambda low, high: low + (high - low) * next(numbers))


@pytest.mark.parametrize(
    ("interval", "delays"),
    [
        (60, [15, 60, 60, 60, 60, 60]),
        (900, [15, 60, 240, 900, 900, 900]),
        (3600, [15, 60, 240, 960, 3600, 3600]),
    ],
)
@pytest.mark.parametrize(("fraction", "factor"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_delay_grows_fourfold_up_to_the_interval(
    interval: float, delays: list[float], fraction: float, factor: float
) -> None:
    """Whatever Retry-After says, the agent does not come back sooner than that."""
    for retry_after in (None, 0, 1):
        with drawn(fraction):
            found = [agent.retry_delay(interval, count, retry_after) for count in range(1, 7)]
            assert found == [delay * factor for delay in delays]
            # Nor does a float overflow after years.
            assert agent.retry_delay(interval, 1_000_000, retry_after) == interval * factor


@pytest.mark.parametrize(
    ("retry_after", "failures", "delays"),
    [
        (60, 1, [60, 75, 120]),
        (3600, 1, [3600, 4500, 7200]),
        (3600, 7, [3600, 4500, 7200]),
        # The agent's own 450, 562.5 and 900 s.
        (400, 7, [450, 562.5, 900]),
        (500, 7, [500, 625, 1000]),
    ],
)
def test_retry_after_only_lengthens_a_wait(
    retry_after: int, failures: int, delays: list[float]
) -> None:
    for fraction, delay in zip((0, 0.25, 1), delays, strict=True):
        with drawn(fraction):
            assert agent.retry_delay(900, failures, retry_after) == delay


def test_first_report_goes_out_at_once_and_systemd_hears_before_each_wait() -> None:
    world = World(None, DOWN, None)
    world.loop().run(3)
    assert world.tries[0] == START
    assert world.did == ["collect", "report", "wait"] * 3
    # Every try collects anew.
    assert world.sent == [str(began) for began in world.tries]


@pytest.mark.parametrize(
    ("takes", "wait"), [(0, 900), (1.5, 898.5), (899, 1), (900, 0), (901, 0), (5000, 0)]
)
def test_next_cycle_begins_an_interval_after_this_one_or_at_once(takes: float, wait: float) -> None:
    world = World(takes=takes)
    world.loop().run(4)
    assert world.waits == [wait] * 4
    assert world.gaps == [max(900, takes)] * 3


@pytest.mark.parametrize(
    "failure",
    [
        *(DOWN, BUSY, agent.AgentError("the token lacks VM.Audit")),
        *(agent.HTTPError("", status=status) for status in (302, 401, 403, 404, 429, 595)),
        *(OSError(), KeyError(), TypeError(), MemoryError(), RecursionError()),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogate"),
    ],
    ids=lambda failure: f"{type(failure).__name__}{getattr(failure, 'status', '')}",
)
@pytest.mark.parametrize("place", ["collect", "report"])
def test_whatever_fails_is_tried_again_soon(failure: Exception, place: Place) -> None:
    world = World(*[failure] * 3, None, failure, None, place=place)
    world.loop().run(6)
    # A success starts the count anew.
    assert world.gaps == [15, 60, 240, 900, 15]
    accepted = ["accepted" in status for status in world.notified]
    assert accepted == [False, False, False, True, False, True]


def test_each_delay_has_a_random_number_of_its_own() -> None:
    world = World(DOWN)
    with drawn(0, 0.5, 1):
        world.loop().run(3)
    assert world.waits == [7.5, 45, 240]


@pytest.mark.parametrize("place", ["collect", "report"])
def test_retry_after_decides_when_the_next_try_comes(place: Place) -> None:
    world = World(agent.HTTPError("", status=503, retry_after=120), None, place=place)
    with drawn(0.25):
        world.loop().run(3)
    assert world.gaps == [150, 900]


@pytest.mark.parametrize(
    ("requested", "interval"),
    # The last is more than a float holds.
    [(None, 900), (300, 300), (60, 60), (59, 60), (-5, 60), (3601, 3600), (10**400, 3600)],
    ids=lambda value: str(value)[:5],
)
def test_requested_interval_is_clamped_and_holds_at_once(
    requested: int | None, interval: int
) -> None:
    world = World(requested, takes=2)
    loop = world.loop()
    loop.run(3)
    assert loop.interval == interval
    assert world.gaps == [interval] * 2


def test_interval_outlasts_failures_and_replies_that_request_none() -> None:
    world = World(120, DOWN, None, None)
    world.loop().run(5)
    assert world.gaps == [120, 15, 120, 120]


def test_failures_are_logged_when_they_begin_change_and_end(log: pytest.LogCaptureFixture) -> None:
    World(DOWN, DOWN, BUSY, BUSY, None, DOWN, None).loop().run(8)
    levels, lines = zip(*(line for line in messages(log) if line[0] != "DEBUG"), strict=True)
    assert levels == ("WARNING", "WARNING", "INFO", "WARNING", "INFO")
    assert (lines[0], lines[1], lines[3]) == (str(DOWN), str(BUSY), str(DOWN))
    assert lines[2] == "report: problem resolved after 4 failed attempts"
    assert lines[4] == "report: problem resolved after 1 failed attempt"


def test_status_says_how_it_went_and_when_the_next_report_is_due() -> None:
    world = World(None, DOWN, BUSY, ValueError("of ours"), None, takes=1)
    with drawn(0):
        world.loop().run(5)
    expected = [
        r"last report \d\d:\d\d:\d\d accepted, 12 guests, next in 899 s",
        rf"1 failed attempt: {DOWN}, next in 8 s",
        rf"2 failed attempts: {BUSY}, next in 30 s",
        r"3 failed attempts: bug in the agent, .*: ValueError, next in 120 s",
        r"last report \d\d:\d\d:\d\d accepted, 12 guests, next in 899 s",
    ]
    for status, pattern in zip(world.notified, expected, strict=True):
        assert re.fullmatch(pattern, status)
