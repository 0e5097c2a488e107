"""The browser tests' own instruments find what they are there to find."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from playwright.sync_api import Browser

from tests.browser.browsing import PHONE, Visit, operable, reached_by_tab, serving

pytestmark = pytest.mark.browser

FAULTS = {
    "a script that fails": ("<script>missing()</script>", "missing is not defined"),
    "an error on the console": ("<script>console.error('broken')</script>", "broken"),
    "a picture that is not there": ("<img alt='' src='/none.png'>", "404"),
    "a file of another host": ("<img alt='' src='http://127.0.0.1:9/x.png'>", "asked another host"),
    "text that is too pale": ("<p style='color:#ccc'>pale</p>", "color-contrast"),
    "a field without a name": ("<input type='text'>", "label"),
    "a table wider than the window": ("<div style='width:900px'>wide</div>", "wider than the window"),
}


def page(body: str) -> str:
    return (
        "<!doctype html><html lang='en'><head><title>Page</title><link rel='icon' href='data:,'></head>"
        f"<body><main><h1>Page</h1>{body}</main></body></html>"
    )


def site() -> FastAPI:
    app = FastAPI()
    bodies = {str(number): body for number, (body, _) in enumerate(FAULTS.values())}
    bodies["keyboard"] = "<a href='/'>1</a> <a href='/' style='outline:none'>2</a> <button tabindex='-1'>3</button>"

    @app.get("/{name}")
    def show(name: str) -> Response:
        return HTMLResponse(page(bodies[name])) if name in bodies else Response(status_code=404)

    return app


def test_a_visit_fails_for_each_planted_fault(chromium: Browser) -> None:
    """Each fault alone makes the check of its page fail, and the message names it."""
    with serving(site()) as address:
        for number, (_, told) in enumerate(FAULTS.values()):
            with Visit(chromium, address, size=PHONE) as visit:
                visit.page.goto(f"/{number}", wait_until="networkidle")
                with pytest.raises(AssertionError, match=told):
                    visit.check("planted")
                visit.errors.clear()


def test_the_walk_by_keyboard_sees_lost_and_invisible_focus(chromium: Browser) -> None:
    """A focus that cannot be seen fails, and a control that Tab never reaches is missed in the count."""
    with serving(site()) as address, Visit(chromium, address) as visit:
        visit.page.goto("/keyboard")
        with pytest.raises(AssertionError, match="cannot be seen"):
            reached_by_tab(visit.page)
        visit.page.evaluate("document.querySelectorAll('a')[1].removeAttribute('style')")
        assert len(reached_by_tab(visit.page)) == 2
        assert operable(visit.page) == 3
