"""The examples in a small setting, as their users run them: from a shell, in a directory of theirs."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"


def requires(backend):
    """Skips where the backend, or what the quickstart needs of it, is not there."""
    package = pytest.importorskip(f"{backend}_bism")
    for name in ("BiSM", "to_arviz"):
        if not hasattr(package, name):
            pytest.skip(f"{backend}_bism has no {name}")
    assert import_module(backend)


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_quickstart(backend, tmp_path):
    """SVI's loss and likelihood fall; BiSM's likelihood rises, or the script itself would end with an error."""
    requires(backend)
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    command = [sys.executable, str(QUICKSTART), "--smoke", "--backend", backend, "--output", "figures/smoke.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = re.findall(rf"^{backend} +(SVI|BiSM) +(\S+) +(\S+) +\S+$", done.stdout, re.MULTILINE)
    svi, bism = (float(log_likelihood) for _, _, log_likelihood in rows)
    assert [method for method, _, _ in rows] == ["SVI", "BiSM"]
    before = float(re.search(r"Before training: (\S+);", done.stdout)[1])
    assert svi < before < bism
    assert "k-hat of 5 images" in done.stdout
    assert (tmp_path / "figures" / "smoke.png").stat().st_size > 10_000


def test_quickstart_that_learns_nothing_is_an_error(tmp_path):
    """20 steps do not overtake a Gaussian: the script says so and fails."""
    requires("pyro")
    command = [sys.executable, str(QUICKSTART), "--backend", "pyro", "--steps", "20", "--hidden", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert re.search(r"pyro: BiSM ended at -\S+, not above -\S+\. More --steps\?", done.stderr)


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_diagnose(backend, tmp_path):
    """A verdict on every subject; the script itself compares the likelihood with enumeration."""
    requires(backend)
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / "diagnose.py"), "--smoke", "--backend", backend, "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for subject in ("guide", "posterior chains", "model chains", "normaliser", "log-likelihood", "fit"):
        assert re.search(rf"^{subject} +(ok|NOT OK|-) ", done.stdout, re.MULTILINE), done.stdout
    assert (tmp_path / "out" / f"diagnose-{backend}.png").stat().st_size > 10_000
    assert (tmp_path / "out" / f"diagnose-{backend}.nc").stat().st_size > 10_000


@pytest.mark.full
def test_hypergradients(tmp_path):
    """Two rows, from scratch; the second time they are there already."""
    requires("numpyro")
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / "hypergradients.py"), "--model", "checkerboard", "--steps", "40"]
    command += ["--gradients", "20", "--strategies", "Amortized()", "--output", "out"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^\| (relaxed|summed) \| Amortized\(\) \|(.*)\|$", done.stdout, re.MULTILINE)
        assert [latents for latents, _ in rows] == ["relaxed", "summed"]
        assert all(float(cell) == float(cell) for _, cells in rows for cell in cells.split("|"))
        assert "one step of Adam solves" in done.stdout
    assert (tmp_path / "out" / "hypergradients.png").stat().st_size > 10_000


@pytest.mark.full
def test_hypergradients_on_problems(tmp_path):
    """One problem; the second time it is there already, and other seeds want another place."""
    requires("numpyro")
    command = [sys.executable, str(EXAMPLES / "hypergradients.py"), "--model", "problems", "--steps", "40"]
    command += ["--problems", "checkerboard, relaxed", "--strategies", "None", "Exact()", "--output", "out", "--seeds"]
    tables = []
    for _ in range(2):
        done = subprocess.run([*command, "2"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
    cell = r"-?\d+\.\d+ ± \d+\.\d+, \S+ ms"
    assert re.search(rf"^\| checkerboard, relaxed \| Functional \| {cell} \| - \|$", tables[0], re.MULTILINE)
    assert tables[0] == tables[1]
    done = subprocess.run([*command, "1"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2 and "has the numbers of" in done.stderr


@pytest.mark.full
def test_hypergradient_errors(tmp_path):
    """Three runs and their rank correlation; the estimate is of the truth's size."""
    requires("numpyro")
    command = [sys.executable, str(EXAMPLES / "hypergradient_errors.py"), "--steps", "300", "--draws", "300"]
    command += ["--problems", "linear-Gaussian, denoising, deep guide", "--output", "out"]
    command += ["--strategies", "None", "Unrolled(5)", "Detached()"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| linear.* \| `(.*)` \| (\S+) \| (\S+) ± (\S+) \| .+ \|$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["None", "Unrolled(5)", "Detached()"]
    for _, *numbers in rows:
        true, estimate, noise = map(float, numbers)
        assert abs(estimate - true) < 4 * noise + 0.25 * true + 0.1
    assert "rank correlation over 3 of 3 runs" in done.stdout


@pytest.mark.full
def test_sparse_ising(tmp_path):
    """Every method finds couplings that are nearer to the truth than none at all; the second time they are there."""
    requires("numpyro")
    command = [sys.executable, str(EXAMPLES / "sparse_ising.py"), "--smoke", "--graphs", "glass"]
    tables = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        head, _, row, seconds = re.findall(r"^\|.*\|$", done.stdout, re.MULTILINE)
        names = [name.strip() for name in head.split("|")[3:-1]]
        errors = dict(zip(names, map(float, re.findall(r"(0\.\d{4}) ±", row)), strict=True))
        tables.append((errors, seconds))
    point = ["pseudo-likelihood", "pseudo-likelihood, L1", "PCD", "PCD, L1"]
    assert list(errors) == ["zero", *point, "PVI, Gaussian", "PVI, horseshoe"]
    assert all(error < errors["zero"] for name, error in errors.items() if name != "zero")
    assert tables[0] == tables[1]


@pytest.mark.full
def test_sparse_ising_of_a_table(tmp_path):
    """Of two columns that agree nine times in ten ArviZ's summary is sure; the others are fair coins."""
    requires("numpyro")
    for module in ("arviz", "matplotlib"):
        pytest.importorskip(module)
    x = np.random.default_rng(0).integers(2, size=(400, 5))
    x[40:, 3] = x[40:, 1]
    ages = np.arange(400) % 30  # no bits, so left out
    header = "group,a,c,b,d,age"
    np.savetxt(tmp_path / "bits.csv", np.column_stack([x, ages]), "%d", ",", header=header, comments="")
    command = [sys.executable, str(EXAMPLES / "sparse_ising.py"), "--smoke", "--data", "bits.csv", "--omit", "group"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "400 rows, 4 columns" in done.stdout
    found = re.findall(r"^J\[(\w+ - \w+)\] .* (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert found[0] == ("a - b", "1.000")
    assert len(found) == 6 and all(float(inclusion) < 0.9 for _, inclusion in found[1:])
    assert (tmp_path / "build" / "sparse_ising.png").stat().st_size > 10_000


@pytest.mark.full
def test_potts_contacts(tmp_path):
    """The four pairs of columns that the made-up alignment couples are the four strongest."""
    requires("numpyro")
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / "potts_contacts.py"), "--smoke", "--output", "contacts.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    pairs = re.search(r"strongest pairs: (.*)", done.stdout)[1].split(", ")
    assert set(pairs) == {"0-1", "2-3", "4-5", "6-7"}
    assert (tmp_path / "contacts.png").stat().st_size > 5_000


@pytest.mark.full
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_paper_checkerboard(backend, tmp_path):
    """A row a method; score matching of the marginal learns in 20 steps already."""
    requires(backend)
    pytest.importorskip("matplotlib")
    methods = ["DSM", "CD-5", "PCD-1", "NCE", "VNCE", "BiDSM, N = 5"]
    command = [sys.executable, str(EXAMPLES / "paper_checkerboard.py"), "--smoke", "--backend", backend]
    command += ["--output", "out/board", "--methods", *methods]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.*?) \| (-\d\.\d+) ± .*? \|  \| (-\d\.\d+) ± ", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == methods
    assert all(float(after) > float(before) for _, before, after in rows)
    assert (tmp_path / "out" / "board.png").stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_paper_freyface(backend, tmp_path):
    """Two runs on digits; the second time they are there already."""
    requires(backend)
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / "paper_freyface.py"), "--smoke", "--backend", backend]
    command += ["--output", "out/faces"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    for done in (first, again):
        assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (N = 1, K = 1|default, K = 1) \| (\S+) ± ", first.stdout, re.MULTILINE)
    assert len(rows) == 2 and all(float(value) < 0 for _, value in rows)
    assert re.findall(r"^\|.*$", again.stdout, re.MULTILINE) == re.findall(r"^\|.*$", first.stdout, re.MULTILINE)
