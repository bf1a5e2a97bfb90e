import pytest

from gptsmith.data.columns import TEXT, choose_column, known_columns


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["id", "text", "content"], ["text"]),  # the first known name wins
        (["id", " Text "], [" Text "]),
        (["Text", "text"], ["text"]),  # the exact spelling wins
        (["review", "sms"], ["review", "sms"]),
        (["id"], []),
    ],
)
def test_usual_columns(names: list[str], found: list[str]) -> None:
    assert known_columns(names, TEXT) == found
    assert choose_column(names, None, TEXT, "a.csv:1") == (found[0] if len(found) == 1 else None)


def test_requested_column_must_exist() -> None:
    assert choose_column(["id", "text"], "id", TEXT, "a.csv:1") == "id"
    with pytest.raises(ValueError, match=r"^a\.csv:1: no column 'body', only 'id', 'text'$"):
        choose_column(["id", "text"], "body", TEXT, "a.csv:1")
