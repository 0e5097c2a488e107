"""The node's pages in a real browser: drawn, clicked through, readable and usable by keyboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from data_schemas.canonical import canonical_bytes
from data_schemas.participation import SignedLeaving
from hospital_node.participation import participation
from pipeline.signing import verify
from tests.browser import clinic_node
from tests.browser.browsing import DESKTOP, PHONE, Size, Theme, Visit, operable, reached_by_tab, serving
from tests.browser.clinic_node import FLAT, OLD, PERSON, Clinic

pytestmark = pytest.mark.browser
EVERY_LOOK = [
    pytest.param(size, theme, id=f"{name}-{theme}")
    for name, size in (("desktop", DESKTOP), ("phone", PHONE))
    for theme in ("light", "dark")
]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    return clinic_node.make(tmp_path_factory.mktemp("clinic"))


@pytest.fixture(scope="module")
def site(clinic: Clinic) -> Iterator[str]:
    with serving(clinic.app) as address:
        yield address


def sign_in(visit: Visit, secret: str) -> None:
    """Type a key into the sign-in page and send it."""
    visit.page.goto("/")
    visit.page.get_by_label("API key").fill(secret)
    visit.page.get_by_role("button", name="Sign in").click()
    expect(visit.page.get_by_role("button", name="Sign out")).to_be_visible()


@pytest.mark.parametrize(("size", "theme"), EVERY_LOOK)
def test_every_page_is_clean_in_every_size_and_scheme(
    chromium: Browser, site: str, clinic: Clinic, size: Size, theme: Theme
) -> None:
    """Each page: console without errors, nothing from elsewhere, axe without findings, no sideways scroll."""
    with Visit(chromium, site, size=size, theme=theme) as visit:
        visit.page.goto("/")
        visit.check("sign-in")
        sign_in(visit, clinic.secrets["operator"])
        visit.page.reload()
        expect(visit.page.get_by_text("held-out patients of this hospital")).to_be_visible()
        visit.check("clinic")
        visit.page.get_by_role("link", name="validation-1").click()
        expect(visit.page.get_by_role("heading", level=1)).to_be_visible()
        visit.check("report")
        visit.page.go_back()
        visit.page.get_by_role("link", name="Leave the federation").click()
        visit.check("leave")
        visit.page.goto(f"/patients/{PERSON}")
        expect(visit.page.get_by_text(re.compile(r"^Likely \d+ to \d+ mg/dL at"))).to_be_visible()
        visit.check("patient")
        visit.page.get_by_role("link", name="mmol/L").click()
        expect(visit.page.get_by_text(re.compile(r"^Likely \d+\.\d to \d+\.\d mmol/L at"))).to_be_visible()
        visit.check("patient-mmol")
        visit.page.goto(f"/patients/{OLD}")
        expect(visit.page.get_by_text("The newest reading is too old")).to_be_visible()
        visit.check("patient-no-forecast")
        visit.page.goto("/docs")
        visit.check("docs")


def test_every_control_is_reached_by_the_keyboard(chromium: Browser, site: str, clinic: Clinic) -> None:
    """Tab reaches every link, button and field of each page, with a focus that can be seen."""
    with Visit(chromium, site) as visit:
        visit.page.goto("/")
        assert len(reached_by_tab(visit.page)) == operable(visit.page)
        sign_in(visit, clinic.secrets["operator"])
        for path in ("/", "/leave", f"/patients/{PERSON}"):
            visit.page.goto(path)
            assert len(reached_by_tab(visit.page)) == operable(visit.page) > 3


def test_the_clinic_sees_its_node_in_one_glance(chromium: Browser, site: str, clinic: Clinic) -> None:
    """Round, model, freshness and privacy are in the first window; each section has what it is for."""
    with Visit(chromium, site) as visit:
        sign_in(visit, clinic.secrets["all"])
        for words in ("Federation round", "Model in use", "Newest reading", "Privacy left"):
            box = visit.page.get_by_text(words, exact=True).first.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] < DESKTOP[1]
        page = visit.page
        expect(page.get_by_text("published in the ledger")).to_be_visible()
        expect(
            page.get_by_role("img", name=re.compile(r"Training patients: epsilon \d\.\d\d of 8 spent"))
        ).to_be_visible()
        expect(page.get_by_text(re.compile(r"\d+ more rounds fit at the present noise"))).to_be_visible()
        expect(page.get_by_role("heading", name="Verified on this node")).to_be_visible()
        assert page.locator(".proof li").count() == 6
        expect(page.get_by_role("rowheader", name="libreview (libreview)")).to_be_visible()
        expect(page.get_by_role("rowheader", name=re.compile("below-sensor-range"))).to_be_visible()
        page.get_by_text("Every release: who asked").click()
        expect(page.get_by_role("region", name="Releases")).to_be_visible()
        expect(page.get_by_text("To pause or leave, sign in with a key")).to_be_visible()


def test_pause_and_resume_without_scripts(chromium: Browser, site: str, clinic: Clinic) -> None:
    """The switch is a form: it works with scripts off, and the node's folder says what the page says."""
    with Visit(chromium, site, scripts=False) as visit:
        sign_in(visit, clinic.secrets["operator"])
        visit.page.get_by_role("button", name="Pause").click()
        expect(visit.page.get_by_text("paused", exact=True)).to_be_visible()
        assert participation(clinic.home).state == "paused"
        visit.picture("clinic-paused")
        visit.page.get_by_role("button", name="Take part again").click()
        expect(visit.page.get_by_text("taking part", exact=True)).to_be_visible()
        assert participation(clinic.home).state == "taking part"


def test_a_page_that_stays_open_does_not_grow_old(chromium: Browser, site: str, clinic: Clinic) -> None:
    """After a minute the age is told anew; when the node does not answer the page says that it is from before."""
    with Visit(chromium, site) as visit:
        visit.page.clock.install()
        sign_in(visit, clinic.secrets["all"])
        visit.page.goto(f"/patients/{PERSON}")
        expect(visit.page.get_by_text("3 min ago")).to_be_visible()
        clinic.turn_clock(1)
        visit.page.clock.run_for(61_000)
        expect(visit.page.get_by_text("4 min ago")).to_be_visible()
        visit.page.route("**/*", lambda route: route.abort())
        visit.page.clock.run_for(61_000)
        expect(visit.page.get_by_text("The node does not answer.")).to_be_visible()
        visit.errors.clear()
        clinic.turn_clock(-1)


def test_a_patient_signs_in_by_keyboard_and_sees_only_their_own_page(
    chromium: Browser, site: str, clinic: Clinic
) -> None:
    """A patient's key leads to that patient; another's address answers that it is not theirs; signing out ends it."""
    with Visit(chromium, site, size=PHONE) as visit:
        visit.page.goto("/")
        visit.page.get_by_label("API key").focus()
        visit.page.keyboard.type(clinic.secrets["one"])
        visit.page.keyboard.press("Enter")
        expect(visit.page).to_have_url(f"{site}/patients/{PERSON}")
        visit.expected.add(403)
        visit.page.goto(f"/patients/{FLAT}")
        expect(visit.page.get_by_role("heading", level=1)).to_have_text("Not yours to see")
        visit.check("not-yours")
        visit.page.get_by_role("button", name="Sign out").click()
        expect(visit.page.get_by_label("API key")).to_be_visible()


def test_leaving_asks_first_and_hands_over_a_signed_statement(
    chromium: Browser, tmp_path_factory: pytest.TempPathFactory, clinic: Clinic
) -> None:
    """A wrong name changes nothing; the right one signs, and the statement from the page verifies."""
    other = clinic_node.make(tmp_path_factory.mktemp("leaver"))
    with serving(other.app) as address, Visit(chromium, address) as visit:
        sign_in(visit, other.secrets["operator"])
        visit.page.get_by_role("link", name="Leave the federation").click()
        visit.expected.add(422)
        visit.page.get_by_label("Type this node's name").fill("south")
        visit.page.get_by_role("button", name="Sign and leave").click()
        expect(visit.page.get_by_role("alert")).to_have_text("That is not this node's name. Nothing was changed.")
        assert participation(other.home).state == "taking part"
        visit.page.get_by_label("Type this node's name").fill("north")
        visit.page.get_by_role("button", name="Sign and leave").click()
        expect(visit.page.get_by_text("This hospital left the federation")).to_be_visible()
        visit.check("clinic-left")
        with visit.page.expect_download() as download:
            visit.page.get_by_role("link", name="Signed statement").click()
        signed = SignedLeaving.model_validate(json.loads(download.value.path().read_bytes()))
        assert verify(signed.leaving.public_key, canonical_bytes(signed.leaving), signed.signature)
