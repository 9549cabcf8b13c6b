"""What the quickstart prints and draws: nothing in here trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Theta = dict[str, np.ndarray]  # W (64, k), b (64,), c (k,) and s (64,)


class Run(NamedTuple):
    """What one method in one backend gave.

    :ivar steps: where the curves were read; the loss not at step 0.
    :ivar losses: means since the reading before, an image.
    :ivar log_likelihoods: exact, of noisy held-out images, nats an image.
    :ivar posterior: the guide's draws of h for given images, as ArviZ reads them (BiSM only).
    """

    backend: str
    method: str
    steps: np.ndarray
    losses: np.ndarray
    log_likelihoods: np.ndarray
    seconds: float
    theta: Theta
    posterior: Callable[[np.ndarray], Any]


def gaussian_log_likelihood(images: np.ndarray, held_out: np.ndarray, sigma: float) -> float:
    """The yardstick: one Gaussian with a full covariance, fitted to the same noisy density."""
    covariance = np.cov(images.T) + sigma**2 * np.eye(images.shape[1])
    residual = held_out - images.mean(0)
    squares = (residual * np.linalg.solve(covariance, residual.T).T).sum(1)
    return -0.5 * (squares.mean() + np.linalg.slogdet(2 * np.pi * covariance)[1])


def print_table(runs: list[Run], yardstick: float) -> None:
    print(f"\n{'backend':<10}{'method':<8}{'last loss':>12}{'held-out log-likelihood':>26}{'seconds':>10}")
    for run in runs:
        loss, log_likelihood = run.losses[-1], run.log_likelihoods[-1]
        print(f"{run.backend:<10}{run.method:<8}{loss:>12.4g}{log_likelihood:>26.5g}{run.seconds:>10.1f}")
    print(f"Log-likelihoods are exact, in nats an image. Before training: {runs[0].log_likelihoods[0]:.2f};")
    print(f"of one Gaussian with a full covariance: {yardstick:.2f}.")


def sample(theta: Theta, num: int, rng: np.random.Generator, num_sweeps: int = 2000) -> np.ndarray:
    """Block Gibbs from noise. Returns E[v | h] of the last sweep: the sample before its pixel noise."""
    W, b, c, s = (theta[name] for name in "Wbcs")
    v = b + s * rng.standard_normal((num, len(b)))
    for _ in range(num_sweeps):
        h = rng.random((num, len(c))) < 1 / (1 + np.exp(-(c + v @ W)))
        mean = b + s**2 * (h @ W.T)
        v = mean + s * rng.standard_normal(mean.shape)
    return mean


def describe_posterior(run: Run, images: np.ndarray) -> None:
    """ArviZ on the guide: how well q(h|v) stands for the posterior of some held-out images."""
    import arviz as az

    data = run.posterior(images)
    khat = data.sample_stats["pareto_k"].values
    print(f"\n{run.backend}: the posterior of the first held-out image, from the guide")
    print(az.summary(data, var_names=["h"], coords={"obs": [0]}, kind="stats"))
    exact = 1 / (1 + np.exp(-(run.theta["c"] + images @ run.theta["W"])))
    error = np.abs(data.posterior["h"].mean(("chain", "draw")).values - exact).max()
    log_weight = data.sample_stats["log_weight"].values[0]
    weight = np.exp(log_weight - log_weight.max(0))
    effective = weight.sum(0) ** 2 / (weight**2).sum(0)
    print(f"k-hat of {len(images)} images: {khat.round(2)} (below 0.7 is good)")
    print(f"Effective draws of {len(weight)}: {effective.round()}; where nearly all are, k-hat says little either way")
    print(f"Largest error of a posterior mean, against the exact posterior: {error:.3f}")


def mosaic(rows: np.ndarray) -> np.ndarray:
    """Up to 16 images of 8 x 8 as one picture, four in a row, a blank line between."""
    picture = np.full((16, 9, 9), np.nan)
    picture[: len(rows), :8, :8] = rows[:16].reshape(-1, 8, 8)
    return picture.reshape(4, 4, 9, 9).swapaxes(1, 2).reshape(36, 36)[:-1, :-1]


def draw(runs: list[Run], yardstick: float, images: np.ndarray, path: Path) -> None:
    """Learning curves above; filters, data and samples below."""
    import matplotlib

    matplotlib.use("Agg")  # writes a file; needs no screen
    import matplotlib.pyplot as plt

    blue, orange, grey = "#0072B2", "#D55E00", "0.4"  # told apart by colour-blind readers too (Okabe and Ito)
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    svi, loss, likelihood = axes[0]
    for run in runs:
        # the backends agree so closely that one line has to show through the other
        style = {"linewidth": 5, "alpha": 0.4} if run.backend == "pyro" else {"linewidth": 1.8, "linestyle": "--"}
        if run.method == "SVI":
            svi.plot(run.steps[1:], run.losses, color=orange, label=f"loss, {run.backend}", **style)
            svi.plot(run.steps, run.log_likelihoods, color=blue, label=f"log-likelihood, {run.backend}", **style)
        else:
            loss.plot(run.steps[1:], run.losses, color=orange, label=run.backend, **style)
            likelihood.plot(run.steps, run.log_likelihoods, color=blue, label=run.backend, **style)
    svi.set_yscale("symlog", linthresh=100)
    svi.set(title="SVI: the loss falls, the likelihood with it", ylabel="nats an image")
    loss.set(title="BiSM: the loss falls ...", ylabel="denoising score matching loss (1 / pixel value²)")
    likelihood.axhline(yardstick, color=grey, linewidth=1, label="one Gaussian")
    likelihood.set(title="... and the likelihood rises", ylabel="held-out log-likelihood (nats an image)")
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)

    theta = runs[-1].theta
    filters = theta["s"] ** 2 * theta["W"].T
    size = np.abs(filters).max()
    shown = axes[1, 0].imshow(mosaic(filters), cmap="RdBu_r", vmin=-size, vmax=size)
    figure.colorbar(shown, ax=axes[1, 0], shrink=0.8, label="change of the pixel's mean")
    axes[1, 0].set_title("What each hidden unit adds: s² W")
    axes[1, 1].set_title("Held-out images")
    axes[1, 2].set_title("Samples of the RBM: E[v | h]")
    for axis, rows in zip(axes[1, 1:], (images, sample(theta, 16, np.random.default_rng(0))), strict=True):
        axis.imshow(mosaic(rows[:16]), cmap="gray_r", vmin=0, vmax=1)
    for axis in axes[1]:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
