"""Decides what the next step does.

Decisions depend on submitted requests and on token counts, never on a clock or on tokens that are still on the devices.
With several processes, all of them therefore decide the same.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from helix_jax.engine.page_allocator import NewPage, PageAllocator, RowPages
from helix_jax.engine.requests import Request


@dataclass(frozen=True)
class Admission:
    """A request gets a row.

    Attributes:
        request: The request.
        num_cached: How many of its tokens are in the cache already.
        source_row: The row of another sample of the same prompt, if these tokens are that row's.
    """

    request: Request
    num_cached: int
    source_row: int | None = None


class PageCopy(NamedTuple):
    """A page of a row that is copied before the row writes to it.

    Attributes:
        row: The row.
        rank: The rank that both pages are on.
        source: The page.
        page: The copy.
    """

    row: int
    rank: int
    source: int
    page: int


@dataclass(frozen=True)
class Chunk:
    """Tokens of a request to prefill.

    Attributes:
        request: The request.
        first: The position of the first token.
        count: The number of tokens.
        is_last: Whether they are the last ones.
        group: The dp group of the row.
        scored: The positions whose next tokens get log-probabilities.
    """

    request: Request
    first: int
    count: int
    is_last: bool
    group: int
    scored: range = range(0)

    @property
    def scored_tokens(self) -> slice:
        """Which tokens of the chunk these are."""
        return slice(self.scored.start - self.first, self.scored.stop - self.first)

    @property
    def generates(self) -> bool:
        """Whether the step also generates a token."""
        return self.is_last and self.request.params.max_new_tokens > 0

    @property
    def finishes(self) -> bool:
        """Whether it ends a request that generates nothing."""
        return self.is_last and self.request.params.max_new_tokens == 0


@dataclass(frozen=True)
class ScheduledStep:
    """The work of one step.

    Attributes:
        page_copies: Pages to copy before everything else.
        table_edits: Updates of the page tables of rows that decode, as (rank, row, entry, page).
        admissions: Requests that get a row.
        chunks: Tokens to prefill.
        decodes: Requests that decode, each with the most tokens that it decodes.
    """

    page_copies: list[PageCopy] = field(default_factory=list)
    table_edits: list[tuple[int, int, int, int]] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decodes: dict[Request, int] = field(default_factory=dict)


class Place(NamedTuple):
    """Where a waiting request can run.

    Attributes:
        request: The first of those that wait.
        row: A free row.
        source: A sample of the same prompt that decodes in the same dp group, with which it shares the prompt's pages.
    """

    request: Request
    row: int
    source: Request | None


class Scheduler:
    """Assigns rows and pages to requests: first come, first served. If no page is free, it preempts the newest request.

    The rows are divided evenly among the dp groups of the mesh, in order. Each group has its own pages.

    A sample of a prompt waits while another sample prefills the prompt. It then forks the row of a sample that decodes,
    in the same dp group, and begins with the last token of the prompt. If no sample has the prompt (any more), because
    all that were running have finished or were preempted, it prefills the prompt like any request.

    Args:
        allocators: The pages of all ranks of each dp group.
        rows: The most requests that run at once, a multiple of the number of groups.
        budget: The most tokens to prefill per step. Decoded tokens do not count.
        chunk: The most tokens of one request to prefill per call.
        max_steps: The most tokens of one request to decode per call.
        windows: Whether some layers have a window, and keep only as many positions as a window and a chunk need.
    """

    def __init__(
        self,
        allocators: Sequence[PageAllocator],
        *,
        rows: int,
        budget: int,
        chunk: int,
        max_steps: int,
        windows: bool = False,
    ):
        self.allocators, self._rows, self._windows = allocators, rows, windows
        self._budget, self._chunk, self._max_steps = budget, chunk, max_steps
        self.waiting: OrderedDict[str, Request] = OrderedDict()  # by id, the next to be admitted first
        self.running: list[Request] = []  # in the order of admission
        self.row_pages: dict[str, RowPages] = {}  # of each running request
        self.preemptions = 0
        self._free_rows = set(range(rows))
        # Tokens to cache before a request decodes, those that are cached already included.
        self._prefill_len: dict[str, int] = {}
        # The request that was last refused for lack of pages, and the number of releases then: retried after another.
        self._refused: tuple[Request, int] | None = None

    def add(self, request: Request) -> None:
        """Let a request wait behind all others."""
        self.waiting[request.id] = request

    def schedule(self) -> ScheduledStep:
        """Return the work of the next step, and advance the counts of its requests as if it had run."""
        step = ScheduledStep()
        preemptions = self.preemptions
        for request in [r for r in self.running if self._is_prefilled(r) and not r.num_remaining]:
            self._free(request)  # its last token is in flight, so it needs neither row nor pages
        self._schedule_decodes(step)
        # No request is admitted in a step that preempts one: the preempted request is the next to be admitted, but some
        # of its tokens may be in flight, so its prefill has to wait for one step.
        self._schedule_prefills(step, may_admit=self.preemptions == preemptions)
        for request, count in step.decodes.items():
            request.num_computed += count
            request.in_flight += count
        return step

    def admit_transferred(self, request: Request) -> bool:
        """Assign a row and pages to a request that was started in another engine, ahead of waiting requests.

        Returns:
            True if they were assigned. False if no row or too few pages are free; then nothing has changed.
        """
        row, length = self._free_row(), self._block_end(request, len(request.all_token_ids))
        if row is None:
            return False
        row_pages = RowPages.empty(self.allocators[0].layout.ranks)
        if self._allocator(row).grow(row_pages, length, len(request.prompt)) is None:
            return False
        self._assign_row(request, row, row_pages)
        return True

    def remove(self, request: Request) -> None:
        """Remove a request, and free its row and pages."""
        if request.row is not None:
            self._free(request)
        else:
            self.waiting.pop(request.id, None)  # it is not there if its last token was in flight

    def group_of(self, row: int) -> int:
        """Return the dp group of a row."""
        return row // (self._rows // len(self.allocators))

    def _free(self, request: Request) -> None:
        self.running.remove(request)
        self._free_rows.add(request.assigned_row)
        self._allocator(request.assigned_row).release(self.row_pages.pop(request.id))
        del self._prefill_len[request.id]
        request.row = None

    def _is_prefilled(self, request: Request) -> bool:
        return request.num_computed >= self._prefill_len[request.id]

    def _schedule_decodes(self, step: ScheduledStep) -> None:
        """Schedule the requests that decode, and allocate the pages that their tokens need."""
        decoding = [request for request in self.running if self._is_prefilled(request)]
        steps = self._count_steps(decoding)
        for request in decoding:
            if request.row is not None and (count := self._allocate_tokens(request, steps, step)):
                step.decodes[request] = count
        # A request may have been preempted after it was added.
        for request in [request for request in step.decodes if request.row is None]:
            del step.decodes[request]
        rows = {request.row for request in step.decodes}
        step.table_edits[:] = [edit for edit in step.table_edits if edit[1] in rows]
        step.page_copies[:] = [copy for copy in step.page_copies if copy.row in rows]

    def _count_steps(self, decoding: list[Request]) -> int:
        """Return the number of steps of the next decode call.

        It is 1 while a prompt can be prefilled, so that decoding does not delay it. While requests wait for a row or
        for pages, the call ends with the request that ends first. This depends on counts alone.
        """
        remaining = [request.num_remaining for request in decoding]
        if len(decoding) < len(self.running) or self._next_place(decoding):
            return 1
        return min(self._max_steps, (min if self.waiting else max)(remaining, default=1))

    def _next_place(self, decoding: Collection[Request]) -> Place | None:
        """Return where the first waiting request can run.

        Args:
            decoding: The requests that decode in this step, whose prompts are therefore in the cache.

        Returns:
            The place, or None if the request waits for a row, for its prompt, or for pages to be released.
        """
        request = next(iter(self.waiting.values()), None)
        if request is None or not self._free_rows or self._refused == (request, self._num_releases()):
            return None
        samples = [other for other in self.running if other.is_sample_with(request)]
        sources = [sample for sample in samples if sample in decoding and self._keeps_prompt(sample)]
        if not sources and any(sample not in decoding for sample in samples):
            return None
        source = sources[0] if sources else None
        row = self._free_row(None if source is None else self.group_of(source.assigned_row))
        return None if row is None else Place(request, row, source)

    def _keeps_prompt(self, request: Request) -> bool:
        """Return whether the cache has what the last token of the prompt sees, also in layers with a window."""
        return not self._windows or request.num_computed - request.num_shareable <= self._chunk

    def _allocate_tokens(self, request: Request, steps: int, step: ScheduledStep) -> int:
        """Allocate pages for the next tokens of a request, at most `steps`.

        If there are too few pages for all of them, allocate those of one token, preempting the newest requests of the
        same dp group if necessary.

        Returns:
            The number of tokens that have pages, 0 if the request itself was preempted.
        """
        count = min(steps, request.num_remaining)
        if self._grow(request, count, step):
            return count
        while not self._grow(request, 1, step):
            group = self.group_of(request.assigned_row)
            newest = max((r for r in self.running if self.group_of(r.assigned_row) == group), key=lambda r: r.order)
            self._preempt(newest)
            if newest is request:
                return 0
        return 1

    def _grow(self, request: Request, count: int, step: ScheduledStep) -> bool:
        """Allocate pages for the blocks of the next `count` tokens of a request. Return False if there are too few."""
        length, row = self._block_end(request, request.num_computed + count - 1), request.assigned_row
        new_pages = self._allocator(row).grow(self.row_pages[request.id], length, len(request.prompt))
        if new_pages is None:
            return False
        step.table_edits.extend((new.rank, row, new.entry, new.page) for new in new_pages)
        step.page_copies.extend(_copies(row, new_pages))
        return True

    def _allocator(self, row: int) -> PageAllocator:
        return self.allocators[self.group_of(row)]

    def _free_row(self, group: int | None = None) -> int | None:
        """Return a free row of a dp group, or of the one that has most of them. None if all rows are in use."""
        rows = [row for row in self._free_rows if group in (None, self.group_of(row))]
        free = Counter(map(self.group_of, rows))
        return max(rows, key=lambda row: (free[self.group_of(row)], -row), default=None)

    def _block_end(self, request: Request, position: int) -> int:
        """Return the end of the block that contains `position`, capped at what the request can cache."""
        layout = self.allocators[0].layout
        start = layout.decode_start(len(request.prompt))
        blocks = max(position - start, 0) // layout.block + 1
        return min(start + blocks * layout.block, request.max_computed)

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.num_computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting[request.id] = request
        self.waiting.move_to_end(request.id, last=False)

    def _schedule_prefills(self, step: ScheduledStep, may_admit: bool) -> None:
        """Schedule chunks within the budget, of running requests first.

        A waiting request is admitted as late as possible, because an earlier request of the step may cache its prefix.
        """
        budget = self._budget
        started = iter([request for request in self.running if not self._is_prefilled(request)])
        while budget > 0:
            request = next(started, None) or (self._admit_next(step) if may_admit else None)
            if request is None:
                return
            for chunk in self._chunks(request, budget):
                step.chunks.append(chunk)
                budget -= chunk.count

    def _admit_next(self, step: ScheduledStep) -> Request | None:
        """Admit and return the first waiting request; None if there is none, or it has to wait."""
        place = self._next_place(step.decodes)
        if place is None:
            return None
        request, row, source = place
        allocator = self._allocator(row)
        row_pages, num_cached = self._cached_prefix(place)
        length = self._block_end(request, len(request.all_token_ids))
        new_pages = allocator.grow(row_pages, length, len(request.prompt))
        if new_pages is None:
            allocator.release(row_pages)
            self._refused = request, self._num_releases()
            return None
        del self.waiting[request.id]
        self._assign_row(request, row, row_pages)
        request.num_computed = num_cached
        if source and request.num_to_prefill == num_cached + 1:
            self._prefill_len[request.id] = num_cached  # the first step that it decodes appends the last token
        if not request.preemptions:  # after a preemption, the cached prefix may be what this request wrote itself
            request.shared_tokens = num_cached
        step.page_copies.extend(_copies(row, new_pages))
        step.admissions.append(Admission(request, num_cached, source.row if source else None))
        return request

    def _cached_prefix(self, place: Place) -> tuple[RowPages, int]:
        """Return the pages of what is cached of a waiting request, and the number of these tokens."""
        request, row, source = place
        allocator = self._allocator(row)
        if source:
            pages = allocator.fork(self.row_pages[source.id], request.num_shareable, len(request.prompt))
            return pages, request.num_shareable
        # The cache does not have the hidden states of the tokens that are to be scored.
        end = request.num_scored + 1 if request.needs_scores else request.num_to_prefill
        return allocator.match_prefix(request.all_token_ids[:end])

    def _num_releases(self) -> int:
        return sum(allocator.num_releases for allocator in self.allocators)

    def _assign_row(self, request: Request, row: int, row_pages: RowPages) -> None:
        self._free_rows.remove(row)
        request.row = row
        self.row_pages[request.id] = row_pages
        self._prefill_len[request.id] = request.num_to_prefill
        self.running.append(request)

    def _chunks(self, request: Request, budget: int) -> Iterator[Chunk]:
        prefill_len = self._prefill_len[request.id]
        while request.num_computed < prefill_len and budget > 0:
            count = min(prefill_len - request.num_computed, self._chunk, budget)
            first, end = request.num_computed, request.num_computed + count
            scored, group = request.schedule_scores(first, end), self.group_of(request.assigned_row)
            chunk = Chunk(request, first, count, end == prefill_len, group, scored)
            request.num_computed = end
            request.in_flight += chunk.generates
            budget -= count
            allocator = self._allocator(request.assigned_row)
            allocator.register_prefix(self.row_pages[request.id], request.all_token_ids, request.num_computed)
            yield chunk


def _copies(row: int, new_pages: Sequence[NewPage]) -> Iterator[PageCopy]:
    return (PageCopy(row, new.rank, new.source, new.page) for new in new_pages if new.source is not None)


def make_page_table(row_pages: RowPages, entries: int) -> np.ndarray:
    """Return the page table of a row on every rank, [R, M]. A write to an entry without a page, -1, is dropped."""
    table_RM = np.full((len(row_pages.pages), entries), -1, np.int32)
    for rank, pages in enumerate(row_pages.pages):
        table_RM[rank, : len(pages)] = pages
    return table_RM
