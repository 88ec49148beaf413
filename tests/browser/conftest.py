"""A whole Caravan in the test's own process (web, sockets, workers, a database of its own), and a browser before it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, async_playwright

from caravan.apps.bootstrap import open_platform
from caravan.apps.web import serve_web
from caravan.apps.worker import Workers
from caravan.settings import Settings
from tests import builders, needs
from tests.browser.site import DESK, Site

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
WORKERS = ("purchase-worker", "allocation-worker", "session-worker", "cache-worker")


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    settings = Settings(sandbox_webhook_secret=builders.SANDBOX_SECRET).model_copy(
        update={"postgres_url": database_url}
    )
    # Named TCP, or asyncio leaves Nagle's algorithm on and each answer waits 40 ms for an acknowledgement.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    stop, listening = asyncio.Event(), asyncio.Event()
    async with open_platform(settings) as platform, Workers(platform, own_process=False) as workers:
        serving = asyncio.create_task(
            serve_web(
                platform,
                ("payment-service", "student-service", "admin-service", "websocket-server"),
                stop,
                listening=listening,
                sockets=[listener],
            )
        )
        try:
            async with asyncio.timeout(10):
                await listening.wait()
            site = Site(platform, workers, f"http://127.0.0.1:{listener.getsockname()[1]}")
            await site.furnish()
            for service in WORKERS:
                workers.start(service)
            yield site
        finally:
            stop.set()
            await serving
            listener.close()


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    path = needs.chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser, site: Site) -> AsyncIterator[Page]:
    """A parent's browser, not signed in. Anything that the page itself finds wrong fails the test."""
    context = await browser.new_context(viewport=DESK, base_url=site.address, locale="en-IN")
    context.set_default_timeout(10_000)
    page = await context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    yield page
    await context.close()
    assert [line for line in wrong if "status of 40" not in line and "status of 42" not in line] == []
