"""Students and trainers: who they are, where they are, when they work.

Owns: students, account_students, trainers, trainer_courses, trainer_availability, trainer_absences, trainer_time.
Says: STUDENT_UPDATED, TRAINER_UPDATED, with the names of what changed, never the values. Coordinates stay here.
"""
