from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.generate.request import StopStrings


@settings(max_examples=300)
@given(
    st.lists(st.text("ab ", max_size=4), max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_how_text_is_split(
    pieces: list[str], stop: list[str]
) -> None:
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    text = StopStrings(stop)
    shown = ""
    for i, piece in enumerate(pieces):
        shown += text.push(piece)
        so_far = "".join(pieces[: i + 1])
        assert expected.startswith(shown)
        assert len(so_far) - len(shown) < max(map(len, stop), default=1) or text.stopped
    shown += text.push("", last=True)
    assert shown == expected
    assert text.stopped == bool(ends)
