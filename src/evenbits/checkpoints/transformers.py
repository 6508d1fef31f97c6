"""Hugging Face models: loading float ones, rebuilding the shell of a quantized one, writing config and tokenizer.

transformers is imported only when such a model is met (extra `hf`). Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.errors import CheckpointError, EvenbitsError, MissingExtraError


def library(purpose: str) -> Any:
    """The transformers package, or MissingExtraError."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtraError("transformers", "hf", purpose) from error


def load_pretrained(source: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A float model (evaluation mode, weights in `dtype`) and its tokenizer (None if there is none) from a folder or
    hub id.

    Raises EvenbitsError if it cannot be found, needs code of its own, or names a class that transformers lacks.
    """
    transformers = library(f"loading {source}")
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        cls = _model_class(transformers, getattr(config, "architectures", None))
        model, info = cls.from_pretrained(source, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except EvenbitsError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of many bases
        raise EvenbitsError(_cannot_load(source, error)) from error
    if missing := sorted(info["missing_keys"]):
        raise EvenbitsError(
            f"{source} lacks {len(missing)} tensors of a {cls.__name__}, such as {missing[0]!r}; they would be random."
        )
    return model.eval(), load_tokenizer(source)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub id; None if a local folder has none."""
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "vocab.json")
    if folder.is_dir() and not any((folder / name).exists() for name in names):
        return None
    try:
        return library("loading a tokenizer").AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except MissingExtraError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise EvenbitsError(f"the tokenizer of {source} cannot be loaded: {error}") from error


def _model_class(transformers: Any, architectures: Any) -> Any:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise EvenbitsError(
            f"the config names the model class {name!r}, which transformers {transformers.__version__} does not have. "
            "Models that bring their own code can be loaded through FILE.py:factory."
        )
    return cls


def _cannot_load(source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).exists():
        return f"the folder {source} cannot be loaded as a Hugging Face model: {first}"
    return (
        f"{source!r} is no folder here and could not be had from the hub: {first} Give a local folder "
        "or FILE.py:factory, or try `evenbits demo`, which needs neither network nor model."
    )


def source_of(model: nn.Module) -> dict[str, str]:
    """What evenbits.json says about where a model's code comes from."""
    kind = "transformers" if _is_pretrained(model) else "module"
    return {"kind": kind, "class": type(model).__name__}


def _is_pretrained(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model.config, "to_json_string") and hasattr(model, "save_pretrained")


def save_extras(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes config.json, generation_config.json and the tokenizer, where there are any."""
    if _is_pretrained(model):
        config: Any = model.config
        before = getattr(config, "architectures", None)
        config.architectures = [type(model).__name__]
        try:
            config.save_pretrained(folder)
        finally:
            config.architectures = before
        generation = getattr(model, "generation_config", None)
        if generation is not None and hasattr(model, "generate"):
            generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def skeleton(folder: Path, source: Any) -> nn.Module:
    """The model of a checkpoint with its parameters on the meta device (no memory), built from config.json."""
    if not isinstance(source, dict) or source.get("kind") != "transformers":
        name = source.get("class", "?") if isinstance(source, dict) else "?"
        raise CheckpointError(
            f"{folder} holds the weights of a {name}, which is not a Hugging Face model; pass the float model: "
            "evenbits.load(path, model=...) or --model FILE.py:factory."
        )
    transformers = library(f"loading {folder}")
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls = _model_class(transformers, named.get("architectures"))
        with _parameters_on_meta():
            model: nn.Module = cls(config)
        if hasattr(model, "generation_config") and (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a strange config makes a model class raise
        raise CheckpointError(f"the model of {folder} cannot be built from its config.json: {error}") from error
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside the block new modules get parameters without memory; buffers (such as rotary tables) stay real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
