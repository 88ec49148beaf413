"""Every command, its options and its help. What a command does is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from caravan.cli.options import AsJson, Data

app = typer.Typer(
    name="caravan",
    help="Caravan delivers what was paid for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def up(
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port (8080).")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="With courses, trainers and accounts to try it on.")] = False,
) -> None:
    """Run the whole platform on this machine, until Ctrl-C."""
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
    """Run one service in this process, on the database of POSTGRES_URL (or of --data, where `up` runs)."""
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
