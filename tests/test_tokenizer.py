import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from gptsmith.tokenizer import ENDOFTEXT, SPECIAL_TOKENS, Tokenizer, bpe

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


@pytest.fixture(scope="module")
def gpt2(real_data: Path) -> Tokenizer:
    return Tokenizer.gpt2(real_data / "gpt2_bpe")


@pytest.fixture(scope="module")
def stock_gpt2(real_data: Path, tmp_path_factory: pytest.TempPathFactory):
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(real_data / "gpt2_bpe/encoder.json", folder / "vocab.json")
    shutil.copy(real_data / "gpt2_bpe/vocab.bpe", folder / "merges.txt")
    return GPT2Tokenizer.from_pretrained(folder, split_special_tokens=True)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train_bpe([STORY], 330)


def stock(tokenizer: Tokenizer, folder: Path):
    """transformers' reading of the file that we write."""
    from transformers import PreTrainedTokenizerFast

    file = str(tokenizer.save(folder))
    return PreTrainedTokenizerFast(tokenizer_file=file, split_special_tokens=True)


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


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_stock_libraries_read_our_file(kind: str, trained: Tokenizer, tmp_path: Path) -> None:
    characters = st.sampled_from(sorted({*STORY, *"\n\t\0 \u3000😀é<|endoftext|>日"}))
    if kind == "char":
        ours = Tokenizer.char([STORY, "\n\t\0 \u3000😀é<|endoftext|>日"])
        texts = st.text(characters)
    else:
        ours = trained if kind == "bpe" else Tokenizer.byte()
        texts = any_text
    ours = ours.add_special_tokens(SPECIAL_TOKENS)
    theirs = stock(ours, tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.encode_special_tokens = True
    assert ours.kind == kind
    assert len(theirs) == ours.vocab_size
    specials = set(ours.special_tokens.values())

    @quick
    @given(texts)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text) == raw.encode(text).ids
        assert not specials & set(ids)
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert int(ours.token_bytes()[ids].sum()) == len(text.encode())
        chat = [ours.special_tokens["<|user|>"], *ids, ours.special_tokens["<|end|>"]]
        assert ours.decode(chat) == theirs.decode(chat) == f"<|user|>{text}<|end|>"

    check()


@pytest.mark.parametrize("name", ["gpt2", "bpe", "byte", "char"])
def test_stream_splits_no_character(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer
    if name == "gpt2":
        tokenizer = request.getfixturevalue("gpt2")
    else:
        chars = Tokenizer.char([STORY + "😀日"])
        tokenizer = {"byte": Tokenizer.byte(), "char": chars}.get(name) or Tokenizer.train_bpe(
            [STORY], 300
        )

    @quick
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 40)))
    def any_ids(ids: list[int]) -> None:
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids)

    any_ids()
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in tokenizer.encode("日 😀 d" if name != "char" else "日 😀")]
    assert "\ufffd" not in "".join(parts)
    assert stream.flush() == ""


def test_lone_surrogates_and_unknown_characters(gpt2: Tokenizer, trained: Tokenizer) -> None:
    for tokenizer in (gpt2, trained, Tokenizer.byte(), Tokenizer.char(["abc"])):
        for text in ("abc\ud83d", "\udfff", "\0\ud800"):
            with pytest.raises(ValueError, match=r"lone surrogate U\+D.* at offset \d") as raised:
                tokenizer.encode(text)
            assert not isinstance(raised.value, UnicodeError)
            assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"'é' at offset 2 .* one of the 3 .* byte or bpe"):
        Tokenizer.char(["abc"]).encode("abé\U0010ffff")
    with pytest.raises(ValueError, match=r"U0010ffff' at offset 0"):
        Tokenizer.char(["abc"]).encode("\U0010ffff")
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer.train_bpe(["abc\ud83d"], 300)
    for bad in (-1, 50257):
        with pytest.raises(ValueError, match=rf"token id {bad} is outside 0\.\.50256"):
            gpt2.decode([5, bad])


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


def test_save_load_pickle(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = trained.save(tmp_path / "folder")
    assert file == tmp_path / "folder/tokenizer.json"
    assert trained.save(tmp_path / "other.json").name == "other.json"
    for loaded in (
        Tokenizer.load(tmp_path / "folder"),
        Tokenizer.load(str(file)),
        pickle.loads(pickle.dumps(trained)),
    ):
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.kind == "bpe"
        assert loaded.encode(STORY) == trained.encode(STORY)
    # A file that `tokenizers` has rewritten in its own manner is still the same kind.
    tokenizers.Tokenizer.from_file(str(file)).save(str(tmp_path / "theirs.json"))
    theirs = Tokenizer.load(tmp_path / "theirs.json")
    assert theirs.kind == "bpe"
    assert theirs.encode(STORY) == trained.encode(STORY)
    for kind in (Tokenizer.byte(), Tokenizer.char([STORY])):
        assert Tokenizer.load(kind.save(tmp_path)).kind == kind.kind


def test_invalid_tokenizer_files_are_rejected(tmp_path: Path, real_data: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such file"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer here"):
        Tokenizer.load(tmp_path)
    bad = tmp_path / "bad.json"
    for content, message in [
        (b'{"model":\n oops}', r"bad\.json, line 2, column 2: not JSON"),
        (b"[1, 2]", r'bad\.json: not a tokenizer\.json .*no "model"'),
        (b'{"model": {"type": "Nonsense"}}', r"bad\.json: `tokenizers` cannot read it"),
        (b"\xff\xfe", r"bad\.json, byte 0: not UTF-8"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            Tokenizer.load(bad)
        assert "\n" not in str(raised.value)

    folder = tmp_path / "gpt2"
    folder.mkdir()
    shutil.copy(real_data / "gpt2_bpe/encoder.json", folder / "vocab.json")
    merges = (real_data / "gpt2_bpe/vocab.bpe").read_text("utf-8")
    for content, message in [
        (merges[: len(merges) // 2].rpartition("\n")[0], r"not GPT-2's tables"),
        ("#version: 0.2\n\u0120 t\nh\n", r"merges\.txt, line 3: expected two tokens, got 'h'"),
        ("t h\nqq zz\n", r"merges\.txt, line 2: 'qqzz' is not in"),
    ]:
        (folder / "merges.txt").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Tokenizer.gpt2(folder)
    (folder / "merges.txt").write_text("\u0120 t\r\nh e\r\n", encoding="utf-8")
    assert Tokenizer.load(folder).kind == "bpe"


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


def foreign(kind: str) -> tokenizers.Tokenizer:
    """Small tokenizers of the families that other models come with."""
    words = ["the", "smith", "ring", "for", "##ged", "é", "日", ".", ",", "a", "!"]
    if kind == "wordpiece":
        vocab = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", *words])}
        made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        pair = [("[CLS]", 1), ("[SEP]", 2)]
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, pair)
        made.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
        made.enable_truncation(4)
        made.enable_padding(length=8, pad_token="[UNK]")
    elif kind == "sentencepiece":
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        pieces += ["▁", "t", "h", "e", "▁t", "he", "▁the"]
        rules = [("▁", "t"), ("h", "e"), ("▁t", "he")]
        vocab = {p: i for i, p in enumerate(pieces)}
        made = tokenizers.Tokenizer(
            models.BPE(vocab, rules, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        made.add_special_tokens(["<unk>", "<s>", "</s>"])
    else:  # a byte-level table with another split, as Qwen's or Llama 3's
        made = tokenizers.Tokenizer.from_str(Tokenizer.train_bpe([STORY], 330).to_json())
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(r"\p{N}|\s*[^\s\p{N}]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.add_tokens(["<think>"])
    return made


def test_prompt_starts_with_the_prefix_of_the_file() -> None:
    ours = Tokenizer.byte()
    assert ours.prompt("a") == ours.encode("a")
    assert ours.prompt("") == [ours.eos_id]
    llama = foreign("sentencepiece")
    assert Tokenizer(llama.to_str()).prefix == ()
    llama.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 1), ("</s>", 2)]
    )
    begins = Tokenizer(llama.to_str())
    assert begins.prompt("the") == [1, *begins.encode("the")]
    assert begins.prompt("") == [1]


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece", "bytelevel"])
def test_other_files_are_encoded_by_tokenizers(kind: str, tmp_path: Path) -> None:
    made = foreign(kind)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    assert ours.kind == "other"
    assert ours.vocab_size == made.get_vocab_size()
    for text in ("the smith forged the ring.", "the", " 日é\n", "</s> [SEP] <|endoftext|>", ""):
        ids = made.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == made.decode(ids, skip_special_tokens=False)
        assert ours.decode_bytes(ids).decode(errors="replace") == ours.decode(ids)
        assert not set(ids) & (set(ours.special_tokens.values()) - {0})
        stream = ours.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)
        sizes = ours.token_bytes()
        assert (sizes is None) == (kind != "bytelevel")
        assert sizes is None or sizes[ids].sum() == len(text.encode())

    tuned = ours.add_special_tokens(SPECIAL_TOKENS)
    assert tuned.special_tokens["<|end|>"] == tuned.vocab_size - 1
    assert tuned.encode("the <|end|>") == ours.encode("the <|end|>")
    assert tuned.eos_id == tuned.special_tokens[ENDOFTEXT]
    if kind == "sentencepiece":
        assert ours.eos_id == ours.special_tokens["</s>"]
    if kind == "wordpiece":
        with pytest.raises(ValueError, match=r"nothing says which .*\[UNK\].*--eos-token"):
            _ = ours.eos_id


def test_special_tokens_are_rejected_where_they_would_change_ids(trained: Tokenizer) -> None:
    for name in ("", "e", "he"):
        with pytest.raises(
            ValueError, match=f"special token '{name}' is empty or already an ordinary"
        ):
            trained.add_special_tokens([name])
    document = json.loads(foreign("wordpiece").to_str())
    document["model"]["vocab"]["gap"] = 40
    with pytest.raises(ValueError, match="ids have gaps"):
        Tokenizer(json.dumps(document)).add_special_tokens(["<|pad|>"])


def test_dtype_follows_the_largest_id() -> None:
    points = [chr(c) for c in range(0xE000 + 65_536 - 1) if not 0xD800 <= c < 0xE000]
    small, large = points[:65_535], points[:65_536]
    assert Tokenizer.char(small).dtype == np.uint16
    tokenizer = Tokenizer.char(large)
    assert tokenizer.dtype == np.uint32
    assert tokenizer.encode(large[-1]) == [65_535]
    assert Tokenizer.byte().encode_array("é").dtype == np.uint16


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char"])
def test_special_tokens_are_read_from_text_only_with_allow_special(
    kind: str, real_data: Path
) -> None:
    text = "a<|end|><|user|>b<|end"
    make = {
        "gpt2": lambda: Tokenizer.gpt2(real_data / "gpt2_bpe"),
        "byte": Tokenizer.byte,
        "char": lambda: Tokenizer.char([text]),
    }
    tokenizer = make[kind]().add_special_tokens(["<|end|>", "<|user|>", "<|end"])
    end, user, short = (tokenizer.special_tokens[name] for name in ("<|end|>", "<|user|>", "<|end"))
    plain = tokenizer.encode(text)
    assert not {end, user, short} & set(plain)
    assert tokenizer.encode(text, allow_special=True) == [
        *tokenizer.encode("a"), end, user, *tokenizer.encode("b"), short,
    ]  # fmt: skip
    assert tokenizer.decode(plain) == tokenizer.decode(tokenizer.encode(text, allow_special=True))
    assert tokenizer.encode("", allow_special=True) == []
