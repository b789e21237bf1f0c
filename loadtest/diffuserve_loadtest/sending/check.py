"""Whether an answer is what was asked for: as many images, each decodable and of the right size."""

from __future__ import annotations

import io
from collections.abc import Sequence

from diffuserve_loadtest.workload.plan import PlannedRequest


class WrongImage(Exception):
    """The server answered, but not with the images that were asked for."""


def check_images(
    request: PlannedRequest, files: Sequence[bytes], default_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Decodes every image to its last pixel.

    Args:
        request: what was asked for.
        files: PNG, JPEG or WebP.
        default_size: of images for which no size was asked, if one has come already.

    Returns:
        Width and height.

    Raises:
        WrongImage: too many or too few, damaged, or of another size.
    """
    from PIL import Image

    if len(files) != request.images:
        raise WrongImage(f"{len(files)} images came; {request.images} were asked for.")
    sizes = set()
    for file in files:
        try:
            with Image.open(io.BytesIO(file)) as image:
                image.load()
                sizes.add(image.size)
        except Exception as error:  # its decoders raise whatever damaged data brings them to
            raise WrongImage(f"an image of {len(file)} bytes cannot be decoded: {error}") from None
    if len(sizes) != 1:
        raise WrongImage(f"the images of one request have the sizes {sorted(sizes)}")
    [size] = sizes
    wanted = tuple(side or default for side, default in zip(request.size, default_size or size, strict=True))
    if size != wanted:
        raise WrongImage(f"an image is {size[0]} x {size[1]}; {wanted[0]} x {wanted[1]} was asked for")
    return size
