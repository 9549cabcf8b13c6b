"""Noise drawn for many steps at once is the noise that each step would draw; convolutions in another form are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from numpyro_bism import BiSM, DenoisingScoreMatching, Detached, Unrolled
from numpyro_bism.compiled import jaxprs
from numpyro_bism.compiled import noise as noise_module
from numpyro_bism.compiled.convolutions import _channels_last, compiled
from test_numpyro_bism import X, guide, model

DATA = jnp.arange(60.0).reshape(20, 3)


def step(key, theta):
    """Draws of several kinds, rows of a data set, and rows written into it."""
    key_rows, key_noise, key_mask = jax.random.split(key, 3)
    rows = jax.random.choice(key_rows, 20, (4,), replace=False)
    noise = jax.random.normal(key_noise, (4, 3))
    whole = DATA.at[rows].set(noise)
    kept = jax.random.bernoulli(key_mask, 0.5, (4, 3))
    return jnp.where(kept, DATA[rows] + noise, 0.0) * theta, (whole * theta).sum(), key_noise


def test_the_parts_make_up_the_whole_and_the_noise_is_no_larger_than_its_draws():
    keys, theta = jax.random.split(jax.random.key(0), 5), jnp.array([1.0, 2.0, 3.0])
    draw, rest = noise_module.split_noise(step, keys[0], theta)
    noise = jax.vmap(draw)(keys)
    assert max(x[0].size for x in noise) <= 12
    for i, key in enumerate(keys):
        found = rest([x[i] for x in noise], 2 * theta)
        for ours, theirs in zip(found, step(key, 2 * theta), strict=True):
            assert (ours == theirs).all()


def test_nothing_is_drawn_ahead_that_depends_on_the_rest():
    draw, rest = noise_module.split_noise(
        lambda key, x: jax.random.normal(jax.random.fold_in(key, x), ()), jax.random.key(0), 3
    )
    noise = draw(jax.random.key(1))
    assert [x.shape for x in noise] == [()]
    assert rest(noise, 5) == jax.random.normal(jax.random.fold_in(jax.random.key(1), 5), ())


@pytest.mark.parametrize("strategy", [Detached(), Unrolled(2)], ids=repr)
def test_steps_drawn_ahead_are_those_taken_one_by_one(strategy, monkeypatch):
    """Seven steps, their noise drawn three at a time."""
    monkeypatch.setattr(noise_module, "MAX_STEPS", 3)
    bism = BiSM(model, guide, optax.adam(1e-2), DenoisingScoreMatching(0.3), num_inner_steps=2, hypergradient=strategy)
    x = jnp.asarray(X)
    state = bism.init(jax.random.key(0), x)
    result = bism.run(jax.random.key(0), 7, x, init_state=state, progress_bar=False)
    update, losses = jax.jit(bism.update), []
    for _ in range(7):
        state, loss = update(state, x)
        losses.append(loss)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    assert (jax.random.key_data(result.state.rng_key) == jax.random.key_data(state.rng_key)).all()
    for ours, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(bism.get_params(state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


PLANE = {"window_strides": (2, 1), "padding": ((1, 2), (0, 1)), "rhs_dilation": (1, 2)}
CONVOLUTIONS = {
    "line": ((3, 4, 9), (5, 4, 3), {"window_strides": (2,), "padding": ((1, 0),), "lhs_dilation": (2,)}),
    "plane": ((3, 4, 7, 6), (5, 4, 3, 2), PLANE),
    "channels last": ((3, 7, 6, 4), (3, 2, 4, 5), {**PLANE, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "mixed axes": ((4, 7, 3, 6), (3, 5, 2, 4), {**PLANE, "dimension_numbers": ("CHNW", "HOWI", "WNHC")}),
    "groups": ((3, 4, 7, 6), (6, 2, 3, 2), {**PLANE, "feature_group_count": 2}),
    "groups of images": ((6, 4, 7, 6), (4, 4, 3, 2), {**PLANE, "batch_group_count": 2}),
    "space": ((2, 3, 5, 4, 4), (2, 3, 2, 2, 3), {"window_strides": (1, 2, 1), "padding": "SAME"}),
}


@pytest.mark.parametrize("images, filters, settings", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolutions_with_channels_last_are_the_same_in_loops_branches_and_gradients(images, filters, settings):
    with jax.enable_x64(True):
        x, w = (jnp.asarray(np.random.default_rng(0).normal(size=size)) for size in (images, filters))

        def energy(x, w):
            return jnp.tanh(jax.lax.conv_general_dilated(x, w, **settings)).sum()

        def whole(x, w, key):
            """A loop over steps on the gradient of a gradient, one of them under a condition and rematerialised."""

            def body(i, carry):
                w, total = carry
                length = lambda w: jnp.square(jax.grad(jax.checkpoint(energy))(x, w)).sum()  # noqa: E731
                slope = jax.lax.cond(i % 2 == 0, jax.grad(length), lambda w: jax.jit(jax.grad(energy, 1))(x, w), w)
                return w - 1e-3 * slope + 0 * jax.random.normal(key, w.shape), total + energy(x, w)

            return jax.lax.fori_loop(0, 3, body, (w, 0.0))

        expected, found = (
            jax.jit(whole)(x, w, jax.random.key(0)),
            compiled(whole)(x, w, jax.random.key(0)),
        )
        assert abs(expected[0] - w).max() > 1e-4
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)

        plain = _channels_last(jax.make_jaxpr(whole)(x, w, jax.random.key(0)))
        axes = [eqn.params["dimension_numbers"] for eqn in convolutions(plain) if eqn.params["batch_group_count"] == 1]
        assert axes or "batch_group_count" in settings
        assert all(a.lhs_spec == a.out_spec == (0, x.ndim - 1, *range(1, x.ndim - 1)) for a in axes)


def convolutions(program):
    jaxpr = getattr(program, "jaxpr", program)
    for eqn in jaxpr.eqns:
        if eqn.primitive is jax.lax.conv_general_dilated_p:
            yield eqn
        for inner in sum(jaxprs.subprograms(eqn).values(), ()):
            yield from convolutions(inner)
