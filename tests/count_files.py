"""How far a reader has to walk: the files that one later step of BiSM enters, with K = N = 1.

A step of a small model is watched after others were taken: which files of the package it runs through, and how often
the file changes from one call or return to the next. Counted over all that runs, and over ``bism.py`` with what it
enters itself, which is what a reader of Algorithm 1 sees.

    python tests/count_files.py [path of a checkout]
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]).resolve()
sys.path.insert(0, str(ROOT))


def watched(package: str, step: Callable[[], object]) -> dict[str, tuple[int, int, int]]:
    """Of all that runs, and of ``bism.py`` with what it enters: files, functions, changes of file."""
    folder = ROOT / package
    stack: list[str] = []  # files of the package, from the outermost call to the present one
    whole: list[str] = []
    own: list[str] = []
    functions: set[tuple[str, str]] = set()
    own_functions: set[tuple[str, str]] = set()

    def look(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(folder):
            return
        file = str(path.relative_to(folder))
        name = file, frame.f_code.co_qualname
        if event == "return":
            if stack:
                stack.pop()
            whole.append(stack[-1] if stack else file)
            if file == "bism.py" or (stack and stack[-1] == "bism.py"):
                own.append(stack[-1] if stack else file)
            return
        functions.add(name)
        if file == "bism.py" or (stack and stack[-1] == "bism.py"):
            own_functions.add(name)
            own.append(file)
        stack.append(file)
        whole.append(file)

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)

    def count(trail, names):
        changes = sum(a != b for a, b in itertools.pairwise(trail))
        return len({file for file, _ in names}), len(names), changes

    return {"all that runs": count(whole, functions), "bism.py and what it enters": count(own, own_functions)}


def pyro_step() -> Callable[[], object]:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_bism import BiSM, DenoisingScoreMatching, Unrolled

    def model(x):
        w = pyro.param("w", torch.ones(3))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h[:, None] * w, 1.0).to_event(1), obs=x)

    def guide(x):
        u = pyro.param("u", torch.ones(3))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(x @ u, 1.0))

    optim, loss = pyro.optim.Adam({"lr": 1e-3}), DenoisingScoreMatching(0.3)
    bism = BiSM(model, guide, optim, loss, num_inner_steps=1, hypergradient=Unrolled(1))
    x = torch.randn(8, 3)
    bism.step(x)
    bism.step(x)
    return lambda: bism.step(x)


def numpyro_step() -> Callable[[], object]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax

    from numpyro_bism import BiSM, DenoisingScoreMatching, Unrolled

    def model(x):
        w = numpyro.param("w", jnp.ones(3))
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Normal(0.0, 1.0))
            numpyro.sample("v", dist.Normal(h[:, None] * w, 1.0).to_event(1), obs=x)

    def guide(x):
        u = numpyro.param("u", jnp.ones(3))
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Normal(x @ u, 1.0))

    optim, loss = optax.adam(1e-3), DenoisingScoreMatching(0.3)
    bism = BiSM(model, guide, optim, loss, num_inner_steps=1, hypergradient=Unrolled(1))
    x = jax.random.normal(jax.random.key(0), (8, 3))
    state = bism.init(jax.random.key(1), x)
    bism.update(state, x)
    return lambda: bism.update(state, x)


if __name__ == "__main__":
    print("| | files | functions | changes of file |\n|---|---|---|---|")
    for package, make in (("pyro_bism", pyro_step), ("numpyro_bism", numpyro_step)):
        for what, numbers in watched(package, make()).items():
            print(f"| {package}, {what} | " + " | ".join(map(str, numbers)) + " |")
