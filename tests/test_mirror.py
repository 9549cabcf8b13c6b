"""One floor plan, twice: the two packages have the same files, the same public names, the same settings."""

import ast
import dataclasses
import inspect
import re
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
        # as the host has it: the distributions are checked below, Bilevel is what a strategy is handed
        if name in ("ConcreteBernoulli", "ConcreteOneHot", "Bilevel"):
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


HOSTS = {"torch", "pyro", "jax", "numpyro", "optax", "funsor"}
# beside what a file imports of its host: words for one host's arrays, keys and ways
WORDS = re.compile(r"\b(torch|(num)?pyro|jax|Tensor|Array|tensors?|arrays?|rng_key|keys?|detach|no_grad)\b")
# Where twins differ though they name no host, and why. What is no longer different has no place here.
STATELESS = "parameters are arguments in NumPyro, tensors with a store in Pyro"
ROWS = "Pyro's plates tell what they take, NumPyro's record keeps it"
DIFFER = {
    "all_rows.py": {"_taking_all": ROWS, "_whole": ROWS, "drawn": ROWS, "with_all_rows": ROWS},
    "averages.py": {"averaging": "Pyro asks of a guide what kind it is"},
    "coupling.py": {"_Start": STATELESS},
    "densities.py": {"Pair.programs": STATELESS, "_num_data": ROWS},
    "diagnostics.py": {"_Layout": "numbers of a host", "_Layout.of": "numbers of a host", "_read": "the hosts' MCMC"},
    "divergences.py": {"FisherDivergence.check_guide": "NumPyro asks every inner loss for draws that have a gradient"},
    "energies/proof.py": {name: "ATen operations or a jaxpr" for name in ("Proof", "_selected")},
    "kernels.py": {"Kernel.init": "JAX's states are pytrees"},
    "reports.py": {"_guide": "numbers of a host"},
    "rivals/rival.py": {"Rival.target": STATELESS},
    "rows.py": {"Plate": ROWS, "plates": ROWS},
    "shifts.py": {"_require_plain": ROWS},
    "training.py": {"Trainer.__init__": STATELESS},
}


# What is held equal whatever it comes to name: a host too, where both call something by one name.
TWINS = {
    "bism.py": "BiSM._strategy",
    "coupling.py": "_one_number _axis",
    "densities.py": "Site.is_delta",
    "diagnostics.py": "psis_khat _has_tail _believed _arviz_khat _settings _fields _Layout.place _Layout.coordinates",
    "energies/energy.py": "_declared",
    "energies/integrals.py": "Integral.of",
    "evaluation/annealing.py": "AIS.doubt",
    "evaluation/fit.py": "_stein_matrix _variances _squared_distances",
    "hypergradients/functional.py": "Functional.__post_init__ Functional.check",
    "hypergradients/problem.py": "require_hypergradient",
    "hypergradients/surrogates.py": "Exact.check Covariance.__post_init__ Covariance.check",
    "hypergradients/unrolled.py": "Unrolled.__post_init__ Unrolled.differentiates_inner Unrolled.unrolls _reversal",
    "losses.py": "require_outer_loss",
    "reports.py": "Diagnosis _mixing",
    "rows.py": "explain",
    "runaways.py": "Words in_words",
    "sampling.py": "RecordedHMC RecordedNUTS",
    "shifts.py": "_require_kind _require_sites _require_same _Summed.__init__ _Shift.__init__ _shifting _arguments "
    "_refusal _shape _axis",
}


def _of_host(tree):
    """The names that a file imports of its host."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in HOSTS}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in HOSTS:
            found |= {a.asname or a.name for a in node.names}
    return found


def _definitions(path):
    """Every function, class and method of a file by its name: its text, and whether it names the host."""
    text = path.read_text()
    tree, found = ast.parse(text), {}
    hosts = _of_host(tree)

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min(each.lineno for each in (node, *node.decorator_list))
                own = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
                used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                found[prefix + node.name] = own, bool(used & hosts or WORDS.search(own))
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return found


def test_what_names_no_host_is_the_same_to_the_letter():
    """Neither package may import the other, so it stands twice; copied text must not drift."""
    held, drifted = 0, {}
    for path in sorted((ROOT / "pyro_bism").rglob("*.py")):
        file = str(path.relative_to(ROOT / "pyro_bism"))
        ours, theirs = _definitions(path), _definitions(ROOT / "numpyro_bism" / file)
        for name in ours.keys() & theirs.keys():
            (text, names_host), (other, names_other) = ours[name], theirs[name]
            held += text == other
            if text != other and not names_host and not names_other:
                drifted.setdefault(file, set()).add(name)
    listed = {file: set(names) for file, names in DIFFER.items()}
    assert drifted == listed
    assert held > 200


def test_what_is_the_same_stays_so():
    """:data:`TWINS`, and files of which all is."""
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


def test_every_step_of_the_algorithm_stands_where_the_page_says():
    page = (ROOT / "docs/algorithm.md").read_text()
    table = page[page.index("### Where each stands") :].split("\n## ")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 8
    for row in rows:
        for package, cell in zip(("pyro_bism", "numpyro_bism"), row, strict=True):
            places = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", cell)
            assert places, cell
            for file, name in places:
                assert name in _definitions(ROOT / package / file), (package, file, name)
