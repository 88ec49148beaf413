"""What every request passes: headers, cross-site checks, limits, and the net under errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

import psycopg
import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.types import Message
from starlette.websockets import WebSocket
from structlog.testing import capture_logs

from caravan.db import Database
from caravan.settings import load_settings
from caravan.web import auth
from caravan.web.deps import Trace
from caravan.web.middleware import BODY_BYTES_MAX, CLIENT_GONE
from caravan.web.policies import RouteWithoutPolicy, allow, check_routes, checked_inside, public
from caravan.web.routes import router
from caravan.web.schemas import In, QueryText
from tests.clients import ORIGIN, an_account, bearer, client_of, make_app

probe = APIRouter()


class Body(In):
    text: str
    number: int = 0
    password: str = ""


@probe.post("/api/v1/things")
async def change(body: Body, actor: Annotated[auth.Actor, allow("students:read")]) -> dict[str, str]:
    return {"text": body.text}


@probe.get("/api/v1/things/{thing_id}", dependencies=[public("health")])
async def read(thing_id: UUID, trace: Trace, q: QueryText = "") -> dict[str, str]:
    return {"id": str(thing_id), "trace": trace}


@probe.post("/api/v1/webhooks/sandbox", dependencies=[public("webhooks:receive")])
async def hear(request: Request) -> int:
    return len(await request.body())


@probe.get("/api/v1/bug", dependencies=[public("health")])
async def bug() -> None:
    raise RuntimeError("the secret inside")


@probe.get("/broken", dependencies=[public("health")])
async def broken_page() -> None:
    raise RuntimeError("the secret inside")


@probe.get("/api/v1/outage", dependencies=[public("health")])
async def outage() -> None:
    raise psycopg.errors.AdminShutdown("gone")


THING = "/api/v1/things/018f0000-0000-7000-8000-000000000000"


@pytest.fixture
def app(db: Database) -> FastAPI:
    return make_app(db, router, probe)


async def test_who_hangs_up_in_the_middle_of_a_request_is_no_error_of_ours(app: FastAPI) -> None:
    """A provider whose webhook is cut off sends it again; nobody is to be woken for it."""
    sent: list[Message] = []
    heard: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return heard.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/v1/webhooks/sandbox", "headers": [], "query_string": b""}
    with capture_logs() as logs:
        await app(scope, receive, send)
    assert sent == []
    assert [(line["event"], line.get("status")) for line in logs] == [("request", CLIENT_GONE)]


async def test_every_answer_has_the_headers(app: FastAPI) -> None:
    async with client_of(app) as client:
        for path in (THING, "/api/v1/bug", "/nothing", "/login", "/static/app.css", "/api/v1/outage"):
            answer = await client.get(path)
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';"), path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "same-origin"
            if not path.startswith("/static"):
                assert answer.headers["cache-control"] == "no-store", path


async def test_a_bug_says_nothing_about_our_insides(app: FastAPI) -> None:
    async with client_of(app) as client:
        answer = await client.get("/api/v1/bug")
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "INTERNAL"
        page = await client.get("/broken", headers={"accept": "text/html"})
        assert page.status_code == 500
        assert page.headers["content-type"].startswith("text/html")
        notice = await client.get("/broken", headers={"hx-request": "true"})
        assert notice.headers["hx-reswap"] == "none"
        for said in (answer, page, notice):
            assert "secret" not in said.text


async def test_an_outage_asks_to_come_back(app: FastAPI) -> None:
    async with client_of(app) as client:
        answer = await client.get("/api/v1/outage")
        assert (answer.status_code, answer.json()["code"]) == (503, "TRY_AGAIN")
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),  # a cookie and no word of where it comes from
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://caravan.test"}, 403),  # the other scheme
        ({"origin": "http://caravan.test:81"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://evil.caravan.test"}, 403),
        ({"sec-fetch-site": "none"}, 403),
        ({"origin": ORIGIN}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://app.example.com"}, 200),  # named in the settings
    ],
)
async def test_a_cookie_works_from_our_own_pages_only(db: Database, headers: dict[str, str], status: int) -> None:
    app = make_app(db, probe, settings=load_settings({}, origins=("https://app.example.com",)))
    account = await an_account(db, "asha@example.com")
    token = (await bearer(db, account))["authorization"].removeprefix("Bearer ")
    async with client_of(app, cookies={"caravan_session": token}) as client:
        answer = await client.post("/api/v1/things", json={"text": "x"}, headers=headers)
        assert answer.status_code == status, answer.text
        if status == 403:
            assert answer.json()["code"] == "CROSS_SITE_REQUEST"


async def test_bearers_and_webhooks_come_from_anywhere(db: Database, app: FastAPI) -> None:
    account = await an_account(db, "asha@example.com")
    foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    async with client_of(app, cookies={"caravan_session": "x"}) as client:
        header = await bearer(db, account)
        assert (await client.post("/api/v1/things", json={"text": "x"}, headers=foreign | header)).status_code == 200
        assert (await client.post("/api/v1/webhooks/sandbox", content=b"x", headers=foreign)).status_code == 200
        # An Authorization header of any kind switches the cookie off, so it can't be a way round.
        basic = foreign | {"authorization": "Basic eDp5"}
        assert (await client.post("/api/v1/things", json={"text": "x"}, headers=basic)).status_code == 401
        # Signing somebody in from another site's page would be a trick too.
        login = await client.post("/api/v1/auth/login", json={"email": "a@b.c", "password": "x"}, headers=foreign)
        assert login.status_code == 403


async def test_bodies_have_a_limit_declared_or_not(app: FastAPI) -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        for _ in range(0, size, 4096):
            yield b"x" * 4096

    async with client_of(app) as client:
        full = await client.post("/api/v1/webhooks/sandbox", content=b"x" * BODY_BYTES_MAX)
        assert full.json() == BODY_BYTES_MAX
        for body in (b"x" * (BODY_BYTES_MAX + 1), chunks(BODY_BYTES_MAX + 4096)):
            answer = await client.post("/api/v1/webhooks/sandbox", content=body)
            assert (answer.status_code, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
        streamed = await client.post("/api/v1/webhooks/sandbox", content=chunks(8192))
        assert streamed.json() == 8192


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'{"text": "x"}', "text/plain"),
        (b'{"text": "x"}', ""),
        (b"text=x", "application/x-www-form-urlencoded"),
        (b'{"text": "a\\u0000b"}', "application/json"),
        (b'{"text": "x", "more\\u0000": 1}', "application/json"),
        (b'{"text": "x", "deep": [["\\u0000"]]}', "application/json"),
        (b'{"text": "\\ud800"}', "application/json"),
        (b'{"text": "\xff\xfe"}', "application/json"),
        (b'{"text": 1}', "application/json"),
        (b'{"text": "x", "number": NaN}', "application/json"),
        (b'{"text": "x", "number": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json"),
        (b'{"text": "x", "a": ' + b"[" * 500 + b"]" * 500 + b"}", "application/json"),
    ],
)
async def test_malformed_bodies_are_refused_plainly(
    db: Database, app: FastAPI, content: bytes, content_type: str
) -> None:
    account = await an_account(db, "asha@example.com")
    async with client_of(app) as client:
        headers = (await bearer(db, account)) | {"content-type": content_type}
        answer = await client.post("/api/v1/things", content=content, headers=headers)
        assert answer.status_code in (400, 422), answer.text
        assert answer.json()["code"] == "INVALID_REQUEST"


async def test_refusals_never_repeat_what_was_sent(db: Database, app: FastAPI) -> None:
    account = await an_account(db, "asha@example.com")
    async with client_of(app) as client:
        header = await bearer(db, account)
        body = {"text": 1, "password": "hunter2hunter2", "number": "hunter2hunter2"}
        answer = await client.post("/api/v1/things", json=body, headers=header)
        assert answer.status_code == 422
        assert {error["field"] for error in answer.json()["errors"]} == {"body.text", "body.number"}
        assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/v1/things/1", 422),
        ("/api/v1/things/%00", 422),
        ("/api/v1/things/" + "a" * 3000, 422),
        ("/api/v1/things/%FF%FE", 422),
        (THING + "?q=a%00b", 422),
        (THING + "?q=" + "x" * 201, 422),
        (THING + "?q=%ED%A0%80", 200),  # half a pair, not UTF-8: read as a replacement
        ("/api/v1/nothing", 404),
        ("/static/../pyproject.toml", 404),
        ("/static/%2e%2e/auth.py", 404),
    ],
)
async def test_bad_addresses(app: FastAPI, path: str, status: int) -> None:
    async with client_of(app) as client:
        answer = await client.get(path)
        assert answer.status_code == status, answer.text
        if status != 200:
            assert answer.headers["content-type"] == "application/problem+json"


async def test_wrong_method(app: FastAPI) -> None:
    async with client_of(app) as client:
        answer = await client.delete(THING)
        assert (answer.status_code, answer.json()["code"]) == (405, "METHOD_NOT_ALLOWED")


async def test_trace_contexts_are_taken_or_made(app: FastAPI) -> None:
    given = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    async with client_of(app) as client:
        assert (await client.get(THING, headers={"traceparent": given})).json()["trace"] == given
        for bad in ("", "x", given.upper(), "00-" + "0" * 32 + "-" + "cd" * 8 + "-01", given + "-x", "ff" + given[2:]):
            made = (await client.get(THING, headers={"traceparent": bad})).json()["trace"]
            assert made != bad
            assert made.startswith("00-")


async def test_assets_are_kept_for_ever_under_their_hash(app: FastAPI) -> None:
    async with client_of(app) as client:
        page = (await client.get("/login")).text
        address = next(part for part in page.split('"') if part.startswith("/static/app.css?v="))
        assert "immutable" in (await client.get(address)).headers["cache-control"]
        assert (await client.get("/static/app.css?v=0")).headers["cache-control"] == "no-cache"
        assert (await client.get("/static/app.css")).headers["cache-control"] == "no-cache"
        assert "style=" not in page  # the policy would switch it off
        assert "<script>" not in page


def test_a_route_without_a_policy_stops_the_start() -> None:
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(router)
    found = check_routes(app)
    assert found["POST /api/v1/auth/login"] == "auth:login"

    forgotten = APIRouter(prefix="/api/v1")
    forgotten.add_api_route("/forgotten", bug, methods=["GET"])
    app.include_router(forgotten)
    with pytest.raises(RouteWithoutPolicy, match="GET /api/v1/forgotten"):
        check_routes(app)


def test_a_socket_without_a_policy_stops_the_start() -> None:
    async def listen(socket: WebSocket) -> None: ...

    app = FastAPI(docs_url=None, redoc_url=None)
    app.add_api_websocket_route("/ws", listen, dependencies=[checked_inside("students:read")])
    assert check_routes(app)["WEBSOCKET /ws"] == "students:read"
    app.add_api_websocket_route("/forgotten", listen)
    with pytest.raises(RouteWithoutPolicy, match="WEBSOCKET /forgotten"):
        check_routes(app)


def test_docs_pages_and_foreign_mounts_need_a_policy_too() -> None:
    with pytest.raises(RouteWithoutPolicy, match="/docs"):
        check_routes(FastAPI())
    app = FastAPI(docs_url=None, redoc_url=None)
    app.mount("/other", FastAPI())
    with pytest.raises(RouteWithoutPolicy, match="/other"):
        check_routes(app)


def test_an_unknown_action_is_refused_at_import() -> None:
    for mark in (allow, public, checked_inside):
        with pytest.raises(KeyError):
            mark("nobody:thought_of_it")
