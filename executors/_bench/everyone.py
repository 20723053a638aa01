"""Everyone who takes part in a layer's benchmark."""

from __future__ import annotations

from executors._bench.contenders import Contender, our_contenders
from executors._bench.layers import BenchLayer
from executors._bench.peers.bitsandbytes import peers_in_4_bits
from executors._bench.peers.gnf4 import gnf4_peers
from executors._bench.peers.kt import kt_peers
from executors._bench.peers.liger import liger_peers
from executors._bench.peers.transformers import peers
from executors._bench.routing import Batch


def everyone_else(layer: BenchLayer, without: tuple[str, ...] = ()) -> list[Contender]:
    """The peers on this layer, but for those named ``without``."""
    if layer.weights().packed():
        found = peers_in_4_bits(layer) + gnf4_peers(layer)
    else:
        found = peers(layer) + liger_peers(layer) + kt_peers(layer)
    return [contender for contender in found if contender.name.partition("[")[0] not in without]


def contenders(layer: BenchLayer, given: Batch, names: list[str], without: tuple[str, ...] = ()) -> list[Contender]:
    """Everyone who takes part, usable or with the reason why not."""
    return our_contenders(layer, given, names) + everyone_else(layer, without)
