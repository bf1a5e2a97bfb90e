"""The site is built without a warning, and what its pages name is there."""

import os
import re
import subprocess
import sys
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import gptsmith
from gptsmith import cli

pytest.importorskip("sphinx", reason="the extra docs is not installed")
pytest.importorskip("myst_nb", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found.get("id", ""), found.get("name", "")}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in ("img", "script", "iframe", "source") and "src" in found:
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("rel") not in (
            "canonical",
            "index",
            "search",
            "next",
            "prev",
        ):
            self.loaded.append(found.get("href", ""))


page_of = cache(Page)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; lessons whose outputs are in build/lessons are not executed again."""
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "docs", str(out)]
    environment = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def target(page: Path, link: str) -> tuple[Path, str] | None:
    """The file and the anchor of a link; None for one that leaves the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = page if not parts.path else page.parent / unquote(parts.path)
    return Path(os.path.normpath(path)), unquote(parts.fragment)


def test_every_link_and_every_picture_is_there(site: Path) -> None:
    missing = []
    for page in pages(site):
        for link in [*page_of(page).links, *page_of(page).loaded]:
            found = target(page, link)
            if found is None:
                continue
            file, anchor = found
            there = file.is_file() and (file.suffix != ".html" or anchor in page_of(file).anchors)
            if not there:
                missing.append(f"{page.relative_to(site)}: {link}")
    assert not missing


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    for page in pages(site):
        assert not [x for x in page_of(page).loaded if urlsplit(x).netloc], page


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    waiting, seen = [site / "index.html"], set[Path]()
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".html":
            continue
        seen.add(page)
        waiting += [found[0] for link in page_of(page).links if (found := target(page, link))]
    made = {"genindex.html", "py-modindex.html", "search.html"}
    assert {p.relative_to(site).as_posix() for p in pages(site)} - made <= {
        p.relative_to(site).as_posix() for p in seen
    }


def test_files_of_the_repository_are_shown(site: Path) -> None:
    shown = (site / "repository/Makefile.html").read_text(encoding="utf-8")
    assert "Everything a newcomer types" in re.sub("<[^>]*>", "", shown)


def test_lessons_have_their_outputs_and_pictures(site: Path) -> None:
    for lesson in (ROOT / "docs/lessons").glob("*.py"):
        page = site / "lessons" / f"{lesson.stem}.html"
        assert [x for x in page_of(page).loaded if x.startswith("../_images/")], lesson


def test_every_public_name_is_in_the_api(site: Path) -> None:
    names = set(inventory(site))
    for name in set(gptsmith.__all__) - {"__version__"}:
        value = getattr(gptsmith, name)
        home = value.__name__ if name == "masks" else f"{value.__module__}.{value.__qualname__}"
        assert home in names, name


def inventory(site: Path) -> list[str]:
    """The names in Sphinx's objects.inv: four lines of header, then compressed lines."""
    data = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return [line.split()[0] for line in zlib.decompress(data).decode().splitlines()]


def test_every_command_has_its_help_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    from docs import reference

    text = {
        page: (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        for page in ("commands", "configuration")
    }
    helps = set(re.findall("<!-- help: (.+) -->", text["commands"]))
    assert helps >= set(cli.VERBS)
    assert set(re.findall("<!-- options: (.+) -->", text["configuration"])) == set(
        reference.OPTIONS
    )
    for name in helps - {"finetune"}:  # which prints its kinds
        printed = set(re.findall(r"^  (--[\w.-]+)", reference.help_text(name), re.MULTILINE))
        known = [name, *(["finetune"] if name.startswith("finetune ") else [])]
        known += ["recipe"] if name.startswith(("finetune", "pretrain")) else []
        tables = "\n".join(reference.option_tables(part) for part in known)
        listed = set(re.findall(r"^\| `(--[\w.-]+)`", tables, re.MULTILINE))
        # an option of all fine-tunings that one kind does not have
        assert printed <= listed, name
