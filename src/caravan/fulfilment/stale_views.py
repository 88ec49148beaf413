"""A course that the family's screen shows otherwise than it is: rows were changed without an event (by hand, in SQL),
and Redis still holds what was there before. It ends by itself within a minute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from caravan.db import Tx
from caravan.fulfilment.diagnose import Finding, Technical
from caravan.student_views.cache import Shown, ViewCache
from caravan.student_views.queries import list_ends
from caravan.student_views.routes import make_view


async def name_stale_views(tx: Tx, cache: ViewCache, findings: Sequence[Finding]) -> list[Finding]:
    """`findings`; those without another reason whose item is cached otherwise than it is get VIEW_STALE.

    `tx` must be a read-only one. A Redis that is away shows nothing to anybody, so nothing is stale then.
    """
    students = {finding.student_id for finding in findings if finding.reason is None}
    stale: dict[UUID, Shown] = {}
    for student, head in (await list_ends(tx, students)).items():
        for shown in Shown:
            body = await cache.peek(student, shown, head)
            if body is None:
                continue
            held, true = _items(body), _items((await make_view(tx, student, shown)).body)
            stale |= {UUID(payment): shown for payment in held | true if held.get(payment) != true.get(payment)}
    return [_named(finding, stale[finding.payment_id]) if finding.reason is None and finding.payment_id in stale
            else finding for finding in findings]  # fmt: skip


def _items(body: bytes) -> dict[str, Any]:
    return {item["paymentId"]: item for item in json.loads(body)["items"]}


def _named(finding: Finding, shown: Shown) -> Finding:
    said = (
        f"The student's {shown} shows it otherwise: rows were changed without an event, and Redis holds what was there"
        f" before. It ends within a minute, or at once by `caravan clear-cache {finding.student_id}`."
    )
    return replace(finding, reason=Technical.VIEW_STALE, technical=True, evidence=(*finding.evidence, said))
