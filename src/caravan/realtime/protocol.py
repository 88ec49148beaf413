"""The frames of `/ws`, pure: what a client may say, and what we say apart from the events themselves.

From us:
  {"type": "business-event", "studentId", "seq": n, "event": {"type", "id", "time", "paymentId", "purchaseId", ...}}
      per student, n goes up by one; COURSE_PURCHASED is an older name of PURCHASE_CREATED that clients still hear
  {"type": "resync", "studentId", "seq": n}      what lay between is trimmed (or never was): refetch, then go on after n
  {"type": "hello", "students": {studentId: n}}  no resume came: the stream begins after these
  {"type": "error", "code", "detail"}            your frame was refused and changed nothing
From a client, at best as the first frame:
  {"type": "resume", "after": n}                 where the account has one student
  {"type": "resume", "after": n, "studentId"}, or {"type": "resume", "after": {studentId: n, ...}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated
from uuid import UUID

import msgspec

from caravan.errors import DomainError

# A resume for a family of ten fits in 600 bytes.
FRAME_BYTES_MAX = 4096

CLOSE_POLICY = 1008  # too many bad frames
CLOSE_TRY_AGAIN_LATER = 1013  # reads too slowly: come back and resume
CLOSE_UNAUTHORIZED = 4401  # signed out, expired or disabled while connected

Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class FrameRefused(DomainError):
    """The frame is not one that we know; it changed nothing."""

    code = "FRAME_MALFORMED"


class FrameTooLarge(FrameRefused):
    """The frame is larger than any we know."""

    code = "FRAME_TOO_LARGE"


class StudentRequired(FrameRefused):
    """The account has several students: say whose `after` this is (studentId, or an object of them)."""

    code = "STUDENT_REQUIRED"


class StudentNotYours(FrameRefused):
    """There is no such student, or it is not yours."""

    code = "NOT_FOUND"


class _Resume(msgspec.Struct, tag_field="type", tag="resume", rename="camel"):
    after: Seq | dict[UUID, Seq]
    student_id: UUID | None = None


_decoder = msgspec.json.Decoder(_Resume)


def parse_resume(text: str | None, students: Collection[UUID]) -> dict[UUID, int]:
    """The last seq that the client has, per student, from its frame (None: a binary one).

    Only `students` may be named. Raises FrameRefused, or a subclass that says more.
    """
    if text is None:
        raise FrameRefused("Frames are text, not binary.")
    if len(text) > FRAME_BYTES_MAX:
        raise FrameTooLarge
    try:
        resume = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise FrameRefused(str(error)) from None
    if isinstance(resume.after, dict):
        asked = resume.after
    elif resume.student_id:
        asked = {resume.student_id: resume.after}
    elif len(students) == 1:
        asked = dict.fromkeys(students, resume.after)
    else:
        raise StudentRequired
    if not asked.keys() <= set(students):
        raise StudentNotYours
    return asked


def hello(heads: Mapping[UUID, int]) -> str:
    students = {str(student): seq for student, seq in heads.items()}
    return msgspec.json.encode({"type": "hello", "students": students}).decode()


def resync(student: UUID, seq: int) -> str:
    return msgspec.json.encode({"type": "resync", "studentId": student, "seq": seq}).decode()


def refusal(error: FrameRefused) -> str:
    return msgspec.json.encode({"type": "error", "code": error.problem_code, "detail": error.detail}).decode()
