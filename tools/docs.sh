#!/usr/bin/env bash
# Build the documentation site into site/. A broken link, or a reference page that is not what the code says
# now, ends it with an error; `tools/docs.sh --write` writes the reference pages anew first.
# Look at it: python -m http.server --directory site (a browser disables the search of pages that are files),
# or while writing: mkdocs serve -f tools/mkdocs.yml
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
case "${1:-}" in
  --write) python tools/make_reference.py ;;
  "") python tools/make_reference.py --check ;;
  *) echo "usage: tools/docs.sh [--write]" >&2; exit 2 ;;
esac
export NO_MKDOCS_2_WARNING=1
mkdocs build --strict --quiet --config-file tools/mkdocs.yml
echo "site/index.html"
