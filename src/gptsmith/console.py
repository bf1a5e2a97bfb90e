"""rich's console for tables, reports and progress, with all text passed through `visible`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import rich.console
import rich.text
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from gptsmith.terminal import encodable, visible

_FILE_WIDTH = 120  # columns where there is no terminal, for which rich assumes 80


class Console(rich.console.Console):
    """A console that shows text literally: control characters are escaped; brackets and :colons:
    are not markup.

    stderr: write to standard error, where progress and notices belong. options: rich's.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(
            **{"stderr": stderr, "markup": False, "emoji": False, "highlight": False, **options}
        )
        if not self.is_terminal and not {"width", "COLUMNS"} & (options.keys() | os.environ.keys()):
            self.width = _FILE_WIDTH

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        """Before rich measures the text, so that columns are as wide as what they show."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escape the text of all segments, whatever made them."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=encodable(visible(segment.text), self.encoding))


class Text(rich.text.Text):
    """rich's Text, with control characters escaped."""

    def __init__(self, text: str = "", *style: Any, **options: Any) -> None:
        super().__init__(visible(text), *style, **options)

    def append(self, text: rich.text.Text | str, style: Any = None) -> Text:
        super().append(visible(text) if isinstance(text, str) else text, style)
        return self
