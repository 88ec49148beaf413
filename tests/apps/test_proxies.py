"""Behind a proxy that ends TLS: it is believed about scheme and client where the settings name it, nobody else ever."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from caravan.apps.web import create_app, make_server
from caravan.db import Database
from caravan.db.wake import Wake
from caravan.settings import BadSettings, Settings, load_settings
from caravan.web.auth import Role
from tests.clients import PASSWORD, an_account

PROXY, STRANGER = "10.1.2.3", "203.0.113.9"
FORWARDED = {"x-forwarded-proto": "https", "x-forwarded-for": f"198.51.100.7, {STRANGER}"}


async def login(db: Database, settings: Settings, *, peer: str, headers: dict[str, str]) -> httpx2.Response:
    """What the server that `make_server` sets up answers to a sign-in that comes from the address `peer`."""
    config = make_server(create_app(settings, db, Wake(db.url)), settings).config
    config.load()
    app: Any = config.loaded_app
    transport = httpx2.ASGITransport(app=app, client=(peer, 40000))
    async with httpx2.AsyncClient(transport=transport, base_url="http://caravan.test") as client:
        body = {"email": "asha@example.com", "password": PASSWORD}
        return await client.post("/api/v1/auth/login", json=body, headers=headers)


@pytest.fixture
async def account(db: Database) -> None:
    await an_account(db, "asha@example.com", Role.STUDENT)


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize("trusted", ["10.1.2.3", "192.168.0.1,10.0.0.0/8"])
async def test_behind_a_trusted_proxy_the_cookie_is_for_https_only(db: Database, trusted: str) -> None:
    settings = load_settings({"CARAVAN_TRUSTED_PROXIES": trusted})
    answer = await login(db, settings, peer=PROXY, headers=FORWARDED)
    assert answer.status_code == 200
    assert answer.headers["set-cookie"].startswith("__Host-caravan_session=")
    assert "Secure" in answer.headers["set-cookie"]


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize("trusted", ["", "10.9.9.9"])
async def test_nobody_else_is_believed(db: Database, trusted: str) -> None:
    settings = load_settings({"CARAVAN_TRUSTED_PROXIES": trusted})
    answer = await login(db, settings, peer=PROXY, headers=FORWARDED)
    assert answer.headers["set-cookie"].startswith("caravan_session=")
    assert "Secure" not in answer.headers["set-cookie"]


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize(
    ("trusted", "seen"),
    [
        ("", PROXY),
        # What the proxy itself saw, the last entry; what its client claimed before it is anybody's word.
        ("10.0.0.0/8", STRANGER),
    ],
)
async def test_who_asks_is_who_the_proxy_saw(
    db: Database, trusted: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caravan.web import login as web_login
    from caravan.web import routes

    found: list[str] = []

    def note(request: Any) -> str:
        found.append(web_login.client_address(request))
        return found[-1]

    monkeypatch.setattr(routes, "client_address", note)
    await login(db, load_settings({"CARAVAN_TRUSTED_PROXIES": trusted}), peer=PROXY, headers=FORWARDED)
    assert found == [seen]


@pytest.mark.parametrize("value", ["*", "proxy.internal", "10.0.0.1/8", "10.0.0.1, *"])
def test_a_name_or_everybody_is_no_proxy(value: str) -> None:
    with pytest.raises(BadSettings, match=r"CARAVAN_TRUSTED_PROXIES: .* is neither an address nor a network"):
        load_settings({"CARAVAN_TRUSTED_PROXIES": value})
