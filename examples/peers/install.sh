#!/usr/bin/env bash
# Installs moe-ref, the adapters, and every peer that can be had into an environment; says which cannot.
# usage: install.sh ENVIRONMENT
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$1/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$1" || exit 1
pip() { "$python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "$@"; }

pip torch && pip "$root[cli,conformance]" "$root/examples/peers" || { echo "moe-ref cannot be installed"; exit 1; }
"$python" -m moe_ref_peers.needs "$root/constraints.txt"
