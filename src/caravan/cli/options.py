"""The options that commands share, and the way from them to settings: problems are one line and exit code 1."""

from __future__ import annotations

import json
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn
from uuid import UUID

import typer

if TYPE_CHECKING:
    from caravan.settings import Settings

FINE, FAILED, USAGE, FOUND_PROBLEMS = 0, 1, 2, 6

Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="The data folder (.caravan).")]
_answers_in_json: ContextVar[bool] = ContextVar("answers_in_json", default=False)


def _remember(given: bool) -> bool:
    _answers_in_json.set(given)
    return given


def an_id(text: str) -> UUID:
    """The parser of every argument that is an id."""
    try:
        return UUID(text)
    except ValueError:
        what = "an e-mail address, and " if "@" in text else ""
        raise typer.BadParameter(
            f"{text[:60]!r} is {what}no id, such as 9e16d892-4324-4568-be60-163aa1665683. The console finds purchases"
            " by an e-mail address or a name (/admin/purchases)"
        ) from None


Id = Annotated[UUID, typer.Argument(parser=an_id)]
AsJson = Annotated[bool, typer.Option("--json", callback=_remember, help="One JSON document on standard output.")]
Note = Annotated[str | None, typer.Option("--note", help="Why: kept in the audit log.")]


def fail(message: str, code: str = "FAILED") -> NoReturn:
    """One line on standard error, exit code 1; with --json also a document with the stable code."""
    known = "" if code == "FAILED" else f" [{code}]"
    typer.echo(f"caravan: {message}{known}", err=True)
    if _answers_in_json.get():
        show_error(code, message)
    raise typer.Exit(FAILED)


def show_error(code: str, detail: str) -> None:
    """`{"error": {"code", "detail"}}` on standard output."""
    typer.echo(json.dumps({"error": {"code": code, "detail": detail}}, ensure_ascii=False, indent=2))


def fail_for_lack_of_database(data: Path | None, error: BaseException) -> NoReturn:
    """One line; it names the setting, where there is one."""
    from caravan.db.reach import why

    whose = "POSTGRES_URL: the" if settings_of(data).postgres_url is not None else "The"
    fail(f"{whose} database does not answer ({why(error)})")


def start_command(data: Path | None, service: str) -> str:
    """What starts a service that is missing here: `up` runs them all where the database is its own."""
    if settings_of(data).postgres_url is not None:
        return f"caravan serve {service}"
    return "caravan up" + (f" --data {data}" if data else "")


def settings_of(data: Path | None, **given: object) -> Settings:
    """Settings from the environment and the command line; ends the command where they are bad."""
    from caravan.settings import BadSettings, load_settings

    try:
        return load_settings(data_dir=data, **given)
    except BadSettings as error:
        fail(str(error))


def database_settings(data: Path | None, **given: object) -> Settings:
    """Settings with a database: POSTGRES_URL's, or the embedded one of the data folder, where it runs."""
    settings = settings_of(data, **given)
    if settings.postgres_url is not None:
        return settings
    from caravan.db.embedded import EmbeddedPostgresError, embedded_url

    try:
        url = embedded_url(settings.data_dir)
    except EmbeddedPostgresError as error:
        fail(str(error))
    if url is None:
        fail(
            f"There is no database: none runs in {settings.data_dir} (start it with `caravan up`),"
            " and POSTGRES_URL is not set."
        )
    return settings_of(data, postgres_url=url, **given)
