"""Which hypergradient learns the checkerboard first: seconds until the exact log-likelihood reaches 0.32 nats.

    python tests/benchmarks/race.py --cores 1

The RBM and the settings are those of ``examples/hypergradients.py``. Strategies with the same latents run in one
process, in turns of 2,500 steps; compilation and the look at the log-likelihood are not counted.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
TURN = 2500


def race(latents: str, strategies: list[str], goal: float, limit: int) -> dict[str, tuple[int, float]]:
    """Steps and seconds of each until the goal; raises where one does not reach it."""
    import jax
    import numpy as np
    import optax
    from tqdm import tqdm

    from checkerboard import expected_log_likelihood
    from hypergradients import Setting, trainer

    setting = Setting("checkerboard")
    x = setting.train[:, None]
    runs = {}
    for name in strategies:
        bism = trainer(setting, latents, name, optax.adam(setting.rate, 0.9, 0.95))
        state = bism.init(jax.random.key(0), x)
        bism.run(None, TURN, x, init_state=state, progress_bar=False)  # compiles
        runs[name] = (bism, state)
    seconds, finished = dict.fromkeys(strategies, 0.0), {}
    progress = tqdm(range(TURN, limit + 1, TURN), desc=latents)
    for steps in progress:
        for name in strategies:
            if name in finished:
                continue
            bism, state = runs[name]
            start = time.perf_counter()
            result = bism.run(None, TURN, x, init_state=state, progress_bar=False)
            seconds[name] += time.perf_counter() - start
            runs[name] = (bism, result.state)
            found = expected_log_likelihood({k: np.asarray(v) for k, v in result.params.items()})
            progress.set_postfix({name: f"{found:.3f}"})
            if found >= goal:
                finished[name] = (steps, seconds[name])
        if len(finished) == len(strategies):
            progress.close()
            return finished
    raise SystemExit(f"not at {goal} after {limit} steps: {sorted(set(strategies) - set(finished))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", nargs="+", choices=["relaxed", "summed"], default=["relaxed", "summed"])
    parser.add_argument("--strategies", nargs="+", default=["Amortized()", "Unrolled(5)"])
    parser.add_argument("--goal", type=float, default=0.32)
    parser.add_argument("--limit", type=int, default=200_000, help="steps")
    parser.add_argument("--cores", type=int, help="pin the process to this many cores (Linux)")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.cores :])
    for latents in args.latents:
        found = race(latents, args.strategies, args.goal, args.limit)
        slowest = max(seconds for _, seconds in found.values())
        for name, (steps, seconds) in found.items():
            print(f"{latents:9}{name:24}{steps:8d} steps{seconds:8.1f} s{seconds / slowest:7.2f}", flush=True)


if __name__ == "__main__":
    main()
