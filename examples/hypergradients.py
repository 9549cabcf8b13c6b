"""Every hypergradient strategy at several budgets: what it costs, how far off it is, and what it learns.

Two models in NumPyro: the checkerboard's RBM (2 x 4 units), and an RBM of 400 hidden units on the Frey faces (560
pixels) where their path is given, else on scikit-learn's digits (64 pixels). Each row is a process of its own, so that
its peak memory is its own:

    python examples/hypergradients.py --data freyface.npz          both tables and the figure, about two hours
    python examples/hypergradients.py --model checkerboard --steps 1000 --gradients 100

- *error*: at one common state, trained and its guide fitted, the mean of many gradients against the exact gradient of
  the marginal's denoising loss, relative to its length; *error in c* is the same for the hidden biases alone, which
  the score sees through the posterior only. *spread* is how much single gradients scatter around their mean, relative
  to the same length. All on one batch.
- *log-likelihood*, in nats: its exact expectation on the checkerboard; on images that of the held-out ones, noise added
  (the density that denoising learns), by annealed importance sampling.

A third table finds the default: the problems of examples/problems.py, five seeds of each, with the exact objective that
every strategy ends at; "None" is the default, and the table says which strategy that is.

    python examples/hypergradients.py --model problems            about an hour
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import results_file
from checkerboard import expected_log_likelihood
from data import checkerboard, digits, frey_faces

STRATEGIES = {
    "Detached()": ("relaxed", "summed"),
    "Unrolled(1)": ("summed",),
    "Unrolled(5)": ("relaxed", "summed"),
    "Unrolled(20)": ("relaxed", "summed"),
    "Unrolled(20, memory='recompute')": ("summed",),
    "Implicit(num_steps=2)": ("summed",),
    "Implicit(num_steps=5)": ("relaxed", "summed"),
    "Implicit(num_steps=20)": ("summed",),
    "Implicit('neumann', 20)": ("summed",),
    "Implicit('nystrom', 10, damping=1e-3)": ("summed",),
    "Amortized()": ("relaxed", "summed"),
    "Amortized(num_steps=3)": ("summed",),
    "Functional()": ("relaxed", "summed"),
    "Functional(memory=0)": ("summed",),
    "Functional(memory=0.99)": ("relaxed", "summed"),
    "Penalty(10)": ("summed",),
    "Penalty(100)": ("relaxed", "summed"),
    "Penalty(1000)": ("summed",),
    "Covariance(2)": ("relaxed", "summed"),
    "Covariance(8)": ("summed",),
    "Exact()": ("summed",),
}
ON_FACES = {
    "Detached()": ("summed",),
    "Unrolled(5)": ("relaxed", "summed"),
    "Unrolled(20)": ("summed",),
    "Implicit(num_steps=5)": ("summed",),
    "Implicit(num_steps=20)": ("summed",),
    "Implicit(num_steps=20, damping=0.01)": ("summed",),
    "Amortized()": ("relaxed", "summed"),
    "Functional()": ("relaxed", "summed"),
    "Penalty(100)": ("summed",),
    "Covariance(2)": ("summed",),
    "Exact()": ("summed",),
}
ON_PROBLEMS = ["None", "Functional()", "Exact()", "Amortized()", "Implicit(num_steps=5)", "Unrolled(5)"]
COLUMNS = ["latents", "strategy", "ms a step", "peak MB", "error", "error in c", "spread", "log-likelihood"]


class Setting:
    """A model with its data: what differs between the two tables."""

    def __init__(self, name, data=None):
        self.name = name
        if name == "checkerboard":
            self.train = checkerboard(50_000, np.random.default_rng(1234))
            self.hidden, self.batch, self.sigma, self.steps, self.rate, self.log_s = 4, 100, 0.05, 20_000, 1e-3, 0.0
        else:
            split = frey_faces(data) if data else digits()
            mean = split.train.mean(0)
            self.train, self.test = split.train - mean, split.test - mean
            self.hidden, self.batch, self.sigma, self.steps, self.rate, self.log_s = 400, 100, 0.3, 2000, 1e-3, -0.7
        self.visible = self.train.shape[1]

    def title(self):
        if self.name == "checkerboard":
            return f"Checkerboard, {self.visible} x {self.hidden} units"
        kind = "Frey faces" if self.visible == 560 else "Digits"
        return f"{kind}, {self.visible} x {self.hidden} units"

    def log_likelihood(self, params):
        if self.name == "checkerboard":
            return expected_log_likelihood(params)
        rng = np.random.default_rng(0)
        noisy = self.test + self.sigma * rng.normal(size=self.test.shape).astype(np.float32)
        return float((log_p_tilde(params, noisy) - log_normalizer(params, rng)).mean())


def log_p_tilde(params, v, beta=1.0):
    """log Σ_h exp(-E(v, h)) with the hidden units' part tempered by ``beta``."""
    drive = beta * (params["c"] + v @ params["W"])
    return -0.5 * np.square((v - params["b"]) * np.exp(-params["log_s"])).sum(-1) + np.logaddexp(0, drive).sum(-1)


def log_normalizer(params, rng, num_chains=100, num_temperatures=1000):
    """Annealed importance sampling (Neal 2001; Salakhutdinov and Murray 2008), block Gibbs between temperatures."""
    b, c, W, s = params["b"], params["c"], params["W"], np.exp(params["log_s"])
    betas = np.linspace(0, 1, num_temperatures)
    v = (b + s * rng.normal(size=(num_chains, len(b)))).astype(np.float32)
    weight = np.zeros(num_chains)
    for low, high in itertools.pairwise(betas):
        weight += log_p_tilde(params, v, high) - log_p_tilde(params, v, low)
        h = rng.random((num_chains, len(c))) < 1 / (1 + np.exp(-high * (c + v @ W)))
        v = (b + high * s**2 * (h @ W.T) + s * rng.normal(size=v.shape)).astype(np.float32)
    start = np.broadcast_to(np.log(s) + 0.5 * np.log(2 * np.pi), b.shape).sum() + len(c) * np.log(2)
    return start + weight.max() + np.log(np.exp(weight - weight.max()).mean())


def programs(setting, latents, column=1.0, logits=None):
    """Model and guide of an RBM of v / ``column``; ``logits()`` gives the guide's logits as a function of v."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from numpyro_bism import ConcreteBernoulli

    d, k = setting.visible, setting.hidden

    def weights(key):
        return (0.1 if k < 10 else 0.01) * jax.random.normal(key, (d, k))

    def linear():
        W, b = numpyro.param("guide_W", weights), numpyro.param("guide_b", jnp.zeros(k))
        return lambda v: b + v @ W

    def plate(x):
        size = min(setting.batch, len(x))
        return numpyro.plate("points", len(x), subsample_size=size if size < len(x) else None, dim=-2)

    def model(x):
        W, b, c = numpyro.param("W", weights), numpyro.param("b", jnp.zeros(d)), numpyro.param("c", jnp.zeros(k))
        log_s = numpyro.param("log_s", jnp.full(d if k < 10 else (), setting.log_s))
        with plate(x) as rows:
            v = numpyro.sample("v", dist.Normal(0, 1).expand([d]).to_event(1).mask(False), obs=x[rows])
            v = v / column
            numpyro.factor("quadratic", -0.5 * jnp.square((v - b) * jnp.exp(-log_s)).sum(-1))
            with numpyro.plate("units", k, dim=-1):
                h = numpyro.sample("h", dist.Bernoulli(0.5).mask(False))
                numpyro.factor("unit", h * (c + (v @ W).squeeze(-2)))

    def guide(x):
        logits_of = (logits or linear)()
        with plate(x) as rows:
            at = logits_of(x[rows]).squeeze(-2)
            with numpyro.plate("units", k, dim=-1):
                if latents == "summed":
                    numpyro.sample("h", dist.Bernoulli(logits=at), infer={"enumerate": "parallel"})
                else:
                    numpyro.sample("h", ConcreteBernoulli(0.1, at))

    return model, guide


def trainer(setting, latents, strategy, optim):
    import optax
    from numpyro.infer import Trace_ELBO, TraceEnum_ELBO

    import numpyro_bism

    summed = latents == "summed"
    return numpyro_bism.BiSM(
        *programs(setting, latents),
        optim,
        loss=numpyro_bism.DenoisingScoreMatching(setting.sigma, average="score" if summed else "loss"),
        inner_optim=optax.adam(setting.rate, 0.9, 0.95),
        inner_loss=TraceEnum_ELBO(max_plate_nesting=2) if summed else Trace_ELBO(),
        hypergradient=eval(strategy, vars(numpyro_bism)),
    )


def tally():
    """An optimiser that moves nothing; its state sums the gradients and their squares, entry by entry."""
    import jax
    import jax.numpy as jnp
    import optax

    def zeros(tree):
        return jax.tree.map(jnp.zeros_like, tree)

    def update(gradient, state, params=None):
        total, square = state
        square = jax.tree.map(lambda s, g: s + jnp.square(g), square, gradient)
        return zeros(gradient), (jax.tree.map(jnp.add, total, gradient), square)

    return optax.GradientTransformation(lambda params: (zeros(params), zeros(params)), update)


def exact_gradient(setting, params, v, num):
    """Of the denoising loss of the marginal's own score, averaged over ``num`` draws of the noise."""
    import jax
    import jax.numpy as jnp

    def loss(params, key):
        noise = jax.random.normal(key, v.shape)
        u = v + setting.sigma * noise
        posterior = jax.nn.sigmoid(params["c"] + u @ params["W"])
        score = -(u - params["b"]) * jnp.exp(-2 * params["log_s"]) + posterior @ params["W"].T
        return 0.5 * jnp.square(score + noise / setting.sigma).sum(-1).mean()

    def add(total, key):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(params, key)), None

    total = jax.jit(lambda keys: jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), keys)[0])
    params = jax.tree.map(jnp.asarray, params)
    parts = [total(keys) for keys in jax.random.split(jax.random.key(7), (num // 1000, 1000))]
    return jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), 0) / (1000 * len(parts)), *parts)


def at_common_state(setting, latents, strategy, common):
    """A BiSM that moves only φ, its state there, and the batch."""
    import jax

    x = setting.train[: setting.batch][:, None]
    bism = trainer(setting, latents, strategy, tally())
    start = {k: v for k, v in common.items() if not k.startswith("exact_")}
    return bism, bism.init(jax.random.key(5), x, init_params=start), x


def gradient_error(setting, latents, strategy, common, num):
    """Errors and spread of ``num`` gradients at a common state, relative to the exact gradient's length."""
    import jax

    bism, state, x = at_common_state(setting, latents, strategy, common)
    sums = []
    for _ in range(6):  # runs of one length, compiled once; in the first what is carried from step to step settles
        state = bism.run(None, max(num // 5, 1), x, init_state=state, progress_bar=False).state
        _, (_, tallied) = state.optim_state
        sums.append(jax.tree.map(lambda g: np.asarray(g, np.float64), tallied))
    (before, square_before), (after, square), num = sums[0], sums[-1], 5 * max(num // 5, 1)
    exact = {name.removeprefix("exact_"): value for name, value in common.items() if name.startswith("exact_")}
    mean = {name: (after[name] - before[name]) / num for name in exact}

    def norm(values):
        return float(np.sqrt(sum(np.square(g).sum() for g in values)))

    length = norm(exact.values())
    squared = sum((square[name] - square_before[name]).sum() for name in square)
    scatter = np.sqrt(max(squared / num - norm(mean.values()) ** 2, 0))
    return {
        "error": norm(mean[name] - exact[name] for name in exact) / length,
        "error in c": norm([mean["c"] - exact["c"]]) / norm([exact["c"]]),
        "spread": float(scatter) / length,
    }


def inner_noise(setting, latents, common, num=400):
    """How the Hessian and the gradient of the inner loss scatter over draws of noise, at the common state."""
    import jax
    from jax.flatten_util import ravel_pytree

    from numpyro_bism import divergences
    from numpyro_bism.programs.visible import flatten

    bism, state, x = at_common_state(setting, latents, "Detached()", common)
    leaves, spec = flatten((x,), {})
    pair = bism.pair(leaves, spec)
    batch = pair.batch(jax.random.key(0), leaves, spec)
    theta, phi = bism.optim.get_params(state.optim_state), bism.inner_optim.get_params(state.inner_optim_state)
    flat, unravel = ravel_pytree(phi)

    def inner(key, phi):
        params = pair.params(theta, unravel(phi), None)
        return divergences.perturbed_inner_loss(key, bism.loss, bism._inner, pair, params, batch)

    keys = jax.random.split(jax.random.key(1), num)
    hessians = np.asarray(jax.lax.map(lambda key: jax.hessian(inner, 1)(key, flat), keys))
    gradients = np.asarray(jax.lax.map(lambda key: jax.grad(inner, 1)(key, flat), keys))
    mean = hessians.mean(0)
    values, vectors = np.linalg.eigh(mean)
    rates = setting.rate / np.sqrt(np.square(gradients).mean(0)) * np.diag(mean)
    scatter = np.sqrt(np.square((hessians - mean) @ vectors[:, -1]).sum(-1).mean())
    negative = (np.linalg.eigvalsh(hessians)[:, 0] < 0).mean()
    return (
        f"{latents}: the mean Hessian's eigenvalues {values[0]:.3g} to {values[-1]:.3g}, scatter along the last "
        f"{scatter:.2g}; {negative:.0%} of single draws have a negative one; one step of Adam solves "
        f"{rates.min():.2g} to {rates.max():.2g} of the linear system"
    )


def train(setting, latents, strategy, steps):
    """Parameters after ``steps`` steps, and milliseconds a step, compilation apart."""
    import jax
    import optax

    bism = trainer(setting, latents, strategy, optax.adam(setting.rate, 0.9, 0.95))
    x = setting.train[:, None]
    state, half, seconds = bism.init(jax.random.key(0), x), steps // 2, 0.0
    for part in range(2):  # two runs of one length: the first compiles
        start = time.perf_counter()
        result = bism.run(None, half, x, init_state=state, progress_bar=False)
        state, seconds = result.state, time.perf_counter() - start
        assert np.isfinite(result.losses).all(), part
    return {name: np.asarray(v) for name, v in result.params.items()}, 1e3 * seconds / half


def common_state(setting, latents, steps):
    """Parameters that training meets: half-way through, the guide then fitted further, the model standing still."""
    import jax

    params, _ = train(setting, latents, "Amortized()", steps)
    bism = trainer(setting, latents, "Detached()", tally())
    x = setting.train[: setting.batch][:, None]
    fitted = bism.run(
        jax.random.key(1), 400 if setting.hidden < 10 else 60, x, init_params=params, progress_bar=False
    ).params
    theta = {k: fitted[k] for k in ("W", "b", "c", "log_s")}
    exact = exact_gradient(setting, theta, x[:, 0], 200_000 if setting.hidden < 10 else 2000)
    return {**{k: np.asarray(v) for k, v in fitted.items()}, **{f"exact_{k}": v for k, v in exact.items()}}


def one(args):
    """One row, in this process; printed as JSON."""
    setting = Setting(args.model, args.data)
    steps = args.steps or setting.steps
    latents, strategy = args.one.split(":", 1)
    path = args.output / f"common_{setting.name}_{latents}.npz"
    if strategy == "common":
        common = common_state(setting, latents, steps // 2)
        np.savez(path, **common)
        if setting.hidden < 10:
            print("noise", inner_noise(setting, latents, common))
        return
    row = {"latents": latents, "strategy": strategy}
    try:
        params, row["ms a step"] = train(setting, latents, strategy, steps)
        row["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row["log-likelihood"] = setting.log_likelihood(params)
    except FloatingPointError:
        row["log-likelihood"] = float("nan")
    with np.load(path) as common:
        num = args.gradients or (20_000 if setting.hidden < 10 else 100)
        row |= gradient_error(setting, latents, strategy, dict(common), num)
    print("row", json.dumps(row))


def rows(args, model):
    """All rows of a model's table. Those that an interrupted run has left in ``--output`` are not made again."""
    chosen = STRATEGIES if model == "checkerboard" else ON_FACES
    jobs = [
        (latents, name)
        for latents in ("relaxed", "summed")
        for name, ways in chosen.items()
        if latents in ways and (not args.strategies or name in args.strategies)
    ]
    jobs = [(latents, "common") for latents in ("relaxed", "summed")] + jobs
    kept = args.output / f"rows_{model}.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for latents, name in tqdm(jobs, desc=model):
        job = f"{latents}:{name}"
        if job in found:
            continue
        command = [sys.executable, __file__, "--model", model, "--one", job, "--output", args.output]
        for option in ("data", "steps", "gradients"):
            if getattr(args, option):
                command += [f"--{option}", getattr(args, option)]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("row ")]
        if done.returncode or not (lines or name == "common"):
            raise RuntimeError(f"{job} failed:\n{done.stderr[-2000:]}")
        found[job] = json.loads(lines[0][4:]) if lines else {"noise": done.stdout.partition("noise ")[2].strip()}
        kept.write_text(json.dumps(found, indent=1))
    return [row for row in found.values() if "strategy" in row], [
        row["noise"] for row in found.values() if row.get("noise")
    ]


def problems_table(parser, args):
    """Every problem by every strategy: mean and spread of the objective over the seeds, NaN for a runaway."""
    import problems

    chosen = args.strategies or ON_PROBLEMS
    names = args.problems or list(problems.PROBLEMS)
    if unknown := [name for name in names if name not in problems.PROBLEMS]:
        parser.error(f"there is no problem {unknown}; there are {list(problems.PROBLEMS)}")
    path, about = args.output / "problems.json", {"steps": args.steps, "seeds": args.seeds}
    found = results_file.load(parser, path, about)
    for name, strategy in tqdm(list(itertools.product(names, chosen)), desc="problems"):
        if strategy in found.setdefault(name, {}):
            continue
        problem = problems.PROBLEMS[name]()
        try:
            params, ms, which = problems.trained(problem, strategy, args.seeds, args.steps or problem.steps)
            row = {"values": [problems.judged(problem, p) for p in params], "ms": ms, "which": which}
        except ValueError as error:  # it does not fit the programs, and says why
            row = {"refused": str(error)}
        found[name][strategy] = row
        results_file.save(path, about, found)
    lines = ["| problem | the default is | " + " | ".join(chosen) + " |", "|---" * (len(chosen) + 2) + "|"]
    for name in names:
        cells = [_problem_cell(found[name][strategy]) for strategy in chosen]
        default = found[name].get("None", {}).get("which", "-").partition("(")[0]
        lines.append("| " + " | ".join([name, default, *cells]) + " |")
    return "\n".join(lines)


def _problem_cell(row):
    if "refused" in row:
        return "-"
    values = np.array(row["values"])
    return f"{values.mean():.4f} ± {values.std():.4f}, {row['ms']:.2g} ms"


def table(found):
    formats = {
        "ms a step": ".3g",
        "peak MB": ".0f",
        "error": ".3f",
        "error in c": ".3f",
        "spread": ".2f",
        "log-likelihood": ".3f",
    }
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in found:
        cells = [format(row[c], formats[c]) if c in formats and c in row else str(row.get(c, "-")) for c in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(tables, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    kinds = ["Detached", "Unrolled", "Implicit", "Amortized", "Penalty", "Covariance", "Exact", "Functional"]
    figure, axes = plt.subplots(1, len(tables), figsize=(5.6 * len(tables), 4.6), layout="constrained", squeeze=False)
    for axis, (title, found) in zip(axes[0], tables.items(), strict=True):
        for row in found:
            kind, settings = row["strategy"].rstrip(")").split("(")
            colour = f"C{kinds.index(kind)}"
            marker, fill = ("o", colour) if row["latents"] == "summed" else ("s", "none")
            place = row["ms a step"], row["error in c"]
            axis.plot(*place, marker, color=colour, markerfacecolor=fill)
            settings = settings.replace("num_steps=", "").replace("memory='recompute'", "r").replace("'", "")
            axis.annotate(settings, place, fontsize=7, xytext=(5, -2), textcoords="offset points")
        axis.set(title=title, xlabel="milliseconds a step", xscale="log", yscale="log")
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    axes[0][0].set_ylabel("relative error of the hidden biases' gradient")
    handles = [Line2D([], [], marker="o", linestyle="", color=f"C{i}", label=kind) for i, kind in enumerate(kinds)]
    for marker, label in (("o", "summed out"), ("s", "relaxed")):
        fill = "0.4" if marker == "o" else "none"
        handles.append(Line2D([], [], marker=marker, linestyle="", color="0.4", markerfacecolor=fill, label=label))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["checkerboard", "faces", "both", "problems"], default="both")
    parser.add_argument("--data", default=os.environ.get("BISM_DATA"), help="path of the Frey faces")
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=sorted({*STRATEGIES, *ON_FACES, *ON_PROBLEMS}),
        metavar="STRATEGY",
        help="rows; all",
    )
    parser.add_argument("--problems", nargs="+", metavar="PROBLEM", help="some of those of examples/problems.py")
    parser.add_argument("--seeds", type=int, default=5, help="of every problem, side by side")
    parser.add_argument("--steps", type=int, help="of training; 20,000 and 2,000")
    parser.add_argument("--gradients", type=int, help="how many the error is a mean of; 20,000 and 100")
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.one:
        one(args)
        return
    if args.model == "problems":
        print(problems_table(parser, args))
        return
    tables = {}
    for model in ["checkerboard", "faces"] if args.model == "both" else [args.model]:
        title = Setting(model, args.data).title()
        tables[title], noise = rows(args, model)
        print("\n".join([f"\n{title}\n", table(tables[title]), "", *noise]))
    picture(tables, args.output / "hypergradients.png")


if __name__ == "__main__":
    main()
