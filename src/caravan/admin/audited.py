"""One audit row around a button of a payment: what was so before, what is so after, who, why."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from caravan.db import Tx
from caravan.fulfilment.diagnose import Finding, explain
from caravan.fulfilment.facts import Facts, gather_facts
from caravan.fulfilment.repair import LOCK_PAYMENT, PaymentNotFound
from caravan.web import audit
from caravan.web.auth import Actor


async def look(tx: Tx, payment_id: UUID) -> tuple[Facts, Finding]:
    """The payment as it is, locked until the end. Raises PaymentNotFound."""
    if await tx.value(LOCK_PAYMENT, {"payment_id": payment_id}) is None:
        raise PaymentNotFound
    (facts,) = await gather_facts(tx, [payment_id])
    return facts, explain(facts, tx.now)


def _snapshot(facts: Facts, finding: Finding) -> dict[str, Any]:
    """What an audit row says of a payment."""
    return {
        "status": facts.status,
        "stage": finding.stage,
        "reason": finding.reason,
        "refundedCents": facts.refunded_cents,
        "purchaseId": facts.purchase_id,
        "allocationId": facts.allocation_id,
        "allocationStatus": facts.allocation_status,
        "trainerId": facts.trainer_id,
        "scheduled": facts.scheduled,
        "owed": facts.owed,
    }


@dataclass(slots=True)
class _Change:
    """What was so before; `did` is told in the audit row, where there is more to tell than the difference."""

    facts: Facts
    finding: Finding
    did: str | None = None


@asynccontextmanager
async def audited(
    tx: Tx,
    actor: Actor,
    action: str,
    payment_id: UUID,
    note: str | None,
    *,
    subject: tuple[str, UUID] | None = None,
    asked: Mapping[str, Any] | None = None,
    only_changes: bool = False,
) -> AsyncGenerator[_Change]:
    """One audit row around a change: what was so before, what is so after, and what was asked for."""
    facts, finding = await look(tx, payment_id)
    change = _Change(facts, finding)
    yield change
    before, after = _snapshot(facts, finding), _snapshot(*await look(tx, payment_id))
    if only_changes and before == after:
        return
    kind, subject_id = subject or ("payment", payment_id)
    after |= {"asked": asked} if asked else {}
    after |= {"did": change.did} if change.did else {}
    await audit.record(
        tx, actor, action=action, subject_type=kind, subject_id=subject_id, note=note, before=before, after=after
    )
