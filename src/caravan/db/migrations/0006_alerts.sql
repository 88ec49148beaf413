-- What somebody should know of the platform itself, each time it happens: its begin, its end, and who was told.

create table alerts (
  id uuid primary key,
  name text not null,
  subject text not null, -- what it is about: a service, a group, a gap, a reason
  severity text not null check (severity in ('warning', 'critical')),
  said text not null,
  facts jsonb not null,
  holds_seconds double precision not null, -- how long it must have been so before anybody is told
  began_at timestamptz not null,
  seen_at timestamptz not null,
  raised_at timestamptz, -- it has been so for long enough; null: not yet
  ended_at timestamptz,
  check (raised_at is not null or ended_at is null)
);
create unique index alerts_open on alerts (name, subject) where ended_at is null;
create index alerts_began on alerts (began_at);

-- Messages about alerts to the operator's webhook, each kept until it is delivered, or too old to matter.
create table alert_notices (
  id uuid primary key,
  alert_id uuid not null references alerts on delete cascade,
  body jsonb not null,
  created_at timestamptz not null,
  due_at timestamptz not null,
  attempts int not null default 0,
  sent_at timestamptz,
  last_error text
);
create index alert_notices_alert on alert_notices (alert_id);
create index alert_notices_due on alert_notices (due_at) where sent_at is null;
