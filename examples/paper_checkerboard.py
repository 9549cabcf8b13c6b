"""The paper's checkerboard, every method on one model: a Gaussian-Bernoulli RBM of 4 hidden units on two squares.

The settings are those of the authors' published code: its initialisation (uniform, PyTorch's), Adam 1e-3 with betas
(0.9, 0.95), batches of 100, σ = 0.05, K = 5, the relaxed guide at temperature 0.1. Beside the paper's methods stand
the other hypergradients of BiSM. The log-likelihood is exact and an expectation over the true density, so that no test
set's luck is in it; no model can have more than log 2 = 0.693.

    python examples/paper_checkerboard.py                        all methods, 100,000 steps, 3 seeds: about an hour
    python examples/paper_checkerboard.py --methods DSM CD-1     some of them
    python examples/paper_checkerboard.py --backend pyro --methods "BiDSM, N = 5" --steps 20000
    python examples/paper_checkerboard.py --smoke                a few steps of each
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkerboard import expected_log_likelihood
from data import checkerboard

BETAS, TEMPERATURE = (0.9, 0.95), 0.1
INNER_STEPS = 5  # K
NUM_PARTICLES = 5  # of VNCE, for its noise term
AT = 20_000  # steps after which the authors' own code was looked at
# exact log-likelihood of the authors' own code after 20,000 steps, seed 1234
AUTHORS = {
    "DSM": 0.067,
    "SSM": 0.325,
    "CD-1": 0.267,
    "CD-5": 0.200,
    "CD-10": 0.184,
    "PCD-1": 0.154,
    "PCD-5": 0.179,
    "PCD-10": 0.182,
    "NCE": -0.114,
    "VNCE": -0.162,
    "BiDSM, N = 0": -0.290,
    "BiDSM, N = 5": -0.314,
    "BiDSM, N = 10": -0.316,
    "BiSSM, N = 0": -np.inf,
    "BiSSM, N = 5": 0.240,
    "BiSSM, N = 10": 0.245,
}


class Setting(NamedTuple):
    """A Gaussian-Bernoulli RBM, and how it is trained.

    :ivar batch_size: rows that a step takes of the data; None takes all.
    :ivar rate: Adam's.
    :ivar sigma: of the denoising losses.
    """

    visible: int
    hidden: int
    batch_size: int | None
    rate: float
    sigma: float


CHECKERBOARD = Setting(visible=2, hidden=4, batch_size=100, rate=1e-3, sigma=0.05)


def start(seed: int, setting: Setting) -> dict[str, np.ndarray]:
    """PyTorch's uniform initialisation, θ by the number of hidden units and φ by that of visible ones."""
    rng = np.random.default_rng(seed)
    d, k = setting.visible, setting.hidden
    theta, phi = k**-0.5, d**-0.5
    values = {
        "W": rng.uniform(-theta, theta, (d, k)),
        "b": rng.uniform(-theta, theta, d),
        "c": rng.uniform(-theta, theta, k),
        "log_s": np.zeros(d),
        "guide_W": rng.uniform(-phi, phi, (d, k)),
        "guide_b": rng.uniform(-phi, phi, k),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def numpyro_backend(setting: Setting) -> SimpleNamespace:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import Trace_ELBO, TraceEnum_ELBO

    import numpyro_bism as bism

    def model(x, init):
        W, b, c = (numpyro.param(name, init[name]) for name in "Wbc")
        log_s = numpyro.param("log_s", init["log_s"])
        with numpyro.plate("points", len(x), subsample_size=setting.batch_size, dim=-2) as rows:
            v = numpyro.sample("v", dist.Normal(0, 1).expand([setting.visible]).to_event(1).mask(False), obs=x[rows])
            numpyro.factor("quadratic", -0.5 * jnp.square((v - b) * jnp.exp(-log_s)).sum(-1))
            with numpyro.plate("units", setting.hidden, dim=-1):
                h = numpyro.sample("h", dist.Bernoulli(0.5).mask(False))
                numpyro.factor("unit", h * (c + (v @ W).squeeze(-2)))

    def guide_of(summed):
        def guide(x, init):
            W, b = numpyro.param("guide_W", init["guide_W"]), numpyro.param("guide_b", init["guide_b"])
            with numpyro.plate("points", len(x), subsample_size=setting.batch_size, dim=-2) as rows:
                logits = b + (x[rows] @ W).squeeze(-2)
                with numpyro.plate("units", setting.hidden, dim=-1):
                    if summed:
                        numpyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
                    else:
                        numpyro.sample("h", bism.ConcreteBernoulli(TEMPERATURE, logits))

        return guide

    def train(engine, x, init, seed, stops):
        """After each of these numbers of steps: parameters, and the seconds so far."""
        x, init = jnp.asarray(x), {name: jnp.asarray(value) for name, value in init.items()}
        state, done, seconds = engine.init(jax.random.key(seed), x, init), 0, 0.0
        for stop in stops:
            began = time.perf_counter()
            result = engine.run(jax.random.key(seed), stop - done, x, init, init_state=state, progress_bar=False)
            state, done = result.state, stop
            params = {name: np.asarray(value) for name, value in result.params.items()}
            seconds += time.perf_counter() - began
            yield params, seconds

    return SimpleNamespace(
        bism=bism,
        model=model,
        guide=guide_of(False),
        summed_guide=guide_of(True),
        adam=lambda: optax.adam(setting.rate, *BETAS),
        noise=lambda: dist.Normal(jnp.zeros(setting.visible), 1.0).to_event(1),
        elbo=Trace_ELBO(),
        enum_elbo=TraceEnum_ELBO(max_plate_nesting=2),
        compiled={},
        train=train,
    )


def pyro_backend(setting: Setting) -> SimpleNamespace:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO, TraceEnum_ELBO

    import pyro_bism as bism

    def param(name, init):  # a copy: Pyro trains the tensor that it is given, in place
        return pyro.param(name, lambda: init[name].clone())

    def model(x, init):
        W, b, c = (param(name, init) for name in "Wbc")
        log_s = param("log_s", init)
        with pyro.plate("points", len(x), subsample_size=setting.batch_size, dim=-2) as rows:
            v = pyro.sample("v", dist.Normal(0, 1).expand([setting.visible]).to_event(1).mask(False), obs=x[rows])
            pyro.factor("quadratic", -0.5 * ((v - b) * torch.exp(-log_s)).square().sum(-1))
            with pyro.plate("units", setting.hidden, dim=-1):
                h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
                pyro.factor("unit", h * (c + (v @ W).squeeze(-2)))

    def guide_of(summed):
        def guide(x, init):
            W, b = param("guide_W", init), param("guide_b", init)
            with pyro.plate("points", len(x), subsample_size=setting.batch_size, dim=-2) as rows:
                logits = b + (x[rows] @ W).squeeze(-2)
                with pyro.plate("units", setting.hidden, dim=-1):
                    if summed:
                        pyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
                    else:
                        pyro.sample("h", bism.ConcreteBernoulli(TEMPERATURE, logits))

        return guide

    def train(engine, x, init, seed, stops):
        """After each of these numbers of steps: parameters, and the seconds so far."""
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        x, init = torch.tensor(x), {name: torch.tensor(value) for name, value in init.items()}
        done, seconds = 0, 0.0
        for stop in stops:
            began = time.perf_counter()
            for _ in range(stop - done):
                engine.step(x, init)
            done, seconds = stop, seconds + time.perf_counter() - began
            yield {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}, seconds

    return SimpleNamespace(
        bism=bism,
        model=model,
        guide=guide_of(False),
        summed_guide=guide_of(True),
        adam=lambda: pyro.optim.Adam({"lr": setting.rate, "betas": BETAS}),
        noise=lambda: dist.Normal(torch.zeros(setting.visible), 1.0).to_event(1),
        elbo=Trace_ELBO(),
        enum_elbo=TraceEnum_ELBO(max_plate_nesting=2),
        compiled={"jit": True},
        train=train,
    )


def engines(backend: SimpleNamespace, setting: Setting) -> dict:
    """By name, what makes the method: the same model in all."""
    b, model = backend.bism, backend.model
    dsm, ssm = b.DenoisingScoreMatching(setting.sigma), b.SlicedScoreMatching()
    compiled = backend.compiled
    noise = {"noise": backend.noise(), "log_normalizer": 0.0, **compiled}

    def bism(loss, hypergradient, summed=False):
        return b.BiSM(
            model,
            backend.summed_guide if summed else backend.guide,
            backend.adam(),
            loss,
            inner_loss=backend.enum_elbo if summed else backend.elbo,
            num_inner_steps=INNER_STEPS,
            hypergradient=hypergradient,
            **compiled,
        )

    def bidsm(hypergradient, **options):
        return lambda: bism(b.DenoisingScoreMatching(setting.sigma, **options), hypergradient, bool(options))

    found = {
        "DSM": lambda: b.MarginalSM(model, backend.adam(), dsm, **compiled),
        "SSM": lambda: b.MarginalSM(model, backend.adam(), ssm, **compiled),
    }
    for persistent in (False, True):
        for k in (1, 5, 10):
            found[f"{'PCD' if persistent else 'CD'}-{k}"] = lambda k=k, persistent=persistent: b.CD(
                model, backend.adam(), b.Gibbs(), num_steps=k, persistent=persistent, **compiled
            )
    found["NCE"] = lambda: b.NCE(model, backend.adam(), **noise)
    found["VNCE"] = lambda: b.VNCE(
        model,
        backend.guide,
        backend.adam(),
        num_particles=NUM_PARTICLES,
        inner_loss=backend.elbo,
        num_inner_steps=INNER_STEPS,
        **noise,
    )
    for name, loss in (("BiDSM", dsm), ("BiSSM", ssm)):
        for n in (0, 5, 10):
            hypergradient = b.Unrolled(n) if n else b.Detached()
            found[f"{name}, N = {n}"] = lambda loss=loss, hypergradient=hypergradient: bism(loss, hypergradient)
    found["BiDSM, amortised"] = bidsm(b.Amortized())
    found["BiSSM, amortised"] = lambda: bism(ssm, b.Amortized())
    found["BiDSM, covariance"] = bidsm(b.Covariance(2))
    found["BiDSM, penalty"] = bidsm(b.Penalty(100))
    found["BiDSM, summed, amortised"] = bidsm(b.Amortized(), average="score")
    found["BiDSM, summed, implicit"] = bidsm(b.Implicit(), average="score")
    found["BiDSM, summed, exact"] = bidsm(b.Exact(), average="score")
    return found


def score_matching(params: dict, v: np.ndarray) -> float:
    """E[½ ‖s‖² + ∇·s], s the exact score: the Fisher divergence but for a constant of the data's own."""
    W, b, c, precision = params["W"], params["b"], params["c"], np.exp(-2 * params["log_s"])
    p = 1 / (1 + np.exp(-(c + v @ W)))
    score = -(v - b) * precision + p @ W.T
    divergence = (p * (1 - p)) @ (W**2).sum(0) - precision.sum()
    return float((0.5 * (score**2).sum(-1) + divergence).mean())


def picture(results: dict, stops: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {
        "paper's rivals": ["DSM", "SSM", "CD-1", "CD-10", "PCD-1", "NCE", "VNCE"],
        "bi-level, the paper's": [f"{name}, N = {n}" for name in ("BiDSM", "BiSSM") for n in (0, 5, 10)],
        "bi-level, other gradients": [name for name in results if name.startswith("Bi") and "N =" not in name],
    }
    groups = {title: shown for title, names in groups.items() if (shown := [n for n in names if n in results])}
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4.3 * len(groups), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, names) in zip(axes[0], groups.items(), strict=True):
        for name in names:
            values = np.array(results[name]["log_likelihood"])
            line = axis.plot(stops, values.mean(0), label=name)[0]
            axis.fill_between(stops, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="steps", ylim=(-0.75, 0.45))
        axis.legend(fontsize=7, loc="lower right")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("exact log-likelihood, nats")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def number(x: float) -> str:
    return f"{x:.3f}" if np.isfinite(x) and abs(x) < 100 else "diverges"


def table(results: dict, stops: list[int]) -> str:
    """A table in Markdown; the spread is the standard deviation between the seeds."""
    early = stops.index(AT) if AT in stops else 0
    lines = [
        f"| method | {stops[early]:,} steps | authors' code | {stops[-1]:,} steps | score matching | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        values = np.array(result["log_likelihood"])
        spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(stops))
        cells = [f"{number(values.mean(0)[i])} ± {number(spread[i])}" for i in (early, -1)]
        theirs = number(AUTHORS[name]) if name in AUTHORS and stops[early] == AT else ""
        objective, seconds = np.mean(result["score_matching"]), np.median(result["seconds"])
        lines.append(f"| {name} | {cells[0]} | {theirs} | {cells[1]} | {objective:.2f} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--methods", nargs="+", help="some of them, by the names in the table")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, default=Path("build/paper_checkerboard"), help="a picture and the numbers"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of each method, to see that all runs")
    args = parser.parse_args()
    steps, seeds = (20, args.seeds[:1]) if args.smoke else (args.steps, args.seeds)
    setting = CHECKERBOARD
    backend = {"numpyro": numpyro_backend, "pyro": pyro_backend}[args.backend](setting)
    made = engines(backend, setting)
    unknown = set(args.methods or ()) - set(made)
    if unknown:
        parser.error(f"--methods: {sorted(unknown)} are not among {list(made)}")
    chunk = max(1, min(steps, AT) // 4)
    stops = [*range(chunk, steps + 1, chunk)]
    x = checkerboard(50_000, np.random.default_rng(1234))
    held_out = checkerboard(10_000, np.random.default_rng(1235))
    results: dict[str, dict] = {}
    runs = [(name, seed) for name in (args.methods or made) for seed in seeds]
    keep = args.output.with_suffix(".json")
    keep.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(runs) as bar:
        for name, seed in bar:
            if name not in results:
                engine = made[name]()
                results[name] = {"log_likelihood": [], "score_matching": [], "seconds": []}
            bar.set_postfix_str(f"{name}, seed {seed}")
            curve = []
            try:
                for last in backend.train(engine, x[:, None], start(seed, setting), seed, stops):
                    curve.append(expected_log_likelihood(last[0]))
            except FloatingPointError:  # it diverged, and said so
                curve += [-np.inf] * (len(stops) - len(curve))
            results[name]["log_likelihood"].append(curve)
            params, seconds = last
            results[name]["score_matching"].append(score_matching(params, held_out))
            results[name]["seconds"].append(seconds)
            keep.write_text(json.dumps({"stops": stops, "results": results}))
    print(f"{args.backend}, {len(seeds)} seeds, mean ± standard deviation between them")
    print(table(results, stops))
    picture(results, stops, args.output.with_suffix(".png"))
    print(f"The figure is in {args.output.with_suffix('.png')}, the numbers beside it.")


if __name__ == "__main__":
    main()
