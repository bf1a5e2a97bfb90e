"""Links from the pages to the rest of the repository, and the lessons as executed notebooks.

A link to a file outside docs/, such as [the licences](../tests/fixtures/data/LICENSES.md), works on
GitHub as it is. Here it leads to a page that shows the file. A line that is nothing but a link to a
Markdown file outside docs/ is replaced by the text of that file, and links to that file lead to
this page.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import nbformat
from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder

from docs import notebook

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SCHEME = "repository:"

_TARGET = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)\s])")
_INCLUDE = re.compile(r"^\[[^]]*\]\((\.\./[^)\s#:]+\.md)\)$", re.MULTILINE)


def included() -> dict[Path, Path]:
    """Markdown files outside docs/ -> the pages that show them."""
    return {
        (page.parent / target).resolve(): page
        for page in DOCS.glob("*.md")
        for target in _INCLUDE.findall(page.read_text(encoding="utf-8"))
    }


def read_page(app: Sphinx, docname: str, content: list[str]) -> None:
    """Handler of `source-read`: the text of a page, as Sphinx shall parse it."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".py":
        content[0] = nbformat.writes(notebook.executed(page))
    shown_on = included()

    def text_of(match: re.Match[str]) -> str:
        file = (page.parent / match[1]).resolve()
        app.env.note_dependency(str(file))
        return _with_links(file.read_text(encoding="utf-8"), file.parent, page, shown_on)

    text = _INCLUDE.sub(text_of, content[0])
    content[0] = _with_links(text, page.parent, page, shown_on)


def _with_links(text: str, folder: Path, page: Path, shown_on: dict[Path, Path]) -> str:
    """The text, which is in `folder`, with the links that it needs on `page`."""

    def target(match: re.Match[str]) -> str:
        path = (folder / unquote(match[1])).resolve()
        if path.is_dir():
            path /= "index.md" if path.is_relative_to(DOCS) else "README.md"
        path = shown_on.get(path, path)
        if not path.is_file() or not path.is_relative_to(ROOT):
            return match[1]  # already done, or an error that Sphinx reports
        if path.is_relative_to(DOCS):
            return os.path.relpath(path, page.parent)
        return SCHEME + path.relative_to(ROOT).as_posix()

    return _TARGET.sub(target, text)


def resolve_links(app: Sphinx, doctree: nodes.document, docname: str, linked: set[str]) -> None:
    """Handler of `doctree-resolved`: URLs of the files outside docs/, which are added to `linked`.
    A link whose text is the name of a function or class leads to its definition."""
    for node in doctree.findall(nodes.reference):
        if node.get("refuri", "").startswith(SCHEME):
            path = node["refuri"].removeprefix(SCHEME).partition("#")[0]
            linked.add(path)
            uri, name = app.builder.get_relative_uri(docname, f"repository/{path}"), node.astext()
            source = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".py") else ""
            is_defined = re.search(rf"^(def|class) {re.escape(name)}\b", source, re.MULTILINE)
            node["refuri"] = f"{uri}#{name}" if is_defined else uri


def file_pages(app: Sphinx, linked: set[str]) -> Iterator[tuple[str, dict[str, str], str]]:
    """Handler of `html-collect-pages`: a page for each file that is linked to."""
    assert isinstance(app.builder, StandaloneHTMLBuilder)
    for path in sorted(linked):
        text = (ROOT / path).read_text(encoding="utf-8")
        try:
            language = get_lexer_for_filename(path).aliases[0]
        except ClassNotFound:
            language = "text"
        code = app.builder.highlighter.highlight_block(text, language, force=True)
        if path.endswith(".py"):  # links to a function or class, such as a test, lead to it
            names = re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE)
            for name in dict.fromkeys(names):
                code = re.sub(
                    rf'(<span class="n[fc]")(>{name}<)', rf'\1 id="{name}"\2', code, count=1
                )
        yield f"repository/{path}", {"title": path, "body": f"<h1>{path}</h1>\n{code}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    linked = set[str]()  # files outside docs/
    app.connect("source-read", read_page)
    app.connect("doctree-resolved", partial(resolve_links, linked=linked))
    app.connect("html-collect-pages", partial(file_pages, linked=linked))
    return {"parallel_read_safe": False, "parallel_write_safe": False}
