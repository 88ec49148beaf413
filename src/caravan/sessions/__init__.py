"""Which sessions there are, and how each went. Sessions are what the live bookings say, numbered per purchase.

Owns: tutoring_sessions. Hears: TRAINER_ALLOCATED, BOOKING_RELEASED, PURCHASE_REFUNDED.
Says: SESSIONS_SCHEDULED, SESSION_CHANGED. Ends a payment's time in the register of undelivered money, or begins it
again when sessions come to be owed.
"""
