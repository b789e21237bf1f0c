"""The text-to-image request. Each field is declared here, once: what a client may send, the command line's options, the
fields of a workload and what a server says of itself are made from this.

To add a field: declare it in `TextToImageRequest`, and in `RequestFields` if callers choose it.
"""

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, get_type_hints

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.request_fields import Choice, Field, Flag, Integer, Interval, Number, Side, Text, shown

MAX_SEED = 2**32 - 1  # torch's CPU generator keeps 32 bits of a seed
# Of unknown names in a message.
_SHOWN_NAMES = 3


def _samplers(model: ModelSpec, limits: Limits) -> tuple[str, ...]:
    from diffuserve.samplers import SAMPLERS  # loads numpy, which a command line's --help can do without

    return tuple(SAMPLERS)


@dataclass(frozen=True, kw_only=True)
class TextToImageRequest:
    """A request that has been checked: every field has its final value."""

    prompt: Annotated[
        str,
        Text("What to draw; may be empty.", max_bytes=lambda _, limits: limits.max_prompt_bytes, tensor=True),
    ]
    negative_prompt: Annotated[
        str,
        Text("What the images should not show.", max_bytes=lambda _, limits: limits.max_prompt_bytes, tensor=True),
    ] = ""
    steps: Annotated[
        int,
        Integer(
            "Denoising steps.",
            low=1,
            high=lambda _, limits: limits.max_steps,
            default=lambda model, limits: min(model.default_steps, limits.max_steps),
            infotext="Steps",
        ),
    ]
    # Classifier-free guidance: Ho and Salimans, arXiv:2207.12598.
    guidance_scale: Annotated[
        float,
        Number(
            "How closely to follow the prompt; 1 or less switches guidance off and halves the work.",
            high=lambda _, limits: limits.max_guidance_scale,
            default=lambda model, limits: min(model.default_guidance_scale, limits.max_guidance_scale),
            infotext="CFG scale",
        ),
    ]
    seed: Annotated[
        int,
        Integer(
            "Seed of the first image; image i uses seed + i (modulo 2^32). Random by default.",
            high=MAX_SEED,
            default=lambda *_: secrets.randbelow(MAX_SEED + 1),
            random=True,
            infotext="Seed",
        ),
    ]
    width: Annotated[int, Side("In pixels, a multiple of what the model needs.", default=lambda model, _: model.width)]
    height: Annotated[
        int, Side("In pixels, a multiple of what the model needs.", default=lambda model, _: model.height)
    ]
    sampler: Annotated[
        str,
        Choice(
            "Name of a sampler, such as euler or dpmpp_2m.",
            choices=_samplers,
            default=lambda model, _: model.default_sampler,
        ),
    ]
    num_images: Annotated[
        int, Integer("Number of images to draw from the prompt.", low=1, high=lambda _, limits: limits.max_images)
    ] = 1
    priority: Annotated[int, Integer("From 0 (first) to 9 (last).", high=9, tensor=True)] = 5
    client_id: Annotated[
        str,
        Text("Whose request it is. Clients get fair shares of the server's time.", max_bytes=128),
    ] = ""
    timeout_ms: Annotated[
        int,
        Integer(
            "Milliseconds from arrival until the server gives the request up; 0 means never.", high=24 * 3600 * 1000
        ),
    ] = 0
    format: Annotated[
        str,
        Choice("png, jpeg, webp, or raw: rows of RGB, one byte each.", choices=("png", "jpeg", "webp", "raw")),
    ] = "png"
    encoding: Annotated[
        str,
        Choice("base64, which JSON can carry, or binary.", choices=("base64", "binary"), setting=False),
    ] = "base64"
    progress: Annotated[bool, Flag("Send an event for every step.", setting=False)] = False
    preview: Annotated[
        int,
        Interval(
            "Send a small PNG per image with every k-th step; true means every step, 0 none.",
            high=lambda _, limits: limits.max_steps,
            setting=False,
        ),
    ] = 0

    @property
    def guided(self) -> bool:
        """Whether each image takes two UNet rows: conditional and unconditional."""
        return self.guidance_scale > 1.0

    @property
    def rows_per_image(self) -> int:
        return 2 if self.guided else 1

    @property
    def rows(self) -> int:
        """UNet rows that it takes in every step."""
        return self.num_images * self.rows_per_image

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per image."""
        return tuple((self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images))


class EmbeddedGuidanceRequest(TextToImageRequest):
    """A request to a model whose UNet takes the guidance scale as an input (LCM): no image needs a second row."""

    @property
    def guided(self) -> bool:
        return False


class RequestFields(TypedDict, total=False):
    """Keywords of every client's `generate` and `stream`: the settings of `TextToImageRequest`, of which time is in seconds.

    A missing one, or None, means the server's default. The server checks the values and says what it allows.
    """

    negative_prompt: str | None
    steps: int | None
    guidance_scale: float | None
    seed: int | None
    width: int | None
    height: int | None
    sampler: str | None
    num_images: int | None
    priority: int | None
    client_id: str | None
    timeout_s: float | None
    format: str | None


def _declared() -> dict[str, Field]:
    hints = get_type_hints(TextToImageRequest, include_extras=True)
    declared: dict[str, Field] = {}
    for each in dataclasses.fields(TextToImageRequest):
        [kind] = hints[each.name].__metadata__
        declared[each.name] = (
            kind if each.default is dataclasses.MISSING else dataclasses.replace(kind, default=each.default)
        )
    return declared


FIELDS: Mapping[str, Field] = _declared()
"""The fields of `TextToImageRequest` by name."""


def request_from_fields(fields: Mapping[str, Any], model: ModelSpec, limits: Limits) -> TextToImageRequest:
    """Checks what came from a client and fills in the model's defaults; a missing field or None means the default.

    Args:
        fields: values by name of `FIELDS`; numbers and text in Python's types.
        model: what the sizes and defaults come from.
        limits: what this server accepts.

    Raises:
        InvalidRequest: names the field, what came, what is allowed and, where it can, the nearest allowed value.
    """
    checked = {name: field.check(name, fields.get(name), model, limits) for name, field in FIELDS.items()}
    if unknown := sorted(name for name, value in fields.items() if name not in FIELDS and value is not None):
        names = ", ".join(map(shown, unknown[:_SHOWN_NAMES]))
        if len(unknown) > _SHOWN_NAMES:
            names += f" and {len(unknown) - _SHOWN_NAMES} more"
        raise InvalidRequest(f"Unknown: {names}. A request has these fields: {', '.join(FIELDS)}.")
    request = (EmbeddedGuidanceRequest if model.guidance_embedded else TextToImageRequest)(**checked)
    if request.rows_per_image > limits.max_rows:
        raise InvalidRequest(
            f"guidance_scale is {request.guidance_scale:g}, with which an image takes {request.rows_per_image} UNet rows; this "
            f"server's max_rows is {limits.max_rows}. Ask for a guidance_scale of 1 or less, or have the server assembled with "
            f"--limit max_rows={request.rows_per_image} or more."
        )
    return request
