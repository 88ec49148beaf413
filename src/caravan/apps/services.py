"""THE table of deployables: what each service is made of. Imports nothing of it, so that the supervisor stays small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Service:
    """`routers`: modules whose `router` it answers with; `worker`: it runs the subscriptions that carry its name."""

    name: str
    routers: tuple[str, ...] = ()
    worker: bool = False


RELAY = "outbox-relay"  # only with Kafka

SERVICES: dict[str, Service] = {
    service.name: service
    for service in (
        Service(
            "payment-service",
            routers=(
                "caravan.web.routes",
                "caravan.catalog.routes",
                "caravan.carts.routes",
                "caravan.payments.routes",
            ),
        ),
        Service(
            "student-service",
            routers=("caravan.people.routes", "caravan.student_views.routes", "caravan.student_views.pages"),
        ),
        Service(
            "admin-service",
            routers=(
                "caravan.admin.routes",
                "caravan.people.admin_routes",
                "caravan.admin.worst_day_routes",
                "caravan.admin.pages",
                "caravan.admin.worst_day_pages",
            ),
        ),
        Service("websocket-server", routers=("caravan.realtime.routes",)),
        Service("purchase-worker", worker=True),
        Service("allocation-worker", worker=True),
        Service("session-worker", worker=True),
        Service("cache-worker", worker=True),
        Service("reconciler"),
        Service(RELAY),
    )
}
WEB: tuple[str, ...] = tuple(name for name, service in SERVICES.items() if service.routers)
WORKERS: tuple[str, ...] = tuple(name for name, service in SERVICES.items() if service.worker)
BACKGROUND: tuple[str, ...] = (*WORKERS, "reconciler")


def background(*, kafka: bool) -> tuple[str, ...]:
    """What runs without being asked by anybody; with Kafka the relay too."""
    return (*BACKGROUND, RELAY) if kafka else BACKGROUND
