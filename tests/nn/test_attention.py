"""Unfused attention against nn.MultiheadAttention, in float64 to 1e-12, over shapes, masks and options."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from evenbits.errors import EvenbitsError
from evenbits.nn.attention import UnfusedAttention, why_fused

MASKS = ["none", "bool", "float", "bool per head", "float per head", "causal", "causal hint"]


def fused(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(**{"embed_dim": 12, "num_heads": 3, **options}, dtype=torch.float64).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def attn_mask(kind: str, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    shape = (batch * heads, queries, keys) if "per head" in kind else (queries, keys)
    if "causal" in kind:
        return torch.ones(queries, keys, dtype=torch.bool).triu(1)
    if "float" in kind:
        return torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # a row without any key is not a number in one path and zero in another
    return mask


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "heads": draw(st.sampled_from([1, 2, 3])),
        "bias": draw(st.booleans()),
        "kdim": draw(st.sampled_from([None, 5])),
        "vdim": draw(st.sampled_from([None, 7])),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "batch": draw(st.sampled_from([0, 1, 3])),  # 0: unbatched
        "queries": draw(st.integers(1, 4)),
        "keys": draw(st.integers(1, 5)),
        "mask": draw(st.sampled_from(MASKS)),
        "padding": draw(st.sampled_from(["none", "bool", "float"])),
        "need_weights": draw(st.booleans()),
        "average": draw(st.booleans()),
        "self_attention": draw(st.booleans()),
    }


def given_to(case: dict[str, Any], module: nn.MultiheadAttention) -> tuple[list[torch.Tensor], dict[str, Any]]:
    batch, queries, keys = case["batch"], case["queries"], case["keys"]
    whole = case["self_attention"] and case["kdim"] is None and case["vdim"] is None
    keys = queries if whole else keys

    def tensor(length: int, width: int) -> torch.Tensor:
        if not batch:
            shape: tuple[int, ...] = (length, width)
        else:
            shape = (batch, length, width) if case["batch_first"] else (length, batch, width)
        return torch.randn(shape, dtype=torch.float64)

    query = tensor(queries, 12)
    inputs = [query] * 3 if whole else [query, tensor(keys, module.kdim), tensor(keys, module.vdim)]
    padding = None
    if case["padding"] != "none":
        padding = torch.rand(max(batch, 1), keys) < 0.3
        padding[:, 0] = False
        padding = padding if case["padding"] == "bool" else padding.double() * -3
        padding = padding if batch else padding[0]
    mask = attn_mask(case["mask"], max(batch, 1), module.num_heads, queries, keys)
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        mask = (
            torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -9.0) if mask.dtype == torch.bool else mask
        )
        padding = padding.double() * -9
    return inputs, {
        "key_padding_mask": padding,
        "attn_mask": mask,
        "need_weights": case["need_weights"],
        "average_attn_weights": case["average"],
        "is_causal": case["mask"] == "causal hint",
    }


@given(case=cases())
def test_it_computes_what_the_fused_one_does(case: dict[str, Any]) -> None:
    names = ("bias", "kdim", "vdim", "add_bias_kv", "add_zero_attn", "batch_first")
    module = fused(num_heads=case["heads"], **{name: case[name] for name in names})
    unfused = UnfusedAttention(module)
    inputs, options = given_to(case, module)
    expected, weights = module(*inputs, **options)
    out, found = unfused(*inputs, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    if weights is None:
        assert found is None
    else:
        torch.testing.assert_close(found, weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_training_gradients_are_the_same(need_weights: bool) -> None:
    module = fused(batch_first=True).train()
    unfused = UnfusedAttention(module)
    assert unfused.training and all(layer.training for layer in unfused.children())
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    module(x, x, x, need_weights=need_weights)[0].square().sum().backward()
    unfused(x, x, x, need_weights=need_weights)[0].square().sum().backward()
    whole = torch.cat([unfused.q_proj.weight.grad, unfused.k_proj.weight.grad, unfused.v_proj.weight.grad])
    torch.testing.assert_close(whole, module.in_proj_weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unfused.out_proj.bias.grad, module.out_proj.bias.grad, rtol=1e-12, atol=1e-12)


def test_dropout_is_kept_and_off_in_evaluation() -> None:
    unfused = UnfusedAttention(fused(dropout=0.5).train())
    x = torch.randn(4, 2, 12, dtype=torch.float64)
    for need in (True, False):
        unfused.train()
        assert not torch.equal(unfused(x, x, x, need_weights=need)[0], unfused(x, x, x, need_weights=need)[0])
        unfused.eval()
        assert torch.equal(unfused(x, x, x, need_weights=need)[0], unfused(x, x, x, need_weights=need)[0])


def test_its_layers_are_plain_and_share_the_fused_memory() -> None:
    module = fused()
    module.in_proj_weight.requires_grad_(False)
    unfused = UnfusedAttention(module)
    layers = dict(unfused.named_children())
    assert list(layers) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert all(type(layer) is nn.Linear for layer in layers.values())
    assert not unfused.k_proj.weight.requires_grad and unfused.k_proj.bias.requires_grad
    unfused.k_proj.weight.data.fill_(3.0)
    assert bool((module.in_proj_weight[12:24] == 3).all()) and not bool((module.in_proj_weight[:12] == 3).any())


def test_it_is_copied_and_pickled() -> None:
    unfused = UnfusedAttention(fused())
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    for copied in (copy.deepcopy(unfused), pickle.loads(pickle.dumps(unfused))):
        assert torch.equal(copied(x, x, x)[0], unfused(x, x, x)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_in_an_encoder_the_fused_paths_switch_themselves_off(norm_first: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
            expected = encoder(x, src_key_padding_mask=padding)
        for block in encoder.layers:
            block.self_attn = UnfusedAttention(block.self_attn)
        seen: list[str] = []
        encoder.layers[1].linear2.forward = lambda y: (
            seen.append("called")
            or nn.functional.linear(  # no hook: hooks
                y,
                encoder.layers[1].linear2.weight,
                encoder.layers[1].linear2.bias,  # would switch the fused path off, too
            )
        )
        found = encoder(x, src_key_padding_mask=padding)
    kept = ~padding if padding is not None else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-12, atol=1e-12)
    assert seen == ["called"]


def test_who_reads_the_weight_that_is_gone_is_told() -> None:
    unfused = UnfusedAttention(fused())
    x = torch.randn(3, 12, dtype=torch.float64)
    with pytest.raises(EvenbitsError, match="split into q_proj"):
        nn.functional.linear(x, unfused.in_proj_weight)
    with pytest.raises(AttributeError, match="split into q_proj"):
        _ = unfused.in_proj_weight.data
    assert unfused.in_proj_bias is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_it_cannot_take_is_an_error() -> None:
    unfused = UnfusedAttention(fused(batch_first=True))
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    with pytest.raises(EvenbitsError, match="attn_mask"):
        unfused(x, x, x, is_causal=True)
    with pytest.raises(EvenbitsError, match="booleans or floats"):
        unfused(x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(EvenbitsError, match="nested"):
        nested = torch._nested_tensor_from_mask(x.float(), torch.ones(2, 3, dtype=torch.bool))
        unfused(nested, nested, nested)


def test_what_is_not_quite_one_stays_fused() -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Same(nn.MultiheadAttention):
        pass

    assert "forward of its own" in why_fused(Other(12, 3))
    assert why_fused(Same(12, 3)) == why_fused(fused(kdim=4, add_bias_kv=True, bias=False)) == ""
    extra = fused()
    extra.register_buffer("scale", torch.ones(1))
    assert "'scale'" in why_fused(extra)
    normed = fused()
    nn.utils.parametrizations.weight_norm(normed.out_proj)
    assert "out_proj carries" in why_fused(normed)
    assert isinstance(normed.out_proj, NonDynamicallyQuantizableLinear)
