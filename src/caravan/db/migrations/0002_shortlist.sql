-- Finding a trainer without judging every trainer of the course: see docs/decisions/0007.

-- A point on Mercator's map: there, away from the poles, who is nearest is nearest on the Earth too. For order only.
create function on_map(latitude double precision, longitude double precision) returns point
language sql immutable parallel safe strict as $$
  select point(radians(longitude), asinh(tan(radians(latitude))))
$$;

-- As before, in a form that the planner can put into the statement that asks.
create or replace function distance_km(
  lat1 double precision, lon1 double precision, lat2 double precision, lon2 double precision)
returns double precision language sql immutable parallel safe strict as $$
  select 2 * 6371.0088 * atan2(
    sqrt(sin(radians(lat2 - lat1) / 2) ^ 2 + cos(radians(lat1)) * cos(radians(lat2)) * sin(radians(lon2 - lon1) / 2) ^ 2),
    sqrt(abs(1 - (sin(radians(lat2 - lat1) / 2) ^ 2
                  + cos(radians(lat1)) * cos(radians(lat2)) * sin(radians(lon2 - lon1) / 2) ^ 2))))
$$;

-- The minutes of the week, 10,080 from the epoch on, that ranges of instants touch; twice over, so that what passes
-- the end of the week is in one piece.
create function minutes_of_week(during tstzmultirange) returns int4multirange
language sql immutable parallel safe strict as $$
  select coalesce(range_agg(int4range(turn + first, turn + first + minutes) * int4range(0, 20160)), '{}')
  from (
    select distinct begins % 10080 as first, least(ends - begins, 10080) as minutes
    from unnest(during) as ranges(each)
    cross join lateral (
      select floor(date_part('epoch', lower(each) - timestamptz '1970-01-01 00:00+00') / 60)::int as begins,
             ceil(date_part('epoch', upper(each) - timestamptz '1970-01-01 00:00+00') / 60)::int as ends) whole
  ) touched
  cross join (values (-10080), (0), (10080)) as weeks(turn)
$$;

-- What open comes to, small enough to be looked at for many trainers: within known, the minutes of the week at which
-- the trainer is open in every week (always), and in any week (ever). Only what is in between needs open itself.
-- The table is written anew: about a millisecond for each trainer.
alter table trainer_time
  -- squawk-ignore adding-field-with-default
  add column known tstzrange generated always as (range_merge(open)) stored,
  -- squawk-ignore adding-field-with-default
  add column always int4multirange generated always as (
    int4multirange(int4range(0, 20160)) - minutes_of_week(tstzmultirange(range_merge(open)) - open)) stored,
  -- squawk-ignore adding-field-with-default
  add column ever int4multirange generated always as (minutes_of_week(open)) stored;

-- The trainer's place, for asking a course for its nearest trainers. Kept here by the database, whoever writes; like
-- trainers.latitude and longitude, which it is made of, it is for matching only.
alter table trainer_courses add column place point;
update trainer_courses c set place = on_map(t.latitude, t.longitude) from trainers t where t.id = c.trainer_id;

create function take_trainers_place() returns trigger language plpgsql as $$
begin
  new.place := (select on_map(latitude, longitude) from trainers where id = new.trainer_id);
  return new;
end
$$;
create trigger trainer_courses_place before insert on trainer_courses
  for each row execute function take_trainers_place();

create function pass_place_on() returns trigger language plpgsql as $$
begin
  update trainer_courses set place = on_map(new.latitude, new.longitude) where trainer_id = new.id;
  return null;
end
$$;
create trigger trainers_place after update of latitude, longitude on trainers
  for each row execute function pass_place_on();

-- A course's trainers from the nearest on, and in an order that has nothing to do with anything. (The table is small.)
-- squawk-ignore require-concurrent-index-creation
create index trainer_courses_nearest on trainer_courses using gist (course_id, place);
-- squawk-ignore require-concurrent-index-creation
create index trainer_courses_shuffled on trainer_courses (course_id, uuid_hash(trainer_id));
