"""Time a step of each rival on the paper's checkerboard beside the same step by hand, in both frameworks.

    python tests/benchmarks/rivals.py                        both packages, all methods: a few minutes
    python tests/benchmarks/rivals.py --backends numpyro --methods CD-1 NCE
    python tests/benchmarks/rivals.py --check                the same mathematics? Losses, within Monte Carlo error

The packages' model is that of ``examples/paper_checkerboard.py``; the steps by hand are in ``rivals_by_hand.py``. In
JAX all steps are one ``lax.scan``, in torch a step is one compiled graph. All draw 100 distinct rows of 50,000 and the
same noise a step. Package and hand take turns, round by round, and a ratio is the median of the rounds' own;
compilation is not in it.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "examples"), str(HERE)]

from rivals_by_hand import SETTING, H, JaxByHand, N, TorchByHand  # noqa: E402

import paper_checkerboard as paper  # noqa: E402
from data import checkerboard  # noqa: E402

METHODS = ["DSM", "SSM", "CD-1", "CD-5", "PCD-1", "NCE", "VNCE"]
NUM_DRAWS = 400  # of a loss, to compare its mean


# The packages


class Package:
    """A rival of either package, ready to step."""

    def __init__(self, backend: str, name: str, x: np.ndarray):
        if backend == "numpyro":
            import jax
            import jax.numpy as jnp

            found = paper.numpyro_backend(SETTING)
            self.args = jnp.asarray(x[:, None]), jax.tree.map(jnp.asarray, paper.start(0, SETTING))
            self.engine = paper.engines(found, SETTING)[name]()
            self.state, self.steps = self.engine.init(jax.random.key(0), *self.args), self.in_jax
        else:
            import pyro
            import torch

            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            found = paper.pyro_backend(SETTING)
            self.args = torch.tensor(x[:, None]), {k: torch.tensor(v) for k, v in paper.start(0, SETTING).items()}
            self.engine, self.steps = paper.engines(found, SETTING)[name](), self.in_torch

    def in_jax(self, num: int) -> float:
        result = self.engine.run(None, num, *self.args, init_state=self.state, progress_bar=False)
        self.state = result.state
        return float(result.losses.mean())

    def in_torch(self, num: int) -> float:
        return sum(self.engine.step(*self.args) for _ in range(num)) / num


HANDS = {"numpyro": JaxByHand, "pyro": TorchByHand}


def measure(backend: str, name: str, x: np.ndarray, rounds: int) -> dict[str, float]:
    """Microseconds a step, of both, and their ratio: medians of the rounds."""
    package, by_hand = Package(backend, name, x), HANDS[backend](name, x)
    num = {"numpyro": 2000, "pyro": 200}[backend]
    times: tuple[list[float], list[float]] = [], []
    for n in range(rounds + 1):
        for contender, kept in zip((package, by_hand), times, strict=True):
            began = time.perf_counter()
            loss = contender.steps(num)
            if n:  # the first compiles
                kept.append(1e6 * (time.perf_counter() - began) / num)
            assert math.isfinite(loss), (name, contender)
    ratio = median(a / b for a, b in zip(*times, strict=True))
    return {"package": median(times[0]), "by hand": median(times[1]), "ratio": ratio}


# The same mathematics?


def compare(backend: str, name: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What, by the package and by hand, draw by draw; both at the initial parameters and the package's chains."""
    package, by_hand = Package(backend, name, x), HANDS[backend](name, x)
    if backend == "pyro":
        import torch

        ours = [package.engine.evaluate_loss(*package.args) for _ in range(NUM_DRAWS)]
        theta, phi, h = torch.utils._pytree.tree_unflatten(by_hand.state, by_hand.spec)
        if by_hand.is_persistent:
            h = package.engine.get_state()["carried"][0][0]["h"].reshape(N, H)
        sides = ((theta.params, phi.params, h, by_hand.x[by_hand.rows()], by_hand.draw) for _ in range(NUM_DRAWS))
        yield "loss", np.array(ours), np.array([by_hand.outer(*side)[0].item() for side in sides])
        return
    import jax

    from numpyro_bism.compiled.steps import norm

    theta, phi, h = by_hand.state
    if by_hand.is_persistent:
        h = package.state.carried[0]["h"].reshape(N, H)
    keys = jax.random.split(jax.random.key(1), NUM_DRAWS)

    def hand(is_fitted):
        return jax.lax.map(lambda key: by_hand.gradient((theta, phi, h), key, is_fitted)[2:], keys)

    def ours(method):
        return jax.lax.map(lambda key: method(package.state._replace(rng_key=key), *package.args), keys)

    info, (loss, gradient) = ours(package.engine.update)[0].info, hand(True)
    still = hand(False)[0] if by_hand.num_inner else loss
    yield "loss", np.asarray(ours(package.engine.evaluate)), np.asarray(still)
    yield "loss of a step", np.asarray(info.loss), np.asarray(loss)
    yield "its gradient's length", np.asarray(info.grad_norm), np.asarray(jax.vmap(norm)(gradient))


def check(backends: list[str], methods: list[str], x: np.ndarray) -> bool:
    """Prints both means and by how many standard errors they differ; whether all agree."""
    agree = True
    print(f"| | method | mean of {NUM_DRAWS} draws | package | by hand | standard errors apart |\n" + "|---" * 6 + "|")
    for backend in backends:
        for name in methods:
            for what, ours, theirs in compare(backend, name, x):
                z = (ours.mean() - theirs.mean()) / math.sqrt((ours.var() + theirs.var()) / NUM_DRAWS)
                agree &= abs(z) < 5
                print(
                    f"| {backend} | {name} | {what} | {ours.mean():.4f} | {theirs.mean():.4f} | {z:+.1f} |", flush=True
                )
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=list(HANDS), default=list(HANDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--check", action="store_true", help="compare the losses instead of the times")
    args = parser.parse_args()
    if "pyro" in args.backends:
        import torch

        torch.set_num_threads(args.threads)
    x = checkerboard(50_000, np.random.default_rng(1234))
    if args.check:
        sys.exit(not check(args.backends, args.methods, x))
    titles = {"numpyro": ("numpyro_bism", "JAX"), "pyro": ("pyro_bism", "torch")}
    cells = [f"{ours} µs | hand-written {host} µs | ratio" for ours, host in (titles[b] for b in args.backends)]
    print(" | ".join(["| method", *cells]) + " |\n" + "|---" * (1 + 3 * len(cells)) + "|", flush=True)
    for name in args.methods:
        line = f"| {name}"
        for backend in args.backends:
            found = measure(backend, name, x, args.rounds)
            line += f" | {found['package']:.4g} | {found['by hand']:.4g} | {found['ratio']:.2f}"
        print(line + " |", flush=True)


if __name__ == "__main__":
    main()
