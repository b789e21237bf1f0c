"""What a client is told beside its images: where what was drawn is not quite what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from diffuserve.bundle.manifest import Manifest
from diffuserve.limits import Limits
from diffuserve.request import TextToImageRequest
from diffuserve.text.embeddings import TextEmbeddings
from diffuserve.text.prompt_syntax import unread_syntax

_MAX_QUOTED_CHARACTERS = 200


def request_warnings(
    request: TextToImageRequest,
    flagged: Sequence[bool],
    manifest: Manifest,
    limits: Limits,
    embeddings: TextEmbeddings,
) -> tuple[str, ...]:
    """In sentences: what was withheld, what did not fit, and what was drawn as text.

    Args:
        request: what was drawn.
        flagged: for each image, whether the safety checker withheld it.
        manifest, limits, embeddings: of the pipeline.
    """
    warnings = []
    if any(flagged):
        withheld = ", ".join(str(number) for number, flag in enumerate(flagged, 1) if flag)
        warnings.append(
            f"The safety checker withheld {sum(flagged)} of {len(flagged)} images, and black ones take their place: "
            f"number {withheld}. Another prompt or seed may pass it."
        )
    if manifest.has_safety_checker and request.progress and request.preview:
        warnings.append("No previews were sent, since they would show images that the safety checker has not seen.")
    texts = {"prompt": request.prompt, **({"negative_prompt": request.negative_prompt} if request.guided else {})}
    for name, text in texts.items():
        dropped = embeddings.dropped_text(text)
        if dropped:
            chunks, tokens = limits.max_prompt_chunks, manifest.model.max_tokens - 2
            warnings.append(
                f"The {name} does not fit into {chunks} x {tokens} tokens; this end of it was not used: {_quoted(dropped)}"
            )
        for syntax in unread_syntax(text, negative=name == "negative_prompt"):
            warnings.append(f"Drawn as text: the {name} has {syntax}.")
    return tuple(warnings)


def _quoted(text: str) -> str:
    """Of a long text its beginning, where it was cut off, and its end."""
    if len(text) <= _MAX_QUOTED_CHARACTERS:
        return repr(text)
    half = _MAX_QUOTED_CHARACTERS // 2
    return f"{text[:half]!r} ... {text[-half:]!r}"
