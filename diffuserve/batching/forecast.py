"""What UNet calls will take, learnt from those of late."""

from __future__ import annotations

from dataclasses import dataclass, field

# Weight of all earlier calls against the newest: the last twenty or so count.
_MEMORY = 0.95


@dataclass
class CallForecast:
    """Seconds of a UNet call as a + b x size, fitted to the calls of late by least squares; its size is the number of
    latent pixels in it. Where all calls were of one size, all of it counts as growing with the size."""

    _weight: float = field(default=0.0, init=False)
    _size: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _size_size: float = field(default=0.0, init=False)
    _size_seconds: float = field(default=0.0, init=False)

    def observe(self, size: int, seconds: float) -> None:
        """Learns from one call."""
        self._weight = _MEMORY * self._weight + 1
        self._size = _MEMORY * self._size + size
        self._seconds = _MEMORY * self._seconds + seconds
        self._size_size = _MEMORY * self._size_size + size * size
        self._size_seconds = _MEMORY * self._size_seconds + size * seconds

    def seconds(self, calls: int, size: int) -> float:
        """What so many calls of `size` in all will take; 0 before the first has been observed."""
        if not self._size:
            return 0.0
        proportional = self._seconds / self._size
        variance = self._size_size - self._size**2 / self._weight
        slope = proportional
        if variance > 1e-6 * self._size_size:
            slope = (self._size_seconds - self._size * self._seconds / self._weight) / variance
            slope = min(max(slope, 0.0), proportional)
        return calls * (self._seconds - slope * self._size) / self._weight + slope * size
