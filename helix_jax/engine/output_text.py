"""A request's text as it comes, up to a stop string."""

from collections.abc import Sequence

from helix_jax.text import Detokenizer, Tokenizer


class OutputText:
    """Holds back what may be the start of a character, or of a stop string. Without a tokenizer there is none: None."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]):
        self._stream = Detokenizer(tokenizer) if tokenizer else None
        self._stops = stops
        self._held = ""
        self._stopped = False
        self._given = ""

    def feed(self, token: int) -> bool:
        """Takes the next token; whether a stop string is complete. It, and what follows, is never given out."""
        if self._stream:
            self._hold(self._stream.feed(token))
        return self._stopped

    def give(self, *, all: bool) -> str | None:
        """What can be given out now; all: also what was held back, as nothing more comes."""
        if self._stream is None:
            return None
        if all and not self._stopped:
            self._hold(self._stream.rest())
        keep = 0 if all or self._stopped else max(map(self._begun, self._stops), default=0)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._given += piece
        return piece

    @property
    def given(self) -> str | None:
        """All that was given out."""
        return None if self._stream is None else self._given

    def _hold(self, piece: str) -> None:
        self._held += piece
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self._held, self._stopped = self._held[: min(found)], True

    def _begun(self, stop: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
