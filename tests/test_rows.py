"""The user's rows are taken as they are: as an argument, from a closure or by a handler; on both backends."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from numpyro import handlers

import numpyro_bism
import pyro_bism

N, D, B = 12, 2, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D)) + np.linspace(-3, 3, N)[:, None]
WAYS = ["argument", "closure", "handler", "batch"]


class PyroBackend:
    """Programs of ``pyro_bism``: a latent a row, with a parameter of its own in the guide, or the model (``own``)."""

    name, package = "pyro", pyro_bism

    def __init__(self, options=None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.options = options or {}
        self.rows, self.seen, self.programs = None, {"model": [], "guide": []}, ("model", "guide")

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    def array(self, x):
        return torch.as_tensor(np.asarray(x))

    def pair(self, way, own=False):
        """:param way: how the plate gets its rows; ``batch`` is as ``argument``, the data picked already."""

        def plate(role, rows):
            handed = None if role not in self.programs or way == "handler" else rows if way != "closure" else self.rows
            size = {} if handed is None else {"subsample": handed}
            return pyro.plate("data", N, **(size or {"subsample_size": B}))

        def model(x, rows=None):
            b = pyro.param("b", lambda: torch.zeros(N if own else 1, D))
            with plate("model", rows) as i:
                self.seen["model"].append(i)
                h = pyro.sample("h", pdist.Normal(0.0, 1.0))
                data = x if way == "batch" else x[i]
                v = pyro.sample("x", pdist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=data)
                shift = b[i] if own else b
                pyro.factor("energy", -0.5 * ((v - shift - h[:, None]) ** 2).sum(-1))

        def guide(x, rows=None):
            m = pyro.param("m", lambda: torch.zeros(N))
            with plate("guide", rows) as i:
                self.seen["guide"].append(i)
                data = x if way == "batch" else x[i]
                pyro.sample("h", pdist.Normal(m[i] + 0.1 * data.sum(-1), 3**-0.5))

        if way == "handler":

            def handed(program):
                return lambda *args: pyro.poutine.condition(program, data={"data": self.rows})(*args)

            return handed(model), handed(guide)
        return model, guide

    def bism(self, way, **options):
        loss = pyro_bism.DenoisingScoreMatching(0.1)
        optim = pyro.optim.Adam({"lr": 1e-2})
        cheap = {"num_inner_steps": 1, "hypergradient": pyro_bism.Detached()}
        return pyro_bism.BiSM(*self.pair(way), optim, loss, **{**cheap, **self.options, **options})

    def rival(self, kind, own=True):
        model, optim = self.pair("argument", own)[0], pyro.optim.Adam({"lr": 1e-2})
        rivals = {
            "marginal": lambda: pyro_bism.MarginalSM(model, optim, pyro_bism.DenoisingScoreMatching(0.1)),
            "cd": lambda: pyro_bism.CD(model, optim, pyro_bism.Langevin(1e-3)),
        }
        return rivals[kind]()

    def train(self, method, batches):
        for args in batches:
            method.step(*args)
        return None

    def values(self, method, state):
        return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}

    def call(self, name, method, state, *args, **options):
        return getattr(pyro_bism, name)(method, *args, **options)

    def evaluate(self, method, state, *args):
        torch.manual_seed(3)
        return method.evaluate_loss(*args)

    def shown(self, role):
        """The rows of the passes so far, as far as they have numbers."""
        found, self.seen[role] = self.seen[role], []
        return {tuple(i.tolist()) for i in found if not isinstance(i, torch._subclasses.FakeTensor)}


class NumPyroBackend:
    """The same in ``numpyro_bism``. A plate there takes rows from a handler alone."""

    name, package = "numpyro", numpyro_bism

    def __init__(self, options=None):
        self.options = options or {}
        self.rows, self.programs, self.seen = None, ("model", "guide"), {"model": [], "guide": []}

    def __enter__(self):
        jax.config.update("jax_enable_x64", True)
        return self

    def __exit__(self, *_):
        jax.config.update("jax_enable_x64", False)

    def array(self, x):
        return jnp.asarray(np.asarray(x))

    def pair(self, way, own=False):
        def plate(role, rows):
            rows = rows if way != "closure" else self.rows
            if role not in self.programs or way == "handler":
                return numpyro.plate("data", N, subsample_size=B)
            with handlers.substitute(data={"data": rows}):
                return numpyro.plate("data", N, subsample_size=len(rows))

        def model(x, rows=None):
            b = numpyro.param("b", jnp.zeros((N if own else 1, D)))
            with plate("model", rows) as i:
                self.seen["model"].append(i)
                h = numpyro.sample("h", ndist.Normal(0.0, 1.0))
                data = x if way == "batch" else x[i]
                v = numpyro.sample("x", ndist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=data)
                shift = b[i] if own else b
                numpyro.factor("energy", -0.5 * ((v - shift - h[:, None]) ** 2).sum(-1))

        def guide(x, rows=None):
            m = numpyro.param("m", jnp.zeros(N))
            with plate("guide", rows) as i:
                self.seen["guide"].append(i)
                data = x if way == "batch" else x[i]
                numpyro.sample("h", ndist.Normal(m[i] + 0.1 * data.sum(-1), 3**-0.5))

        if way == "handler":

            def handed(program):
                return lambda *args: handlers.substitute(program, data={"data": self.rows})(*args)

            return handed(model), handed(guide)
        return model, guide

    def bism(self, way, **options):
        loss, optim = numpyro_bism.DenoisingScoreMatching(0.1), numpyro.optim.Adam(1e-2)
        cheap = {"num_inner_steps": 1, "hypergradient": numpyro_bism.Detached()}
        return numpyro_bism.BiSM(*self.pair(way), optim, loss, **{**cheap, **self.options, **options})

    def rival(self, kind, own=True):
        model, optim = self.pair("argument", own)[0], numpyro.optim.Adam(1e-2)
        rivals = {
            "marginal": lambda: numpyro_bism.MarginalSM(model, optim, numpyro_bism.DenoisingScoreMatching(0.1)),
            "cd": lambda: numpyro_bism.CD(model, optim, numpyro_bism.Langevin(1e-3)),
        }
        return rivals[kind]()

    def train(self, method, batches):
        state = method.init(jax.random.key(0), *batches[0])
        update = jax.jit(method.update)
        for args in batches:
            state, _ = update(state, *args)
        return state

    def values(self, method, state):
        return {name: np.asarray(value) for name, value in method.get_params(state).items()}

    def call(self, name, method, state, *args, **options):
        return getattr(numpyro_bism, name)(method, state, *args, rng_key=jax.random.key(1), **options)

    def evaluate(self, method, state, *args):
        return float(method.evaluate(state._replace(rng_key=jax.random.key(3)), *args))

    def shown(self, role):
        found, self.seen[role] = self.seen[role], []
        return {tuple(np.asarray(i).tolist()) for i in found if not isinstance(i, jax.core.Tracer)}


@pytest.fixture(params=[PyroBackend, NumPyroBackend], ids=["pyro", "numpyro"])
def backend(request):
    with request.param() as made:
        yield made


def arguments(backend, way, rows):
    """What a step is given; the rows go where the programs look for them."""
    rows = backend.array(rows)
    backend.rows = rows
    x = backend.array(X)
    return {"argument": (x, rows), "batch": (x[rows], rows)}.get(way, (x,))


def moved(values, name):
    return set(np.flatnonzero(values[name].reshape(N, -1).any(-1)).tolist())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("programs", [("model", "guide"), ("guide",), ("model",)], ids=["both", "guide", "model"])
def test_the_rows_are_those_handed_to_the_plate(backend, way, programs):
    """In model and guide, at every pass, whichever of them hands the rows over; and so are ArviZ's labels."""
    if programs != ("model", "guide") and way in ("handler", "batch"):
        pytest.skip("both programs alike")
    backend.programs = programs
    bism = backend.bism(way)
    state = backend.train(bism, [arguments(backend, way, [7, 2, 9])] * 2)
    if programs == ("model", "guide"):
        assert backend.shown("model") == backend.shown("guide") == {(7, 2, 9)}
    assert moved(backend.values(bism, state), "m") == {2, 7, 9}
    tree = backend.call("to_arviz", bism, state, *arguments(backend, way, [7, 2, 9]), num_draws=2)
    assert tree["posterior"]["obs"].values.tolist() == [7, 2, 9]
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, X[[7, 2, 9]])


@pytest.mark.parametrize("way", ["argument", "batch"])
def test_rows_that_are_an_argument_may_differ_at_every_step(backend, way):
    """One analysis and, in NumPyro, one compiled update: the rows are traced values. Every step moves its own rows."""
    bism = backend.bism(way, hypergradient=backend.package.Amortized())
    batches = [arguments(backend, way, rows) for rows in ([0, 1, 2], [4, 3, 5], [11, 9, 4])]
    state = backend.train(bism, batches)
    assert len(bism._pairs) == 1
    assert moved(backend.values(bism, state), "m") == {0, 1, 2, 3, 4, 5, 9, 11}
    # another number of them
    state = backend.train(bism, [arguments(backend, way, [6, 7])])
    assert moved(backend.values(bism, state), "m") >= {6, 7}


def test_rows_in_a_compiled_step_of_pyro():
    with PyroBackend({"jit": True}) as backend:
        bism = backend.bism("argument")
        expected = []
        for rows in ([0, 1, 2], [4, 3, 5], [5, 9, 4]):
            bism.step(*arguments(backend, "argument", rows))
            expected.append(moved(backend.values(bism, None), "m"))
        assert expected == [{0, 1, 2}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5, 9}] and bism._num_captures == 1


def test_rows_in_numpyro_where_all_is_compiled():
    """``run``, and ``init`` in a compiled function, where the rows have no numbers yet."""
    with NumPyroBackend() as backend:
        args = arguments(backend, "argument", [10, 3, 4])
        bism = backend.bism("argument")
        result = bism.run(jax.random.key(0), 2, *args, progress_bar=False)
        assert moved(result.params, "m") == {3, 4, 10}

        @jax.jit
        def whole(*args):
            return bism.update(bism.init(jax.random.key(0), *args), *args)[0]

        bism = backend.bism("argument")
        assert moved(bism.get_params(whole(*args)), "m") == {3, 4, 10}


def test_rows_handed_over_by_handlers_around_the_step():
    """As SVI takes them: from ``substitute`` around ``update``, through ``seed`` and ``block`` around the programs."""
    with NumPyroBackend() as backend:
        backend.programs = ()
        bism = backend.bism("argument")
        x = backend.array(X)
        with handlers.substitute(data={"data": jnp.array([5, 6, 1])}):
            state, _ = jax.jit(bism.update)(bism.init(jax.random.key(0), x), x)
        assert moved(bism.get_params(state), "m") == {1, 5, 6}
        backend.programs = ("model", "guide")
        model, guide = backend.pair("argument")
        wrapped = [handlers.block(handlers.seed(p, rng_seed=0), hide=["nothing"]) for p in (model, guide)]
        bism = numpyro_bism.BiSM(*wrapped, bism.optim, bism.loss)
        args = arguments(backend, "argument", [5, 6, 1])
        state, _ = jax.jit(bism.update)(bism.init(jax.random.key(0), *args), *args)
        assert moved(bism.get_params(state), "m") == {1, 5, 6}


@pytest.mark.parametrize("kind", ["marginal", "cd"])
def test_rivals_take_the_rows_too(backend, kind):
    """A parameter of the model for every row: those move whose rows a step was handed."""
    rival = backend.rival(kind)
    state = backend.train(rival, [arguments(backend, "argument", rows) for rows in ([0, 1, 2], [8, 3, 1])])
    assert moved(backend.values(rival, state), "b") == {0, 1, 2, 3, 8}


def test_guide_parameters_belong_to_their_own_rows(backend):
    """As SVI learns them: with the user's rows the guide's location is the posterior mean, Σ_d x_d / 3, of its row."""
    bism = backend.bism("argument", num_inner_steps=5)
    order = [rows for _ in range(40) for rows in rng.permutation(N).reshape(-1, B)]
    if backend.name == "pyro":
        bism.inner_optim = pyro.optim.Adam({"lr": 0.03})
        bism.optim = pyro.optim.Adam({"lr": 1e-6})
    else:
        bism.inner_optim, bism.optim = (
            numpyro_bism.BiSM(lambda: None, lambda: None, numpyro.optim.Adam(rate), bism.loss).optim
            for rate in (0.03, 1e-6)
        )
    state = backend.train(bism, [arguments(backend, "argument", rows) for rows in order])
    location = backend.values(bism, state)["m"] + 0.1 * X.sum(-1)
    assert np.corrcoef(location, X.sum(-1) / 3)[0, 1] > 0.99
    assert np.abs(location - X.sum(-1) / 3).max() < 0.3


def test_evaluation_is_of_the_rows_handed_over(backend):
    """Free energies and likelihoods are those of these rows; the loss is evaluated there."""
    bism, rows = backend.bism("argument"), [7, 2, 9, 4]
    args = arguments(backend, "argument", rows)
    state = backend.train(bism, [args])
    b = backend.values(bism, state)["b"]
    got = np.asarray(backend.call("free_energy", bism, state, *args))
    # ∫ exp(-½|v - b - h|²) N(h; 0, 1) dh, with y = v - b
    y = X[rows] - b
    expected = 0.5 * (y**2).sum(-1) - 0.5 * y.sum(-1) ** 2 / 3 + 0.5 * np.log(3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    likelihood = backend.call("log_likelihood", bism, state, *args)
    np.testing.assert_allclose(np.asarray(likelihood.value).reshape(-1), -expected - np.log(2 * np.pi), rtol=1e-5)
    assert np.isfinite(backend.evaluate(bism, state, *args))


def test_chains_are_of_the_rows_handed_over(backend):
    bism = backend.bism("argument")
    args = arguments(backend, "argument", [7, 2, 9])
    state = backend.train(bism, [args])
    options = {"kernel": backend.package.Langevin(0.1), "num_samples": 2, "sites": ["h"], "progress_bar": False}
    chains = backend.call("run_chains", bism, state, *args, **options)
    assert np.asarray(chains.rows["data"]).tolist() == [7, 2, 9]
    np.testing.assert_allclose(np.asarray(chains.v), X[[7, 2, 9]])
    with pytest.raises(ValueError, match="chains belong to other data"):
        backend.call("run_chains", bism, state, *arguments(backend, "argument", [1, 2, 3]), chains=chains, **options)


def test_all_rows_in_another_order(backend):
    """A plate that takes all rows, handed a permutation: v, labels and guide stand in that order."""
    bism, order = backend.bism("argument"), np.random.default_rng(1).permutation(N)
    args = arguments(backend, "argument", order)
    state = backend.train(bism, [args])
    tree = backend.call("to_arviz", bism, state, *args, num_draws=2)
    assert tree["posterior"]["obs"].values.tolist() == order.tolist()
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, X[order])


def test_rows_that_can_not_be_taken_as_they_are(backend):
    """Other rows in the model than in the guide, rows outside the data, what is no number of a row: said in words."""
    bism = backend.bism("argument")
    for rows, words in (([0, 1, N], f"Plate 'data' of {N} rows is handed row {N}"), ([0.0, 1.0, 2.0], "integers")):
        with pytest.raises((ValueError, TypeError), match=words):
            args = (arguments(backend, "argument", [0, 1, 2])[0], backend.array(rows))
            backend.train(bism, [args])
    model, guide = backend.pair("argument")
    shifted = lambda x, rows: guide(x, rows[::-1] if backend.name == "numpyro" else rows.flip(0))  # noqa: E731
    bism = backend.package.BiSM(model, shifted, bism.optim, bism.loss)
    with pytest.raises(ValueError, match=r"Plate 'data' is handed the rows .2, 1, 0. in the guide and .0, 1, 2. in"):
        backend.train(bism, [arguments(backend, "argument", [0, 1, 2])])


def test_a_row_handed_over_twice_is_two_examples(backend):
    """Each with its own noise, where the programs read the plate's rows; a reader of all the data is refused."""
    bism = backend.bism("argument")
    args = arguments(backend, "argument", [5, 5, 1])
    state = backend.train(bism, [args])
    assert moved(backend.values(bism, state), "m") == {1, 5}
    model, guide = backend.pair("argument")

    def reader(x, rows):
        guide(x + 0.0, rows)

    bism = backend.package.BiSM(model, reader, bism.optim, bism.loss)
    with pytest.raises(ValueError, match="a row twice"):
        if backend.name == "pyro":
            bism.step(*args)
        else:
            bism.update(bism.init(jax.random.key(0), *args), *args)
    if backend.name == "numpyro":  # no numbers, no words: but no wrong number either
        assert np.isnan(jax.jit(bism.update)(bism.init(jax.random.key(0), *args), *args)[1])


def test_plates_still_draw_where_nobody_hands_them_rows(backend):
    """Anew at every step, the guide's own plates too, whose rows draw and density must share."""
    backend.programs = ()
    bism = backend.bism("argument")
    state = backend.train(bism, [(backend.array(X),)] * 12)
    assert len(moved(backend.values(bism, state), "m")) > 2 * B


def test_rows_of_an_inner_plate(backend):
    """Nested: the data plate takes all rows, a plate of units inside is handed some."""
    units = 5

    def programs(sample, param, plate, factor, dist, zeros):
        def flat(shape):
            return dist.Normal(0.0, 1.0).expand(shape).to_event(1).mask(False)

        def model(x, some):
            b = param("b", zeros((1,)))
            with plate("data", N, None, -2):
                v = sample("x", flat([N, 1, D]), x)
                with plate("units", units, some, -1) as i:
                    h = sample("h", dist.Normal(0.0, 1.0))
                    factor("energy", -0.5 * (h - v.sum(-1) - b) ** 2)
                    seen.append(i)
                factor("own", -0.5 * (v**2).sum(-1))

        def guide(x, some):
            m = param("m", zeros((units,)))
            with plate("data", N, None, -2), plate("units", units, some, -1) as i:
                sample("h", dist.Normal(m[i] + 0.3 * x.sum(-1), 1.0))

        return model, guide

    seen = []
    if backend.name == "pyro":

        def sample(name, fn, obs=None):
            return pyro.sample(name, fn, obs=obs)

        def plate(name, size, rows, dim):
            return pyro.plate(name, size, subsample=rows, dim=dim)

        model, guide = programs(sample, pyro.param, plate, pyro.factor, pdist, torch.zeros)
        optim = pyro.optim.Adam({"lr": 1e-2})
    else:

        def plate(name, size, rows, dim):
            if rows is None:
                return numpyro.plate(name, size, dim=dim)
            with handlers.substitute(data={name: rows}):
                return numpyro.plate(name, size, dim=dim)

        def sample(name, fn, obs=None):
            return numpyro.sample(name, fn, obs=obs)

        model, guide = programs(sample, numpyro.param, plate, numpyro.factor, ndist, jnp.zeros)
        optim = numpyro.optim.Adam(1e-2)
    bism = backend.package.BiSM(model, guide, optim, backend.package.DenoisingScoreMatching(0.3))
    args = backend.array(X[:, None, :]), backend.array([3, 1])
    state = backend.train(bism, [args])
    assert set(np.flatnonzero(backend.values(bism, state)["m"]).tolist()) == {1, 3}


def test_a_hidden_plate_is_refused(backend):
    """``block`` keeps a plate out of sight: nobody could tell which rows it takes."""
    backend.programs = ()
    model, guide = backend.pair("argument")
    optim = backend.bism("argument").optim
    if backend.name == "pyro":
        model, guide = (pyro.poutine.block(p, hide=["data"]) for p in (model, guide))
    else:
        model, guide = (handlers.block(handlers.seed(p, rng_seed=0), hide=["data"]) for p in (model, guide))
    bism = backend.package.BiSM(model, guide, optim, backend.package.DenoisingScoreMatching(0.3))
    with pytest.raises(ValueError, match=r"Plate 'data' around site 'h'.*hide"):
        backend.train(bism, [(backend.array(X),)])


def test_a_scale_around_a_minibatch_is_told_from_a_weight(backend):
    """N/B on the visible site makes another density, and the losses are means already: said once, with the cure."""
    model, guide = backend.pair("batch")
    scale = pyro.poutine.scale if backend.name == "pyro" else handlers.scale
    optim = backend.bism("batch").optim
    bism = backend.package.BiSM(
        scale(model, scale=N / B), scale(guide, scale=N / B), optim, backend.package.DenoisingScoreMatching(0.1)
    )
    args = arguments(backend, "batch", [0, 1, 2])
    with pytest.warns(UserWarning, match=r"A scale of 4 covers visible site 'x'.*\(N/B\), drop it") as told:
        backend.train(bism, [args] * 2)
    assert len(told) == 1
