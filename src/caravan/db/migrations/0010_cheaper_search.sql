-- Finding a trainer reads less: see docs/decisions/0007. (The table is small.)

-- The next few of a course in shuffled order, from the index alone: without `include` the planner rather read and sorted
-- all of the course's trainers, for each need of a batch.
-- squawk-ignore require-concurrent-index-creation
create index trainer_courses_in_turn on trainer_courses (course_id, uuid_hash(trainer_id)) include (trainer_id);
-- squawk-ignore require-concurrent-index-deletion
drop index trainer_courses_shuffled;
