"""Signing in and out, for programs and for people; and the front door."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from caravan.web import auth
from caravan.web.auth import Actor
from caravan.web.credentials import clear_cookie, find_connection_actor, find_token, set_cookie
from caravan.web.deps import Db
from caravan.web.login import (
    SOURCE,
    Credentials,
    LoginRateLimited,
    SignedIn,
    WrongCredentials,
    client_address,
    describe,
    log_in,
)
from caravan.web.pages import HOME, page_actor, render, safe_next
from caravan.web.policies import public
from caravan.web.schemas import Storable

router = APIRouter()


@router.post("/api/v1/auth/login", dependencies=[public("auth:login")], tags=["auth"])
async def login(credentials: Credentials, request: Request, response: Response, db: Db) -> SignedIn:
    """A token, as an answer and as a cookie."""
    token, actor = await log_in(db, credentials.email, credentials.password, client_address(request))
    set_cookie(response, request, token)
    return SignedIn(token=token, user=describe(actor))


@router.post("/api/v1/auth/logout", dependencies=[public("auth:logout")], status_code=204, tags=["auth"])
async def logout(request: Request, response: Response, db: Db) -> None:
    """End the token that this request came with; fine without one."""
    await _end_token(request, db)
    clear_cookie(response, request)


@router.get("/login", dependencies=[public("pages:login")], include_in_schema=False)
async def login_page(request: Request, db: Db, next_path: Annotated[str, Query(alias="next")] = "") -> Response:
    actor = await find_connection_actor(request, db)
    if actor is not None:
        return RedirectResponse(safe_next(next_path) or HOME[actor.role], status_code=303)
    return render(request, None, "login.html", next_path=safe_next(next_path) or "", email="", problem="")


@router.post("/login", dependencies=[public("pages:login")], include_in_schema=False)
async def submit_login(
    request: Request,
    db: Db,
    email: Annotated[str, Form(), Storable] = "",
    password: Annotated[str, Form(), Storable] = "",
    next_path: Annotated[str, Form(alias="next"), Storable] = "",
) -> Response:
    """Works without JavaScript."""
    wanted = safe_next(next_path)
    try:
        token, actor = await log_in(db, email, password, client_address(request))
    except (WrongCredentials, LoginRateLimited) as error:
        page = render(
            request,
            None,
            "login.html",
            status_code=error.status,
            next_path=wanted or "",
            email=email[:320],
            problem=error.detail,
        )
        if isinstance(error, LoginRateLimited):
            page.headers["retry-after"] = str(error.extra["retryAfterSeconds"])
        return page
    answer = RedirectResponse(wanted or HOME[actor.role], status_code=303)
    set_cookie(answer, request, token)
    return answer


@router.post("/logout", dependencies=[public("auth:logout")], include_in_schema=False)
async def submit_logout(request: Request, db: Db) -> Response:
    await _end_token(request, db)
    answer = RedirectResponse("/login", status_code=303)
    clear_cookie(answer, request)
    return answer


@router.get("/", include_in_schema=False)
async def front_door(actor: Annotated[Actor, page_actor("pages:home")]) -> Response:
    return RedirectResponse(HOME[actor.role], status_code=303)


async def _end_token(request: Request, db: Db) -> None:
    token = find_token(request)
    if token:
        await db.transact(lambda tx: auth.revoke_token(tx, token), SOURCE)
