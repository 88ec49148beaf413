"""`caravan up` and `serve` with a Redis in their environment: used while it is there, not missed when it is gone."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apps.running import Up, caravan, until
from tests.redis_server import RedisServer


@pytest.fixture
def up(redis_server: RedisServer) -> Iterator[Up]:
    folder = Path(tempfile.mkdtemp(prefix="caravan-redis-up-"))
    folder.chmod(0o711)
    running = Up(folder, "--demo", REDIS_URL=redis_server.url)
    try:
        yield running.wait_ready()
    finally:
        if running.process.poll() is None:
            running.stop()
        shutil.rmtree(folder)


def test_a_whole_installation_with_a_redis_that_comes_and_goes(up: Up, redis_server: RedisServer) -> None:
    student = up.demo["students"][1]
    token = up.sign_in(student)

    def home() -> object:
        status, said = up.get(f"/api/v1/students/{student['id']}/home", token)
        assert status == 200
        return [item["stage"] for item in said["items"]]

    key = f"student:home:{student['id']}"
    up.buy(student, "8:00 AM")
    until(lambda: home() == ["scheduled"], "delivered, and seen")
    until(lambda: (redis_server.get(key) or b"").startswith(b"5 "), "home is in Redis, with its version")
    redis_server.kill()
    up.buy(student, "10:00 AM")
    until(lambda: home() == ["scheduled", "scheduled"], "delivered without a Redis, and seen")
    assert up.get("/readyz")[0] == 200
    redis_server.start()

    def cached() -> bool:
        home()
        return (redis_server.get(key) or b"").startswith(b"10 ")

    until(cached, "Redis is used again")
    up.stop()
    outages = [line for line in up.log.splitlines() if "Redis is away, going on without it" in line]
    assert len(outages) == 2, outages  # each process says it once
    assert "Traceback" not in up.log


def test_a_bad_address_is_one_line(tmp_path: Path) -> None:
    for command in (("up", "--data", tmp_path / "d"), ("serve", "websocket-server")):
        done = caravan(*command, REDIS_URL="redis-cache:6379", POSTGRES_URL="postgresql://nobody@127.0.0.1:1/none")
        assert done.returncode in (1, 2)
        assert done.stderr.count("\n") == 1, done.stderr
        assert "REDIS_URL: must look like redis://" in done.stderr
        assert json.dumps(done.stdout) == '""'
