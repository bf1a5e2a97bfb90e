"""Chat sets: token ids with labels, prepared files, and what is rejected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import BYTES, talk
from tables import write

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import TEMPLATE, ChatTemplate
from gptsmith.data.chat import ChatCounts, _provenance, load_chat, write_chat
from gptsmith.data.examples import Examples, write_examples
from gptsmith.data.options import ChatFiles, Labels

T = 40
TALKS = [talk("a", "b"), talk("cd", "e", "f", "gh")]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write(tmp_path / "chat.jsonl", *({"messages": messages} for messages in TALKS))


def load(
    path: Path, template: ChatTemplate, T: int = T, **more: Any
) -> tuple[Examples, ChatCounts]:
    return load_chat([path], ChatFiles(**more), template, T)


def unshifted(template: ChatTemplate) -> list[dict[str, list[int]]]:
    rows = []
    for messages in TALKS:
        ids, scored, _ = template.encode(messages)
        labels = [i if s else IGNORE_INDEX for i, s in zip(ids, scored, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def shifted(rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": r["input_ids"], "labels": [*r["labels"][1:], IGNORE_INDEX]} for r in rows]


def shorter(rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Shifted, with the last token in the labels only."""
    return [{"input_ids": r["input_ids"][:-1], "labels": r["labels"][1:]} for r in rows]


def padded(rows: list[dict[str, list[int]]], mask: bool) -> list[dict[str, list[int]]]:
    out = []
    for row in rows:
        n = 30 - len(row["input_ids"])
        new = {
            "input_ids": row["input_ids"] + [0] * n,
            "labels": row["labels"] + [IGNORE_INDEX] * n,
        }
        if mask:
            new["attention_mask"] = [1] * len(row["input_ids"]) + [0] * n
        out.append(new)
    return out


@pytest.mark.parametrize("form", ["unshifted", "shifted", "shorter", "padded", "masked"])
@pytest.mark.parametrize("labels", ["auto", "said"])
def test_token_ids_are_the_same_examples(
    tmp_path: Path, chat: Path, template: ChatTemplate, form: str, labels: str
) -> None:
    rows = unshifted(template)
    forms = {
        "unshifted": rows, "shifted": shifted(rows), "shorter": shorter(rows),
        "padded": padded(rows, mask=False), "masked": padded(shorter(rows), mask=True),
    }  # fmt: skip
    kind: Labels = "auto"
    if labels == "said":
        kind = "unshifted" if form in ("unshifted", "padded") else "shifted"
    path = write(tmp_path / "ids.parquet", *forms[form])
    expected, _ = load(chat, template)
    examples, counts = load(path, template, labels=kind)
    assert examples.fingerprint == expected.fingerprint
    assert [e.name for e in examples] == [f"{path}, row 1", f"{path}, row 2"]
    assert (counts.kept, counts.kept_answers, counts.remarks.total) == (2, 3, 0)


def test_a_dataset_saved_by_datasets(tmp_path: Path, chat: Path, template: ChatTemplate) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(unshifted(template)).save_to_disk(tmp_path / "ids")
    datasets.Dataset.from_list([{"messages": t} for t in TALKS]).save_to_disk(tmp_path / "text")
    expected, _ = load(chat, template)
    for name in ("ids", "text"):
        assert load(tmp_path / name, template)[0].fingerprint == expected.fingerprint


def rejected(path: Path, template: ChatTemplate, **more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, template, **more)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.replace(str(path), "")) < 300
    assert "\n" not in text
    return text.replace(str(path), path.name)


def test_ambiguous_labels_are_rejected(tmp_path: Path, template: ChatTemplate) -> None:
    end = BYTES.special_tokens["<|end|>"]
    both = write(
        tmp_path / "a.parquet", *[{"input_ids": [7, end, end], "labels": [-100, end, end]}]
    )
    said = rejected(both, template)
    assert said.startswith("a.parquet: cannot tell whether labels are shifted (both")
    assert "--labels unshifted" in said
    assert load(both, template, labels="unshifted")[0][0].labels.tolist() == [-100, end, end]
    mixed = unshifted(template)[:1] + shifted(unshifted(template))[1:]
    assert "(some rows fit" in rejected(write(tmp_path / "b.parquet", *mixed), template)
    wrong = [{"input_ids": [1, 2, 3], "labels": [3, 1, 2]}]
    path = write(tmp_path / "c.parquet", *wrong)
    assert rejected(path, template).startswith("c.parquet, row 1: labels are neither")
    assert "not shifted" in rejected(path, template, labels="shifted")
    alone = write(tmp_path / "d.parquet", {"input_ids": [1, 2, 3]})
    assert "no column 'labels'" in rejected(alone, template)
    assert "no column 'labels'" in rejected(alone, template, labels="shifted")
    uneven = write(tmp_path / "e.parquet", {"input_ids": [1, 2, 3], "labels": [1]})
    assert "row 1: 1 labels for 3" in rejected(uneven, template)
    large = write(tmp_path / "f.parquet", {"input_ids": [1, 999], "labels": [1, 999]})
    assert "row 1: token id 999 is outside the tokenizer's 0..261" in rejected(large, template)


def test_sets_without_targets_are_rejected(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    rows = unshifted(template)
    masked = [r | {"labels": [IGNORE_INDEX] * len(r["labels"])} for r in rows]
    path = write(tmp_path / "a.parquet", *masked)
    assert rejected(path, template, labels="unshifted").startswith("a.parquet: every label is -100")
    end = BYTES.special_tokens["<|end|>"]
    endless = [r | {"labels": [IGNORE_INDEX if i == end else i for i in r["labels"]]} for r in rows]
    said = rejected(write(tmp_path / "b.parquet", *endless), template)
    assert said.startswith("b.parquet, row 1: <|end|> after an answer is not a target")
    cut = [{k: v[:-1] for k, v in rows[0].items()}]
    said = rejected(write(tmp_path / "c.parquet", *cut), template)
    assert "none of the 1 answers of this set ends with <|end|>" in said
    assert "no conversation is left: left out: 3 of 3 answers (100.0%)" in rejected(
        chat, template, T=3
    )
    with pytest.raises(ValueError, match="--on-error"):
        load(write(tmp_path / "d.parquet", {"messages": None}), template)


def test_long_token_rows_are_divided_into_windows(tmp_path: Path, template: ChatTemplate) -> None:
    rows = unshifted(template)
    path = write(tmp_path / "a.parquet", *rows)
    lengths = [len(r["input_ids"]) for r in rows]
    examples, counts = load(path, template, T=lengths[1] - 2)
    assert counts.remarks.lines() == [
        f"divided into windows of at most {lengths[1] - 1} tokens: 1 ({path}, row 2)"
    ]
    assert (counts.kept_answers, counts.answers, len(examples)) == (3, 3, 3)
    parts = [e.ids.tolist() for e in examples]
    assert parts[1] + parts[2] == rows[1]["input_ids"]
    assert {int(e.ids[-1]) for e in examples} == {BYTES.special_tokens["<|end|>"]}


# --- prepared files ------------------------------------------------------------------------------


def test_prepared_file_gives_the_same_examples(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    out = tmp_path / "new" / "chat.arrow"

    def write(**more: Any) -> ChatCounts:
        return write_chat([chat], ChatFiles(), template, T, out, **more)

    assert write().kept == 2
    direct, _ = load(chat, template)
    prepared, counts = load(out, template)
    assert prepared.fingerprint == direct.fingerprint
    assert (counts.read, counts.kept, counts.answers, counts.kept_answers) == (2, 2, 3, 3)
    assert str(counts) == "all 3 answers of 2 conversations are trained on"
    assert [e.name for e in prepared] == [e.name for e in direct]
    assert len(load(out, template, T=100)[0]) == 2
    with pytest.raises(FileExistsError, match="--overwrite"):
        write()
    first = out.read_bytes()
    write(overwrite=True)
    assert out.read_bytes() == first
    with pytest.raises(ValueError, match=r"ends in \.arrow"):
        write_chat([chat], ChatFiles(), template, T, tmp_path / "x.json")


def test_prepared_file_is_divided_for_shorter_rows(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    out = tmp_path / "chat.arrow"
    write_chat([chat], ChatFiles(), template, T, out)
    for rows in (12, 8, 6, 5):
        direct, expected = load(chat, template, T=rows)
        examples, counts = load(out, template, T=rows)
        assert examples.fingerprint == direct.fingerprint
        assert str(counts).startswith(str(expected))
    assert str(counts).startswith("left out: 2 of 3 answers (66.7%)")
    with pytest.raises(ValueError, match=r"chat\.arrow: no conversation is left: left out: 3 of 3"):
        load(out, template, T=3)


def test_what_was_left_out_of_a_prepared_file_is_said_when_it_is_read(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    out = tmp_path / "chat.arrow"
    write_chat([chat], ChatFiles(), template, 5, out)
    _, counts = load(out, template)
    assert str(counts).startswith("left out: 2 of 3 answers (66.7%), as a turn is longer")


def test_prepared_file_of_an_earlier_version_is_read(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    """It does not say how many answers it has."""
    out = tmp_path / "chat.arrow"
    examples, _ = load(chat, template)
    write_examples(out, examples, _provenance(template, T))
    prepared, counts = load(out, template)
    assert prepared.fingerprint == examples.fingerprint
    assert str(counts) == "all 3 answers of 2 conversations are trained on"


def test_prepared_file_of_a_newer_format_is_named(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    out = tmp_path / "chat.arrow"
    examples, _ = load(chat, template)
    write_examples(out, examples, _provenance(template, T) | {"format": 2})
    assert rejected(out, template) == (
        "chat.arrow: format 2, this gptsmith reads format 1: install a newer gptsmith, or prepare "
        "it again with --format chat --tokenizer RUN"
    )


def test_prepared_file_of_another_tokenizer_or_template_is_rejected(
    tmp_path: Path, chat: Path, template: ChatTemplate
) -> None:
    out = tmp_path / "chat.arrow"
    write_chat([chat], ChatFiles(), template, T, out)
    other = ChatTemplate(TEMPLATE + " ", BYTES)
    assert "another template" in rejected(out, other)
    more = BYTES.add_special_tokens(["<|more|>"])
    with pytest.raises(ValueError, match="another tokenizer"):
        load_chat([out], ChatFiles(), ChatTemplate(TEMPLATE, more), T)


def test_rejected_set_leaves_no_file(tmp_path: Path, chat: Path, template: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="no conversation is left"):
        write_chat([chat], ChatFiles(), template, 3, tmp_path / "chat.arrow")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


def test_template_that_differs_in_chat_is_rejected(tmp_path: Path, chat: Path) -> None:
    source = TEMPLATE.replace("{{- '<|assistant|>' -}}", "{{- '<|assistant|>Well, ' -}}")
    with pytest.raises(ValueError, match="differs between training and chatting"):
        load(chat, ChatTemplate(source, BYTES))
    out = tmp_path / "chat.arrow"
    with pytest.raises(ValueError, match="differs between training and chatting"):
        write_chat([chat], ChatFiles(), ChatTemplate(source, BYTES), T, out)
    assert not out.exists()


def test_real_conversations_prepared_and_read(
    tmp_path: Path, real_data: Path, template: ChatTemplate
) -> None:
    source = real_data / "chat_taskmaster4" / "data_07.json.gz"
    examples, counts = load(source, template, T=256)
    write_chat([source], ChatFiles(), template, 256, tmp_path / "a.arrow")
    mapped, _ = load(tmp_path / "a.arrow", template, T=256)
    assert mapped.fingerprint == examples.fingerprint
    assert counts.read == 20
    assert (counts.answers, counts.kept_answers) == (35, 35)
    assert counts.remarks.total > 0
    assert int(mapped.lengths.max()) <= 257
    for example in mapped:
        assert example.labels[-1] == example.ids[-1] == template.stop_ids[0]
        scored = example.labels != IGNORE_INDEX
        assert (example.labels[scored] == example.ids[scored]).all()
        assert isinstance(example.ids, np.ndarray)
