"""Crash points, found by running: every step of the product, struck at every place where it touches the world.

Each step is run cleanly first, which counts its points; then each fault strikes before and after each point (`full`),
or one fault each point in turn (`small`), and then come pairs: a second fault, at a random point, while the first is
being recovered from. New code is covered the day it is written, because nothing here lists statements.
"""

from __future__ import annotations

from collections.abc import Sequence

from verify.crashpoints.every import list_steps
from verify.crashpoints.play import Batch, Found, name_of, parse_case, play
from verify.crashpoints.points import Fault, Place, Point, Strike, places_of, strikes_at
from verify.crashpoints.stage import Template, make_template
from verify.crashpoints.steps import Step
from verify.parts import Context
from verify.processes import in_processes
from verify.report import PartResult

CASES_MIN = {"small": 0, "full": 20_000}
PAIRS = {"small": 60, "full": 4_000}
STUDENTS_MAX = 42  # of one batch
ONE_BY_ONE = 1
TRIES_MAX = 4  # to come to a place that not every case comes to

Plan = tuple[Strike, ...]


async def run(context: Context) -> PartResult:
    result = context.result()
    result.must_fire = tuple(Fault)
    steps = {step.name: step for step in list_steps()}
    templates = {
        trainers: await make_template(context.server.databases, trainers)
        for trainers in sorted({step.trainers for step in steps.values()})
    }
    if context.case:
        name, plan = parse_case(context.case)
        await _repeat(context, result, steps[name], plan, templates)
        return result
    clean = await in_processes(play, [_batch(context, templates, step, 0, []) for step in steps.values()])
    points = {found.step: found.points for found in clean}
    found: list[Found] = []

    async def strike(plans: dict[str, list[Plan]]) -> None:
        """Run the cases, in batches of databases of their own."""
        found.extend(
            await in_processes(
                play,
                [
                    _batch(context, templates, steps[name], len(found) + 1 + number, some)
                    for name, all_of_it in plans.items()
                    for number, some in enumerate(_cut(all_of_it, STUDENTS_MAX // steps[name].size - 2))
                ],
            )
        )

    await strike(_plan(context, points))
    # A place that not every case comes to (the third shortlist of a search) is tried again with other purchases.
    for _ in range(TRIES_MAX):
        if left := _left(points, found):
            await strike(_plan_again(points, left))
    _judge(result, points, clean, found)
    result.good_min = result.cases
    return result


def _batch(context: Context, templates: dict[int, Template], step: Step, number: int, plans: Sequence[Plan]) -> Batch:
    databases = context.server.databases.of_process(f"{step.name.replace('-', '_')}_{number}")
    return Batch(databases, templates[step.trainers], step.name, number, tuple(plans))


def _plan(context: Context, points: dict[str, list[Point]]) -> dict[str, list[Plan]]:
    """Which cases are to be run, by step."""
    plans: dict[str, list[Plan]] = {step: [] for step in points}
    turn = context.seed
    for step, seen in points.items():
        for place, point in zip(places_of(seen), seen, strict=True):
            possible = strikes_at(point)
            # In turn, with a stride that meets each fault before and after: a small run still sees every kind.
            chosen = possible if context.scale == "full" else [possible[(turn * 9) % len(possible)]]
            plans[step] += [(_at(place, when, fault),) for when, fault in chosen]
            turn += 1
    singles = sum(map(len, plans.values()))
    dice = context.dice("pairs")
    for _ in range(max(PAIRS[context.scale], CASES_MIN[context.scale] - singles)):
        step = dice.choice(list(points))
        seen = points[step]
        first = dice.randrange(len(seen))
        second = dice.randrange(len(seen))
        begin = _at(places_of(seen)[first], *dice.choice(strikes_at(seen[first])))
        # So many points after the first one, whatever these are: a recovery has points of its own.
        plans[step].append((begin, Strike(second, *dice.choice(strikes_at(seen[second])))))
    return plans


def _plan_again(points: dict[str, list[Point]], left: dict[str, set[Place]]) -> dict[str, list[Plan]]:
    """All faults at the places where none has fired."""
    return {
        step: [
            (_at(place, when, fault),)
            for place, point in zip(places_of(seen), seen, strict=True)
            if place in left.get(step, ())
            for when, fault in strikes_at(point)
        ]
        for step, seen in points.items()
    }


def _at(place: Place, when: str, fault: Fault) -> Strike:
    label, turn = place
    return Strike(turn, when, fault, label)


def _left(points: dict[str, list[Point]], found: Sequence[Found]) -> dict[str, set[Place]]:
    """By step, the places where nothing has been struck yet."""
    left = {step: set(places_of(seen)) for step, seen in points.items()}
    for each in found:
        left[each.step] -= each.struck
    return {step: places for step, places in left.items() if places}


def _cut(plans: Sequence[Plan], size: int) -> list[Sequence[Plan]]:
    return [plans[at : at + size] for at in range(0, len(plans), size)]


def _judge(result: PartResult, points: dict[str, list[Point]], clean: Sequence[Found], found: Sequence[Found]) -> None:
    came_to = {each.step: each.clean for each in clean}
    second = silent = 0
    for each in [*clean, *found]:
        result.cases += each.cases
        result.fired.update(each.fired)
        result.good += each.good
        second += each.second
        silent += each.silent
        for case, said in each.violations:
            result.violated(f"{case}: {said}", case)
        if each.clean != came_to[each.step]:
            result.violated(f"{each.step}: two clean runs came to different ends")
    result.extra["points_found"] = sum(map(len, points.values()))
    left = _left(points, found)
    result.extra["points_exercised"] = result.extra["points_found"] - sum(map(len, left.values()))
    result.extra["statements_found"] = len({point.label for seen in points.values() for point in seen})
    result.extra["steps"] = len(points)
    result.extra["second_faults"] = second
    result.extra["silent"] = silent
    for step, missing in left.items():
        result.failed.append(f"{step}: not exercised {', '.join(f'{label}#{turn}' for label, turn in sorted(missing))}")


async def _repeat(context: Context, result: PartResult, step: Step, plan: Plan, templates: dict[int, Template]) -> None:
    [found] = await in_processes(play, [_batch(context, templates, step, 0, [plan] if plan else [])])
    for point, (label, turn) in zip(found.points, places_of(found.points), strict=True):
        print(f"{point.kind:<10} {label}#{turn}")
    result.cases, result.good, result.fired = found.cases or ONE_BY_ONE, found.good, found.fired
    result.must_fire = ()
    for case, said in found.violations:
        result.violated(f"{case or name_of(step.name, plan)}: {said}", case)
