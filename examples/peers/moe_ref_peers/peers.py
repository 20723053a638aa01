"""All peers, and what each needs. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Entry:
    """A peer.

    Attributes:
        name: the executor.
        distributions: that it needs, the peer's own first.
        environment: variables of the process in which it is judged.
    """

    name: str
    distributions: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def versions(self) -> dict[str, str]:
        """Of what is installed."""
        return {name: found for name in self.distributions if (found := installed(name))}

    def missing(self) -> str:
        """The first distribution that is not installed, or ""."""
        return next((name for name in self.distributions if not installed(name)), "")


INTERPRETED = (("TRITON_INTERPRET", "1"), ("LIGER_FUSED_MOE_AUTOTUNE", "0"))
COMPILES_SOONER = (("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"),)
PEERS = (
    *(
        Entry(f"transformers_{family}_{implementation}", ("transformers", "torch"))
        for family in ("qwen3", "gpt_oss", "nemotron_h")
        for implementation in ("eager", "grouped_mm", "batched_mm")
    ),
    Entry("bitsandbytes", ("bitsandbytes", "transformers", "torch")),
    Entry("torchtitan", ("torchtitan", "torch")),
    Entry("torchtitan_gpt_oss", ("torchtitan", "torch")),
    Entry("liger", ("liger-kernel", "triton", "torch"), INTERPRETED),
    Entry("kt_kernel", ("kt-kernel", "torch")),
    Entry("jax_ragged_dot", ("jax", "jaxlib", "torch"), COMPILES_SOONER),
)


def installed(distribution: str) -> str:
    """Its version, or ""."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
