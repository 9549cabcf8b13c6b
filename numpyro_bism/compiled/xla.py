"""A flag that XLA needs to be right, set before JAX is first used.

jaxlib 0.10.2, the newest for Python 3.11, silently sums wrongly on CPUs from row 32,769 on where a product with a
matrix is summed (jax-ml/jax#39103): every quadratic energy is such a sum. Without that fusion it is right.
"""

import os
import warnings

import jaxlib

FAULTY = ("0.10.2",)
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def is_in_use() -> bool:
    """Whether JAX has read its flags already; no where that can't be told.

    There is no public way to ask: this is the one private part of JAX that is used.
    """
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:
        return False
    return bool(backends_are_initialized())


def set_flags() -> None:
    """Turn the faulty fusion off, or say that it is too late for that."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__ not in FAULTY or FLAG in flags:
        return
    if is_in_use():
        warnings.warn(
            f"jaxlib {jaxlib.__version__} computes some sums over more than 32,768 rows wrongly on CPUs. Import "
            "numpyro_bism before JAX is first used, or install another jaxlib (0.10.1).",
            UserWarning,
            stacklevel=3,
        )
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=-reduce".strip()
