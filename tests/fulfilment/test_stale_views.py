"""VIEW_STALE: what a screen shows and PostgreSQL does not say, because somebody wrote around the code."""

from __future__ import annotations

from functools import partial

from caravan.admin.routes import router
from caravan.db import Database
from caravan.db.redis import Redis
from caravan.student_views.cache import Shown, ViewCache
from caravan.student_views.queries import list_ends
from caravan.student_views.routes import make_view
from caravan.web.auth import Role
from tests.clients import an_account, bearer, client_of, make_app
from tests.redis_server import RedisServer
from tests.shop import open_shop


async def test_a_view_that_rows_were_changed_behind_is_named_and_forgotten(
    db: Database, redis_server: RedisServer
) -> None:
    shop = await open_shop(db)
    payment, other = await shop.bought(), await shop.bought(slot="9:00 AM")
    await shop.work()
    async with Redis(redis_server.url) as redis:
        assert await redis.wait_until_up(10)
        cache = ViewCache(redis)
        app = make_app(db, router)
        app.state.views = cache
        operator = await bearer(db, await an_account(db, "ops@example.com", Role.ADMIN))
        async with client_of(app, headers=operator) as client:

            async def reasons() -> dict[str, str | None]:
                said = (await client.get(f"/api/v1/admin/diagnose?studentId={shop.student}")).json()
                return {item["paymentId"]: item["reason"] for item in said["items"]}

            async def look() -> None:
                make = partial(make_view, student_id=shop.student, shown=Shown.LEARNING)
                await cache.read(db, shop.student, Shown.LEARNING, make)

            await look()
            assert await reasons() == {str(payment): None, str(other): None}
            await shop.run(
                "update tutoring_sessions set status = 'completed' where seq = 1 and purchase_id ="
                " (select id from student_course_purchases where payment_id = %(id)s)",
                id=payment,
            )
            assert await reasons() == {str(payment): "VIEW_STALE", str(other): None}
            async with db.transaction(read_only=True) as tx:
                head = (await list_ends(tx, [shop.student]))[shop.student]
            assert await cache.clear(shop.student, head.version) == 1
            assert await reasons() == {str(payment): None, str(other): None}
            await look()
            redis_server.kill()
            assert await reasons() == {str(payment): None, str(other): None}
