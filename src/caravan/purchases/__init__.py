"""What was bought. A captured payment becomes a purchase once its terms are known and make sense.

Owns: student_course_purchases, and the terms of a checkout that were not known when it was imported.
Hears: PURCHASE_CONFIRMED, PURCHASE_REFUNDED, STUDENT_UPDATED, COURSE_UPDATED.
Says: PURCHASE_CREATED, COURSE_ACCESS_GRANTED; and why a payment waits, through `deliveries`.
"""
