"""Writes by hand: a note where the contract wants one, exactly one audit row; and the commands of the command line."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import typer
from typer.testing import CliRunner

from caravan.cli.app import app as cli
from caravan.db import Database
from caravan.ids import new_id
from caravan.web.auth import Role
from caravan.web.policies import POLICIES, PUBLIC
from verify.authz_edges import check
from verify.authz_matrix import NOTE, Route, ask, ids_of
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import ScratchDatabase
from verify.site import Cast, Site, snapshot

# The contract leaves the note to the operator here.
NOTE_OPTIONAL = (
    "/allocations/auto-assign",
    "/allocations/{allocation_id}/approve",
    "/allocations/{allocation_id}/sessions",
)
# Writes that families do too, by the same route: an admin does them in a family's place and leaves an audit row, but is
# not asked for a note.
FOR_FAMILIES = frozenset({"carts:update", "payments:create", "payments:confirm"})
COUNT_AUDIT = "select count(*) from audit_log"


def is_admin_write(route: Route) -> bool:
    return (
        route.method not in ("GET", "HEAD")
        and route.action not in PUBLIC
        and POLICIES[route.action].get(Role.ADMIN) == "any"
    )


async def attack_notes(result: PartResult, site: Site, cast: Cast, routes: list[Route]) -> None:
    """Without a note nothing happens and the answer says NOTE_REQUIRED; with one, a change has one audit row."""
    admin = cast.people["admin"]
    writes = [route for route in routes if is_admin_write(route)]
    for route in writes:
        if route.path.endswith(NOTE_OPTIONAL) or route.action in FOR_FAMILIES:
            continue
        for note in (None, "", "  \n\t "):
            body = {name: value for name, value in (route.body or {}).items() if name != "note"}
            bare = Route(
                route.label, route.method, route.path, route.action, body | ({} if note is None else {"note": note})
            )
            before = await _count(site.db)
            answer = await ask(site, bare, admin, ids_of(cast, "own", route))
            refused = answer.status_code == 422 and ("NOTE_REQUIRED" in answer.text or route.is_page)
            said = f"{route.label} with the note {note!r}: {answer.status_code} {answer.text[:100]}"
            check(result, refused and await _count(site.db) == before, said, "note")
    for route in writes:
        body = dict(route.body or {}) | ({} if route.action in FOR_FAMILIES else NOTE)
        before, were = await _count(site.db), await _state(site.db)
        answer = await ask(
            site, Route(route.label, route.method, route.path, route.action, body), admin, ids_of(cast, "own", route)
        )
        rows = await _count(site.db) - before
        if answer.status_code < 400:
            now = await _state(site.db)
            touched = [name for name in now if now[name] != were.get(name)]
            right = rows == 1 or (rows == 0 and not touched)
            check(result, right, f"{route.label}: {answer.status_code}, {rows} audit rows, changed {touched}", "audit")
            result.good += 1
        else:
            # A refusal of auto-assign commits what it tried, and says so in its row.
            allowed = (0, 1) if route.path.endswith(NOTE_OPTIONAL) else (0,)
            check(result, rows in allowed, f"{route.label}: refused with {rows} audit rows", "refused")


async def _count(db: Database) -> int:
    async with db.transaction("verify", read_only=True) as tx:
        return await tx.value(COUNT_AUDIT)


async def _state(db: Database) -> dict[str, str]:
    """All that an audit row would speak of."""
    return {name: digest for name, digest in (await snapshot(db)).items() if name != "audit_log"}


# ------------------------------------------------------------------ commands

# What a command is: it concerns the platform or its database as a whole (not tried here), it reads, or it writes (with
# one audit row). A new command has to be entered, and `{names}` stand for things that are there.
PROCESSES = frozenset({"up", "serve", "demo", "migrate", "backup", "restore"})
READS: dict[str, str] = {
    "doctor": "", "workers": "", "lag": "", "dead-letters list": "--all", "dead-letters show": "{dead_letter_id}",
    "diagnose": "--payment {payment_id}", "clear-cache": "{student_id}", "pauses": "",
}  # fmt: skip
WRITES: dict[str, str] = {
    "repair": "--payment {payment_id}",
    "trigger-allocation": "{student_id} {course_id}",
    "create-purchase": "{payment_id}",
    "emit-events": "{purchase_id}",
    "dead-letters replay": "{dead_letter_id}",
    "dead-letters discard": "{dead_letter_id} --note why",
    "failover": "postgres-log --note why",
    "pause": "allocated --course {course_id} --note why",
    "resume": "allocated --course {course_id} --note why",
    "confirm-start": "{payment_id} --note why",
    "refill": "",
    "dealt-with": "sandbox msg_nothing --note why",
}
EXIT_FINE = (0, 6)


def list_commands() -> list[str]:
    """Every command there is, by the command line's own account of itself."""
    found: list[str] = []

    def walk(command: Any, words: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append(" ".join(words))
        else:
            for name, child in inner.items():
                walk(child, (*words, name))

    walk(typer.main.get_command(cli), ())
    return sorted(found)


async def attack_commands(context: Context, result: PartResult, cast: Cast, template: str) -> None:
    """Whoever may open the database is the operator: each command, on what is there and on what isn't."""
    for name in list_commands():
        if name in PROCESSES:
            continue
        if name not in READS and name not in WRITES:
            result.violated(f"caravan {name}: does it read or write? (say it in verify/authz_rules.py)")
            continue
        for side in ("own", "none"):
            database = context.server.create(template)
            await _command(result, database, name, cast, side)
            context.server.drop(database)


async def _command(result: PartResult, database: ScratchDatabase, name: str, cast: Cast, side: str) -> None:
    given = (READS | WRITES)[name]
    ids = {key: (value if side == "own" else new_id()) for key, value in cast.own.items() if isinstance(value, UUID)}
    words = [*name.split(), *given.format(**ids).split(), "--json"]
    async with database.database() as db:
        before, were = await _count(db), await _state(db)
        ended = await asyncio.to_thread(CliRunner().invoke, cli, words, env={"POSTGRES_URL": database.url})
        rows = await _count(db) - before
        changed = were != await _state(db)
    cell = f"caravan {name} on {side}"
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        check(result, False, f"{cell}: {ended.exception!r}", "command")
        return
    if side == "none" and "{" in given:
        refused = ended.exit_code == 1 and rows == 0 and ended.stderr.count("\n") == 1
        refused = refused and [*json.loads(ended.stdout)] == ["error"]
        if name == "diagnose":
            refused = ended.exit_code in (0, 1)
        check(result, refused, f"{cell}: exit {ended.exit_code}, {rows} rows, {ended.stderr[:150]}", "command")
        return
    if ended.exit_code in EXIT_FINE:
        check(
            result,
            rows == changed or (rows == 1 and name in WRITES),
            f"{cell}: exit {ended.exit_code} and {rows} audit rows",
            "command",
        )
        json.loads(ended.stdout)
        result.good += 1
    else:
        check(result, rows == 0 and ended.exit_code == 1, f"{cell}: exit {ended.exit_code}, {rows} rows", "command")
