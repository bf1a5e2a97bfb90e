"""Tables of token ids: documents or one stream, and whether labels are shifted."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import write
from text_sources import opened, read

from gptsmith.data.report import ReadReport
from gptsmith.tokenizer import DocumentTokens


def ids_of(tmp_path: Path, **columns: list[list[int]]) -> tuple[str, list[list[int]]]:
    """The arrangement of a table of ids, and its documents."""
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table(columns), path)
    report = ReadReport()
    tables = opened(path, report).token_ids
    assert tables is not None
    found = tables.documents(DocumentTokens((0,)), 100, report)
    return str(tables), [np.concatenate(list(d.chunks)).tolist() for d in found]


def test_rows_of_ids_are_documents(tmp_path: Path) -> None:
    layout, found = ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 9], [0, 1, 2, 3], [4, 0]])
    assert "one document each, labels: none" in layout
    assert found == [[5, 6, 7], [8, 9], [1, 2, 3], [4]]


def test_rows_of_equal_length_are_a_stream(tmp_path: Path) -> None:
    layout, found = ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 0, 9], [1]])
    assert "one stream" in layout
    assert found == [[5, 6, 7, 8, 0, 9, 1]]


def test_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    for bad in (-2, 100):
        with pytest.raises(ValueError, match=rf"row 2: token id {bad} is outside .* 0\.\.99"):
            ids_of(tmp_path, input_ids=[[5, 6], [99, bad, 7]])


def test_shift_of_labels_is_detected(tmp_path: Path) -> None:
    ids = [[5, 6, 7], [8, 9, 1]]
    layout, found = ids_of(tmp_path, input_ids=ids, labels=[[5, 6, 7], [-100, 9, 1]])
    assert "one stream, labels: unshifted" in layout
    assert found == [[5, 6, 7, 8, 9, 1]]
    layout, found = ids_of(tmp_path, input_ids=ids, labels=[[6, 7, 8], [9, 1, 2]])
    assert "one stream, labels: shifted" in layout
    assert found == [[5, 6, 7, 8, 9, 1, 2]]
    layout, found = ids_of(tmp_path, input_ids=ids, labels=[[6, 7, 4], [9, 1, -100]])
    assert "one document each, labels: shifted" in layout
    assert found == [[5, 6, 7, 4], [8, 9, 1]]


def test_padding_is_removed(tmp_path: Path) -> None:
    mask = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    _, found = ids_of(tmp_path, input_ids=[[5, 6, 0], [7, 0, 0], [8, 9, 1]], attention_mask=mask)
    assert found == [[5, 6], [7], [8, 9, 1]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 1, 1], [8, 9, 1]], "row 1: labels are neither"),
        ([[5, 6, 7], [9, 1, 2]], "some rows fit one reading, some the other"),
        ([[-100, -100, -100]] * 2, "both readings fit"),
        ([[5, 6], [8, 9]], "2 labels for 3 input_ids"),
    ],
)
def test_ambiguous_labels_are_rejected(
    tmp_path: Path, labels: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ids_of(tmp_path, input_ids=[[5, 6, 7], [8, 9, 1]], labels=labels)


def test_text_next_to_ids_needs_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "both.parquet"
    pq.write_table(pa.table({"text": ["ab"], "input_ids": [[1, 2]]}), path)
    with pytest.raises(ValueError, match="--text-column text or --text-column input_ids"):
        opened(path)
    assert read(path, text_column="text") == ["ab"]
    assert opened(path, text_column="input_ids").token_ids is not None
    (tmp_path / "a.txt").write_text("text")
    pq.write_table(pa.table({"input_ids": [[1, 2]]}), path)
    with pytest.raises(ValueError, match=r"both\.parquet holds token ids, .*a\.txt does not"):
        opened(tmp_path)


@pytest.mark.parametrize("ids", [[[], [], []], [[0], [0, 0]]])
def test_rows_without_tokens_are_empty_documents(tmp_path: Path, ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"row 1: an empty document"):
        ids_of(tmp_path, input_ids=pa.array(ids, pa.list_(pa.int64())))


def test_columns_are_recognized_in_any_case(tmp_path: Path) -> None:
    columns = {"Input_IDs": [[5, 6], [7, 8]], " LABELS": [[6, 7], [8, 9]]}
    layout, found = ids_of(tmp_path, **columns)
    assert "labels: shifted" in layout
    assert found == [[5, 6, 7, 8, 9]]
    assert opened(tmp_path / "ids.parquet", text_column="Input_IDs").token_ids is not None


def test_two_columns_of_ids_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table([pa.array([[1, 2]])] * 2, names=["input_ids"] * 2), path)
    with pytest.raises(ValueError, match="two columns are called 'input_ids'"):
        opened(path)


def test_an_id_beyond_64_bits_is_shown_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'input_ids' holds {2**64 - 1}, which no token id"):
        ids_of(tmp_path, input_ids=pa.array([[1, 2**64 - 1]], pa.list_(pa.uint64())))


@pytest.mark.parametrize("name", ["input_ids", "Input_IDs"])
def test_ids_in_json_are_named_as_ids(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "ids.jsonl", {name: [1, 2]})
    for column in (None, name):
        with pytest.raises(ValueError, match=r":1: holds token ids; .* Parquet or Arrow"):
            read(path, text_column=column)
    path = write(tmp_path / "both.jsonl", {"text": "ab", name: [1, 2]})
    with pytest.raises(ValueError, match=r":1: holds text and token ids; .* --text-column NAME"):
        read(path)
    assert read(path, text_column="text") == ["ab"]


def test_ids_of_a_wrong_type_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"input_ids": ["1 2"]}), path)
    with pytest.raises(ValueError, match="'input_ids' holds string, not lists of token ids"):
        opened(path)
