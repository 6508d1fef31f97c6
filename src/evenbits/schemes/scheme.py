"""A scheme says which number formats weights and activations get. Keys are those of compressed-tensors where it has
them.

    Scheme(weights="int8:row", input_activations="int8:row", dynamic=True, ignore=("lm_head",))

In a file (YAML or JSON) the same keys stand at the top level. An unknown key is an error that names the nearest one.
The scale convention (absmax/127, or absmax/127.5 as compressed-tensors uses) is part of the format: `int8:row:127.5`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.numerics.format import Format
from evenbits.schemes.presets import PRESETS


@dataclass(frozen=True)
class Scheme:
    """Formats of one quantization run.

    weights:           format of every quantized weight, viewed as (out, in) (convolutions: (out, in·kh·kw)).
    input_activations: format of every quantized layer's input, or None to leave activations in float.
    dynamic:           True: activation scales from each input; False: one calibrated scale per layer.
    ignore:            names of layers kept in float: whole names, last parts, or globs ("*.classifier").
    """

    weights: Format
    input_activations: Format | None = None
    dynamic: bool = True
    ignore: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Format.parse(self.weights))
        if self.input_activations is not None:
            object.__setattr__(self, "input_activations", Format.parse(self.input_activations))
        if not isinstance(self.ignore, (list, tuple)) or not all(isinstance(name, str) for name in self.ignore):
            raise EvenbitsError(f"scheme key 'ignore' must be a list of layer names; given {self.ignore!r}.")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if not isinstance(self.dynamic, bool):
            raise EvenbitsError(f"scheme key 'dynamic' must be true or false; given {self.dynamic!r}.")
        if (
            not self.dynamic
            and self.input_activations is not None
            and self.input_activations.granularity.kind != "tensor"
        ):
            raise EvenbitsError(
                f"static activations have one scale per tensor, such as 'int8:tensor'; given {self.input_activations}. "
                "Use dynamic: true for a scale per token."
            )

    def ignores(self, name: str) -> bool:
        """Whether the layer `name` is kept in float by `ignore`."""
        last = name.rpartition(".")[2]
        return any(pattern in (name, last) or fnmatchcase(name, pattern) for pattern in self.ignore)

    def to_json(self) -> dict[str, Any]:
        """The scheme as plain data; `resolve` reads it back."""
        activations = self.input_activations
        return {
            "weights": str(self.weights),
            "input_activations": None if activations is None else str(activations),
            "dynamic": self.dynamic,
            "ignore": list(self.ignore),
        }


def resolve(scheme: str | Path | Mapping[str, Any] | Scheme) -> Scheme:
    """A preset name, a YAML or JSON file, a mapping or a Scheme → Scheme. Raises EvenbitsError naming what is wrong."""
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, Mapping):
        return _from_mapping(scheme, "scheme")
    if isinstance(scheme, (str, Path)) and Path(scheme).suffix in (".yaml", ".yml", ".json"):
        return _from_mapping(_read(Path(scheme)), str(scheme))
    if not isinstance(scheme, str):
        raise EvenbitsError(f"a scheme is a preset name, a file, a mapping or a Scheme; given {type(scheme).__name__}.")
    name = scheme.upper().replace("-", "_")
    if name not in PRESETS:
        raise unknown_name("scheme", scheme, PRESETS)
    return _from_mapping(PRESETS[name], name)


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvenbitsError(f"the scheme file {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise EvenbitsError(f"the scheme file {path} must hold keys and values, such as 'weights: int8:row'.")
    return data


def _from_mapping(data: Mapping[str, Any], source: str) -> Scheme:
    allowed = [field.name for field in fields(Scheme)]
    for key in data:
        if key not in allowed:
            raise unknown_name(f"key in {source}:", str(key), allowed)
    if "weights" not in data:
        raise EvenbitsError(f"{source} has no key 'weights'; it names the weight format, such as 'int8:row'.")
    return Scheme(**data)
