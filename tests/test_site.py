"""The kit as web pages: every page is there, every link leads to a file, every picture has words, nothing is loaded."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kdiga_nb import paths, site
from kdiga_nb.notebooks import ARTEFACTS


class Parsed(HTMLParser):
    """Links, pictures and what a page loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.wordless = 0
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found.get("id", ""), found.get("name", "")}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loads.append(found["href"])
        if tag == "img":
            self.wordless += not found.get("alt", "").strip()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("site")
    text = (paths.published("digits") / "explorable.html").read_text(encoding="utf-8")
    assert len(site.build(home, text)) == len(ARTEFACTS) + len(list((paths.ROOT / "docs").glob("*.md"))) + 3
    return home


def test_every_link_leads_to_a_file_and_a_place_in_it_and_nothing_is_loaded_from_elsewhere(home: Path) -> None:
    pages = {page: Parsed(page) for page in home.rglob("*.html")}
    broken, remote, places = [], [], 0
    for page, parsed in pages.items():
        for target in (*parsed.links, *parsed.loads):
            parts = urlsplit(target)
            file = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
            if parts.scheme in ("http", "https", "mailto") or target.startswith("//"):
                remote += [target] if target in parsed.loads else []
            elif parts.scheme != "data" and not file.exists():
                broken.append(f"{page.relative_to(home)}: {target}")
            elif parts.scheme != "data" and parts.fragment and file in pages:
                places += file.parent == home / "docs"
                if not {parts.fragment, unquote(parts.fragment)} & pages[file].ids:
                    broken.append(f"{page.relative_to(home)}: {target}")
    assert broken == [] and remote == []
    assert places >= 14


def test_every_picture_has_words(home: Path) -> None:
    assert {str(page.relative_to(home)): n for page in home.rglob("*.html") if (n := Parsed(page).wordless)} == {}


def test_notebooks_keep_their_outputs_and_equations(home: Path) -> None:
    table = (home / "notebooks" / "table1.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in table and "✓ holds" in table
    walkthrough = (home / "notebooks" / "walkthrough.html").read_text(encoding="utf-8")
    walkthrough = re.sub(r"<script.*?</script>", "", walkthrough, flags=re.DOTALL)
    assert walkthrough.count("<math") > 20 and "$$" not in walkthrough


def test_the_api_has_the_public_names(home: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (home / "api").rglob("*.html"))
    for name in ("KDIGA", "isd_without_teacher", "AutoAttack", "reproduce", "input_gradient"):
        assert f">{name}<" in text, name
