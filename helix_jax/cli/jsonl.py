"""Requests come in, and results go out, one a line of JSON; a file of results says what is done already."""

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from reprlib import repr as shortly
from types import TracebackType
from typing import Any, NamedTuple

from helix_jax.engine.params import SamplingParams, sampling_params
from helix_jax.engine.requests import RequestOutput

_START, _KINDS = b'{"id": ', {"tokens", "error"}  # how every result begins, and one of what it holds


class RequestLine(NamedTuple):
    """A request, and the number of its line, counted from 1."""

    line: int
    id: str | int
    prompt: str | list[int]
    params: SamplingParams


class RejectedLine(NamedTuple):
    """A line that is no request."""

    line: int
    id: str | int
    error: str


def read_requests(lines: Iterable[bytes], done: Container[str]) -> Iterator[RequestLine | RejectedLine]:
    """Line by line, as they are wanted; an empty line, and one whose id is in `done`, is passed over.

    An id that is left out is the number of the line. Ids are told apart as text: 7 is "7".
    """
    first: dict[str, int] = {}  # where each id stood
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name: str | int = number
        try:
            given = _object(line)
            name = _id(given.pop("id", number))
            before = first.setdefault(str(name), number)
            if before != number:
                raise ValueError(f"id {name!r} is that of line {before} already: give each line its own")
            if str(name) not in done:
                prompt = _prompt(given)
                yield RequestLine(number, name, prompt, sampling_params(given))
        except ValueError as error:
            yield RejectedLine(number, name, str(error))


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:  # its own message would tell of a line 1
        raise ValueError(f"not JSON ({error.msg}, character {error.pos + 1}): give one object a line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): give one object a line") from None
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} is not a request: give an object like {{'prompt': 'And'}}")
    return found


def _id(name: Any) -> str | int:
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ValueError(f"id is {shortly(name)}: give a string or a whole number, or leave it out")
    return name


def _prompt(given: dict[str, Any]) -> str | list[int]:
    """Takes it out of what is given."""
    found = {name: given.pop(name) for name in ("prompt", "prompt_ids") if name in given}
    if not found:
        raise ValueError("there is no prompt: give prompt or prompt_ids")
    if len(found) == 2:
        raise ValueError("there are prompt and prompt_ids: give one of them")
    [(name, prompt)] = found.items()
    if not isinstance(prompt, str if name == "prompt" else list):
        raise ValueError(f"{name} is {shortly(prompt)}: give {'text' if name == 'prompt' else 'a list of token ids'}")
    return prompt


class ResultsFile:
    """A file of results, to which more are added.

    done: the ids that it has a result of. Those that only failed are not among them: they are tried again, and an error
    that stands there already is not written twice. mended: its last line was half written, and is gone. answered,
    failed: lines since it was opened; first_failed: the one to name.

    Raises:
        ValueError: it cannot be written, or what it holds are no results: then nothing has changed.
    """

    def __init__(self, file: Path):
        self.done: set[str] = set()
        self.answered, self.failed = 0, 0
        self.first_failed: RejectedLine | None = None
        self._errors: set[bytes] = set()
        try:
            whole_bytes, self.mended = self._read(file) if file.is_file() else (0, False)  # a pipe has no past
            self._file = file.open("ab")
        except OSError as error:
            raise ValueError(f"--out '{file}' cannot be written: {error.strerror}") from None
        if self.mended:
            self._file.truncate(whole_bytes)

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str | int, result: RequestOutput) -> None:
        self._write(_line(_entry(name, result)))
        self.answered += 1

    def add_error(self, refused: RejectedLine) -> None:
        line = _line({"id": refused.id, "line": refused.line, "error": refused.error})
        if line not in self._errors:
            self._write(line)
        self.failed += 1
        self.first_failed = self.first_failed or refused

    def _write(self, line: bytes) -> None:
        """Whatever ends the run, what was written stays."""
        self._file.write(line)
        self._file.flush()

    def _read(self, file: Path) -> tuple[int, bool]:
        """Bytes of whole lines, and whether half a line follows."""
        size = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if _half_written(line):
                    return size, True
                if not self._take(line):
                    raise ValueError(f"--out '{file}' holds no result in line {number}: give another file")
                size += len(line)
        return size, False

    def _take(self, line: bytes) -> bool:
        """Whether it is one of ours."""
        try:
            found = _object(line)
        except ValueError:
            return False
        if "error" in found:
            self._errors.add(line)
        elif "tokens" in found:
            self.done.add(str(found.get("id")))
        return "id" in found and bool(_KINDS & found.keys())


class NonWritingResults(ResultsFile):
    """Of one of several processes that is not the first: it counts as that one does, and writes nothing."""

    def __init__(self, done: Iterable[str]):
        self.done, self.mended = set(done), False
        self.answered, self.failed = 0, 0
        self.first_failed = None
        self._errors = set()

    def __exit__(self, *_: object) -> None:
        pass

    def _write(self, line: bytes) -> None:
        pass


def _half_written(line: bytes) -> bool:
    """Whether it is how one of our lines begins, and no more than that."""
    if line.endswith(b"\n") or line[: len(_START)] != _START[: len(line)]:
        return False
    try:
        return bool(_KINDS & _object(line).keys())  # all but its end
    except ValueError:
        return True


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _entry(name: str | int, result: RequestOutput) -> dict[str, Any]:
    told = result.logprobs
    return {
        "id": name,
        "text": result.text,
        "tokens": list(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "ttft_s": result.ttft_s,
        "s_per_token": result.s_per_token,
        "logprobs": None if told is None else [{"logprob": one, "top": top} for one, top in told],
    }
