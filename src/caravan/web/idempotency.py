"""An answer given once is given again: requests with an Idempotency-Key. Owns idempotency_keys.

The answer is stored in the transaction of its effect, so there is either both or neither; a refusal stores nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from caravan.db import Tx
from caravan.errors import Conflict, Invalid
from caravan.web.auth import Actor

KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")


class InvalidIdempotencyKey(Invalid):
    """An Idempotency-Key is 1 to 255 printable ASCII characters without spaces."""

    code = "INVALID_IDEMPOTENCY_KEY"


class IdempotencyKeyInUse(Conflict):
    """A request with this Idempotency-Key is still running: ask again in a moment."""

    code = "IDEMPOTENCY_KEY_IN_USE"


class IdempotencyKeyReused(Invalid):
    """This Idempotency-Key was used for another request: take a new one."""

    code = "IDEMPOTENCY_KEY_REUSED"


# One at a time per account and key, until the transaction ends.
TRY_LOCK_KEY = """
select pg_try_advisory_xact_lock(hashtextextended(%(account_id)s::text || ' ' || %(key)s::text, 7225071))
"""
FIND_ANSWER = """
select route, body_hash, response_status, response_body from idempotency_keys
where account_id = %(account_id)s and key = %(key)s
"""
INSERT_ANSWER = """
insert into idempotency_keys (account_id, key, route, body_hash, response_status, response_body, created_at)
values (%(account_id)s, %(key)s, %(route)s, %(body_hash)b, %(status)s, %(body)s::jsonb, %(now)s)
"""


async def once(
    tx: Tx,
    actor: Actor,
    key: str,
    route: str,
    body: bytes,
    work: Callable[[], Awaitable[tuple[int, dict[str, Any]]]],
) -> tuple[int, dict[str, Any]]:
    """Run `work` (in `tx`) and keep its answer, or give the kept one. The answer is (HTTP status, JSON body).

    `route` is the method and the path with its ids. Raises InvalidIdempotencyKey (422), IdempotencyKeyInUse (409),
    IdempotencyKeyReused (422: other route or body).
    """
    if not KEY.fullmatch(key):
        raise InvalidIdempotencyKey
    named = {"account_id": actor.account_id, "key": key}
    assert actor.account_id is not None, "only accounts send requests"
    if not await tx.value(TRY_LOCK_KEY, named):
        raise IdempotencyKeyInUse
    body_hash = hashlib.sha256(body).digest()
    kept = await tx.find(FIND_ANSWER, named)
    if kept is not None:
        if (kept["route"], bytes(kept["body_hash"])) != (route, body_hash):
            raise IdempotencyKeyReused
        return kept["response_status"], kept["response_body"]
    status, answer = await work()
    answer = msgspec.to_builtins(answer)
    await tx.execute(
        INSERT_ANSWER,
        named
        | {
            "route": route,
            "body_hash": body_hash,
            "status": status,
            "body": msgspec.json.encode(answer).decode(),
            "now": tx.now,
        },
    )
    return status, answer


DELETE_OLD_ANSWERS = "delete from idempotency_keys where created_at < %(now)s::timestamptz - interval '7 days'"


async def purge(tx: Tx) -> int:
    """Forget answers older than seven days; how many. For the reconciler."""
    return await tx.execute(DELETE_OLD_ANSWERS, {"now": tx.now})
