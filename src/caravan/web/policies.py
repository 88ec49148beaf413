"""Who may do what: one table, deny by default. A route without a row here stops the start (`check_routes`).

In a route:   `actor: Annotated[Actor, allow("payments:create")]`, then `actor.require_student(student_id)` where the
row says `own` for some role. A door that is open on purpose: `dependencies=[public("auth:login")]`. A WebSocket that
looks at cookie or ticket by itself: `dependencies=[checked_inside("realtime:connect")]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Mount

from caravan.errors import DomainError
from caravan.web.auth import Actor, Reach, Role
from caravan.web.credentials import find_connection_actor
from caravan.web.deps import get_db

Policy = Mapping[Role, Reach]

STUDENT, TRAINER, SUPPORT, ADMIN = Role.STUDENT, Role.TRAINER, Role.SUPPORT, Role.ADMIN
OWN_OR_STAFF: Policy = {STUDENT: "own", SUPPORT: "any", ADMIN: "any"}
STAFF: Policy = {SUPPORT: "any", ADMIN: "any"}
ADMINS: Policy = {ADMIN: "any"}
ANYONE_SIGNED_IN: Policy = {STUDENT: "own", TRAINER: "own", SUPPORT: "any", ADMIN: "any"}

# action -> role -> own (theirs only; the route asks require_student) or any. Append rows for your routes.
POLICIES: dict[str, Policy] = {
    # Support reads everything and lets things go on; money moves, and events are given up, by admins only.
    "admin:read": STAFF,
    "admin:repair": STAFF,
    "admin:mend": STAFF,
    "admin:money": ADMINS,
    "admin:discard": ADMINS,
    "admin:pause": ADMINS,
    "admin:bulk": ADMINS,
    "students:read": OWN_OR_STAFF,
    "students:update": {STUDENT: "own", ADMIN: "any"},
    "trainers:list": STAFF,
    "trainers:read": STAFF,
    "trainers:update": ADMINS,
    "accounts:disable": ADMINS,
    "courses:update": ADMINS,
    "carts:read": OWN_OR_STAFF,
    "carts:update": {STUDENT: "own", ADMIN: "any"},
    "pages:home": ANYONE_SIGNED_IN,
    "pages:student": {STUDENT: "own"},
    "pages:trainer": {TRAINER: "own"},
    "payments:create": {STUDENT: "own", ADMIN: "any"},
    "payments:read": OWN_OR_STAFF,
    "payments:confirm": {STUDENT: "own", ADMIN: "any"},
    "realtime:connect": {STUDENT: "own"},
    "views:read": OWN_OR_STAFF,
}

# Doors that are open on purpose: no sign-in needed, or (webhooks) judged by a signature.
PUBLIC: frozenset[str] = frozenset(
    {
        "auth:login",
        "auth:register",
        "auth:logout",
        "courses:read",
        "health",
        "metrics",
        "openapi",
        "pages:login",
        "static",
        "webhooks:receive",
    }
)


class NotSignedIn(DomainError):
    """Sign in first."""

    code = "NOT_SIGNED_IN"
    status = 401


class NotAllowed(DomainError):
    """Your role may not do this."""

    code = "NOT_ALLOWED"
    status = 403


class RouteWithoutPolicy(Exception):
    """A route lacks its row in POLICIES: the program is wrong, so it doesn't start."""


class Mark:
    """What `check_routes` looks for on a route."""

    def __init__(self, action: str) -> None:
        self.action = action


class Allow(Mark):
    """The dependency behind `allow`: the actor, with the reach that the policy gives, or a refusal."""

    async def __call__(self, connection: HTTPConnection) -> Actor:
        actor = await find_connection_actor(connection, get_db(connection))
        if actor is None:
            raise NotSignedIn
        return judge(actor, self.action)


class Open(Mark):
    async def __call__(self) -> None:
        return None


def judge(actor: Actor, action: str) -> Actor:
    """The actor with the reach that the table gives for `action`; raises NotAllowed."""
    reach = POLICIES[action].get(actor.role)
    if reach is None:
        raise NotAllowed
    return replace(actor, reach=reach)


def allow(action: str) -> Any:
    """For `Annotated[Actor, allow("payments:create")]`. An action without a row is a KeyError at import."""
    POLICIES[action]
    return Depends(Allow(action))


def public(action: str) -> Any:
    """For `dependencies=[public("courses:read")]`: open on purpose, and named in PUBLIC."""
    if action not in PUBLIC:
        raise KeyError(action)
    return Depends(Open(action))


def checked_inside(action: str) -> Any:
    """For `dependencies=[...]` of a WebSocket that authenticates by itself and then calls `judge`."""
    POLICIES[action]
    return Depends(Open(action))


def check_routes(app: FastAPI) -> dict[str, str]:
    """`METHOD path` to action, for every route, WebSockets too. Raises RouteWithoutPolicy naming those without one."""
    found: dict[str, str] = {}
    missing: list[str] = []
    for context in iter_route_contexts(app.routes):
        name = f"{','.join(sorted(context.methods or ['WEBSOCKET']))} {context.path}"
        action = _action_of(context.original_route, getattr(context, "dependant", None), app)
        if action is None:
            missing.append(name)
        else:
            found[name] = action
    if missing:
        raise RouteWithoutPolicy(f"no policy for: {'; '.join(missing)}")
    return found


def _action_of(route: BaseRoute, dependant: Dependant | None, app: FastAPI) -> str | None:
    if isinstance(route, Mount):
        return "static" if getattr(route.app, "public", False) else None
    if dependant is None:
        return "openapi" if getattr(route, "path", None) == app.openapi_url else None
    return next((call.action for call in _calls(dependant) if isinstance(call, Mark)), None)


def _calls(dependant: Dependant) -> Iterator[Any]:
    for inner in dependant.dependencies:
        yield inner.call
        yield from _calls(inner)
