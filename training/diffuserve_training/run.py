"""One training run: Lightning's Trainer, set up so that the same seed gives the same weights and a killed run goes on."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from diffuserve.engines.processor import computes_bf16
from diffuserve_training.config import Optimisation
from diffuserve_training.identity import LAST

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def seeded(optimisation: Optimisation) -> None:
    """Call it before a module is made, whose first weights are random."""
    lightning.seed_everything(optimisation.seed, workers=True, verbose=False)


def fit(module: Any, run: Path, *, on_save: Callable[[], None], devices: str = "auto") -> None:
    """Trains to `optimisation.steps`, from the last checkpoint in `run` if there is one; or as long as the module's `progress`
    has time, which leaves nothing to go on from.

    Args:
        module: a `StepModule`.
        run: folder for checkpoints and logs, from `identity.begin_run`.
        on_save: called after each checkpoint and at the end, on the first device's process.
        devices: as Lightning takes it.
    """
    _keep_freed_memory()
    _keep_operators()
    optimisation: Optimisation = module.optimisation
    is_timed = module.progress.seconds is not None
    checkpoints = ModelCheckpoint(
        dirpath=run, filename="step-{step}", every_n_train_steps=optimisation.every, save_last=True, save_top_k=1
    )
    has_gpu = torch.cuda.is_available()
    trainer = lightning.Trainer(
        max_steps=-1 if is_timed else optimisation.steps,
        max_epochs=-1,
        devices=devices,
        precision="bf16-mixed" if has_gpu or computes_bf16() else "32-true",
        deterministic=not has_gpu,  # there it costs more than it is worth
        callbacks=[_Saving(on_save), *([] if is_timed else [checkpoints])],
        logger=[CSVLogger(run, "csv", flush_logs_every_n_steps=20), TensorBoardLogger(run, "tensorboard")],
        log_every_n_steps=20,
        enable_checkpointing=not is_timed,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),  # it waits for the device at every step
        use_distributed_sampler=False,
    )
    last = run / LAST
    with warnings.catch_warnings():
        # It holds the run's identity at least; that nothing in it is another training's has been seen to.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        trainer.fit(module, ckpt_path=last if last.is_file() else None, weights_only=True)


def _keep_freed_memory() -> None:
    """glibc gives a freed tensor's pages back to the kernel and has them zeroed again for the next one, in every operator:
    half of a step's time on two cores after some minutes. See mallopt(3)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _keep_operators() -> None:
    """oneDNN prepares each operator for each shape, and keeps 1,024 of them. Pictures of eight sizes have more, and half of a
    step's time went into preparing them again. It reads the number before the first."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


class _Saving(Callback):
    """Saves whenever the progress says so, and ends a training whose time is over."""

    def __init__(self, on_save: Callable[[], None]) -> None:
        self._on_save = on_save
        self._saved_at = -1
        self._saves = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.progress.begin()
        self._saves = module.progress.saves(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        progress, step = module.progress, trainer.global_step
        trainer.should_stop = progress.seconds is not None and progress.is_over(step)
        if progress.saves(step) > self._saves and not trainer.should_stop:
            self._saves = progress.saves(step)
            self._save(trainer)

    def on_train_end(self, trainer: Any, *rest: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if trainer.is_global_zero and self._saved_at != trainer.global_step:
            self._saved_at = trainer.global_step
            self._on_save()
