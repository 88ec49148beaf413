"""Stages and reasons in an operator's words. Pure; families hear of them from student_views/wording."""

from __future__ import annotations

from typing import Final

REASONS: Final[dict[str, str]] = {
    "AMOUNT_MISMATCH": "Another amount came than was asked for.",
    "PAID_TWICE": "The same order was paid twice; this is the second payment.",
    "STUDENT_NOT_FOUND": "The payment names a student that is not in the books.",
    "COURSE_NOT_FOUND": "The payment names a course that is not in the books.",
    "TIER_UNKNOWN": "Nobody said how many sessions were bought.",
    "INVALID_SCHEDULE": "The slot or the start date can't be read, or no such dates exist.",
    "STUDENT_LOCATION_MISSING": "Sessions at home were bought, and nobody said where home is.",
    "STUDENT_CONFLICT": "The student has other sessions at these times.",
    "NO_TRAINER_AVAILABLE": "No trainer is free for all of its sessions.",
    "TRAINER_CONFLICT": "The trainer's time was taken by somebody else.",
    "TRAINER_LEFT": "The trainer left, and no other one is free for all that is to come.",
    "OPERATOR_HOLD": "An operator put it on hold.",
    "STAGE_PAUSED": "Operators have paused this stage; it goes on by itself when they resume it.",
    "START_PASSED": "The start that was chosen has passed while it was kept; somebody has to agree to a later one.",
    "WEBHOOK_NOT_RECEIVED": "The provider has not said whether it was paid.",
    "WEBHOOK_NOT_APPLIED": "The provider's word is stored, but has had no effect yet.",
    "NOT_REGISTERED": "The register of undelivered money does not fit what the tables say.",
    "EVENT_MISSING": "The event that should have moved it on was never said.",
    "EVENT_NOT_RELAYED": "The event that should move it on has not reached Kafka.",
    "NO_WORKER": "The worker that should move it on is not running.",
    "WORKER_BEHIND": "The worker that should move it on is behind.",
    "HANDLER_FAILING": "The worker fails on it again and again.",
    "IN_DEAD_LETTERS": "The worker gave it up after failing.",
    "MARKED_PROCESSED_BUT_MISSING": "It is marked as done, but what should be there is missing.",
    "SESSIONS_MISSING": "It has a trainer, but sessions are missing.",
    "VIEW_STALE": "It is delivered, but the family's screen shows it otherwise.",
    "ON_ITS_WAY": "On its way, nothing is wrong.",
    "NOT_LOOKED_AT": "Not looked at: there are too many.",
}

STAGES: Final[dict[str, str]] = {
    "created": "Asked to pay, not paid yet",
    "pending": "Being paid",
    "failed": "The payment failed: nothing was captured",
    "paid": "Paid, but the course is not added yet",
    "purchased": "The course is added, but it has no trainer yet",
    "allocated": "It has a trainer, but no sessions yet",
    "scheduled": "Delivered: the sessions are booked",
    "completed": "Completed: all sessions were held",
    "refunded": "The money was given back",
}


def reason_words(reason: str | None) -> str:
    """A sentence for a reason; an unknown one is shown as it is."""
    return REASONS.get(reason or "", (reason or "").replace("_", " ").capitalize() + "." if reason else "")


def stage_words(stage: str) -> str:
    """A sentence for a stage, or for the status of a payment without money."""
    return f"{STAGES.get(stage, stage)}."


def still_waits(reason: str) -> str:
    """What a repair has found that changed nothing: the same sentence for console, command and audit row."""
    why = reason_words(reason)
    return f"Looked again: it still waits, because {why[0].lower()}{why[1:]}"
