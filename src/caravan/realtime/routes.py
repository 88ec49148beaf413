"""`GET /ws`, and tickets for clients that can't send a cookie or a header with it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from time import monotonic
from typing import Annotated

import structlog
from fastapi import APIRouter, Response, WebSocket, WebSocketDisconnect
from starlette.requests import HTTPConnection

from caravan.errors import DomainError, is_transient
from caravan.realtime import protocol
from caravan.realtime.access import admit
from caravan.realtime.gateway import QUEUE_FRAMES_MAX, Gateway, Socket
from caravan.web.auth import TICKET_LIFETIME, Actor, issue_ticket
from caravan.web.credentials import find_token
from caravan.web.deps import Db, SettingsDep
from caravan.web.policies import allow, checked_inside
from caravan.web.problems import Problem
from caravan.web.schemas import Out

# How long the stream waits for a first frame that says where the client left off.
RESUME_SECONDS = 1.0
SEND_SECONDS = 10.0
CLOSE_SECONDS = 1.0
DENIED_SECONDS = 0.05
BAD_FRAMES_MAX = 5
FRAMES_PER_MINUTE_MAX = 60

log: structlog.stdlib.BoundLogger = structlog.get_logger()

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
    """Frames as in `realtime.protocol`. Who may not listen is refused before the handshake, with a problem document."""
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
    socket = gateway.join(visitor)
    await _talk(websocket, socket, gateway)
    if socket.closing:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await websocket.close(socket.closing)
        except (TimeoutError, WebSocketDisconnect, RuntimeError):
            pass  # it reads nothing, or is gone already: the server drops the connection


async def _talk(websocket: WebSocket, socket: Socket, gateway: Gateway) -> None:
    """Until either side has had enough."""
    loop = asyncio.get_running_loop()
    unhold = loop.call_later(RESUME_SECONDS, gateway.begin_unasked, socket)
    tasks = [loop.create_task(_read(websocket, socket, gateway)), loop.create_task(_write(websocket, socket, gateway))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        unhold.cancel()
        gateway.leave(socket)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _read(websocket: WebSocket, socket: Socket, gateway: Gateway) -> None:
    bad = frames = 0
    minute = monotonic()
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if monotonic() > minute + 60:
            minute, frames = monotonic(), 0
        frames += 1
        try:
            gateway.resume(socket, protocol.parse_resume(message.get("text"), socket.cursors.keys()))
        except protocol.FrameRefused as error:
            bad += 1
            socket.put(protocol.refusal(error))
        if bad > BAD_FRAMES_MAX or frames > FRAMES_PER_MINUTE_MAX:
            socket.end(protocol.CLOSE_POLICY)


async def _write(websocket: WebSocket, socket: Socket, gateway: Gateway) -> None:
    while not socket.closing:
        if not socket.queue:
            socket.stirred.clear()
            await socket.stirred.wait()
            continue
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await websocket.send_text(socket.queue.popleft())
        except TimeoutError:
            socket.end(protocol.CLOSE_TRY_AGAIN_LATER)
        except (WebSocketDisconnect, RuntimeError):
            return  # gone; the reader hears of it too
        if len(socket.queue) == QUEUE_FRAMES_MAX // 2:
            gateway.stir(socket)


async def _deny(websocket: WebSocket, status: int, code: str, detail: str) -> None:
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code, "instance": "/ws"}
    await websocket.send_denial_response(Problem(body, status_code=status))
    # Until the connection is gone uvicorn (0.54) takes a handshake that was refused for one that was forgotten, and
    # logs an error when we return.
    await asyncio.sleep(DENIED_SECONDS)
