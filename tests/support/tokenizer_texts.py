"""Texts on which tokenizers disagree, and the reading of our files by transformers."""

from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from gptsmith.tokenizer import ENDOFTEXT, Tokenizer

# Any Unicode, and the spots where tokenizers disagree: runs of white space of every sort before a
# word, contractions, digits beside letters, the encoder's own marks, literals of special tokens.
SPOTS = [*" \n\t\r\v\f\0\1'1aZ!é日\u0301\u3000\u2028\xa0\x85\x1c\x1f\u200b😀", "'s", "'LL", "  \n"]
SPOTS += ["<|end|>", ENDOFTEXT, "the", " a", "\r\n", "²", "\U0010ffff", "\ufffd", "\ufeff"]
any_text = st.one_of(st.text(), st.lists(st.sampled_from(SPOTS)).map("".join))
quick = settings(max_examples=300)

STORY = (
    "The smith forged a ring, and the ring wasn't round. \u201cWell,\u201d she said,\n\n"
    "  \u201ctry again!\u201d  In 1847 they'd sold 3,000 rings;\tna\u00efve folk bought them all.\n"
) * 8


def stock(tokenizer: Tokenizer, folder: Path) -> Any:
    """transformers' reading of the file that we write."""
    from transformers import PreTrainedTokenizerFast

    file = str(tokenizer.save(folder))
    return PreTrainedTokenizerFast(tokenizer_file=file, split_special_tokens=True)
