"""What is sold: courses, tiers with their prices, and the holidays that lessons skip.

Owns: courses, course_tiers, holidays. Says: COURSE_UPDATED. Courses retire, nothing is deleted; a price counts until
the checkout, which freezes it.
"""

from caravan.catalog.courses import Course, Tier, find_course, list_courses, list_holidays, price_of

__all__ = ["Course", "Tier", "find_course", "list_courses", "list_holidays", "price_of"]
