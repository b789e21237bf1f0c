"""How the requests of a fault case are counted."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Requests of a case; may be counted from several threads.

    Attributes:
        answered: got the right image, once.
        refused: ended with an error that its sender saw, by the error's code.
        cut: were given up by their sender, as the case meant it.
        lost: got neither an answer nor an error in time, or a wrong answer, or two; a line each.

    `answer`, `refuse` and `lose` return what they counted, in a word.
    """

    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    lost: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def tried(self) -> int:
        return self.survived + len(self.lost)

    @property
    def survived(self) -> int:
        return self.answered + sum(self.refused.values()) + self.cut

    def answer(self) -> str:
        with self._lock:
            self.answered += 1
        return "ok"

    def refuse(self, code: str) -> str:
        with self._lock:
            self.refused[code] += 1
        return code

    def give_up(self, count: int = 1) -> None:
        with self._lock:
            self.cut += count

    def lose(self, why: str) -> str:
        with self._lock:
            self.lost.append(why)
        return "lost"
