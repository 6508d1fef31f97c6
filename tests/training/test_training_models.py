"""The models of the recipes: against folding by hand, against transformers, and cut anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evenbits.errors import EvenbitsError
from evenbits.training.bert import bert
from evenbits.training.chain import Chain, boundaries, stages
from evenbits.training.mobilenet import ConvNorm, load_folded, mobilenet


def folded_by_hand(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """W·γ/√(σ² + ε) and β − μ·γ/√(σ² + ε) of every convolution, in order of use."""
    made: dict[str, Tensor] = {}
    pairs = [m for part in parts.values() for m in part.modules() if isinstance(m, ConvNorm)]
    for i, (conv, norm, *_) in enumerate(pairs):
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        made[f"features.{i}.weight"] = (conv.weight * factor[:, None, None, None]).detach()
        made[f"features.{i}.bias"] = (norm.bias - norm.running_mean * factor).detach()
    return made


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], Path]:
    """A network with statistics of its own, and its folded weights."""
    torch.manual_seed(1)
    parts = mobilenet()
    for part in parts.values():
        for m in part.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.3, 1.0)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(folded_by_hand(parts), file)
    return parts, file


def features(parts: dict[str, nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.Sequential(*(p for n, p in parts.items() if n != "classifier")).eval()(x)


def test_the_batchnorm_that_is_put_back_keeps_the_function(known: tuple[dict[str, nn.Module], Path]) -> None:
    parts, file = known
    x, mine = torch.randn(4, 3, 33, 33), mobilenet()
    load_folded(mine, file, torch.randn(8, 3, 33, 33))
    expected = features(parts, x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(features(mine, x), expected, rtol=1e-3, atol=1e-4)


def test_in_training_mode_the_calibration_batch_gives_the_same_too(known: tuple[dict[str, nn.Module], Path]) -> None:
    """Their statistics are the batch's own; a wrong μ or γ would show."""
    _, file = known
    x, mine = torch.randn(8, 3, 32, 32), mobilenet()
    load_folded(mine, file, x)
    with torch.no_grad():
        expected = mine["stem"].eval()(x)
        torch.testing.assert_close(mine["stem"].train()(x), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(EvenbitsError, match=r"convolution 0 must be features\.0\.weight"):
        load_folded(mobilenet(), tmp_path / "w.safetensors", torch.zeros(1, 3, 32, 32))
    with pytest.raises(EvenbitsError, match="cannot be read"):
        load_folded(mobilenet(), tmp_path / "none.safetensors", torch.zeros(1, 3, 32, 32))


def test_stages_in_a_row_are_the_model_and_shapes_leave_batchnorm_alone() -> None:
    parts, x = mobilenet(), torch.randn(2, 3, 32, 32)
    chains = [Chain(part) for part in stages(parts, ["stem", "features"])]
    before = {k: v.clone() for k, v in chains[0].state_dict().items()}
    shapes = boundaries(chains, (x,))
    assert [s[0].shape for s in shapes] == [(2, 3, 32, 32), (2, 32, 16, 16), (2, 1280, 1, 1), (2, 10)]
    assert [s[0].requires_grad for s in shapes] == [False, True, True, True]
    assert chains[0].training and all(torch.equal(v, before[k]) for k, v in chains[0].state_dict().items())
    passed: Any = x
    for chain in chains:
        passed = chain.eval()(passed)
    assert torch.equal(passed, Chain(parts).eval()(x))


def test_cuts_that_are_none_are_refused() -> None:
    with pytest.raises(EvenbitsError, match="Did you mean 'block6'"):
        stages(mobilenet(), ["blok6"])
    with pytest.raises(EvenbitsError, match="in the order"):
        stages(mobilenet(), ["block6", "stem"])


def test_bert_is_transformers_bert(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    theirs = transformers.BertForSequenceClassification(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    parts = bert(tmp_path, 2)
    parts["classifier"].linear.load_state_dict(theirs.classifier.state_dict())  # type: ignore[union-attr, operator]
    ids, mask = torch.randint(50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    kinds = torch.zeros_like(ids)
    kinds[2, 3:] = 1
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=kinds).logits
        torch.testing.assert_close(Chain(parts).eval()(ids, mask * (1 + kinds)), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError, match="no configuration of a BERT"):
        bert(tmp_path, 2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(EvenbitsError, match="no configuration of a BERT"):
        bert(tmp_path, 2)
