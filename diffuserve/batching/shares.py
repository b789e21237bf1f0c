"""Who has had how much, so that the least served can go first."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class Shares:
    """The service that each of several parties has attained, so that the least served can go first.

    With a party's share as its weight this is stride scheduling (Waldspurger and Weihl, MIT/LCS/TM-528, 1995). A party
    that was not there before starts level with the least served of the others, so absence earns no credit.
    """

    def __init__(self) -> None:
        self._attained: dict[Hashable, float] = {}

    def keep(self, parties: Iterable[Hashable]) -> None:
        """Forgets those that are not among `parties` and lets newcomers start."""
        present = set(parties)
        start = min((self._attained[party] for party in present if party in self._attained), default=0.0)
        self._attained = {party: self._attained.get(party, start) for party in present}

    def add(self, party: Hashable, service: float) -> None:
        self._attained[party] = self._attained.get(party, 0.0) + service

    def attained(self, party: Hashable) -> float:
        return self._attained.get(party, 0.0)
