"""The engine's decisions without a device: what a table leads to is played out in dictionaries, and read back."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helix_jax.engine.page_allocator import PageAllocator, prefix_block_len
from helix_jax.engine.params import SamplingParams
from helix_jax.engine.requests import Request
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.scheduler import Scheduler, ScheduledStep, table_of
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.text import Bytes

VOCAB, ROWS, LONGEST = 5, 3, 40


def next_token(known: list[int]) -> int:
    """What a model would say: a function of all that came before, in order."""
    return hash(tuple(known)) % VOCAB


class Devices:
    """Pages as dictionaries. What a request reads is checked position by position, as its table has it."""

    def __init__(self, memory: PageAllocator, entries: int):
        self.memory, self.entries = memory, entries
        self.words: dict[tuple[int, int, int], tuple[int, int]] = {}  # rank, page, word -> position, token
        self.tables = np.full((memory.layout.ranks, ROWS, entries), -1)

    def run(self, work: ScheduledStep, scheduler: Scheduler) -> list[tuple[Request, int]]:
        """What is said, as (request, token): to be told later."""
        for rank, row, entry, page in work.edits:
            self.tables[rank, row, entry] = page
        said = []
        for request in work.decodes:
            known = self._known(request)
            self._write(request, known, len(known) - 1)
            said.append((request, next_token(self._read(request, len(known)))))
        for seat in work.seats:
            self.tables[:, seat.request.row] = table_of(scheduler.held[seat.request.id], self.entries)
        for chunk in work.chunks:
            for position in range(chunk.first, chunk.first + chunk.count):
                self._write(chunk.request, chunk.request.known, position)
            read = self._read(chunk.request, chunk.first + chunk.count)
            if chunk.last:
                said.append((chunk.request, next_token(read)))
        return said

    def _known(self, request: Request) -> list[int]:
        """With the token that is still on its way."""
        known = request.known
        return known + [next_token(known)] * (len(known) <= request.written - 1)

    def _place(self, request: Request, position: int) -> tuple[int, int, int]:
        layout, prompt_len = self.memory.layout, len(request.prompt)
        rank, slot = layout.owner(position, prompt_len), layout.slot(position, prompt_len)
        return rank, int(self.tables[rank, request.row, slot // self.memory.page]), slot % self.memory.page

    def _write(self, request: Request, known: list[int], position: int) -> None:
        rank, page, word = self._place(request, position)
        assert page >= 0, f"position {position} has no page"
        self.words[rank, page, word] = position, known[position]

    def _read(self, request: Request, length: int) -> list[int]:
        read = [self.words[self._place(request, position)] for position in range(length)]
        assert [position for position, _ in read] == list(range(length))
        return [token for _, token in read]


class Engines(RuleBasedStateMachine):
    """Requests come, are cancelled and end, on few pages; one step is always on its way."""

    @initialize(
        ranks=st.integers(1, 3),
        block=st.sampled_from([1, 2, 4]),
        page=st.sampled_from([1, 2, 4]),
        placement=st.sampled_from(PLACEMENTS),
        pages=st.integers(2, 14),
        chunk=st.integers(1, 9),
        budget=st.integers(1, 20),
    )
    def start(self, ranks, block, page, placement, pages, chunk, budget):
        layout = BlockLayout(ranks, block, placement)
        entries = -(-LONGEST // page)
        self.memory = PageAllocator(layout, pages, page, share=prefix_block_len(layout, page) is not None)
        self.scheduler = Scheduler(self.memory, ROWS, budget, chunk)
        self.devices = Devices(self.memory, entries)
        self.live: dict[str, Request] = {}
        self.under_way: list[tuple[Request, int]] = []
        self.submitted = 0

    @rule(start=st.integers(0, 2), more=st.lists(st.integers(0, 1), min_size=2, max_size=20), most=st.integers(2, 15))
    def submit(self, start, more, most):
        prompt = [start, *more]
        request = Request(
            str(self.submitted),
            prompt,
            SamplingParams(max_new_tokens=most),
            frozenset({VOCAB - 1}),
            self.submitted,
            OutputText(None, ()),
        )
        self.submitted += 1
        if self.memory.needed(request.most, len(prompt)).max() <= self.memory.pages:
            self.live[request.id] = request
            self.scheduler.waiting.append(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        self._end(self.live[data.draw(st.sampled_from(sorted(self.live)))])

    @rule(steps=st.integers(1, 12))
    def steps(self, steps):
        for _ in range(steps):
            work = self.scheduler.schedule()
            said = self.devices.run(work, self.scheduler)
            for request, token in self.under_way:
                if self.live.get(request.id) is request:
                    request.append(token)
                    request.running_ahead -= 1
                    if token in request.stop_token_ids or len(request.tokens) == request.params.max_new_tokens:
                        self._end(request)
            self.under_way = said

    @invariant()
    def every_page_is_somewhere_once(self):
        if not hasattr(self, "memory"):
            return
        layout = self.memory.layout
        for rank in range(layout.ranks):
            runs = [page for run in self.memory._runs.values() for page in run.pages[rank]]
            private = []
            for held in self.scheduler.held.values():
                shared = {page for run in held.runs for page in run.pages[rank]}
                private += [page for page in held.pages[rank] if page not in shared]
            everywhere = runs + private + self.memory._free[rank]
            assert sorted(everywhere) == list(range(self.memory.pages))
        for request in self.scheduler.running:
            pages = [len(mine) for mine in self.scheduler.held[request.id].pages]
            ahead = self.memory.needed(self.scheduler._ahead(request, request.written), len(request.prompt))
            assert (np.array(pages) >= self.memory.needed(request.written, len(request.prompt))).all()
            assert request.written < len(request.known) or (np.array(pages) <= ahead).all()

    def teardown(self):
        """All that is left runs to its end: nobody starves, nothing leaks."""
        if not hasattr(self, "memory"):
            return
        for _ in range(5000):
            if not self.live:
                break
            self.steps(1)
        assert not self.live
        assert self.memory.in_use() == (0,) * self.memory.layout.ranks

    def _end(self, request: Request) -> None:
        expected = list(request.prompt)
        for token in request.tokens:
            assert token == next_token(expected)
            expected.append(token)
        del self.live[request.id]
        self.scheduler.drop(request)


TestEngines = Engines.TestCase
TestEngines.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("layout", "page", "tokens"),
    [
        (BlockLayout(4, 16, "striped"), 64, 256),
        (BlockLayout(4, 16, "striped"), 4, 64),
        (BlockLayout(4, 16, "striped"), 24, None),
        (BlockLayout(4, 16, "helix"), 16, None),
    ],
)
def test_prefixes_are_shared_in_runs_that_fill_whole_pages(layout, page, tokens):
    assert prefix_block_len(layout, page) == tokens


def test_a_prefix_that_nobody_reads_is_forgotten_for_pages_the_oldest_first():
    memory = PageAllocator(BlockLayout(1, 2, "striped"), pages=6, page=2, share=True)

    def cached(tokens):
        held, known = memory.start(tokens)
        assert memory.grow(held, len(tokens), len(tokens)) is not None
        memory.register_prefix(held, tokens, len(tokens))
        memory.release(held)
        return known

    assert cached([1, 2, 3, 4, 5]) == 0
    assert cached([7, 8, 9, 9, 5]) == 0
    assert (memory.in_use(), memory.cached()) == ((0,), 4)
    assert cached([1, 2, 3, 4, 6]) == 4  # which makes the other one the oldest
    assert cached([0, 0, 0, 0, 0, 0, 0]) == 0
    assert cached([1, 2, 3, 4, 6]) == 4
    assert cached([7, 8, 9, 9, 5]) < 4


def test_no_prefix_is_forgotten_for_pages_that_do_not_suffice():
    memory = PageAllocator(BlockLayout(1, 2, "striped"), pages=4, page=2, share=True)
    held, _ = memory.start([1, 2, 3])
    memory.grow(held, 3, 3)
    memory.register_prefix(held, [1, 2, 3], 3)
    memory.release(held)
    assert memory.grow(memory.nothing(), 10, 10) is None
    assert memory.cached() == 1


def test_of_a_prefix_the_end_is_forgotten_first():
    memory = PageAllocator(BlockLayout(1, 2, "striped"), pages=4, page=2, share=True)
    held, _ = memory.start([1, 2, 3, 4, 5, 6, 7])
    memory.grow(held, 7, 7)
    memory.register_prefix(held, [1, 2, 3, 4, 5, 6, 7], 7)
    memory.release(held)
    other, _ = memory.start([9] * 4)
    assert memory.grow(other, 4, 4)
    assert memory.start([1, 2, 3, 4, 5, 6, 7])[1] == 4


@pytest.mark.parametrize(
    ("said", "streamed", "text", "stopped"),
    [
        ("a quick fox", "a quick fox", "a quick fox", False),
        ("say END now", "say ", "say ", True),
        ("almost EN", "almost ", "almost EN", False),
        ("EN, not the EnD", "EN, not the EnD", "EN, not the EnD", False),
    ],
)
def test_text_ends_before_a_stop_string_and_holds_back_its_beginning(said, streamed, text, stopped):
    """Of two stop strings; what was held back comes when it is clear that nothing more does."""
    found, pieces = OutputText(Bytes(), ("END", "zzz")), []
    for token in said.encode():
        ended = found.feed(token)
        pieces.append(found.give(all=False))
        if ended:
            break
    assert ("".join(pieces), ended) == (streamed, stopped)
    found.give(all=True)
    assert found.given == text
