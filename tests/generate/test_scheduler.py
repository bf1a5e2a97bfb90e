"""Pages and scheduler without a model: what a step reads is what the pages hold, nothing leaks."""

import random
from collections import Counter

import pytest

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.pages import Pages
from gptsmith.generate.request import QueueFull, Request, RequestState
from gptsmith.generate.scheduler import Scheduler, Span

CONTEXT, PAGE = 24, 4


def make(limit: int = 20, batch: int = 4, window: int | None = None, **arguments: int) -> Scheduler:
    arguments = {"chunk": 8, "budget": 16} | arguments
    return Scheduler(Pages(PAGE, limit, window, idle=limit), batch, **arguments)


def state_of(prompt: list[int], n: int = 5, **fields: object) -> RequestState:
    request = Request(prompt, SamplingConfig(max_new_tokens=n), **fields)  # type: ignore[arg-type]
    return RequestState(request, frozenset(), CONTEXT, None)


class Memory:
    """What the model would store: for each slot of each page, all that the token has seen."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], tuple[object, ...]] = {}
        self.read = 0

    def step(self, choose: random.Random) -> list[Span]:
        pages = self.scheduler.pages
        spans = self.scheduler.schedule()
        assert len({id(span.state) for span in spans}) == len(spans)
        for source, target in pages.copies:
            for at in range(PAGE):
                self.slots[target, at] = self.slots.get((source, at), ())
        pages.copies.clear()
        for span in spans:
            self.read += len(span.ids)
            assert list(span.ids) == span.state.context[span.start : span.stop]
            assert span.state.read == span.start
            for position in range(span.start, span.stop) if span.pages else ():
                number = span.pages[position // PAGE - span.first]
                self.slots[number, position % PAGE] = self.seen(span.state, position)
        for span in spans:  # after all were written
            window = pages.window or CONTEXT
            for position in range(max(0, span.start - window + 1), span.stop) if span.pages else ():
                number = span.pages[position // PAGE - span.first]
                assert self.slots[number, position % PAGE] == self.seen(span.state, position)
        self.scheduler.read(spans)
        for span in spans:
            if span.stop == len(span.state.context) and not span.state.finished:
                span.state.push(choose.randrange(3))
        return spans

    def seen(self, state: RequestState, position: int) -> tuple[object, ...]:
        ahead = state.context[: self.scheduler.lookahead] if self.scheduler.lookahead else []
        return state.request.namespace, *ahead, "|", *state.context[: position + 1]

    def check(self) -> None:
        """Every page is free, unused, or used by as many texts as say so."""
        pages = self.scheduler.pages
        tables = [state.table for state in self.scheduler.running if state.table is not None]
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
    states: list[RequestState] = []
    reached: Counter[str] = Counter()
    for _ in range(1700):
        match choose.randrange(8):
            case 0 | 1:
                start = [choose.choice([0, 0, 1])] * choose.randrange(12)
                prompt = start + [choose.randrange(3) for _ in range(choose.randrange(1, 16))]
                state = state_of(prompt, choose.randrange(1, 30), namespace=choose.choice("aab"))
                if choose.random() < 0.1 and len(prompt) <= CONTEXT:
                    state = state_of(prompt, choose.randrange(1, 30), prompt_logprobs=0)
                try:
                    scheduler.add(state)
                    states.append(state)
                except QueueFull:
                    assert sum(not state.finished for state in scheduler.states) == 5 + 8
                    reached["full"] += 1
            case 2 if states and choose.random() < 0.3:
                state = choose.choice(states)
                if not state.finished:
                    waits, new = state in scheduler.waiting, not state.generation.ids
                    reached[f"{'waiting' if waits else 'running'} {'new' if new else 'old'}"] += 1
                    state.generation.finish_reason = "cancelled"
            case 3 if choose.random() < 0.05:
                scheduler.preempt_all()
                reached["restart"] += 1
            case _:
                before = {id(state) for state in scheduler.running}
                memory.step(choose)
                gone = [
                    state
                    for state in scheduler.waiting
                    if id(state) in before and not state.finished
                ]
                reached["preempted"] += len(gone)
                memory.check()
        states = [state for state in states if not state.finished]
        assert {id(state) for state in scheduler.states} >= set(map(id, states))
    for _ in range(2000):
        if not states:
            break
        memory.step(choose)
        states = [state for state in states if not state.finished]
    assert not states
    scheduler.remove_finished()
    memory.check()
    assert scheduler.pages.used == 0
    assert scheduler.pages.available == 13
    expected = {"waiting new", "running old", "restart"} | (
        {"full", "preempted"} if not window else set()
    )
    assert expected <= set(reached), reached


def run(memory: Memory, *states: RequestState) -> int:
    """Tokens that the model reads until these have finished."""
    before = memory.read
    for state in states:
        memory.scheduler.add(state)
    while not all(state.finished for state in states):
        assert memory.step(random.Random(0))
    return memory.read - before


def test_samples_of_one_prompt_read_it_once() -> None:
    prompt = [*range(18)]
    assert run(Memory(make()), *(state_of(prompt, 1) for _ in range(4))) == 18 + 3 * 2
    # a long system prompt, questions of two tokens
    questions = [state_of([*range(17), 50 + i, 60 + i], 1) for i in range(4)]
    assert run(Memory(make()), *questions) == 19 + 3 * 3
    # short beginnings are not worth waiting for
    assert run(Memory(make()), *(state_of([1, 2, 3, i], 1) for i in range(4))) == 16


def test_namespaces_share_nothing() -> None:
    prompt = [*range(18)]
    memory = Memory(make(limit=40))
    assert run(memory, state_of(prompt, 1, namespace="a"), state_of(prompt, 1, namespace="b")) == 36
    assert run(memory, state_of(prompt, 1, namespace="b")) == 1
    assert run(memory, state_of(prompt, 1)) == 18


def test_prompts_are_cut_at_multiples_of_the_chunk_within_the_budget() -> None:
    scheduler = make(limit=40, chunk=8, budget=12)
    memory = Memory(scheduler)
    first, second = state_of([1] * 20, 9), state_of([2] * 6, 9)
    scheduler.add(first)
    scheduler.add(second)

    def step() -> list[tuple[int, int]]:
        spans = memory.step(random.Random(0))
        return [(span.start, span.stop) for span in spans]

    assert step() == [(0, 6)]  # another 8 tokens are beyond the budget, so the longer one waits
    assert step() == [(6, 7), (0, 8)]
    assert step() == [(7, 8), (8, 16)]
    assert step() == [(8, 9), (16, 20)]
    assert step() == [(20, 21), (9, 10)]
    third = state_of([1] * 14 + [5] * 4)
    scheduler.add(third)
    assert step() == [(21, 22), (10, 11), (14, 16)]  # a hit in the middle of a page and a chunk
    assert step() == [(22, 23), (11, 12), (16, 18)]


@pytest.mark.parametrize(("others", "tokens"), [(0, 16), (1, 4), (5, 12), (20, 16)])
def test_while_others_decode_the_budget_grows_with_their_number(others: int, tokens: int) -> None:
    memory = Memory(make(limit=100, batch=40, chunk=4, budget=16, budget_per_request=2))
    decoding = [state_of([i], 15) for i in range(others)]
    for state in decoding:
        memory.scheduler.add(state)
    while not all(state.generation.ids for state in decoding):
        memory.step(random.Random(0))
    prompt = state_of([99] * 20)
    memory.scheduler.add(prompt)
    memory.step(random.Random(0))
    assert prompt.read == tokens  # of one prompt, several chunks


def test_a_short_prompt_does_not_wait_until_a_long_one_is_read() -> None:
    memory = Memory(make(limit=40, chunk=4, budget=4))
    long, short = state_of([1] * 20, 1), state_of([2, 3], 1)
    memory.scheduler.add(long)
    memory.step(random.Random(0))
    memory.scheduler.add(short)
    memory.step(random.Random(0))
    memory.step(random.Random(0))
    assert short.finished
    assert 4 < long.read < 20  # and the long one has made progress


def test_a_long_prompt_is_read_although_short_ones_keep_coming() -> None:
    memory = Memory(make(limit=40, chunk=4, budget=4))
    long = state_of([1] * 20, 1)
    memory.scheduler.add(long)
    short = []
    for number in range(10):  # a step reads one chunk, and five belong to the long prompt
        short.append(state_of([10 + number] * 3, 1))
        memory.scheduler.add(short[-1])
        memory.step(random.Random(0))
    assert long.finished
    assert sum(state.finished for state in short) == 5


def test_the_youngest_makes_room_and_is_read_again() -> None:
    scheduler = make(limit=8, batch=4)
    memory = Memory(scheduler)
    old, young = state_of([1] * 9, 10), state_of([2] * 9, 10)
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
        run(memory, state_of([token] * 12, 1))
    assert run(memory, state_of([3] * 12, 1)) == 1
    assert run(memory, state_of([2] * 12, 1)) == 1
    assert run(memory, state_of([4] * 20, 1)) == 20
    assert run(memory, state_of([2] * 12, 1)) == 1
    assert run(memory, state_of([1] * 12, 1)) > 1


def test_idle_pages_do_not_let_the_cache_grow_without_need() -> None:
    pages = Pages(PAGE, 1000, idle=6)
    memory = Memory(Scheduler(pages, 4, chunk=8, budget=16))
    for token in range(50):
        run(memory, state_of([token] * 12, 1))
    assert pages.made <= 10


def test_a_full_queue_rejects() -> None:
    scheduler = make(batch=1, max_waiting=2)
    first, *_ = states = [state_of([1]) for _ in range(3)]
    assert scheduler.remaining_capacity == 3
    for state in states:
        scheduler.add(state)
    with pytest.raises(QueueFull, match="3 requests are unfinished, which is the limit"):
        scheduler.add(state_of([1]))
    first.generation.finish_reason = "cancelled"
    assert scheduler.remaining_capacity == 1
    scheduler.add(state_of([1]))


def test_requests_are_counted_while_another_thread_adds_one() -> None:
    scheduler = make()

    class Counted(RequestState):
        @property
        def finished(self) -> bool:  # here the other thread has its turn
            scheduler.waiting.append(state_of([9]))
            return False

    request = Request([1], SamplingConfig(max_new_tokens=5))
    scheduler.waiting.extend(Counted(request, frozenset(), CONTEXT, None) for _ in range(2))
    assert scheduler.stats.waiting == 2
