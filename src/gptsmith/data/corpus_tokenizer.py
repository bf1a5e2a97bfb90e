"""The tokenizer of a corpus: an existing one, or one trained on its documents."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gptsmith import terminal
from gptsmith.data.documents import Source
from gptsmith.data.options import PrepareConfig
from gptsmith.data.split import SplitDocument
from gptsmith.data.token_files import TokenFiles
from gptsmith.recognize import wrong_kind
from gptsmith.run import digests
from gptsmith.run.layout import ROLES
from gptsmith.tokenizer import Tokenizer

_SAMPLE = 32 << 20  # characters to train BPE on: about four seconds
_BLOCK = 1 << 16
_DEFAULT_VOCAB_SIZE = 8192


def existing_tokenizer(config: PrepareConfig, sources: Sequence[Source]) -> Tokenizer | None:
    """The existing tokenizer that `config` names; None if one is to be trained."""
    choice, size = config.tokenizer, config.vocab_size
    if config.eos_token and choice in ("gpt2", "bpe", "char", "byte"):
        raise ValueError(
            f"--eos-token {config.eos_token[0]} is for a tokenizer from a file; {choice} has its "
            "own"
        )
    if size is not None and choice != "bpe":
        raise ValueError(f"--vocab-size {size} is for --tokenizer bpe; {choice} has its own size")
    if choice in ("bpe", "char"):
        if ids := next((source for source in sources if source.token_ids is not None), None):
            raise ValueError(
                f"{ids.used}: holds token ids; give the --tokenizer that made them, not {choice}"
            )
        return None
    for source in sources if choice == "gpt2" else ():
        own = source.token_ids.vocabulary if isinstance(source.token_ids, TokenFiles) else None
        if own is not None:
            raise ValueError(
                f"{source.used}: its ids are not GPT-2's; their vocabulary is in {own}, a pickle, "
                "which is not read: prepare the text, or give the same vocabulary as --tokenizer "
                "tokenizer.json"
            )
    if choice == "gpt2":
        return Tokenizer.gpt2()
    if choice == "byte":
        return Tokenizer.byte()
    if not Path(choice).exists():
        raise FileNotFoundError(
            f"--tokenizer {choice}: neither gpt2, bpe, char or byte nor a file or folder"
        )
    if (path := Path(choice) / "tokenizer.json").is_file():
        for name in (path.name, ROLES):
            digests.check(path.parent, name)  # of a run
    if Path(choice).is_file() and Path(choice).suffix != ".json":
        raise wrong_kind(Path(choice), "a tokenizer.json or a folder with one")
    tokenizer = Tokenizer.load(choice)
    return tokenizer.with_eos(config.eos_token) if config.eos_token else tokenizer


def train_tokenizer(
    config: PrepareConfig, documents: Iterable[SplitDocument], total: int
) -> Tokenizer:
    """Train a char or bpe tokenizer on the documents. total: bytes of the source files."""
    if config.tokenizer == "char":
        # Validation documents too: a character that occurs only in them would have no id.
        return Tokenizer.char(str(c) for _, document in documents for c in document.chunks)
    terminal.note("training the tokenizer on the training documents")
    size = config.vocab_size or _DEFAULT_VOCAB_SIZE
    return Tokenizer.train_bpe(_sample(documents, total), size)


def _sample(documents: Iterable[SplitDocument], total: int) -> Iterator[str]:
    """All training text if it is short, else blocks from all over it, chosen by hash."""
    share = _SAMPLE / total if total > _SAMPLE else 1.0
    room = _SAMPLE
    for split, document in documents:
        for chunk in document.chunks if split != "val" else ():
            text = str(chunk)
            for start in range(0, len(text), _BLOCK):
                block = text[start : start + min(_BLOCK, room)]
                # `person` makes it independent of the hash that selects validation documents
                digest = hashlib.blake2b(block.encode(), digest_size=8, person=b"vocabulary")
                if share == 1 or int.from_bytes(digest.digest()) < share * 2**64:
                    yield block
                    room -= len(block)
                if room <= 0:
                    return
