"""Compilation is most of these tests' time: XLA optimises less, steps stay in loops, nothing is compiled twice."""

import atexit
import os
import shutil
import tempfile

# read when JAX is imported; subprocesses inherit it
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of a parallel run, and subprocesses, inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bism-jax-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


import pytest

# Dear in NumPyro, by compilation, and proved in kind by a twin that runs every time: the other package's, a smaller
# one, or the same with another loss. `pytest -m full` runs them.
TWINS = """
test_coupled_rows.py::test_evaluation_takes_all_rows_given_in_order[numpyro-25]
test_guides.py::test_a_guide_for_latents_of_every_kind[numpyro-flow]
test_guides.py::test_a_latent_computed_from_other_draws_is_scored_at_fixed_h[numpyro-ScoreMatching]
test_guides.py::test_a_positive_latent_is_fitted[numpyro]
test_guides.py::test_a_state_goes_on_with_a_new_guide[numpyro]
test_guides.py::test_bits_of_a_gaussian_rbm_are_fitted_exactly[numpyro]
test_guides.py::test_the_covariance_is_learnt_in_numpyro[0.1]
test_guides.py::test_whether_a_guide_has_parameters_a_datapoint[numpyro]
test_hypergradients.py::test_bias_shrinks_as_the_inner_fit_goes_on[numpyro-implicit]
test_hypergradients.py::test_estimates_are_unbiased_at_the_posterior[numpyro-drawn]
test_hypergradients.py::test_penaltys_error_falls_as_one_over_its_strength[numpyro-linear-gaussian]
test_hypergradients.py::test_penaltys_strength_may_follow_a_schedule[numpyro]
test_hypergradients.py::test_recomputing_gives_the_same_gradient[numpyro-momentum-3]
test_numpyro_bism.py::test_a_diverging_inner_loop_ends_in_an_error_that_names_the_cure[strategy1]
test_numpyro_bism.py::test_a_strategys_state_is_part_of_the_state[strategy1]
test_numpyro_bism.py::test_summed_out_score_is_the_marginal_score[ScoreMatching-loss]
test_numpyro_jit.py::test_steps_drawn_ahead_are_those_taken_one_by_one[Detached()]
test_numpyro_models.py::test_a_gamma_with_fixed_concentration_is_welcome
test_numpyro_models.py::test_every_way_to_write_the_parameters_trains_alike[equinox]
test_numpyro_models.py::test_module_state_moves_once_an_update_as_under_svi[equinox-guide]
test_numpyro_models.py::test_module_state_moves_once_an_update_as_under_svi[flax-guide]
test_numpyro_models.py::test_module_state_moves_once_an_update_as_under_svi[flax-model]
test_numpyro_models.py::test_module_state_moves_once_an_update_as_under_svi[nnx-guide]
test_parity.py::test_same_noise_same_trajectory[gaussian-exact-elbo-strategy0]
test_numpyro_bism.py::test_other_sizes_are_described_without_a_second_analysis[programs2]
test_numpyro_hypergradients.py::test_hypergradient_is_the_derivative_of_the_whole_map[clipped-adam-10]
test_numpyro_hypergradients.py::test_hypergradient_is_the_derivative_of_the_whole_map[optax-clipped-scheduled-10]
test_numpyro_hypergradients.py::test_hypergradient_is_the_derivative_of_the_whole_map[rmsprop-10]
test_numpyro_models.py::test_module_state_moves_once_an_update_as_under_svi[nnx-model]
test_parity.py::test_same_noise_same_trajectory[gaussian-sliced-elbo-strategy1]
test_plates.py::test_rows_of_one_density[numpyro-Gaussian machine-True-sizes3]
test_reports.py::test_a_bad_model_is_told_what_is_bad[numpyro]
test_rivals.py::test_log_likelihood_and_loo_where_theta_has_draws[numpyro]
test_rivals.py::test_pseudo_likelihood_recovers_the_truth[numpyro]
test_rivals.py::test_the_truth_is_recovered[numpyro-score matching]
test_rivals.py::test_vnce_fits_its_guide_by_the_loss_it_is_given[numpyro]
test_rivals.py::test_vnce_is_nce_where_the_guide_is_the_posterior[numpyro]
test_rows.py::test_all_rows_in_another_order[numpyro]
test_rows.py::test_evaluation_is_of_the_rows_handed_over[numpyro]
test_rows.py::test_rows_of_an_inner_plate[numpyro]
test_rows.py::test_rows_that_are_an_argument_may_differ_at_every_step[numpyro-batch]
test_rows.py::test_the_rows_are_those_handed_to_the_plate[numpyro-both-argument]
test_runaways.py::test_the_same_of_update_and_stable_update_where_they_are_not_compiled
test_sampling.py::test_chains_go_on_at_their_own_rows[numpyro]
test_values.py::test_a_numpyro_state_continues_in_a_fresh_bism
test_values.py::test_summed_out_configurations_are_weighed_by_q_under_scales_and_masks[rows of a subsampling plate-numpyro]
test_words.py::test_strict_modes_of_jax[numpy_rank_promotion]
"""  # noqa: E501


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """:data:`TWINS` are marked before the selection by marks; one that is no longer there is an error."""
    names = {f"{item.path.name}::{item.nodeid.partition('::')[2]}": item for item in items}
    twins = set(TWINS.split("\n")) - {""}
    for name in twins & names.keys():
        names[name].add_marker(pytest.mark.full)
    files = {item.path.name for item in items}
    lost = [name for name in twins - names.keys() if name.partition("::")[0] in files]
    if lost and not any("::" in arg for arg in config.args):  # of a file some tests are asked for by name
        raise pytest.UsageError(f"TWINS in conftest.py names tests that are not there: {sorted(lost)}")


@pytest.fixture(autouse=True)
def steps_in_loops(monkeypatch):
    """Inner steps are not fused; ``test_fused_steps_are_the_same_steps`` undoes it to compare."""
    monkeypatch.setattr("numpyro_bism.compiled.steps.FUSED_STEPS", 1)


@pytest.fixture
def replayed(monkeypatch):
    """The captured graphs, run without a compiler: what is recorded is tested so, in a tenth of the time."""
    import torch

    from pyro_bism.compiled import graph

    monkeypatch.setattr(
        graph, "compile_recording", lambda recorded, inputs: torch.no_grad()(lambda values: recorded(*values))
    )


@pytest.fixture
def torch_double():
    """A fresh param store and seed, in float64."""
    import pyro
    import torch

    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
