"""The federation's page in a real browser: readable, without a script, by keyboard, on phone and desktop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from aggregator.federation_page import create_app
from tests.aggregator import governed_ledger
from tests.browser.browsing import DESKTOP, PHONE, Size, Theme, Visit, operable, reached_by_tab, serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(create_app(governed_ledger.build(tmp_path_factory.mktemp("governed")))) as address:
        yield address


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_clean_in_every_size_and_scheme(chromium: Browser, site: str, size: Size, theme: Theme) -> None:
    """Console without errors, nothing from elsewhere, axe without findings, no sideways scroll."""
    with Visit(chromium, site, size=size, theme=theme) as visit:
        visit.page.goto("/")
        visit.check("federation")


def test_the_page_is_walked_through(chromium: Browser, site: str) -> None:
    """Links lead to the parts, the table behind the chart opens by keyboard, a proof and the checkpoint can be had."""
    with Visit(chromium, site) as visit:
        visit.page.goto("/")
        assert len(reached_by_tab(visit.page)) == operable(visit.page)
        visit.page.get_by_role("link", name="Ledger", exact=True).click()
        expect(visit.page).to_have_url(f"{site}/#ledger")
        visit.page.get_by_text("The same as a table").focus()
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_role("region", name="Credits by epoch")).to_be_visible()
        visit.check("federation-table")
        visit.page.get_by_role("link", name="The newest checkpoint").click()
        expect(visit.page.get_by_text("test/consortium").first).to_be_visible()
