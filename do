#!/bin/sh
# From a fresh clone to a result: make an environment if none is active, install, run.
set -eu
cd "$(dirname "$0")"

fail() {
    echo "do: $*" >&2
    exit 1
}

case "${1-}" in
demo) what=base target=. ;;
test) what=dev target=".[dev]" ;;
faults) what=faults target=".[dev]" ;;
docs) what=docs target=".[docs]" ;;
build) what=build target="build twine" ;;
test-lowest) what=lowest target=".[dev]" ;;
*)
    echo "usage: ./do demo [options of lightning-mmd fit]    train on the bundled digits"
    echo "       ./do test [options of pytest]               run the tests"
    echo "       ./do faults [options of pytest]             kill, damage and deceive it: some minutes"
    echo "       ./do docs [options of mkdocs build]         build the documentation in site/"
    echo "       ./do build                                  wheel and sdist in dist/, checked"
    echo "       ./do test-lowest [options of pytest]        the tests with the lowest versions"
    if [ $# -eq 0 ]; then exit 0; else fail "unknown command '$1'"; fi
    ;;
esac
shift

env=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
[ "$what" = lowest ] && env= # never into an environment that is used otherwise
if [ -z "$env" ]; then
    env=$PWD/.venv
    [ "$what" = lowest ] && env=$PWD/.venv-lowest
    if ! "$env/bin/python" -m pip --version >/dev/null 2>&1; then
        command -v python3 >/dev/null || fail "python3 is missing: install Python 3.10 or newer."
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "Python 3.10 or newer is needed, python3 is $(python3 --version)."
        python3 -c 'import venv, ensurepip' 2>/dev/null ||
            fail "python3 cannot make environments: install its venv module" \
                "(Debian, Ubuntu: apt install python3-venv), or activate an environment."
        python3 -m venv --clear "$env"
    fi
fi
python=$env/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $env does not have it. Activate another environment."

# The stamp says what is installed: this checkout, this pyproject.toml, with or without the extras.
state="$PWD $(cksum <pyproject.toml)"
stamp=$env/.lightning-mmd
suite=$what
[ "$what" = faults ] && what=dev # the same environment
if [ "$(cat "$stamp-$what" 2>/dev/null)" != "$state" ]; then
    echo "do: installing into $env; PyTorch is large, the first time takes minutes" >&2
    export PIP_ROOT_USER_ACTION=ignore
    case $what in
    build) "$python" -m pip install --quiet $target ;;
    lowest) "$python" -m pip install --quiet --editable "$target" --constraint tests/lowest.txt ;;
    *) "$python" -m pip install --quiet --editable "$target" ;;
    esac
    rm -f "$stamp-base" "$stamp-dev"
    for done in base $what; do echo "$state" >"$stamp-$done"; done
fi

PATH=$env/bin:$PATH
case $suite in
base) exec "$env/bin/lightning-mmd" fit --config configs/digits.yaml "$@" ;;
docs) exec "$python" -m mkdocs build --strict "$@" ;;
build)
    rm -rf build dist
    "$python" -m build --outdir dist .
    exec "$python" -m twine check --strict dist/*
    ;;
faults)
    set -- tests/test_faults.py tests/test_safety.py tests/test_checkpoints.py \
        tests/test_interruption.py tests/test_divergence.py tests/test_wrong_uses.py "$@"
    exec "$python" -m pytest -n 2 "$@"
    ;;
dev | lowest)
    case " $* " in # two processes of tests at a time, unless told otherwise
    *" -n"*) ;;
    *) set -- -n 2 "$@" ;;
    esac
    exec "$python" -m pytest "$@"
    ;;
esac
