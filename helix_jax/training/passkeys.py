"""Things to remember, hidden in text: passkeys and lines that are asked for later. To train on, and to be tested by."""

import numpy as np

NAMES = (
    *("amber", "basil", "cedar", "coral", "ember", "fable", "flint", "grove", "hazel", "heron", "indigo", "ivory"),
    *("juniper", "kestrel", "lantern", "linden", "maple", "marble", "meadow", "nettle", "olive", "opal", "otter"),
    *("pebble", "quartz", "raven", "saffron", "sorrel", "thistle", "umber", "violet", "willow"),
)
DIGITS = 5
_MOST_DIGITS = 16  # to train on: the longer a key, the more there is to copy
_MOST_KEYS = 12  # in one text
_MOST_TIMES = 8  # that a key is asked for
_MOST_LINES = 8
_WORDS = 4  # of a line, by which it is asked for


def fact(name: str, key: str) -> bytes:
    return f" The passkey of {name} is {key}. ".encode()


def question(name: str) -> bytes:
    return f" What is the passkey of {name}? The passkey of {name} is ".encode()


def new_key(random: np.random.Generator, digits: int = DIGITS) -> str:
    return "".join(map(str, random.integers(0, 10, digits)))


def insert_passkeys(text: bytes, random: np.random.Generator) -> bytes:
    """The text with facts and lines in it that are asked for later on, and their answers; cut to its length.

    Half of the keys are asked for often and soon, which is how copying is learned; the others once, however far.
    """
    length, inserts = len(text), list[tuple[int, bytes]]()
    secrets: list[tuple[bytes, bytes, int]] = []
    for name in random.choice(NAMES, random.integers(1, _MOST_KEYS + 1), replace=False):
        key = new_key(random, int(random.integers(DIGITS, _MOST_DIGITS + 1)))
        soon = int(random.integers(1, _MOST_TIMES + 1)) if random.random() < 0.5 else 0
        secrets.append((fact(name, key), question(name) + f"{key}. ".encode(), soon))
    added = sum(len(told) + max(1, soon) * len(answered) for told, answered, soon in secrets)
    text = text[: max(0, length - added)]  # or the last would be cut off: those that are far from their facts
    for told, answered, soon in secrets:
        at = round(len(text) * random.random() ** 2)  # early, so that much can follow
        rest = len(text) - at
        places = at + rest ** random.random(soon) if soon else at + rest * random.random(1)
        inserts += [(at, told), *((round(place), answered) for place in places)]
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")).tolist()
    for _ in range(int(random.integers(0, _MOST_LINES + 1)) if len(ends) > 1 else 0):
        at = int(random.integers(0, len(ends) - 1))
        line = text[ends[at] + 1 : ends[at + 1]]
        inserts.append((int(random.integers(ends[at + 1], len(text) + 1)), _quoted(line)))
    pieces, last = [], 0
    for at, added in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [text[last:at], added]
        last = at
    return b"".join([*pieces, text[last:]])[:length]


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
