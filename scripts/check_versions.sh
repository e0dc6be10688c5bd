#!/usr/bin/env bash
# Test with the oldest and the newest versions that pyproject.toml allows of flwr, transformers and peft.
#
#   scripts/check_versions.sh [oldest|newest ...]      # a fresh virtual environment each; downloads, takes many minutes
#   TESTS="tests/test_canaries.py" scripts/check_versions.sh oldest
set -euo pipefail
cd "$(dirname "$0")/.."

# The first version of each range, as pip takes it.
oldest=$(python3 - <<'PYTHON'
import re, tomllib
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if match := re.match(r"(flwr|transformers|peft)(?:\[.*\])?>=([\d.]+)", line):
        print(match[1] + "==" + match[2])
PYTHON
)
[ "$(wc -w <<< "$oldest")" = 3 ] || { echo "expected a range with >= of flwr, transformers and peft in pyproject.toml" >&2; exit 2; }

[ $# -gt 0 ] || set -- oldest newest
for each; do
  venv=$(mktemp -d)
  trap 'rm -rf "$venv"' EXIT
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet 'torch==2.13.0'   # first, and by version: the CPU build where the machine offers one
  pins=()
  [ "$each" = oldest ] && read -r -a pins <<< "$(tr '\n' ' ' <<< "$oldest")"
  "$venv/bin/pip" install --quiet "${pins[@]}" -e '.[dev]'
  "$venv/bin/pip" list 2>/dev/null | grep -E '^(flwr|transformers|peft|torch) '
  PATH="$venv/bin:$PATH" "$venv/bin/python" -m pytest -q -n 2 ${TESTS:-}
  rm -rf "$venv"
done
