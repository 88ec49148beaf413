-- The worst day: operators stop a stage for a while, for a course or a city, and let it go on.

-- Where a city is, for those who say its name. A student lives in a city whose centre is no farther than its radius.
create table cities (
  name text primary key,
  latitude double precision not null check (latitude between -90 and 90),
  longitude double precision not null check (longitude between -180 and 180),
  radius_km double precision not null check (radius_km > 0)
);
insert into cities (name, latitude, longitude, radius_km) values
  ('Ahmedabad', 23.0225, 72.5714, 30), ('Bengaluru', 12.9716, 77.5946, 35), ('Bhopal', 23.2599, 77.4126, 25),
  ('Chandigarh', 30.7333, 76.7794, 20), ('Chennai', 13.0827, 80.2707, 35), ('Coimbatore', 11.0168, 76.9558, 25),
  ('Delhi', 28.6139, 77.2090, 30), ('Dubai', 25.2048, 55.2708, 40), ('Faridabad', 28.4089, 77.3178, 15),
  ('Ghaziabad', 28.6692, 77.4538, 15), ('Gurugram', 28.4595, 77.0266, 20), ('Hyderabad', 17.3850, 78.4867, 35),
  ('Indore', 22.7196, 75.8577, 25), ('Jaipur', 26.9124, 75.7873, 30), ('Kochi', 9.9312, 76.2673, 25),
  ('Kolkata', 22.5726, 88.3639, 35), ('Lucknow', 26.8467, 80.9462, 25), ('Mumbai', 19.0760, 72.8777, 45),
  ('Nagpur', 21.1458, 79.0882, 25), ('Noida', 28.5355, 77.3910, 15), ('Pune', 18.5204, 73.8567, 30),
  ('Singapore', 1.3521, 103.8198, 30), ('Surat', 21.1702, 72.8311, 25);

-- What is stopped now; who ended it and why is in audit_log. stage: payments stay there. A city as it was then.
create table pauses (
  id uuid primary key,
  stage text not null check (stage in ('paid', 'purchased', 'allocated')),
  course_id uuid,
  city text,
  latitude double precision,
  longitude double precision,
  radius_km double precision,
  note text not null,
  paused_by text not null,
  paused_at timestamptz not null,
  check (num_nulls(city, latitude, longitude, radius_km) in (0, 4))
);
create unique index pauses_scope on pauses (stage, course_id, city) nulls not distinct;

-- Which pause keeps a purchase at a stage; null: none. Where nothing is paused nobody needs to ask.
create function paused_by(stage text, course uuid, student uuid) returns uuid language sql stable as $$
  select p.id from pauses p
  where p.stage = $1 and (p.course_id is null or p.course_id = $2)
    and (p.city is null or exists (
      select from students s where s.id = $3
        and distance_km(s.latitude, s.longitude, p.latitude, p.longitude) <= p.radius_km))
  order by p.paused_at, p.id limit 1
$$;

-- Two more reasons to wait. The table is small: it holds what is not delivered yet.
-- squawk-ignore ban-drop-constraint, constraint-missing-not-valid
alter table undelivered drop constraint undelivered_reason_check, add constraint undelivered_reason_check check (
  reason in ('AMOUNT_MISMATCH', 'PAID_TWICE', 'STUDENT_NOT_FOUND', 'COURSE_NOT_FOUND', 'TIER_UNKNOWN',
    'INVALID_SCHEDULE', 'STUDENT_LOCATION_MISSING', 'STUDENT_CONFLICT', 'NO_TRAINER_AVAILABLE', 'TRAINER_CONFLICT',
    'TRAINER_LEFT', 'OPERATOR_HOLD', 'STAGE_PAUSED', 'START_PASSED'));
