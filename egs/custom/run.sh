#!/usr/bin/env bash
# Runs the custom recipe; all options are passed on (--help lists them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python3
if [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
elif ! python3 -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("lhotse")))'; then
  echo "error: python3 has no torch or no lhotse; run 'make setup' in $root, or activate an environment that has them" >&2
  exit 2
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m recipes custom "$@"
