"""Every command, its options and its help. What a command does is imported when it runs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from caravan.apps.services import SERVICES
from caravan.cli.options import AsJson, Data, Id, Note, an_id

if TYPE_CHECKING:
    from caravan.pauses import Scope

PausedStage = Annotated[str, typer.Argument(metavar="paid|purchased|allocated", help="Where payments wait.")]
Payment = Annotated[UUID | None, typer.Option("--payment", metavar="ID", parser=an_id, help="One payment.")]
Course = Annotated[
    UUID | None, typer.Option("--course", metavar="ID", parser=an_id, help="Only purchases of this course.")
]
City = Annotated[str | None, typer.Option("--city", metavar="NAME", help="Only students who live in this city.")]
Why = Annotated[str, typer.Option("--note", help="Why: kept in the audit log.")]

SERVICE_NAMES = ", ".join(SERVICES)

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


# A list of its own: a paragraph would be wrapped within the names.
@app.command(epilog="\b\nNames:\n  " + "\n  ".join(SERVICES))
def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The service, see below.")] = "",
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port (8080; a worker: none).")] = None,
) -> None:
    """Run one service in this process.

    On the database of POSTGRES_URL (or of --data, where `up` runs).
    """
    from caravan.cli.options import database_settings

    if name not in SERVICES:
        said = f"{name} is not one of {SERVICE_NAMES}" if name else f"choose one of {SERVICE_NAMES}"
        raise typer.BadParameter(said, param_hint="NAME")
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
    student_id: Annotated[UUID | None, typer.Argument(parser=an_id)] = None,
    course_id: Annotated[UUID | None, typer.Argument(parser=an_id)] = None,
    payment: Payment = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Say why something is not delivered.

    Of a student (and course), or of a payment; without either: what waits or is stuck, then the most recent ones.
    """
    if payment is not None and student_id is not None:
        raise typer.BadParameter("choose one of STUDENT_ID (and COURSE_ID) and --payment ID")
    from caravan.cli.diagnose import diagnose as run

    raise typer.Exit(run(data, student_id, course_id, payment, as_json=as_json))


@app.command()
def repair(
    payment: Payment = None,
    everything: Annotated[bool, typer.Option("--all", help="Every payment that is stuck.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Every payment that waits with this reason.")] = None,
    course: Course = None,
    city: City = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Of many: so many at most.")] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    note: Note = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Do the one safe next step for what is stuck.

    Through the worker's own code. Of many (--all, --reason), the nearest start first: one, then the rest, until
    something unexpected happens.
    """
    if [payment is not None, everything, reason is not None].count(True) != 1:
        raise typer.BadParameter("choose one of --payment ID, --all and --reason REASON")
    if payment is not None:
        if course or city:
            raise typer.BadParameter("--course and --city go with --all and --reason")
        from caravan.cli.deliveries import repair_one

        raise typer.Exit(repair_one(data, payment, note, dry_run=dry_run, as_json=as_json))
    from caravan.cli.worst_day import repair_many
    from caravan.fulfilment.bulk import Chosen

    chosen = Chosen(reason, course, city, limit)
    raise typer.Exit(repair_many(data, chosen, note or "caravan repair", dry_run=dry_run, as_json=as_json))


@app.command()
def trigger_allocation(
    student_id: Id, course_id: Id, note: Note = None, data: Data = None, as_json: AsJson = False
) -> None:
    """Find a trainer and sessions for a purchase.

    The one that the student made of the course.
    """
    from caravan.cli.deliveries import trigger_allocation as run

    raise typer.Exit(run(data, student_id, course_id, note, as_json=as_json))


@app.command()
def create_purchase(payment_id: Id, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Create the purchase of a payment that succeeded."""
    from caravan.cli.deliveries import create_purchase as run

    raise typer.Exit(run(data, payment_id, note, as_json=as_json))


@app.command()
def emit_events(purchase_id: Id, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Tell the student's screens again about a purchase."""
    from caravan.cli.deliveries import emit_events as run

    raise typer.Exit(run(data, purchase_id, note, as_json=as_json))


@app.command()
def clear_cache(student_id: Id, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
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
    note: Why,
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


@app.command()
def pause(
    stage: PausedStage, note: Why, course: Course = None, city: City = None, data: Data = None, as_json: AsJson = False
) -> None:
    """Stop a stage for a while; payments go on.

    paid: no purchases are created. purchased: no trainers are allocated. allocated: no sessions are scheduled. For
    everybody, a course, a city, or a course in a city. Nobody works on what is paused: workers, reconciler, repair.
    What is paid for waits in the open and goes on by itself at `resume`.
    """
    from caravan.cli.worst_day import pause as run

    raise typer.Exit(run(data, _scope(stage, course, city), note, as_json=as_json))


@app.command()
def resume(
    stage: PausedStage, note: Why, course: Course = None, city: City = None, data: Data = None, as_json: AsJson = False
) -> None:
    """Let a paused stage go on, nearest start first."""
    from caravan.cli.worst_day import resume as run

    raise typer.Exit(run(data, _scope(stage, course, city), note, as_json=as_json))


def _scope(stage: str, course: UUID | None, city: str | None) -> Scope:
    from caravan.deliveries import Stage
    from caravan.pauses import PAUSABLE, Scope

    if stage not in PAUSABLE:
        raise typer.BadParameter(f"{stage} is not one of {', '.join(PAUSABLE)}", param_hint="STAGE")
    return Scope(Stage(stage), course, city)


@app.command()
def pauses(data: Data = None, as_json: AsJson = False) -> None:
    """What is paused, since when, by whom and why."""
    from caravan.cli.worst_day import list_pauses as run

    raise typer.Exit(run(data, as_json=as_json))


@app.command()
def confirm_start(
    payment_id: Id,
    note: Why,
    start: Annotated[
        datetime | None, typer.Option("--start", formats=["%Y-%m-%d"], help="The new date (the next possible one).")
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Agree to a later start where the chosen one passed."""
    from caravan.cli.worst_day import confirm_start as run

    raise typer.Exit(run(data, payment_id, start.date() if start else None, note, as_json=as_json))


@app.command()
def dealt_with(
    provider: str,
    event_id: Annotated[str, typer.Argument(help="The webhook's id at the provider.")],
    note: Why,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Take unclaimed money off the list: it is settled.

    Somebody found out whose it was and settled it outside.
    """
    from caravan.cli.worst_day import deal_with_unclaimed as run

    raise typer.Exit(run(data, provider, event_id, note, as_json=as_json))


Since = Annotated[
    datetime | None,
    typer.Option("--since", formats=["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d"], help="Records from then on (the last known)."),
]


@app.command()
def backup(file: Path, data: Data = None, as_json: AsJson = False) -> None:
    """Write the whole database to a new file.

    While everything runs; as of one moment. It holds personal data, so only you may read it.
    """
    from caravan.cli.backup import backup as run

    raise typer.Exit(run(data, file, as_json=as_json))


@app.command()
def restore(
    file: Path,
    note: Why,
    replace: Annotated[bool, typer.Option("--replace", help="Lose what the database holds now.")] = False,
    since: Since = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Make the database what a backup says, and refill it.

    All or nothing, while nothing runs. What came after the backup is fetched from the payment providers' records: money
    that they took is delivered, money that went back stays back.
    """
    from caravan.cli.backup import restore as run

    raise typer.Exit(run(data, file, note, replace=replace, since=_aware(since), as_json=as_json))


@app.command()
def refill(note: Note = None, since: Since = None, data: Data = None, as_json: AsJson = False) -> None:
    """Take in what payment providers know and we don't.

    `restore` does it; this does it again, at any time.
    """
    from caravan.cli.backup import fill_again as run

    raise typer.Exit(run(data, note or "caravan refill", since=_aware(since), as_json=as_json))


def _aware(instant: datetime | None) -> datetime | None:
    return instant.replace(tzinfo=UTC) if instant is not None and instant.tzinfo is None else instant


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
def show_letter(letter_id: Id, data: Data = None, as_json: AsJson = False) -> None:
    """One, with its whole event, as JSON."""
    from caravan.cli.workers import show_letter as run

    raise typer.Exit(run(data, letter_id))


@letters.command("replay")
def replay(letter_id: Id, note: Note = None, data: Data = None, as_json: AsJson = False) -> None:
    """Run its handler again, once."""
    from caravan.cli.workers import replay as run

    raise typer.Exit(run(data, letter_id, note, as_json=as_json))


@letters.command("discard")
def discard(letter_id: Id, note: Why, data: Data = None, as_json: AsJson = False) -> None:
    """Give it up for good; the row stays."""
    from caravan.cli.workers import discard as run

    raise typer.Exit(run(data, letter_id, note, as_json=as_json))
