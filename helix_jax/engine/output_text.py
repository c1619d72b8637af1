"""The text of a request as it is generated, up to a stop string."""

from collections.abc import Sequence

from helix_jax.text import Detokenizer, Tokenizer


class OutputText:
    """Detokenizes a request's tokens, and withholds what may be the beginning of a character or of a stop string.

    Args:
        tokenizer: Converts tokens to text. None: there is no text.
        stop: The stop strings. The text ends before the first of them.
        prompt: The ids before the first token.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], prompt: Sequence[int] = ()):
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self._stop = stop
        self._stopped = False
        self._pending = ""
        self._emitted = ""

    def append(self, token: int) -> bool:
        """Append a token. Return whether a stop string is complete. It and what follows are never emitted."""
        if self._detokenizer:
            self._append_text(self._detokenizer.append(token))
        return self._stopped

    def emit(self, *, final: bool) -> str | None:
        """Return the text that is certain and was not yet emitted, or None without a tokenizer.

        Args:
            final: Whether the request is complete, so that pending text is certain too.
        """
        if self._detokenizer is None:
            return None
        if final and not self._stopped:
            self._append_text(self._detokenizer.flush())
        withheld = 0 if final or self._stopped else max(map(self._overlap, self._stop), default=0)
        split = len(self._pending) - withheld
        piece, self._pending = self._pending[:split], self._pending[split:]
        self._emitted += piece
        return piece

    @property
    def emitted(self) -> str | None:
        """All text that was emitted, or None without a tokenizer."""
        return None if self._detokenizer is None else self._emitted

    def _append_text(self, piece: str) -> None:
        self._pending += piece
        matches = [index for index in map(self._pending.find, self._stop) if index >= 0]
        if matches:
            self._pending, self._stopped = self._pending[: min(matches)], True

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end of the pending text may be the beginning of a stop string."""
        longest = min(len(stop) - 1, len(self._pending))
        return next((n for n in range(longest, 0, -1) if self._pending.endswith(stop[:n])), 0)
