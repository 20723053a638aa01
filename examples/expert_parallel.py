"""Spreads the experts of one layer over ranks, trains it for some steps, and prints what went where.

    torchrun --nproc-per-node 2 examples/expert_parallel.py

On CPUs the ranks talk by gloo, on GPUs by NCCL. Every rank has its own tokens; the first rank also computes the whole
layer by itself and prints how far the two are apart.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor

import executors
from executors import parallel
from moe_ref import MoEConfig, MoEWeights

CONFIG = MoEConfig(top_k=2, scoring="sigmoid", renormalize=True)


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8, metavar="E", help="experts of all ranks (default: 8)")
    parser.add_argument("--hidden", type=int, default=64, metavar="H", help="width of a token (default: 64)")
    parser.add_argument("--tokens", type=int, default=256, metavar="T", help="tokens of each rank (default: 256)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of training (default: 20)")
    parser.add_argument("--dispatch", choices=["all_to_all", "all_reduce"], default="all_to_all")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("must be started by torchrun, such as: torchrun --nproc-per-node 2 examples/expert_parallel.py")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        run(given, device)
    finally:
        dist.destroy_process_group()


def run(given: argparse.Namespace, device: torch.device) -> None:
    """Trains the layer to be a random linear map."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, router, goal = made(given, device)
    local, experts = parallel.shard(whole)
    local = local.map(lambda value: value.clone().requires_grad_())
    router.requires_grad_()
    executor = parallel.ExpertParallel("auto", dispatch=given.dispatch)
    say(f"rank {rank} has experts {list(experts.experts(rank))} of {given.experts}")

    seed = 1 if given.dispatch == "all_reduce" else 1 + rank  # all ranks have the same tokens, or each its own
    x = torch.randn(given.tokens, given.hidden, generator=torch.Generator().manual_seed(seed)).to(device)
    ids = executor.route(x @ router, whole).topk_ids
    there = torch.bincount(torch.bucketize(ids.flatten(), torch.tensor(experts.offsets[1:], device=device), right=True))
    say(f"rank {rank} sends slots to ranks: {there.tolist()}")

    optimizer = torch.optim.Adam([router, *local.parameters().values()], lr=1e-2)
    for step in range(given.steps):
        y = executor(x, x @ router, local)
        loss = (y - x @ goal).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if given.dispatch == "all_to_all":  # what every rank has: its gradient is the sum of all shares
            dist.all_reduce(router.grad)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0 and step in (0, given.steps - 1):
            print(f"step {step}: loss {total.item() / ranks:.4f}", flush=True)

    trained = parallel.gather(local, num_experts=given.experts)
    y = executor(x, x @ router, local).detach()
    alone = executors.get("native")(x, x @ router, trained).detach()
    say(f"rank {rank}: largest difference to one device {(y - alone).abs().max():.1e}")


def made(given: argparse.Namespace, device: torch.device) -> tuple[MoEWeights, Tensor, Tensor]:
    """The layer, a router and a goal, the same on every rank."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) / shape[-1] ** 0.5).to(device)

    experts, hidden = given.experts, given.hidden
    weights = MoEWeights(drawn(experts, 4 * hidden, hidden), drawn(experts, hidden, 2 * hidden), config=CONFIG)
    return weights, drawn(hidden, experts), drawn(hidden, hidden)


def say(line: str) -> None:
    """Prints a line of each rank, in their order."""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            print(line, flush=True)
        dist.barrier()


if __name__ == "__main__":
    main()
