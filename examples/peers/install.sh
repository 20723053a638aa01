#!/usr/bin/env bash
# Installs moe-ref, the adapters, and every peer that can be had into an environment; says which cannot.
# usage: install.sh ENVIRONMENT
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$1/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$1" || exit 1
pip() { "$python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "$@"; }

pip torch && pip "$root[cli,conformance]" "$root/examples/peers" || { echo "moe-ref cannot be installed"; exit 1; }
peer() {
  name=$1
  shift
  log=$(pip "$@" 2>&1) && echo "$name: installed" || echo "$name: cannot be installed: $(echo "$log" | grep -m1 ERROR)"
}
peer transformers transformers
peer bitsandbytes bitsandbytes
peer PEFT peft accelerate
peer JAX jax
peer liger-kernel liger-kernel==0.8.5
# These two pin other versions of what all share (torch, fsspec), which the modules used here do not need.
pip --no-deps torchtitan==0.3.0 && peer torchtitan spmd_types==0.2.3 torchdata torch_checkpointing einops tyro
pip --no-deps kt-kernel==0.7.2 && peer kt-kernel gguf
