"""The node's pages in a real browser: drawn, clicked through, readable and usable by keyboard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.browsing import DESKTOP, PHONE, Size, Theme, Visit, operable, reached_by_tab, serving
from tests.hospital_node import serving_node
from tests.hospital_node.serving_node import OTHER, PERSON, Served

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serving_node.make(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def site(served: Served) -> Iterator[str]:
    with serving(served.client.app) as address:
        yield address


def sign_in(visit: Visit, secret: str) -> None:
    """Type a key into the sign-in page and send it."""
    visit.page.goto("/")
    visit.page.get_by_label("API key").fill(secret)
    visit.page.get_by_role("button", name="Sign in").click()
    expect(visit.page.get_by_role("button", name="Sign out")).to_be_visible()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_clean_in_every_size_and_scheme(
    chromium: Browser, site: str, served: Served, size: Size, theme: Theme
) -> None:
    """Each page: console without errors, nothing from elsewhere, axe without findings, no sideways scroll."""
    with Visit(chromium, site, size=size, theme=theme) as visit:
        visit.page.goto("/")
        visit.check("sign-in")
        sign_in(visit, served.secrets["all"])
        visit.check("clinic")
        visit.page.get_by_role("link", name=PERSON).click()
        expect(visit.page.get_by_role("heading", level=1)).to_have_text(PERSON)
        visit.check("patient")
        visit.page.goto("/docs")
        visit.check("docs")


def test_every_control_is_reached_by_the_keyboard(chromium: Browser, site: str, served: Served) -> None:
    """Tab reaches every link, button and field of a page, in view and with a visible focus."""
    with Visit(chromium, site) as visit:
        sign_in(visit, served.secrets["all"])
        for path in ("/", f"/patients/{PERSON}"):
            visit.page.goto(path)
            assert len(reached_by_tab(visit.page)) == operable(visit.page)


def test_a_patient_signs_in_by_keyboard_and_sees_only_their_own_page(
    chromium: Browser, site: str, served: Served
) -> None:
    """A patient's key leads to that patient; another's address answers that it is not theirs; signing out ends it."""
    with Visit(chromium, site, size=PHONE) as visit:
        visit.page.goto("/")
        visit.page.get_by_label("API key").focus()
        visit.page.keyboard.type(served.secrets["one"])
        visit.page.keyboard.press("Enter")
        expect(visit.page).to_have_url(f"{site}/patients/{PERSON}")
        visit.expected.add(403)
        visit.page.goto(f"/patients/{OTHER}")
        expect(visit.page.get_by_role("heading", level=1)).to_have_text("Not yours to see")
        visit.check("not-yours")
        visit.page.get_by_role("button", name="Sign out").click()
        expect(visit.page.get_by_label("API key")).to_be_visible()
