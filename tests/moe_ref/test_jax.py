"""The specification on JAX's arrays: what is static, what is refused, and what every expert gets under jit."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_api_compat import array_namespace

import moe_ref.jax
from moe_ref import ExpertLoRA, Grouping, MoEConfig, MoEGradients, MoEWeights, Routing, moe, moe_vjp, mxfp4, nf4, route
from moe_ref.activations import activation, activation_vjp, erf
from moe_ref.grouping import group
from moe_ref.layer import layer
from moe_ref.numerics import Nearest, Perturbed, round_to_nearest
from moe_ref.packed import decode
from moe_ref.saving import KINDS

E, K, H, I, T = 4, 2, 5, 6, 3  # noqa: E741


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def weights(**changes: object) -> MoEWeights:
    rng = np.random.default_rng(0)
    lora = ExpertLoRA(rng.standard_normal((E, 2, H)), rng.standard_normal((E, 2 * I, 2)), gate_up_scaling=0.5)
    stacks = rng.standard_normal((E, 2 * I, H)), rng.standard_normal((E, H, I)), rng.standard_normal((E, 2 * I))
    return replace(MoEWeights(*stacks, lora=lora, config=MoEConfig(K)), **changes)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((T, H)), rng.standard_normal((T, E))


def test_without_float64_every_call_is_refused_in_one_line() -> None:
    x, logits = (jnp.asarray(value, dtype=jnp.float32) for value in inputs())
    narrow = jax.tree.map(lambda value: jnp.asarray(value, dtype=jnp.float32), weights())
    line = r"^jax_enable_x64=False: must be True, since the specification computes in float64"  # and JAX's own note
    for call in (
        lambda: moe(x, logits, narrow),
        lambda: route(logits, narrow.config),
        lambda: jax.jit(moe)(x, logits, narrow),
    ):
        with pytest.raises(TypeError, match=line):
            call()


@pytest.mark.usefixtures("float64")
def test_every_dataclass_is_a_pytree_whose_leaves_are_arrays() -> None:
    assert {kind.__name__ for kind in moe_ref.jax.STATIC} | {"MoEConfig"} == KINDS.keys()
    x, logits = inputs()
    _, gradients = moe_vjp(x, logits, weights(), x)
    values = [weights(), gradients, route(logits, MoEConfig(K)), group(np.array([[0, 1]]), E)]
    values += [
        nf4.quantize(np.ones(70, np.float32), dtype="float32", nested=True),
        mxfp4.quantize(np.ones((2, 32), np.float32)),
    ]
    assert {type(v) for v in values} >= {MoEWeights, MoEGradients, Routing, Grouping}
    for value in values:
        leaves, tree = jax.tree.flatten(value)
        assert leaves
        assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
        assert repr(jax.tree.unflatten(tree, leaves)) == repr(value)
    assert jax.tree.leaves(MoEConfig(K)) == []


@pytest.mark.usefixtures("float64")
def test_a_configuration_is_static() -> None:
    """Two of them compile twice; the same one, made again, does not."""
    x, logits = inputs()
    traced = []

    @jax.jit
    def run(x: jax.Array, logits: jax.Array, weights: MoEWeights) -> jax.Array:
        traced.append(weights.config)
        return moe(x, logits, weights)

    for config in (MoEConfig(K), MoEConfig(K), MoEConfig(K, renormalize=True)):
        np.testing.assert_allclose(
            run(x, logits, weights(config=config)), moe(x, logits, weights(config=config)), 1e-12
        )
    assert traced == [MoEConfig(K), MoEConfig(K, renormalize=True)]


@pytest.mark.usefixtures("float64")
def test_weights_that_are_constants_may_stand_beside_traced_tokens() -> None:
    """Arrays that are traced have no device yet, and another class than others."""
    x, logits = inputs()
    own = jax.tree.map(jnp.asarray, weights())
    np.testing.assert_allclose(jax.jit(lambda *given: moe(*given, own))(x, logits), moe(x, logits, weights()), 1e-12)


def test_bad_input_is_refused_while_tracing() -> None:
    x, logits = inputs()
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"^x.shape=\(3, 4\): must be \(..., 5\), the last"):
        jax.jit(moe)(x[:, 1:], logits, weights())
    with jax.enable_x64(True), pytest.raises(TypeError, match=r"^x is a jax array: must be a numpy array, as gate_up"):
        moe(jnp.asarray(x), logits, weights())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_an_expert_without_rows_is_not_read(jit: bool) -> None:
    """D2, E3: also under jit, where it computes all rows, its NaN reaches nothing, and its gradients are 0."""
    x, logits = inputs()
    logits[:, 1] = -100.0
    stack = weights().gate_up_proj.copy()
    stack[1] = math.nan
    spoilt = jax.tree.map(jnp.asarray, weights(gate_up_proj=stack))
    expected = moe_vjp(x, logits, weights(), x)
    y, gradients = (jax.jit(moe_vjp) if jit else moe_vjp)(jnp.asarray(x), jnp.asarray(logits), spoilt, jnp.asarray(x))
    np.testing.assert_allclose(y, expected[0], 1e-12)
    np.testing.assert_allclose(gradients.x, expected[1].x, 1e-12)
    assert not np.asarray(gradients.gate_up_proj)[1].any()
    assert not np.asarray(gradients.down_proj)[1].any()


@pytest.mark.usefixtures("float64")
def test_empty_slots_and_no_tokens_under_jit() -> None:
    x, _ = inputs()
    ids, w = np.array([[0, -1], [E, 2], [-7, -7]]), np.array([[0.5, math.nan], [math.inf, 0.25], [1.0, 1.0]])
    y = jax.jit(layer)(x, ids, w, weights())
    np.testing.assert_allclose(y, layer(x, ids, w, weights()), 1e-12)
    assert not np.asarray(y)[2].any()
    assert jax.jit(layer)(x[:0], ids[:0], w[:0], weights()).shape == (0, H)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_four_bits_decode_to_the_same_bits(jit: bool) -> None:
    """Q2, Q3, M1."""
    values = np.random.default_rng(2).standard_normal((3, 4, 64)).astype(np.float32)
    tensors = [
        nf4.quantize(values, dtype="bfloat16", quant_type=q, nested=n) for q in ("nf4", "fp4") for n in (False, True)
    ]
    tensors += [mxfp4.quantize(values, dtype=d) for d in ("bfloat16", "float16")]
    for tensor in [*tensors, tensors[1].transpose(1, 2)]:
        own = jax.tree.map(jnp.asarray, tensor)
        decoded = (jax.jit(decode) if jit else decode)(own)
        assert isinstance(decoded, jax.Array)
        np.testing.assert_array_equal(np.asarray(decoded).view(np.uint32), decode(tensor).view(np.uint32))


@pytest.mark.usefixtures("float64")
def test_roundings_are_the_same() -> None:
    values = np.array([0.0, -0.0, 1 + 2.0**-8, 65520.0, 1e-7, math.nan, -math.inf])
    for dtype in ("float32", "bfloat16", "float16"):
        np.testing.assert_array_equal(round_to_nearest(jnp.asarray(values), dtype), round_to_nearest(values, dtype))
    x, logits = inputs()
    low = jax.jit(lambda *a: moe(*a, Nearest("bfloat16")))(x, logits, weights())
    np.testing.assert_allclose(low, moe(x, logits, weights(), Nearest("bfloat16")), 1e-2)
    assert np.abs(np.asarray(low) - moe(x, logits, weights())).max() > 1e-4


@pytest.mark.usefixtures("float64")
def test_where_derivatives_differ() -> None:
    """E1: at the limit itself, as docs/jax.md says."""
    config = MoEConfig(1, limit=2.0, alpha=1000.0)
    z, dh = jnp.asarray([[1.0, 2.0]]), jnp.ones((1, 1))  # u is at the limit
    assert activation_vjp(z, config, dh).tolist() == [[2.0, 1.0]]
    assert jax.vjp(lambda z: activation(z, config), z)[1](dh)[0].tolist() == [[2.0, 0.5]]


def test_the_pages_example_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "jax.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    try:
        exec(code, {})
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("float64")
def test_random_errors_need_values() -> None:
    x, logits = inputs()
    with pytest.raises(
        TypeError, match=r"^rounding=Perturbed\(.*: must be Exact or Nearest under jax.jit, where values"
    ):
        jax.jit(lambda *a: moe(*a, Perturbed("storage", 2)))(x, logits, weights())


@pytest.mark.usefixtures("float64")
def test_grouping_counts_in_64_bits_and_erf_is_that_of_the_library() -> None:
    """E5."""
    grouping = group(jnp.asarray([[2, 0], [2, -1]], dtype=jnp.int32), 3)
    assert grouping.group_offsets.tolist() == [0, 1, 1, 3]
    assert (grouping.group_offsets.dtype, grouping.order.dtype) == (jnp.int64, jnp.int64)
    curve = erf(jnp.linspace(-3.0, 3.0, 7))
    assert array_namespace(curve) is jnp
    np.testing.assert_allclose(curve, [math.erf(v) for v in range(-3, 4)], 1e-14)
