"""The shapes that a TensorRT plan is built for.

A profile is a range of shapes with kernels of its own, chosen for one shape in it. Few profiles, since each adds its
kernels to the plan, and a context with memory of its own where Triton runs it:

    1 to 2, 3 to 8 and 9 to 32 rows at the native size, each tuned for its largest batch. A plan is warmed and compared at
    that size, so they are there even if the server's limits allow only smaller images;
    any image size and length of a prompt that the server's limits allow, with at most 32 rows, or as many as keep rows
    times area below that of the largest batch at the native size.

The 32, the sizes and the lengths are those of the limits that a plan is built for, by default the model's own.

A batch runs in the first profile that allows it, with the rows that it has: padding it to a profile's largest would
compute up to twice as much. Where there are more rows than any profile allows, the call is made in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import msgspec

from diffuserve.bundle.manifest import Component, Manifest, ModelSpec
from diffuserve.engines.example_inputs import native_sizes
from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.errors import ConfigurationError, StageFailed
from diffuserve.limits import MAX_DECODE_BATCH, PLAN_LIMITS, Limits
from diffuserve.tensors import CLIP_INPUT, HEIGHT, StageSpec, TensorSpec

# The largest batch of each profile at the native size; `diffuserve bench engine` times every batch size on a plan of others.
NATIVE_ROWS = (2, 8, 32)
# The largest batch that gets a CUDA graph, with which a whole call is launched at once. Larger ones keep a GPU busy for
# longer than launching their kernels one by one takes.
MOST_GRAPH_ROWS = 8

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ShapeRange:
    """The smallest and largest shape that an input may have, batch included, and the one to be fastest at."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def allows(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.min) and all(
            low <= side <= high for low, side, high in zip(self.min, shape, self.max, strict=True)
        )


# One range for each input, by name.
Profile = dict[str, ShapeRange]


def profiles(tensors: StageSpec, model: ModelSpec, limits: Limits) -> list[Profile]:
    """What a component's plan is built for: first the native size, by batch size, then all else."""
    has_images = any(HEIGHT in spec.dims or spec.name == CLIP_INPUT for spec in (*tensors.inputs, *tensors.outputs))
    most_rows = MAX_DECODE_BATCH if has_images else limits.max_rows
    least_px, most_px = model.size_multiple, limits.max_side_px - limits.max_side_px % model.size_multiple
    other_rows = min(most_rows, max(1, most_rows * model.width * model.height // most_px**2))

    def shape(spec: TensorSpec, batch: int, width: int, height: int, chunks: int = 1) -> tuple[int, ...]:
        size = msgspec.structs.replace(model, width=width, height=height, max_tokens=chunks * model.max_tokens)
        return spec.shape(batch, native_sizes(size))

    def native(spec: TensorSpec, least: int, most: int) -> ShapeRange:
        low, high = (shape(spec, batch, model.width, model.height) for batch in (least, most))
        return ShapeRange(low, high, high)

    def other(spec: TensorSpec) -> ShapeRange:
        return ShapeRange(
            shape(spec, 1, least_px, least_px),
            shape(spec, other_rows, min(model.width, most_px), min(model.height, most_px)),
            shape(spec, other_rows, most_px, most_px, limits.max_prompt_chunks),
        )

    batches = sorted({min(rows, most_rows) for rows in (*NATIVE_ROWS, most_rows)})
    found = [
        {spec.name: native(spec, least + 1, most) for spec in tensors.inputs}
        for least, most in zip((0, *batches), batches, strict=False)
    ]
    if any(spec.free_dims for spec in tensors.inputs):
        found.append({spec.name: other(spec) for spec in tensors.inputs})
    return found


def profiles_of(component: Component, model: ModelSpec) -> list[Profile]:
    """Those that the component's plan was built for."""
    return profiles(component.tensors, model, _built_for(component, model))


def plan_limits(limits: Limits) -> dict[str, int]:
    """Those that a plan is built for, by name."""
    return {name: getattr(limits, name) for name in PLAN_LIMITS}


def check_limits(limits: Limits, manifest: Manifest) -> None:
    """Raises ConfigurationError where a server's limits allow what a plan of the bundle was not built for."""
    for stage, component in manifest.components.items():
        if component.engine not in LIBRARIES:
            continue
        most = plan_limits(_built_for(component, manifest.model))
        for name, given in plan_limits(limits).items():
            if given > most[name]:
                title = LIBRARIES[component.engine].title
                raise ConfigurationError(
                    f"The limit {name} is {given}, and {title}'s plan of {stage} was built for at most {most[name]}. Build it "
                    f"again, diffuserve engines BUNDLE --select {component.engine} --limit {name}={given}, or lower the limit."
                )


def _built_for(component: Component, model: ModelSpec) -> Limits:
    return replace(Limits.for_model(model), **component.plan_limits)


def profile_for(found: Iterable[Profile], shapes: Shapes) -> int:
    """The number of the first profile that allows `shapes`, batch included.

    Raises:
        StageFailed: there is none.
    """
    for number, profile in enumerate(found):
        if _allows(profile, shapes):
            return number
    raise StageFailed(f"The plan was not built for inputs of the shapes {dict(shapes)}.")


def most_rows(found: Iterable[Profile], shapes: Shapes) -> int:
    """How many rows of `shapes` one call may have, whatever their own number.

    Raises:
        StageFailed: no profile allows the rest of the shapes.
    """
    allowed = 0
    for profile in found:
        rows = min(ranges.max[0] for ranges in profile.values())
        if _allows(profile, {name: (rows, *shape[1:]) for name, shape in shapes.items()}):
            allowed = max(allowed, rows)
    if not allowed:
        raise StageFailed(f"The plan was not built for inputs of the shapes {dict(shapes)}.")
    return allowed


def has_one_size(profile: Profile) -> bool:
    """Whether nothing but the number of rows is free."""
    return all(ranges.min[1:] == ranges.max[1:] for ranges in profile.values())


def _allows(profile: Profile, shapes: Shapes) -> bool:
    return profile.keys() == shapes.keys() and all(profile[name].allows(shape) for name, shape in shapes.items())
