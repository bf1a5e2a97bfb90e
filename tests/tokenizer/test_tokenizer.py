"""Every kind of tokenizer: files, special tokens, streams, and what is rejected."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_texts import STORY, any_text, quick, stock
from tokenizers import decoders, models, pre_tokenizers, processors

from gptsmith.tokenizer import ENDOFTEXT, SPECIAL_TOKENS, Tokenizer


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
    (folder / "merges.txt").write_bytes(b"t h\xff\n")
    with pytest.raises(ValueError, match=r"merges\.txt, byte 3: not UTF-8"):
        Tokenizer.load(folder)
    (folder / "merges.txt").write_text("\u0120 t\r\nh e\r\n", encoding="utf-8")
    assert Tokenizer.load(folder).kind == "bpe"


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
