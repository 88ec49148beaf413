"""Signing in and out: tokens, cookies, the limit on guesses."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Annotated

import httpx2
import pytest
from fastapi import APIRouter

from caravan.db import Database
from caravan.web import auth, login
from caravan.web.auth import Role
from caravan.web.policies import allow
from caravan.web.routes import router
from tests.clients import PASSWORD, an_account, bearer, client_of, make_app

EMAIL = "asha@example.com"
WRONG = {"email": EMAIL, "password": "not the password"}
RIGHT = {"email": EMAIL, "password": PASSWORD}

private = APIRouter()


@private.get("/api/v1/private")
async def private_route(actor: Annotated[auth.Actor, allow("students:read")]) -> dict[str, str]:
    return {"name": actor.name, "reach": actor.reach}


async def test_sign_in_use_and_sign_out(db: Database) -> None:
    account = await an_account(db, EMAIL)
    async with client_of(make_app(db, router, private)) as client:
        answer = await client.post("/api/v1/auth/login", json=RIGHT | {"email": " Asha@Example.COM "})
        assert answer.status_code == 200, answer.text
        user = answer.json()["user"]
        assert user == {"id": str(account.account_id), "role": "student", "studentIds": [], "trainerId": None}
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert "Secure" not in cookie
        header = {"authorization": f"Bearer {answer.json()['token']}"}
        assert (await client.get("/api/v1/private")).json() == {"name": EMAIL, "reach": "own"}

        client.cookies.clear()
        assert (await client.get("/api/v1/private")).json()["code"] == "NOT_SIGNED_IN"
        assert (await client.get("/api/v1/private", headers=header)).status_code == 200

        assert (await client.post("/api/v1/auth/logout", headers=header)).status_code == 204
        assert (await client.get("/api/v1/private", headers=header)).status_code == 401


async def test_https_cookie_is_bound_to_the_host(db: Database) -> None:
    await an_account(db, EMAIL)
    async with client_of(make_app(db, router, private), base_url="https://caravan.test") as client:
        cookie = (await client.post("/api/v1/auth/login", json=RIGHT)).headers["set-cookie"]
        assert cookie.startswith("__Host-caravan_session=")
        assert "Secure" in cookie
        assert "Path=/" in cookie
        assert "Domain" not in cookie
        assert (await client.get("/api/v1/private")).status_code == 200


async def test_the_token_is_nowhere_in_the_database(db: Database) -> None:
    await an_account(db, EMAIL)
    token, _ = await login.log_in(db, EMAIL, PASSWORD, "10.0.0.1")
    async with db.transaction() as tx:
        kept = await tx.values("select token_hash from auth_tokens")
    assert kept == [auth.hash_token(token)]
    assert token.encode() not in kept[0]


async def test_wrong_unknown_and_disabled_answer_the_same(client: httpx2.AsyncClient, db: Database) -> None:
    await an_account(db, EMAIL)
    gone = await an_account(db, "gone@example.com")
    async with db.transaction() as tx:
        assert gone.account_id
        assert await auth.disable_account(tx, gone.account_id)
    answers = [
        await client.post("/api/v1/auth/login", json=body)
        for body in (
            WRONG,
            {"email": "nobody@example.com", "password": PASSWORD},
            {"email": "gone@example.com", "password": PASSWORD},
            {"email": "no address at all", "password": PASSWORD},
        )
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["code"] == "WRONG_CREDENTIALS"


async def test_an_unknown_account_costs_the_same_work(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await an_account(db, EMAIL)
    looked: list[str] = []
    verify = auth._verify

    def count(password_hash: str, password: str) -> bool:
        looked.append(password_hash.rpartition("$")[0].rpartition("$")[0])  # the parameters, without salt and hash
        return verify(password_hash, password)

    monkeypatch.setattr(auth, "_verify", count)
    for email in (EMAIL, "nobody@example.com", "no address"):
        with pytest.raises(login.WrongCredentials):
            await login.log_in(db, email, "wrong password", "10.0.0.1")
    assert len(looked) == 3
    assert len(set(looked)) == 1


async def test_a_disabled_account_is_out_at_once(db: Database) -> None:
    account = await an_account(db, EMAIL, Role.ADMIN)
    async with client_of(make_app(db, private)) as client:
        header = await bearer(db, account)
        assert (await client.get("/api/v1/private", headers=header)).status_code == 200
        async with db.transaction() as tx:
            # Only the mark, not the deletion of its tokens: the check joins accounts.
            await tx.execute("update accounts set disabled_at = now()")
        assert (await client.get("/api/v1/private", headers=header)).status_code == 401


AGE_TOKENS = """
update auth_tokens set created_at = created_at - %(by)s, expires_at = expires_at - %(by)s, used_at = used_at - %(by)s
"""


async def test_tokens_end_when_idle_and_in_any_case(db: Database) -> None:
    account = await an_account(db, EMAIL)
    assert account.account_id
    async with db.transaction() as tx:
        token = await auth.issue_token(tx, account.account_id)

    async def holder_after(more: timedelta) -> auth.Actor | None:
        async with db.transaction() as tx:
            await tx.execute(AGE_TOKENS, {"by": more})
        return await auth.find_actor(db, token)

    idle = auth.TOKEN_IDLE + timedelta(seconds=1)
    assert await holder_after(idle) is None
    assert await holder_after(-idle)
    for _ in range(4):  # in use, it lives on
        assert await holder_after(timedelta(days=6))
    assert await holder_after(auth.TOKEN_LIFETIME - timedelta(days=24)) is None
    async with db.transaction() as tx:
        assert await auth.purge(tx) == 1


async def test_guesses_are_limited_per_email(client: httpx2.AsyncClient, db: Database) -> None:
    await an_account(db, EMAIL)
    # At once: counting first means that a crowd gets no more guesses than a queue.
    answers = await asyncio.gather(
        *(client.post("/api/v1/auth/login", json=WRONG) for _ in range(login.ATTEMPTS_PER_EMAIL + 3))
    )
    assert sorted(answer.status_code for answer in answers) == [401] * login.ATTEMPTS_PER_EMAIL + [429] * 3
    refused = await client.post("/api/v1/auth/login", json=RIGHT)
    assert refused.status_code == 429
    assert refused.json()["code"] == "LOGIN_RATE_LIMITED"
    assert 0 < int(refused.headers["retry-after"]) <= login.WINDOW.total_seconds() + 1

    async with db.transaction() as tx:
        await tx.execute("update login_attempts set attempted_at = attempted_at - interval '16 minutes'")
    assert (await client.post("/api/v1/auth/login", json=RIGHT)).status_code == 200


async def test_a_right_password_wipes_the_slate(client: httpx2.AsyncClient, db: Database) -> None:
    await an_account(db, EMAIL)
    for _ in range(3):
        for _ in range(login.ATTEMPTS_PER_EMAIL - 1):
            assert (await client.post("/api/v1/auth/login", json=WRONG)).status_code == 401
        assert (await client.post("/api/v1/auth/login", json=RIGHT)).status_code == 200


async def test_guesses_are_limited_per_address(client: httpx2.AsyncClient, db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            "insert into login_attempts (email_hash, address, attempted_at)"
            " select sha256(n::text::bytea), '127.0.0.1', now() from generate_series(1, %(n)s) n",
            {"n": login.ATTEMPTS_PER_ADDRESS},
        )
    assert (await client.post("/api/v1/auth/login", json=WRONG)).status_code == 429


async def test_passwords_have_bounds() -> None:
    for password in ("short", "x" * 257):
        try:
            await auth.hash_password(password)
        except auth.InvalidPassword:
            continue
        raise AssertionError(password)


async def test_the_login_page_works_without_javascript(client: httpx2.AsyncClient, db: Database) -> None:
    await an_account(db, EMAIL)
    accept = {"accept": "text/html"}
    led = await client.get("/", headers=accept)
    assert (led.status_code, led.headers["location"]) == (303, "/login?next=/")
    page = await client.get("/login?next=/courses", headers=accept)
    assert 'name="next" value="/courses"' in page.text

    origin = {"origin": "http://caravan.test"}
    refused = await client.post("/login", data=WRONG, headers=origin)
    assert refused.status_code == 401
    assert 'role="alert"' in refused.text
    assert WRONG["password"] not in refused.text

    done = await client.post("/login", data=RIGHT | {"next": "/courses"}, headers=origin)
    assert (done.status_code, done.headers["location"]) == (303, "/courses")
    assert (await client.get("/", headers=accept)).headers["location"] == "/home"
    out = await client.post("/logout", headers=origin)
    assert out.headers["location"] == "/login"
    assert (await client.get("/", headers=accept)).headers["location"].startswith("/login")


async def test_signing_in_leads_nowhere_else(client: httpx2.AsyncClient, db: Database) -> None:
    await an_account(db, EMAIL)
    for wanted in ("//evil.example", "https://evil.example", "/\\evil.example", "/\t/evil.example", "javascript:x"):
        done = await client.post("/login", data=RIGHT | {"next": wanted}, headers={"origin": "http://caravan.test"})
        assert done.headers["location"] == "/home"
        client.cookies.clear()
