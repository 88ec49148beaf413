"""Who may do what: every route, the socket and every command, by everybody, on what is theirs and what isn't.

The matrix is made from the application's own routes, so a new route is in it. What to expect comes from
`web.policies.POLICIES` and one rule: what isn't yours answers 404, exactly as what doesn't exist. Where the matrix does
not know what a path's parameter means, it fails: whoever adds one says here whose it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2

from caravan.web.auth import Role
from caravan.web.policies import POLICIES, PUBLIC
from verify.authz_edges import attack_edges
from verify.authz_matrix import Route, ask, ids_of, list_matrix, sides_of, unknown_names
from verify.authz_rules import attack_commands, attack_notes
from verify.parts import Context
from verify.report import PartResult
from verify.site import Cast, Person, Site, gather_cast, judge_answer, serve, snapshot

GOOD_MIN = 100
COORDINATES = ("28.6139", "77.209")


async def run(context: Context) -> PartResult:
    """Every cell of the matrix, then the edges: sockets, tickets, origins, keys, notes and audit rows, commands."""
    result = context.result()
    result.good_min = GOOD_MIN
    made = context.server.create()
    async with made.database() as db:
        cast = await gather_cast(db)
    stage = Stage(context, result, cast, context.server.databases.freeze(made))
    async with stage.site() as site:
        routes = list_matrix(site.app)
        await _refusals(stage, site, routes)
    roles = [person for person in cast.people.values() if person.role is not None and person.name != "stranger"]
    for person in roles:
        async with stage.site() as site:
            await _permissions(stage, site, routes, person)
    async with stage.site() as site:
        await attack_edges(result, site, cast, routes)
    async with stage.site() as site:
        await attack_notes(result, site, cast, routes)
    await attack_commands(context, result, cast, stage.template)
    result.extra |= {"routes": len({(route.method, route.path) for route in routes}), "people": len(cast.people)}
    result.must_fire = ("401", "403", "404", "allowed", "cross-origin", "socket", "ticket", "note", "audit", "command")
    return result


@dataclass(slots=True)
class Stage:
    """The cast's database, to be copied: what one person changes must not stand in another one's way."""

    context: Context
    result: PartResult
    cast: Cast
    template: str

    @asynccontextmanager
    async def site(self) -> AsyncGenerator[Site]:
        database = self.context.server.create(self.template)
        try:
            async with serve(database) as site:
                yield site
        finally:
            self.context.server.drop(database)


# ------------------------------------------------------------------ who may not


async def _refusals(stage: Stage, site: Site, routes: list[Route]) -> None:
    """Everything that must be refused is, in the exact words; and none of it leaves a trace in the database."""
    cast, result = stage.cast, stage.result
    for route in routes:
        if unknown_names(route):
            result.violated(f"{route.label}: whose is {', '.join(unknown_names(route))}? (say it in verify/authz.py)")
    routes = [route for route in routes if not unknown_names(route) and route.action not in PUBLIC]
    before = await snapshot(site.db)
    for route in routes:
        for person in cast.people.values():
            for side in sides_of(route):
                wanted = expected_refusal(route, person, side)
                if wanted is not None:
                    await _refused(stage, site, route, person, side, wanted)
    after = await snapshot(site.db)
    for table in sorted({*before, *after}):
        if before.get(table) != after.get(table):
            result.violated(f"a refused request changed the table {table}")


def expected_refusal(route: Route, person: Person, side: str) -> int | None:
    """401, 403 or 404, by the table and the rule; None where the request is allowed."""
    if route.action in PUBLIC:
        return None
    if person.role is None:
        return 401
    action = route.action
    if route.path == "/admin/payments/{payment_id}/{button}":
        action = "admin:mend"  # hold's own; the page's first door is admin:repair
        if person.role not in POLICIES[route.action]:
            return 403
    reach = POLICIES[action].get(person.role)
    if reach is None:
        return 403
    if reach == "any":
        return None
    if not route.owned:
        return None
    mine = (person.name, side) in (("student", "own"), ("stranger", "other"))
    return None if mine else 404


async def _refused(stage: Stage, site: Site, route: Route, person: Person, side: str, wanted: int) -> None:
    result = stage.result
    answer = await ask(site, route, person, ids_of(stage.cast, side, route))
    result.cases += 1
    cell = f"{route.label} as {person.name} on {side}"
    if answer.status_code != wanted:
        result.violated(f"{cell}: {answer.status_code} instead of {wanted} {answer.text[:150]}")
        return
    result.fired[str(wanted)] += 1
    wrong = judge_answer(answer) if route.method != "HEAD" else None
    if wrong:
        result.violated(f"{cell}: {wrong}")
    if wanted == 404:
        await _equal_silence(stage, site, route, person, side, answer)


async def _equal_silence(
    stage: Stage, site: Site, route: Route, person: Person, side: str, answer: httpx2.Response
) -> None:
    """What is somebody else's answers as what doesn't exist, in the same words."""
    if side != "other":
        return
    nothing = await ask(site, route, person, ids_of(stage.cast, "none", route))
    first, second = (
        {name: value for name, value in each.json().items() if name != "instance"} for each in (answer, nothing)
    )
    if first != second:
        stage.result.violated(f"{route.label} as {person.name} tells that it is there: {first} and {second}")


# ------------------------------------------------------------------ who may


async def _permissions(stage: Stage, site: Site, routes: list[Route], person: Person) -> None:
    """What the table allows gets through: on one's own, and for `any` on everybody's that is there."""
    result = stage.result
    for route in routes:
        if unknown_names(route) or (person.name == "childless" and route.owned):
            continue
        for side in ("own", "other"):
            if side == "other" and not route.owned:
                continue
            if expected_refusal(route, person, side) is not None:
                continue
            answer = await ask(site, route, person, ids_of(stage.cast, side, route))
            result.cases += 1
            cell = f"{route.label} as {person.name} on {side}"
            if answer.status_code in refusals_of(route):
                result.violated(f"{cell}: refused with {answer.status_code} {answer.text[:150]}")
            elif answer.status_code < 400:
                result.good += 1
                result.fired["allowed"] += 1
            wrong = judge_answer(answer, program=not route.is_page) if route.method != "HEAD" else None
            if wrong:
                result.violated(f"{cell}: {wrong}")
            if person.role in (Role.SUPPORT, Role.TRAINER) and any(part in answer.text for part in COORDINATES):
                result.violated(f"{cell}: tells coordinates")


def refusals_of(route: Route) -> frozenset[int]:
    """Statuses that an allowed request must not get. An open door may answer 401 to what it can't verify."""
    if route.action in PUBLIC:
        return frozenset({403, 404, 405})
    return frozenset({401, 403, 404, 405})
