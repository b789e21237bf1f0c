"""Step-level batching for Stable Diffusion: the core shared by server, client and tools.

Importing it loads the standard library only; numpy, tokenizers and the engines load with the modules that use them.
"""

__version__ = "0.1.0"
