"""A pgbouncer in transaction mode before the tests' PostgreSQL, with fewer connections than its clients have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from harness.processes import ServerProcess, free_port

START_SECONDS_MAX = 10.0
SERVER_CONNECTIONS = 3

CONFIG = """
[databases]
caravan = {server} pool_size={size}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
logfile = {folder}/pgbouncer.log
server_round_robin = 1
"""


def find_program() -> str | None:
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


def missing() -> str | None:
    return None if find_program() else "needs pgbouncer (Debian: apt-get install pgbouncer)"


class PgBouncer(ServerProcess):
    """Hands its clients' transactions to the database at `url`, each to another connection. Use as a context."""

    def __init__(self, url: str, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "pgbouncer.log"
        self._config = folder / "pgbouncer.ini"
        given = conninfo_to_dict(url)
        server = " ".join(f"{name}={given[name]}" for name in ("host", "port", "dbname", "user", "password"))
        self._config.write_text(CONFIG.format(server=server, size=SERVER_CONNECTIONS, port=self.port, folder=folder))
        self.url = make_conninfo(host="127.0.0.1", port=self.port, dbname="caravan", user=str(given["user"]))

    def start(self) -> PgBouncer:
        program = find_program()
        assert program
        command = [program, str(self._config)]
        if os.geteuid() == 0:  # it refuses to be root; the tests' PostgreSQL is this user then
            for path in (self._config.parent, self._config):
                shutil.chown(path, "postgres")
            command = [program, "--user", "postgres", str(self._config)]
        self._launch(command)
        if not self._answers_within(START_SECONDS_MAX):
            said = self._log.read_text()[-1000:] if self._log.exists() else ""
            raise AssertionError(f"pgbouncer does not answer: {said}")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
