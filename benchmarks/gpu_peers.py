"""Compiles, on all cores, what liger-kernel chooses among by trial: python benchmarks/gpu_peers.py LAYER...

liger-kernel compiles some 240 variants for each H and I, one after the other, in the first call. That takes minutes,
which the benchmark has not. Here several processes compile a share each, into Triton's cache on disk. Which variants
they find fastest is forgotten: the benchmark's own process tries all of them again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

MOST = 12  # processes
EXPERTS = 16  # enough for K; the variants do not depend on E
SHARE = "--share"


def main(*arguments: str) -> int:
    """Starts the processes; exit status 1 if one failed."""
    from executors._bench.peers.liger import DISTRIBUTION, liger_version

    if liger_version() is None:
        print(f"{DISTRIBUTION} is not installed: nothing to compile")
        return 0
    of = max(1, min(MOST, (os.cpu_count() or 1) - 2))
    commands = [[sys.executable, __file__, SHARE, str(number), str(of), *arguments] for number in range(of)]
    running = [subprocess.Popen(command) for command in commands]
    failed = sum(process.wait() != 0 for process in running)
    print(f"{of} processes compiled a share each, {failed} failed")
    return int(failed > 0)


def compile_share(number: int, of: int, layers: tuple[str, ...]) -> None:
    """Has liger-kernel choose among a share of its variants only, in this process."""
    import triton

    triton.autotune = with_share(triton.autotune, number, of)
    from executors._bench.layers import random_layer, sized
    from executors._bench.peers.liger import liger_peers

    for name in layers:
        shape = replace(sized(name, 1, "cuda"), experts=EXPERTS)
        for peer in liger_peers(random_layer(shape, "cuda", 0, lambda *_: None)):
            if peer.prepare is None:
                print(f"{name}: {peer.reason}")
            else:
                peer.prepare()


def with_share(autotune: Any, number: int, of: int) -> Any:
    """``triton.autotune`` that keeps every ``of``-th configuration from ``number`` on, or else the first."""

    def share(configs: list[Any], *arguments: Any, **options: Any) -> Any:
        return autotune(configs[number::of] or configs[:1], *arguments, **options)

    return share


if __name__ == "__main__":
    if sys.argv[1:2] == [SHARE]:
        compile_share(int(sys.argv[2]), int(sys.argv[3]), tuple(sys.argv[4:]))
    else:
        sys.exit(main(*sys.argv[1:]))
