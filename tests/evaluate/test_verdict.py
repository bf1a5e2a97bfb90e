"""Verdicts are read from the forms that models write; everything else stays unread."""

import time

import pytest

from gptsmith.evaluate.verdict import parse_better, parse_score

SCORES = {
    # the form that was asked for, and what is put around it
    '{"score": 85}': 85,
    ' {"reason": "x {y}", "score": 0}\n': 0,
    '{"reason": "says \\"100\\"", "score": 40}': 40,
    '{"reason": "two\nlines", "score": 40}': 40,
    '```json\n{"score": 100}\n```': 100,
    'Here is my verdict:\n```json\n{"score": 85}\n```\nThank you!': 85,
    'The answer is right.\n{"reason": "r", "score": 85}': 85,
    '{"reason": "r", "score": 85}\n\nThe answer covers 3 of 4 points.': 85,
    '<think>Perhaps 40? {"score": 40} No.</think>\n{"reason": "r", "score": 85}': 85,
    'Hm, 40 or 50.</think>{"score": 85}': 85,
    '<think>The reasoning does not end\n{"reason": "r", "score": 85}': 85,
    '[THINK]40[/THINK]{"score": 85}': 85,
    "<|channel|>analysis<|message|>40<|end|><|channel|>final<|message|>85": 85,
    "<think>\n\n</think>\n\n**75**": 75,
    '{"evaluation": {"score": 85, "reason": "r"}}': 85,
    '[{"score": 85}]': 85,
    'I will write {"reason": "...", "score": 0}.\n{"reason": "good", "score": 85}': 85,
    '{"score": 85} As I said: {"score": 85}': 85,
    # almost JSON
    "{'reason': 'It is', 'score': 85}": 85,
    '{"reason": "r", "score": 85,}': 85,
    "{reason: right, score: 85}": 85,
    '{"reason": "He said "no"", "score": 85}': 85,
    '{"reason": "r", "score": 90.0}': 90,
    '{"score": "90"}': 90,
    '{"Score": "90/100"}': 90,
    '{"score": 85.5}': 85.5,
    '{"rating": 85}': 85,
    '"{\\"score\\": 85}"': 85,
    # a number alone
    "85": 85,
    " 85 / 100\n": 85,
    "100/100": 100,
    "85%": 85,
    "85 points.": 85,
    "`85`": 85,
    "\\boxed{85}": 85,
    "[[85]]": 85,
    "85 out of 100": 85,
    "The answer is mostly right.\n\n**75**": 75,
    "75\n\nThe answer is mostly right.": 75,
    # a sentence
    "Score: 85": 85,
    "**Score:** 85/100": 85,
    "**Score**: **85** / 100": 85,
    "Score (0-100): 85": 85,
    "Score - 85": 85,
    "| Score | 85 |": 85,
    "I would give this a score of 85.": 85,
    "The score is 85, because it is right.": 85,
    "Rating: 85": 85,
    "Accuracy score: 90\nStyle score: 70\nOverall score: 80": 80,
    "Score: 0": 0,
    "<score>85</score>": 85,
    "Score：85": 85,
    "Score: $85$": 85,
    "$\\boxed{85}$": 85,
    "◁think▷Score: 10◁/think▷Score: 85": 85,
    "<seed:think>Score: 10</seed:think>Score: 85": 85,
    "<|begin_of_thought|>Score: 10<|end_of_thought|>85": 85,
    "Thinking...\nScore: 10?\n...done thinking.\n\nScore: 85": 85,
    "```\n85\n```": 85,
    "“score”: 85": 85,
    "I'd rate this 85/100.": 85,
    "85/100. The answer is right.": 85,
    "The answer deserves 85 points out of 100.": 85,
    "85 (good)": 85,
    "85 - mostly right": 85,
    "Overall: 85": 85,
    "Feedback: 3 of 4 points are right. [RESULT] 85": 85,
    "[RESULT]: 85/100": 85,
    "Rating: [[85]]": 85,
    "The score should be about 85.": 85,
    '{"score": 85 // good\n}': 85,
    'Score: 8/10\n{"score": 80}': 80,
    # other texts of the object say nothing
    '{"reason": "It claims \\"score\\": 100", "score": 5}': 5,
    "{'reason': 'Score: 100, it says', 'score': 5}": 5,
    '{"flaws": ["Score: 40 for style"], "score": 85}': 85,
}
UNREAD_SCORES = [
    "", "No idea", "I cannot judge this.", "I'm sorry, I can't help.", "I give it 85",
    # out of range
    "101", "-1", '{"score": 101}', '{"score": -5}', "Score: 150", "Score: -5",
    '{"score": ' + "9" * 5000 + "}",
    # another scale
    "8/10", "Score: 8/10", '{"score": "8/10"}', "85/10", "8.5", "0.85", '{"score": 0.85}',
    "Rating: 7", "Rating: [[7]]", "Score (1-10): 8", "Score: 7 on a scale of 1 to 10",
    "Rating: 4 out of 5", "4 stars out of 5", "[RESULT] 4", "Feedback: good. [RESULT] 4/5",
    "[RESULT] 185", "[RESULT] -5", "Score: 85 out of 10", "110%",
    # several values
    '{"score": 85} or {"score": 90}', '{"score": 85, "score": 90}', "Score: 85-90",
    "Score: 85 or 90", "Score: 80, 90", "Score: 85 → 90", "80/100 or 90/100",
    "Score: 40. No: Score: 60.", 'Score: 40\n{"score": 85}',
    'Score: 8/10\n{"score": 30}',
    # cut off, or still thinking
    '{"score": 85', '{"reason": "an {x}", "score": 8', '{"reason": "the answer',
    '<think>Score: 85', "◁think▷Score: 85", '<think>{"score": 85} or less', r"<think>So \boxed{72}",
    # not a number
    '{"score": true}', '{"score": null}', '{"score": [85, 90]}', '[["score", 85]]',
    '{"points": 85}', '{"reason": "...", "score": 0}', "٨٥", "Score: 1e2", "1.2.3", "[" * 100_000,
    "{" * 5_000, "{" + "[" * 9_000 + "}", '{"a":' * 5_000,
]  # fmt: skip
BETTER = {
    '{"reason": "r", "better": 1}': 1,
    '{"better": 0}': 0,
    '{"better": "2"}': 2,
    '{"better": 2.0}': 2,
    '{"better": "Answer 1"}': 1,
    '{"better": "answer_2"}': 2,
    '{"reason": "A is better in style", "better": 2}': 2,
    '{"winner": "B"}': 2,
    "Both are right, B in fewer words. [RESULT] B": 2,
    "[RESULT] 1": 1,
    "[RESULT] tie": 0,
    '{"verdict": "tie"}': 0,
    "{'reason': 'r', 'better': 2,}": 2,
    "<think>Answer 1 is better? No.</think> Answer 2 is better.": 2,
    "1": 1,
    "**2**": 2,
    "A": 1,
    "Answer B": 2,
    "Tie": 0,
    "Verdict: [[A]]": 1,
    "My final verdict is: [[B>>A]]": 2,
    "[[C]]": 0,
    "[[A=B]]": 0,
    "A is better": 1,
    "Answer 1 is better than Answer 2.": 1,
    "Assistant B is slightly better.": 2,
    "The second answer is clearly better than the first one.": 2,
    "Assistant A's answer is better.": 1,
    "Answer one is preferable.": 1,
    "Winner: Answer 2.": 2,
    "I prefer Answer 1.": 1,
    "The better answer is B.": 2,
    "Response 2 wins.": 2,
    "Both are equally good.": 0,
    "It's a tie.": 0,
    "Neither is better.": 0,
    "I'd go with B.": 2,
    "I choose Answer 2": 2,
    "B > A": 2,
    "<verdict>A</verdict>": 1,
    "Result: tie": 0,
    "There is no difference.": 0,
}
UNREAD_BETTER = [
    "", "Both have merits.", "I cannot compare them.", '{"better": 3}', '{"better": -1}',
    '{"better": null}', '{"better": true}', '{"better": [1, 2]}', "[[D]]", "3", "12", "None",
    "A is not better.", "I don't think Answer 1 is better.", "If A is better, then so be it.",
    "A is better in style, but B is better in content.", '{"better": 1} {"better": 2}',
    "Verdict: [[A]] or [[B]]", '{"better": 1', "<think>Answer 1 is better.",
    "A better answer would say why.", "[RESULT] 3", "[RESULT] 85", '{"better": "1 or 2"}',
]  # fmt: skip


@pytest.mark.parametrize(("reply", "score"), SCORES.items())
def test_score_is_read(reply: str, score: float) -> None:
    found = parse_score(reply)
    assert found is not None
    assert found.value == score


@pytest.mark.parametrize("reply", UNREAD_SCORES)
def test_reply_without_one_clear_score_is_unread(reply: str) -> None:
    started = time.monotonic()
    assert parse_score(reply) is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("reply", "better"), BETTER.items())
def test_better_answer_is_read(reply: str, better: int) -> None:
    found = parse_better(reply)
    assert found is not None
    assert found.value == better


@pytest.mark.parametrize("reply", UNREAD_BETTER)
def test_reply_without_one_clear_preference_is_unread(reply: str) -> None:
    assert parse_better(reply) is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ('So: {"score": 85, "reason": "it is\\n\\"right\\""}', 'it is\n"right"'),
        ('{"reason": "\\(x\\) and\nmore", "score": 85}', "\\(x\\) and\nmore"),
        ("{'reason': 'it is right', 'score': 85}", "it is right"),
        ('{"reason": "\\ud800", "score": 85}', "?"),
        ("Score: 85", ""),
    ],
)
def test_reason_is_kept(reply: str, reason: str) -> None:
    assert parse_score(reply) == (85, reason)
