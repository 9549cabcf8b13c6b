"""One floor plan, twice: the two packages have the same files, the same public names, the same settings."""

import ast
import dataclasses
import inspect
from pathlib import Path

import numpyro_bism
import pyro_bism

ROOT = Path(__file__).resolve().parents[1]
# NumPyro's face has states and run results, which Pyro keeps in the param store; see design.md section 2
NUMPYRO_ALONE = {"BiSMRunResult", "BiSMState", "RivalState"}
STATE = ("state", "rng_key")
# JAX compiles by itself; a Pyro program has to be asked to
PYRO_ALONE = "jit"


def test_same_files():
    ours, theirs = (
        {str(p.relative_to(ROOT / name)) for p in (ROOT / name).rglob("*.py")} for name in ("pyro_bism", "numpyro_bism")
    )
    assert ours == theirs


def test_same_public_names():
    assert set(numpyro_bism.__all__) - set(pyro_bism.__all__) == NUMPYRO_ALONE
    assert set(pyro_bism.__all__) <= set(numpyro_bism.__all__)
    assert pyro_bism.__version__ == numpyro_bism.__version__


def settings(thing):
    if dataclasses.is_dataclass(thing):
        return [(f.name, f.default) for f in dataclasses.fields(thing)]
    parameters = inspect.signature(thing).parameters.values()
    # a function of a trained model takes its state and a random key, which Pyro keeps by itself
    alone = (PYRO_ALONE, "state", "rng_key")
    return [(p.name, p.default, p.kind) for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in alone]


def test_same_settings():
    """Same names, same order, same defaults; a default that is a strategy is compared by its own settings."""
    for name in pyro_bism.__all__:
        ours, theirs = getattr(pyro_bism, name), getattr(numpyro_bism, name)
        if name in ("ConcreteBernoulli", "ConcreteOneHot"):  # as the host has it: checked below
            continue
        theirs = settings(theirs)
        if inspect.isfunction(ours):  # NumPyro's functions take the state and a key besides
            theirs = [setting for setting in theirs if setting[0] not in STATE]
        assert repr(settings(ours)) == repr(theirs), name


def test_concrete_distributions_take_the_same_arguments():
    for name in ("ConcreteBernoulli", "ConcreteOneHot"):
        ours, theirs = (list(inspect.signature(getattr(p, name)).parameters) for p in (pyro_bism, numpyro_bism))
        assert ours == theirs == ["temperature", "logits", "validate_args"]


def test_neither_imports_the_other():
    for package, foreign in (("pyro_bism", ("numpyro", "jax")), ("numpyro_bism", ("torch", "pyro"))):
        for path in (ROOT / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    assert words[1].split(".")[0].rstrip(",") not in (*foreign, *(f"{f}_bism" for f in foreign)), (
                        path,
                        line,
                    )


# what names no host in a file of which the rest does
TWINS = {
    "bism.py": "BiSM._strategy",
    "coupling.py": "_one_number _axis",
    "evaluation/annealing.py": "AIS.doubt",
    "hypergradients/functional.py": "Functional.__post_init__ Functional.check",
    "hypergradients/problem.py": "require_hypergradient",
    "hypergradients/surrogates.py": "Exact.check Covariance.__post_init__ Covariance.check",
    "hypergradients/unrolled.py": "Unrolled.__post_init__ Unrolled.differentiates_inner Unrolled.unrolls _reversal",
    "rows.py": "explain",
    "runaways.py": "Words",
    "shifts.py": "_require_kind _require_sites _require_same _Summed.__init__ _Shift.__init__ _shifting _arguments "
    "_refusal _shape _axis",
}


def _definitions(path):
    """The text of every function, class and method of a file, by its name."""
    text = path.read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(text, node)
            methods = [each for each in getattr(node, "body", ()) if isinstance(each, ast.FunctionDef)]
            found |= {f"{node.name}.{each.name}": ast.get_source_segment(text, each) for each in methods}
    return found


def test_what_is_numpy_alone_is_the_same_to_the_letter():
    """Neither package may import the other, so this stands twice; copied text must not drift."""
    names = ("psis_khat", "_has_tail", "_believed", "_arviz_khat", "_settings", "_fields")
    for name in names:
        ours, theirs = (inspect.getsource(getattr(p.diagnostics, name)) for p in (pyro_bism, numpyro_bism))
        assert ours == theirs, name
    for name in ("_stein_matrix", "_variances", "_squared_distances"):
        ours, theirs = (inspect.getsource(getattr(p.evaluation.fit, name)) for p in (pyro_bism, numpyro_bism))
        assert ours == theirs, name
    for name in ("place", "coordinates"):
        ours, theirs = (inspect.getsource(getattr(p.diagnostics._Layout, name)) for p in (pyro_bism, numpyro_bism))
        assert ours == theirs, name
    for file, names in TWINS.items():
        ours, theirs = (_definitions(ROOT / package / file) for package in ("pyro_bism", "numpyro_bism"))
        for name in names.split():
            assert ours[name] == theirs[name], (file, name)
    for file in (
        "brief.py",
        "energies/degrees.py",
        "energies/quadrature.py",
        "evaluation/comparison.py",
        "hypergradients/choice.py",
    ):
        ours, theirs = ((ROOT / name / file).read_text() for name in ("pyro_bism", "numpyro_bism"))
        assert ours == theirs, file
