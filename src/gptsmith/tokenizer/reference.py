"""Any tokenizer.json through the `tokenizers` library: always correct, slower than our encoders.

An untrusted tokenizer.json is in effect a program: a regular expression may take forever for forty
letters, replacements may turn a word into gigabytes, and the library panics on what it does not
support. So every file is first opened in a worker process with limits on time and memory
(sandbox.py). A tokenizer whose steps all take bounded work is then used in this process, any other
in the worker.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gptsmith import sandbox
from gptsmith.tokenizer.formats import SPLITS

_SECONDS = 2.0  # and more for large files and long texts
_MAX_GROWTH = 64  # factor by which replacements may lengthen a text
_CHILD_KEYS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a step "Sequence"
# Steps that take time in proportion to the text, and make it a few times as long at most.
_BOUNDED = (
    "BPEDecoder", "BertNormalizer", "BertPreTokenizer", "BertProcessing", "ByteFallback",
    "ByteLevel", "CTC", "CharDelimiterSplit",
    "Digits", "Fuse", "Lowercase", "Metaspace", "NFC", "NFD", "NFKC",
    "NFKD", "Nmt", "Punctuation", "RobertaProcessing", "Strip", "StripAccents",
    "TemplateProcessing", "UnicodeScripts", "Whitespace", "WhitespaceSplit", "WordPiece",
)  # fmt: skip


class ReferenceTokenizer:
    """The library's tokenizer for a tokenizer.json, without truncation and padding.

    vocab     {token: id}, including added tokens
    special   {token: id} of the special tokens

    Every method raises ValueError naming `origin` for what the library cannot do.
    """

    def __init__(self, text: str, document: dict[str, Any], origin: str) -> None:
        self._text, self._origin = text, origin
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        self._local: Tokenizer | None = None
        self.vocab, self.special = self._call("vocabulary", None, 0)
        most = 100_000 + 10 * len(self.vocab)
        if self.vocab and max(self.vocab.values()) > most:
            name, i = max(self.vocab.items(), key=lambda item: item[1])
            raise ValueError(f"{origin}: {name!r:.40} has the id {i} in {len(self.vocab):,} tokens")
        if _is_bounded(document):
            self._local = _open(text, origin)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32, without the tokens that are put around it."""
        lengths, data = self._call("encode", list(texts), sum(map(len, texts)))
        return np.split(np.frombuffer(data, np.uint32), np.cumsum(lengths)[:-1]) if lengths else []

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._call("decode", list(ids), len(ids))
        return text

    def _call(self, method: str, argument: Any, size: int) -> Any:
        """size: of the argument, in characters or ids."""
        if self._local is not None:
            return _run(self._local, method, argument, self._origin)
        limits: dict[str, Any] = {
            "what": f"{self._origin}: the tokenizer",
            "seconds": _SECONDS + len(self._text) / 5e6 + size / 1e5,
            "memory": (384 << 20) + 60 * len(self._text) + 400 * size,
        }
        function = f"{__name__}:run"
        for text in (None, self._text):  # the worker may still have it from the last call
            found = sandbox.call(
                function, self._digest, text, method, argument, self._origin, **limits
            )
            if found is not None:
                break
        return found


def _is_bounded(document: dict[str, Any]) -> bool:
    """Whether encoding and decoding take bounded work for any text."""
    model = document["model"]
    longest = model.get("max_input_chars_per_word", 100)
    if not isinstance(longest, int) or longest > 1000:
        return False
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    try:
        return all(_growth(document.get(name)) <= _MAX_GROWTH for name in steps)
    except (TypeError, AttributeError, KeyError, RecursionError, ValueError):
        return False  # malformed: the library will raise the error


def _growth(step: dict[str, Any] | None) -> float:
    """The factor by which a step can lengthen a text; infinity also for unbounded time."""
    if step is None:
        return 1
    match step["type"]:
        case "Sequence":
            parts: Any = next((step[name] for name in _CHILD_KEYS if name in step), None)
            return math.prod(map(_growth, parts))
        case "Prepend":
            return 1 if len(step["prepend"]) <= 8 else math.inf
        case "Strip" if step.get("stop"):  # as a decoder: panics at the end of a short token
            return math.inf
        case "Replace" if text := step["pattern"].get("String"):
            return max(1.0, len(step["content"]) / len(text))
        case "Split" if (
            step["pattern"].get("String") or step["pattern"].get("Regex") in SPLITS.values()
        ):
            return 1
        case kind if kind in _BOUNDED:
            return 1
    return math.inf


@contextmanager
def _naming(origin: str, what: str) -> Iterator[None]:
    """Turn any error of the library into a ValueError in one line. what: what it should do."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust side raises a bare Exception, or panics
        why = " ".join(str(error).split())[:150]
        raise ValueError(f"{origin}: `tokenizers` cannot {what} ({why})") from None


def _open(text: str, origin: str) -> Tokenizer:
    with _naming(origin, "read it"):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
    return tokenizer


def _run(tokenizer: Tokenizer, method: str, argument: Any, origin: str) -> Any:
    with _naming(origin, f"{method} with it"):
        match method:
            case "vocabulary":
                added = tokenizer.get_added_tokens_decoder()
                special = {token.content: i for i, token in added.items() if token.special}
                return [tokenizer.get_vocab(with_added_tokens=True), special]
            case "encode":
                found = tokenizer.encode_batch_fast(argument, add_special_tokens=False)
                ids = [np.array(encoding.ids, np.uint32) for encoding in found]
                data = bytearray().join([array.tobytes() for array in ids])
                return [*map(len, ids)], data
        return tokenizer.decode(argument, skip_special_tokens=False)


# --- in the worker -------------------------------------------------------------------------------

_last: dict[str, Tokenizer] = {}  # by digest


def run(digest: str, text: str | None, method: str, argument: Any, origin: str) -> Any:
    """The result of a method; None if `text` is not given and another tokenizer was used last."""
    if digest not in _last:
        if text is None:
            return None
        _last.clear()
        _last[digest] = _open(text, origin)
    return _run(_last[digest], method, argument, origin)
