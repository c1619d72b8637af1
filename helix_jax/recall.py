"""Things to remember, hidden in text: passkeys and lines that are asked for later. To train on, and to be tested by."""

import numpy as np

NAMES = (
    *("amber", "basil", "cedar", "coral", "ember", "fable", "flint", "grove", "hazel", "heron", "indigo", "ivory"),
    *("juniper", "kestrel", "lantern", "linden", "maple", "marble", "meadow", "nettle", "olive", "opal", "otter"),
    *("pebble", "quartz", "raven", "saffron", "sorrel", "thistle", "umber", "violet", "willow"),
)
DIGITS = 5
_MOST_KEYS = 8  # in one text
_MOST_LINES = 4
_WORDS = 4  # of a line, by which it is asked for


def fact(name: str, key: str) -> bytes:
    return f" The passkey of {name} is {key}. ".encode()


def question(name: str) -> bytes:
    return f" What is the passkey of {name}? The passkey of {name} is ".encode()


def new_key(random: np.random.Generator) -> str:
    return "".join(map(str, random.integers(0, 10, DIGITS)))


def plant(text: bytes, random: np.random.Generator) -> bytes:
    """The text with facts and lines in it that are asked for later on, and their answers; cut to its length."""
    inserts: list[tuple[int, bytes]] = []
    for name in random.choice(NAMES, random.integers(1, _MOST_KEYS + 1), replace=False):
        key, told = new_key(random), int(random.integers(0, len(text)))
        inserts.append((told, fact(name, key)))
        for asked in random.integers(told, len(text) + 1, random.integers(1, 3)):
            inserts.append((int(asked), question(name) + f"{key}. ".encode()))
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")).tolist()
    for _ in range(int(random.integers(0, _MOST_LINES + 1)) if len(ends) > 1 else 0):
        at = int(random.integers(0, len(ends) - 1))
        line = text[ends[at] + 1 : ends[at + 1]]
        inserts.append((int(random.integers(ends[at + 1], len(text) + 1)), _quoted(line)))
    pieces, last = [], 0
    for at, added in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [text[last:at], added]
        last = at
    return b"".join([*pieces, text[last:]])[: len(text)]


def _quoted(line: bytes) -> bytes:
    words = b" ".join(line.split(b" ")[:_WORDS])
    return b' The line that begins "' + words + b'" is "' + line + b'". '


def haystack(text: bytes, length: int, depth: float, name: str, key: str) -> bytes:
    """A prompt of `length` bytes that ends with the question: the fact lies at `depth`, of 0 (first) to 1 (last).

    Raises:
        ValueError: a length that holds no more than fact and question, a text that is too short.
    """
    hidden, asked = fact(name, key), question(name)
    hay = length - len(hidden) - len(asked)
    if hay < 0:
        raise ValueError(f"a context of {length} bytes holds no fact and question: give {length - hay} or more")
    if len(text) < hay:
        raise ValueError(f"the text has {len(text)} bytes, and a context of {length} needs {hay}: give more text")
    at = round(depth * hay)
    return text[:at] + hidden + text[at:hay] + asked
