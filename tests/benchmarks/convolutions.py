"""Milliseconds of the convolutional model's two convolutions and of their gradients, as JSON.

    python tests/benchmarks/convolutions.py 100 7        batch and rounds

In torch, and in JAX by themselves, in the body of a compiled loop, and there as numpyro_bism compiles them. They take
turns in one process. A step of BiSM needs of a convolution itself, its gradients in images and in filters, and theirs.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpyro_bism.compiled.convolutions  # before JAX is used: it sets a flag

import jax  # isort: skip

CHANNELS, LOOP = 16, 4


def in_torch(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> dict[str, Callable[[], object]]:
    x, w, g = map(torch.from_numpy, (x, w, g))

    def gradient(images, filters):
        mask = [images, filters, False]
        return torch.ops.aten.convolution_backward(g, x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, mask)

    return {
        "itself": lambda: torch.nn.functional.conv2d(x, w, stride=2, padding=1),
        "gradient in images": lambda: gradient(True, False),
        "gradient in filters": lambda: gradient(False, True),
        "its gradient in images": lambda: gradient(True, False),  # of its product with w: as that of a convolution
    }


def in_jax(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> dict[str, dict[str, Callable[[], object]]]:
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)))

    def images(x, w, g):
        return jax.vjp(lambda u: conv(u, w), x)[1](g)[0]

    def filters(x, w, g):
        return jax.vjp(lambda u: conv(x, u), w)[1](g)[0]

    functions = {
        "itself": lambda x, w, g: conv(x, w),
        "gradient in images": images,
        "gradient in filters": filters,
        "its gradient in images": lambda x, w, g: jax.vjp(lambda u: filters(u, w, g), x)[1](w)[0],
    }

    def looped(function):
        def body(total, _):  # every step's inputs are new
            return total + 1e-9 * function(x + total, w + total, g + total).mean(), None

        return lambda *_: jax.lax.scan(body, jnp.zeros(()), length=LOOP)[0]

    def run(function):
        return lambda: jax.block_until_ready(function(x, w, g))

    return {
        what: {
            "alone": run(jax.jit(function)),
            "loop": run(jax.jit(looped(function))),
            "compiled": run(numpyro_bism.compiled.convolutions.compiled(looped(function))),
        }
        for what, function in functions.items()
    }


def main() -> None:
    batch, rounds = int(sys.argv[1]), int(sys.argv[2])
    rng, rows = np.random.default_rng(0), []
    for channels, width in ((1, 32), (CHANNELS, 16)):
        sizes = (batch, channels, width, width), (CHANNELS, channels, 4, 4), (batch, CHANNELS, width // 2, width // 2)
        x, w, g = (rng.normal(size=size).astype(np.float32) for size in sizes)
        torch_calls, jax_calls = in_torch(x, w, g), in_jax(*map(jnp.asarray, (x, w, g)))
        for what, call in torch_calls.items():
            calls = {"torch": call, **jax_calls[what]}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for n in range(rounds + 1):
                for name, run in calls.items():
                    start = time.perf_counter()
                    run()
                    if n:  # the first compiles
                        seconds[name].append(
                            (time.perf_counter() - start) / (1 if name in ("torch", "alone") else LOOP)
                        )
            label = f"{channels} to {CHANNELS} channels, {width} x {width}: {what}"
            rows.append({"what": label, **{name: 1e3 * median(found) for name, found in seconds.items()}})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
