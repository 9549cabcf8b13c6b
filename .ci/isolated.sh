#!/usr/bin/env bash
# The wheel and the sdist are built; each package installs from one, trains, draws and reaches ArviZ in environments
# without the other's framework: with the lowest versions that pyproject.toml allows, with those of constraints.txt,
# and with the newest there are. Python 3.11 has the lowest, 3.12 the pinned, the newest Python the newest.
#
# torch is the exception: pyro_bism has the pinned one throughout, on the Python of the tests, as any other may bring
# CUDA libraries of several GB. By hand, .ci/smoke_pyro.py passed with torch 2.12.0, the lowest, on Python 3.11, and
# with torch 2.15.0 on Python 3.13; with 2.11.0 it did not.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1                      # steps this small gain nothing from threads
export TORCHINDUCTOR_CACHE_DIR=$work/inductor # what jit=True compiles

check() { # check NAME COMMAND...: run it, note how it ended, go on
    local name=$1 verdict=ok
    shift
    "$@" || verdict=FAILED
    echo "$verdict: $name" | tee -a "$work/verdicts"
}

# The first of these Pythons 3.x that is here, or else the one of the tests. A command's being there is no proof that
# it runs (pyenv leaves stubs), so each candidate is tried.
python_of() {
    local minor candidate versions=/nowhere
    if command -v pyenv >/dev/null; then versions=$(pyenv root)/versions; fi
    for minor in "$@"; do
        for candidate in "python3.$minor" "$versions/3.$minor".*/bin/python3; do
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    echo "note: there is no Python 3.$1 here, nor what would do in its place" >&2
    echo "$python"
}

lowest() { # lowest EXTRA...: pyproject.toml's lower bounds, as constraints
    "$python" - "$@" <<'PYTHON'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + [each for extra in sys.argv[1:] for each in project["optional-dependencies"][extra]]
# a bound of an extra's own is the higher one
print(*map("==".join, dict(each.split(">=") for each in wanted).items()), sep="\n")
PYTHON
}

build() { # with what the tests' environment has for it
    make --silent .venv/.ready &&
        .venv/bin/python -m build --outdir "$work/dist" "$work/bism" >"$work/build.log" ||
        { cat "$work/build.log"; return 1; }
}

install() { # install ENVIRONMENT PYTHON WHAT CONSTRAINTS: what is there already moves to these versions
    "$2" -m venv "$1" && "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        --upgrade --upgrade-strategy eager --constraint "$4" "$3"
}

# -I: nothing of this folder, of PYTHONPATH or of the user's own packages is importable.
absent='import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)'

trial() { # trial BACKEND OTHER WHICH PYTHON FILE
    local version environment name="$1_bism, $3 versions"
    version=$("$4" -c 'import sys; print(*sys.version_info[:2], sep=".")')
    environment=$work/$1-$version
    echo "== $name, Python $version, without $2"
    check "$name: installs" install "$environment" "$4" "$5[$1,arviz]" "$work/$1-$3.txt"
    check "$name: $2 is absent" "$environment/bin/python" -I -c "$absent" "$2"
    check "$name: trains, draws and reaches ArviZ" "$environment/bin/python" -I ".ci/smoke_$1.py"
}

numpyro_trials() {
    lowest numpyro arviz >"$work/numpyro-lowest.txt"
    cp constraints.txt "$work/numpyro-pinned.txt"
    echo 'arviz>=1; python_version >= "3.12"' >"$work/numpyro-newest.txt" # and nothing else is held
    trial numpyro torch lowest "$(python_of 11)" "$wheel"
    trial numpyro torch pinned "$(python_of 12)" "$wheel"
    trial numpyro torch newest "$(python_of 14 13 12)" "$wheel"
}

pyro_trials() { # one environment for both: torch is most of it
    grep '^torch==' constraints.txt >"$work/pyro-newest.txt"
    { lowest pyro arviz | grep -v '^torch=='; cat "$work/pyro-newest.txt"; } >"$work/pyro-lowest.txt"
    trial pyro jax lowest "$python" "$sdist"
    trial pyro jax newest "$python" "$wheel"
}

# From a copy: building in place would leave build/ behind.
mkdir "$work/bism"
cp -r pyproject.toml README.md LICENSE pyro_bism numpyro_bism "$work/bism"
check "a wheel and an sdist are built" build
wheel=$(echo "$work"/dist/bism_ppl-*.whl)
sdist=$(echo "$work"/dist/bism_ppl-*.tar.gz)

numpyro_trials >"$work/numpyro.log" 2>&1 & # beside the other, as either is one thread's work
pyro_trials
wait $! || echo "FAILED: numpyro_trials broke off" >>"$work/verdicts"
cat "$work/numpyro.log"

echo "$(grep -c '^ok' "$work/verdicts") passed, $(grep -c '^FAILED' "$work/verdicts" || true) failed"
! grep '^FAILED' "$work/verdicts"
