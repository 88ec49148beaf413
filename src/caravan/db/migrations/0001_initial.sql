-- The whole first schema of Caravan, for PostgreSQL 15 or newer.
-- A table is written by one module (named in its comment); any module may read it in SQL.
-- Ids are UUIDs, made by the application (time-ordered) or by new_id(). Money is integer minor units. Instants are timestamptz.

create extension if not exists btree_gist;

-- Time-ordered ids for rows that the server makes itself (sessions). PostgreSQL 18 has them built in.
do $$
begin
  if current_setting('server_version_num')::int >= 180000 then
    create function new_id() returns uuid language sql volatile parallel safe as 'select uuidv7()';
  else
    create function new_id() returns uuid language sql volatile parallel safe as $f$
      select encode(set_byte(set_byte(overlay(uuid_send(gen_random_uuid())
               placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3) from 1 for 6),
               6, 112 | (get_byte(uuid_send(gen_random_uuid()), 0) & 15)),
               8, 128 | (get_byte(uuid_send(gen_random_uuid()), 1) & 63)), 'hex')::uuid
    $f$;
  end if;
end
$$;

-- Great-circle distance in kilometres on a sphere of the Earth's mean radius.
create function distance_km(lat1 double precision, lon1 double precision, lat2 double precision, lon2 double precision)
returns double precision language sql immutable parallel safe strict as $$
  select 2 * 6371.0088 * asin(least(1, sqrt(
    sin(radians(lat2 - lat1) / 2) ^ 2 + cos(radians(lat1)) * cos(radians(lat2)) * sin(radians(lon2 - lon1) / 2) ^ 2)))
$$;

-- ------------------------------------------------------------------ accounts and access (web/auth)

create table accounts (
  id uuid primary key,
  email text not null,
  phone text,
  name text not null,
  role text not null check (role in ('student', 'trainer', 'support', 'admin')),
  password_hash text not null,
  disabled_at timestamptz,
  created_at timestamptz not null default now()
);
create unique index accounts_email_key on accounts (lower(email));
create index accounts_phone on accounts (phone) where phone is not null;

create table auth_tokens (
  token_hash bytea primary key,
  account_id uuid not null references accounts,
  created_at timestamptz not null default now(),
  expires_at timestamptz not null,
  used_at timestamptz not null default now()
);
create index auth_tokens_account on auth_tokens (account_id);

-- Opens one socket for the sign-in that asked for it, and ends with it.
create table realtime_tickets (
  ticket_hash bytea primary key,
  account_id uuid not null references accounts,
  token_hash bytea not null references auth_tokens on delete cascade,
  expires_at timestamptz not null
);
create index realtime_tickets_token on realtime_tickets (token_hash);
create index realtime_tickets_account on realtime_tickets (account_id);

create table login_attempts (
  id bigint generated always as identity primary key,
  email_hash bytea not null,
  address text not null,
  attempted_at timestamptz not null default now()
);
create index login_attempts_email on login_attempts (email_hash, attempted_at);
create index login_attempts_address on login_attempts (address, attempted_at);

-- One row per answered request with an Idempotency-Key; written in the transaction of its effect.
create table idempotency_keys (
  account_id uuid not null,
  key text not null check (length(key) between 1 and 255),
  route text not null,
  body_hash bytea not null,
  response_status smallint not null,
  response_body jsonb not null,
  created_at timestamptz not null default now(),
  primary key (account_id, key)
);
create index idempotency_keys_created on idempotency_keys (created_at);

-- Who did what by hand: append only, in the transaction of the change.
create table audit_log (
  id uuid primary key,
  at timestamptz not null,
  actor text not null,
  account_id uuid,
  action text not null,
  subject_type text not null,
  subject_id text not null,
  note text,
  before jsonb,
  after jsonb,
  build text not null
);
create index audit_log_subject on audit_log (subject_id, at);
create index audit_log_at on audit_log (at);

create function refuse_change() returns trigger language plpgsql as $$
begin
  raise exception '% is append-only', tg_table_name using errcode = 'restrict_violation';
end
$$;
create trigger audit_log_append_only before update or delete or truncate on audit_log
  for each statement execute function refuse_change();

-- ------------------------------------------------------------------ people

-- The only table with a family's coordinates.
create table students (
  id uuid primary key,
  name text not null,
  latitude double precision check (latitude between -90 and 90),
  longitude double precision check (longitude between -180 and 180),
  timezone text not null default 'Asia/Kolkata',
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  check ((latitude is null) = (longitude is null))
);

create table account_students (
  account_id uuid not null references accounts,
  student_id uuid not null references students,
  created_at timestamptz not null default now(),
  primary key (account_id, student_id)
);
create index account_students_student on account_students (student_id);

-- A trainer's working place is in this table and nowhere else; radius_km is how far they travel.
create table trainers (
  id uuid primary key,
  account_id uuid unique references accounts,
  name text not null,
  active boolean not null default true,
  timezone text not null default 'Asia/Kolkata',
  latitude double precision check (latitude between -90 and 90),
  longitude double precision check (longitude between -180 and 180),
  radius_km double precision not null default 10 check (radius_km >= 0),
  modes text[] not null default '{online}' check (modes <@ array['online', 'home', 'center'] and cardinality(modes) > 0),
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  check ((latitude is null) = (longitude is null))
);

create table courses (
  id uuid primary key,
  title text not null,
  category text not null,
  session_minutes smallint not null check (session_minutes between 5 and 480),
  weekdays smallint[] not null default '{1,2,3,4,5,6,7}'
    check (weekdays <@ array[1, 2, 3, 4, 5, 6, 7]::smallint[] and cardinality(weekdays) between 1 and 7),
  learning_modes text[] not null default '{online,home}'
    check (learning_modes <@ array['online', 'home', 'center'] and cardinality(learning_modes) > 0),
  group_sizes smallint[] not null default '{1}' check (cardinality(group_sizes) > 0),
  retired_at timestamptz,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

-- The price of a tier for one group size, in the currency's minor unit.
create table course_tiers (
  course_id uuid not null references courses,
  sessions smallint not null check (sessions between 1 and 400),
  group_size smallint not null default 1 check (group_size between 1 and 50),
  amount_cents bigint not null check (amount_cents >= 0),
  currency char(3) not null default 'INR',
  primary key (course_id, sessions, group_size)
);

create table holidays (
  on_date date primary key,
  name text not null
);

create table trainer_courses (
  trainer_id uuid not null references trainers,
  course_id uuid not null references courses,
  primary key (course_id, trainer_id)
);
create index trainer_courses_trainer on trainer_courses (trainer_id);

-- When a trainer works, as wall-clock time in the trainer's zone; unknown outside valid_from..valid_until (both included).
create table trainer_availability (
  id uuid primary key,
  trainer_id uuid not null references trainers,
  weekday smallint not null check (weekday between 1 and 7),
  from_time time not null,
  until_time time not null,
  valid_from date not null,
  valid_until date not null,
  check (from_time < until_time or until_time = '00:00'),
  check (valid_from <= valid_until)
);
create index trainer_availability_trainer on trainer_availability (trainer_id);

create table trainer_absences (
  id uuid primary key,
  trainer_id uuid not null references trainers,
  during tstzrange not null check (not isempty(during)),
  note text,
  created_at timestamptz not null default now()
);
create index trainer_absences_trainer on trainer_absences (trainer_id);

-- The rules above as instants (availability minus absences), so that matching asks one question of one value.
create table trainer_time (
  trainer_id uuid primary key references trainers,
  open tstzmultirange not null,
  computed_at timestamptz not null
);

-- ------------------------------------------------------------------ carts

create table cart_items (
  id uuid primary key,
  student_id uuid not null references students,
  course_id uuid not null references courses,
  session_count smallint not null,
  learning_mode text not null,
  group_size smallint not null,
  time_slot text not null,
  start_date date not null,
  created_at timestamptz not null default now()
);
create index cart_items_student on cart_items (student_id, course_id);

-- ------------------------------------------------------------------ payments

-- What was sold, frozen. Columns of the terms are null only for imported money whose terms are not known yet.
create table checkouts (
  id uuid primary key,
  account_id uuid,
  student_id uuid not null,
  course_id uuid,
  sessions smallint check (sessions between 1 and 400),
  price_cents bigint not null check (price_cents >= 0),
  currency char(3) not null,
  session_minutes smallint,
  weekdays smallint[],
  learning_mode text,
  group_size smallint not null default 1,
  timezone text,
  slot_start time,
  start_date date,
  cart_item_id uuid,
  raw jsonb not null,
  created_at timestamptz not null default now(),
  expires_at timestamptz not null,
  paid_by uuid unique
);
create index checkouts_student on checkouts (student_id, course_id);

-- One attempt to pay a checkout. amount_cents and currency are what the provider is asked for (the price less coins),
-- captured_cents and captured_currency what came. checkouts.paid_by names the one payment that may be delivered.
-- No foreign keys to students and courses: money is recorded even where the rest is missing.
create table payments (
  id uuid primary key,
  checkout_id uuid not null references checkouts,
  account_id uuid,
  student_id uuid not null,
  provider text not null,
  status text not null check (status in ('created', 'pending', 'succeeded', 'failed', 'refunded', 'partially_refunded')),
  amount_cents bigint not null check (amount_cents >= 0),
  currency char(3) not null,
  coins int not null default 0 check (coins >= 0),
  captured_cents bigint check (captured_cents >= 0),
  captured_currency char(3),
  captured_at timestamptz,
  refunded_cents bigint not null default 0 check (refunded_cents >= 0),
  accepted_at timestamptz,
  metadata jsonb not null,
  traceparent text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  check (refunded_cents <= coalesce(captured_cents, 0)),
  check ((captured_at is not null) = (status in ('succeeded', 'refunded', 'partially_refunded')))
);
create index payments_checkout on payments (checkout_id);
create index payments_student on payments (student_id, created_at);
create index payments_created on payments (created_at);
alter table checkouts add constraint checkouts_paid_by_fkey foreign key (paid_by) references payments deferrable initially deferred;

-- sessions: how many sessions the refund takes away; session_seqs: which, once they are numbered.
create table refunds (
  id uuid primary key,
  payment_id uuid not null references payments,
  provider text not null,
  provider_refund_id text not null,
  amount_cents bigint not null check (amount_cents >= 0),
  sessions smallint not null default 0 check (sessions >= 0),
  session_seqs smallint[] not null default '{}',
  source text not null check (source in ('admin', 'provider')),
  note text,
  created_at timestamptz not null default now(),
  unique (provider, provider_refund_id)
);
create index refunds_payment on refunds (payment_id);

-- What providers told us, as received. applied_at is null while it has no effect yet (no such payment, too early).
create table webhook_events (
  provider text not null,
  event_id text not null,
  type text not null,
  payment_id uuid,
  amount_cents bigint,
  currency text,
  refund_id text,
  sent_at timestamptz not null,
  body bytea not null,
  received_at timestamptz not null default now(),
  applied_at timestamptz,
  outcome text,
  primary key (provider, event_id)
);
create index webhook_events_unapplied on webhook_events (payment_id) where applied_at is null;
create index webhook_events_payment on webhook_events (payment_id);

-- Coins are rows, never a counter. Balance = granted + returned - captured - reservations that are still open.
create table coin_entries (
  id uuid primary key,
  student_id uuid not null references students,
  payment_id uuid references payments,
  kind text not null check (kind in ('granted', 'reserved', 'released', 'captured', 'shortfall', 'returned')),
  coins int not null check (coins > 0),
  expires_at timestamptz,
  note text,
  created_at timestamptz not null default now(),
  check ((kind = 'reserved') = (expires_at is not null)),
  check (kind = 'granted' or payment_id is not null)
);
create index coin_entries_student on coin_entries (student_id);
create unique index coin_entries_once on coin_entries (payment_id, kind) where kind <> 'granted';

-- ------------------------------------------------------------------ undelivered money (deliveries)

-- One row per captured payment that is not delivered yet, or that owes sessions; gone when it is delivered or refunded.
-- reason: why it waits (business reasons only). held: an operator said stop.
create table undelivered (
  payment_id uuid primary key references payments,
  student_id uuid not null,
  course_id uuid,
  amount_cents bigint not null,
  currency char(3) not null,
  since timestamptz not null,
  reason text check (reason in ('AMOUNT_MISMATCH', 'PAID_TWICE', 'STUDENT_NOT_FOUND', 'COURSE_NOT_FOUND', 'TIER_UNKNOWN',
    'INVALID_SCHEDULE', 'STUDENT_LOCATION_MISSING', 'STUDENT_CONFLICT', 'NO_TRAINER_AVAILABLE', 'TRAINER_CONFLICT',
    'TRAINER_LEFT', 'OPERATOR_HOLD')),
  reason_since timestamptz,
  detail jsonb,
  held boolean not null default false,
  check ((reason is null) = (reason_since is null)),
  check (not held or reason = 'OPERATOR_HOLD')
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);
create index undelivered_since on undelivered (since);
create index undelivered_reason on undelivered (reason, course_id) where reason is not null;
create index undelivered_student on undelivered (student_id);

-- ------------------------------------------------------------------ purchases

create table student_course_purchases (
  id uuid primary key,
  checkout_id uuid not null unique references checkouts,
  payment_id uuid not null unique references payments,
  student_id uuid not null,
  course_id uuid not null,
  purchase_tier smallint not null check (purchase_tier between 1 and 400),
  refunded_sessions smallint not null default 0 check (refunded_sessions between 0 and purchase_tier),
  is_active boolean not null default true,
  -- The terms as they are now: frozen at checkout, except where a new slot or start was chosen later.
  session_minutes smallint not null,
  weekdays smallint[] not null,
  learning_mode text not null,
  group_size smallint not null,
  timezone text not null,
  slot_start time not null,
  start_date date not null,
  metadata jsonb not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create index student_course_purchases_student on student_course_purchases (student_id, course_id);

-- ------------------------------------------------------------------ bookings: whose time is taken

-- starts is the list of slots; during is the same time as one value, for the exclusion (a multirange merges neighbours).
create table bookings (
  id uuid primary key,
  kind text not null check (kind in ('package', 'single', 'hold')),
  purchase_id uuid references student_course_purchases,
  trainer_id uuid not null references trainers,
  student_id uuid not null,
  starts timestamptz[] not null,
  minutes smallint not null check (minutes > 0),
  during tstzmultirange not null,
  live boolean not null default true,
  expires_at timestamptz,
  created_at timestamptz not null default now(),
  check ((kind = 'hold') = (expires_at is not null)),
  check (kind = 'hold' or purchase_id is not null),
  check (not live or (cardinality(starts) > 0 and not isempty(during))),
  constraint bookings_trainer_free exclude using gist (trainer_id with =, during with &&) where (live),
  constraint bookings_student_free exclude using gist (student_id with =, during with &&) where (live)
);
create index bookings_purchase on bookings (purchase_id);

-- ------------------------------------------------------------------ allocations

create table trainer_allocations (
  id uuid primary key,
  purchase_id uuid not null references student_course_purchases,
  student_id uuid not null,
  course_id uuid not null,
  trainer_id uuid,
  booking_id uuid references bookings,
  status text not null check (status in ('waiting', 'approved', 'cancelled', 'completed')),
  metadata jsonb not null,
  decision jsonb,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  check (status <> 'approved' or (trainer_id is not null and booking_id is not null))
);
-- One live allocation per purchase, whoever writes.
create unique index trainer_allocations_live on trainer_allocations (purchase_id) where status <> 'cancelled';
create index trainer_allocations_purchase on trainer_allocations (purchase_id);
create index trainer_allocations_student on trainer_allocations (student_id, course_id);
create index trainer_allocations_trainer on trainer_allocations (trainer_id) where status = 'approved';
create index trainer_allocations_waiting on trainer_allocations (created_at) where status = 'waiting';

-- ------------------------------------------------------------------ sessions

create table tutoring_sessions (
  purchase_id uuid not null,
  seq smallint not null check (seq > 0),
  id uuid not null default new_id(),
  allocation_id uuid not null,
  booking_id uuid not null,
  student_id uuid not null,
  course_id uuid not null,
  trainer_id uuid not null,
  starts_at timestamptz not null,
  ends_at timestamptz not null,
  status text not null check (status in ('scheduled', 'completed', 'cancelled', 'student_absent', 'trainer_absent')),
  primary key (purchase_id, seq),
  check (starts_at < ends_at)
);
create unique index tutoring_sessions_id on tutoring_sessions (id);

-- ------------------------------------------------------------------ events (eventlog)

-- The counter that orders one student's events: locked by whoever says something about the student.
create table student_feed_heads (
  student_id uuid primary key,
  seq bigint not null
) with (fillfactor = 70);

-- What the student's screens hear, numbered 1..n without a gap.
create table student_feed (
  student_id uuid not null,
  seq bigint not null,
  event_id uuid not null,
  type text not null,
  data jsonb not null,
  created_at timestamptz not null,
  primary key (student_id, seq)
);
create index student_feed_created on student_feed using brin (created_at);

-- The event log. Read by windows between snapshots: ids commit out of order, xid says what a snapshot could see.
create table outbox (
  id bigint generated always as identity,
  xid xid8 not null default pg_current_xact_id(),
  event_id uuid not null,
  type text not null,
  topic text not null,
  source text not null,
  subject text not null,
  partition_key text not null,
  partition smallint not null,
  correlation_id text,
  causation_id uuid,
  traceparent text,
  data_version smallint not null,
  data jsonb not null,
  occurred_at timestamptz not null,
  primary key (id)
) partition by range (id);
create index outbox_xid on outbox (xid);
create index outbox_correlation on outbox (correlation_id) where correlation_id is not null;
-- A million ids each, made ahead by eventlog.retention and dropped whole; the default one is only a net.
create table outbox_0 partition of outbox for values from (0) to (1000000);
create table outbox_1 partition of outbox for values from (1000000) to (2000000);
create table outbox_rest partition of outbox default;

-- Who hears what, as the running release registered it; so that lag can be told also when a worker never ran.
create table consumer_groups (
  name text primary key,
  service text not null,
  types text[] not null
);

-- Where a group of consumers is. One row holds some of the group's partitions; a member owns the row while its worker lives.
-- window_end is null when the window is finished: the next one starts at window_start.
create table log_cursors (
  id uuid primary key,
  consumer_group text not null,
  partitions smallint[] not null,
  window_start pg_snapshot not null,
  window_end pg_snapshot,
  last_id bigint not null default 0,
  highest_id bigint not null default 0,
  owner text,
  owner_incarnation uuid,
  updated_at timestamptz not null default now(),
  check (cardinality(partitions) > 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
create index log_cursors_group on log_cursors (consumer_group);

create table processed_events (
  consumer_group text not null,
  event_id uuid not null,
  event_type text not null,
  correlation_id text,
  source text not null,
  processed_at timestamptz not null default now(),
  primary key (consumer_group, event_id)
);
create index processed_events_correlation on processed_events (correlation_id);

create table dead_letters (
  id uuid primary key,
  consumer_group text not null,
  event_id uuid not null,
  event_type text not null,
  correlation_id text,
  envelope jsonb not null,
  code text not null,
  error text not null,
  attempts int not null,
  status text not null default 'parked' check (status in ('parked', 'replayed', 'discarded')),
  created_at timestamptz not null default now(),
  resolved_at timestamptz,
  resolved_by text,
  note text,
  check ((status = 'parked') = (resolved_at is null))
);
create unique index dead_letters_parked on dead_letters (consumer_group, event_id) where status = 'parked';
create index dead_letters_correlation on dead_letters (correlation_id);

-- Who is alive, by the database's clock. A worker's lease is this row; it owns log_cursors by name and incarnation.
create table workers (
  name text primary key,
  incarnation uuid not null,
  service text not null,
  consumer_group text,
  host text not null,
  pid int not null,
  build text not null,
  started_at timestamptz not null,
  heartbeat_at timestamptz not null,
  expires_at timestamptz not null,
  progress_at timestamptz not null,
  events_done bigint not null default 0,
  failing_event_id uuid,
  failing_since timestamptz,
  last_error text
) with (fillfactor = 50);
create index workers_group on workers (consumer_group);

-- What must outlive a dump and a restore: which cluster the log's transaction ids belong to.
create table installation (
  only_row boolean primary key default true check (only_row),
  system_identifier bigint not null,
  created_at timestamptz not null default now()
);
insert into installation (system_identifier) select system_identifier from pg_control_system();

-- ------------------------------------------------------------------ the one definition of stage, total, owed

-- For every captured payment: where it is and how its sessions add up:
-- tier = completed + student_absent + scheduled + refunded + owed.
-- What is refunded is read from the refunds, so that it is true from the moment when PURCHASE_REFUNDED is said.
create view fulfilments as
select p.id as payment_id, p.student_id, coalesce(pu.course_id, c.course_id) as course_id, p.checkout_id, pu.id as purchase_id,
       a.id as allocation_id, a.trainer_id, p.captured_at, p.captured_cents, p.refunded_cents, p.currency,
       case
         when p.status = 'refunded' then 'refunded'
         when pu.id is null then 'paid'
         when not pu.is_active then 'refunded'
         when s.numbered > 0 and s.scheduled = 0
              and pu.purchase_tier - r.refunded - s.completed - s.student_absent <= 0 then 'completed'
         when s.numbered > 0 then 'scheduled'
         when a.status in ('approved', 'completed') then 'allocated'
         else 'purchased'
       end as stage,
       coalesce(pu.purchase_tier, c.sessions)::int as total,
       s.scheduled, s.completed, s.student_absent, s.cancelled, coalesce(r.refunded, 0) as refunded,
       case
         when p.status = 'refunded' or pu.is_active is false then 0
         when pu.id is null then coalesce(c.sessions, 0)
         else greatest(0, pu.purchase_tier - r.refunded - s.completed - s.student_absent - s.scheduled)
       end::int as owed
from payments p
join checkouts c on c.id = p.checkout_id
left join student_course_purchases pu on pu.payment_id = p.id
left join trainer_allocations a on a.purchase_id = pu.id and a.status <> 'cancelled'
left join lateral (
  select count(*)::int as numbered,
         (count(*) filter (where t.status = 'scheduled'))::int as scheduled,
         (count(*) filter (where t.status = 'completed'))::int as completed,
         (count(*) filter (where t.status = 'student_absent'))::int as student_absent,
         (count(*) filter (where t.status in ('cancelled', 'trainer_absent')))::int as cancelled
  from tutoring_sessions t where t.purchase_id = pu.id
) s on true
left join lateral (
  select least(pu.purchase_tier, greatest(pu.refunded_sessions, coalesce(sum(f.sessions), 0)))::int as refunded
  from refunds f where f.payment_id = pu.payment_id
) r on true
where p.captured_at is not null;
