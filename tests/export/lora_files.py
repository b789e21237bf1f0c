"""Random LoRA files in the names that are shared, with what numpy says that they make of a weight.

Names are written by rules of the tests' own (and `original_layout`), so that they check those of the exporter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.export.original_layout import original_unet_names

Array = NDArray[Any]
Weights = dict[str, Array]
NAMINGS = ("kohya", "original", "diffusers", "old diffusers", "comfyui", "lycoris")


@dataclass
class File:
    """A LoRA file in the making. `products`: by weight, alpha / rank * B A as numpy computes it from the stored numbers, in
    float64; `naming`: one of `NAMINGS`."""

    model: Any
    naming: str
    tensors: dict[str, Array] = field(default_factory=dict)
    products: Weights = field(default_factory=dict)

    def add(
        self,
        weight: str,
        rng: np.random.Generator,
        *,
        rank: int,
        alpha: float | None,
        dtype: type = np.float32,
        tucker: bool = False,
    ) -> str:
        """A change of the weight, such as `unet.conv_in.weight`; returns what its keys begin with."""
        shape = weights_of(self.model)[weight].shape
        key, kernel = self.key(weight), shape[2:]
        down = _random(rng, (rank, shape[1], *((1, 1) if tucker else kernel)), dtype)
        up = _random(rng, (shape[0], rank, *([1] * len(kernel))), dtype)
        flat_down, flat_up = (array.reshape(len(array), -1).astype(np.float64) for array in (down, up))
        names = ("lora_A.weight", "lora_B.weight") if self.naming == "diffusers" else None
        if self.naming == "old diffusers":
            names = ("lora.down.weight", "lora.up.weight")
        names = names or ("lora_down.weight", "lora_up.weight")
        self.tensors |= {f"{key}.{names[0]}": down, f"{key}.{names[1]}": up}
        if tucker:
            mid = _random(rng, (rank, rank, *kernel), dtype)
            self.tensors[f"{key}.lora_mid.weight"] = mid
            # Three layers one after the other: 1 x 1 to the rank, the middle, 1 x 1 to the outputs.
            product = np.zeros(shape)
            for row in range(kernel[0]):
                for column in range(kernel[1]):
                    product[:, :, row, column] = flat_up @ mid[:, :, row, column].astype(np.float64) @ flat_down
        else:
            product = (flat_up @ flat_down).reshape(shape)
        if alpha is not None:
            self.tensors[f"{key}.alpha"] = np.array(alpha, dtype)
        factor = 1.0 if alpha is None else float(np.array(alpha, dtype)) / rank
        self.products[weight] = self.products.get(weight, 0) + factor * product
        return key

    def key(self, weight: str) -> str:
        """What the file calls the layer of a weight."""
        part, _, name = weight.removesuffix(".weight").partition(".")
        if part == "unet":
            return self._unet_key(name)
        name = name.removeprefix("text_model.")
        if not name.startswith("text_projection"):
            name = f"text_model.{name}"
        second = part == "text_encoder_2"
        if self.naming in ("diffusers", "old diffusers"):
            return f"{part}.{name}"
        if self.naming == "comfyui":
            return f"text_encoders.{'clip_g' if second else 'clip_l'}.transformer.{name}"
        beginning = "lora_te2" if second else ("lora_te1" if self.model.text_encoder_2 is not None else "lora_te")
        return f"{beginning}_{name.replace('.', '_')}"

    def _unet_key(self, name: str) -> str:
        original = original_unet_names(self.model.unet).get(f"{name}.weight", "").removesuffix(".weight")
        return {
            "kohya": f"lora_unet_{name.replace('.', '_')}",
            "lycoris": f"lycoris_{name.replace('.', '_')}",
            "original": f"lora_unet_{original.replace('.', '_')}",
            "comfyui": f"diffusion_model.{original}",
            "diffusers": f"unet.{name}",
            "old diffusers": f"unet.{name}",
        }[self.naming]

    def save(self, path: Path, **metadata: str) -> Path:
        save_file(self.tensors, path, metadata=metadata or None)
        return path


def weights_of(model: Any) -> Weights:
    """Every tensor of the parts that LoRAs change, float32, by part and name; text encoders without `text_model`."""
    parts = {part: getattr(model, part) for part in ("unet", "text_encoder", "text_encoder_2")}
    return {
        f"{part}.{name.removeprefix('text_model.')}": weight.numpy()
        for part, module in parts.items()
        if module is not None
        for name, weight in module.state_dict().items()
    }


def changeable(model: Any) -> list[str]:
    """The weights of linear layers and convolutions."""
    return [
        name for name, weight in weights_of(model).items() if weight.ndim in (2, 4) and "embedding.weight" not in name
    ]


def assert_weights(actual: Any, plain: Any, changes: list[tuple[float, Weights]]) -> None:
    """Every weight is the plain one with scale times each change; to 1e-5 of the layer's largest change and one rounding.

    Args:
        actual, plain: models; plain has no LoRA.
        changes: scales, and what they multiply, by weight; weights that none names are equal to the bit.
    """
    expected, found = weights_of(plain), weights_of(actual)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        own = [scale * change[name] for scale, change in changes if name in change]
        if not own:
            np.testing.assert_array_equal(found[name], weight, err_msg=name)
            continue
        wanted = weight.astype(np.float64) + sum(own)
        allowed = 1e-5 * max(np.abs(change).max() for change in own) + np.spacing(np.abs(wanted).astype(np.float32))
        assert (np.abs(found[name] - wanted) <= allowed).all(), name


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> Array:
    return (rng.standard_normal(shape) * rng.choice([0.02, 0.3, 1.0])).astype(dtype)
