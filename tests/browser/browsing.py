"""A real browser for the tests of pages: Chromium, headless, driven by Playwright, examined by axe.

    with serving(app) as site, Visit(chromium, site, size=PHONE, theme="dark") as visit:
        visit.page.goto("/")
        visit.page.get_by_role("button", name="Pause").click()
        visit.check("clinic-paused")

A visit fails when the console shows an error or a warning, when anything is asked of another host, and when an answer
is no success, unless the test said that it expects it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Response, sync_playwright

Size: TypeAlias = tuple[int, int]
Theme: TypeAlias = Literal["light", "dark"]
PHONE: Size = (390, 844)
DESKTOP: Size = (1280, 900)
SHOTS = Path(__file__).parents[2] / "browser-shots"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# WCAG 2.2 at level AA, and axe's own good practice.
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


@contextmanager
def launched() -> Iterator[Browser]:
    """Start Chromium with a fresh profile. Without it the tests fail and say what to install: nothing is skipped."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise RuntimeError("there is no chromium on this machine: `apt-get install chromium`, then `make browser`")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port of 127.0.0.1 and return its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    assert server.started, "the server did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


class Visit:
    """One browser window with its own cookies, in one size and colour scheme, that sees everything that goes wrong."""

    def __init__(
        self, chromium: Browser, site: str, *, size: Size = DESKTOP, theme: Theme = "light", scripts: bool = True
    ) -> None:
        self.name = f"{'phone' if size[0] < 600 else 'desktop'}-{theme}"
        self.errors: list[str] = []
        self.expected: set[int] = set()
        self._site = site
        self._context = chromium.new_context(
            base_url=site,
            viewport={"width": size[0], "height": size[1]},
            color_scheme=theme,
            java_script_enabled=scripts,
            reduced_motion="reduce",
        )
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.errors.append(f"script: {error}"))
        self.page.on("requestfailed", lambda request: self._failed(request.url, request.failure or ""))
        self.page.on("response", self._answered)
        self.page.on("request", lambda request: self._asked(request.url))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._context.close()
        if error is None:
            assert not self.errors, self.errors

    def check(self, name: str) -> Path:
        """Look at the page as it stands: no error, accessible, no sideways scroll. Returns its picture, whole page."""
        picture = self.picture(name)
        assert not self.errors, self.errors
        found = violations(self.page)
        assert not found, "\n".join(found)
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} is {wide} pixels wider than the window"
        return picture

    def picture(self, name: str) -> Path:
        """Save what the window shows of the whole page as browser-shots/NAME-SIZE-THEME.png."""
        SHOTS.mkdir(exist_ok=True)
        path = SHOTS / f"{name}-{self.name}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def _said(self, kind: str, text: str) -> None:
        # Chromium reports an expected refusal on the console too.
        if kind in {"error", "warning"} and not any(f"status of {status}" in text for status in self.expected):
            self.errors.append(f"console {kind}: {text}")

    def _failed(self, url: str, why: str) -> None:
        # A request that turned into a download, or that a newer one replaced, is aborted by the browser itself.
        if why != "net::ERR_ABORTED":
            self.errors.append(f"failed: {url} {why}")

    def _asked(self, url: str) -> None:
        if urlsplit(url).scheme not in {"data", "blob"} and not url.startswith(self._site):
            self.errors.append(f"asked another host: {url}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self.expected:
            self.errors.append(f"{response.status}: {response.url}")


def violations(page: Page) -> list[str]:
    """Everything that axe finds against the page, in words: rule, what to do, where. Contrast is measured."""
    found = Axe().run(page, options=RULES).response
    return [
        f"{broken['id']}: {broken['help']}: {node['target']} {node.get('failureSummary', '')}"
        for broken in found["violations"]
        for node in broken["nodes"]
    ]


def reached_by_tab(page: Page, presses: int = 400) -> list[str]:
    """Press Tab from the top of the page to its end: what has the focus each time, in the order of the keyboard.

    Fails where the focus cannot be seen: an element without an outline or shadow of its own.
    """
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    reached: list[str] = []
    for _ in range(presses):
        page.keyboard.press("Tab")
        focus = page.evaluate(_FOCUSED)
        if focus is None or focus["path"] in reached:
            break
        assert focus["seen"], f"the keyboard's focus cannot be seen on {focus['path']}"
        reached.append(focus["path"])
    return reached


def operable(page: Page) -> int:
    """How many links, buttons, fields and the like the page shows; each must be reached by Tab."""
    count: int = page.evaluate(_OPERABLE)
    return count


_FOCUSED = """() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  const s = getComputedStyle(e);
  const twins = [...document.querySelectorAll(e.tagName)];
  const name = (e.getAttribute('aria-label') || e.textContent || e.name || '').trim().slice(0, 40);
  return {path: `${e.tagName.toLowerCase()}[${twins.indexOf(e)}] ${name}`,
          seen: (s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0) || s.boxShadow !== 'none'};
}"""
_OPERABLE = """() => [...document.querySelectorAll(
  'a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex="0"]')]
  .filter(e => !e.disabled && e.checkVisibility({visibilityProperty: true})).length"""
