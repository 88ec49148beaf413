"""The doctor's look at what stands outside the database: Kafka and Redis, as this process would reach them."""

from __future__ import annotations

from uuid import uuid4

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db.redis import Redis, RedisAway, RedisError, connect
from caravan.settings import BadSettings, Settings

ASK_SECONDS = 3.0


def look_at_kafka(settings: Settings) -> tuple[bool, str] | None:
    """Whether the broker answers, and what it has of ours; None without Kafka. Blocks for seconds at most."""
    if settings.kafka_broker is None:
        return None
    from caravan.eventlog.kafka_client import Kafka, KafkaUnavailable

    try:
        seen = Kafka(settings).look([each.group for each in SUBSCRIPTIONS], ASK_SECONDS)
    except KafkaUnavailable as error:
        away = "checkouts go on; what waits is drained when it is back" if error.away else "look at the broker's log"
        return False, f"{str(error).removeprefix('Kafka: ')} ({settings.kafka_broker}): {away}"
    except BadSettings as error:
        return False, str(error)
    if seen.topics_missing:
        return False, f"no topic {', '.join(seen.topics_missing)}: start the workers, they make what is missing"
    found = f"topics: {', '.join(seen.topics)}; groups: {', '.join(seen.groups) or 'none'}"
    never = f"; never joined: {', '.join(seen.groups_missing)}" if seen.groups_missing else ""
    return True, f"{settings.kafka_broker} answers; {found}{never}"


async def look_at_redis(settings: Settings) -> tuple[bool, str] | None:
    """Whether Redis answers and takes writes; None without one."""
    if settings.redis_url is None:
        return None
    try:
        await _write_something(settings.redis_url)
    except RedisError as error:
        trouble = "is away" if isinstance(error, RedisAway) else "refuses writes"
        return False, f"REDIS_URL: it {trouble} ({error}): answers stay right, and are slower"
    return True, "answers, and takes writes"


async def _write_something(url: str) -> None:
    """Raises RedisAway, RedisRefused."""
    connection = await connect(url)  # tells why, where it can't
    await connection.disconnect()
    async with Redis(url) as redis:
        await redis.wait_until_up(ASK_SECONDS)
        await redis.call("SET", f"caravan:doctor:{uuid4()}", "1", "PX", 1000)
