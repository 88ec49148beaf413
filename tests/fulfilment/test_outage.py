"""A worker was away for longer than a package lasts: what went by unnumbered is booked anew, once the family agrees."""

from __future__ import annotations

from datetime import timedelta

from caravan.admin import worst_day
from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Database
from caravan.fulfilment.repair import repair
from caravan.web.auth import Actor
from tests.shop import open_shop

# All booked time went by before anybody numbered a session.
A_MONTH_LATER = """
update bookings b set
  starts = array(select s - interval '60 days' from unnest(b.starts) s order by s),
  during = (select range_agg(tstzrange(s - interval '60 days', s - interval '60 days' + interval '1 hour'))
            from unnest(b.starts) s)
"""


async def test_a_package_that_went_by_without_a_session_worker_is_asked_for_and_booked_anew(db: Database) -> None:
    shop = await open_shop(db)
    payment = await shop.bought(sessions=10)
    await shop.work("purchase-worker", "allocation-worker")
    await shop.run(A_MONTH_LATER)
    await shop.work()
    assert (await shop.sees(payment))["owed"] == 10

    async with db.transaction("admin-service") as tx:
        await repair(tx, payment, by="ops@example.com", note="by hand", subscriptions=BY_GROUP)
    await shop.work()
    finding = await shop.why(payment)
    assert (finding.stage, finding.reason) == ("allocated", "START_PASSED")  # a repair agrees to nothing
    async with db.transaction("admin-service") as tx:
        notice = timedelta(hours=12)
        await worst_day.confirm_start(tx, Actor.system("ops@example.com"), payment, "agreed", notice=notice)
    await shop.work()

    seen = await shop.sees(payment)
    assert (seen["stage"], seen["scheduled"], seen["owed"]) == ("scheduled", 10, 0)
    assert await shop.violations() == []
