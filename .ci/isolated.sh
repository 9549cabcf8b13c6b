#!/usr/bin/env bash
# The wheel and the sdist are built; each package installs from one, trains and reaches ArviZ in an environment without
# the other's framework.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1 # steps this small gain nothing from threads
passed=0
failed=0

check() { # check NAME COMMAND...: run it, count it, go on
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
        echo "ok: $name"
    else
        failed=$((failed + 1))
        echo "FAILED: $name"
    fi
}

# The newest Python from 3.12 on, as only there is ArviZ 1.x to be had. A command's being there is no
# proof that it runs (pyenv leaves stubs), so each candidate is tried.
newest_python() {
    local minor candidate versions=/nowhere
    if command -v pyenv >/dev/null; then versions=$(pyenv root)/versions; fi
    for minor in 14 13 12; do
        for candidate in "python3.$minor" "$versions/3.$minor".*/bin/python3; do
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    echo "note: no Python 3.12 or newer here; ArviZ 1.x stays untested" >&2
    echo "$python"
}

install() { # install ENVIRONMENT PYTHON EXTRAS FILE
    "$2" -m venv "$work/$1" &&
        "$work/$1/bin/python" -m pip install --quiet --constraint constraints.txt "$4[$3]"
}

build() { # with what the tests' environment has for it
    make --silent .venv/.ready &&
        .venv/bin/python -m build --outdir "$work/dist" "$work/bism" >"$work/build.log" ||
        { cat "$work/build.log"; return 1; }
}

# From a copy: building in place would leave build/ behind.
mkdir "$work/bism"
cp -r pyproject.toml README.md LICENSE pyro_bism numpyro_bism "$work/bism"
check "a wheel and an sdist are built" build
wheel=$(echo "$work"/dist/bism_ppl-*.whl)
sdist=$(echo "$work"/dist/bism_ppl-*.tar.gz)

# -I: nothing of this folder, of PYTHONPATH or of the user's own packages is importable.
absent='import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)'

echo "== numpyro_bism without torch"
check "numpyro_bism installs" install numpyro "$(newest_python)" numpyro,arviz "$wheel"
check "torch is absent" "$work/numpyro/bin/python" -I -c "$absent" torch
check "numpyro_bism trains and reaches ArviZ" "$work/numpyro/bin/python" -I .ci/smoke_numpyro.py

echo "== pyro_bism without jax"
check "pyro_bism installs" install pyro "$python" pyro,arviz "$sdist"
check "jax is absent" "$work/pyro/bin/python" -I -c "$absent" jax
check "pyro_bism trains and reaches ArviZ" "$work/pyro/bin/python" -I .ci/smoke_pyro.py

echo "$passed passed, $failed failed"
test "$failed" -eq 0
