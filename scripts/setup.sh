# Sourced by the other scripts: makes .venv with what they need and puts its python first. Usage: setup EXTRAS
# Set PYTHON to choose the interpreter; it must be 3.11 or newer.

setup() {
    local extras=$1 python stamp
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || return 1
        echo "making .venv with $($python --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 2
        fi
    fi
    stamp=".venv/installed-$extras"
    if [ ! "$stamp" -nt pyproject.toml ]; then
        echo "installing torch and the [$extras] extras; the first time this takes a minute or more"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --editable ".[$extras]" || {
            echo "error: pip could not install torch==2.13.0 and .[$extras]; its message is above" >&2
            return 2
        }
        touch "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    return 2
}
