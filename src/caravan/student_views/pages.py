"""Pages of families and trainers: rendered here, kept fresh by static/live.js, which refetches the page it is on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import time, timedelta
from itertools import groupby
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response

from caravan.calendar import format_slot, local_date
from caravan.db import Tx
from caravan.deliveries import Stage
from caravan.errors import NotFound
from caravan.ids import new_id
from caravan.student_views import page_queries, queries, wording
from caravan.student_views.page_queries import Student
from caravan.student_views.routes import SOURCE
from caravan.web import audit
from caravan.web.auth import Actor
from caravan.web.deps import Db, SettingsDep
from caravan.web.pages import environment, page_actor, render

STUDENT_COOKIE: Final = "caravan_student"  # which child the family looked at last
SLOTS: Final = tuple(time(half // 2, half % 2 * 30) for half in range(10, 47))  # 5:00 AM to 11:00 PM
COMMON_SLOT: Final = time(6)
SCHEDULE_LENGTH: Final = 60
MODES: Final = {"online": "Online", "home": "At home", "center": "At a centre"}

router = APIRouter(include_in_schema=False)
Parent = Annotated[Actor, page_actor("pages:student")]
Trainer = Annotated[Actor, page_actor("pages:trainer")]
Chosen = Annotated[UUID | None, Query(alias="student")]

environment.filters["slot"] = format_slot


@dataclass(frozen=True, slots=True)
class Family:
    """The students of whoever looks; `chosen` is the one whose page this is (None: the account has none)."""

    students: list[Student]
    chosen: Student | None

    @property
    def heads(self) -> dict[str, int]:
        return {str(student.id): student.version for student in self.students}


async def get_family(tx: Tx, request: Request, actor: Actor, wanted: UUID | None) -> Family:
    """Raises NotFound for a student that is asked for and isn't theirs."""
    students = await page_queries.list_students(tx, actor.student_ids)
    if wanted is not None:
        actor.require_student(wanted)
    remembered = request.cookies.get(STUDENT_COOKIE)
    for student in students:
        if student.id == wanted or (wanted is None and str(student.id) == remembered):
            return Family(students, student)
    return Family(students, students[0] if students else None)


def show(request: Request, actor: Actor, family: Family, template: str, **context: Any) -> Response:
    page = render(request, actor, template, family=family, student=family.chosen, words=wording, modes=MODES, **context)
    if family.chosen and "student" in request.query_params and "hx-request" not in request.headers:
        page.set_cookie(STUDENT_COOKIE, str(family.chosen.id), httponly=True, samesite="lax", path="/")
    return page


@router.get("/home")
async def home_page(request: Request, actor: Parent, db: Db, wanted: Chosen = None) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        family = await get_family(tx, request, actor, wanted)
        items = (await queries.get_view(tx, family.chosen.id, queries.HOME)).items if family.chosen else []
        unpaid = await page_queries.list_unpaid(tx, family.chosen.id) if family.chosen else []
    # What waits comes first, then what comes next.
    items.sort(key=lambda item: (wording.tone(item) == "done", item["next_starts_at"] or item["paid_at"]))
    return show(request, actor, family, "student/home.html", items=items, unpaid=unpaid, now=tx.now)


@router.get("/learning")
async def learning_page(request: Request, actor: Parent, db: Db, wanted: Chosen = None) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        family = await get_family(tx, request, actor, wanted)
        items = (await queries.get_view(tx, family.chosen.id, queries.LEARNING)).items if family.chosen else []
    return show(request, actor, family, "student/learning.html", items=items, now=tx.now)


@router.get("/courses")
async def catalogue_page(request: Request, actor: Parent, db: Db, wanted: Chosen = None) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        family = await get_family(tx, request, actor, wanted)
        courses = await page_queries.list_courses(tx)
    categories = [(name, list(group)) for name, group in groupby(courses, key=lambda course: course["category"])]
    return show(request, actor, family, "student/catalogue.html", categories=categories)


@router.get("/courses/{course_id}")
async def course_page(
    request: Request, course_id: UUID, actor: Parent, db: Db, settings: SettingsDep, wanted: Chosen = None
) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        family = await get_family(tx, request, actor, wanted)
        course = await page_queries.get_course(tx, course_id)
    zone = family.chosen.timezone if family.chosen else "UTC"
    today = local_date(tx.now, zone)
    # The day after the notice period has a free choice of slots.
    first = local_date(tx.now + timedelta(hours=settings.notice_hours), zone)
    return show(
        request,
        actor,
        family,
        "student/course.html",
        course=course,
        slots=SLOTS,
        common_slot=COMMON_SLOT,
        first=first,
        preset=first + timedelta(days=1),
        last=today + timedelta(days=settings.start_horizon_days),
        idempotency_key=new_id(),
    )


@router.get("/checkout/{payment_id}")
async def checkout_page(request: Request, payment_id: UUID, actor: Parent, db: Db) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        checkout = await page_queries.get_checkout(tx, payment_id)
        if checkout["student_id"] not in actor.student_ids:
            raise NotFound("There is no such payment.")
        family = await get_family(tx, request, actor, checkout["student_id"])
        items = (await queries.get_view(tx, checkout["student_id"], tuple(Stage), payment_id=payment_id)).items
    return show(
        request,
        actor,
        family,
        "student/checkout.html",
        checkout=checkout,
        item=items[0] if items else None,
        now=tx.now,
        idempotency_key=new_id(),
    )


@router.get("/purchases/{purchase_id}")
async def purchase_page(request: Request, purchase_id: UUID, actor: Parent, db: Db) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        purchase = await page_queries.get_purchase(tx, purchase_id)
        if purchase["student_id"] not in actor.student_ids:
            raise NotFound("There is no such course of yours.")
        family = await get_family(tx, request, actor, purchase["student_id"])
        view = await queries.get_view(tx, purchase["student_id"], tuple(Stage), payment_id=purchase["payment_id"])
        sessions = await page_queries.list_purchase_sessions(tx, purchase_id)
    return show(request, actor, family, "student/purchase.html", item=view.items[0], sessions=sessions, now=tx.now)


@router.get("/schedule")
async def schedule_page(request: Request, actor: Trainer, db: Db) -> Response:
    trainer_id = _trainer_of(actor)
    async with db.transaction(SOURCE, read_only=True) as tx:
        trainer, sessions = await page_queries.get_schedule(tx, trainer_id, SCHEDULE_LENGTH)
        today = local_date(tx.now, trainer["timezone"])
    days = [(day, list(group)) for day, group in groupby(sessions, key=lambda session: session["day"])]
    return render(request, actor, "student/schedule.html", trainer=trainer, days=days, today=today, modes=MODES)


@router.get("/schedule/{purchase_id}/{seq}/place")
async def place_page(
    request: Request, purchase_id: UUID, seq: Annotated[int, Path(ge=1, le=400)], actor: Trainer, db: Db
) -> Response:
    """The way to a session at a student's home. A page of its own: whoever opens it leaves an audit row."""
    trainer_id = _trainer_of(actor)
    async with db.transaction(SOURCE) as tx:
        place = await page_queries.get_place(tx, trainer_id, purchase_id, seq)
        await audit.record(
            tx,
            actor,
            action="students:place",
            subject_type="purchase",
            subject_id=purchase_id,
            note=f"on the way to session {seq}",
        )
    return render(request, actor, "student/place.html", place=place)


def _trainer_of(actor: Actor) -> UUID:
    if actor.trainer_id is None:
        raise NotFound("This account is not a trainer's yet: ask an administrator to link it.")
    return actor.trainer_id
