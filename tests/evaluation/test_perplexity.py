"""Perplexity: treatment of documents, faults, and the numbers of a real model."""

from __future__ import annotations

import json
import math
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evenbits.data.text import Documents, read_text
from evenbits.errors import EvenbitsError
from evenbits.evaluation.perplexity import perplexity
from evenbits.evaluation.tasks import TASKS, evaluate, task_function

VOCABULARY = 128


class Toy(torch.nn.Module):
    """Logits that depend on the current token and on how many came before it in the block."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.kind, self.calls = kind, []
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        torch.nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor) -> Any:
        assert torch.is_inference_mode_enabled()
        self.calls.append(tuple(ids.shape))
        position = torch.arange(ids.shape[1], dtype=torch.float32)[:, None]
        logits = self.drop(self.table(ids) * (1 + position / 50))
        if self.kind == "object":
            return SimpleNamespace(logits=logits)
        return {"logits": logits} if self.kind == "mapping" else logits


def letters(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    assert not verbose
    return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def sequence(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def nats(model: Toy, ids: torch.Tensor) -> float:
    """Summed loss of one block, in the plain way."""
    with torch.inference_mode():
        logits = model.eval()(ids[None])[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))


def test_metrics_are_those_of_the_definition() -> None:
    model, documents = Toy(), [sequence(9), sequence(5, seed=1)]
    result = perplexity(model, documents, progress=False)
    loss = (nats(model, documents[0]) + nats(model, documents[1])) / 12
    assert result.metrics == pytest.approx(
        {"perplexity": math.exp(loss), "loss_per_token": loss, "bits_per_token": loss / math.log(2), "tokens": 12}
    )
    assert result.n == 2
    assert [item[1] for item in result.items] == [8, 4]
    assert result.interval is not None
    assert result.interval[0] <= result.metrics["perplexity"] <= result.interval[1]
    assert result.notes == ()


@pytest.mark.parametrize("kind", ["tensor", "object", "mapping"])
def test_every_kind_of_answer(kind: str) -> None:
    assert perplexity(Toy(kind), [sequence(7)], progress=False).metrics["tokens"] == 6


def test_texts_are_scored_with_special_tokens_one_at_a_time() -> None:
    model = Toy()
    result = perplexity(model, ["abc", "de"], tokenizer=letters, progress=False)
    assert model.calls == [(1, 4), (1, 3)]
    assert result.items[0] == (pytest.approx(nats(model, torch.tensor([1, *map(ord, "abc")]))), 3)


def test_several_documents_are_truncated() -> None:
    model = Toy()
    result = perplexity(model, [sequence(10), sequence(3)], context=4, progress=False)
    assert model.calls == [(1, 4), (1, 3)]
    assert "1 of 2 documents were truncated to the context of 4 tokens; 6 of 13 tokens" in result.notes[0]


def test_one_document_is_cut_in_blocks() -> None:
    model, ids = Toy(), sequence(10)
    result = perplexity(model, [ids], context=4, progress=False)
    assert model.calls == [(1, 4), (1, 4), (1, 2)]
    assert result.items[0] == (pytest.approx(sum(nats(model, part) for part in ids.split(4))), 7)
    assert "cut in blocks of 4 tokens without overlap" in result.notes[0]
    assert result.interval is None
    assert "no interval" in result.notes[1]


def test_truncate_can_be_said() -> None:
    assert perplexity(Toy(), [sequence(10)], context=4, truncate=True, progress=False).metrics["tokens"] == 3
    both = [sequence(10), sequence(3)]
    assert perplexity(Toy(), both, context=4, truncate=False, progress=False).metrics["tokens"] == 9


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("length", [4, 5, 8, 11])
def test_stride_predicts_every_token_once(stride: int, length: int) -> None:
    model = Toy()
    result = perplexity(model, [sequence(length)], context=4, stride=stride, progress=False)
    assert result.metrics["tokens"] == length - 1
    assert all(call[1] <= 4 for call in model.calls)


def test_stride_one_gives_every_token_the_longest_past() -> None:
    model, ids = Toy(), sequence(6)
    result = perplexity(model, [ids], context=3, stride=1, progress=False)
    expected = nats(model, ids[:3]) + sum(nats(model, ids[i : i + 3]) - nats_first(model, ids[i:]) for i in (1, 2, 3))
    assert result.items[0][0] == pytest.approx(expected, rel=1e-5)


def nats_first(model: Toy, ids: torch.Tensor) -> float:
    """Loss of the second token of a block alone."""
    return nats(model, ids[:2])


def test_context_comes_from_the_config_and_is_bounded_by_it() -> None:
    model = Toy()
    model.config = SimpleNamespace(max_position_embeddings=5)
    perplexity(model, [sequence(20), sequence(20)], progress=False)
    assert model.calls == [(1, 5), (1, 5)]
    with pytest.raises(EvenbitsError, match="context=6 is more than the model's 5 positions"):
        perplexity(model, [sequence(20)], context=6)


def test_files_and_documents(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("abc<|endoftext|>defg<|endoftext|>h")
    result = perplexity(Toy(), tmp_path / "a.txt", tokenizer=letters, progress=False)
    assert [item[1] for item in result.items] == [3, 4, 1]
    assert perplexity(Toy(), str(tmp_path / "a.txt"), tokenizer=letters, max_documents=2, progress=False).n == 2
    same = perplexity(Toy(), Documents(("abc", "defg", "h")), tokenizer=letters, progress=False)
    assert same.items == result.items


def test_documents_too_short_are_counted_in_the_notes() -> None:
    result = perplexity(Toy(), [sequence(4), sequence(1)], progress=False)
    assert result.n == 1
    assert "1 of 2 documents have fewer than 2 tokens" in result.notes[0]


def test_the_mode_of_every_submodule_comes_back() -> None:
    model = Toy()
    model.train()
    model.drop.eval()
    perplexity(model, [sequence(4)], progress=False)
    assert (model.training, model.table.training, model.drop.training) == (True, True, False)
    with pytest.raises(IndexError):
        perplexity(model, [torch.tensor([1, VOCABULARY])], progress=False)
    assert (model.training, model.drop.training) == (True, False)


def test_ids_of_another_tokenizer() -> None:
    model, message = Toy(), "document 2 of 2: token ids from 1 to 128 and a model of 128 tokens; give the tokenizer"
    model.config = SimpleNamespace(vocab_size=VOCABULARY)
    with pytest.raises(EvenbitsError, match=message):
        perplexity(model, [sequence(4), torch.tensor([1, VOCABULARY])], progress=False)
    with pytest.raises(EvenbitsError, match="token ids from 5 to 5 and a model of 3 tokens"):
        perplexity(Answers(torch.zeros(1, 2, 3)), [torch.tensor([5, 5])], progress=False)


class Fixed(torch.nn.Module):
    """Answers the same thing always, one value in each logit, but never before document 2."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full((1, ids.shape[1], VOCABULARY), self.value if self.calls > 1 else 0.0)


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "NaN|infinite")])
def test_broken_logits_name_the_document(value: float, kind: str) -> None:
    with pytest.raises(EvenbitsError, match=f"document 2 of 3: the model's logits are ({kind})"):
        perplexity(Fixed(value), [sequence(4)] * 3, progress=False)


def test_a_loss_too_large_for_exp_is_infinite_and_null_in_json() -> None:
    class Sure(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(1, ids.shape[1], VOCABULARY)
            logits[..., 0] = 5000.0
            return logits

    result = perplexity(Sure(), [torch.tensor([1, 2, 3])], progress=False)
    assert result.metrics["perplexity"] == math.inf
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["metrics"]["perplexity"] is None


class Answers(torch.nn.Module):
    """Answers what it was made with."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, ids: torch.Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((torch.zeros(1),), "the model answered a tuple"),
        ({"hidden": torch.zeros(1)}, "the model answered a dict"),
        (torch.zeros(1, 3, 5), r"4 tokens gave logits of shape \(1, 3, 5\)"),
        (torch.zeros(4, 5), r"logits of shape \(4, 5\)"),
    ],
)
def test_answers_that_are_no_logits(answer: Any, message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        perplexity(Answers(answer), [sequence(4)], progress=False)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (["abc"], {}, "give tokenizer="),
        ([], {}, "no documents"),
        ([[1, 2]], {}, "document 1 is a list; give texts, or tensors int64"),
        ([torch.ones(1, 3, dtype=torch.int64)], {}, r"Tensor torch.int64 \(1, 3\)"),
        ([torch.ones(3)], {}, "torch.float32"),
        ([torch.tensor([1])], {}, "nothing to predict"),
        ([sequence(4)], {"context": 1}, "context=1"),
        ([sequence(4)], {"context": 4, "stride": 5}, "stride=5"),
        ([sequence(4)], {"stride": 2, "truncate": True}, "give one of the two"),
        ([sequence(4)], {"max_documents": 0}, "max_documents=0"),
        ("no/such/file.txt", {}, "there is no file"),
    ],
)
def test_what_is_refused(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        perplexity(Toy(), data, progress=False, **options)


def test_evaluate_looks_tasks_and_options_up() -> None:
    direct = perplexity(Toy(), [sequence(9)], context=4, progress=False)
    assert evaluate(Toy(), task="perplexity", data=[sequence(9)], context=4, progress=False) == direct
    with pytest.raises(EvenbitsError, match=r"unknown evaluation task 'perplexty'\. Did you mean 'perplexity'"):
        evaluate(Toy(), task="perplexty", data=[])
    with pytest.raises(EvenbitsError, match="Did you mean 'context'"):
        evaluate(Toy(), task="perplexity", data=[], contxt=4)
    assert all(task_function(name).__name__ == name for name in TASKS)


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> tuple[Any, Any, pathlib.Path]:
    transformers = pytest.importorskip("transformers")
    folder: pathlib.Path = request.getfixturevalue("test_data")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "stories260k_llama", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "stories260k_llama")
    return model, tokenizer, folder / "caltext" / "tiny.utf8"


@pytest.mark.data
def test_stories_first_60000_characters(stories: tuple[Any, Any, pathlib.Path]) -> None:
    model, tokenizer, text = stories
    result = perplexity(model, read_text(text, max_characters=60_000), tokenizer=tokenizer, progress=False)
    assert result.metrics["loss_per_token"] == pytest.approx(1.3684, abs=1e-4)
    assert result.metrics["perplexity"] == pytest.approx(3.9290, abs=2e-4)


@pytest.mark.data
def test_all_317_stories(stories: tuple[Any, Any, pathlib.Path]) -> None:
    model, tokenizer, text = stories
    result = perplexity(model, text, tokenizer=tokenizer, progress=False)
    assert result.metrics["perplexity"] == pytest.approx(4.5070, abs=2e-4)
    assert (result.n, result.metrics["tokens"]) == (317, 127_847)
    assert "42 of 317 documents were truncated" in result.notes[0]
