"""What the next step does: decided from what was submitted and from counts of steps, never from a clock or from tokens
that are still on the devices, so that every process decides the same."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from helix_jax.engine.page_allocator import RowPages, PageAllocator
from helix_jax.engine.requests import Request


@dataclass(frozen=True)
class Admission:
    """A request takes a row; `cached` of its tokens are there already."""

    request: Request
    cached: int


@dataclass(frozen=True)
class Chunk:
    """Tokens [first, first + count) of a request are cached; with the last of them it says something."""

    request: Request
    first: int
    count: int
    last: bool


@dataclass(frozen=True)
class ScheduledStep:
    """One step. edits: (rank, row, entry, page), into the tables of rows that have their seats."""

    edits: list[tuple[int, int, int, int]] = field(default_factory=list)
    seats: list[Admission] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)


class Scheduler:
    """Rows, pages and whose turn it is. First come, first served; when pages run out the youngest starts anew later."""

    def __init__(self, memory: PageAllocator, rows: int, budget: int, chunk: int):
        self.memory, self._budget, self._chunk = memory, budget, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their seats
        self.held: dict[str, RowPages] = {}
        self._free_rows = list(range(rows - 1, -1, -1))
        self._target: dict[str, int] = {}  # tokens to cache before a request says something
        self._refused: tuple[Request, int] | None = None  # who found too few pages, after how many releases
        self.preemptions = 0

    def schedule(self) -> ScheduledStep:
        work = ScheduledStep()
        before = self.preemptions
        for request in [r for r in self.running if r.said == r.params.max_new_tokens]:
            self._leave(request)  # its last token is on its way: it needs neither row nor pages
        for request in [r for r in self.running if self._decodes(r)]:
            if request.row is not None and self._make_room(request, work):
                work.decodes.append(request)
        work.decodes[:] = [request for request in work.decodes if request.row is not None]
        work.edits[:] = [edit for edit in work.edits if any(edit[1] == r.row for r in work.decodes)]
        # Nobody sits down in a step in which someone lost its row: it comes first, and a token of it may be on its way.
        self._prefill(work, may_seat=self.preemptions == before)
        for request in work.decodes:
            request.written += 1
            request.running_ahead += 1
        return work

    def admit_transferred(self, request: Request) -> bool:
        """A row and pages for a request that was begun elsewhere; or False, and nothing, if they are not free."""
        held = self.memory.nothing()
        length = self._ahead(request, len(request.known))
        if not self._free_rows or self.memory.grow(held, length, len(request.prompt)) is None:
            return False
        self._sit(request, held)
        return True

    def drop(self, request: Request) -> None:
        """A request has ended: it gives back what it has."""
        if request.row is not None:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        assert request.row is not None
        self.running.remove(request)
        self._free_rows.append(request.row)
        self.memory.release(self.held.pop(request.id))
        del self._target[request.id]
        request.row = None

    def _decodes(self, request: Request) -> bool:
        return request.written >= self._target[request.id]

    def _make_room(self, request: Request, work: ScheduledStep) -> bool:
        """Pages for the block of its next token; the youngest gives way, be it this one."""
        length = self._ahead(request, request.written)
        while (given := self.memory.grow(self.held[request.id], length, len(request.prompt))) is None:
            youngest = max(self.running, key=lambda r: r.order)
            self._preempt(youngest)
            if youngest is request:
                return False
        work.edits.extend((rank, row_of(request), entry, page) for rank, entry, page in given)
        return True

    def _ahead(self, request: Request, position: int) -> int:
        """Where the block of its next token, at `position`, ends: no further than it can come."""
        layout = self.memory.layout
        start = layout.decode_start(len(request.prompt))
        block = max(position - start, 0) // layout.block + 1
        return min(start + block * layout.block, request.most)

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        request.written = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _prefill(self, work: ScheduledStep, may_seat: bool) -> None:
        """Chunks, within the budget. Who waits is row_of when its turn comes: its prefix may be cached by then."""
        budget = self._budget
        begun = iter([request for request in self.running if not self._decodes(request)])
        while budget > 0:
            request = next(begun, None) or (self._seat_next(work) if may_seat else None)
            if request is None:
                return
            for chunk in self._chunks(request, budget):
                work.chunks.append(chunk)
                budget -= chunk.count

    def _seat_next(self, work: ScheduledStep) -> Request | None:
        """The first that waits, now with a row and pages; None while there is not enough of them."""
        if not self.waiting or not self._free_rows:
            return None
        request = self.waiting[0]
        if self._refused == (request, self.memory.releases):
            return None  # nothing has come back since
        held, cached = self.memory.start(request.known)
        if self.memory.grow(held, self._ahead(request, len(request.known)), len(request.prompt)) is None:
            self.memory.release(held)
            self._refused = request, self.memory.releases
            return None
        self.waiting.popleft()
        self._sit(request, held)
        request.written = cached
        request.shared = request.shared if request.preemptions else cached  # later it would find its own
        work.seats.append(Admission(request, cached))
        return request

    def _sit(self, request: Request, held: RowPages) -> None:
        request.row = self._free_rows.pop()
        self.held[request.id], self._target[request.id] = held, len(request.known)
        self.running.append(request)

    def _chunks(self, request: Request, budget: int) -> Iterator[Chunk]:
        target = self._target[request.id]
        while request.written < target and budget > 0:
            count = min(target - request.written, self._chunk, budget)
            chunk = Chunk(request, request.written, count, request.written + count == target)
            request.written += count
            request.running_ahead += chunk.last
            budget -= count
            self.memory.register_prefix(self.held[request.id], request.known, request.written)
            yield chunk


def row_of(request: Request) -> int:
    """The row of a request that has one."""
    assert request.row is not None
    return request.row


def table_of(held: RowPages, entries: int) -> np.ndarray:
    """[R, M], -1 where there is no page: what is written there is dropped."""
    table_RM = np.full((len(held.pages), entries), -1, np.int32)
    for rank, pages in enumerate(held.pages):
        table_RM[rank, : len(pages)] = pages
    return table_RM
