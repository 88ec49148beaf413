"""Noise at every door: the whole OpenAPI document, the pages' forms, and whatever reads a text from outside.

Schemathesis makes the requests, valid and invalid ones, and follows the links between operations that it finds in the
document; each is sent as several kinds of people, with ids put in that are really there. Asked of every answer: no 5xx,
in time, no word about our insides, a problem document with a stable code for each refusal. The parsers get bent texts
(`verify/parsers.py`) and may refuse only as they say they do.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from typing import cast as cast_to
from urllib.parse import quote

import httpx2
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky, Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.errors import SchemathesisError

from caravan.ids import new_id
from verify.authz_matrix import FREE, OWNED, Route, list_matrix
from verify.parsers import ODD, PARSERS, Parser, bend
from verify.parts import Context
from verify.report import PartResult
from verify.site import Cast, Person, Site, gather_cast, judge_answer, serve

IN_FLIGHT = 12
ANSWER_SECONDS_MAX = 15.0  # of one request, on a busy machine
PEOPLE = ("student", "admin", "support", "trainer", "nobody")
# So often an id that the generator made up is put aside for one that is there.
REAL_IDS = 0.7
HEALTH_CHECKS: list[Any] = list(HealthCheck)  # what is slow or large is what we want
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
Sent = tuple[str, dict[str, Any]]  # the operation's label, what httpx2 needs to ask


async def run(context: Context) -> PartResult:
    """Requests, then parsers. `--case PARSER:NUMBER` reads one input again, `--case OPERATION` one operation's."""
    result = context.result()
    chosen = context.case
    if chosen is None:
        read = context.result()
        await asyncio.gather(_requests(context, result), asyncio.to_thread(_parsers, context, read))
        result.merge(read)
        result.extra |= read.extra
    elif chosen.partition(":")[0] in {parser.name for parser in PARSERS}:
        await asyncio.to_thread(_parsers, context, result)
    else:
        await _requests(context, result)
    result.good_min = context.pick(80, 4_000) if chosen is None else 0
    return result


# ------------------------------------------------------------------ requests


@dataclass(slots=True)
class Tally:
    """What the requests came to: by operation and by status."""

    result: PartResult
    asked: Counter[str]
    statuses: Counter[int]


async def _requests(context: Context, result: PartResult) -> None:
    wanted = context.pick(400, 22_000)
    made = context.server.create()
    async with made.database() as db:
        cast = await gather_cast(db)
    for ids in (cast.own, cast.other):
        ids["account_id"] = cast.people["expired"].account_id  # who is disabled here asks nothing
    async with serve(made) as site:
        document = site.app.openapi()
        labels = [f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item]
        forms = [route for route in list_matrix(site.app) if route.is_page and route.label not in labels]
        tally = Tally(result, Counter(), Counter())
        started = time.monotonic()
        made_requests = asyncio.Queue[Sent | None](maxsize=400)
        maker = asyncio.create_task(_make(context, document, labels, forms, cast, wanted, made_requests))
        await asyncio.gather(*(_send_all(site, cast, tally, made_requests) for _ in range(IN_FLIGHT)))
        await maker
        if context.case is None:
            links = await _walk_links(context, site, cast, document, tally)
            result.extra["linked"] = links
            result.fired["linked"] += links
        seconds = time.monotonic() - started
    result.extra |= {
        "requests": sum(tally.asked.values()),
        "operations": len(labels),
        "operations_asked": sum(1 for label in labels if tally.asked[label]),
        "forms": len(forms),
        "statuses": {str(status): number for status, number in sorted(tally.statuses.items())},
        "requests_per_second": round(sum(tally.asked.values()) / seconds),
    }
    silent = [label for label in [*labels, *(route.label for route in forms)] if not tally.asked[label]]
    if silent and context.case is None:
        result.failed.append(f"never asked: {', '.join(silent[:5])}")
    result.must_fire = () if context.case else ("positive", "negative", "form", "linked", "refused")


async def _make(
    context: Context,
    document: dict[str, Any],
    labels: list[str],
    forms: list[Route],
    cast: Cast,
    wanted: int,
    queue: asyncio.Queue[Sent | None],
) -> None:
    """Fill the queue from a thread: generation and answers share the time."""
    loop = asyncio.get_running_loop()

    def put(sent: Sent) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(sent), loop).result()

    def work() -> None:
        # A quarter goes to the forms, the rest to the document, equally over operations and modes.
        chosen = [label for label in labels if context.case in (None, label)]
        each = max(1, wanted * 3 // 4 // max(1, len(chosen) * len(MODES) * len(PEOPLE)))
        schema: Any = schemathesis.openapi.from_dict(document)
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.label in chosen:
                _make_operation(context, operation, cast, each, put)
        dice = context.dice("forms")
        for _ in range(max(1, wanted // 4 // max(1, len(forms)))):
            for route in forms:
                if context.case in (None, route.label):
                    put((route.label, {"kind": "form"} | make_form(dice, route, cast)))

    try:
        await asyncio.to_thread(work)
    finally:
        for _ in range(IN_FLIGHT):
            await queue.put(None)


def _make_operation(context: Context, operation: Any, cast: Cast, each: int, put: Any) -> None:
    """So many cases of each mode, each as everybody."""
    label: str = operation.label
    for mode in MODES:
        dice = context.dice(label, mode.name)
        cases = list_cases(operation.as_strategy(generation_mode=mode), each, dice.getrandbits(32))
        # Where there is little to vary, what there is comes again.
        for number in range(each if cases else 0):
            case = cases[number % len(cases)]
            for name in PEOPLE:
                sent = to_request(case, cast, dice)
                if sent is not None:
                    put((label, {"kind": mode.name.lower(), "person": name} | sent))


def list_cases(strategy: Any, number: int, seed_: int) -> list[Any]:
    """So many of the strategy's cases, or fewer where there are no more."""
    cases: list[Any] = []

    @seed(seed_)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        suppress_health_check=HEALTH_CHECKS,
        phases=[Phase.generate],
    )
    @given(case=strategy)
    def collect(case: Any) -> None:
        cases.append(case)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect()
    except Unsatisfiable:
        pass  # an operation without parameters has nothing that could be wrong
    return cases


def to_request(case: Any, cast: Cast, dice: random.Random) -> dict[str, Any] | None:
    """A case as httpx2 takes it, with real ids put in now and then; None for one that no client can send."""
    ids = dict(cast.own if dice.random() < 0.7 else cast.other)
    if dice.random() < REAL_IDS:
        parameters: dict[str, Any] = case.path_parameters or {}
        for name in parameters:
            if name in ids:
                case.path_parameters[name] = str(ids[name])
            elif name in FREE:
                case.path_parameters[name] = FREE[name] or str(ids["course_id"])
    try:
        given = case.as_transport_kwargs(base_url="http://site")
    except (SchemathesisError, ValueError, TypeError):
        return None
    content: Any = given.get("data")
    headers = {name: str(value) for name, value in given["headers"].items()}
    if "json" in given:
        body = _with_real_ids(given["json"], ids, dice)
        try:
            content = json.dumps(body).encode()
        except (ValueError, TypeError):
            return None
    return {
        "method": given["method"],
        "url": given["url"].removeprefix("http://site"),
        "params": given.get("params") or None,
        "headers": {k: v for k, v in headers.items() if k.lower() not in ("user-agent", "x-schemathesis-testcaseid")},
        "content": content.encode() if isinstance(content, str) else content,
        "cookies": given.get("cookies") or None,
    }


def _with_real_ids(body: Any, ids: dict[str, Any], dice: random.Random) -> Any:
    if not isinstance(body, dict):
        return body
    changed = dict(cast_to("dict[str, Any]", body))
    for name, value in list(changed.items()):
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in str(name))
        if snake in ids and isinstance(value, str) and dice.random() < REAL_IDS:
            changed[name] = str(ids[snake])
    return changed


# ------------------------------------------------------------------ the pages' forms

FIELDS = (
    "note", "amount", "sessions", "all_of_it", "as_coins", "refunded_cents", "session_count", "time_slot", "start_date",
    "email", "password", "next",
)  # fmt: skip
QUERIES = ("student", "q", "stage", "reason", "cursor", "done", "next", "v")
SOON = (date.today() + timedelta(days=40)).isoformat()  # may be chosen for a start
GOOD = ("by the proof", "2", "#1 #2", "1,200.50", SOON, "6:00 AM", "0", "asha@example.com", "/home", "paid", "")
BUTTONS = ("repair", "refund", "accept", "hold", "release", "mend_payment", "mend_purchase", "nothing")
CHARSETS = ("utf-8", "utf-7", "utf-16", "unicode_escape", "nonsense", "idna")


def make_form(dice: random.Random, route: Route, cast: Cast) -> dict[str, Any]:
    """A page's request with odd texts in every place; as somebody, mostly somebody who may."""
    ids = dict(cast.own if dice.random() < 0.7 else cast.other)
    ids |= {"some_id": ids["payment_id"], "button": dice.choice(BUTTONS), "path": _odd(dice, "app.js"), "seq": "1"}
    url = route.path
    for name in [name for name in route.names if "{" + name + "}" in url]:
        value = str(ids.get(name, FREE.get(name, new_id())))
        if name in OWNED and dice.random() > REAL_IDS:
            value = _odd(dice, value)
        url = url.replace("{" + name + "}", quote(value, safe="", errors="replace"))
    params = {name: _odd(dice, dice.choice((*GOOD, str(ids["student_id"])))) for name in dice.sample(QUERIES, 3)}
    sent: dict[str, Any] = {"method": route.method, "url": url, "params": params, "headers": {}}
    person = dice.choice(("student", "trainer", "support", "admin", "admin", "nobody"))
    if route.method not in ("GET", "HEAD"):
        fields = {name: _odd(dice, dice.choice(GOOD)) for name in dice.sample(FIELDS, dice.randrange(1, len(FIELDS)))}
        if dice.random() < 0.15:
            sent |= _multipart(dice, fields)
        else:
            sent["data"] = {name: text.encode(errors="replace").decode() for name, text in fields.items()}
    sent["params"] = {name: text.encode(errors="replace").decode() for name, text in params.items()}
    if dice.random() < 0.5:
        sent["headers"]["accept"] = "text/html"
    if dice.random() < 0.2:
        sent["headers"] |= {"hx-request": "true", "hx-current-url": "http://[x" if dice.random() < 0.5 else "/home"}
    if dice.random() < 0.1:
        sent["headers"] |= {"origin": dice.choice(("http://[x", "null", "http://x:y", "\xe9"))}
    return sent | {"person": person}


def _odd(dice: random.Random, good: str) -> str:
    kind = dice.random()
    return good if kind < 0.5 else bend(dice, good)[:3000] if kind < 0.8 else dice.choice(ODD)


def _multipart(dice: random.Random, fields: dict[str, str]) -> dict[str, Any]:
    charset = dice.choice(CHARSETS)
    parts = b""
    for name, text in fields.items():
        value = dice.choice((text.encode(errors="replace"), b"+2AA-", rb"\ud800", b"\xff\xfe\x00\xd8", b"\x00"))
        file = b'; filename="x"' if dice.random() < 0.1 else b""
        parts += (
            b'--b\r\nContent-Disposition: form-data; name="'
            + name.encode()
            + b'"'
            + file
            + b"\r\n\r\n"
            + value
            + b"\r\n"
        )
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    return {"content": parts + (b"--b--\r\n" if dice.random() < 0.9 else b""), "headers": headers}


# ------------------------------------------------------------------ sending


async def _send_all(site: Site, cast: Cast, tally: Tally, queue: asyncio.Queue[Sent | None]) -> None:
    while (sent := await queue.get()) is not None:
        await send(site, cast, tally, *sent)


async def send(site: Site, cast: Cast, tally: Tally, label: str, asked: dict[str, Any]) -> httpx2.Response | None:
    """Ask, and judge the answer."""
    kind, person = asked.pop("kind"), cast.people[asked.pop("person")]
    if label.endswith("/logout"):
        person = cast.people["revoked"]  # the others still need their sign-ins
    given_: dict[str, str] = asked.pop("headers")
    headers = {name: value for name, value in given_.items() if name.lower() != "authorization"}
    baked: dict[str, Any] = asked.pop("cookies", None) or {}
    cookies = "; ".join(f"{name}={value}" for name, value in baked.items())
    if cookies and cookies.isascii() and cookies.isprintable():
        headers["cookie"] = cookies
    try:
        request = site.client.build_request(headers=headers | person.headers, **asked)
    except (ValueError, TypeError, httpx2.InvalidURL):
        return None  # no client can send it
    tally.result.cases += 1
    tally.asked[label] += 1
    again = f"{request.method} {request.url} as {person.name} with {bytes(request.content)[:300]!r}"
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            answer = await site.client.send(request)
    except (TimeoutError, httpx2.HTTPError) as error:
        tally.result.violated(f"{again}: no answer ({error!r})", _quoted(label))
        return None
    tally.statuses[answer.status_code] += 1
    said = request.content.decode(errors="replace") + str(request.url) + httpx2.URL(str(request.url)).path
    wrong = judge_answer(answer, program=answer.url.path.startswith("/api/"), reflected=said)  # pages answer pages
    if wrong:
        tally.result.violated(f"{again}: {wrong}", _quoted(label))
    tally.result.fired[kind] += 1
    if answer.status_code < 400:
        tally.result.good += 1
    else:
        tally.result.fired["refused"] += 1
    return answer


def _quoted(label: str) -> str:
    return f"'{label}'"


# ------------------------------------------------------------------ links: what one answer tells, the next request uses


async def _walk_links(context: Context, site: Site, cast: Cast, document: dict[str, Any], tally: Tally) -> int:
    """Schemathesis' state machine: answers' ids go into the next request along the links that it infers."""
    loop = asyncio.get_running_loop()
    before = tally.result.cases
    turns = 0
    steps = settings(
        max_examples=25,
        stateful_step_count=10,
        database=None,
        deadline=None,
        suppress_health_check=HEALTH_CHECKS,
        phases=[Phase.generate],
    )

    def ask(case: Any, person: Person) -> httpx2.Response | None:
        sent = to_request(case, Cast(own={}, other={}), random.Random(0))
        if sent is None:
            return None
        asked = {"kind": "linked", "person": person.name} | sent
        future = asyncio.run_coroutine_threadsafe(send(site, cast, tally, case.operation.label, asked), loop)
        return future.result()

    def work() -> None:
        nonlocal turns
        from schemathesis.core.transport import Response

        schema: Any = schemathesis.openapi.from_dict(document)
        people = [cast.people["student"], cast.people["admin"]]

        class Walk(schema.as_state_machine()):  # type: ignore[misc] # a class made at run time
            def call(self, case: Any, **_: Any) -> Any:
                nonlocal turns
                turns += 1
                answer = ask(case, people[turns % 2])
                if answer is None:
                    answer = httpx2.Response(404, request=httpx2.Request("GET", "http://site/"), content=b"{}")
                plain = httpx2.Request(answer.request.method, answer.request.url)
                import requests

                return Response(
                    status_code=answer.status_code,
                    headers={name: [value] for name, value in answer.headers.items()},
                    content=answer.content,
                    request=requests.Request(plain.method, str(plain.url)).prepare(),
                    elapsed=0.0,
                    verify=False,
                )

            def validate_response(self, response: Any, case: Any, **_: Any) -> None:
                """Judged when it was sent."""

        dice = context.dice("links")
        wanted, rounds = context.pick(100, 2_500), 0
        while turns < wanted and rounds < wanted:
            rounds += 1
            Walk._hypothesis_internal_use_seed = dice.getrandbits(32)  # what hypothesis.seed sets
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Walk.run(settings=steps)
            except Flaky:
                pass  # the site has changed meanwhile, so the same walk goes otherwise: begin another

    await asyncio.to_thread(work)
    return tally.result.cases - before


# ------------------------------------------------------------------ parsers


def _parsers(context: Context, result: PartResult) -> None:
    """Each parser its share, in processes of their own: reading texts needs nothing of ours."""
    inputs = context.pick(50_000, 1_000_000)
    if context.case:
        name, _, number = context.case.partition(":")
        parser = next(parser for parser in PARSERS if parser.name == name)
        _merge(result, feed(name, context.seed, range(int(number), int(number) + 1)), parser)
        return
    share = sum(parser.share for parser in PARSERS)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2) as pool:
        waiting = [
            (parser, pool.apply_async(feed, (parser.name, context.seed, part)))
            for parser in PARSERS
            for part in _halves(int(inputs * parser.share / share) + 1)
        ]
        for parser, found in waiting:
            _merge(result, found.get(), parser)
    result.extra["parser_inputs"] = sum(result.extra["parsers"].values())


def _halves(number: int) -> Iterable[range]:
    return range(number // 2), range(number // 2, number)


@dataclass(slots=True)
class Fed:
    """What one parser made of its inputs."""

    inputs: int = 0
    good: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    wrong: list[tuple[int, str]] = None  # type: ignore[assignment] # set below; a plain list pickles


def feed(name: str, seed_: int, numbers: range) -> Fed:
    """Inputs by number: each is made from the seed and its number alone."""
    parser = next(parser for parser in PARSERS if parser.name == name)
    fed = Fed(wrong=[])
    dice = random.Random()
    for number in numbers:
        dice.seed(f"{seed_} {name} {number}")
        given_ = parser.make(dice)
        fed.inputs += 1
        started = time.process_time()
        try:
            fed.good += parser.read(given_)
        except parser.refusals:
            fed.refused += 1
        except Exception as error:
            fed.wrong.append((number, f"{type(error).__name__}: {str(error)[:150]} from {given_!r}"[:400]))
        fed.slowest_seconds = max(fed.slowest_seconds, time.process_time() - started)
    fed.wrong = fed.wrong[:50]
    return fed


HANG_SECONDS = 2.0


def _merge(result: PartResult, fed: Fed, parser: Parser) -> None:
    result.cases += fed.inputs
    counts: dict[str, int] = result.extra.setdefault("parsers", {})
    counts[parser.name] = counts.get(parser.name, 0) + fed.inputs
    result.fired["parser input refused"] += fed.refused
    if not fed.good and fed.inputs > 1:
        result.failed.append(f"{parser.name}: no input was good, so none was nearly good")
    if fed.slowest_seconds > HANG_SECONDS:
        result.violated(f"{parser.name}: one input took {fed.slowest_seconds:.1f} s")
    for number, said in fed.wrong:
        result.violated(f"{parser.name}: {said}", f"'{parser.name}:{number}'")
