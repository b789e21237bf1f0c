"""The progress bar: one for all requests of a run, in denoising steps."""

from __future__ import annotations

import sys
import threading

from diffuserve_client.batch import Job
from diffuserve_client.result import Progress


class Bar:
    """Shown on stderr while it is a terminal. Safe to use from several threads.

    Args:
        jobs: requests of the run; the total of steps follows once the first is accepted.
        hidden: show nothing.
    """

    def __init__(self, jobs: int, *, hidden: bool) -> None:
        from tqdm import tqdm

        self._jobs = jobs
        self._progress: dict[int, Progress] = {}
        self._lock = threading.Lock()
        # tqdm's own meaning of None: no bar unless the stream is a terminal.
        self._tqdm = tqdm(
            unit="step", file=sys.stderr, disable=True if hidden else None, leave=False, dynamic_ncols=True
        )

    def advance(self, job: Job, progress: Progress) -> None:
        """Notes how far a job is."""
        with self._lock:
            self._progress[job.index] = progress
            steps = [known.steps for known in self._progress.values()]
            self._tqdm.total = sum(steps) + (self._jobs - len(steps)) * steps[0]
            self._tqdm.update(sum(known.step for known in self._progress.values()) - self._tqdm.n)

    def drop(self, job: Job) -> None:
        """Takes a job that failed out of the total."""
        with self._lock:
            self._jobs -= 1
            self._progress.pop(job.index, None)

    def print(self, text: str, *, error: bool = False) -> None:
        """Writes a line to stdout, or stderr, above the bar."""
        with self._lock:
            self._tqdm.write(text, file=sys.stderr if error else sys.stdout)

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._tqdm.close()
