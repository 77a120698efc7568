#!/usr/bin/env bash
# The whole test suite, on CPU. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup report,dev
exec python -m pytest "$@"
