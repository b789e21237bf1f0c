"""LoRAs, fused into the weights before they are exported: W + scale * alpha / rank * B A (Hu et al., arXiv:2106.09685).

Files are read here and not by diffusers: it looks up strengths under names that it has not converted, drops what it does
not know with a warning, and is what an export is compared with, so nothing else would notice.

    file.py       the file, or PEFT's folder, and how strongly it is applied
    keys.py       what each tensor of it is
    names.py      whose layer it changes: a model's layers by every name in use
    strength.py   alpha, where it does not stand among the tensors
    changes.py    the formulas
    fusing.py     all of it together
"""

from diffuserve_export.lora.file import Lora, lora_from_text
from diffuserve_export.lora.fusing import fuse_loras

__all__ = ["Lora", "fuse_loras", "lora_from_text"]
