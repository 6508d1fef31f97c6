"""Unfused experts against the fused modules of transformers and hand-made ones: equal, and refused where not alike."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from evenbits.errors import EvenbitsError
from evenbits.nn.experts import UnfusedExperts, looks_fused, why_not

E, H, I = 4, 8, 6


class Hand(nn.Module):
    """Fused experts of no library: its own order of arguments, one bias, an activation between."""

    def __init__(self, *, turned: bool, wide: int = 2) -> None:
        super().__init__()
        first, second = (E, wide * I, H), (E, H, I)
        swap = lambda size: (size[0], size[2], size[1]) if turned else size  # noqa: E731
        self.up, self.down = nn.Parameter(torch.randn(swap(first))), nn.Parameter(torch.randn(swap(second)))
        self.down_bias = nn.Parameter(torch.randn(E, H))
        self.act_fn, self.turned, self.wide = nn.GELU(), turned, wide

    def forward(self, states: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        up, down = (w if self.turned else w.transpose(1, 2) for w in (self.up, self.down))
        y = torch.einsum("th,ehf->tef", states, up)
        if self.wide == 2:
            gate, value = y.chunk(2, dim=-1)
            y = self.act_fn(gate) * value
        else:
            y = self.act_fn(y)
        y = torch.einsum("tei,eih->teh", y, down) + self.down_bias
        one_hot = nn.functional.one_hot(experts, E).to(weights.dtype) * weights.unsqueeze(-1)
        return torch.einsum("teh,te->th", y, one_hot.sum(1))


def config(cls: Any, **options: Any) -> Any:
    made = cls(**options)
    made._experts_implementation = "eager"
    return made


MADE: dict[str, tuple[Any, bool]] = {
    "mixtral": (
        lambda: MixtralExperts(config(hf.MixtralConfig, hidden_size=H, intermediate_size=I, num_local_experts=E)),
        False,
    ),
    "qwen3": (
        lambda: Qwen3MoeExperts(config(hf.Qwen3MoeConfig, hidden_size=H, moe_intermediate_size=I, num_experts=E)),
        False,
    ),
    "gpt-oss": (
        lambda: GptOssExperts(config(hf.GptOssConfig, hidden_size=H, intermediate_size=I, num_local_experts=E)),
        True,
    ),
    "aria": (
        lambda: AriaExperts(
            config(
                hf.AriaTextConfig,
                hidden_size=H,
                intermediate_size=I,
                moe_num_experts=E,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ),
        True,
    ),
    "nemotron without a gate": (
        lambda: NemotronHExperts(
            config(hf.NemotronHConfig, hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, moe_latent_size=None)
        ),
        False,
    ),
    "hand": (lambda: Hand(turned=False), False),
    "hand, turned": (lambda: Hand(turned=True), True),
    "hand without a gate": (lambda: Hand(turned=False, wide=1), False),
}


def made(name: str) -> nn.Module:
    module: nn.Module = MADE[name][0]().double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def inputs(tokens: int = 7, experts: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    allowed = torch.tensor(experts or list(range(E)))
    index = torch.stack([allowed[torch.randperm(len(allowed))[:2]] for _ in range(tokens)])
    return torch.randn(tokens, H, dtype=torch.float64), index, torch.rand(tokens, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", MADE)
def test_it_computes_what_the_fused_module_does(name: str) -> None:
    module = made(name)
    unfused = UnfusedExperts(module, turned=MADE[name][1])
    for given in (inputs(), inputs(1), inputs(5, experts=[1, 2])):
        given = (given[0], given[2], given[1]) if name.startswith("hand") else given
        with torch.no_grad():
            torch.testing.assert_close(unfused(*given), module(*given), rtol=1e-12, atol=1e-12)
    assert looks_fused(module)


@pytest.mark.parametrize("name", [name for name in MADE if "without a gate" not in name])
def test_with_a_gate_the_shapes_say_how_matrices_are_stored(name: str) -> None:
    module, turned = made(name), not MADE[name][1]
    assert why_not(module, turned=turned)
    with pytest.raises(EvenbitsError, match="can be taken apart"):
        UnfusedExperts(module, turned=turned)


def test_every_expert_is_called_on_every_forward() -> None:
    unfused = UnfusedExperts(made("mixtral"))
    rows: dict[str, int] = {}
    for name, layer in unfused.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, a, y, name=name: rows.__setitem__(name, len(y)))
    with torch.no_grad():
        unfused(*inputs(5, experts=[1, 2]))
    assert rows == {f"{e}.{part}": 5 * (e in (1, 2)) for e in range(E) for part in ("gate_up_proj", "down_proj")}


def test_its_layers_are_plain_and_share_the_fused_memory() -> None:
    for name in ("gpt-oss", "mixtral"):
        module = made(name).train()
        unfused = UnfusedExperts(module, turned=MADE[name][1])
        layer = unfused.get_submodule("2.down_proj")
        assert type(layer) is nn.Linear and layer.training and (layer.in_features, layer.out_features) == (I, H)
        layer.weight.data.fill_(3.0)
        assert bool((module.down_proj[2] == 3).all()) and not bool((module.down_proj[1] == 3).any())
        parameters = sum(p.numel() for p in unfused.parameters())
        assert parameters == sum(p.numel() for p in module.parameters())


def test_arguments_go_by_the_originals_names() -> None:
    module = made("gpt-oss")
    unfused = UnfusedExperts(module, turned=True)
    x, index, weights = inputs()
    expected = module(x, router_indices=index, routing_weights=weights)
    torch.testing.assert_close(unfused(x, router_indices=index, routing_weights=weights), expected)
    for wrong in (
        lambda: unfused(x, index),
        lambda: unfused(x, top_k_index=index, top_k_weights=weights),
        lambda: unfused(x, index, weights, x),
    ):
        with pytest.raises(EvenbitsError, match="hidden_states, router_indices, routing_weights"):
            wrong()


def test_it_is_copied_and_pickled_and_trained() -> None:
    unfused = UnfusedExperts(made("gpt-oss"), turned=True)
    given = inputs()
    for copied in (copy.deepcopy(unfused), pickle.loads(pickle.dumps(unfused))):
        assert torch.equal(copied(*given), unfused(*given))
    unfused(*given).sum().backward()
    assert unfused.get_submodule("0.gate_up_proj").weight.grad is not None


def test_indices_beyond_the_last_expert_are_nobodys() -> None:
    module = made("mixtral")
    x, index, weights = inputs()
    index[2] = E
    torch.testing.assert_close(UnfusedExperts(module)(x, index, weights), module(x, index, weights), rtol=1e-12, atol=0)


def test_what_is_built_otherwise_says_why() -> None:
    extra = made("mixtral")
    extra.scales = nn.Parameter(torch.ones(E, 3))
    third = made("mixtral")
    third.more = nn.Parameter(torch.ones(E, 3, 3))
    buffered = made("mixtral")
    buffered.register_buffer("table", torch.ones(3))
    shaped = made("mixtral")
    shaped.down_proj = nn.Parameter(torch.ones(E, H + 1, I))

    class One(Hand):
        def forward(self, states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return states

    bare = Hand(turned=False)
    bare.act_fn = None
    for module, reason in (
        (extra, "'scales'"),
        (third, "3 parameters of three dimensions"),
        (buffered, "'table'"),
        (shaped, "are not the two layers of 4 experts"),
        (One(turned=False), "does not take hidden states"),
        (bare, "neither act_fn nor _apply_gate"),
    ):
        assert reason in why_not(module, turned=False)
    assert not looks_fused(nn.MultiheadAttention(8, 2, add_bias_kv=True)) and not looks_fused(nn.Linear(3, 3))
