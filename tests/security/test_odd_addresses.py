"""Addresses in headers that Python's own reader raises at, and settings that hold a line end."""

from __future__ import annotations

import pytest

from caravan.db import Database
from caravan.settings import BadSettings, load_settings
from caravan.web.routes import router
from tests.clients import client_of, make_app

HALF = "http://[x"


async def test_an_address_that_is_half_an_ipv6_one(db: Database) -> None:
    async with client_of(make_app(db, router)) as client:
        led = await client.get("/", headers={"hx-request": "true", "hx-current-url": HALF})
        refused = await client.post("/logout", headers={"origin": HALF})
    assert (led.status_code, led.headers["hx-redirect"]) == (401, "/login")
    assert refused.status_code == 403


@pytest.mark.parametrize("environ", [{"CARAVAN_ORIGINS": "https://app.example.\r\ncom"}, {"CARAVAN_\nPORT": "1"}])
def test_a_refused_setting_is_told_in_one_line(environ: dict[str, str]) -> None:
    with pytest.raises(BadSettings) as refused:
        load_settings(environ)
    assert "\n" not in str(refused.value)
