"""Fixtures that several packages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

MODEL_STORE = Path(__file__).parents[1] / "model_store"


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The bundled checkpoint's bundle; exported first if it is missing or out of date, which takes a minute or two."""
    from diffuserve_export.export import bundle_from_checkpoint

    return bundle_from_checkpoint(MODEL_STORE / "checkpoints" / "tiny-emoji", MODEL_STORE / "bundles" / "tiny-emoji")
