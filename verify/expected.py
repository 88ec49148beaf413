"""The model: what a payment, its checkout and its sessions have to come to, in plain Python, knowing nothing of the
product. It follows what happened in the order in which it happened; when workers turn does not matter to it."""

from __future__ import annotations

from dataclasses import dataclass, field

TIER = 4
DONE = ("completed", "student_absent")


@dataclass(slots=True, eq=False)
class Attempt:
    """A payment. `early`: refunds that the provider told of before the money came."""

    checkout: Checkout
    asked: int
    coins: int = 0
    status: str = "created"
    captured: int | None = None
    refunded: int = 0
    taken: int = 0  # sessions
    accepted: bool = False
    held: bool = False
    known: set[str] = field(default_factory=set[str])
    early: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    @property
    def live(self) -> bool:
        """Money that came and has not all gone back."""
        return self.captured is not None and self.status != "refunded"

    @property
    def left(self) -> int:
        return (self.captured or 0) - self.refunded

    @property
    def pays(self) -> bool:
        return self.checkout.payer is self

    @property
    def obstacle(self) -> str | None:
        if self.checkout.payer not in (None, self):
            return "PAID_TWICE"
        return None if self.accepted or self.captured == self.asked else "AMOUNT_MISMATCH"

    # -- what happens

    def succeed(self, cents: int) -> None:
        if self.status not in ("created", "failed"):
            return
        self.status, self.captured = "succeeded", cents
        self._settle()
        for refund_id, refunded in self.early:
            self.provider_refunds(refund_id, refunded)
        self.early.clear()

    def _settle(self) -> None:
        if self.live and self.checkout.payer is None and self.obstacle is None:
            self.checkout.payer = self

    def fail(self) -> None:
        if self.status == "created":
            self.status = "failed"

    def accept(self) -> bool:
        """False: there is nothing to accept."""
        if not self.live or self.obstacle != "AMOUNT_MISMATCH":
            return False
        self.accepted = True
        self._settle()
        return True

    def provider_refunds(self, refund_id: str, cents: int) -> None:
        if self.captured is None:
            self.early.append((refund_id, cents))
        elif refund_id not in self.known and self.live and 0 < cents <= self.left:
            self.known.add(refund_id)
            self._give_back(cents, 0)

    def operator_refunds(self, cents: int | None, sessions: int) -> bool:
        """False: refused."""
        cents = self.left if cents is None else cents
        full = cents == self.left
        room = TIER - self.taken - (self.checkout.done if self.pays else 0)
        if not self.live or cents > self.left or (not full and not 0 <= sessions <= room):
            return False
        self._give_back(cents, 0 if full else sessions)
        return True

    def _give_back(self, cents: int, sessions: int) -> None:
        self.refunded += cents
        self.taken += sessions
        self.status = "partially_refunded" if self.left else "refunded"
        self.held = self.held and self.live


@dataclass(slots=True, eq=False)
class Checkout:
    """`marks`: how its sessions went, by number. `open`: its time is not over."""

    home: bool
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    payer: Attempt | None = None
    open: bool = True
    marks: dict[int, str] = field(default_factory=dict[int, str])

    @property
    def done(self) -> int:
        return sum(mark in DONE for mark in self.marks.values())

    def mark(self, seq: int, mark: str) -> bool:
        """How a session went; a later word counts. False: refused, because no more can have been held."""
        marks = self.marks | {seq: mark}
        done = sum(each in DONE for each in marks.values())
        if mark in DONE and self.marks.get(seq) != mark and self.payer and done > TIER - self.payer.taken:
            return False
        self.marks = marks
        return True

    @property
    def may_retry(self) -> bool:
        return self.open and self.payer is None and not any(attempt.live for attempt in self.attempts)


@dataclass(slots=True)
class Town:
    """Everything: one student's checkouts, and who could teach them. Each is at an hour of its own."""

    located: bool = False
    trainers: list[bool] = field(default_factory=list[bool])  # who may be booked now
    checkouts: list[Checkout] = field(default_factory=list[Checkout])
    granted: int = 0
    pauses: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])  # stage and for whom

    def paused(self, stage: str) -> bool:
        """Nothing is delivered out of this stage; once it is over, everything is. `elsewhere` is none of our business,
        and who has no place lives in no city."""
        stops = ("everybody", "the course", "the city") if self.located else ("everybody", "the course")
        return any((stage, whom) in self.pauses for whom in stops)

    @property
    def attempts(self) -> list[Attempt]:
        return [attempt for checkout in self.checkouts for attempt in checkout.attempts]

    def waits_for(self, attempt: Attempt) -> str | None:
        """Why captured money has to wait, once the workers have done all they can; None: it is delivered.

        Where nobody may be booked, what was booked before stays: then the answer is a possibility.
        """
        if attempt.held:
            return "OPERATOR_HOLD"
        if attempt.obstacle:
            return attempt.obstacle
        if attempt.checkout.home and not self.located:
            return "STUDENT_LOCATION_MISSING"
        return None if any(self.trainers) else "NO_TRAINER"

    @property
    def coins(self) -> int:
        """What can be spent once all reservations are over."""
        return self.granted - sum(attempt.coins for attempt in self.attempts if attempt.live)
