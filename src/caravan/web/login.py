"""Signing in and out, and how often one may try. Owns login_attempts.

An attempt is written down before the password is looked at, so that many guesses at once are counted too; a right
password wipes the account's slate.
"""

from __future__ import annotations

import hashlib
import ipaddress
from datetime import datetime, timedelta
from typing import Annotated, Final
from uuid import UUID

from pydantic import Field
from starlette.requests import Request

from caravan.db import Database, Tx
from caravan.db.tx import Row
from caravan.errors import DomainError
from caravan.web import auth
from caravan.web.auth import FIND_CREDENTIALS, Actor, InvalidEmail, Role
from caravan.web.schemas import In, Out

SOURCE: Final = "student-service"
WINDOW: Final = timedelta(minutes=15)
ATTEMPTS_PER_EMAIL: Final = 10
ATTEMPTS_PER_ADDRESS: Final = 100  # a school's whole network may share one


class WrongCredentials(DomainError):
    """The e-mail address or the password is wrong."""

    code = "WRONG_CREDENTIALS"
    status = 401


class LoginRateLimited(DomainError):
    """Too many attempts: wait a little."""

    code = "LOGIN_RATE_LIMITED"
    status = 429


class Credentials(In):
    email: Annotated[str, Field(max_length=320)]
    password: Annotated[str, Field(max_length=1024)]

    model_config = In.model_config | {"str_strip_whitespace": False, "hide_input_in_errors": True}


class User(Out):
    id: UUID
    role: Role
    student_ids: list[UUID]
    trainer_id: UUID | None = None


class SignedIn(Out):
    token: str
    user: User


# One guess at a time per e-mail address, so that the count is right.
LOCK_EMAIL = "select pg_advisory_xact_lock(hashtextextended(encode(%(email_hash)b, 'hex'), 7225072))"

# How many attempts are in the window, and when the first of the last so many leaves it.
COUNT_ATTEMPTS = """
select (select count(*) from login_attempts where email_hash = %(email_hash)b and attempted_at > %(since)s) as of_email,
       (select min(attempted_at) from login_attempts
        where email_hash = %(email_hash)b and attempted_at > %(since)s) as email_since,
       (select count(*) from login_attempts where address = %(address)s and attempted_at > %(since)s) as of_address,
       (select min(attempted_at) from login_attempts
        where address = %(address)s and attempted_at > %(since)s) as address_since
"""
INSERT_ATTEMPT = """
insert into login_attempts (email_hash, address, attempted_at) values (%(email_hash)b, %(address)s, %(now)s)
"""
DELETE_ATTEMPTS = "delete from login_attempts where email_hash = %(email_hash)b"


async def log_in(db: Database, email: str, password: str, address: str) -> tuple[str, Actor]:
    """A new token and whose it is. Raises WrongCredentials (the same for an unknown, a wrong and a disabled one, after
    the same time) and LoginRateLimited."""
    try:
        email = auth.normalise_email(email)
    except InvalidEmail:
        email = ""  # nobody's; goes the same way as everybody's
    email_hash = hashlib.sha256(email.encode()).digest()
    row = await db.transact(lambda tx: _count_attempt(tx, email, email_hash, address), SOURCE)
    right = await auth.check_password(row["password_hash"] if row else None, password)
    if row is None or not right or row["disabled_at"] is not None:
        raise WrongCredentials

    async def sign_in(tx: Tx) -> tuple[str, Actor]:
        await tx.execute(DELETE_ATTEMPTS, {"email_hash": email_hash})
        token = await auth.issue_token(tx, row["id"])
        actor = await auth.find_actor(tx, token)
        if actor is None:  # disabled in this very moment
            raise WrongCredentials
        return token, actor

    return await db.transact(sign_in, SOURCE)


async def _count_attempt(tx: Tx, email: str, email_hash: bytes, address: str) -> Row | None:
    """Write an attempt down; the account's row, if there is one. Raises LoginRateLimited."""
    named = {"email_hash": email_hash, "address": address, "now": tx.now, "since": tx.now - WINDOW}
    await tx.execute(LOCK_EMAIL, named)
    count = await tx.one(COUNT_ATTEMPTS, named)
    for number, limit, since in (
        (count["of_email"], ATTEMPTS_PER_EMAIL, count["email_since"]),
        (count["of_address"], ATTEMPTS_PER_ADDRESS, count["address_since"]),
    ):
        if number >= limit:
            raise LoginRateLimited(extra={"retryAfterSeconds": _seconds_until(since + WINDOW, tx.now)})
    await tx.execute(INSERT_ATTEMPT, named)
    return await tx.find(FIND_CREDENTIALS, {"email": email})


def _seconds_until(then: datetime, now: datetime) -> int:
    return max(1, int((then - now).total_seconds()) + 1)


DELETE_OLD_ATTEMPTS = "delete from login_attempts where attempted_at < %(since)s"


async def purge(tx: Tx) -> int:
    """Forget attempts that count no more; how many. For the reconciler."""
    return await tx.execute(DELETE_OLD_ATTEMPTS, {"since": tx.now - WINDOW})


def client_address(request: Request) -> str:
    """Where a request comes from, for counting: an IPv6 customer has a whole /64."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:100]
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def describe(actor: Actor) -> User:
    assert actor.account_id is not None
    return User(
        id=actor.account_id, role=actor.role, student_ids=sorted(actor.student_ids), trainer_id=actor.trainer_id
    )
