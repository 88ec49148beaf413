"""Every SQL constant is prepared against the migrated schema: a missing column fails here, not at night."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors as pg

import caravan

STATEMENT = re.compile(r"^\s*(--[^\n]*\n\s*)*(select|insert|update|delete|with)\b", re.IGNORECASE)
PLACEHOLDER = re.compile(r"%\((\w+)\)[sbt]")
UNDETERMINED = re.compile(r"\$(\d+)")
# What a bare parameter is bound to, where its place in the statement doesn't say so.
TYPES_BY_NAME = (
    (re.compile(r"(^|_)(now|at|before|after|since|until|as_of|cutoff|older_than)$"), "timestamptz"),
    (re.compile(r"(^|_)(id|incarnation)$"), "uuid"),
    (re.compile(r"(^|_)(limit|count|cents|coins|seconds|minutes|days|sessions|size|n)$"), "int"),
    (re.compile(r"_ids$"), "uuid[]"),
)


def constants() -> dict[str, str]:
    """`module.NAME` of every upper-case string that is a statement."""
    found: dict[str, str] = {}
    for module_info in pkgutil.walk_packages(caravan.__path__, "caravan."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, str) and STATEMENT.match(value):
                found[f"{module_info.name.removeprefix('caravan.')}.{name}"] = value
    return found


CONSTANTS = constants()


def prepare(connection: psycopg.Connection, statement: str) -> None:
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    text = PLACEHOLDER.sub(number, statement).replace("%%", "%")
    types = ["unknown"] * len(names)
    for _ in range(len(names) + 1):
        signature = f"({', '.join(types)})" if types else ""
        try:
            connection.execute(f"prepare checked{signature} as {text}".encode())
        except pg.IndeterminateDatatype as error:
            match = UNDETERMINED.search(str(error))
            if match is None or types[position := int(match[1]) - 1] != "unknown":
                raise
            types[position] = next((t for p, t in TYPES_BY_NAME if p.search(names[position])), "text")
        else:
            connection.execute("deallocate checked")
            return


@pytest.fixture(scope="module")
def connection(migrated_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("name", CONSTANTS)
def test_statement_fits_the_schema(name: str, connection: psycopg.Connection) -> None:
    prepare(connection, CONSTANTS[name])


def test_a_missing_column_is_found(connection: psycopg.Connection) -> None:
    with pytest.raises(pg.UndefinedColumn):
        prepare(connection, "select nonsense from payments where id = %(id)s")


def test_there_are_statements_to_check() -> None:
    assert len(CONSTANTS) > 40
