"""Decides what the next step does.

Decisions depend on submitted requests and on token counts, never on a clock or on tokens that are still on the devices.
With several processes, all of them therefore decide the same.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from helix_jax.engine.page_allocator import PageAllocator, RowPages
from helix_jax.engine.requests import Request


@dataclass(frozen=True)
class Admission:
    """A request gets a row.

    Attributes:
        request: The request.
        num_cached: How many of its tokens are in the cache already.
    """

    request: Request
    num_cached: int


@dataclass(frozen=True)
class Chunk:
    """Tokens of a request to prefill.

    Attributes:
        request: The request.
        first: The position of the first token.
        count: The number of tokens.
        is_last: Whether they are the last ones, so that the step also generates a token.
    """

    request: Request
    first: int
    count: int
    is_last: bool


@dataclass(frozen=True)
class ScheduledStep:
    """The work of one step.

    Attributes:
        table_edits: Updates of the page tables of rows that decode, as (rank, row, entry, page).
        admissions: Requests that get a row.
        chunks: Tokens to prefill.
        decodes: Requests that decode a token.
    """

    table_edits: list[tuple[int, int, int, int]] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)


class Scheduler:
    """Assigns rows and pages to requests: first come, first served. If no page is free, it preempts the newest request.

    Args:
        allocator: The pages of all ranks.
        rows: The most requests that run at once.
        budget: The most tokens to prefill per step. Decoded tokens do not count.
        chunk: The most tokens of one request to prefill per call.
    """

    def __init__(self, allocator: PageAllocator, rows: int, budget: int, chunk: int):
        self.allocator, self._budget, self._chunk = allocator, budget, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of admission
        self.row_pages: dict[str, RowPages] = {}  # of each running request
        self.preemptions = 0
        self._free_rows = list(range(rows - 1, -1, -1))
        self._prefill_len: dict[
            str, int
        ] = {}  # tokens to cache before a request decodes, those that are cached already included
        # The request that was last refused for lack of pages, and the number of releases then: retried after another.
        self._refused: tuple[Request, int] | None = None

    def schedule(self) -> ScheduledStep:
        """Return the work of the next step, and advance the counts of its requests as if it had run."""
        step = ScheduledStep()
        preemptions = self.preemptions
        for request in [r for r in self.running if r.num_generated == r.params.max_new_tokens]:
            self._free(request)  # its last token is in flight, so it needs neither row nor pages
        for request in [r for r in self.running if self._is_prefilled(r)]:
            if request.row is not None and self._allocate_next_block(request, step):
                step.decodes.append(request)
        # A request may have been preempted after it was added.
        step.decodes[:] = [request for request in step.decodes if request.row is not None]
        rows = {request.row for request in step.decodes}
        step.table_edits[:] = [edit for edit in step.table_edits if edit[1] in rows]
        # No request is admitted in a step that preempts one: the preempted request is the next to be admitted, but one
        # of its tokens may be in flight, so its prefill has to wait for one step.
        self._schedule_prefills(step, may_admit=self.preemptions == preemptions)
        for request in step.decodes:
            request.num_computed += 1
            request.in_flight += 1
        return step

    def admit_transferred(self, request: Request) -> bool:
        """Assign a row and pages to a request that was started in another engine, ahead of waiting requests.

        Returns:
            True if they were assigned. False if no row or too few pages are free; then nothing has changed.
        """
        row_pages = RowPages.empty(self.allocator.layout.ranks)
        length = self._block_end(request, len(request.all_token_ids))
        if not self._free_rows or self.allocator.grow(row_pages, length, len(request.prompt)) is None:
            return False
        self._assign_row(request, row_pages)
        return True

    def remove(self, request: Request) -> None:
        """Remove a request, and free its row and pages."""
        if request.row is not None:
            self._free(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _free(self, request: Request) -> None:
        self.running.remove(request)
        self._free_rows.append(request.assigned_row)
        self.allocator.release(self.row_pages.pop(request.id))
        del self._prefill_len[request.id]
        request.row = None

    def _is_prefilled(self, request: Request) -> bool:
        return request.num_computed >= self._prefill_len[request.id]

    def _allocate_next_block(self, request: Request, step: ScheduledStep) -> bool:
        """Allocate pages for the block of the next token, preempting the newest requests if necessary.

        Returns False if the request itself was preempted.
        """
        length, prompt_len = self._block_end(request, request.num_computed), len(request.prompt)
        while (new_pages := self.allocator.grow(self.row_pages[request.id], length, prompt_len)) is None:
            newest = max(self.running, key=lambda r: r.order)
            self._preempt(newest)
            if newest is request:
                return False
        step.table_edits.extend((rank, request.assigned_row, entry, page) for rank, entry, page in new_pages)
        return True

    def _block_end(self, request: Request, position: int) -> int:
        """Return the end of the block that contains `position`, capped at what the request can cache."""
        layout = self.allocator.layout
        start = layout.decode_start(len(request.prompt))
        blocks = max(position - start, 0) // layout.block + 1
        return min(start + blocks * layout.block, request.max_computed)

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.num_computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

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
        """Admit and return the first waiting request; None if there is none, or too few rows or pages are free."""
        if not self.waiting or not self._free_rows:
            return None
        request = self.waiting[0]
        if self._refused == (request, self.allocator.num_releases):
            return None  # no page has been released since
        row_pages, num_cached = self.allocator.match_prefix(request.all_token_ids)
        length = self._block_end(request, len(request.all_token_ids))
        if self.allocator.grow(row_pages, length, len(request.prompt)) is None:
            self.allocator.release(row_pages)
            self._refused = request, self.allocator.num_releases
            return None
        self.waiting.popleft()
        self._assign_row(request, row_pages)
        request.num_computed = num_cached
        if not request.preemptions:  # after a preemption, the cached prefix may be what this request wrote itself
            request.shared_tokens = num_cached
        step.admissions.append(Admission(request, num_cached))
        return request

    def _assign_row(self, request: Request, row_pages: RowPages) -> None:
        request.row = self._free_rows.pop()
        self.row_pages[request.id] = row_pages
        self._prefill_len[request.id] = len(request.all_token_ids)
        self.running.append(request)

    def _chunks(self, request: Request, budget: int) -> Iterator[Chunk]:
        prefill_len = self._prefill_len[request.id]
        while request.num_computed < prefill_len and budget > 0:
            count = min(prefill_len - request.num_computed, self._chunk, budget)
            chunk = Chunk(request, request.num_computed, count, request.num_computed + count == prefill_len)
            request.num_computed += count
            request.in_flight += chunk.is_last
            budget -= count
            self.allocator.register_prefix(self.row_pages[request.id], request.all_token_ids, request.num_computed)
            yield chunk


def make_page_table(row_pages: RowPages, entries: int) -> np.ndarray:
    """Return the page table of a row on every rank, [R, M]. A write to an entry without a page, -1, is dropped."""
    table_RM = np.full((len(row_pages.pages), entries), -1, np.int32)
    for rank, pages in enumerate(row_pages.pages):
        table_RM[rank, : len(pages)] = pages
    return table_RM
