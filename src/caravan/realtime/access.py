"""Who may listen, and to which students. Asked before a socket opens and every few seconds while it lives.

A socket hangs on one sign-in, also when it came with a ticket: signing out, expiry and a disabled account end it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from starlette.websockets import WebSocket

from caravan.db import Tx
from caravan.errors import DomainError
from caravan.realtime.feed import list_heads
from caravan.settings import Settings
from caravan.web.auth import Actor, hash_token, list_actors, redeem_ticket
from caravan.web.credentials import cookie_name, find_bearer, is_same_origin
from caravan.web.policies import NotAllowed, NotSignedIn, judge

ACTION = "realtime:connect"


class TicketRefused(DomainError):
    """The ticket is unknown, used or older than 30 seconds: get a new one."""

    code = "TICKET_REFUSED"
    status = 401


class OriginRefused(DomainError):
    """A page of another site may not listen with your cookie."""

    code = "ORIGIN_REFUSED"
    status = 403


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody signed in: `heads` are their students, each with where the feed ended when we looked."""

    token_hash: bytes
    heads: dict[UUID, int]


async def admit(tx: Tx, websocket: WebSocket, ticket: str | None, settings: Settings) -> Visitor:
    """Who wants to listen: by ticket, by Authorization header, or by cookie from a page of this site.

    Raises TicketRefused, OriginRefused, NotSignedIn, NotAllowed. A ticket is used up, whatever comes after.
    """
    bearer = find_bearer(websocket)
    if ticket is not None:
        token_hash = await redeem_ticket(tx, ticket)
        if token_hash is None:
            raise TicketRefused
    elif bearer is not None:
        token_hash = hash_token(bearer)
    else:
        token = websocket.cookies.get(cookie_name(websocket))
        if not token:
            raise NotSignedIn
        if not is_same_origin(websocket, settings):
            raise OriginRefused
        token_hash = hash_token(token)
    actors = await list_actors(tx, [token_hash])
    if token_hash not in actors:
        raise NotSignedIn
    judge(actors[token_hash], ACTION)
    return (await _visitors(tx, actors))[token_hash]


async def recheck(tx: Tx, token_hashes: Collection[bytes]) -> dict[bytes, Visitor]:
    """Those that may still listen, by token hash, with the students that are theirs now."""
    actors = await list_actors(tx, list(token_hashes))
    return await _visitors(tx, {key: actor for key, actor in actors.items() if _may_listen(actor)})


def _may_listen(actor: Actor) -> bool:
    try:
        judge(actor, ACTION)
    except NotAllowed:
        return False
    return True


async def _visitors(tx: Tx, actors: dict[bytes, Actor]) -> dict[bytes, Visitor]:
    heads = await list_heads(tx, {student for actor in actors.values() for student in actor.student_ids})
    return {
        token_hash: Visitor(token_hash, {student: heads[student] for student in actor.student_ids})
        for token_hash, actor in actors.items()
    }
