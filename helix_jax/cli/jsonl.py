"""Reads requests from, and writes results to, files with one JSON object per line.

The file of results also records which requests are done, so that an interrupted batch can continue.
"""

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from reprlib import repr as shorten
from types import TracebackType
from typing import Any, NamedTuple

from helix_jax.chat import check_messages, user_message
from helix_jax.cli.openai_lines import is_openai, own_fields
from helix_jax.engine.logprobs import TokenLogprobs
from helix_jax.engine.params import SamplingParams, sampling_params
from helix_jax.engine.requests import RequestOutput, sample_ids

# Every result starts with _START and has one of the keys _OUTCOMES.
_START, _OUTCOMES = b'{"id": ', {"tokens", "error"}


class RequestLine(NamedTuple):
    """A request of the input file.

    Attributes:
        line: The number of its line, from 1.
        id: Its id.
        prompt: Its prompt: text, token ids or messages.
        params: How it continues.
        done: The samples that have a result already, if there are several and others have none.
    """

    line: int
    id: str | int
    prompt: str | list[int] | list[dict[str, Any]]
    params: SamplingParams
    done: tuple[int, ...] = ()


class RejectedLine(NamedTuple):
    """A line of the input file that is not a valid request."""

    line: int
    id: str | int
    error: str


def read_requests(
    lines: Iterable[bytes], done: Container[str], *, chat: bool = False
) -> Iterator[RequestLine | RejectedLine]:
    """Parse requests lazily, one line at a time. Skip empty lines and requests that are done.

    A line is a request of our own, or one of OpenAI's batch API, whose id is its custom_id.

    Args:
        lines: The lines of the input file. A request without an id gets the number of its line. Ids are compared as
            text: 7 equals "7".
        done: The ids, as text, of the requests to skip, and of samples of requests, such as `id/0`.
        chat: Whether each text prompt is a user message.
    """
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        id: str | int = number
        try:
            fields = _object(line)
            from_openai = is_openai(fields)
            id = _id(fields, "custom_id" if from_openai else "id", default=number)
            _check_unused(id, line_of_id, number)
            if str(id) in done:
                continue
            if from_openai:
                fields = own_fields(fields)
            prompt, params = _pop_prompt(fields, chat=chat), sampling_params(fields)
            names = sample_ids(str(id), params.n)
            for name in names:
                _check_unused(name, line_of_id, number)
            finished = tuple(index for index, name in enumerate(names) if name in done)
            if len(finished) < params.n:
                yield RequestLine(number, id, prompt, params, finished)
        except (TypeError, ValueError) as error:
            yield RejectedLine(number, id, str(error))


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:  # its own message would give the line number 1
        raise ValueError(f"not JSON ({error.msg}, character {error.pos + 1}): give one object per line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): give one object per line") from None
    if not isinstance(value, dict):
        raise TypeError(f"request is {shorten(value)}: give an object like {{'prompt': 'And'}}")
    return value


def _id(fields: dict[str, Any], name: str, default: int) -> str | int:
    """Remove the id from the fields of a request and return it."""
    id = fields.pop(name, None)
    if id is None:
        return default
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        raise TypeError(f"{name} is {shorten(id)}: give a string or a whole number, or leave it out")
    return id


def _check_unused(id: str | int, line_of_id: dict[str, int], line: int) -> None:
    """Check that no other line has used an id, as its own or as that of a sample, and record that this line does."""
    first = line_of_id.setdefault(str(id), line)
    if first != line:
        raise ValueError(f"id {id!r} is used in line {first} already: give every line its own id")


def _pop_prompt(fields: dict[str, Any], *, chat: bool) -> str | list[int] | list[dict[str, Any]]:
    """Remove the prompt from the fields of a request and return it."""
    prompts = {name: fields.pop(name, None) for name in ("prompt", "prompt_ids", "messages")}
    given = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    if len(given) != 1:
        raise ValueError(f"request has {' and '.join(given) or 'no prompt'}: give one of {', '.join(prompts)}")
    [(name, prompt)] = given.items()
    if name == "messages":
        return check_messages(name, prompt)
    if name == "prompt":
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is {shorten(prompt)}: give text")
        return user_message(prompt) if chat and prompt else prompt
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise TypeError(f"prompt_ids is {shorten(prompt)}: give a list of token ids")
    if chat:
        raise ValueError("request has prompt_ids, and --chat needs text: give prompt or messages, or leave out --chat")
    return prompt


class ResultCounter:
    """Counts results. Processes that do not write use it in place of a ResultsFile.

    Attributes:
        done: The ids of the requests, and of the samples of requests, that had a result before.
        answered: Results since the start.
        tokens: The new tokens of these results.
        failed: Errors since the start.
        first_failed: The first of them.
    """

    def __init__(self, done: Iterable[str]):
        self.done = set(done)
        self.answered = self.tokens = self.failed = 0
        self.first_failed: RejectedLine | None = None

    def __enter__(self) -> "ResultCounter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def add(self, id: str | int, output: RequestOutput, index: int | None = None) -> None:
        """Add the output of a finished request, or of the sample `index` if it has several."""
        self._write(_encode(_result(id, output, index)))
        self.answered += 1
        self.tokens += len(output.tokens)

    def add_error(self, rejected: RejectedLine) -> None:
        """Add an error."""
        self._write(_encode({"id": rejected.id, "line": rejected.line, "error": rejected.error}))
        self.failed += 1
        self.first_failed = self.first_failed or rejected

    def _write(self, line: bytes) -> None:
        return


class ResultsFile(ResultCounter):
    """A file of results, to which results are appended as they arrive.

    Requests that have only an error are not in `done`: they are tried again, and an error that is in the file already
    is not written twice.

    Attributes:
        truncated: Whether the last line was incomplete, and was removed.

    Raises:
        ValueError: The file cannot be written, or contains something else. It is unchanged then.
    """

    def __init__(self, file: Path):
        super().__init__(())
        self._errors: set[bytes] = set()
        try:
            # A pipe has no earlier results.
            size, self.truncated = self._read(file) if file.is_file() else (0, False)
            self._file = file.open("ab")
        except OSError as error:
            raise ValueError(f"--out '{file}' cannot be written ({error.strerror}): choose another file") from None
        if self.truncated:
            self._file.truncate(size)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _write(self, line: bytes) -> None:
        if line not in self._errors:
            self._file.write(line)
            self._file.flush()  # results survive, however the command ends

    def _read(self, file: Path) -> tuple[int, bool]:
        """Read earlier results. Return the size of all complete lines, and whether an incomplete line follows."""
        size = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if _is_incomplete(line):
                    return size, True
                if not self._add_earlier(line):
                    raise ValueError(f"--out '{file}' has no result in line {number}: give another file")
                size += len(line)
        return size, False

    def _add_earlier(self, line: bytes) -> bool:
        """Record a line of the file. Return whether it is a result."""
        try:
            result = _object(line)
        except (TypeError, ValueError):
            return False
        if "error" in result:
            self._errors.add(line)
        elif "tokens" in result:
            id, index = result.get("id"), result.get("index")
            self.done.add(str(id) if index is None else f"{id}/{index}")
        return "id" in result and bool(_OUTCOMES & result.keys())


def _is_incomplete(line: bytes) -> bool:
    """Return whether the line is the beginning of a result."""
    if line.endswith(b"\n") or line[: len(_START)] != _START[: len(line)]:
        return False
    try:
        return bool(_OUTCOMES & _object(line).keys())  # complete but for the line break
    except ValueError:
        return True


def _encode(result: dict[str, Any]) -> bytes:
    return json.dumps(result).encode() + b"\n"


def _result(id: str | int, output: RequestOutput, index: int | None) -> dict[str, Any]:
    return {
        "id": id,
        **({} if index is None else {"index": index}),
        "text": output.text,
        "tokens": list(output.tokens),
        "prompt_tokens": output.prompt_tokens,
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "ttft_s": output.ttft_s,
        "s_per_token": output.s_per_token,
        "logprobs": _logprobs(output.logprobs),
        **({} if output.prompt_logprobs is None else {"prompt_logprobs": _logprobs(output.prompt_logprobs)}),
    }


def _logprobs(logprobs: Sequence[TokenLogprobs] | None) -> list[dict[str, Any]] | None:
    return None if logprobs is None else [{"logprob": logprob, "top": top} for logprob, top in logprobs]
