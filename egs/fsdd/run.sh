#!/usr/bin/env bash
# Runs the fsdd recipe; all options are passed on (--help lists them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python3
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m recipes fsdd "$@"
