-- Less work per fulfilment. Figures: docs/decisions/0009.

-- Nobody looks a session up by its id alone, and ids now follow from the primary key (purchase and number): a quarter of
-- what inserting sessions cost. The lock lasts as long as an entry in the catalogue takes.
-- squawk-ignore require-concurrent-index-deletion
drop index tutoring_sessions_id;
