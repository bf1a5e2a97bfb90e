"""GPT-2's tokenizer and trained BPE: the ids of transformers, tokenizers and tiktoken."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_texts import STORY, any_text, quick, stock
from tokenizers import pre_tokenizers

from gptsmith.tokenizer import ENDOFTEXT, SPECIAL_TOKENS, Tokenizer, bpe


@pytest.fixture(scope="module")
def stock_gpt2(real_data: Path, tmp_path_factory: pytest.TempPathFactory):
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(real_data / "gpt2_bpe/encoder.json", folder / "vocab.json")
    shutil.copy(real_data / "gpt2_bpe/vocab.bpe", folder / "merges.txt")
    return GPT2Tokenizer.from_pretrained(folder, split_special_tokens=True)


def test_gpt2_has_the_known_ids(gpt2: Tokenizer) -> None:
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eos_id, gpt2.dtype) == ("gpt2", 50257, 50256, "uint16")
    assert gpt2.encode("Hello, world!\n\nIt's") == [15496, 11, 995, 0, 198, 198, 1026, 338]
    tuned = gpt2.add_special_tokens(SPECIAL_TOKENS)
    assert list(tuned.special_tokens.items()) == [
        (ENDOFTEXT, 50256),
        ("<|pad|>", 50257),
        ("<|system|>", 50258),
        ("<|user|>", 50259),
        ("<|assistant|>", 50260),
        ("<|end|>", 50261),
    ]
    assert tuned.kind == "gpt2"
    assert tuned.vocab_size == 50262
    assert gpt2.vocab_size == 50257
    assert tuned.add_special_tokens(SPECIAL_TOKENS).fingerprint == tuned.fingerprint


def test_gpt2_equals_transformers_on_any_text(gpt2: Tokenizer, stock_gpt2) -> None:
    @quick
    @given(any_text)
    @example("x \x1c\n y")
    @example(" \n \0 \n a")
    def check(text: str) -> None:
        ids = gpt2.encode(text)
        assert ids == stock_gpt2.encode(text)
        assert gpt2.decode(ids) == text

    check()


def test_gpt2_decodes_any_ids_as_transformers_does(gpt2: Tokenizer, stock_gpt2) -> None:
    @quick
    @given(st.lists(st.integers(0, 50256) | st.integers(0, 255)))
    def check(ids: list[int]) -> None:
        assert gpt2.decode(ids) == stock_gpt2.decode(ids)
        assert gpt2.decode_bytes(ids).decode(errors="replace") == gpt2.decode(ids)

    check()


def test_gpt2_table_fulfils_the_condition_of_tiktoken(gpt2: Tokenizer) -> None:
    vocab = {piece: i for piece, i in gpt2.vocab.items() if i < 50256}
    assert bpe.tiktoken_is_exact(vocab, gpt2._merges)


def test_a_novel_equals_tiktoken_itself(gpt2: Tokenizer, real_data: Path) -> None:
    import tiktoken
    from tiktoken_ext import openai_public

    vocab = {piece: i for piece, i in gpt2.vocab.items() if i < 50256}
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=bpe.ranks(vocab, gpt2._merges),
        special_tokens={ENDOFTEXT: 50256},
    )
    chapter = (real_data / "english_novels/Doyle_Hound_1902.txt").read_text("utf-8")
    text = chapter * 10
    assert len(text) > 2 * bpe._CHUNK
    code = Path(subprocess.__file__).read_text("utf-8")
    ids = gpt2.encode_arrays([text, code, ""])
    assert [part.tolist() for part in ids] == [theirs.encode_ordinary(t) for t in (text, code, "")]
    assert ids[0].dtype == np.uint16


def test_both_regex_engines_agree_on_letters() -> None:
    """Unicode grows yearly: two versions of it would split a new letter in two ways."""
    import tiktoken

    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    single = {bytes([b]): b for b in range(256)}
    for name in (r"\p{L}", r"\p{N}", r"\s"):
        encoding = tiktoken.Encoding(
            "class", pat_str=name, mergeable_ranks=single, special_tokens={"\0\0": 256}
        )
        rust = bytes(encoding.encode_ordinary(everything)).decode()
        split = pre_tokenizers.Split(tokenizers.Regex(name), "removed", invert=True)
        assert rust == "".join(piece for piece, _ in split.pre_tokenize_str(everything)), name
        if name == r"\s":
            assert [ord(c) for c in rust] == bpe._SPACES


@pytest.mark.parametrize(
    "run", ["a", " ", "\n", "-", "7", "日", "\n ", "ab", "\u3000", "'s"], ids=repr
)
def test_a_megabyte_without_a_break(gpt2: Tokenizer, run: str) -> None:
    text = run * (1_000_000 // len(run.encode())) + "x"
    ids = gpt2.encode_array(text)
    assert gpt2.decode(ids) == text
    short = run * (20_000 // len(run)) + "x"
    assert gpt2.encode(short) == gpt2._encode_by_reference([short])[0].tolist()


def test_chunks_and_batches_do_not_change_ids(trained: Tokenizer) -> None:
    long = (STORY + "\n\n \n" + "wide " * 30_000 + "   x") * 3
    assert len(long) > 3 * bpe._CHUNK
    batch = ["", STORY, "  ", long, "a \0 b", "\1", "", "\n\n"]
    alone = trained._encode_by_reference(batch)
    assert trained.encode_batch(batch) == [ids.tolist() for ids in alone]
    assert trained.encode_batch(batch[:4]) == [ids.tolist() for ids in alone[:4]]
    assert trained.encode_batch([]) == []


def test_training_is_deterministic_and_counts_endoftext(trained: Tokenizer) -> None:
    again = Tokenizer.train_bpe(iter([STORY]), 330)
    assert again.fingerprint == trained.fingerprint
    assert (trained.kind, trained.vocab_size, trained.eos_id) == ("bpe", 330, 329)
    assert len(trained.encode(STORY)) < len(STORY) / 2
    assert bpe.tiktoken_is_exact(
        {p: i for p, i in trained.vocab.items() if i < 329}, trained._merges
    )
    # A text can be used up: no pair is left that occurs twice.
    assert Tokenizer.train_bpe(["abab"], 5000).vocab_size == 258
    with pytest.raises(ValueError, match="vocab_size 256 is less than 257"):
        Tokenizer.train_bpe([STORY], 256)
    for empty in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            Tokenizer.train_bpe(empty, 300)
        with pytest.raises(ValueError, match="no text"):
            Tokenizer.char(empty)
    assert Tokenizer.train_bpe([STORY], 257).kind == "bpe"


def test_our_bpe_equals_tokenizers_on_real_text(real_data: Path) -> None:
    text = (real_data / "tinyshakespeare/input.txt").read_text("utf-8")
    ours = Tokenizer.train_bpe([text[:70_000]], 2048)
    assert ours.vocab_size == 2048
    assert bpe.tiktoken_is_exact({p: i for p, i in ours.vocab.items() if i < 2047}, ours._merges)
    unseen = [text[70_000:] * 5, (real_data / "wikitext-2/test.txt").read_text("utf-8")]
    assert len(unseen[0]) > bpe._CHUNK
    theirs = ours._encode_by_reference(unseen)
    assert all(map(np.array_equal, ours.encode_arrays(unseen), theirs))


def table(*rules: str, ids: list[int] | None = None) -> Tokenizer:
    """A byte-level tokenizer from merges written by hand, with the ids of their results."""
    from gptsmith.tokenizer.formats import byte_level_text

    vocab = {piece: i for i, piece in enumerate(bpe.byte_alphabet())}
    joined = dict.fromkeys(rule.replace(" ", "") for rule in rules)
    vocab |= dict(zip(joined, ids or range(256, 256 + len(joined)), strict=True))
    return Tokenizer(byte_level_text(vocab, list(rules)))


@pytest.mark.parametrize(
    "tokenizer",
    [
        table("b c", "a b", "ab c"),  # "abc" is a token that its own bytes never become
        table("a b", "b c", "a bc", "ab c"),  # two merges make one token
        table("a b", "b c", "c a", ids=[258, 257, 256]),  # ids against the order of merges
    ],
)
def test_tables_that_tiktoken_would_misread_are_not_ranked(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.kind == "bpe"
    assert not bpe.tiktoken_is_exact(dict(tokenizer.vocab), tokenizer._merges)
    theirs = stock(tokenizer, tmp_path)
    for text in ("abc", "abcabc", "cab bca", "aabbcc", "bcabc\0"):
        assert tokenizer.encode(text) == theirs.encode(text)


def test_gpt2_is_found_in_the_documented_places(real_data: Path, tmp_path: Path) -> None:
    script = "from gptsmith.tokenizer import Tokenizer; print(Tokenizer.gpt2().encode('Hello'))"
    environment = {k: v for k, v in os.environ.items() if k != "GPTSMITH_DATA"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def ask(**extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment | extra, capture_output=True, text=True)

    assert ask(GPTSMITH_DATA=str(real_data)).stdout == "[15496]\n"
    nowhere = ask()
    assert nowhere.returncode == 1
    assert "encoder.json and vocab.bpe into a folder" in nowhere.stderr
    assert "--tokenizer bpe" in nowhere.stderr
    start = time.monotonic()
    unreachable = ask(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - start < 10  # huggingface_hub would try for 24 seconds
    assert unreachable.stderr.splitlines()[-1].startswith(
        "ValueError: GPT-2's tokenizer is neither"
    )
    repository = tmp_path / "hub/models--openai-community--gpt2"
    snapshot = repository / "snapshots/0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    shutil.copy(real_data / "gpt2_bpe/encoder.json", snapshot / "vocab.json")
    shutil.copy(real_data / "gpt2_bpe/vocab.bpe", snapshot / "merges.txt")
    assert ask().stdout == "[15496]\n"
