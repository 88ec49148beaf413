-- With Kafka as the event log: what carries events to the workers now, and dead letters on their way to a topic.

-- kafka: from its topics; postgres-log: from the outbox, what processed_events doesn't have (`caravan failover`).
-- Without KAFKA_BROKER it says nothing: the outbox is the log.
alter table installation add column carrier text not null default 'kafka'
  constraint installation_carrier check (carrier in ('kafka', 'postgres-log'));
alter table installation add column carrier_since timestamptz;

-- When the relay has written it to the topic dead-letter-queue.
alter table dead_letters add column mirrored_at timestamptz;
-- squawk-ignore require-concurrent-index-creation -- a table of few rows
create index dead_letters_unmirrored on dead_letters (id) where mirrored_at is null;
