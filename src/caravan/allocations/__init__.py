"""Which trainer. Finds one for all sessions that a purchase is owed, books their time, and undoes it on refunds.

Owns: trainer_allocations. Books through `bookings`. Hears: PURCHASE_CREATED, PURCHASE_REFUNDED, SESSION_CHANGED and
whatever can end a wait (STUDENT_UPDATED, TRAINER_UPDATED, COURSE_UPDATED, BOOKING_RELEASED).
Says: TRAINER_ALLOCATED; and why a purchase waits, through `deliveries`.
"""
