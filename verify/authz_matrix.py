"""The rows of the authorisation matrix: the application's own routes, whose the things in them are, and how to ask."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import httpx2
from fastapi import FastAPI

from caravan.ids import new_id
from caravan.web.policies import check_routes
from verify.site import Cast, Person, Site

# Whose a path's parameter is: somebody's (the sides own, other and none differ in it) ...
OWNED = frozenset(
    {"student_id", "payment_id", "purchase_id", "allocation_id", "item_id", "dead_letter_id", "account_id",
     "trainer_id", "some_id"}
)  # fmt: skip
# ... or everybody's, with a value that is there.
FREE: dict[str, str] = {"course_id": "", "provider": "sandbox", "seq": "1", "button": "hold", "path": "app.js"}

# What a route needs to get as far as its own check; a route that isn't here gets a note and nothing else.
NOTE = {"note": "by the proof"}
SLOT = {"timeSlot": "6:00 PM", "startDate": "{soon}"}
ORDER = {"courseId": "{course_id}", "sessionCount": 4, "learningMode": "online", **SLOT}
BODIES: dict[str, dict[str, Any]] = {
    "POST /api/v1/payments": {"studentId": "{student_id}", "again": True, **ORDER},
    "POST /api/v1/students/{student_id}/cart": ORDER,
    "PATCH /api/v1/students/{student_id}": {"name": "Asha", **NOTE},
    "PATCH /api/v1/admin/courses/{course_id}": {"title": "Robotics, anew", **NOTE},
    "PATCH /api/v1/admin/trainers/{trainer_id}": {"name": "Ravi, anew", **NOTE},
    "PATCH /api/v1/admin/payments/{payment_id}": {**SLOT, **NOTE},
    "PATCH /api/v1/admin/purchases/{purchase_id}": {**SLOT, **NOTE},
    "POST /api/v1/admin/purchases/{purchase_id}/sessions/{seq}": {"status": "completed", **NOTE},
    "POST /api/v1/admin/allocations/auto-assign": {"purchaseId": "{purchase_id}", **NOTE},
    "POST /api/v1/admin/pauses": {"stage": "allocated", "courseId": "{course_id}", **NOTE},
    "POST /api/v1/admin/pauses/resume": {"stage": "allocated", "courseId": "{course_id}", **NOTE},
    "POST /api/v1/admin/repairs": {"reason": "STAGE_PAUSED", **NOTE},
    "POST /api/v1/admin/unclaimed/dealt-with": {"provider": "sandbox", "eventId": "msg_nothing", **NOTE},
    "POST /admin/pauses": {"stage": "allocated", "course_id": "*", "city": "Pune", **NOTE},
    "POST /admin/pauses/resume": {"stage": "allocated", "city": "Pune", **NOTE},
    "POST /api/v1/admin/trainers/{trainer_id}/absences": {
        "startsAt": "2027-01-01T00:00:00Z", "endsAt": "2027-01-02T00:00:00Z", **NOTE,
    },
}  # fmt: skip
# Further things that only a body or a query names, tried on every side as routes of their own.
VARIANTS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("POST /api/v1/payments", "another attempt", {"checkoutId": "{checkout_id}"}, ""),
    ("GET /home", "of a student", {}, "student={student_id}"),
    ("GET /learning", "of a student", {}, "student={student_id}"),
    ("GET /courses", "for a student", {}, "student={student_id}"),
    ("GET /courses/{course_id}", "for a student", {}, "student={student_id}"),
    ("GET /api/v1/admin/diagnose", "of a payment", {}, "paymentId={payment_id}"),
)
SIDES = ("own", "other", "none", "mixed")
# Done last: they end the sign-ins that the others need.
LAST = ("accounts:disable", "auth:logout")


@dataclass(frozen=True, slots=True)
class Route:
    """One cell's row: `label` is unique; `body` and `query` still have {names} in them."""

    label: str
    method: str
    path: str
    action: str
    body: dict[str, Any] | None
    query: str = ""

    @property
    def names(self) -> list[str]:
        """What it names: of the path, the body and the query."""
        return list(dict.fromkeys(re.findall(r"\{(\w+)", f"{self.path} {self.body} {self.query}")))

    @property
    def owned(self) -> list[str]:
        return [name for name in self.names if name in OWNED or name == "checkout_id"]

    @property
    def is_page(self) -> bool:
        return not self.path.startswith("/api/")


def list_matrix(app: FastAPI) -> list[Route]:
    """Every HTTP route with its action, as the application itself tells them; the socket is attacked apart."""
    routes: list[Route] = []
    for name, action in check_routes(app).items():
        methods, _, path = name.partition(" ")
        if methods == "WEBSOCKET" and path == "/ws":
            continue
        path = "/static/{path}" if action == "static" else re.sub(r"\{(\w+):\w+\}", r"{\1}", path)
        for method in ("GET",) if action == "static" else methods.split(","):
            label = f"{method} {path}"
            body = None if method in ("GET", "HEAD", "DELETE") else BODIES.get(label, dict(NOTE))
            routes.append(Route(label, method, path, action, body))
    by_label = {route.label: route for route in routes}
    for label, what, body, query in VARIANTS:
        if label in by_label:
            route = by_label[label]
            routes.append(Route(f"{label} ({what})", route.method, route.path, route.action, body or route.body, query))
    return sorted(routes, key=lambda route: LAST.index(route.action) + 1 if route.action in LAST else 0)


# ------------------------------------------------------------------ one cell


def ids_of(cast_: Cast, side: str, route: Route) -> dict[str, str]:
    """What the route's names stand for on a side; `mixed`: the first is own, the rest somebody else's."""
    free = {name: value or str(cast_.own[name]) for name, value in FREE.items()}
    ids = free | {"soon": soon()}
    for number, name in enumerate(route.owned):
        theirs = side if side != "mixed" else ("own" if number == 0 else "other")
        real = "payment_id" if name == "some_id" else name
        ids[name] = str(new_id()) if theirs == "none" else str((cast_.own if theirs == "own" else cast_.other)[real])
    return ids


def soon() -> str:
    return (datetime.now(UTC) + timedelta(days=6)).date().isoformat()


def fill(template: Any, ids: dict[str, str]) -> Any:
    if isinstance(template, str):
        return re.sub(r"\{(\w+)\}", lambda found: ids.get(found[1], found[0]), template)
    if isinstance(template, dict):
        fields = cast("dict[str, Any]", template)
        return {key: fill(value, ids) for key, value in fields.items()}
    return template


async def ask(site: Site, route: Route, person: Person, ids: dict[str, str], **more: Any) -> httpx2.Response:
    """Send the route's request as this person; pages get their form, and no redirect is followed."""
    address = fill(route.path, ids) + (f"?{fill(route.query, ids)}" if route.query else "")
    body = fill(route.body, ids) if route.body is not None else None
    content = {"data": body} if route.is_page and body is not None else {"json": body} if body is not None else {}
    headers = person.headers | more.pop("headers", {})
    return await site.client.request(route.method, address, headers=headers, **content, **more)


def sides_of(route: Route) -> tuple[str, ...]:
    if not route.owned:
        return ("own",)
    return SIDES if len(route.owned) > 1 else SIDES[:3]


def unknown_names(route: Route) -> list[str]:
    return [
        name for name in route.names if name not in OWNED and name not in FREE and name not in ("soon", "checkout_id")
    ]
