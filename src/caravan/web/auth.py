"""Who is asking: accounts, passwords, tokens, tickets. Owns accounts, auth_tokens, realtime_tickets.

A token is 32 random bytes that only its holder knows; we keep its SHA-256. Every look at a token joins the account, so
a disabled account is out at its next request.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final, Literal
from uuid import UUID

import argon2
from psycopg import errors as pg

from caravan.db import Database, Tx
from caravan.errors import Conflict, Invalid, NotFound
from caravan.ids import new_id

TOKEN_IDLE: Final = timedelta(days=7)
TOKEN_LIFETIME: Final = timedelta(days=30)
TOKEN_TOUCH: Final = timedelta(minutes=10)  # used_at is this coarse, so that reading is not writing
TICKET_LIFETIME: Final = timedelta(seconds=30)
TOKEN_CHARACTERS_MAX: Final = 200
PASSWORD_CHARACTERS_MIN: Final = 8
PASSWORD_CHARACTERS_MAX: Final = 256
EMAIL: Final = re.compile(r"[^@\s\x00-\x1f\x7f\ud800-\udfff]{1,64}@[^@\s\x00-\x1f\x7f\ud800-\udfff]{1,189}")

# OWASP's parameters for argon2id: 19 MiB, 2 passes. Two threads bound what many logins at once can take.
_hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="argon2")
_nobodys_hash = _hasher.hash(secrets.token_urlsafe(16))

Reach = Literal["own", "any"]


class Role(StrEnum):
    STUDENT = "student"
    TRAINER = "trainer"
    SUPPORT = "support"
    ADMIN = "admin"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts. `name` is for audit rows (`asha@example.com`, `cli:root`); `reach` is what the policy of this request
    gave: `own` means only `student_ids` and `trainer_id`."""

    account_id: UUID | None
    name: str
    role: Role
    student_ids: frozenset[UUID] = frozenset()
    trainer_id: UUID | None = None
    reach: Reach = "own"

    @staticmethod
    def system(name: str) -> Actor:
        """The command line, the reconciler: may reach anything."""
        return Actor(account_id=None, name=name, role=Role.SYSTEM, reach="any")

    def require_student(self, student_id: UUID, absent: str = "There is no such student.") -> None:
        """Raise NotFound for somebody else's student: what isn't yours doesn't exist.

        `absent`: what the route says of a thing of the student's that isn't there, so that both answer alike.
        """
        if self.reach != "any" and student_id not in self.student_ids:
            raise NotFound(absent)

    def require_trainer(self, trainer_id: UUID) -> None:
        """Raise NotFound for another trainer."""
        if self.reach != "any" and trainer_id != self.trainer_id:
            raise NotFound("There is no such trainer.")


class EmailTaken(Conflict):
    """An account with this e-mail address exists already."""

    code = "EMAIL_TAKEN"


class InvalidEmail(Invalid):
    """This is not an e-mail address."""

    code = "INVALID_EMAIL"


class InvalidPassword(Invalid):
    """A password has 8 to 256 characters."""

    code = "INVALID_PASSWORD"


# --- passwords and accounts ---


def normalise_email(email: str) -> str:
    """The one spelling we keep and compare. Raises InvalidEmail."""
    email = email.strip().lower()
    if not EMAIL.fullmatch(email):
        raise InvalidEmail
    return email


async def hash_password(password: str) -> str:
    """Argon2id, in a thread: it takes tens of milliseconds on purpose. Call it before the transaction.

    Raises InvalidPassword for one that is too short or too long.
    """
    if not PASSWORD_CHARACTERS_MIN <= len(password) <= PASSWORD_CHARACTERS_MAX:
        raise InvalidPassword
    return await asyncio.get_running_loop().run_in_executor(_threads, _hasher.hash, password)


async def check_password(password_hash: str | None, password: str) -> bool:
    """True where the password is right; takes as long where there is no such account (None)."""
    right = await asyncio.get_running_loop().run_in_executor(
        _threads, _verify, password_hash or _nobodys_hash, password[: PASSWORD_CHARACTERS_MAX + 1]
    )
    return right and password_hash is not None


def _verify(password_hash: str, password: str) -> bool:
    try:
        return _hasher.verify(password_hash, password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False


INSERT_ACCOUNT = """
insert into accounts (id, email, phone, name, role, password_hash, created_at)
values (%(id)s, %(email)s, %(phone)s, %(name)s, %(role)s, %(password_hash)s, %(now)s)
"""


async def create_account(
    tx: Tx, *, email: str, name: str, role: Role, password_hash: str, phone: str | None = None
) -> UUID:
    """A new account's id. Raises EmailTaken, InvalidEmail."""
    account_id = new_id()
    values = {
        "id": account_id,
        "email": normalise_email(email),
        "phone": phone,
        "name": name,
        "role": str(role),
        "password_hash": password_hash,
        "now": tx.now,
    }
    try:
        async with tx.savepoint():
            await tx.execute(INSERT_ACCOUNT, values)
    except pg.UniqueViolation:
        raise EmailTaken from None
    return account_id


DISABLE_ACCOUNT = """
update accounts set disabled_at = %(now)s where id = %(account_id)s and disabled_at is null
"""
DELETE_TOKENS_OF_ACCOUNT = "delete from auth_tokens where account_id = %(account_id)s"
DELETE_TICKETS_OF_ACCOUNT = "delete from realtime_tickets where account_id = %(account_id)s"
FIND_ACCOUNT = "select id, email, name, role, disabled_at from accounts where id = %(account_id)s"


async def disable_account(tx: Tx, account_id: UUID) -> bool:
    """Shut an account out: its tokens and tickets end with this transaction. False: it was disabled already.

    Raises NotFound.
    """
    if await tx.find(FIND_ACCOUNT, {"account_id": account_id}) is None:
        raise NotFound("There is no such account.")
    changed = await tx.execute(DISABLE_ACCOUNT, {"account_id": account_id, "now": tx.now})
    await tx.execute(DELETE_TOKENS_OF_ACCOUNT, {"account_id": account_id})
    await tx.execute(DELETE_TICKETS_OF_ACCOUNT, {"account_id": account_id})
    return changed > 0


# What a login compares with. Disabled accounts are found too, so that they take the same time.
FIND_CREDENTIALS = """
select id, password_hash, disabled_at from accounts where lower(email) = %(email)s
"""


# --- tokens ---

INSERT_TOKEN = """
insert into auth_tokens (token_hash, account_id, created_at, expires_at, used_at)
values (%(token_hash)b, %(account_id)s, %(now)s, %(expires_at)s, %(now)s)
"""  # noqa: S105


async def issue_token(tx: Tx, account_id: UUID) -> str:
    """A new token; the only time that it is seen."""
    token = secrets.token_urlsafe(32)
    await tx.execute(
        INSERT_TOKEN,
        {
            "token_hash": hash_token(token),
            "account_id": account_id,
            "now": tx.now,
            "expires_at": tx.now + TOKEN_LIFETIME,
        },
    )
    return token


# The token's account, if both are good; used_at moves on now and then.
FIND_ACTOR = """
with found as (
  select t.token_hash, t.used_at, a.id, a.email, a.role
  from auth_tokens t join accounts a on a.id = t.account_id
  where t.token_hash = %(token_hash)b and a.disabled_at is null
    and t.expires_at > now() and t.used_at > now() - %(idle)s::interval
), touched as (
  update auth_tokens t set used_at = now() from found
  where t.token_hash = found.token_hash and found.used_at < now() - %(touch)s::interval
)
select found.id, found.email, found.role,
       array(select s.student_id from account_students s where s.account_id = found.id) as student_ids,
       (select r.id from trainers r where r.account_id = found.id) as trainer_id
from found
"""


async def find_actor(db: Tx | Database, token: str) -> Actor | None:
    """Whose token it is; None for an unknown, ended or disabled one. `reach` is `own` until a policy says otherwise."""
    if not token or len(token) > TOKEN_CHARACTERS_MAX:
        return None
    rows = await db.all(FIND_ACTOR, {"token_hash": hash_token(token), "idle": TOKEN_IDLE, "touch": TOKEN_TOUCH})
    return _actor(rows[0]) if rows else None


# Sign-ins that are still good, with what is theirs now.
LIST_ACTORS = """
select t.token_hash, a.id, a.email, a.role,
       array(select s.student_id from account_students s where s.account_id = a.id) as student_ids,
       (select r.id from trainers r where r.account_id = a.id) as trainer_id
from auth_tokens t join accounts a on a.id = t.account_id
where t.token_hash = any(%(token_hashes)b::bytea[]) and a.disabled_at is null
  and t.expires_at > %(now)s and t.used_at > %(now)s - %(idle)s::interval
"""


async def list_actors(tx: Tx, token_hashes: Sequence[bytes]) -> dict[bytes, Actor]:
    """Those of these sign-ins that may still act: whoever holds a socket asks this every few seconds."""
    rows = await tx.all(LIST_ACTORS, {"token_hashes": list(token_hashes), "now": tx.now, "idle": TOKEN_IDLE})
    return {row["token_hash"]: _actor(row) for row in rows}


DELETE_TOKEN = "delete from auth_tokens where token_hash = %(token_hash)b"  # noqa: S105


async def revoke_token(tx: Tx, token: str) -> None:
    await tx.execute(DELETE_TOKEN, {"token_hash": hash_token(token)})


def _actor(row: dict[str, Any]) -> Actor:
    return Actor(
        account_id=row["id"],
        name=row["email"],
        role=Role(row["role"]),
        student_ids=frozenset(row["student_ids"]),
        trainer_id=row["trainer_id"],
    )


def hash_token(token: str) -> bytes:
    """How we keep a token or a ticket."""
    return hashlib.sha256(token.encode(errors="replace")).digest()


# --- tickets: a token for one WebSocket handshake, which can't send headers ---

INSERT_TICKET = """
insert into realtime_tickets (ticket_hash, account_id, token_hash, expires_at)
values (%(ticket_hash)b, %(account_id)s, %(token_hash)b, %(expires_at)s)
"""


async def issue_ticket(tx: Tx, actor: Actor, token: str) -> str:
    """Good once, for 30 seconds, and no longer than the sign-in that asks for it."""
    ticket = secrets.token_urlsafe(32)
    await tx.execute(
        INSERT_TICKET,
        {
            "ticket_hash": hash_token(ticket),
            "account_id": actor.account_id,
            "token_hash": hash_token(token),
            "expires_at": tx.now + TICKET_LIFETIME,
        },
    )
    return ticket


# Deleting is redeeming: of two that try, one gets the row.
REDEEM_TICKET = """
delete from realtime_tickets where ticket_hash = %(ticket_hash)b returning token_hash, expires_at
"""


async def redeem_ticket(tx: Tx, ticket: str) -> bytes | None:
    """The hash of the token that asked for it, for `list_actors`; None for an unknown, used or late ticket."""
    if not ticket or len(ticket) > TOKEN_CHARACTERS_MAX:
        return None
    row = await tx.find(REDEEM_TICKET, {"ticket_hash": hash_token(ticket)})
    return row["token_hash"] if row and row["expires_at"] > tx.now else None


DELETE_ENDED_TOKENS = """
delete from auth_tokens where expires_at < %(now)s or used_at < %(now)s - %(idle)s::interval
"""
DELETE_ENDED_TICKETS = "delete from realtime_tickets where expires_at < %(now)s"


async def purge(tx: Tx) -> int:
    """Forget tokens and tickets that ended; how many. For the reconciler."""
    ended = await tx.execute(DELETE_ENDED_TOKENS, {"now": tx.now, "idle": TOKEN_IDLE})
    return ended + await tx.execute(DELETE_ENDED_TICKETS, {"now": tx.now})
