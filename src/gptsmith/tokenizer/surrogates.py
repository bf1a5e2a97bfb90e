"""Text that UTF-8 cannot represent is refused."""

from collections.abc import Iterable, Iterator, Sequence


def refuse_surrogates(texts: Sequence[str]) -> None:
    """ValueError naming the first lone surrogate in one of the texts."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate U+{ord(text[error.start]):04X} at offset "
                f"{error.start}, which UTF-8 cannot represent: its source was not UTF-8"
            ) from None


def not_empty(texts: Iterable[str]) -> Iterator[str]:
    """The texts that a tokenizer is trained on; ValueError if all of them are empty."""
    empty = True
    for text in texts:
        refuse_surrogates([text])
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("no text to train a tokenizer on: the sources are empty")
