"""Untrusted tokenizer.json files: what runs here, what runs in a worker, and what ends it there."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptsmith import sandbox
from gptsmith.tokenizer import Tokenizer, reference

TEXTS = ["", "the cats", "a b  c\n", "Ünïcode 🙂", "x" * 300]
VOCAB = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3} | {c: 4 + i for i, c in enumerate("abcdexyz")}


def document(**changes: Any) -> dict[str, Any]:
    """A WordPiece tokenizer with some of its parts replaced."""
    made = hf.Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[EOS]"])
    found: dict[str, Any] = json.loads(made.to_str()) | changes
    return found


def split(regex: str) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(what: dict[str, str], by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": what, "content": by}


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
HERE: list[dict[str, Any]] = [
    {},
    {"pre_tokenizer": split(GPT2)},
    {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": " "}, "▁")]}},
]
THERE: list[dict[str, Any]] = [
    {"pre_tokenizer": split(r"\s+|\w+")},
    {"normalizer": replace({"Regex": " {2,}"}, " ")},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("[a-c]"), split("e")]}},
]


@pytest.mark.parametrize("changes", HERE + THERE)
def test_ids_and_texts_are_those_of_the_library(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(document(**changes))
    theirs = hf.Tokenizer.from_str(text)
    theirs.encode_special_tokens = True
    ours = Tokenizer(text)
    if changes in HERE:
        monkeypatch.setattr(sandbox, "call", None)
    assert ours.special_tokens == {"[UNK]": 0, "[EOS]": 12}
    assert ours.vocab_size == 13
    for one in TEXTS:
        ids = ours.encode(one)
        assert ids == theirs.encode(one, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.encode_batch(TEXTS) == [ours.encode(one) for one in TEXTS]
    assert ours.encode_batch([]) == []
    if changes in THERE:
        monkeypatch.setattr(sandbox, "call", None)
        with pytest.raises(TypeError):
            ours.encode("the")


def grown(times: int, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [*parts] * times}


BOMBS: dict[str, dict[str, Any]] = {
    "regex": {"pre_tokenizer": split("(a+)+$|(a|aa)+b")},
    "regex in a normalizer": {"normalizer": replace({"Regex": "(x+x+)+y"}, "")},
    "quadratic regex": {"pre_tokenizer": split(r"(.*)(.*)(.*)(.*)(.*)[0-9]")},
    "replacements": {"normalizer": grown(4, replace({"String": "a"}, "a" * 1000))},
    "one large replacement": {"normalizer": replace({"String": "a"}, "a" * 10_000_000)},
    "many small replacements": {"normalizer": grown(40, replace({"String": "a"}, "aa"))},
    "empty matches": {"normalizer": grown(9, replace({"Regex": "z*"}, "aaaaaaaaaaaaaaaa"))},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "a" * 2_000_000}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_time_and_memory_of_encoding_are_bounded(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SECONDS", 0.5)
    tokenizer = Tokenizer(json.dumps(document(**BOMBS[name])), "far/tokenizer.json")
    started = time.process_time()
    try:
        ids = tokenizer.encode("a" * 40 + "x" * 40 + " the cats " + "a" * 4000)
    except ValueError as caught:
        error = str(caught)
    else:  # the library gave up on a regular expression, or was fast
        error = "far/tokenizer.json: "
        assert len(ids) < 1_000_000
    assert error.startswith("far/tokenizer.json: ")
    assert len(error.splitlines()) == 1
    assert time.process_time() - started < 2  # of this process
    assert capfd.readouterr() == ("", "")


def test_decoders_are_bounded() -> None:
    grows = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4
    tokenizer = Tokenizer(json.dumps(document(decoder={"type": "Sequence", "decoders": grows})))
    with pytest.raises(ValueError, match=r"^[^\n]*the tokenizer (was stopped|crashed, or needs)"):
        tokenizer.decode([VOCAB["a"]] * 50)


def test_a_decoder_that_panics_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    strip = {"type": "Strip", "content": "a", "start": 0, "stop": 9}
    with pytest.raises(ValueError, match=r"^[^\n]*cannot decode with it"):
        Tokenizer(json.dumps(document(decoder=strip))).decode([VOCAB["a"]])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": ["x"]},
        {"added_tokens": [5]},
        {"added_tokens": [{"id": 13, "content": 5, "special": True}]},
        {"added_tokens": {"a": 1}},
        {"added_tokens": [{"id": "1", "content": 5}]},
        {"model": {"type": "BPE", "vocab": {"a": 0.0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": [1]}, "merges": [5]}},
        {"model": {"type": "BPE", "vocab": ["a"], "merges": None}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
        {"model": {"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"}},
        {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1, "ab": 2},
                "merges": [["a", "b"]],
                "continuing_subword_prefix": "##",
            }
        },
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"pre_tokenizer": split("(((")},
        {"pre_tokenizer": "ByteLevel"},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": "x", "content": 5}},
        {"decoder": {"type": "Nothing"}},
    ],
)
def test_malformed_documents_are_rejected_in_one_line(
    changes: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^far/tokenizer\.json[^\n]*$"):
        Tokenizer(json.dumps(document(**changes)), "far/tokenizer.json").encode("the cats")
    assert capfd.readouterr() == ("", "")


def test_post_processors_that_name_no_token_are_rejected() -> None:
    pieces = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    after = {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}
    with pytest.raises(ValueError, match=r"^[^\n]*post_processor"):
        Tokenizer(json.dumps(document(post_processor=after))).prompt("a")


@pytest.mark.parametrize("text", ['{"model": ' + "[" * 100_000, '{"model": ' + "9" * 5000])
def test_json_that_cannot_be_parsed_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^far/tokenizer\.json[^\n]{1,200}$"):
        Tokenizer(text, "far/tokenizer.json")


def test_files_of_many_megabytes_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match=r"tokenizer\.json: 68,157,440 bytes, more than"):
        Tokenizer.load(path)


def test_merges_of_tokens_that_are_not_there_are_rejected() -> None:
    text = Tokenizer.train_bpe(["the best of times, the best"] * 3, 270).to_json()
    changed = json.loads(text)
    for parts in (["t", "Z"], ["Z", "t"], ["b", "t"]):
        changed["model"]["merges"] = [*json.loads(text)["model"]["merges"], " ".join(parts)]
        with pytest.raises(ValueError, match=r"^far[^\n]*out of vocabulary"):
            Tokenizer(json.dumps(changed), "far").encode("the best")


def test_added_tokens_that_are_not_text_are_rejected() -> None:
    changed = json.loads(Tokenizer.char(["abc"]).to_json())
    changed["added_tokens"][0]["content"] = 5
    with pytest.raises(ValueError, match=r"^far[^\n]*cannot read it"):
        Tokenizer(json.dumps(changed), "far")
