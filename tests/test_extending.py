"""The programs of docs/extending.md, which bring their own losses, hypergradient and kernel, as they stand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
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


def test_a_loss_that_is_not_one_number_an_example_is_refused():
    """One that takes the scores of several draws, (L, n, D), for one: its mean would be another loss."""

    class Plain(pyro_bism.DenoisingScoreMatching):
        def __call__(self, score, v, noise):
            return 0.5 * (score(self.perturb(v, noise)) + noise.epsilon / self.sigma).square().sum(-1)

    class PlainToo(numpyro_bism.DenoisingScoreMatching):
        def __call__(self, score, v, noise):
            return 0.5 * jnp.square(score(self.perturb(v, noise)) + noise.epsilon / self.sigma).sum(-1)

    names = {}
    for block, kind in ((PYRO, Plain), (NUMPYRO, PlainToo)):
        exec(block[: block.index("@dataclass")], names)
        loss = kind(0.3, num_particles=2, average="unbiased")
        with pytest.raises(ValueError, match=r"Plain\w* gave a loss of shape \(2, 4\).*half_square"):
            if kind is Plain:
                pyro.clear_param_store()
                optim = pyro.optim.Adam({"lr": 1e-2})
                pyro_bism.BiSM(names["model"], names["guide"], optim, loss).step(torch.ones(4, 3))
            else:
                optim, x = numpyro.optim.Adam(1e-2), jnp.ones((4, 3))
                bism = numpyro_bism.BiSM(names["model"], names["guide"], optim, loss)
                bism.run(jax.random.key(0), 1, x, progress_bar=False)


def test_a_loss_that_gives_nothing_is_refused_by_name():
    class Nothing(pyro_bism.DenoisingScoreMatching):
        def __call__(self, score, v, noise):
            return None

    names = {}
    exec(PYRO[: PYRO.index("@dataclass")], names)
    pyro.clear_param_store()
    bism = pyro_bism.BiSM(names["model"], names["guide"], pyro.optim.Adam({"lr": 1e-2}), Nothing(0.3))
    with pytest.raises(ValueError, match=r"Nothing gave a NoneType, where one number an example is wanted: \(4,\)\.$"):
        bism.step(torch.ones(4, 3))


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


# What a new built-in strategy and a new loss are: a file each, and a line each in their folder's __init__
STRATEGY = '''"""Half of the detached gradient."""

from dataclasses import dataclass

from .detached import Detached


@dataclass(frozen=True)
class Halved(Detached):
    """Half of the detached gradient."""

    def __call__(self, *args):
        found = super().__call__(*args)
        return found._replace(gradient={halved})
'''
LOSS = '''"""Denoising, doubled."""

from dataclasses import dataclass

from .denoising_score_matching import DenoisingScoreMatching


@dataclass(frozen=True)
class Doubled(DenoisingScoreMatching):
    """Twice the denoising loss."""

    def __call__(self, *args):
        return 2 * super().__call__(*args)
'''
TRAINED = {
    "pyro_bism": """
for k, (loss, strategy) in enumerate([(DenoisingScoreMatching(0.3), Detached()), (Doubled(0.3), Halved())]):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    bism = BiSM(model, guide, pyro.optim.SGD({"lr": 1e-2}), loss, hypergradient=strategy, num_inner_steps=1)
    first = bism.step(x)
    found.append((first, bism.info.hypergradient_norm))
""",
    "numpyro_bism": """
for loss, strategy in [(DenoisingScoreMatching(0.3), Detached()), (Doubled(0.3), Halved())]:
    bism = BiSM(model, guide, numpyro.optim.SGD(1e-2), loss, hypergradient=strategy, num_inner_steps=1)
    result = bism.run(jax.random.key(0), 1, x, progress_bar=False)
    found.append((float(result.losses[0]), float(result.state.info.hypergradient_norm)))
""",
}


@pytest.mark.parametrize("package", [pyro_bism, numpyro_bism], ids=lambda package: package.__name__)
def test_a_built_in_strategy_or_loss_is_one_file_and_one_line(package, tmp_path):
    name, own = package.__name__, Path(package.__file__).parent
    shutil.copytree(own, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    of_lists, of_dicts = "[g / 2 for g in found.gradient]", "{k: g / 2 for k, g in found.gradient.items()}"
    halved, array = (of_lists, "torch") if package is pyro_bism else (of_dicts, "jnp")
    for folder, file, text, line in (
        ("hypergradients", "halved", STRATEGY.format(halved=halved), "from .halved import Halved"),
        ("losses", "doubled", LOSS, "from .doubled import Doubled"),
    ):
        (tmp_path / name / folder / f"{file}.py").write_text(text)
        with (tmp_path / name / folder / "__init__.py").open("a") as init:
            init.write(f"{line}\n")
    block = PYRO if package is pyro_bism else NUMPYRO
    programs = block[: block.index("@dataclass")]
    script = (
        f"{programs}\nfrom {name} import DenoisingScoreMatching, Detached\nfrom {name}.hypergradients import Halved\n"
        f"from {name}.losses import Doubled\nx = {array}.ones((4, 3))\nfound = []\n"
        f"{TRAINED[name]}\nprint(found)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (loss, length), (doubled, same) = eval(done.stdout.splitlines()[-1])
    assert doubled == pytest.approx(2 * loss, rel=1e-5)
    assert same == pytest.approx(length, rel=1e-5)  # half of a gradient twice as long
