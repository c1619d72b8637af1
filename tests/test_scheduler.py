"""The scheduler, the page allocator and the output text, without devices: dictionaries stand for the pages."""

from collections import Counter
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helix_jax.cache import pages_needed, split_slot
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.page_allocator import PageAllocator, RowPages, describe_prefix_caching, prefix_block_len
from helix_jax.engine.params import SamplingParams
from helix_jax.engine.requests import Request
from helix_jax.engine.scheduler import Chunk, ScheduledStep, Scheduler, make_page_table
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.text import ByteTokenizer

VOCAB, ROWS, MAX_LEN = 5, 3, 40


def next_token(tokens: list[int], sample: int = 0) -> int:
    """Stand in for the model: a function of all previous tokens, in order, and of the index of the sample."""
    return hash((sample, *tokens)) % VOCAB


@cache
def owner_and_slot(layout: BlockLayout, position: int, prompt_len: int) -> tuple[int, int]:
    return layout.owner(position, prompt_len), layout.slot(position, prompt_len)


class FakeDevices:
    """Pages as dictionaries. Every read is checked position by position, through the page table of the row."""

    def __init__(self, allocator: PageAllocator, entries: int):
        self.allocator, self.entries = allocator, entries
        self.words: dict[tuple[int, int, int], tuple[int, int]] = {}  # (rank, page, offset) -> (position, token)
        self.table_RBM = np.full((allocator.layout.ranks, ROWS, entries), -1)

    def run(self, step: ScheduledStep, scheduler: Scheduler) -> list[tuple[Request, int | Chunk]]:
        """Return (request, token) and (request, scored chunk), to be appended after the next step is scheduled."""
        contents = [self._content(copy.rank, copy.source) for copy in step.page_copies]
        for copy, content in zip(step.page_copies, contents, strict=True):
            self.words |= {(copy.rank, copy.page, offset): word for offset, word in enumerate(content)}
        for rank, row, entry, page in step.table_edits:
            self.table_RBM[rank, row, entry] = page
        generated = []
        for request, count in step.decodes.items():
            tokens = self._tokens_with_in_flight(request, count)
            for _ in range(count):
                self._write(request, tokens, len(tokens) - 1)
                tokens.append(next_token(self._read(request, len(tokens)), request.index))
                generated.append((request, tokens[-1]))
        for admission in step.admissions:
            row_pages = scheduler.row_pages[admission.request.id]
            self.table_RBM[:, admission.request.row] = make_page_table(row_pages, self.entries)
        for chunk in step.chunks:
            for position in range(chunk.first, chunk.first + chunk.count):
                self._write(chunk.request, chunk.request.all_token_ids, position)
            tokens = self._read(chunk.request, chunk.first + chunk.count)
            generated.append((chunk.request, chunk))
            if chunk.generates:
                generated.append((chunk.request, next_token(tokens, chunk.request.index)))
        return generated

    def _content(self, rank: int, page: int) -> list[tuple[int, int]]:
        return [self.words.get((rank, page, offset), (-1, -1)) for offset in range(self.allocator.page)]

    def _tokens_with_in_flight(self, request: Request, count: int) -> list[int]:
        """Return the tokens of a request before a call that decodes `count` of them."""
        tokens = list(request.all_token_ids)
        while len(tokens) <= request.num_computed - count:
            tokens.append(next_token(tokens, request.index))
        return tokens

    def _locate(self, request: Request, position: int) -> tuple[int, int, int]:
        rank, slot = owner_and_slot(self.allocator.layout, position, len(request.prompt))
        entry, offset = split_slot(slot, self.allocator.page)
        return rank, int(self.table_RBM[rank, request.row, entry]), offset

    def _write(self, request: Request, tokens: list[int], position: int) -> None:
        rank, page, offset = self._locate(request, position)
        assert page >= 0, f"position {position} has no page"
        self.words[rank, page, offset] = position, tokens[position]

    def _read(self, request: Request, length: int) -> list[int]:
        words = [self.words[self._locate(request, position)] for position in range(length)]
        assert [position for position, _ in words] == list(range(length))
        return [token for _, token in words]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests are submitted, cancelled and finished on few pages, with one step in flight."""

    @initialize(
        ranks=st.integers(1, 3),
        block=st.sampled_from([1, 2, 4]),
        page=st.sampled_from([1, 2, 4]),
        placement=st.sampled_from(PLACEMENTS),
        pages=st.integers(2, 14),
        chunk=st.integers(1, 9),
        budget=st.integers(1, 20),
        max_steps=st.sampled_from([1, 4, 32]),
    )
    def start(self, ranks, block, page, placement, pages, chunk, budget, max_steps):
        layout = BlockLayout(ranks, block, placement)
        share = prefix_block_len(layout, page) is not None
        self.allocator = PageAllocator(layout, pages, page, share=share)
        options = {"rows": ROWS, "budget": budget, "chunk": chunk, "max_steps": max_steps}
        self.scheduler = Scheduler([self.allocator], **options)
        self.devices = FakeDevices(self.allocator, pages_needed(MAX_LEN, page))
        self.unfinished: dict[str, Request] = {}
        self.in_flight: list[tuple[Request, int | Chunk]] = []
        self.scored: dict[str, list[int]] = {}  # the positions of each request, in the order of their scores
        self.submitted = 0

    @rule(
        start=st.integers(0, 2),
        more=st.lists(st.integers(0, 1), min_size=2, max_size=20),
        new=st.integers(2, 15),
        scoring=st.sampled_from([{}, {}, {"prompt_logprobs": 1}, {"prompt_logprobs": 0, "max_new_tokens": 0}]),
        first=st.integers(1, 3),
        samples=st.sampled_from([1, 1, 2, 5]),
    )
    def submit(self, start, more, new, scoring, first, samples):
        """Submit a request, or several samples of one prompt, of which the first may be scored."""
        prompt = [start, *more]
        for index in range(1 if scoring.get("max_new_tokens") == 0 else samples):
            self._submit(prompt, index, new, scoring if index == 0 else {}, first)

    def _submit(self, prompt: list[int], index: int, new: int, scoring: dict, first: int) -> None:
        first = {"prompt_logprobs_start": first} if scoring else {}
        request = Request(
            id=str(self.submitted),
            prompt=prompt,
            index=index,
            params=SamplingParams(**{"max_new_tokens": new, **scoring, **first}),
            stop_token_ids=frozenset({VOCAB - 1}),
            order=self.submitted,
            text=OutputText(None, ()),
            num_scored=first.get("prompt_logprobs_start", 1) - 1,
        )
        self.submitted += 1
        if self.allocator.count_pages(request.max_computed, len(request.prompt)).max() <= self.allocator.pages:
            self.unfinished[request.id] = request
            self.scored[request.id] = []
            self.scheduler.add(request)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def cancel(self, data):
        self._finish(self.unfinished[data.draw(st.sampled_from(sorted(self.unfinished)))])

    @rule(steps=st.integers(1, 12))
    def steps(self, steps):
        for _ in range(steps):
            step = self.scheduler.schedule()
            generated = self.devices.run(step, self.scheduler)
            for request, output in self.in_flight:
                if self.unfinished.get(request.id) is request:
                    self._append(request, output)
            self.in_flight = generated

    def _append(self, request: Request, output: int | Chunk) -> None:
        if isinstance(output, Chunk):
            assert set(output.scored) <= set(range(output.first, output.first + output.count))
            self.scored[request.id] += output.scored
            is_finished = output.finishes
        else:
            is_finished = request.append_token(output, None, 0.0)[1] is not None
        if is_finished:
            is_scored = request.params.prompt_logprobs is not None
            scored = range(request.params.prompt_logprobs_start - 1, len(request.prompt) - 1) if is_scored else []
            assert self.scored[request.id] == list(scored)
            self._finish(request)

    @invariant()
    def every_page_is_free_or_has_the_users_that_are_counted(self):
        if not hasattr(self, "allocator"):
            return
        rows, blocks = self.scheduler.row_pages.values(), self.allocator._prefix_blocks.values()
        for rank, free in enumerate(self.allocator._free_pages):
            users = Counter(page for one in (*rows, *blocks) for page in one.pages[rank])
            assert all(self.allocator._users[rank, page] == users[page] for page in range(self.allocator.pages))
            assert sorted([*free, *users]) == list(range(self.allocator.pages))
            in_blocks = Counter(page for block in blocks for page in block.pages[rank])
            assert max(in_blocks.values(), default=1) == 1
        for row_pages in rows:
            for block in self.allocator._unused_blocks:
                assert not any(set(a) & set(b) for a, b in zip(row_pages.pages, block.pages, strict=True))
        for request in self.scheduler.running:
            self._check_page_counts(request)

    def teardown(self):
        """Every remaining request finishes, and no page is lost."""
        if not hasattr(self, "allocator"):
            return
        for _ in range(5000):
            if not self.unfinished:
                break
            self.steps(1)
        assert not self.unfinished
        assert self.allocator.pages_in_use == (0,) * self.allocator.layout.ranks

    def _check_page_counts(self, request: Request) -> None:
        """A row has pages for what it has written, and for at most one block more."""
        prompt_len = len(request.prompt)
        counts = np.array([len(pages) for pages in self.scheduler.row_pages[request.id].pages])
        block_end = self.scheduler._block_end(request, request.num_computed)
        assert (counts >= self.allocator.count_pages(request.num_computed, prompt_len)).all()
        is_prefilling = request.num_computed < request.num_to_prefill
        assert is_prefilling or (counts <= self.allocator.count_pages(block_end, prompt_len)).all()

    def _finish(self, request: Request) -> None:
        expected = list(request.prompt)
        for token in request.token_ids:
            assert token == next_token(expected, request.index)
            expected.append(token)
        del self.unfinished[request.id]
        self.scheduler.remove(request)


class TestScheduler(SchedulerMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.slow
class TestSchedulerLong(SchedulerMachine.TestCase):
    settings = settings(max_examples=400, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize(
    ("layout", "page", "tokens"),
    [
        (BlockLayout(4, 16, "striped"), 64, 256),
        (BlockLayout(4, 16, "striped"), 4, 64),
        (BlockLayout(4, 16, "striped"), 24, None),
        (BlockLayout(4, 16, "helix"), 16, None),
    ],
)
def test_a_prefix_block_fills_whole_pages_on_every_rank(layout: BlockLayout, page: int, tokens: int | None):
    assert prefix_block_len(layout, page) == tokens
    status = describe_prefix_caching(layout, page, enabled=True)
    assert (status == "on") == (tokens is not None)
    assert describe_prefix_caching(layout, page, enabled=False).startswith("off: ")


def cache_prefix(allocator: PageAllocator, tokens: list[int]) -> int:
    """Run a row with these tokens from admission to release. Return how many were cached already."""
    row_pages, num_cached = allocator.match_prefix(tokens)
    assert allocator.grow(row_pages, len(tokens), len(tokens)) is not None
    allocator.register_prefix(row_pages, tokens, len(tokens))
    allocator.release(row_pages)
    return num_cached


def make_allocator(pages: int) -> PageAllocator:
    return PageAllocator(BlockLayout(1, 2, "striped"), pages=pages, page=2, share=True)


def test_an_unused_prefix_is_evicted_for_pages_the_oldest_first():
    allocator = make_allocator(pages=6)
    assert cache_prefix(allocator, [1, 2, 3, 4, 5]) == 0
    assert cache_prefix(allocator, [7, 8, 9, 9, 5]) == 0
    assert (allocator.pages_in_use, allocator.pages_cached) == ((0,), 4)
    assert cache_prefix(allocator, [1, 2, 3, 4, 6]) == 4  # which makes the other one the oldest
    assert cache_prefix(allocator, [0, 0, 0, 0, 0, 0, 0]) == 0
    assert cache_prefix(allocator, [1, 2, 3, 4, 6]) == 4
    assert cache_prefix(allocator, [7, 8, 9, 9, 5]) < 4


def test_no_prefix_is_evicted_if_all_of_them_are_too_few():
    allocator = make_allocator(pages=4)
    cache_prefix(allocator, [1, 2, 3])
    assert allocator.grow(RowPages.empty(1), 10, 10) is None
    assert allocator.pages_cached == 1


def test_the_end_of_a_prefix_is_evicted_first():
    allocator = make_allocator(pages=4)
    cache_prefix(allocator, [1, 2, 3, 4, 5, 6, 7])
    other, _ = allocator.match_prefix([9] * 4)
    assert allocator.grow(other, 4, 4)
    assert allocator.match_prefix([1, 2, 3, 4, 5, 6, 7])[1] == 4


@pytest.mark.parametrize(
    ("generated", "emitted", "text", "stopped"),
    [
        ("a quick fox", "a quick fox", "a quick fox", False),
        ("say END now", "say ", "say ", True),
        ("almost EN", "almost ", "almost EN", False),
        ("EN, not the EnD", "EN, not the EnD", "EN, not the EnD", False),
    ],
)
def test_text_ends_before_a_stop_string_and_withholds_its_beginning(generated, emitted, text, stopped):
    output, pieces, is_stopped = OutputText(ByteTokenizer(), ("END", "zzz")), [], False
    for token in generated.encode():
        is_stopped = output.append(token)
        pieces.append(output.emit(final=False))
        if is_stopped:
            break
    assert ("".join(pieces), is_stopped) == (emitted, stopped)
    output.emit(final=True)
    assert output.emitted == text
