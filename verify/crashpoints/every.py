"""The list: every entry of the product, each in the states in which it does something."""

from __future__ import annotations

from typing import Any

from tests.redis_server import missing as redis_missing
from verify.crashpoints import prepare as p
from verify.crashpoints.cached import Fence, Look, Publish
from verify.crashpoints.push import Push
from verify.crashpoints.stage import Answer, Case, Stage
from verify.crashpoints.steps import (
    ALLOCATIONS,
    NOTE,
    PURCHASES,
    SESSION_GROUP,
    VIEWS,
    Ask,
    Life,
    Refill,
    Round,
    Step,
    Turn,
    add_to_cart,
    another_attempt,
    be_absent,
    be_captured_elsewhere,
    be_lost,
    confirm,
    create_purchases,
    dead_lettered,
    deal_with,
    dismiss,
    end_pause,
    in_its_city,
    let_go_on,
    locate_student,
    make_known,
    none_is_unclaimed,
    order,
    post,
    refund_part,
    release_all,
    replay_all,
    resume_all,
    webhook,
)

AT_HOME = {"mode": "home", "located": False}
UNPLACED = p.paid("purchase-worker", "allocation-worker", **AT_HOME)
EVERYONE_APART = {"hour": 6}
APART = p.paid(*p.EVERYBODY, **EVERYONE_APART)
PURCHASE, ALLOCATE, SCHEDULE = "purchase-worker", "allocation-worker", "session-worker"
MISSED = {
    "purchase": (p.paid(), p.lose(PURCHASES, "PURCHASE_CONFIRMED"), "PurchaseMissing"),
    "allocation": (p.paid(PURCHASE), p.lose(ALLOCATIONS, "PURCHASE_CREATED"), "AllocationMissing"),
    "sessions": (p.paid(PURCHASE, ALLOCATE), p.lose(SESSION_GROUP, "TRAINER_ALLOCATED"), "SessionsMissing"),
    "owed": (p.delivered, p.owe_a_session, "SessionsOwed"),
    "unregistered": (p.delivered, p.lose_sessions, "register"),
    "kept": (p.delivered, p.keep_listed, "register"),
    "webhook": (p.bought(), p.store_webhook, "webhooks"),
}
IN_ITS_TURN = ("feed",)  # one payment's news may come before or after the other's
AGAIN = ("audit",)  # a button pressed twice is two rows of the audit


def list_steps() -> list[Step]:
    """All of them, new each time: a step keeps its worker while it plays."""
    return [
        *_money(), *_operator(), *_purchase_group(), *_allocation_group(), *_other_groups(), *_reconciler(),
        *_worst_day(), *_cached(),
    ]  # fmt: skip


def _money() -> list[Step]:
    return [
        Ask("create", p.newcomers, request=order()),
        Ask("create-with-coins", lambda s, n: p.newcomers(s, n, coins=100), request=order(coins=100)),
        Ask("create-free", lambda s, n: p.newcomers(s, n, coins=480), request=order(coins=480)),
        Ask("another-attempt", p.bought(coins=100), request=another_attempt),
        Ask("confirm", p.bought(), request=post("/payments/{payment}/confirm", {})),
        Ask("confirm-with-coins", p.bought(coins=100), request=post("/payments/{payment}/confirm", {})),
        Ask("webhook-succeeded", p.bought(), request=webhook("payment.succeeded")),
        Ask("webhook-mismatch", p.bought(), request=webhook("payment.succeeded", cents=500)),
        Ask("webhook-failed", p.bought(coins=100), request=webhook("payment.failed")),
        Ask("webhook-late", p.then(p.bought(), fail), request=webhook("payment.succeeded")),
        Ask("webhook-second-capture", SECOND_CAPTURE, request=webhook("payment.succeeded"), loose=IN_ITS_TURN),
        Ask("webhook-refunded", p.delivered, request=webhook("payment.refunded")),
        Ask("webhook-part-refunded", p.delivered, request=webhook("payment.refunded", cents=100)),
        Ask("webhook-refund-first", p.bought(), request=webhook("payment.refunded")),
        Ask("cart", p.bought(), request=add_to_cart),
    ]


async def fail(stage: Stage, case: Case) -> None:
    await stage.world.webhook(case.payment, "payment.failed")


async def second(stage: Stage, case: Case) -> None:
    """A later attempt paid the checkout; the earlier one hears of its success now."""
    other = await p.attempt_again(stage, case)
    await stage.world.pay([other])
    case.payments.append(other)


SECOND_CAPTURE = p.then(p.bought(), second)


def _operator() -> list[Step]:
    money = "/admin/payments/{payment}"
    twice = p.then(p.bought(), p.pay_twice, work=p.EVERYBODY)
    no_trainer = p.no_trainers(p.paid(PURCHASE, ALLOCATE))
    begun = p.then(p.delivered, p.have_begun)
    patch_student = post("/students/{student}", NOTE | {"latitude": 28.6, "longitude": 77.2}, "PATCH")
    leave = post("/admin/trainers/{trainer}", NOTE | {"active": False}, "PATCH")
    return [
        Ask("refund", p.delivered, request=post(money + "/refund"), settled=["NOT_REFUNDABLE"]),
        Ask("refund-early", p.paid(), request=post(money + "/refund"), settled=["NOT_REFUNDABLE"]),
        Ask("refund-part", p.delivered, request=refund_part),
        Ask("refund-as-coins", twice, request=post(money + "/refund", NOTE | {"asCoins": True}), settled=PAID_BACK),
        Ask("accept", p.then(p.bought(), p.pay_too_little), request=post(money + "/accept"), settled=ACCEPTED),
        Ask("hold", p.paid(), request=post(money + "/hold"), settled=["ALREADY_HELD"], finish=release_all),
        Ask("release", p.then(p.paid(), p.hold), request=post(money + "/release"), settled=["NOT_HELD"]),
        Ask("mend-payment", p.imported, request=post(money, NOTE | {"sessionCount": 4}, "PATCH"), settled=KNOWN),
        Ask("mend-purchase", no_trainer, request=another_slot, settled=["PURCHASE_NOT_WAITING"]),
        Ask("auto-assign", no_trainer, request=auto_assign),
        Ask("approve", UNPLACED, p.find_the_student, request=post("/admin/allocations/{allocation}/approve")),
        Ask("sessions", p.paid(PURCHASE, ALLOCATE), request=post("/admin/allocations/{allocation}/sessions")),
        Ask("trainer-absent", begun, request=marked("trainer_absent"), loose=AGAIN),
        Ask("session-completed", begun, request=marked("completed"), loose=AGAIN),
        Ask("student-moves", UNPLACED, request=patch_student),
        Ask("trainer-leaves", APART, request=leave, trainers=90),
        Ask("replay", dead_lettered(p.paid()), request=post("/admin/dead-letters/{letter}/replay"), settled=RESOLVED),
        Ask(
            "discard",
            dead_lettered(p.paid()),
            request=post("/admin/dead-letters/{letter}/discard"),
            settled=RESOLVED,
            finish=create_purchases,
        ),
        *(
            Ask(f"repair-{name}", state, lost, request=post(money + "/repair"), loose=AGAIN)
            for name, (state, lost, _task) in MISSED.items()
        ),
    ]


PAID_BACK, ACCEPTED, KNOWN, RESOLVED = (
    ["NOT_REFUNDABLE"],
    ["NOTHING_TO_ACCEPT"],
    ["TERMS_KNOWN"],
    ["DEAD_LETTER_RESOLVED"],
)


async def another_slot(stage: Stage, case: Case) -> Answer:
    body = NOTE | {"timeSlot": f"{case.know['hour']:02d}:30"}
    return await stage.ask("PATCH", f"/api/v1/admin/purchases/{case.know['purchase']}", body)


async def auto_assign(stage: Stage, case: Case) -> Answer:
    body = NOTE | {"purchaseId": str(case.know["purchase"])}
    return await stage.ask("POST", "/api/v1/admin/allocations/auto-assign", body)


def marked(status: str) -> Any:
    return post("/admin/purchases/{purchase}/sessions/1", NOTE | {"status": status})


def _purchase_group() -> list[Step]:
    refunded, part = p.then(p.delivered, p.refund_all), p.then(p.delivered, p.refund_part)
    known = p.then(p.strangers, make_known)
    return [
        Turn("purchases", p.then(p.bought(), p.fill_cart, confirm), group=PURCHASES),
        Turn("purchases-many", p.paid(), group=PURCHASES, size=3),
        Turn("purchases-twice-paid", p.then(p.bought(), p.pay_twice), group=PURCHASES),
        Turn("purchases-refunded-early", p.then(p.paid(), p.refund_all), group=PURCHASES),
        Turn("purchases-refund", refunded, group=PURCHASES, types=("PURCHASE_REFUNDED",)),
        Turn("purchases-refund-part", part, group=PURCHASES, types=("PURCHASE_REFUNDED",)),
        Turn("purchases-resumed", known, group=PURCHASES, types=("STUDENT_UPDATED",)),
        Turn("poison", p.paid(), group=PURCHASES, size=3, poisoned=True, tries=40, finish=replay_all),
        Life("worker-life", p.bought(), confirm, group=PURCHASES),
    ]


def _allocation_group() -> list[Step]:
    refunded = p.then(p.delivered, p.refund_all, work=[PURCHASE])
    part = p.then(p.delivered, p.refund_part, work=[PURCHASE])
    left = p.then(APART, dismiss)
    located = p.then(UNPLACED, locate_student)
    changed = p.then(p.delivered, p.have_begun, be_absent)
    return [
        Turn("allocations", p.paid(PURCHASE), group=ALLOCATIONS, types=("PURCHASE_CREATED",)),
        Turn("allocations-many", p.paid(PURCHASE), group=ALLOCATIONS, types=("PURCHASE_CREATED",), size=3),
        Turn("allocations-wait", p.paid(PURCHASE, **AT_HOME), group=ALLOCATIONS, types=("PURCHASE_CREATED",)),
        Turn("allocations-refund", refunded, group=ALLOCATIONS, types=("PURCHASE_REFUNDED",)),
        Turn("allocations-refund-part", part, group=ALLOCATIONS, types=("PURCHASE_REFUNDED",)),
        Turn("allocations-located", located, group=ALLOCATIONS, types=("STUDENT_UPDATED",)),
        Turn("allocations-left", left, group=ALLOCATIONS, types=("TRAINER_UPDATED",), trainers=90),
        Turn("allocations-changed", changed, group=ALLOCATIONS, types=("SESSION_CHANGED",)),
    ]


def _other_groups() -> list[Step]:
    scheduled = p.paid(PURCHASE, ALLOCATE)
    undone = p.then(p.delivered, p.refund_all, work=[PURCHASE, ALLOCATE])
    seen = ("PURCHASE_CREATED", "COURSE_ACCESS_GRANTED")
    return [
        Turn("sessions-new", scheduled, group=SESSION_GROUP, types=("TRAINER_ALLOCATED",)),
        Turn("sessions-many", scheduled, group=SESSION_GROUP, types=("TRAINER_ALLOCATED",), size=3),
        Turn("sessions-refund", undone, group=SESSION_GROUP, types=("PURCHASE_REFUNDED",)),
        Turn("sessions-released", undone, group=SESSION_GROUP, types=("BOOKING_RELEASED",)),
        Turn("views", p.paid(PURCHASE), group=VIEWS, types=seen, per_student=2),
        Push("push", p.delivered),
    ]


def _reconciler() -> list[Step]:
    housekeeping = ("answers", "sign-ins", "login attempts")
    return [
        *(Round(f"reconcile-{name}", state, lost, task=task) for name, (state, lost, task) in MISSED.items()),
        Round("reconcile-forgotten", p.paid(PURCHASE), p.forget, task="register"),
        Round("reconcile-waiting", UNPLACED, p.find_the_student, task="waiting"),
        Round("reconcile-coins", p.bought(coins=100), p.let_coins_expire, task="coins"),
        Round("reconcile-time", p.newcomers, p.let_time_stand, task="trainers' time"),
        Round("reconcile-log", p.newcomers, p.lack_a_partition, task="log"),
        *(Round(f"reconcile-{name.replace(' ', '-')}", p.newcomers, task=name) for name in housekeeping),
    ]


def _worst_day() -> list[Step]:
    apart = p.then(p.paid(PURCHASE), p.live_apart)
    stopped = p.then(apart, p.stop_city, work=[ALLOCATE])
    state, lost, _task = MISSED["allocation"]
    stuck = p.then(p.two_each(state), lost, p.live_apart)
    late = p.then(p.paid(PURCHASE), p.let_start_pass, work=[ALLOCATE])
    strange = p.then(p.newcomers, p.be_unclaimed)
    pause, resume = in_its_city("/pauses", stage="purchased"), in_its_city("/pauses/resume", stage="purchased")
    return [
        Ask("pause", apart, request=pause, settled=["ALREADY_PAUSED"], finish=resume_all),
        Ask("resume", stopped, request=resume, settled=["NOT_PAUSED"], finish=let_go_on),
        Round("reconcile-resumed", stopped, end_pause, task="resumed"),
        Ask("repair-many", stuck, request=in_its_city("/repairs", all=True), loose=AGAIN, size=2),
        Ask(
            "confirm-start",
            late,
            request=post("/admin/payments/{payment}/confirm-start"),
            settled=["NO_START_TO_CONFIRM"],
        ),
        Ask("dealt-with", strange, request=deal_with, settled=["NOT_UNCLAIMED"], finish=none_is_unclaimed),
        Refill("refill", p.then(p.bought(), be_captured_elsewhere)),
        Refill("refill-remade", p.then(p.bought(), be_captured_elsewhere, be_lost)),
    ]


def _cached() -> list[Step]:
    """With a Redis, where there is one (the part `redis` says so where there is none)."""
    if redis_missing():
        return []
    created = ("PURCHASE_CREATED", "COURSE_ACCESS_GRANTED")
    return [
        Look("look", p.delivered),
        Fence("fence", p.paid(PURCHASE), group=VIEWS, types=created, per_student=2),
        Publish("publish", p.delivered),
    ]
