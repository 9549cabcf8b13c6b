"""One floor plan, twice: the two packages have the same files, the same public names, the same settings."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import numpyro_bism
import pyro_bism

ROOT = Path(__file__).resolve().parents[1]
# NumPyro's face has states and run results, which Pyro keeps in the param store
NUMPYRO_ALONE = {"BiSMRunResult", "BiSMState", "RivalState"}
STATE = ("state", "rng_key")
# JAX compiles by itself; a Pyro program has to be asked to
PYRO_ALONE = "jit"


def files(package):
    return {str(p.relative_to(ROOT / package)) for p in (ROOT / package).rglob("*.py")}


# What torch lets capture and JAX compiles by itself; JAX's random keys, of which noise is drawn ahead
HOSTS_OWN = {
    "pyro_bism": {
        "programs/hosts.py",
        "optim/captured.py",
        *(f"compiled/{name}.py" for name in ("captured", "graph", "hosts", "inductor")),
    },
    "numpyro_bism": {f"compiled/{name}.py" for name in ("convolutions", "jaxprs", "noise", "xla")},
}


def test_same_files():
    ours, theirs = files("pyro_bism"), files("numpyro_bism")
    assert ours - theirs == HOSTS_OWN["pyro_bism"]
    assert theirs - ours == HOSTS_OWN["numpyro_bism"]


def test_a_file_opens_with_a_sentence_and_ends_on_a_page():
    for package in ("pyro_bism", "numpyro_bism"):
        for file in files(package):
            text = (ROOT / package / file).read_text()
            first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
            assert first.endswith((".", "?")) and len(first) > 20, (package, file)
            assert text.count("\n") <= MAX_LINES, (package, file)


MAX_LINES = 420


def imports(package):
    """Which files each file imports when it is imported itself."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        here = path.relative_to(ROOT / package).parent.parts
        read = found.setdefault(str(path.relative_to(ROOT / package)), set())
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = Path(*here[: len(here) - node.level + 1], *(node.module or "").split("."))
                for alias in node.names:
                    for each in (base / f"{alias.name}.py", base / alias.name / "__init__.py", f"{base}.py"):
                        if (ROOT / package / each).exists():
                            read.add(str(each))
                            break
                    else:
                        read.add(str(base / "__init__.py"))
    return found


def test_imports_point_down():
    """Folders, and files beside them, stand on one another without a circle."""
    for package in ("pyro_bism", "numpyro_bism"):
        below = {}
        for file, read in imports(package).items():
            if file != "__init__.py":
                room = Path(file).parts[0]
                below.setdefault(room, set()).update({Path(each).parts[0] for each in read} - {room})
        while below:
            free = {room for room, others in below.items() if not others & below.keys()}
            assert free, (package, below)
            below = {room: others for room, others in below.items() if room not in free}


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
    "divergences.py": {"FisherDivergence.check_guide": "NumPyro asks every inner loss for draws that have a gradient"},
    "energies/averages.py": {"averaging": "Pyro asks of a guide what kind it is"},
    "energies/proof.py": {"Proof": "ATen operations or a jaxpr"},
    "energies/rules.py": {"_selected": "ATen operations or a jaxpr"},
    "evaluation/arviz.py": {
        "_Layout": "numbers of a host",
        "_Layout.from_run": "numbers of a host",
        "read_samples": "the hosts' MCMC",
    },
    "evaluation/verdicts.py": {"guide_quality": "numbers of a host"},
    "hypergradients/shifts.py": {"_require_plain": ROWS},
    "programs/all_rows.py": {"_taking_all": ROWS, "_whole": ROWS, "drawn": ROWS, "with_all_rows": ROWS},
    "programs/analysis.py": {"_num_data": ROWS},
    "programs/coupling.py": {"_Start": STATELESS},
    "programs/pair.py": {"ModelAndGuide.programs": STATELESS},
    "programs/rows.py": {"Plate": ROWS, "plates": ROWS},
    "rivals/rival.py": {"Rival.target": STATELESS},
    "sampling/kernels.py": {"Kernel.init": "JAX's states are pytrees"},
    "training/trainer.py": {"Trainer.__init__": STATELESS},
}


# What is held equal whatever it comes to name: a host too, where both call something by one name.
TWINS = {
    "bism.py": "BiSM._strategy",
    "energies/energy.py": "_declared",
    "energies/integrals.py": "Integral.over_variables",
    "evaluation/annealing.py": "AIS.doubt",
    "evaluation/arviz.py": "_settings _fields _Layout.place _Layout.coordinates",
    "evaluation/fit.py": "_stein_matrix _variances _squared_distances",
    "evaluation/report.py": "Diagnosis",
    "evaluation/verdicts.py": "judge_mixing",
    "hypergradients/functional.py": "Functional.__post_init__ Functional.check",
    "hypergradients/problem.py": "require_hypergradient",
    "hypergradients/shifts.py": "_require_kind _require_sites _Summed.__init__ _Shift.__init__ _shifting "
    "_arguments _refusal _shape _axis",
    "hypergradients/surrogates.py": "Exact.check Covariance.__post_init__ Covariance.check",
    "hypergradients/unrolled.py": "Unrolled.__post_init__ Unrolled.differentiates_inner Unrolled.unrolls _reversal",
    "losses/outer.py": "require_outer_loss",
    "programs/coupling.py": "_one_number _axis",
    "programs/records.py": "SiteRecord.is_delta",
    "programs/rows.py": "explain",
    "sampling/mcmc.py": "RecordedHMC RecordedNUTS",
    "training/runaways.py": "Words in_words",
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
    for file in sorted(files("pyro_bism") & files("numpyro_bism")):
        ours, theirs = (_definitions(ROOT / package / file) for package in ("pyro_bism", "numpyro_bism"))
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
        "energies/cells.py",
        "energies/degrees.py",
        "energies/quadrature.py",
        "evaluation/comparison.py",
        "evaluation/psis.py",
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
            assert places or (package == "pyro_bism" and not cell.strip()), cell  # torch draws no noise ahead
            for file, name in places:
                assert name in _definitions(ROOT / package / file), (package, file, name)
