"""A headless Chromium for tests that look at a page as a reader does; tests are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
"""Root in a container has no sandbox; the others keep the browser from the network and from work of its own."""

LIMIT_MS = 180_000
"""After so long a page counts as hung; it takes a fraction of a second, but a machine may have much else to do."""


def find_chromium() -> str:
    """The browser's program; skips the test where there is none, or nothing to drive it with."""
    pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed (extra `dev`)")
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser on the path: one of {', '.join(NAMES)}")
    return program


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that lives as long as the block."""
    program = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, headless=True, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page, with what it complained about and what it asked the network for while it was open."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript function, called in the page."""
        return self.page.evaluate(script, argument)


@contextmanager
def opened(
    browser: Browser, file: Path, *, width: int = 1280, height: int = 900, theme: str = "light", script: bool = True
) -> Iterator[Opened]:
    """A file in a window of its own.

    Args:
        browser: the browser.
        file: HTML file.
        width, height: of the window, CSS pixels.
        theme: ``light`` or ``dark``, as the reader's system asks for.
        script: whether scripts run.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, java_script_enabled=script)
    page = context.new_page()
    page.set_default_timeout(LIMIT_MS)
    found = Opened(page)
    page.on("console", lambda message: found.complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(file.resolve().as_uri())
    try:
        yield found
    finally:
        context.close()


OPEN_ALL = "() => document.querySelectorAll('details').forEach(part => { part.open = true; })"
"""Unfolds everything."""

CONTRASTS = """
() => {
  const parse = text => {
    const found = text.match(/[\\d.]+/g);
    if (!found || text === 'none' || text === 'transparent') return null;
    const srgb = text.startsWith('color(') ? 255 : 1;
    const [r, g, b, a] = found.map(Number);
    return [r * srgb, g * srgb, b * srgb, a === undefined ? 1 : a];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = colour => {
    const [r, g, b] = colour.slice(0, 3).map(value => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const canvas = matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
  const ground = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour && colour[3] > 0) layers.push(colour);
      if (colour && colour[3] >= 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), canvas);
  };
  const seen = [];
  for (const element of document.querySelectorAll('body *')) {
    const words = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join('').trim();
    if (!words || ['SCRIPT', 'STYLE', 'TITLE', 'title', 'OPTION'].includes(element.tagName)) continue;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (box.width < 2 || box.height < 2 || style.visibility !== 'visible') continue;
    const inPlot = element.ownerSVGElement !== undefined && element.ownerSVGElement !== null;
    const ink = parse(inPlot ? style.fill : style.color);
    if (!ink) continue;
    const below = ground(inPlot ? element.ownerSVGElement.parentElement : element);
    let strength = 1;
    for (let at = element; at; at = at.parentElement) strength *= Number(getComputedStyle(at).opacity);
    const [one, other] = [luminance(over([ink[0], ink[1], ink[2], ink[3] * strength], below)), luminance(below)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const rounded = Math.round(ratio * 100) / 100;
    seen.push({ ratio: rounded, words: words.slice(0, 60), where: element.tagName + '.' + element.getAttribute('class'), inPlot });
  }
  return seen;
}
"""
"""The contrast of every text that is seen with what lies behind it (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""
