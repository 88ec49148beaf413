"""Files that never change under their address: the content's hash is in the query, so browsers keep them for a year."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Final

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER: Final = Path(__file__).parent / "static"
FOR_EVER: Final = "public, max-age=31536000, immutable"


@cache
def asset_url(name: str) -> str:
    """The address of `static/NAME`; raises FileNotFoundError for one that isn't there."""
    return f"/static/{name}?v={_hash(FOLDER / name)}"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Assets(StaticFiles):
    """`/static`. What is asked for without its hash (a module's import) is asked for again each time, cheaply."""

    public = True  # for policies.check_routes

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    def file_response(self, full_path: Any, stat_result: Any, scope: Scope, status_code: int = 200) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        versioned = scope.get("query_string") == f"v={_hash(Path(full_path))}".encode()
        response.headers["cache-control"] = FOR_EVER if versioned else "no-cache"
        return response
