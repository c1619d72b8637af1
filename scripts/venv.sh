# Sourced by the other scripts. Creates .venv in the repository (or $VENV) if there is none, and installs helix_jax[$1] into it
# unless that has been done. Sets $root to the repository and puts the environment first on the path.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

suitable_python() {
    local python
    for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "no Python 3.11 or later with venv was found: install one, or name it in PYTHON" >&2
    return 1
}

install() {
    local stamp=$venv/installed-$1 wanted
    wanted=$(cksum <"$root/pyproject.toml")
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    if [ ! -x "$venv/bin/python" ]; then
        local python
        python=$(suitable_python) || return
        echo "creating $venv with $("$python" --version)" >&2
        "$python" -m venv "$venv" || return
    fi
    echo "installing helix_jax[$1] into $venv, which takes a minute or two" >&2
    # Modules are compiled when they are first imported: most of what is installed never is.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$root[$1]" || return
    echo "$wanted" >"$stamp"
}

install "$1" || exit 2
export PATH=$venv/bin:$PATH
