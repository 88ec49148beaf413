"""`GET /ws`, and tickets for clients that can't send a cookie or a header with it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Response, WebSocket
from starlette.requests import HTTPConnection

from caravan.errors import DomainError, is_transient
from caravan.realtime.access import admit
from caravan.realtime.conversation import Conversation, Line
from caravan.realtime.gateway import Gateway
from caravan.web.auth import TICKET_LIFETIME, Actor, issue_ticket
from caravan.web.credentials import find_token
from caravan.web.deps import Db, SettingsDep
from caravan.web.policies import allow, checked_inside
from caravan.web.problems import Problem
from caravan.web.schemas import Out

DENIED_SECONDS = 0.05

router = APIRouter(tags=["realtime"])


class TicketOut(Out):
    ticket: str
    expires_in_seconds: int


@router.post("/api/v1/realtime/tickets", status_code=201)
async def create_ticket(
    connection: HTTPConnection, response: Response, db: Db, actor: Annotated[Actor, allow("realtime:connect")]
) -> TicketOut:
    """A secret for `/ws?ticket=`: it opens one socket, within 30 seconds."""
    response.headers["cache-control"] = "no-store"
    token = find_token(connection) or ""
    ticket = await db.transact(lambda tx: issue_ticket(tx, actor, token), source="websocket-server")
    return TicketOut(ticket=ticket, expires_in_seconds=int(TICKET_LIFETIME.total_seconds()))


@router.websocket("/ws", dependencies=[checked_inside("realtime:connect")])
async def listen(websocket: WebSocket, db: Db, settings: SettingsDep) -> None:
    """Frames as in `realtime.protocol`. Who may not listen is refused before the handshake, with a problem document.

    Returns as soon as the socket is open: the conversation goes on without it.
    """
    gateway: Gateway = websocket.app.state.gateway
    ticket = websocket.query_params.get("ticket")
    websocket.scope["query_string"] = b""  # servers write the address to their logs
    try:
        visitor = await db.transact(lambda tx: admit(tx, websocket, ticket, settings), source="websocket-server")
    except DomainError as error:
        await _deny(websocket, error.status, error.problem_code, error.detail)
        return
    except Exception as error:
        if not is_transient(error):
            raise
        await _deny(websocket, 503, "TRY_AGAIN", "The service is busy or starting: try again in a moment.")
        return
    await websocket.accept()
    line: Line = websocket.scope["extensions"]["caravan.line"]
    Conversation(line, gateway.join(visitor), gateway)


async def _deny(websocket: WebSocket, status: int, code: str, detail: str) -> None:
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code, "instance": "/ws"}
    await websocket.send_denial_response(Problem(body, status_code=status))
    # Until the connection is gone uvicorn (0.54) takes a handshake that was refused for one that was forgotten, and
    # logs an error when we return.
    await asyncio.sleep(DENIED_SECONDS)
