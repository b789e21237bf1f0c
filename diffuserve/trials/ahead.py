"""A bundle's plans for GPUs that are elsewhere: built here, and tried where they will run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Component, Manifest, read_manifest, write_manifest
from diffuserve.engines.availability import availability
from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.engines.tensorrt_plan import plan_architectures
from diffuserve.engines.tensorrt_profiles import plan_limits
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.trials.conversion import converted, remove_what_is_not_used
from diffuserve.trials.selecting import REFERENCE, first_allowed, refusal

# Engines that build for any GPU on any machine.
AHEAD = tuple(library.engine for library in LIBRARIES.values() if library.architectures)


def build_ahead(
    bundle: Path,
    engine: str,
    architectures: Sequence[str],
    precision: str | None = None,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Builds a plan of each component and writes into the manifest that the components run on it. Nothing is tried, so there
    are no trials in the manifest, until `select_engines` tries these plans on a machine with such a GPU.

    Args:
        bundle: its folder.
        engine: one of `AHEAD`, for all components.
        architectures: of the GPUs that the plans are for, such as "sm89".
        precision, limits, progress: as in `select_engines`.

    Returns:
        The new manifest.

    Raises:
        BundleError: the bundle is damaged, the engine takes no architectures or not one of these, it is not installed, or
            cannot build a plan. The bundle is as it was.
    """
    if engine not in AHEAD:
        raise BundleError(
            f"{engine} takes no architectures, since it is tried where it is to run. Engines whose plans are built ahead: "
            f"{', '.join(AHEAD)}."
        )
    architectures = LIBRARIES[engine].check_architectures(architectures)
    manifest = read_manifest(bundle)
    verify(bundle, manifest)
    having = [(way.engine, way.precision) for way in availability() if way.engine == engine]
    ways = [REFERENCE, *(way for way in having if precision in (None, way[1]))]
    if len(ways) == 1:
        raise BundleError(
            f"There is no engine {engine} in {precision}. There are: {', '.join(each for _, each in having)}."
        )
    precisions = {name: first_allowed(ways, component)[1][1] for name, component in manifest.components.items()}
    for name, component in manifest.components.items():
        if reason := refusal(component, precisions[name]):
            raise BundleError(f"{name} of {bundle} does not run in {precisions[name]}: {reason}. Nothing was changed.")
    limits = limits or Limits.for_model(manifest.model)
    components: dict[str, Component] = {}
    try:
        for name, component in manifest.components.items():
            progress(name)
            components[name] = converted(
                bundle, component, engine, precisions[name], manifest.model, limits, architectures
            )
        manifest = msgspec.structs.replace(
            manifest,
            components=components,
            # What was found out about other engines, or about plans that these replace.
            trials=(),
            images=tuple(image for image in manifest.images if {*image.engines.values()} == {" ".join(REFERENCE)}),
            unet_seconds={},
        )
        write_manifest(bundle, manifest)
    finally:
        for component in manifest.components.values():
            remove_what_is_not_used(bundle, component)
    return manifest


def untried(manifest: Manifest) -> str:
    """What to say of a bundle whose plans were built and not tried, with the command that tries just these; else empty."""
    plans = [component for component in manifest.components.values() if component.engine in AHEAD]
    if not plans or manifest.trials:
        return ""
    first = plans[0]
    arguments = f"--select {first.engine}"
    if len(precisions := {plan.precision for plan in plans}) == 1:
        arguments += f" --precision {precisions.pop()}"
    usual = plan_limits(Limits.for_model(manifest.model))
    arguments += "".join(f" --limit {name}={most}" for name, most in first.plan_limits.items() if most != usual[name])
    architectures = ", ".join(plan_architectures(Path(first.files[0].path)))
    return (
        f"The plans were built for GPUs of {architectures}, and have not been tried. On a machine with one: diffuserve engines "
        f"BUNDLE {arguments}"
    )
