"""The programs of docs/extending.md, which bring their own losses, hypergradient and kernel, as they stand."""

from pathlib import Path

import jax
import numpy as np
import numpyro
import pyro
import pytest
import torch

import numpyro_bism
import pyro_bism

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
PYRO, NUMPYRO = (block.split("```")[0] for block in PAGE.split("```python\n")[1:])


@pytest.fixture(scope="module")
def in_pyro():
    pyro.clear_param_store()
    names = {}
    exec(PYRO, names)
    return names


@pytest.fixture(scope="module")
def in_numpyro():
    names = {}
    exec(NUMPYRO.replace("200, x, progress_bar", "40, x, progress_bar"), names)
    return names


def test_they_train_and_sample(in_pyro, in_numpyro):
    losses = np.array(in_pyro["losses"])
    assert losses[-50:].mean() < losses[:50].mean() - 0.02
    assert np.isfinite(np.asarray(in_numpyro["result"].losses)).all()
    for names in (in_pyro, in_numpyro):
        draws = np.asarray(names["chains"].values["v"])
        assert draws.shape[-1] == 3 and np.isfinite(draws).all()


def test_in_pyro_captured_steps_are_the_eager_ones(in_pyro, replayed):
    """Losses and hypergradient alike."""
    found = {}
    for jit in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        bism = pyro_bism.BiSM(
            in_pyro["model"],
            in_pyro["guide"],
            pyro.optim.Adam({"lr": 1e-2}),
            in_pyro["WeightedDenoising"](0.3),
            inner_loss=in_pyro["ImportanceWeighted"](2),
            hypergradient=in_pyro["OneStep"](1.0),
            num_inner_steps=1,
            jit=jit,
        )
        found[jit] = [bism.step(in_pyro["x"]) for _ in range(4)]
    np.testing.assert_allclose(found[True], found[False], rtol=1e-4)


def test_the_weighted_loss_is_the_built_in_one_times_its_weight(in_pyro, in_numpyro):
    sigma, x = 0.3, in_pyro["x"]
    found = []
    for loss in (in_pyro["WeightedDenoising"](sigma), pyro_bism.DenoisingScoreMatching(sigma)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        bism = pyro_bism.BiSM(in_pyro["model"], in_pyro["guide"], pyro.optim.Adam({"lr": 1e-2}), loss)
        bism.pair(x)
        pyro.set_rng_seed(2)
        found.append(bism.evaluate_loss(x))
    assert found[0] == pytest.approx(sigma**2 * found[1], rel=1e-5)
    trained = in_numpyro["bism"]
    state, x = in_numpyro["result"].state, in_numpyro["x"]
    pair = trained.pair(*jax.tree.flatten(((x,), {})))
    params = pair.params(*trained._unpack(pair, state), None)
    batch = pair.batch(jax.random.key(0), [x], jax.tree.structure(((x,), {})))
    losses = trained.loss, numpyro_bism.DenoisingScoreMatching(sigma)
    ours, theirs = (pair.outer_loss(jax.random.key(5), params, batch, loss) for loss in losses)
    assert float(ours) == pytest.approx(sigma**2 * float(theirs), rel=1e-5)


def test_many_draws_bring_the_bound_to_the_marginal_and_one_is_the_elbo(in_pyro):
    """log p̃(v) in closed form: v ~ N(0, I + W Wᵀ) but for a constant, Z(W) = 1 up to it."""
    x, inner = in_pyro["x"].double(), in_pyro["ImportanceWeighted"]
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    bism = pyro_bism.BiSM(
        in_pyro["model"], in_pyro["guide"], pyro.optim.Adam({"lr": 1e-2}), pyro_bism.DenoisingScoreMatching(0.3)
    )
    pair = bism.pair(x.float())
    batch = pair.batch(*torch.utils._pytree.tree_flatten(((x.float(),), {})))
    with torch.no_grad():
        bounds = [float(inner(num)(pair, batch, batch.v)) for num in (1, 400)]
        W = pyro.param("W").double()
        precision = torch.eye(2).double() + W.T @ W
        drive = x @ W
        quadratic = (drive * torch.linalg.solve(precision, drive.T).T).sum(-1)
        marginal = 0.5 * (quadratic - torch.logdet(precision) - x.square().sum(-1)).mean()
    assert bounds[1] == pytest.approx(-float(marginal), abs=0.05)
    assert bounds[0] > bounds[1]


@pytest.mark.parametrize("package", [pyro_bism, numpyro_bism], ids=lambda package: package.__name__)
def test_what_is_missing_is_named_when_it_is_made(package, in_pyro):
    class NoDraw:
        num_particles, average = 1, "loss"

        def __call__(self, score, v, noise):
            return 0.0

    with pytest.raises(ValueError, match=r"NoDraw.*is not an outer loss.*lacks.*draw"):
        package.BiSM(in_pyro["model"], in_pyro["guide"], pyro.optim.Adam({"lr": 1e-2}), NoDraw())
    with pytest.raises(ValueError, match=r"is not a strategy.*lacks"):
        package.BiSM(
            in_pyro["model"],
            in_pyro["guide"],
            pyro.optim.Adam({"lr": 1e-2}),
            package.DenoisingScoreMatching(0.3),
            hypergradient=NoDraw(),
        )
    optim = pyro.optim.Adam({"lr": 1e-2}) if package is pyro_bism else numpyro.optim.Adam(1e-2)
    with pytest.raises(ValueError, match=r"is not a kernel.*lacks init, adapt, finish"):
        package.CD(in_pyro["model"], optim, NoDraw())


@pytest.mark.parametrize("package", [pyro_bism, numpyro_bism], ids=lambda package: package.__name__)
@pytest.mark.parametrize("name", ["OuterLoss", "InnerLoss", "Hypergradient", "Kernel"])
def test_one_that_can_not_be_called_can_not_be_made(package, name):
    with pytest.raises(TypeError, match=r"abstract method '?__call__"):
        type("Own", (getattr(package, name),), {})()
