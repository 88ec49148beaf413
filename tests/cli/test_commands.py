"""The command line on a running `caravan up --demo`: what it answers, what it changes, and its exit codes."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.apps.running import Up, caravan, until
from tests.redis_server import RedisServer

AI_PAYMENT = "5dc56599-cd44-4672-ab73-2bf7f789ef34"
ROBOTICS_PAYMENT = "fb8f4aae-7fb3-43d0-8782-cacbaea2cc8c"


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    folder = Path(tempfile.mkdtemp(prefix="caravan-cli-"))
    folder.chmod(0o711)
    running = Up(folder, "--demo")
    try:
        yield running.wait_ready()
    finally:
        if running.process.poll() is None:
            running.stop()
        shutil.rmtree(folder)


def run(up: Up, *arguments: object, code: int = 0) -> Any:
    """The JSON that a command answers with; nothing else may stand on its standard output."""
    done = caravan(*arguments, "--data", up.data, "--json")
    assert done.returncode == code, f"{done.returncode}: {done.stdout} {done.stderr}"
    return json.loads(done.stdout)


def refused(up: Up, *arguments: object) -> str:
    """The one line of a command that failed."""
    done = caravan(*arguments, "--data", up.data, "--json")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    error = json.loads(done.stdout)["error"]
    assert done.stderr == f"caravan: {error['detail']} [{error['code']}]\n"
    return done.stderr


def rows(up: Up, query: str, *values: object) -> list[dict[str, Any]]:
    with psycopg.connect(up.demo["postgresUrl"]) as connection, connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), values).fetchall()


def stage_of(up: Up, payment: str) -> tuple[str, str | None]:
    item = rows(
        up,
        "select f.stage, u.reason from fulfilments f left join undelivered u using (payment_id) where payment_id = %s",
        payment,
    )[0]
    return item["stage"], item["reason"]


@pytest.fixture
def without_workers(up: Up) -> Iterator[None]:
    """Nobody works and nobody mends, so that a command's own effect is seen."""
    names = ("purchase-worker", "allocation-worker", "session-worker", "reconciler")
    for name in names:
        assert up.ask("stop", name)["ok"]
    yield
    for name in names:
        up.ask("start", name)
    until(lambda: up.get("/readyz")[0] == 200, "everybody works again")


# ------------------------------------------------------------------ usage, and no installation


@pytest.mark.parametrize(
    "arguments",
    [
        ["explode"],
        ["diagnose", "not-an-id"],
        ["repair"],
        ["repair", "--all", "--payment", AI_PAYMENT],
        ["serve", "nobody"],
        ["up", "--port", "70000"],
        ["dead-letters", "discard", AI_PAYMENT],
        ["diagnose", AI_PAYMENT, AI_PAYMENT, "--payment", AI_PAYMENT],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = caravan(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_told_in_json_too() -> None:
    done = caravan("diagnose", "not-an-id", "--json")

    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "USAGE"
    assert "student_id" in error["detail"]


def test_the_version_and_the_whole_help() -> None:
    assert re.fullmatch(r"caravan \S+ \(build \S+\)\n", caravan("--version").stdout)
    said = caravan("--help")
    assert said.returncode == 0
    assert "..." not in said.stdout.partition("Commands:")[2]
    assert "trigger-allocation" in said.stdout


@pytest.mark.parametrize("command", ["lag", "workers", "diagnose", "demo", "migrate", "repair --all"])
def test_without_a_database_it_fails_in_one_line(tmp_path: Path, command: str) -> None:
    done = caravan(*command.split(), "--data", tmp_path, "--json")

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "caravan up" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "FAILED"


def test_a_bad_setting_fails_in_one_line(tmp_path: Path) -> None:
    done = caravan("up", "--data", tmp_path, CARAVAN_PRT="80")

    assert (done.returncode, done.stderr) == (
        1,
        "caravan: CARAVAN_PRT is not a setting of this release: did you mean CARAVAN_PORT?\n",
    )


def test_the_demo_listens_on_this_machine_only(tmp_path: Path) -> None:
    done = caravan("up", "--demo", "--data", tmp_path, "--host", "0.0.0.0")  # noqa: S104 - refused

    assert done.returncode == 1
    assert "listens on this machine only" in done.stderr


# ------------------------------------------------------------------ the demo's data


def test_demo_json_says_how_to_sign_in_to_its_owner_only(up: Up) -> None:
    assert oct((up.data / "demo.json").stat().st_mode & 0o777) == "0o600"
    demo = up.demo
    assert demo["url"] == up.url
    assert demo["sandboxWebhookSecret"].startswith("whsec_")
    for account, role in ((demo["admin"], "admin"), (demo["support"], "support"), (demo["trainer"], "trainer")):
        named = {"email": account["email"], "password": account["password"]}
        _status, said = up.call("POST", "/api/v1/auth/login", named)
        assert said["user"]["role"] == role
    first, second = demo["students"][:2]
    assert first["email"] != second["email"]
    token = up.sign_in(first)
    assert up.get(f"/api/v1/students/{first['id']}", token)[1]["latitude"] is not None
    assert up.get(f"/api/v1/students/{second['id']}", token)[0] == 404
    assert demo["courses"][0] == {"id": "9e16d892-4324-4568-be60-163aa1665683", "title": "Robotics"}
    assert len(demo["courses"]) >= 14


@pytest.mark.parametrize("mode", ["online", "home", "center"])
def test_the_first_student_can_be_served_in_every_mode(up: Up, mode: str) -> None:
    slot = {"online": "7:00 AM", "home": "8:00 AM", "center": "9:00 AM"}[mode]

    payment = up.buy(up.demo["students"][0], slot, mode=mode)

    until(lambda: stage_of(up, payment) == ("scheduled", None), "ten sessions")


# ------------------------------------------------------------------ looking


def test_a_well_installation(up: Up) -> None:
    well = run(up, "doctor")
    assert well["ok"] is True
    assert {"name": "payment provider", "ok": True, "said": "sandbox, of the demo"} in well["checks"]
    assert {row["service"] for row in run(up, "workers")["items"] if row["alive"]} == {
        "purchase-worker",
        "allocation-worker",
        "session-worker",
        "cache-worker",
        "reconciler",
    }
    assert {row["group"]: row["messages"] for row in run(up, "lag")["items"]} == {
        "purchase-creation-workers": 0,
        "trainer-allocation-workers": 0,
        "session-scheduling-workers": 0,
        "cache-invalidation-workers": 0,
    }
    assert run(up, "migrate") == {"applied": []}
    assert run(up, "dead-letters", "list") == {"items": []}
    assert run(up, "repair", "--all")["items"] == []


def test_the_doctor_looks_deeper_when_asked(up: Up) -> None:
    assert run(up, "doctor", "--deep")["ok"] is True
    payment, place = up.buy(up.demo["students"][0], "5:00 PM"), '{"at": [28.4595, 77.0266]}'
    until(lambda: run(up, "doctor", "--deep")["ok"], "the payment is delivered")
    tell = "update payments set metadata = %s::jsonb where id = %s returning student_id"
    locate = "update students set latitude = 28.4595, longitude = 77.0266 where id = %s returning id"
    rows(up, locate, rows(up, tell, place, payment)[0]["student_id"])

    assert run(up, "doctor")["ok"] is True
    found = [check for check in run(up, "doctor", "--deep", code=6)["checks"] if not check["ok"]]

    assert [(check["name"], check["said"]) for check in found] == [
        ("PlacesAreKept", "payments.metadata holds coordinates")
    ]
    rows(up, tell, "{}", payment)


@pytest.mark.parametrize("command", ["doctor", "workers", "lag", "diagnose", "dead-letters list", "repair --all"])
def test_for_a_reader_too(up: Up, command: str) -> None:
    done = caravan(*command.split(), "--data", up.data)

    assert done.returncode in (0, 6), done.stderr
    assert done.stdout.strip()
    assert not done.stdout.lstrip().startswith("{")


def test_a_worker_that_lives_and_fails_is_not_well(up: Up) -> None:
    rows(
        up,
        """insert into workers (name, service, host, pid, build, started_at, heartbeat_at, expires_at, progress_at,
                                incarnation, failing_since, last_error)
           values ('cache-worker@drill', 'cache-worker', 'drill', 1, 'b', now(), now(), now() + interval '1 hour',
                   now(), %s, now(), 'ValueError: of the drill') returning 1""",
        ROBOTICS_PAYMENT,
    )
    try:
        said = {check["name"]: check for check in run(up, "doctor", code=6)["checks"]}
        assert said["workers"]["ok"] is False
        assert said["workers"]["said"] == "alive and failing: cache-worker (ValueError: of the drill)"
    finally:
        rows(up, "delete from workers where name = 'cache-worker@drill' returning 1")


def test_who_is_gone_and_replaced_is_counted_not_shown(up: Up) -> None:
    """They are history for a day; after a night of restarts nobody would find those who work."""
    rows(
        up,
        """insert into workers (name, service, host, pid, build, started_at, heartbeat_at, expires_at, progress_at,
                                incarnation)
           values ('cache-worker@gone', 'cache-worker', 'drill', 1, 'b', now(), now(), now() - interval '1 hour',
                   now(), %s) returning 1""",
        ROBOTICS_PAYMENT,
    )
    try:
        told = caravan("workers", "--data", up.data).stdout
        assert "cache-worker@gone" not in told
        assert "Not shown: 1 that are gone and replaced (--json lists them)." in told
        assert "cache-worker@gone" in {item["name"] for item in run(up, "workers")["items"]}
    finally:
        rows(up, "delete from workers where name = 'cache-worker@gone' returning 1")


def test_a_resumed_stage_is_not_called_paused(up: Up) -> None:
    assert caravan("pause", "paid", "--city", "Pune", "--note", "drill", "--data", up.data).returncode == 0
    told = caravan("resume", "paid", "--city", "Pune", "--note", "over", "--data", up.data)
    assert told.stdout == "Resumed: paid in Pune. Nothing waited for it.\n"


@pytest.mark.usefixtures("without_workers")
def test_a_missing_worker_is_a_problem_found(up: Up) -> None:
    payment = up.buy(up.demo["students"][1], "10:00 AM")

    (item,) = run(up, "diagnose", "--payment", payment, code=6)["items"]
    assert (item["paymentId"], item["stage"], item["reason"]) == (payment, "paid", "NO_WORKER")
    assert item["evidence"]
    assert "purchase-worker" in run(up, "workers", code=6)["missing"]
    down = {group["group"]: group["state"] for group in run(up, "lag", code=6)["items"]}
    assert down["purchase-creation-workers"] == "down"
    doctor = run(up, "doctor", code=6)
    assert doctor["ok"] is False
    start = f"caravan up --data {up.data}"  # its database is its own: `serve` would find none after a restart
    assert start in next(check["said"] for check in doctor["checks"] if check["name"] == "workers")
    assert f"No purchase-worker is alive. Start it: {start}" in caravan("workers", "--data", up.data).stdout
    assert all(start in group["sentence"] for group in run(up, "lag", code=6)["items"] if group["state"] == "down")

    told = caravan("diagnose", "--data", up.data).stdout
    name = rows(up, "select name from students where id = %s", up.demo["students"][1]["id"])[0]["name"]
    assert f"Robotics for {name}, payment {payment}: paid, NO_WORKER" in told
    others = told.partition("The most recent others:")[2]
    assert payment not in others
    assert all(line.startswith("  ") for line in others.strip("\n").splitlines())


def test_a_basket_that_was_left_is_no_trouble(up: Up) -> None:
    left = rows(up, ASK_ONLY, up.demo["students"][1]["id"])[0]["id"]
    try:
        told = caravan("diagnose", "--data", up.data)
        assert told.returncode == 0
        assert str(left) in told.stdout.partition("Not paid, so nothing to deliver:")[2]
        assert "WEBHOOK_NOT_RECEIVED" not in told.stdout
        assert run(up, "diagnose")["items"][-1]["paymentId"] == str(left)
        # Asked for by its id it is told in full: somebody may say that they paid.
        (item,) = run(up, "diagnose", "--payment", left, code=6)["items"]
        assert (item["stage"], item["reason"]) == ("created", "WEBHOOK_NOT_RECEIVED")
        assert "Unpaid, unless the family says otherwise" in item["evidence"][-1]
        # Tried at the provider, it is one.
        rows(up, "update payments set status = 'pending' where id = %s returning id", left)
        assert caravan("diagnose", "--data", up.data).stdout.splitlines()[0].endswith("pending, WEBHOOK_NOT_RECEIVED")
    finally:
        rows(up, "delete from payments where id = %s returning id", left)


# As a checkout does, ten minutes ago.
ASK_ONLY = """
with c as (
  insert into checkouts (id, student_id, sessions, price_cents, currency, raw, created_at, expires_at)
  select gen_random_uuid(), id, 10, 1000, 'INR', '{}', now() - interval '10 minutes', now() from students where id = %s
  returning *
)
insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency, metadata, created_at)
select gen_random_uuid(), id, student_id, 'sandbox', 'created', 1000, 'INR', '{}', created_at from c returning id
"""


def test_unclaimed_money_is_trouble(up: Up) -> None:
    rows(up, UNCLAIMED)
    try:
        told = caravan("diagnose", "--data", up.data)
        assert told.returncode == 6
        assert "sandbox's evt_of_nobody" in told.stdout.partition("Unclaimed money")[2].splitlines()[1]
        assert run(up, "diagnose", code=6)["unclaimed"][0]["eventId"] == "evt_of_nobody"
    finally:
        rows(up, "delete from webhook_events where event_id = 'evt_of_nobody' returning event_id")


UNCLAIMED = """
insert into webhook_events (provider, event_id, type, payment_id, amount_cents, currency, sent_at, received_at, body)
values ('sandbox', 'evt_of_nobody', 'payment.succeeded', gen_random_uuid(), 1000, 'INR', now() - interval '1 hour',
        now() - interval '1 hour', '') returning event_id
"""


def test_what_is_not_there(up: Up) -> None:
    nobody = uuid4()

    assert "[PAYMENT_NOT_FOUND]" in refused(up, "diagnose", "--payment", nobody)
    assert "[PAYMENT_NOT_FOUND]" in refused(up, "repair", "--payment", nobody)
    assert "[PAYMENT_NOT_FOUND]" in refused(up, "create-purchase", nobody)
    assert "[PURCHASE_NOT_FOUND]" in refused(up, "emit-events", nobody)
    assert "[STUDENT_NOT_FOUND]" in refused(up, "clear-cache", nobody)
    assert "[PURCHASE_NOT_FOUND]" in refused(up, "trigger-allocation", nobody, nobody)
    assert "[DEAD_LETTER_NOT_FOUND]" in refused(up, "dead-letters", "show", nobody)
    assert f"There is no student {nobody}, and nothing else has this id. [STUDENT_NOT_FOUND]" in refused(
        up, "diagnose", nobody
    )


def test_an_id_of_something_else_is_told_with_how_to_ask(up: Up) -> None:
    student, course = up.demo["students"][0], up.demo["courses"][0]
    payment = up.buy(student, "1:00 PM")
    until(lambda: stage_of(up, payment)[0] != "paid", "its purchase")
    purchase = rows(up, "select id from student_course_purchases where payment_id = %s", payment)[0]["id"]

    for given, what in ((payment, "payment"), (purchase, "purchase")):
        told = refused(up, "diagnose", given)
        assert f"is the id of a {what}, not of a student. Ask: caravan diagnose --payment {payment}" in told
    assert f"Ask: caravan diagnose --payment {payment}" in refused(up, "diagnose", "--payment", purchase)
    assert f"Ask: caravan diagnose {student['id']}" in refused(up, "diagnose", "--payment", student["id"])
    assert "is the id of a course, not of a student" in refused(up, "diagnose", course["id"])
    assert "[COURSE_NOT_FOUND]" in refused(up, "diagnose", student["id"], uuid4())


def test_a_student_who_bought_nothing(up: Up) -> None:
    student = rows(up, "insert into students (id, name) values (gen_random_uuid(), 'Nobody Yet') returning id")[0]["id"]

    assert run(up, "diagnose", student) == {"items": []}
    done = caravan("diagnose", student, up.demo["courses"][0]["id"], "--data", up.data)
    assert (done.returncode, done.stdout) == (0, "Nobody Yet has no payments for Robotics: nothing was bought yet.\n")


def test_an_email_address_is_no_id() -> None:
    done = caravan("diagnose", "asha@demo.caravan.example")

    assert done.returncode == 2
    assert "is an e-mail address, and no id" in done.stderr


# ------------------------------------------------------------------ mending


@pytest.mark.usefixtures("without_workers")
def test_a_purchase_by_hand_step_by_step_as_the_reports_did(up: Up) -> None:
    student = up.demo["students"][1]
    course = up.demo["courses"][0]["id"]
    payment = up.buy(student, "11:00 AM")

    would = run(up, "repair", "--payment", payment, "--dry-run")
    assert would["dryRun"] is True
    assert would["items"][0]["step"] == "create_purchase"
    assert (would["items"][0]["purchaseId"], would["items"][0]["did"]) == (None, "Would create the purchase.")
    told = caravan("repair", "--payment", payment, "--dry-run", "--data", up.data).stdout
    assert told == (
        f"Nothing was changed. Payment {payment}: Would create the purchase."
        " Then: The course is added, but it has no trainer yet.\n"
    )
    assert stage_of(up, payment) == ("paid", None)

    (created,) = run(up, "create-purchase", payment, "--note", "by hand")["items"]
    assert (created["stage"], created["reason"]) == ("purchased", None)
    (waiting,) = run(up, "diagnose", student["id"], course, code=6)["items"][:1]
    assert (waiting["stage"], waiting["reason"]) == ("purchased", "NO_WORKER")
    (done,) = run(up, "trigger-allocation", student["id"], course)["items"]
    assert (done["stage"], done["reason"]) == ("scheduled", None)

    before = up.get(f"/api/v1/students/{student['id']}/learning", up.sign_in(student))[1]["version"]
    assert run(up, "emit-events", created["purchaseId"])["emitted"] == ["PURCHASE_CREATED", "COURSE_ACCESS_GRANTED"]
    after = up.get(f"/api/v1/students/{student['id']}/learning", up.sign_in(student))[1]["version"]
    assert after == before + 2
    assert run(up, "clear-cache", student["id"])["cleared"] == 0

    audited = rows(up, "select actor, action, note from audit_log where subject_id = %s", payment)
    assert [(row["action"], row["note"]) for row in audited] == [("create purchase", "by hand")]
    assert audited[0]["actor"].startswith("cli:")


@pytest.mark.usefixtures("without_workers")
def test_repair_goes_one_step_at_a_time_and_all_reaches_the_stuck_ones(up: Up) -> None:
    payment = up.buy(up.demo["students"][1], "2:00 PM")

    stages: list[str] = []
    while stage_of(up, payment)[0] != "scheduled":
        run(up, "repair", "--payment", payment, "--note", "stuck")
        stages.append(stage_of(up, payment)[0])

    assert stages == ["purchased", "allocated", "scheduled"]
    assert "nothing to do" in run(up, "repair", "--payment", payment)["items"][0]["did"]


def test_an_event_that_was_given_up_is_shown_replayed_once_and_discarded_with_a_note(up: Up) -> None:
    payment = up.buy(up.demo["students"][1], "3:00 PM")
    until(lambda: stage_of(up, payment) == ("scheduled", None), "its sessions")
    first, second = _park(up, payment, "PURCHASE_CREATED"), _park(up, payment, "TRAINER_ALLOCATED")

    assert {item["id"] for item in run(up, "dead-letters", "list")["items"]} == {first, second}
    shown = run(up, "dead-letters", "show", first)
    assert (shown["eventType"], shown["envelope"]["type"]) == ("PURCHASE_CREATED", "PURCHASE_CREATED")

    assert run(up, "dead-letters", "replay", first, "--note", "mended")["status"] == "replayed"
    assert "[DEAD_LETTER_RESOLVED]" in refused(up, "dead-letters", "replay", first)
    assert run(up, "dead-letters", "discard", second, "--note", "not needed")["status"] == "discarded"
    assert run(up, "dead-letters", "list")["items"] == []
    assert len(run(up, "dead-letters", "list", "--all")["items"]) == 2
    assert stage_of(up, payment) == ("scheduled", None)


PARK = """
insert into dead_letters (id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts)
select %s, g.name, o.event_id, o.type, o.correlation_id,
       jsonb_build_object('id', o.event_id, 'source', o.source, 'type', o.type, 'subject', o.subject,
         'time', o.occurred_at, 'data', o.data, 'correlationid', o.correlation_id, 'partitionkey', o.partition_key,
         'dataversion', o.data_version, 'specversion', '1.0'),
       'HANDLER_FAILED', 'on purpose', 5
from outbox o join consumer_groups g on o.type = any(g.types)
where o.correlation_id = %s and o.type = %s and g.name <> 'cache-invalidation-workers'
"""


def _park(up: Up, payment: str, event_type: str) -> str:
    letter: UUID = uuid4()
    with psycopg.connect(up.demo["postgresUrl"]) as connection:
        assert connection.execute(PARK.encode(), (letter, payment, event_type)).rowcount == 1
    return str(letter)


# ------------------------------------------------------------------ the rehearsal


def test_the_incidents_are_rehearsed_again_and_again(up: Up) -> None:
    first = run(up, "demo")
    second = run(up, "demo")

    assert (first["run"], second["run"]) == (1, 2)
    for rehearsal in (first, second):
        assert [(each["name"], each["outcome"], each["ok"]) for each in rehearsal["incidents"]] == [
            ("purchase_worker_stopped", "delivered", True),
            ("marked_processed", "delivered", True),
            ("allocation_without_sessions", "delivered", True),
            ("student_without_coordinates", "delivered", True),
            ("no_free_trainer", "delivered", True),
            ("push_missed", "delivered", True),
            ("log_unreachable", "delivered", True),
        ]
        assert [each["seen"] for each in rehearsal["incidents"][:5]] == [
            "NO_WORKER",
            "MARKED_PROCESSED_BUT_MISSING",
            "NO_WORKER",
            "STUDENT_LOCATION_MISSING",
            "NO_TRAINER_AVAILABLE",
        ]
    named = {each["name"]: each for each in first["incidents"]}
    assert named["purchase_worker_stopped"]["paymentId"] == AI_PAYMENT
    assert named["log_unreachable"]["paymentId"] == ROBOTICS_PAYMENT
    again = {each["name"]: each for each in second["incidents"]}
    assert again["log_unreachable"]["namedPaymentId"] == ROBOTICS_PAYMENT
    assert again["log_unreachable"]["paymentId"] != ROBOTICS_PAYMENT
    assert rows(up, "select amount_cents, status from payments where id = %s", ROBOTICS_PAYMENT) == [
        {"amount_cents": 360_000, "status": "refunded"}
    ]
    assert run(up, "doctor")["ok"] is True
    assert all(service["state"] == "running" for service in up.ask("status")["services"].values())


# ------------------------------------------------------------------ with a Redis


def test_clear_cache_makes_redis_forget_what_it_has_of_a_student(up: Up, redis_server: RedisServer) -> None:
    student = up.demo["students"][0]["id"]
    [head] = rows(up, "select coalesce(max(seq), 0) as seq from student_feed where student_id = %s", student)
    for view in ("home", "learning"):
        redis_server.ask("SET", f"student:{view}:{student}", f"{head['seq']} - {student}\n{{}}")
    for cleared in (2, 0):
        done = caravan("clear-cache", student, "--data", up.data, "--json", REDIS_URL=redis_server.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["cleared"] == cleared
    assert redis_server.get(f"student:home:{student}") == f"{head['seq']}\n".encode()
    redis_server.ask("CONFIG", "SET", "maxmemory", "1")
    assert "maxmemory" in _refused_by_redis(up, student, redis_server.url)
    redis_server.ask("CONFIG", "SET", "requirepass", "hunter2")
    assert "wrong user or password" in _refused_by_redis(up, student, redis_server.url.replace("//", "//:nope@"))
    redis_server.kill()
    assert "connecting to" in _refused_by_redis(up, student, redis_server.url)


def _refused_by_redis(up: Up, student: str, url: str) -> str:
    done = caravan("clear-cache", student, "--data", up.data, REDIS_URL=url)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("caravan: Redis (REDIS_URL) did not do it: ")
    assert line.endswith("[REDIS_DID_NOT]")
    assert "nope" not in done.stderr
    return line
