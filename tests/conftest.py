"""One embedded PostgreSQL per test process, migrated once; each test that asks gets a database of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from caravan.db import Database
from caravan.db.migrate import migrate
from harness.postgres import PrivatePostgres, make_folder, memory_disk, sweep
from tests import needs
from tests.kafka.server import KafkaServer
from tests.kafka.server import missing as kafka_missing
from tests.redis_server import RedisServer
from tests.redis_server import missing as redis_missing

TEMPLATE = "caravan_template"
# A test's database needn't survive a power cut.
FAST_AND_FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}
PREFIX = "caravan-test-"
MEMORY_DISK_BYTES_MIN = 1 << 30


def _make_data_dir() -> Path:
    """Copying the template takes 9 ms on the memory disk and 110 ms on ext4. pytest's own tmp_path is private: no
    PostgreSQL of another user gets in."""
    return make_folder(PREFIX, memory_disk(MEMORY_DISK_BYTES_MIN))


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A fresh `--data` folder, removed afterwards; the test stops what it starts in it.

    Programs may not be executable there (containers mount their memory disk so).
    """
    folder = _make_data_dir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The server that all tests of this process share. Use `database_url` or `db`, unless the server is the matter."""
    sweep(PREFIX)
    with PrivatePostgres(_make_data_dir(), FAST_AND_FORGETFUL) as server:
        yield server.url


@pytest.fixture(scope="session")
def template(postgres_url: str) -> str:
    """The name of a migrated database that is only copied: PostgreSQL copies none that somebody is connected to."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(TEMPLATE)))
        asyncio.run(migrate(make_conninfo(postgres_url, dbname=TEMPLATE)))
        connection.execute(sql.SQL("alter database {} allow_connections false").format(sql.Identifier(TEMPLATE)))
    return TEMPLATE


_numbers = count(1)


@contextmanager
def _fresh_database(postgres_url: str, template: str) -> Generator[str]:
    """A copy of the template; dropped afterwards, whoever is still connected."""
    name = f"test_{next(_numbers)}"
    create = sql.SQL("create database {} template {} strategy file_copy")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    yield make_conninfo(postgres_url, dbname=name)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(postgres_url: str, template: str) -> Iterator[str]:
    """A fresh migrated database for one test."""
    with _fresh_database(postgres_url, template) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_url(postgres_url: str, template: str) -> Iterator[str]:
    """A migrated database that stays empty: for many tests that only look at the schema."""
    with _fresh_database(postgres_url, template) as url:
        yield url


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """A pool on this test's own database."""
    async with Database(database_url) as database:
        yield database


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[KafkaServer]:
    """A real Kafka that all tests of this process share: give topics and groups a prefix of your own."""
    if lack := kafka_missing():
        needs.missing(lack)
    folder = Path(tempfile.mkdtemp(prefix=f"caravan-kafka-{os.getpid()}-"))
    try:
        with KafkaServer(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A real Redis of this test's own, to be killed, frozen, flushed and started again on its port."""
    if lack := redis_missing():
        needs.missing(lack)
    with RedisServer() as server:
        yield server
