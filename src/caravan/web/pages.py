"""Pages: one Jinja2 environment that escapes everything, and errors that a person can read.

Templates live in web/templates (a folder per owner), files in web/static. In a route:

    actor: Annotated[Actor, page_actor("pages:home")]
    return render(request, actor, "student/home.html", items=items)

`page_actor` is `allow`; whoever isn't signed in is led to /login and back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import psycopg
import psycopg_pool
from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from caravan.web import formats, problems
from caravan.web.assets import asset_url
from caravan.web.auth import Actor, Role
from caravan.web.credentials import find_connection_actor
from caravan.web.deps import get_db
from caravan.web.policies import NotSignedIn, allow

page_actor = allow

# Where each role begins, and what its menu holds: (address, text).
HOME: Final[dict[Role, str]] = {
    Role.STUDENT: "/home",
    Role.TRAINER: "/schedule",
    Role.SUPPORT: "/admin",
    Role.ADMIN: "/admin",
}
CONSOLE: Final = (
    ("/admin", "Overview"),
    ("/admin/waiting", "Waiting"),
    ("/admin/purchases", "Purchases"),
    ("/admin/dead-letters", "Dead letters"),
    ("/admin/workers", "Workers"),
    ("/admin/alerts", "Alerts"),
    ("/admin/pauses", "Pauses"),
)
MENU: Final[dict[Role, tuple[tuple[str, str], ...]]] = {
    Role.STUDENT: (("/home", "Home"), ("/courses", "Catalogue"), ("/learning", "Learning")),
    Role.TRAINER: (("/schedule", "My sessions"),),
    Role.SUPPORT: CONSOLE,
    Role.ADMIN: CONSOLE,
}

environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters.update(money=formats.money, when=formats.when, day=formats.day, duration=formats.duration)
FUNCTIONS: Final[dict[str, Any]] = {"asset": asset_url, "counted": formats.counted}  # Jinja's types know only its own
environment.globals.update(FUNCTIONS)


def render(
    request: Request, actor: Actor | None, template: str, *, status_code: int = 200, **context: Any
) -> HTMLResponse:
    """A page (or a fragment, where the template extends nothing). Templates have `actor`, `menu`, `path` too."""
    text = environment.get_template(template).render(
        actor=actor, menu=MENU.get(actor.role, ()) if actor else (), path=request.url.path, **context
    )
    return HTMLResponse(text, status_code=status_code)


def safe_next(address: str | None) -> str | None:
    """Where to go after signing in: a path of this site, or None. Backslashes and `//` would lead elsewhere."""
    if not address or not address.startswith("/") or address.startswith("//") or not address.isprintable():
        return None
    return None if "\\" in address else address


async def answer_error(request: Request, error: Exception) -> Response:
    """A refusal as its asker reads it: a problem document for programs, a page for people, a notice for htmx."""
    if request.url.path.startswith("/api/"):
        return problems.from_error(request, error)
    by_htmx = "hx-request" in request.headers
    if isinstance(error, NotSignedIn) and (by_htmx or _wants_page(request)):
        return _lead_to_login(request, by_htmx=by_htmx)
    problem = problems.from_error(request, error)
    detail = str(json.loads(bytes(problem.body))["detail"])
    if by_htmx:
        # Nothing is swapped; app.js shows the notice.
        problem.headers["hx-reswap"] = "none"
        problem.headers["hx-trigger"] = json.dumps({"caravan:problem": {"detail": detail}})
        return problem
    if not _wants_page(request):
        return problem
    reader = await _find_reader(request, problem.status_code)
    page = render(request, reader, "error.html", status_code=problem.status_code, detail=detail)
    if "retry-after" in problem.headers:
        page.headers["retry-after"] = problem.headers["retry-after"]
    return page


async def _find_reader(request: Request, status: int) -> Actor | None:
    """Whose menu an error page has. Not asked of a service that is in trouble itself."""
    if status >= 500:
        return None
    try:
        return await find_connection_actor(request, get_db(request))
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout):  # the page comes without a menu
        return None


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _lead_to_login(request: Request, *, by_htmx: bool) -> Response:
    if by_htmx:
        try:
            current = urlsplit(request.headers.get("hx-current-url", ""))
        except ValueError:  # `http://[`
            current = urlsplit("")
        return Response(status_code=401, headers={"hx-redirect": _login_address(current.path, current.query)})
    wanted = request.url if request.method == "GET" else urlsplit("")
    return RedirectResponse(_login_address(wanted.path, wanted.query), status_code=303)


def _login_address(path: str, query: str) -> str:
    wanted = f"{path}?{query}" if query else path
    return f"/login?next={quote(wanted, safe='/')}" if wanted else "/login"
