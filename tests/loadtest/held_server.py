"""A server for the generator that answers when a test lets it: a fake Triton in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tests.client.fake_triton import FakeTriton


class HeldServer(FakeTriton):
    """`may_answer` says, by its number in the order of their coming, from 0, whether a request is to be answered now.

    Attributes:
        came: requests so far.
        answered: of them.
        most_at_once: the most that have been open at a time.
    """

    def __init__(self, may_answer: Callable[[HeldServer, int], bool], port: int = 0) -> None:
        super().__init__(port)
        self.came = self.answered = self.most_at_once = 0
        self._may_answer = may_answer
        self._open = 0
        self._changed = threading.Condition()

    def look_again(self) -> None:
        """Once what `may_answer` goes by has changed."""
        with self._changed:
            self._changed.notify_all()

    def _answers(self, fields: dict[str, Any], request_id: str, context: Any) -> Any:
        with self._changed:
            number = self.came
            self.came += 1
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            self._changed.notify_all()
        context.add_callback(self.look_again)
        with self._changed:
            self._changed.wait_for(lambda: self._may_answer(self, number) or not context.is_active())
            self._open -= 1
            self.answered += context.is_active()
            self._changed.notify_all()
        yield from super()._answers(fields, request_id, context)
