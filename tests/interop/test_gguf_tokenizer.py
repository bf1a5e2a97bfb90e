"""Tokenizers in the terms of llama.cpp, which itself is tested in test_llama_cpp.py."""

import json
from typing import Any

import pytest

from gptsmith.interop import gguf_tokenizer
from gptsmith.tokenizer import Tokenizer, TokenRoles, bpe


def test_character_merges() -> None:
    table = gguf_tokenizer.table(Tokenizer.char(["aé漢字🙂"]))
    assert [bpe.to_bytes(token).decode() for token in table.tokens[:-1]] == list("aé字漢🙂")
    for character in "aé漢字🙂":
        pieces = [bytes([byte]) for byte in character.encode()]
        for left, right in (map(bpe.to_bytes, merge.split(" ")) for merge in table.merges):
            while len(pieces) > 1 and pieces[:2] == [left, right]:
                pieces[:2] = [left + right]
        assert pieces == [character.encode()]
    assert table.notes == ["llama.cpp silently drops characters that are not in the vocabulary"]


def with_split(*steps: dict[str, Any], **model: Any) -> Tokenizer:
    """A BPE of ours behind other ways of cutting text, as other families publish theirs."""
    document = json.loads(Tokenizer.train_bpe(["one two three one two"] * 9, 280).to_json())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    document["model"] |= model
    return Tokenizer(json.dumps(document, ensure_ascii=False))


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = dict(WORDS, use_regex=False)
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gpt-2", with_split(WORDS)),
        ("smollm", with_split(DIGITS, WORDS)),
        ("llama-bpe", with_split(split(PATTERN), BYTES, ignore_merges=True)),
        ("qwen2", with_split(split(PATTERN.replace("{1,3}", "")), BYTES)),
    ],
)
def test_known_splits(name: str, tokenizer: Tokenizer) -> None:
    assert gguf_tokenizer.table(tokenizer).pre == name


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (with_split(split(PATTERN), BYTES), "an unknown expression"),
        (with_split(split(r"\w+|\W+"), BYTES), "splits text by Split and ByteLevel"),
        (with_split(split(PATTERN, "Removed"), BYTES), "splits text by Split and ByteLevel"),
        (
            with_split(split(PATTERN), DIGITS, BYTES),
            "splits text by Split and Digits and ByteLevel",
        ),
        (with_split(BYTES), "splits text by ByteLevel"),
        (with_split(dict(WORDS, add_prefix_space=True)), "splits text by ByteLevel"),
        (with_split(WORDS, unk_token="a"), "not plain byte-level BPE (unk_token)"),
    ],
)
def test_unknown_splits_are_rejected(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(ValueError, match="cannot compute this tokenizer") as error:
        gguf_tokenizer.table(tokenizer)
    assert message in str(error.value)
    assert "--format hf" in str(error.value)


def test_notes_and_bos_of_other_tokenizers() -> None:
    """A token before every text, tokens that are plain text, numbers without a token, NFC."""
    document = json.loads(with_split(WORDS).to_json())
    size = max(document["model"]["vocab"].values()) + 1
    begin = dict(document["added_tokens"][0], id=size + 1, content="<|begin_of_text|>")
    tag = dict(begin, id=size + 2, content="<tag>", special=False, lstrip=True)
    document["added_tokens"] += [begin, tag]
    document["normalizer"] = {"type": "NFC"}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {
                "id": "<|begin_of_text|>",
                "ids": [size + 1],
                "tokens": ["<|begin_of_text|>"],
            }
        },
    }
    document["model"]["vocab"]["Ġgap"] = size + 3
    table = gguf_tokenizer.table(Tokenizer(json.dumps(document, ensure_ascii=False)))
    assert table.add_bos
    assert table.bos == size + 1
    assert table.tokens[size:] == [f"[PAD{size}]", "<|begin_of_text|>", "<tag>", "Ġgap"]
    assert table.types[size:] == [5, 3, 4, 1]
    assert "NFC" in table.notes[0]
    assert "white space around <tag>" in table.notes[1]
    assert len(table.notes) == 2


def test_ids_are_those_that_the_tokenizer_gives() -> None:
    """`tokenizers` numbers added tokens on, whatever ids the file claims for them."""
    document = json.loads(with_split(WORDS).to_json())
    size = max(document["model"]["vocab"].values()) + 1
    document["added_tokens"].append(dict(document["added_tokens"][0], id=900, content="<far>"))
    table = gguf_tokenizer.table(Tokenizer(json.dumps(document, ensure_ascii=False)))
    assert table.tokens[size:] == ["<far>"]


def test_names_of_ids_without_a_token_are_unused() -> None:
    document = json.loads(with_split(WORDS).to_json())
    size = max(document["model"]["vocab"].values()) + 1
    document["model"]["vocab"][f"[PAD{size}]"] = size + 1
    table = gguf_tokenizer.table(Tokenizer(json.dumps(document, ensure_ascii=False)))
    assert table.tokens[size:] == [f"[PAD{size}]_", f"[PAD{size}]"]


def test_tokens_that_a_gguf_spells_alike_are_rejected() -> None:
    """The bytes of é are written Ã© in GPT-2's alphabet."""
    tokenizer = Tokenizer.char(["é"]).add_special_tokens(["Ã©"])
    with pytest.raises(ValueError, match="two tokens that a GGUF spells 'Ã©'"):
        gguf_tokenizer.table(tokenizer)


def test_roles_of_special_tokens_are_those_of_the_model() -> None:
    def piece(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    tokenizer = Tokenizer.byte().add_special_tokens(["<go>", "<fin>", "<halt>"])
    document = json.loads(tokenizer.to_json())
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece("<go>"), {"Sequence": {"id": "A", "type_id": 0}}, piece("<fin>")],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {n: {"id": n, "ids": [ids[n]], "tokens": [n]} for n in ("<go>", "<fin>")},
    }  # fmt: skip
    generation = {"eos_token_id": [ids["<halt>"], ids["<fin>"]]}
    roles = TokenRoles({"bos_token": "<go>", "eos_token": "<fin>"}, {}, generation)
    made = gguf_tokenizer.table(Tokenizer(json.dumps(document), roles=roles))
    assert (made.bos, made.eos, made.pad) == (ids["<go>"], ids["<fin>"], None)
    assert made.eos_ids == (ids["<fin>"], ids["<halt>"])
    assert (made.add_bos, made.add_eos) == (True, True)
