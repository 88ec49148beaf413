"""What the latency runs begin with: payments that nobody has paid yet, and families who are signed in and listen."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg

from bench.market import add_captured_payments, analyze, build_market
from caravan.ids import new_id
from caravan.web.auth import hash_token

FAMILY = 10  # students of one account, so that there are not too many sockets to open

# Back to where a payment is before it is confirmed.
UNCAPTURE = """
truncate undelivered, outbox, student_feed, student_feed_heads;
update payments set status = 'created', captured_cents = null, captured_currency = null, captured_at = null;
update checkouts set paid_by = null, expires_at = now() + interval '1 day';
update payments p set account_id = s.account_id from account_students s where s.student_id = p.student_id;
"""


@dataclass(frozen=True, slots=True)
class Purchase:
    """To be paid by somebody who is signed in with `token`."""

    payment_id: str
    student_id: str
    token: str


async def build(url: str, n: int, trainers: int, seed: int) -> list[Purchase]:
    """n purchases, each one a student of a family with an account."""
    await build_market(url, trainers=trainers, seed=seed)
    await add_captured_payments(url, n, seed)
    now = datetime.now(UTC)
    async with await psycopg.AsyncConnection.connect(url) as connection:
        rows = await connection.execute("select id, student_id from payments order by id")
        payments: list[tuple[UUID, UUID]] = await rows.fetchall()
        students = list(dict.fromkeys(student for _, student in payments))
        tokens: dict[UUID, str] = {}
        for first in range(0, len(students), FAMILY):
            account, token = new_id(), secrets.token_urlsafe(24)
            await connection.execute(
                "insert into accounts (id, email, name, role, password_hash) values (%s, %s, 'Family', 'student', '-')",
                [account, f"family-{first}@example.com"],
            )
            await connection.execute(
                "insert into auth_tokens (token_hash, account_id, expires_at) values (%s, %s, %s)",
                [hash_token(token), account, now + timedelta(days=1)],
            )
            for student in students[first : first + FAMILY]:
                await connection.execute(
                    "insert into account_students (account_id, student_id) values (%s, %s)", [account, student]
                )
                tokens[student] = token
        await connection.execute(UNCAPTURE)
    await analyze(url)
    return [Purchase(str(payment), str(student), tokens[student]) for payment, student in payments]
