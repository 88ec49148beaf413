"""The edges of being signed in: how it ends, what a socket and a ticket open, what another site's page may ask."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from caravan.ids import new_id
from caravan.web.auth import issue_token
from caravan.web.policies import POLICIES
from verify.authz_matrix import BODIES, Route, ask, fill, ids_of
from verify.report import PartResult
from verify.site import Cast, Person, Site

CLOSED_SECONDS_MAX = 10.0
FRAME_SECONDS_MAX = 5.0
EVIL = "http://evil.example"


async def attack_edges(result: PartResult, site: Site, cast: Cast, routes: list[Route]) -> None:
    await _cross_origins(result, site, cast, routes)
    await _idempotency_keys(result, site, cast)
    await _sockets(result, site, cast)
    await _tickets(result, site, cast)
    await _endings(result, site, cast, routes)


def check(result: PartResult, right: bool, said: str, kind: str) -> None:
    """Count a case of this kind; a violation unless `right`."""
    result.cases += 1
    if right:
        result.fired[kind] += 1
    else:
        result.violated(said)


async def sign_in(site: Site, person: Person) -> Person:
    """The same account with a sign-in of its own, which can be ended."""
    account = person.account_id
    assert account is not None
    token = await site.db.transact(lambda tx: issue_token(tx, account))
    return Person(person.name, person.role, token, account)


# ------------------------------------------------------------------ another site's page


async def _cross_origins(result: PartResult, site: Site, cast: Cast, routes: list[Route]) -> None:
    """A cookie counts only for this site's own pages; a bearer token, which no foreign page has, always."""
    admin = cast.people["admin"]
    for route in routes:
        if route.method in ("GET", "HEAD") or route.action == "webhooks:receive":
            continue
        for origin in (EVIL, "null", f"http://127.0.0.1:{site.port + 1}"):
            headers = {"origin": origin, "sec-fetch-site": "cross-site"} | admin.cookies
            answer = await ask(site, route, cast.people["nobody"], ids_of(cast, "own", route), headers=headers)
            said = f"{route.label} with a cookie from {origin}: {answer.status_code} {answer.text[:100]}"
            check(result, answer.status_code == 403 and "CROSS_SITE_REQUEST" in answer.text, said, "cross-origin")
    own = f"http://127.0.0.1:{site.port}"
    origins = (None, own, own.upper(), EVIL, "null", own + ".evil.example", f"https://127.0.0.1:{site.port}", "x")
    fetches = (None, "same-origin", "same-site", "cross-site", "none", "Same-Origin")
    path = f"/api/v1/students/{cast.own['student_id']}"
    for origin, fetch, way in itertools.product(origins, fetches, ("cookie", "bearer", "both", "none")):
        student = cast.people["student"]
        headers = {"origin": origin or "", "sec-fetch-site": fetch or ""}
        headers = {name: value for name, value in headers.items() if value}
        headers |= student.cookies if way in ("cookie", "both") else {}
        headers |= student.headers if way in ("bearer", "both") else {}
        answer = await site.client.patch(path, json={"name": "Asha"}, headers=headers)
        wanted = _cross_site_status(own, origin, fetch, way)
        said = f"PATCH student by {way}, Origin {origin}, Sec-Fetch-Site {fetch}: {answer.status_code}, not {wanted}"
        check(result, answer.status_code == wanted, said, "cross-origin")


def _cross_site_status(own: str, origin: str | None, fetch: str | None, way: str) -> int:
    if way in ("bearer", "both"):
        return 200
    ours = fetch == "same-origin" or origin in (own, own.upper())
    if way == "none":
        return 401 if ours or (origin is None and fetch is None) else 403
    return 200 if ours else 403


# ------------------------------------------------------------------ idempotency keys


async def _idempotency_keys(result: PartResult, site: Site, cast: Cast) -> None:
    """A key is its account's: another account's request under it is its own; another body is refused."""
    route = Route("", "POST", "/api/v1/payments", "payments:create", BODIES["POST /api/v1/payments"])
    key = {"idempotency-key": f"proof-{new_id()}"}
    mine = await ask(site, route, cast.people["student"], ids_of(cast, "own", route), headers=dict(key))
    again = await ask(site, route, cast.people["student"], ids_of(cast, "own", route), headers=dict(key))
    theirs = await ask(site, route, cast.people["stranger"], ids_of(cast, "other", route), headers=dict(key))
    stolen = await ask(site, route, cast.people["stranger"], ids_of(cast, "own", route), headers=dict(key))
    codes = [answer.status_code for answer in (mine, again, theirs, stolen)]
    check(result, codes[:3] == [201, 201, 201], f"payments under one key: {codes} {theirs.text[:100]}", "key")
    if codes[:3] == [201, 201, 201]:
        check(result, mine.json() == again.json(), "one key gave two answers to one account", "key")
        check(result, mine.json()["id"] != theirs.json()["id"], "an idempotency key is shared between accounts", "key")
    check(result, stolen.status_code in (404, 422), f"a used key opened another family's student: {codes}", "key")


# ------------------------------------------------------------------ sockets


@asynccontextmanager
async def listen(site: Site, *, query: str = "", **headers: str) -> AsyncGenerator[ClientConnection]:
    address = f"ws://127.0.0.1:{site.port}/ws{query}"
    async with connect(address, additional_headers=headers, open_timeout=10, compression=None) as client:
        yield client


async def refused_with(site: Site, *, query: str = "", **headers: str) -> int:
    """The status that the handshake was refused with; 101 where it was not refused."""
    try:
        async with listen(site, query=query, **headers):
            return 101
    except InvalidStatus as refusal:
        return refusal.response.status_code


async def frame(client: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(FRAME_SECONDS_MAX):
        return json.loads(await client.recv())


async def _sockets(result: PartResult, site: Site, cast: Cast) -> None:
    own = f"http://127.0.0.1:{site.port}"
    for person in cast.people.values():
        wanted = 401 if person.role is None else (101 if person.role in POLICIES["realtime:connect"] else 403)
        found = await refused_with(site, **person.headers)
        check(result, found == wanted, f"/ws as {person.name}: {found} instead of {wanted}", "socket")
        by_cookie = await refused_with(site, origin=own, **person.cookies)
        check(result, by_cookie == wanted, f"/ws by cookie as {person.name}: {by_cookie}, not {wanted}", "socket")
    student = cast.people["student"]
    for origin in ({}, {"origin": EVIL}, {"origin": "null"}, {"origin": own + ".evil.example"}):
        found = await refused_with(site, **student.cookies, **origin)
        check(result, found == 403, f"/ws by cookie from {origin}: {found} instead of 403", "socket")
    for side, wanted in (("own", None), ("other", "NOT_FOUND"), ("none", "NOT_FOUND")):
        named = {"own": cast.own, "other": cast.other, "none": {"student_id": new_id()}}[side]["student_id"]
        async with listen(site, **student.headers) as client:
            await client.send(json.dumps({"type": "resume", "after": 0, "studentId": str(named)}))
            said = await frame(client)
            if wanted is not None:
                check(result, said.get("code") == wanted, f"resume of {side}: {said}", "socket")
                continue
            check(result, said.get("seq") == 1 and said.get("studentId") == str(named), f"resume: {said}", "socket")
            seen = json.dumps(said)
            check(result, str(cast.other["student_id"]) not in seen, "another's event was told", "socket")


async def _tickets(result: PartResult, site: Site, cast: Cast) -> None:
    """One socket, within 30 seconds, no longer than the sign-in that asked for it."""
    student = await sign_in(site, cast.people["student"])

    async def ticket() -> str:
        answer = await site.client.post("/api/v1/realtime/tickets", headers=student.headers)
        return f"?ticket={answer.json()['ticket']}"

    first = await ticket()
    opened = [await refused_with(site, query=first) for _ in range(2)]
    check(result, opened == [101, 401], f"a ticket opened: {opened}", "ticket")
    both = await ticket()
    race = sorted(await asyncio.gather(*(refused_with(site, query=both) for _ in range(8))))
    check(result, race == [101] + [401] * 7, f"eight with one ticket: {race}", "ticket")
    late = await ticket()
    async with site.db.transaction() as tx:
        await tx.execute("update realtime_tickets set expires_at = expires_at - interval '31 seconds'")
    check(result, await refused_with(site, query=late) == 401, "a late ticket opened", "ticket")
    for forged in ("?ticket=", "?ticket=x", "?ticket=" + "x" * 10_000, "?ticket=%00", f"?ticket={student.token}"):
        # A good Authorization header beside a bad ticket doesn't help.
        found = await refused_with(site, query=forged, **student.headers)
        check(result, found in (400, 401, 422), f"a forged ticket {forged[:30]}: {found}", "ticket")
    orphan = await ticket()
    await site.client.post("/api/v1/auth/logout", headers=student.headers)
    check(result, await refused_with(site, query=orphan) == 401, "a ticket outlived its sign-in", "ticket")


# ------------------------------------------------------------------ the end of a sign-in


async def _endings(result: PartResult, site: Site, cast: Cast, routes: list[Route]) -> None:
    """Signed out, expired, disabled: 401 at the next request, and sockets end within ten seconds."""
    path = f"/api/v1/students/{cast.own['student_id']}"
    out, expired, disabled = [await sign_in(site, cast.people["student"]) for _ in range(3)]
    admin = cast.people["admin"]

    async def end(person: Person) -> None:
        if person is out:
            await site.client.post("/api/v1/auth/logout", headers=person.headers)
        elif person is expired:
            async with site.db.transaction() as tx:
                await tx.execute(EXPIRE, {"token": person.token})
        else:
            disable = next(route for route in routes if route.action == "accounts:disable")
            address = fill(disable.path, {"account_id": str(person.account_id)})
            await site.client.post(address, json={"note": "by the proof"}, headers=admin.headers)

    async def watch(person: Person, kind: str) -> None:
        async with listen(site, **person.headers) as client:
            await client.send(json.dumps({"type": "resume", "after": 0}))
            await frame(client)
            await end(person)
            answer = await site.client.get(path, headers=person.headers)
            check(result, answer.status_code == 401, f"after {kind}: {answer.status_code}", "401")
            try:
                async with asyncio.timeout(CLOSED_SECONDS_MAX):
                    while True:
                        await client.recv()
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else None
                check(result, code == 4401, f"after {kind} the socket ended with {code}", "socket")
            except TimeoutError:
                check(result, False, f"after {kind} the socket lives {CLOSED_SECONDS_MAX:.0f} s later", "socket")

    # The account is disabled last: that ends the others too.
    await asyncio.gather(watch(out, "signing out"), watch(expired, "expiry"))
    await watch(disabled, "disabling")


EXPIRE = "update auth_tokens set expires_at = now() where token_hash = sha256(convert_to(%(token)s::text, 'UTF8'))"
