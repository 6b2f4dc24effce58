"""Check built pages: every link within them leads somewhere, and they load nothing from elsewhere.

Run as ``python docs/check_links.py docs/_build/html``. What the pages link to outside is not looked at.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes that make a browser load something; a link of these relations is an address and no more.
LOADING = {"src", "srcset", "poster", "data"}
ADDRESSES = {"canonical", "author", "copyright"}


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors = {"", "top"}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "link" and values.get("rel") not in ADDRESSES:
            self.loaded.append(values.get("href", ""))
        elif "href" in values:
            self.links.append(values["href"])
        for name in LOADING & set(values):
            candidates = values[name].split(",") if name == "srcset" else [values[name]]
            self.loaded += [candidate.split()[0] for candidate in candidates if candidate.strip()]


def problems(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder, one line each."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found = [] if pages else [f"{folder} has no pages"]
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for target in page.loaded:
            if urlsplit(target).netloc:
                found.append(f"{name}: loads {target}")
        for target in [*page.links, *page.loaded]:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            linked = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not linked.is_file():
                found.append(f"{name}: {target} leads to no file")
            elif linked in pages and unquote(url.fragment) not in pages[linked].anchors:
                found.append(f"{name}: {target} leads to no such place in the page")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "every link leads somewhere, and nothing is loaded from elsewhere")
    sys.exit(bool(wrong))
