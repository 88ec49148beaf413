"""Stages and reasons in an operator's words: what is so, and what to do. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from markupsafe import Markup

from caravan.admin.purchases import Listed
from caravan.fulfilment.alerts import Alert
from caravan.fulfilment.wording import reason_words, stage_words
from caravan.web.formats import duration, money, when

CONSOLE_ZONE: Final = "Asia/Kolkata"  # whose clock is on the operators' wall


def here(instant: datetime) -> Markup:
    """An instant as every page of the console has it, except for a purchase's own: those are in its student's zone."""
    return when(instant, CONSOLE_ZONE)


def precise(instant: datetime, zone_name: str | None) -> str:
    """`21 Nov 2026, 11:11:20.123 IST`: what happened within one second keeps its order."""
    try:
        local = instant.astimezone(ZoneInfo(zone_name or "UTC"))
    except (ZoneInfoNotFoundError, ValueError):
        local = instant.astimezone(UTC)
    return f"{local.day} {local:%b %Y, %H:%M:%S}.{local.microsecond // 1000:03d} {local.tzname()}"


def where_to_look(alert: Alert) -> str:
    """The page of the console on which an alert's matter is mended."""
    match alert.name:
        case "MONEY_OVERDUE":
            return "/admin/waiting"
        case "MONEY_WAITING":
            return f"/admin/waiting?reason={alert.subject}"
        case "MONEY_UNCLAIMED":
            return "/admin#unclaimed"
        case "DEAD_LETTERS":
            return "/admin/dead-letters"
        case _:
            return "/admin/workers"


def state_sentence(line: Listed, now: datetime) -> str:
    """The whole state of a purchase in one or two plain sentences."""
    finding = line.finding
    said = stage_words(finding.stage)
    if line.waiting_since is not None:
        waited = duration((now - line.waiting_since).total_seconds())
        said = f"{said[:-1]}; {money(line.amount_cents, line.currency)} undelivered for {waited}."
    if finding.reason:
        said += f" {reason_words(finding.reason)}"
    return said
