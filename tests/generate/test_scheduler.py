"""Pages and scheduler without a model: what a step reads is what the pages hold, nothing leaks."""

import random
from collections import Counter

import pytest

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.pages import Pages
from gptsmith.generate.request import QueueFull, Request, Row
from gptsmith.generate.scheduler import Scheduler, Span

CONTEXT, PAGE = 24, 4


def make(limit: int = 20, batch: int = 4, window: int | None = None, **arguments: int) -> Scheduler:
    arguments = {"chunk": 8, "budget": 16} | arguments
    return Scheduler(Pages(PAGE, limit, window, idle=limit), batch, **arguments)


def row_of(prompt: list[int], n: int = 5, **fields: object) -> Row:
    request = Request(prompt, SamplingConfig(max_new_tokens=n), **fields)  # type: ignore[arg-type]
    return Row(request, frozenset(), CONTEXT, None)


class Memory:
    """What the model would store: for each slot of each page, all that the token has seen."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], tuple[object, ...]] = {}
        self.read = 0

    def step(self, choose: random.Random) -> list[Span]:
        pages = self.scheduler.pages
        spans = self.scheduler.schedule()
        assert len({id(span.row) for span in spans}) == len(spans)
        for source, target in pages.copies:
            for at in range(PAGE):
                self.slots[target, at] = self.slots.get((source, at), ())
        pages.copies.clear()
        for span in spans:
            self.read += len(span.ids)
            assert list(span.ids) == span.row.context[span.start : span.stop]
            assert span.row.read == span.start
            for position in range(span.start, span.stop) if span.pages else ():
                number = span.pages[position // PAGE - span.first]
                self.slots[number, position % PAGE] = self.seen(span.row, position)
        for span in spans:  # after all were written
            window = pages.window or CONTEXT
            for position in range(max(0, span.start - window + 1), span.stop) if span.pages else ():
                number = span.pages[position // PAGE - span.first]
                assert self.slots[number, position % PAGE] == self.seen(span.row, position)
        self.scheduler.read(spans)
        for span in spans:
            if span.stop == len(span.row.context) and not span.row.finished:
                span.row.push(choose.randrange(3))
        return spans

    def seen(self, row: Row, position: int) -> tuple[object, ...]:
        ahead = row.context[: self.scheduler.lookahead] if self.scheduler.lookahead else []
        return row.request.namespace, *ahead, "|", *row.context[: position + 1]

    def check(self) -> None:
        """Every page is free, unused, or used by as many texts as say so."""
        pages = self.scheduler.pages
        tables = [row.table for row in self.scheduler.running if row.table is not None]
        users = Counter(number for table in tables for number in table.numbers)
        assert users == pages._users
        assert sorted([*users, *pages._free, *pages._unused]) == [*range(pages.made)]
        assert pages.made <= pages.limit
        assert pages.used == len(users)
        assert {n for n in pages._nodes if n not in users} == set(pages._unused)
        assert pages._open == tables or set(map(id, pages._open)) == set(map(id, tables))


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_random_operations_lose_no_page_and_mix_no_texts(
    window: int | None, lookahead: int
) -> None:
    """10,000 operations over all cases: requests come, go on, are cancelled in every state, make
    room for others, and the weights change."""
    choose = random.Random(f"{window} {lookahead}")
    scheduler = make(limit=13, batch=5, window=window, lookahead=lookahead, max_waiting=8)
    memory = Memory(scheduler)
    rows: list[Row] = []
    states: Counter[str] = Counter()
    for _ in range(1700):
        match choose.randrange(8):
            case 0 | 1:
                start = [choose.choice([0, 0, 1])] * choose.randrange(12)
                prompt = start + [choose.randrange(3) for _ in range(choose.randrange(1, 16))]
                row = row_of(prompt, choose.randrange(1, 30), namespace=choose.choice("aab"))
                if choose.random() < 0.1 and len(prompt) <= CONTEXT:
                    row = row_of(prompt, choose.randrange(1, 30), prompt_logprobs=0)
                try:
                    scheduler.add(row)
                    rows.append(row)
                except QueueFull:
                    assert sum(not row.finished for row in scheduler.rows) == 5 + 8
                    states["full"] += 1
            case 2 if rows and choose.random() < 0.3:
                row = choose.choice(rows)
                if not row.finished:
                    waits, new = row in scheduler.waiting, not row.generation.ids
                    states[f"{'waiting' if waits else 'running'} {'new' if new else 'old'}"] += 1
                    row.generation.finish_reason = "cancelled"
            case 3 if choose.random() < 0.05:
                scheduler.preempt_all()
                states["restart"] += 1
            case _:
                before = {id(row) for row in scheduler.running}
                memory.step(choose)
                gone = [row for row in scheduler.waiting if id(row) in before and not row.finished]
                states["preempted"] += len(gone)
                memory.check()
        rows = [row for row in rows if not row.finished]
        assert {id(row) for row in scheduler.rows} >= set(map(id, rows))
    for _ in range(2000):
        if not rows:
            break
        memory.step(choose)
        rows = [row for row in rows if not row.finished]
    assert not rows
    scheduler.remove_finished()
    memory.check()
    assert scheduler.pages.used == 0
    assert scheduler.pages.available == 13
    expected = {"waiting new", "running old", "restart"} | (
        {"full", "preempted"} if not window else set()
    )
    assert expected <= set(states), states


def run(memory: Memory, *rows: Row) -> int:
    """Tokens that the model reads until these have finished."""
    before = memory.read
    for row in rows:
        memory.scheduler.add(row)
    while not all(row.finished for row in rows):
        assert memory.step(random.Random(0))
    return memory.read - before


def test_samples_of_one_prompt_read_it_once() -> None:
    prompt = [*range(18)]
    assert run(Memory(make()), *(row_of(prompt, 1) for _ in range(4))) == 18 + 3 * 2
    # a long system prompt, questions of two tokens
    questions = [row_of([*range(17), 50 + i, 60 + i], 1) for i in range(4)]
    assert run(Memory(make()), *questions) == 19 + 3 * 3
    # short beginnings are not worth waiting for
    assert run(Memory(make()), *(row_of([1, 2, 3, i], 1) for i in range(4))) == 16


def test_namespaces_share_nothing() -> None:
    prompt = [*range(18)]
    memory = Memory(make(limit=40))
    assert run(memory, row_of(prompt, 1, namespace="a"), row_of(prompt, 1, namespace="b")) == 36
    assert run(memory, row_of(prompt, 1, namespace="b")) == 1
    assert run(memory, row_of(prompt, 1)) == 18


def test_prompts_are_cut_at_fixed_positions_within_the_budget() -> None:
    scheduler = make(limit=40, chunk=8, budget=12)
    memory = Memory(scheduler)
    first, second = row_of([1] * 20, 9), row_of([2] * 6, 9)
    scheduler.add(first)
    scheduler.add(second)

    def step() -> list[tuple[int, int]]:
        spans = memory.step(random.Random(0))
        return [(span.start, span.stop) for span in spans]

    assert step() == [(0, 8)]  # another 6 tokens are beyond the budget, so the second waits
    assert step() == [(8, 16)]
    assert step() == [(16, 20), (0, 6)]
    assert step() == [(20, 21), (6, 7)]
    third = row_of([1] * 14 + [5] * 4)
    scheduler.add(third)
    assert step() == [(21, 22), (7, 8), (14, 16)]  # a hit in the middle of a page and a chunk
    assert step() == [(22, 23), (8, 9), (16, 18)]


def test_the_youngest_makes_room_and_is_read_again() -> None:
    scheduler = make(limit=8, batch=4)
    memory = Memory(scheduler)
    old, young = row_of([1] * 9, 10), row_of([2] * 9, 10)
    scheduler.add(old)
    scheduler.add(young)
    waited = False
    while not (old.finished and young.finished):
        memory.step(random.Random(0))
        waited |= young in scheduler.waiting
        assert old not in scheduler.waiting
        memory.check()
    assert waited
    assert len(old.generation.ids) == len(young.generation.ids) == 10


def test_what_nobody_uses_makes_room_oldest_first() -> None:
    memory = Memory(make(limit=10))
    for token in (1, 2, 3):
        run(memory, row_of([token] * 12, 1))
    assert run(memory, row_of([3] * 12, 1)) == 1
    assert run(memory, row_of([2] * 12, 1)) == 1
    assert run(memory, row_of([4] * 20, 1)) == 20
    assert run(memory, row_of([2] * 12, 1)) == 1
    assert run(memory, row_of([1] * 12, 1)) > 1


def test_idle_pages_do_not_let_the_cache_grow_without_need() -> None:
    pages = Pages(PAGE, 1000, idle=6)
    memory = Memory(Scheduler(pages, 4, chunk=8, budget=16))
    for token in range(50):
        run(memory, row_of([token] * 12, 1))
    assert pages.made <= 10


def test_a_full_queue_rejects() -> None:
    scheduler = make(batch=1, max_waiting=2)
    first, *_ = rows = [row_of([1]) for _ in range(3)]
    assert scheduler.room == 3
    for row in rows:
        scheduler.add(row)
    with pytest.raises(QueueFull, match="3 requests are unfinished, which is the limit"):
        scheduler.add(row_of([1]))
    first.generation.finish_reason = "cancelled"
    assert scheduler.room == 1
    scheduler.add(row_of([1]))
