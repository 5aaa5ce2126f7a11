#!/usr/bin/env bash
# Makes a virtual environment with the pinned versions and this checkout, on a machine of a run.
#
#   launch/install.sh [tpu|cuda]       # default tpu; writes .venv beside launch/
#
# Settings, all from the environment:
#   VENV          where; default: .venv in the checkout.
#   UV_VERSION    default 0.13.9. TPU VM images bring Python 3.10; uv brings the one that is needed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kind=${1:-tpu}
venv=${VENV:-$root/.venv}
pins=$root/launch/requirements-$kind.txt
[[ -f $pins ]] || {
  echo "install.sh: no pinned versions for '$kind': say tpu or cuda" >&2
  exit 2
}

export PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || python3 -m pip install --quiet --user "uv==${UV_VERSION:-0.13.9}"
uv venv --quiet --allow-existing --python 3.11 "$venv"
uv pip install --quiet --python "$venv/bin/python" --requirement "$pins"
uv pip install --quiet --python "$venv/bin/python" --no-deps "$root"

if [[ $kind == tpu ]]; then
  # JAX asks for it on v5e and later: the TPU runtime then starts and stops faster.
  sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' ||
    echo "install.sh: transparent huge pages stay as they are" >&2
fi
"$venv/bin/p2r" --help >/dev/null
echo "installed in $venv"
