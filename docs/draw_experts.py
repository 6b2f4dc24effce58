"""Draw a few cards of a page of experts as pictures, for the light and the dark scheme.

Run as ``python docs/draw_experts.py docs/_static/experts/smollm2.html 32 86 889``. It writes
``smollm2-light.png`` and ``smollm2-dark.png`` beside the page. It needs Chromium and Playwright.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

#: Of every card the first passages, so that all cards are about as high.
PASSAGES = 3
STYLE = f"""
.cards, .chunk {{ display: contents; }}
.row {{ display: grid; grid: auto / repeat(3, 300px); gap: 12px; width: max-content; padding: 4px; }}
.card.opened {{ outline: none; }}
.card .line:nth-of-type(n + {PASSAGES + 2}) {{ display: none; }}
"""


def draw(page: Path, experts: list[str]) -> None:
    """Gather the cards of the experts in one row, and draw that."""
    with sync_playwright() as run:
        browser = run.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            tab = browser.new_page(color_scheme=scheme, device_scale_factor=2)
            tab.goto(page.resolve().as_uri())
            tab.add_style_tag(content=STYLE)
            tab.evaluate("document.body.insertAdjacentHTML('afterbegin', '<div class=row></div>')")
            for number in experts:
                tab.evaluate(f"location.hash = 'expert={number}'")
                card = tab.wait_for_selector(".card.opened")
                card.evaluate("card => document.querySelector('.row').append(card.cloneNode(true))")
            tab.locator(".row").screenshot(path=page.with_name(f"{page.stem}-{scheme}.png"))
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2:])
