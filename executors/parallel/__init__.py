"""Expert parallelism: the experts of a layer spread over the ranks of a process group (docs/parallel.md).

    local, _ = parallel.shard(weights, group)
    executor = parallel.ExpertParallel("auto", group)
    y = executor(x, router_logits, local)

`shard` gives each rank its experts, `gather` brings them together again, and `ExpertParallel` is an executor around any
other: it takes tokens to the ranks of their experts and the results back, forward and backward.
"""

from executors.parallel.executor import ExpertParallel
from executors.parallel.experts import ExpertMap, gather, shard
from executors.parallel.waiting import RankError

__all__ = ["ExpertMap", "ExpertParallel", "RankError", "gather", "shard"]
