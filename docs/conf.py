"""The site: Sphinx reads this file when `make docs` builds docs/ into build/site.

The pages are plain Markdown, which GitHub shows too. What only the site has is added while it is
built: pages of files outside docs/ (repository.py), tables of options and help texts
(reference.py), the docstrings (docstrings.py), the lessons with their outputs (notebook.py).
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]  # this tree, whatever is installed

import gptsmith  # noqa: E402

project = "gptsmith"
release = gptsmith.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
extensions += ["docs.docstrings", "docs.reference", "docs.repository"]
exclude_patterns = ["*.py"]  # of this folder; the lessons are pages

# A lesson arrives at the parser as a notebook that was executed (repository.read_page).
nb_custom_formats = {".py": ["nbformat.reads", {"as_version": 4}]}
nb_execution_mode = "off"
nb_merge_streams = True

myst_heading_anchors = 4
myst_url_schemes = ["http", "https", "mailto", "repository"]

smartquotes = False  # "--format" stays as it is written

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of PyTorch are in another language
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "gptsmith"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
