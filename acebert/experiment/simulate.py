"""Send the searches, clicks and purchases of a rehearsal to a running service, over HTTP.

What a shopper does is drawn from (seed, number of the search) alone, so it depends neither on what
others do nor on how many search at once. A search that is sent again has the same id, and counts
once.
"""

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from rich.table import Table

from acebert.errors import UserError
from acebert.evaluation.tables import printed
from acebert.experiment.shoppers import PURCHASE, Search
from acebert.experiment.statistics import PerUser, lift, needed

log = logging.getLogger(__name__)

TRIES = 6
FIRST_WAIT = 0.5  # s, doubled with each try
PROGRESS_SECONDS = 10.0
TIMEOUT = aiohttp.ClientTimeout(total=60)


@dataclass
class Sent:
    """What one arm's shoppers saw and did; `arm` None: drafts of both."""

    searches: int = 0
    purchases: int = 0
    shown: Counter[str] = field(default_factory=Counter)
    """products by user"""
    clicks: Counter[str] = field(default_factory=Counter)
    """by user"""
    expected: float = 0.0
    """clicks that the click model expects on what was shown"""

    def add(self, user: str, shown: int, clicks: int, purchases: int, expected: float) -> None:
        """One search more."""
        self.searches += 1
        self.purchases += purchases
        self.shown[user] += shown
        self.clicks[user] += clicks
        self.expected += expected

    @property
    def ctr(self) -> PerUser:
        shown = np.array(list(self.shown.values()), float)
        return PerUser(np.array([self.clicks[user] for user in self.shown], float), shown)

    @property
    def expected_ctr(self) -> float:
        return self.expected / max(self.shown.total(), 1)


async def send(
    url: str,
    searches: Sequence[Search],
    shown: int,
    at_once: int,
    seed: int,
    key: str | None = None,
) -> dict[str | None, Sent]:
    """By arm.

    Args:
        url: of the service, without a slash at the end.
        shown: products asked for.
        at_once: searches under way.
        key: the service's API key.

    Raises:
        UserError: the service cannot be reached, runs no experiment, refuses the key or a search,
            or finds products that the click model does not know.
    """
    run = uuid.uuid4().hex[:16]
    sent: dict[str | None, Sent] = {}
    todo = iter(enumerate(searches))
    start = told = time.monotonic()
    headers = {"X-API-Key": key} if key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=TIMEOUT) as session:
        service = _Service(session, url)
        await service.ask("GET", "/ready", tries=1)

        async def shopper(todo: Iterator[tuple[int, Search]]) -> None:
            nonlocal told
            for number, search in todo:
                arm, seen = await _shop(service, search, shown, f"{run}-{number}", [seed, number])
                sent.setdefault(arm, Sent()).add(search.user, *seen)
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    done = sum(of.searches for of in sent.values())
                    rate = done / (told - start)
                    log.info("%s of %s searches, %.0f/s", f"{done:,}", f"{len(searches):,}", rate)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(shopper(todo))
        except ExceptionGroup as group:  # what stopped the first stops the others too
            raise group.exceptions[0] from None
    return sent


class _Service:
    """A running service."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self.url = session, url

    async def ask(self, method: str, path: str, tries: int = TRIES, **what: Any) -> dict[str, Any]:
        """The answer's JSON; again and again while the service is overloaded or restarts."""
        for tried in range(1, tries + 1):
            try:
                async with self._session.request(method, self.url + path, **what) as response:
                    if response.status < 400:
                        return dict(await response.json())
                    reason = f"status {response.status}, {(await response.text())[:300]}"
                    if response.status == 401:
                        reason += " (its key is read from ACEBERT_API_KEY)"
                    if response.status < 500:
                        break
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"cannot be reached ({error or type(error).__name__})"
            if tried < tries:
                await asyncio.sleep(FIRST_WAIT * 2 ** (tried - 1))
        raise UserError(f"{self.url}: {method} {path}: {reason}")


async def _shop(
    service: _Service, search: Search, k: int, name: str, seed: list[int]
) -> tuple[str | None, tuple[int, int, int, float]]:
    """One search, and the events that follow from it.

    Returns:
        arm; products shown, clicks, purchases, clicks that the click model expects.
    """
    headers = {"X-User-Id": search.user, "X-Search-Id": name}
    asked = {"q": search.query, "k": str(k)}
    answer = await service.ask("GET", "/search", params=asked, headers=headers)
    if answer["search_id"] is None:
        raise UserError(
            f"{service.url} runs no experiment, or cannot log it: start it with "
            "experiment.name=NAME experiment.arms=CONTROL,TREATMENT (docs/serving.md, Experiments)"
        )
    ids = [hit["product_id"] for hit in answer["hits"]]
    chances = search.chances(ids)
    rng = np.random.default_rng(seed)
    clicked = np.flatnonzero(rng.random(len(ids)) < chances)
    bought = clicked[rng.random(len(clicked)) < PURCHASE]
    for action, rows in (("click", clicked), ("purchase", bought)):
        for row in rows:
            event = {"search_id": name, "action": action, "product_id": ids[row]}
            await service.ask("POST", "/events", json=event)
    return answer["arm"], (len(ids), len(clicked), len(bought), float(chances.sum()))


def sent_text(sent: dict[str | None, Sent], arms: Sequence[str]) -> str:
    """A table by arm, those in `arms` first; CTR beside what the click model expects, which has
    less noise: the lift that a long experiment would find, how many searches an arm needs to find
    it with 80 % power, and how many to tell the arm from the one above it: to see the order."""
    known = [arm for arm in arms if arm in sent]
    others = sorted((arm for arm in sent if arm not in known), key=str)
    table = Table("arm", title="sent", title_justify="left")
    for name in (
        *("searches", "clicks", "purchases", "CTR", "expected CTR", "expected lift"),
        *("searches\nto see it", "to tell it from\nthe arm above"),
    ):
        table.add_column(name, justify="right")
    in_order = [*known, *others]
    control = sent[in_order[0]]
    for number, arm in enumerate(in_order):
        of = sent[arm]
        expected, enough = "-", ["-", "-"]
        if of is not control and control.expected:
            expected = f"{of.expected_ctr / control.expected_ctr - 1:+.2%}"
            enough = [_searches(of, other) for other in (control, sent[in_order[number - 1]])]
        table.add_row(
            arm or "interleaved",
            *(f"{count:,}" for count in (of.searches, of.clicks.total(), of.purchases)),
            f"{of.ctr.value:.2%}",
            f"{of.expected_ctr:.2%}",
            expected,
            *enough,
        )
    return printed(table)


def _searches(of: Sent, other: Sent) -> str:
    """That an arm needs to find the expected lift of `of` over `other`."""
    size = of.expected_ctr / other.expected_ctr - 1 if other.expected else 0.0
    enough = of.searches * needed(lift(of.ctr, other.ctr), size) if size else float("nan")
    return f"{enough:,.0f}" if math.isfinite(enough) else "-"
