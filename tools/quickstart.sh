#!/usr/bin/env bash
# The whole way in a few minutes on two CPU cores: plan, pre-train, probe, export, load in timm.
# Arguments are overrides of recipes/quickstart.yaml, for instance budget_epochs=2.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
for argument in "$@"; do
  case $argument in output=*) run=${argument#output=} ;; esac
done
etpp plan recipes/quickstart.yaml output="$run" "$@"
etpp pretrain recipes/quickstart.yaml output="$run" "$@"
etpp probe "$run"
etpp export "$run" --to timm
python tools/quickstart_summary.py "$run"
