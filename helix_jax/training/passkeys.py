"""Recall tasks in text: passkeys and lines that are asked for later. Used for training and for evaluation."""

import re
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
_STATED = re.compile(rb"The passkey of (\w+) is (\d+\.)")

# Of texts with little but passkeys.
_MAX_DRILL_KEYS = 2
_MAX_DRILL_DIGITS = 10
_MAX_FILLER = 15  # bytes of text between two sentences
_RESTATED = 0.6  # the share of facts that are stated again; the others are asked for
_DISTINCT_UNTIL, _DISTINCT_AFTER = 0.6, 0.2  # of the steps; the share of such keys in the steps that follow

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


def passkey_drill(text: bytes, random: np.random.Generator, progress: float) -> bytes:
    """Return a text of the same length with little but passkeys, each stated and asked for again and again.

    At first no digit of a key occurs twice, so that the digit before determines the one that follows: that is easier to
    learn.

    Args:
        text: What is between the sentences is taken from it.
        random: The source of randomness.
        progress: The share of the training that is done.
    """
    names = random.choice(NAMES, random.integers(1, _MAX_DRILL_KEYS + 1), replace=False)
    keys = {str(name): _drill_key(random, progress) for name in names}
    pieces = [_filler(text, random) + fact(name, key) for name, key in keys.items()]
    while sum(map(len, pieces)) < len(text):
        name = str(random.choice(names))
        pieces.append(_filler(text, random) if random.random() < 0.5 else b"")
        is_restated = random.random() < _RESTATED
        pieces.append(fact(name, keys[name]) if is_restated else question(name) + f"{keys[name]}. ".encode())
    return b"".join(pieces)[: len(text)]


def _drill_key(random: np.random.Generator, progress: float) -> str:
    digits = int(random.integers(DIGITS, _MAX_DRILL_DIGITS + 1))
    is_distinct = progress < _DISTINCT_UNTIL or random.random() < _DISTINCT_AFTER
    return "".join(map(str, random.permutation(10)[:digits])) if is_distinct else new_key(random, digits)


def _filler(text: bytes, random: np.random.Generator) -> bytes:
    start = int(random.integers(0, len(text)))
    return text[start : start + int(random.integers(0, _MAX_FILLER + 1))]


def recall_mask(text: bytes) -> np.ndarray:
    """Return for each byte whether it belongs to a passkey that was stated before, and so can be recalled."""
    mask, stated = np.zeros(len(text), bool), set()
    for match in _STATED.finditer(text):
        mask[match.start(2) : match.end(2)] = match.groups() in stated
        stated.add(match.groups())
    return mask
