"""One run of `diffuserve generate`: sends the jobs, saves what comes, reports what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.errors import DiffuserveError
from diffuserve_client.bar import Bar
from diffuserve_client.batch import Job, TextToImage, send_all
from diffuserve_client.output import path_for, save
from diffuserve_client.result import Result

if TYPE_CHECKING:
    from diffuserve.request import RequestFields


class Run:
    """Draws all jobs; each image is saved as soon as its request ends, a sheet when all have ended.

    Args:
        jobs: at least one.
        fields: the settings that they share.
        output: what -o gave, or None.
        format: png, jpeg or webp.
        grid: one contact sheet instead of a file per image.
        overwrite: replace files that are there.
        quiet: no bar, and names of files only.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        fields: RequestFields,
        *,
        output: Path | None,
        format: str,
        grid: bool,
        overwrite: bool,
        quiet: bool,
    ) -> None:
        self._jobs = jobs
        self._fields = fields
        self._output = output
        self._format = format
        self._grid = grid
        self._overwrite = overwrite
        self._quiet = quiet
        self._bar = Bar(len(jobs), hidden=quiet)
        self._results: dict[int, Result] = {}
        self._errors: list[tuple[Job, str]] = []

    def draw(self, client: TextToImage) -> bool:
        """Returns whether anything failed; the errors have been printed then."""
        try:
            send_all(client, self._jobs, self._fields, on_progress=self._bar.advance, on_end=self._end)
        finally:
            self._bar.close()
        if self._grid and self._results:
            self._save_sheet()
        self._print_errors()
        return bool(self._errors)

    def _end(self, job: Job, outcome: Result | DiffuserveError) -> None:
        if isinstance(outcome, DiffuserveError):
            self._bar.drop(job)
            self._errors.append((job, str(outcome)))
            return
        for warning in outcome.warnings:
            self._bar.print(f"Warning: {self._subject(job)}{warning}", error=True)
        if self._grid:
            self._results[job.index] = outcome
        else:
            self._save_images(job, outcome)

    def _save_images(self, job: Job, result: Result) -> None:
        count = len(result.encoded)
        for index, (data, seed) in enumerate(zip(result.encoded, result.seeds, strict=True)):
            number = job.index * count + index + 1
            path = path_for(
                self._output,
                self._format,
                prompt=job.prompt,
                seed=seed,
                number=number,
                total=len(self._jobs) * count,
            )
            self._save(job, path, data, f"seed {seed}  {result.total_s:.2f} s")

    def _save_sheet(self) -> None:
        from diffuserve_client.sheet import columns_for, contact_sheet, encode_sheet

        results = [self._results[index] for index in sorted(self._results)]
        images = [image for result in results for image in result.images]
        counts: dict[str, int] = {}
        for index, result in self._results.items():
            prompt = self._jobs[index].prompt
            counts[prompt] = counts.get(prompt, 0) + len(result.encoded)
        sheet = contact_sheet(images, columns_for(list(counts.values())))
        parameters = [text for result in results for text in result.parameters]
        first = self._jobs[0]
        path = path_for(self._output, self._format, prompt=first.prompt, seed=results[0].seeds[0], number=1, total=1)
        slowest_s = max(result.total_s for result in results)
        seeds = ", ".join(str(seed) for result in results for seed in result.seeds)
        try:
            data = encode_sheet(sheet, self._format, parameters)
        except (OSError, ValueError):  # what Pillow raises for an image that is larger than the format allows
            self._bar.print(f"Warning: {sheet.width}x{sheet.height} px are too large for {self._format}.", error=True)
            path, data = path.with_suffix(".png"), encode_sheet(sheet, "png", parameters)
        self._save(first, path, data, f"{len(images)} images  seeds {seeds}  {slowest_s:.2f} s")

    def _save(self, job: Job, path: Path, data: bytes, description: str) -> None:
        try:
            saved = save(path, data, overwrite=self._overwrite)
        except OSError as error:
            self._errors.append((job, f"{path} could not be written: {error.strerror}."))
            return
        self._bar.print(str(saved) if self._quiet else f"{saved}  {description}")

    def _print_errors(self) -> None:
        """Each distinct error once, and whom it befell where that was not everybody."""
        by_text: dict[str, list[Job]] = {}
        for job, text in self._errors:
            by_text.setdefault(text, []).append(job)
        for text, jobs in by_text.items():
            subject = "" if len(jobs) == len(self._jobs) else self._subject(*jobs)
            self._bar.print(f"Error: {subject}{text}", error=True)

    def _subject(self, *jobs: Job) -> str:
        """The start of a message about some of the jobs; empty if there is only one anyway."""
        if len(self._jobs) == 1:
            return ""
        prompts = list(dict.fromkeys(_shortened(job.prompt) for job in jobs))
        others = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
        return f"{', '.join(prompts[:3])}{others}: "


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:40] + "...")
