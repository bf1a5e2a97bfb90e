"""Make text safe for figures: names of runs, classes and tasks in any script.

matplotlib warns about every character that its font lacks, draws a box for it, reads `$...$` as a
formula, and leaves labels that start with an underscore out of legends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from gptsmith.terminal import escaped, visible

P = ParamSpec("P")
R = TypeVar("R")

# After matplotlib's own font, the first that is installed for what it lacks.
_FONT = "DejaVu Sans"
_OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans",
    "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Arial Unicode MS", "FreeSans", "Noto Sans Symbols2",
)  # fmt: skip


def figure_text(text: str, limit: int = 40) -> str:
    """The text as a figure shows it: characters that no font has are escaped.

    limit: characters shown; a longer text would leave no room for the figure.
    """
    fonts = _fonts()

    def drawable(c: str) -> bool:
        return any(font.get_char_index(ord(c)) for font in fonts.values())

    text = "".join(c if drawable(c) else escaped(c) for c in visible(text, keep=""))
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def with_fonts(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator for functions that draw a figure: sets the fonts that `figure_text` relies on."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context({"font.family": list(_fonts())}):
            return draw(*args, **kwargs)

    return drawn


@cache
def _fonts() -> dict[str, Any]:
    """The installed fonts by family, in the order in which matplotlib looks for a character."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    installed = set(fontManager.get_font_names())
    names = (_FONT, *(name for name in _OTHERS if name in installed))
    return {name: get_font(findfont(name)) for name in names}
