#!/usr/bin/env bash
# Lint, type-check and test, with everything this needs installed into .venv.
# ETPP_DATA, if set, points at a folder with cifar10/ and imagenette/ for the tests on real images.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
ruff check .
ruff format --check .
mypy etpp_ssl
lint-imports
# A process per core with one thread each: models this small gain nothing from a second thread.
export OMP_NUM_THREADS=1
python -m pytest --numprocesses logical --dist worksteal "$@"
