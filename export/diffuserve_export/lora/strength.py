"""Alpha where it does not stand among the tensors: in PEFT's adapter_config.json, or in the file's header as diffusers
writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from diffuserve.errors import CheckpointError
from diffuserve_export.lora.file import PEFT_CONFIG, Lora

_HEADER_ENTRY = "lora_adapter_metadata"
_PARTS = ("unet", "text_encoder_2", "text_encoder")
# What begins a name in a file that PEFT itself has written.
_PEFT = "base_model.model."
# What a file's names have before those that PEFT's patterns are for.
_BEFORE = re.compile(rf"({'|'.join(_PARTS)})\.({re.escape(_PEFT)})?|{re.escape(_PEFT)}")
# The patterns that are run: names, alternatives, and a few ".*". Others may take a regular expression for ever.
_PATTERN = re.compile(r"\^?(?:[\w\-|()]|\\.|\.\*?)+\$?")
_MOST_STARS, _LONGEST_PATTERN = 3, 500
# Ways to begin a training that leave the base model's weights as they are; all others (PiSSA, OLoRA, LoftQ ...) take
# something away from them, so that the adapter fits no other weights.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
# Variants of LoRA whose result is another than W + factor * B A.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


class AdapterConfig(msgspec.Struct, frozen=True):
    """The settings of PEFT's LoraConfig that say how strongly a layer is changed."""

    lora_alpha: float
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None

    def factor(self, layer: str, rank: int) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank) for a rank-stabilised LoRA (arXiv:2312.03732).

        Args:
            layer: its name in the component.
            rank: its own.
        """
        patterns = self.alpha_pattern or {}
        matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = next(matching, self.lora_alpha)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)


class Strengths:
    """How strongly a file changes each layer, as far as its tensors do not say.

    Args:
        lora: the file.
        header: what stands in its header.

    Raises:
        CheckpointError: the settings cannot be read, or name a variant of LoRA that is not fused.
    """

    def __init__(self, lora: Lora, header: Mapping[str, str]) -> None:
        self._lora = lora
        self._configs: dict[str, AdapterConfig] = {}
        if lora.config is not None:
            settings = self._read(lora.config.read_bytes(), str(lora.config))
            self._configs[""] = self._config(settings, str(lora.config))
        elif _HEADER_ENTRY in header:
            settings = self._read(header[_HEADER_ENTRY].encode(), f"{_HEADER_ENTRY} in its header")
            for part in _PARTS:
                own = {k.removeprefix(f"{part}."): v for k, v in settings.items() if k.startswith(f"{part}.")}
                if own:
                    self._configs[part] = self._config(own, f"{_HEADER_ENTRY} in its header")
            if not self._configs:
                raise CheckpointError(
                    f"The LoRA {lora.path}: {_HEADER_ENTRY} in its header is for none of {', '.join(_PARTS)}, so how strongly it "
                    "is to be applied is not known. Save the file again without that entry if alpha is the rank."
                )

    def factor(self, layer: str, part: str, rank: int, alpha: float | None) -> float:
        """What B A of a layer is multiplied by.

        Args:
            layer: its name in the file.
            part: the component that it is of.
            rank: its own.
            alpha: that of the file's own tensor; without any, it is the rank.

        Raises:
            CheckpointError: PEFT has written the file, and its settings are not there.
        """
        if alpha is not None:
            return alpha / rank
        config = self._configs.get("") or self._configs.get(part)
        if config is not None:
            return config.factor(_BEFORE.sub("", layer, count=1), rank)
        if layer.startswith(_PEFT):
            raise CheckpointError(
                f"The LoRA {self._lora.path} was written by PEFT, and its strength stands in {PEFT_CONFIG}, which is not "
                "beside it. Give the folder that save_pretrained() wrote; if only the file is left, write an "
                f'{PEFT_CONFIG} such as {{"peft_type": "LORA", "r": 16, "lora_alpha": 16}} beside it, and name the file '
                "adapter_model.safetensors."
            )
        return 1.0

    def is_dora(self, part: str) -> bool:
        """Whether the settings say that layers of a component have DoRA's magnitudes."""
        config = self._configs.get("") or self._configs.get(part)
        return bool(config and config.use_dora)

    def _read(self, data: bytes, where: str) -> dict[str, Any]:
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise CheckpointError(f"The LoRA {self._lora.path}: {where} is damaged: {error}.") from error

    def _config(self, settings: Mapping[str, Any], where: str) -> AdapterConfig:
        kind = settings.get("peft_type", "LORA")
        beginning = settings.get("init_lora_weights")
        variants = [name for name in _VARIANTS if settings.get(name)]
        if str(kind).upper() != "LORA":
            raise CheckpointError(f"The LoRA {self._lora.path}: {where} says that it is a {kind}. Only LORA is fused.")
        if beginning not in _PLAIN_BEGINNINGS:
            raise CheckpointError(
                f"The LoRA {self._lora.path}: {where} has init_lora_weights={beginning!r}, which changes the base model's "
                "own weights, so that it fits no other. Convert it to a plain LoRA with PEFT "
                "(save_pretrained(..., path_initial_model_for_weight_conversion=...))."
            )
        if variants:
            raise CheckpointError(
                f"The LoRA {self._lora.path}: {where} has {', '.join(variants)}, a variant of LoRA that is not fused."
            )
        try:
            config = msgspec.convert(settings, AdapterConfig)
            for pattern in config.alpha_pattern or {}:
                re.compile(pattern)
                if (
                    not _PATTERN.fullmatch(pattern)
                    or pattern.count(".*") > _MOST_STARS
                    or len(pattern) > _LONGEST_PATTERN
                ):
                    raise CheckpointError(
                        f"The LoRA {self._lora.path}: {where} has the alpha_pattern {pattern[:80]!r}. Patterns may be names with "
                        f"alternatives and up to {_MOST_STARS} times '.*'; write the layers' names."
                    )
        except (msgspec.ValidationError, re.error) as error:
            raise CheckpointError(f"The LoRA {self._lora.path}: {where} is damaged: {error}.") from error
        return config
