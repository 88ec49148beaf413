"""Every command, its options and its help. What a command does is imported when it runs."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from caravan.cli.options import AsJson, Data, Note

app = typer.Typer(
    name="caravan",
    help="Caravan delivers what was paid for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(given: bool) -> None:
    if given:
        from importlib.metadata import version

        from caravan.settings import find_build

        typer.echo(f"caravan {version('caravan')} (build {find_build()})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Say which release this is.")
    ] = False,
) -> None:
    """Caravan delivers what was paid for."""


# The first sentence of a command's help is its line in `caravan --help`: up to 50 letters are shown whole.
@app.command()
def up(
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port (8080).")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="With courses, trainers and accounts to try it on.")] = False,
) -> None:
    """Run the whole platform here, until Ctrl-C."""
    from caravan.cli.options import settings_of

    settings = settings_of(data, host=host, port=port, demo=demo or None)
    from caravan.apps.supervisor import up as run

    raise typer.Exit(run(settings))


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="The service, such as purchase-worker.")],
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port (8080; a worker: none).")] = None,
) -> None:
    """Run one service in this process.

    On the database of POSTGRES_URL (or of --data, where `up` runs).
    """
    from caravan.apps.services import SERVICES
    from caravan.cli.options import database_settings

    if name not in SERVICES:
        raise typer.BadParameter(f"{name} is not one of {', '.join(SERVICES)}", param_hint="NAME")
    settings = database_settings(data, host=host, port=port)
    from caravan.apps.serve import serve as run

    raise typer.Exit(run(settings, name))


@app.command()
def migrate(data: Data = None, as_json: AsJson = False) -> None:
    """Bring the database to this release's schema."""
    from caravan.cli import installation

    raise typer.Exit(installation.migrate(data, as_json=as_json))


@app.command()
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Also hold the whole log and every text against it.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Say whether this installation is well.

    Settings, database, workers, lag, and what must always be true.
    """
    from caravan.cli.doctor import doctor as run

    raise typer.Exit(run(data, deep=deep, as_json=as_json))


@app.command()
def demo(data: Data = None, as_json: AsJson = False) -> None:
    """Rehearse the incidents that started it all.

    On the running system (`caravan up --demo`).
    """
    from caravan.cli.demo import demo as run

    raise typer.Exit(run(data, as_json=as_json))


@app.command()
def diagnose(
    student_id: Annotated[UUID | None, typer.Argument()] = None,
    course_id: Annotated[UUID | None, typer.Argument()] = None,
    payment: Annotated[UUID | None, typer.Option("--payment", help="One payment.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Say why something is not delivered.

    Of a student (and course), or of a payment; without either: what waits or is stuck, then the most recent ones.
    """
    if payment is not None and student_id is not None:
        raise typer.BadParameter("choose one of STUDENT_ID (and COURSE_ID) and --payment ID")
    from caravan.cli.deliveries import diagnose as run

    raise typer.Exit(run(data, student_id, course_id, payment, as_json=as_json))


@app.command()
def repair(
    payment: Annotated[UUID | None, typer.Option("--payment", help="One payment.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every payment that is stuck.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="With --all: so many at most.")] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    note: Note = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Do the one safe next step for what is stuck.

    Through the worker's own code.
    """
    if (payment is None) is not everything:
        raise typer.BadParameter("choose one of --payment ID and --all")
    from caravan.cli.deliveries import repair_all, repair_one

    if payment is not None:
        raise typer.Exit(repair_one(data, payment, note, dry_run=dry_run, as_json=as_json))
    raise typer.Exit(repair_all(data, limit, note, dry_run=dry_run, as_json=as_json))


@app.command()
def trigger_allocation(
    student_id: UUID, course_id: UUID, note: Note = None, data: Data = None, as_json: AsJson = False
) -> None:
    """Find a trainer and sessions for a purchase.

    The one that the student made of the course.
    """
    from caravan.cli.deliveries import trigger_allocation as run

    raise typer.Exit(run(data, student_id, course_id, note, as_json=as_json))


@app.command()
def create_purchase(payment_id: UUID, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Create the purchase of a payment that succeeded."""
    from caravan.cli.deliveries import create_purchase as run

    raise typer.Exit(run(data, payment_id, note, as_json=as_json))


@app.command()
def emit_events(purchase_id: UUID, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Tell the student's screens again about a purchase."""
    from caravan.cli.deliveries import emit_events as run

    raise typer.Exit(run(data, purchase_id, note, as_json=as_json))


@app.command()
def clear_cache(student_id: UUID, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Forget what is cached of a student's screens."""
    from caravan.cli.deliveries import clear_cache as run

    raise typer.Exit(run(data, student_id, as_json=as_json))


@app.command()
def workers(data: Data = None, as_json: AsJson = False) -> None:
    """Who works, since when, and what is in their way."""
    from caravan.cli.workers import workers as run

    raise typer.Exit(run(data, as_json=as_json))


@app.command()
def lag(data: Data = None, as_json: AsJson = False) -> None:
    """How far each group of workers is behind."""
    from caravan.cli.workers import lag as run

    raise typer.Exit(run(data, as_json=as_json))


@app.command()
def failover(
    to: Annotated[str, typer.Argument(metavar="postgres-log|kafka", help="Where the workers take their events.")],
    note: Annotated[str, typer.Option("--note", help="Why: kept in the audit log.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Work without Kafka while it is away, and back.

    postgres-log: the workers take from the outbox what they have not processed; they follow while they run. kafka: back
    to the topics; what was done meanwhile is known and not done again.
    """
    from caravan.eventlog.carrier import Carrier

    if to not in tuple(Carrier):
        raise typer.BadParameter(f"{to} is not one of {', '.join(Carrier)}", param_hint="postgres-log|kafka")
    from caravan.cli.workers import failover as run

    raise typer.Exit(run(data, Carrier(to), note, as_json=as_json))


letters = typer.Typer(help="Events given up: list, show, replay, discard.", no_args_is_help=True)
app.add_typer(letters, name="dead-letters")


@letters.command("list")
def list_letters(
    everything: Annotated[bool, typer.Option("--all", help="Also those that were replayed or discarded.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """The newest first."""
    from caravan.cli.workers import list_letters as run

    raise typer.Exit(run(data, everything=everything, as_json=as_json))


@letters.command("show")
def show_letter(letter_id: UUID, data: Data = None, as_json: AsJson = False) -> None:
    """One, with its whole event, as JSON."""
    from caravan.cli.workers import show_letter as run

    raise typer.Exit(run(data, letter_id))


@letters.command("replay")
def replay(letter_id: UUID, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Run its handler again, once."""
    from caravan.cli.workers import replay as run

    raise typer.Exit(run(data, letter_id, note, as_json=as_json))


@letters.command("discard")
def discard(
    letter_id: UUID,
    note: Annotated[str, typer.Option("--note", help="Why: kept in the audit log.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Give it up for good; the row stays."""
    from caravan.cli.workers import discard as run

    raise typer.Exit(run(data, letter_id, note, as_json=as_json))
