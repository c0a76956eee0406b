# Sourced by the other scripts: creates .venv at the first call and puts it first in PATH.
# PYTHON chooses the interpreter (3.11 or newer); an existing .venv is kept and brought up to date.
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
stamp=.venv/.installed-from
if ! cmp -s pyproject.toml "$stamp"; then
  echo "installing into .venv (once; torch is large)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
  cp pyproject.toml "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
