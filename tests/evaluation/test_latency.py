"""Latency: turns, clocks, threads restored, and a cache that does not grow while it is timed."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.evaluation.latency import Latency, forward, is_causal, latencies, machine, one_token, threads_of


def test_the_longer_call_takes_longer_and_figures_are_in_order() -> None:
    x = torch.randn(64, 64)
    calls = {"one": lambda: x @ x, "many": lambda: [x @ x for _ in range(40)]}
    found = latencies(calls, threads=1, seconds=0.3)
    assert found["many"].median > 5 * found["one"].median
    for one in found.values():
        assert one.least <= one.low <= one.median <= one.high and one.clock == "CPU" and one.samples >= 5


def test_two_threads_are_told_by_the_least_wall_time() -> None:
    before = torch.get_num_threads()
    found = latencies({"sleep": lambda: time.sleep(0.002)}, threads=2, seconds=0.1)["sleep"]
    assert found.clock == "wall" and found.typical == found.least >= 0.002 and found.threads == 2
    assert torch.get_num_threads() == before
    assert Latency(2.0, 1.0, 3.0, 0.5, 9, "CPU", 1).typical == 2.0


def test_threads_are_restored_on_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), threads_of(before + 1):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
    with pytest.raises(EvenbitsError, match="at least one"), threads_of(0):
        pass


def test_a_batch_is_passed_as_calibration_passes_it() -> None:
    seen: list[Any] = []

    def model(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))

    for batch in (1, (2, 3), {"x": 4}):
        forward(model, batch)()
    assert seen == [((1,), {}), ((2, 3), {}), ((), {"x": 4})]


def test_a_token_is_always_the_one_after_the_prompt() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    assert is_causal(model) and not is_causal(torch.nn.Linear(1, 1))
    ids = torch.randint(50, (2, 7))
    with torch.inference_mode():
        call = one_token(model, ids)
        first, second = call().logits, call().logits
        whole = model(input_ids=torch.cat([ids, ids[:, -1:]], dim=1)).logits[:, -1:]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)


def test_a_cache_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="cannot be cut back"):
        one_token(lambda **_: SimpleNamespace(past_key_values=()), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("word", ["cache", "past_key_values"])
def test_the_cache_is_handed_on_under_the_models_own_word(word: str) -> None:
    kept, seen = SimpleNamespace(crop=lambda count: seen.append(count)), []

    class Model(torch.nn.Module):
        if word == "cache":

            def forward(self, input_ids: Any, cache: Any = None, use_cache: bool = True) -> Any:
                seen.append(cache)
                return SimpleNamespace(cache=kept)
        else:

            def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
                seen.append(past_key_values)
                return SimpleNamespace(past_key_values=kept)

    one_token(Model(), torch.zeros(1, 2, dtype=torch.long))()
    assert seen == [None, kept, -1]


def test_the_machine_is_named() -> None:
    found = machine()
    assert found["cores"] >= 1 and found["torch"] == str(torch.__version__) and found["processor"]
