"""Who could teach it: a few candidates first, judged cheaply; everybody where those don't do (docs/decisions/0007).

Both statements apply the same filters. Whoever is looked at, the constraints of `bookings` have the last word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from caravan import bookings
from caravan.allocations.matching import Candidate, Need
from caravan.db import Tx

WEEK_MINUTES = 10_080


@dataclass(frozen=True, slots=True)
class Asked:
    """A need, and of which trainers."""

    need: Need
    course_id: UUID
    mode: str


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a shortlist goes: it ends with `most` who are open then, and `looked_at` trainers at the latest."""

    most: int
    looked_at: int


REACHES = (Reach(4, 24), Reach(16, 128), Reach(64, 512))
"""Four are enough for almost everybody, and keep the load even: the best of a few is nearly the best of all. Each
further reach is for those whose few are taken."""


@dataclass(frozen=True, slots=True)
class Search:
    """What the database says about one need.

    `counts` of a shortlist: trainers who are `open` then, of these `free`. Of everybody: trainers left after each
    filter, in order: teaches, active, offersMode, open, free, withinRadius. `candidates`: the best, best first.
    """

    everybody: bool
    counts: dict[str, int]
    candidates: list[Candidate]


# The needs of a batch, and what their series come to: `week` in minutes as trainer_time has it.
NEEDS = f"""
{bookings.SERIES},
times as materialized (
  select r.series, r.during, range_merge(r.during) as span, w.week
  from series r
  join (select u.series, range_agg(int4range(u.minute, u.minute + r.minutes)) as week
        from unnest(%(week_series)b::int[], %(week_minutes)b::int[]) as u(series, minute) join series r using (series)
        group by u.series) w using (series)
), homes as materialized (
  select id, latitude, longitude from students where id = any(%(students)b::uuid[])
), needs as materialized (
  select n.*, s.latitude, s.longitude
  from unnest(%(ordinals)b::int[], %(purchases)b::uuid[], %(courses)b::uuid[], %(modes)b::text[],
              %(students)b::uuid[], %(need_series)b::int[], %(current)b::uuid[])
    as n(ordinal, purchase_id, course_id, mode, student_id, series, current_trainer)
  left join homes s on s.id = n.student_id
)"""  # noqa: S608 - put together from constants

# Whether a trainer (trainer_time h) is open at all slots of a series (times r). The week tells mostly; only where it is
# not every week the same, `open` itself is asked, which is big and stored out of line.
IS_OPEN = """
case when r.week <@ h.always then r.span <@ h.known when r.week <@ h.ever then h.open @> r.during else false end"""

# Of a trainer's live bookings (k) that touch the time between a series' first slot and its last: how many sessions they
# are, and whether any is at the same time as one of the series'.
LOAD = """
coalesce(sum(cardinality(k.starts)), 0)::int as load, coalesce(bool_or(k.during && r.during), false) as busy"""

# For each need a few trainers of its course: for lessons at home the nearest, else those who come next in the shuffled
# order, from a place on that the purchase's id decides, so that neither the needs of a batch nor workers compete for
# the same few. Whoever teaches the purchase already comes first.
# Each step is a nested loop over an index (`offset 0` keeps it one): the cost does not grow with the trainers.
# Places are compared here and in SEARCH_TRAINERS and nowhere else: only distances leave the database.
SHORTLIST = f"""
with {NEEDS}
select n.ordinal, c.trainer_id, b.load, c.km, not b.busy as free
from needs n
join times r using (series)
cross join lateral (select on_map(n.latitude, n.longitude) as place, uuid_hash(n.purchase_id) as cut) at
cross join lateral (
  select near.trainer_id, d.km
  from (
    select tc.trainer_id, true as current from trainer_courses tc
    where tc.course_id = n.course_id and tc.trainer_id = n.current_trainer
    union all (
      select tc.trainer_id, false from trainer_courses tc where n.mode = 'home' and tc.course_id = n.course_id
      order by tc.place <-> at.place limit %(looked_at)s)
    union all (
      select tc.trainer_id, false from trainer_courses tc where n.mode <> 'home' and tc.course_id = n.course_id
        and uuid_hash(tc.trainer_id) >= at.cut
      order by uuid_hash(tc.trainer_id) limit %(looked_at)s)
    union all (
      select tc.trainer_id, false from trainer_courses tc where n.mode <> 'home' and tc.course_id = n.course_id
        and uuid_hash(tc.trainer_id) < at.cut
      order by uuid_hash(tc.trainer_id) limit %(looked_at)s)
  ) near
  cross join lateral (
    select t.active and n.mode = any(t.modes) as offers, t.latitude, t.longitude, t.radius_km
    from trainers t where t.id = near.trainer_id offset 0) t
  cross join lateral (
    select case when n.mode = 'home' then distance_km(n.latitude, n.longitude, t.latitude, t.longitude) end as km) d
  cross join lateral (
    select {IS_OPEN} as open from trainer_time h where h.trainer_id = near.trainer_id offset 0) h
  where (near.current or near.trainer_id is distinct from n.current_trainer)
    and t.offers and (n.mode <> 'home' or d.km <= t.radius_km) and h.open
  limit %(most)s) c
cross join lateral (
  select {LOAD} from bookings k where k.trainer_id = c.trainer_id and k.live and k.during && r.span) b
"""  # noqa: S608 - put together from constants


async def shortlist_trainers(tx: Tx, asked: Sequence[Asked], reach: Reach) -> list[Search]:
    """An answer for each, in their order. One without candidates says nothing about the trainers it left out."""
    rows = await tx.tuples(SHORTLIST, _params(asked) | {"most": reach.most, "looked_at": reach.looked_at})
    answers = [Search(everybody=False, counts={"open": 0, "free": 0}, candidates=[]) for _ in asked]
    for ordinal, trainer_id, load, km, free in rows:
        answer = answers[int(ordinal)]
        answer.counts["open"] += 1
        if free:
            answer.counts["free"] += 1
            answer.candidates.append(Candidate(trainer_id, load, km))
    return answers


# For each need: how many trainers of the course each filter leaves, and the best of those who pass them all. Everything
# but the distance is the same for all needs of one course, mode and series, so it is worked out once for those
# (`combos`).
SEARCH_TRAINERS = f"""
with {NEEDS},
combos as materialized (
  select distinct n.course_id, n.mode, n.series from needs n
), judged as materialized (
  select c.course_id, c.mode, c.series, t.id as trainer_id, t.latitude, t.longitude, t.radius_km, t.active,
    t.active and c.mode = any(t.modes) as offers, v.open, v.open and not b.busy as free, b.load
  from combos c
  join times r using (series)
  join trainer_courses tc on tc.course_id = c.course_id
  join trainers t on t.id = tc.trainer_id
  left join trainer_time h on h.trainer_id = t.id
  cross join lateral (
    select t.active and c.mode = any(t.modes) and coalesce({IS_OPEN}, false) as open) v
  left join lateral (
    select {LOAD} from bookings k where k.trainer_id = t.id and k.live and k.during && r.span) b on v.open
  where %(only)s::uuid is null or t.id = %(only)s
), counted as materialized (
  select course_id, mode, series, count(*)::int as teaches, (count(*) filter (where active))::int as active,
    (count(*) filter (where offers))::int as offers, (count(*) filter (where open))::int as open,
    (count(*) filter (where free))::int as free
  from judged group by course_id, mode, series
), reachable as (
  select n.ordinal, j.trainer_id, j.load, d.km, row_number() over (
    partition by n.ordinal
    order by (j.trainer_id is not distinct from n.current_trainer) desc, j.load, d.km, j.trainer_id) as place
  from needs n join judged j using (course_id, mode, series)
  cross join lateral (
    select case when n.mode = 'home' then distance_km(n.latitude, n.longitude, j.latitude, j.longitude) end as km) d
  where j.free and (n.mode <> 'home' or d.km <= j.radius_km)
), best as (
  select r.ordinal, count(*)::int as within,
    array_agg(r.trainer_id order by r.place) filter (where r.place <= l.most) as trainers,
    array_agg(r.load order by r.place) filter (where r.place <= l.most) as loads,
    array_agg(r.km order by r.place) filter (where r.place <= l.most) as kms
  from reachable r join unnest(%(ordinals)b::int[], %(limits)b::int[]) as l(ordinal, most) using (ordinal)
  group by r.ordinal
)
select n.ordinal, coalesce(c.teaches, 0) as teaches, coalesce(c.active, 0) as active, coalesce(c.offers, 0) as offers,
  coalesce(c.open, 0) as open, coalesce(c.free, 0) as free, coalesce(b.within, 0) as within, b.trainers, b.loads, b.kms
from needs n
left join counted c using (course_id, mode, series)
left join best b using (ordinal)
order by n.ordinal
"""  # noqa: S608 - put together from constants

CANDIDATES_SHOWN = 8
CANDIDATES_MAX = 64


async def search_trainers(tx: Tx, asked: Sequence[Asked], *, only: UUID | None = None) -> list[Search]:
    """An answer for each, in their order, about everybody who teaches the course; `only` asks about one trainer.

    The later of two needs for one course gets a longer list, so that a batch can hand out enough different trainers.
    """
    seen: dict[UUID, int] = {}
    limits: list[int] = []
    for each in asked:
        seen[each.course_id] = seen.get(each.course_id, -1) + 1
        limits.append(min(CANDIDATES_MAX, CANDIDATES_SHOWN + seen[each.course_id]))
    rows = await tx.all(SEARCH_TRAINERS, _params(asked) | {"limits": limits, "only": only})
    return [_search(row) for row in rows]


def _params(asked: Sequence[Asked]) -> dict[str, Any]:
    series, numbers = bookings.pack_series([each.need.series for each in asked])
    weeks = {number: minutes_of_week(each.need.series.starts) for number, each in zip(numbers, asked, strict=True)}
    return series | {
        "week_series": [number for number, minutes in weeks.items() for _ in minutes],
        "week_minutes": [minute for minutes in weeks.values() for minute in minutes],
        "ordinals": list(range(len(asked))),
        "purchases": [each.need.purchase_id for each in asked],
        "courses": [each.course_id for each in asked],
        "modes": [each.mode for each in asked],
        "students": [each.need.student_id for each in asked],
        "need_series": numbers,
        "current": [each.need.current_trainer for each in asked],
    }


def minutes_of_week(starts: Sequence[datetime]) -> set[int]:
    """At which minutes of the week slots begin, counted as in trainer_time; both, where one begins between two."""
    minutes: set[int] = set()
    for second in {start.timestamp() % (60 * WEEK_MINUTES) for start in starts}:  # few: most weeks are alike
        minutes.add(int(second // 60))
        if second % 60:
            minutes.add((int(second // 60) + 1) % WEEK_MINUTES)
    return minutes


def _search(row: Mapping[str, Any]) -> Search:
    return Search(
        everybody=True,
        counts={
            "teaches": row["teaches"],
            "active": row["active"],
            "offersMode": row["offers"],
            "open": row["open"],
            "free": row["free"],
            "withinRadius": row["within"],
        },
        candidates=[
            Candidate(*columns)
            for columns in zip(row["trainers"] or (), row["loads"] or (), row["kms"] or (), strict=True)
        ],
    )
