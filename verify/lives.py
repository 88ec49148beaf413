"""The lives of a payment that `orders` tries: which facts happen, what must come before what, and how it must end.

What is equivalent: any order that keeps the few causes below (`after`), with any idempotent fact heard twice, and with
the workers turning anywhere in between, ends in one state. The order legitimately decides three things, no more:

- which of two attempts pays the checkout: the one whose capture comes first (the other is PAID_TWICE), so the payer
  is part of the class;
- whether an ended purchase has a row: money that is refunded in full before the purchase worker comes buys nothing,
  after it the purchase is there and ended. Both take nobody's time and owe nothing;
- which sessions go when a refund names their numbers: before they are numbered it takes the last ones. The count is
  the same.

Dates count too, except after an outage: there it depends on what was booked when it began, so only their number, their
time of day and that they are to come is compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from verify.world import PRICES, SESSIONS

PRICE = PRICES[SESSIONS]
Trainer = Literal["free", "booked", "away", "never"]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that happens once. `after`: what causes it. `twice`: the world may say it again at any later time."""

    name: str
    act: str
    args: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()
    twice: bool = False


@dataclass(frozen=True, slots=True)
class Life:
    """`trainer`: the only one is free, booked by somebody else or away until `freed`, or never free."""

    name: str
    facts: tuple[Fact, ...]
    mode: str = "online"
    located: bool = True
    trainer: Trainer = "free"
    coins: int = 0
    outage: bool = False
    dates: bool = True
    kinds: tuple[str, ...] = field(default=())


# -- the facts

BUY = Fact("buy", "buy")
A_SUCCEEDED = Fact("A succeeded", "succeeded", ("A",), twice=True)
A_FAILED = Fact("A failed", "failed", ("A",), twice=True)
A_CONFIRMED = Fact("A confirmed", "confirm", ("A",), ("buy",), twice=True)
ATTEMPT = Fact("second attempt", "attempt", (), ("buy",))
B_SUCCEEDED = Fact("B succeeded", "succeeded", ("B",), ("second attempt",), twice=True)
B_FAILED = Fact("B failed", "failed", ("B",), ("second attempt",), twice=True)
A_REFUNDED = Fact("A refunded", "provider_refund", ("A", PRICE, "full"), twice=True)
A_REFUNDED_THIRD = Fact("A a third refunded", "provider_refund", ("A", PRICE // 3, "third"), twice=True)
A_REFUNDED_REST = Fact("A the rest refunded", "provider_refund", ("A", PRICE - PRICE // 3, "rest"), twice=True)
FULL = Fact("operator refunds A", "refund", ("A", None, None), ("buy", "A succeeded"))
ONE_LESS = Fact("one session refunded", "refund", ("A", PRICE // 4, 1), ("buy", "A succeeded"))
TWO_LESS = Fact("two sessions refunded", "refund", ("A", PRICE // 2, 2), ("buy", "A succeeded"))
NAMED = Fact("sessions 2 and 3 refunded", "refund", ("A", PRICE // 2, (2, 3)), ("buy", "A succeeded"))
LOCATED = Fact("a location arrives", "locate", twice=True)
FREED = Fact("the trainer is freed", "free", twice=True)
OUTAGE = Fact("outage", "outage", (), ("buy",))


def _later(fact: Fact, *after: str) -> Fact:
    return Fact(fact.name, fact.act, fact.args, (*fact.after, *after), fact.twice)


# Asking for more is refused once money came: the second attempt is made before any.
A_LATE = _later(A_SUCCEEDED, "second attempt")
A_REFUNDED_LATE = _later(A_REFUNDED, "second attempt")

PLAIN = (BUY, A_SUCCEEDED)
FAILS = (BUY, A_FAILED, A_SUCCEEDED)
TWO_ATTEMPTS = (BUY, A_FAILED, ATTEMPT, B_SUCCEEDED, A_LATE)

LIVES: tuple[Life, ...] = (
    Life("paid", (*PLAIN, A_CONFIRMED), kinds=("duplicate confirm",)),
    Life("failed", (BUY, A_FAILED), coins=10),
    Life("late success", (*FAILS, A_CONFIRMED), coins=10, kinds=("late success",)),
    Life("second attempt", (BUY, A_FAILED, ATTEMPT, B_SUCCEEDED), coins=10),
    Life("second attempt failed", (BUY, ATTEMPT, B_FAILED, A_LATE), coins=10),
    Life("paid twice", TWO_ATTEMPTS, kinds=("second capture",), coins=10),
    Life("paid twice, one refunded", (*TWO_ATTEMPTS, A_REFUNDED_LATE), kinds=("second capture", "full refund")),
    Life(
        "paid twice in parts",
        (BUY, ATTEMPT, B_SUCCEEDED, A_LATE, _later(A_REFUNDED_THIRD, "second attempt")),
        kinds=("second capture", "partial refund"),
    ),
    Life("refunded by the provider", (*FAILS, A_REFUNDED), kinds=("full refund",)),
    Life("refunded in parts by the provider", (*PLAIN, A_REFUNDED_THIRD, A_REFUNDED_REST), kinds=("partial refund",)),
    Life("refunded by an operator", (*FAILS, FULL), coins=10, kinds=("full refund",)),
    Life("one session less", (*FAILS, ONE_LESS), kinds=("partial refund",)),
    Life("three sessions less", (*PLAIN, ONE_LESS, TWO_LESS), kinds=("partial refund",)),
    Life("named sessions less", (*PLAIN, NAMED, A_CONFIRMED), dates=False, kinds=("partial refund",)),
    Life("less, then nothing", (*PLAIN, ONE_LESS, _later(FULL, ONE_LESS.name)), kinds=("partial refund",)),
    Life("a third back, one session less", (*PLAIN, A_REFUNDED_THIRD, ONE_LESS), kinds=("partial refund",)),
    Life("no place yet", (*FAILS, LOCATED), mode="home", located=False, kinds=("location",)),
    Life("no place, less", (*PLAIN, LOCATED, ONE_LESS, A_CONFIRMED), mode="home", located=False, kinds=("location",)),
    Life("no place, refunded", (*PLAIN, LOCATED, A_REFUNDED), mode="home", located=False, kinds=("location",)),
    Life("never a place", (*FAILS, ONE_LESS), mode="home", located=False, kinds=("location",)),
    Life("trainer booked", (*FAILS, FREED), trainer="booked", kinds=("trainer freed",)),
    Life("trainer booked, less", (*PLAIN, FREED, ONE_LESS, TWO_LESS), trainer="booked", kinds=("trainer freed",)),
    Life("trainer booked, refunded", (*PLAIN, FREED, FULL), trainer="booked", kinds=("trainer freed",)),
    Life("trainer away", (*FAILS, FREED), trainer="away", kinds=("trainer freed",)),
    Life("never a trainer", (*FAILS, A_REFUNDED_THIRD), trainer="never"),
    Life(
        "no place, no trainer",
        (*FAILS, LOCATED, FREED),
        mode="home",
        located=False,
        trainer="booked",
        kinds=("location", "trainer freed"),
    ),
    Life(
        "everything",
        (*TWO_ATTEMPTS, LOCATED, FREED, A_REFUNDED_LATE),
        mode="home",
        located=False,
        trainer="away",
        kinds=("second capture", "location", "trainer freed", "full refund"),
    ),
    Life("outage", (*FAILS, OUTAGE), outage=True, dates=False, kinds=("outage",)),
    Life("outage, less", (*PLAIN, ONE_LESS, OUTAGE), outage=True, dates=False, kinds=("outage", "partial refund")),
    Life("outage, refunded", (*PLAIN, A_REFUNDED, OUTAGE), outage=True, dates=False, kinds=("outage", "full refund")),
    Life(
        "outage, paid twice",
        (*TWO_ATTEMPTS, _later(OUTAGE, ATTEMPT.name)),
        outage=True,
        dates=False,
        kinds=("outage", "second capture"),
    ),
    Life(
        "outage, no place",
        (*PLAIN, LOCATED, A_CONFIRMED, OUTAGE),
        mode="home",
        located=False,
        outage=True,
        dates=False,
        kinds=("outage", "location"),
    ),
)
KINDS = tuple(sorted({kind for life in LIVES for kind in life.kinds}))


# -- their orders


def orders_of(life: Life, most: int, dice: random.Random) -> list[tuple[Fact, ...]]:
    """All orders that keep the causes; where there are more than `most`, so many of them by chance."""
    found: list[tuple[Fact, ...]] = []
    for order in _extend((), life.facts):
        found.append(order)
        if len(found) > most:
            return [_any_order(life.facts, dice) for _ in range(most)]
    dice.shuffle(found)
    return found


def _ready(done: Sequence[Fact], left: Sequence[Fact]) -> list[Fact]:
    names = {fact.name for fact in done}
    return [fact for fact in left if names.issuperset(fact.after)]


def _extend(done: tuple[Fact, ...], left: tuple[Fact, ...]) -> Any:
    if not left:
        yield done
    for fact in _ready(done, left):
        yield from _extend((*done, fact), tuple(other for other in left if other is not fact))


def _any_order(facts: tuple[Fact, ...], dice: random.Random) -> tuple[Fact, ...]:
    done: tuple[Fact, ...] = ()
    while len(done) < len(facts):
        done = (*done, dice.choice(_ready(done, [fact for fact in facts if fact not in done])))
    return done


def with_echoes(order: Sequence[Fact], dice: random.Random) -> list[Fact]:
    """The order, with some of what can be said twice said again later."""
    heard = list(order)
    for fact in order:
        if fact.twice and dice.random() < 0.4:
            place = max(place for place, other in enumerate(heard) if other is fact)
            heard.insert(dice.randint(place + 1, len(heard)), fact)
    return heard


# -- how they end


def payer_of(order: Sequence[Fact]) -> str | None:
    """Whose capture came first: heard, and there to be captured."""
    names = [fact.name for fact in order]

    def captured(role: str) -> int | None:
        heard = [names.index(name) for name in (f"{role} succeeded", f"{role} confirmed") if name in names]
        return max(min(heard), names.index("buy")) if heard else None

    places = {role: place for role in "AB" if (place := captured(role)) is not None}
    return min(places, key=lambda role: places[role]) if places else None


def must_end(life: Life, order: Sequence[Fact]) -> dict[str, dict[str, Any]]:
    """By role: the payment's status and stage, why it waits, and how its sessions add up; said without the product."""
    names = {fact.name for fact in life.facts}
    payer = payer_of(order)
    ends: dict[str, dict[str, Any]] = {}
    for role in "AB" if ATTEMPT.name in names else "A":
        captured = {f"{role} succeeded", f"{role} confirmed"} & names
        if not captured:
            status = "failed" if f"{role} failed" in names else "created"
            ends[role] = {"status": status, "stage": None, "reason": None, "scheduled": 0, "owed": 0, "refunded": 0}
            continue
        ends[role] = _captured_end(life, role, payer == role)
    return ends


def _captured_end(life: Life, role: str, paid: bool) -> dict[str, Any]:
    refunds = [fact for fact in life.facts if fact.act in ("provider_refund", "refund") and fact.args[0] == role]
    cents = sum(
        (fact.args[1] if fact.args[1] is not None else PRICE) for fact in refunds
    )  # an operator's full refund gives what is left
    taken = sum(_count(fact.args[2]) for fact in refunds if fact.act == "refund" and fact.args[1] is not None)
    if cents >= PRICE:
        return {"status": "refunded", "stage": "refunded", "reason": None, "scheduled": 0, "owed": 0, "refunded": None}
    status = "partially_refunded" if refunds else "succeeded"
    if not paid:
        return {
            "status": status, "stage": "paid", "reason": "PAID_TWICE", "scheduled": 0, "owed": SESSIONS, "refunded": 0
        }  # fmt: skip
    names = {fact.name for fact in life.facts}
    reason = None
    if not life.located and LOCATED.name not in names:
        reason = "STUDENT_LOCATION_MISSING"
    elif life.trainer == "never" or (life.trainer != "free" and FREED.name not in names):
        reason = "NO_TRAINER_AVAILABLE"
    left = SESSIONS - taken
    return {
        "status": status,
        "stage": "purchased" if reason else "scheduled",
        "reason": reason,
        "scheduled": 0 if reason else left,
        "owed": left if reason else 0,
        "refunded": taken,
    }


def _count(sessions: int | tuple[int, ...]) -> int:
    return sessions if isinstance(sessions, int) else len(sessions)
