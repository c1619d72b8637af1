"""Recall tasks in text: passkeys and lines that are asked for later. Used for training and for evaluation."""

from collections.abc import Iterator

import numpy as np

NAMES = (
    *("amber", "basil", "cedar", "coral", "ember", "fable", "flint", "grove", "hazel", "heron", "indigo", "ivory"),
    *("juniper", "kestrel", "lantern", "linden", "maple", "marble", "meadow", "nettle", "olive", "opal", "otter"),
    *("pebble", "quartz", "raven", "saffron", "sorrel", "thistle", "umber", "violet", "willow"),
)
DIGITS = 5
_MAX_DIGITS = 16  # in training: the longer a key, the more there is to copy
_MAX_KEYS = 12  # per text
_MAX_REPEATS = 8  # questions per key
_MAX_LINES = 8
_WORDS = 4  # of a line, by which it is asked for

Insert = tuple[int, bytes]  # a position in the text, and what is inserted there


def fact(name: str, key: str) -> bytes:
    """Return the sentence that states a passkey."""
    return f" The passkey of {name} is {key}. ".encode()


def question(name: str) -> bytes:
    """Return the question for a passkey, up to where the answer begins."""
    return f" What is the passkey of {name}? The passkey of {name} is ".encode()


def new_key(random: np.random.Generator, digits: int = DIGITS) -> str:
    """Return a random passkey."""
    return "".join(map(str, random.integers(0, 10, digits)))


def insert_passkeys(text: bytes, random: np.random.Generator) -> bytes:
    """Insert passkeys, lines to quote, questions for them and the answers into a text, and cut it to its length.

    Half of the keys are asked for often and soon, from which copying is learned. The others are asked for once, at any
    distance.
    """
    length = len(text)
    tasks = _make_passkey_tasks(random)
    added = sum(len(stated) + max(1, repeats) * len(answered) for stated, answered, repeats in tasks)
    text = text[: max(0, length - added)]  # else the last questions would be cut off, those far from their facts
    inserts = [insert for task in tasks for insert in _place_passkey(text, task, random)]
    inserts += _place_quotes(text, random)
    pieces, last = [], 0
    for position, piece in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [text[last:position], piece]
        last = position
    return b"".join([*pieces, text[last:]])[:length]


def _make_passkey_tasks(random: np.random.Generator) -> list[tuple[bytes, bytes, int]]:
    """Return facts, questions with their answers, and how often each is asked soon (0: once, anywhere)."""
    tasks = []
    for name in random.choice(NAMES, random.integers(1, _MAX_KEYS + 1), replace=False):
        key = new_key(random, int(random.integers(DIGITS, _MAX_DIGITS + 1)))
        repeats = int(random.integers(1, _MAX_REPEATS + 1)) if random.random() < 0.5 else 0
        tasks.append((fact(name, key), question(name) + f"{key}. ".encode(), repeats))
    return tasks


def _place_passkey(text: bytes, task: tuple[bytes, bytes, int], random: np.random.Generator) -> Iterator[Insert]:
    stated, answered, repeats = task
    start = round(len(text) * random.random() ** 2)  # early, so that much can follow
    rest = len(text) - start
    places = start + rest ** random.random(repeats) if repeats else start + rest * random.random(1)
    yield start, stated
    yield from ((round(place), answered) for place in places)


def _place_quotes(text: bytes, random: np.random.Generator) -> list[Insert]:
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")).tolist()
    inserts = []
    for _ in range(int(random.integers(0, _MAX_LINES + 1)) if len(ends) > 1 else 0):
        index = int(random.integers(0, len(ends) - 1))
        line = text[ends[index] + 1 : ends[index + 1]]
        inserts.append((int(random.integers(ends[index + 1], len(text) + 1)), _quote(line)))
    return inserts


def _quote(line: bytes) -> bytes:
    words = b" ".join(line.split(b" ")[:_WORDS])
    return b' The line that begins "' + words + b'" is "' + line + b'". '
