"""A scheme says which number formats weights and activations get. Keys are those of compressed-tensors where it has
them.

    Scheme(weights="int8:row", input_activations="int8:row", dynamic=True, ignore=("lm_head",))

In a file (YAML or JSON) the same keys stand at the top level. An unknown key is an error that names the nearest one.
The scale convention (absmax/127, or absmax/127.5 as compressed-tensors uses) is part of the format: `int8:row:127.5`.

Layers that need other formats have them under `overrides`; the first pattern that matches a layer decides, and keys it
leaves out are the scheme's:

    weights: int4:g64:mse
    overrides:
      "encoder.layer.0.*": {weights: "ovp4:g32"}
      classifier: {weights: "int8:row", input_activations: null}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.numerics.format import Format
from evenbits.schemes.presets import PRESETS


@dataclass(frozen=True)
class LayerFormats:
    """Formats of one layer; the fields are those of Scheme. Raises EvenbitsError for values that do not fit."""

    weights: Format
    input_activations: Format | None = None
    dynamic: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Format.parse(self.weights))
        if self.input_activations is not None:
            object.__setattr__(self, "input_activations", Format.parse(self.input_activations))
        if not isinstance(self.dynamic, bool):
            raise EvenbitsError(f"scheme key 'dynamic' must be true or false; given {self.dynamic!r}.")
        if self.static and self.input_activations and self.input_activations.granularity.kind != "tensor":
            raise EvenbitsError(
                f"static activations have one scale per tensor, such as 'int8:tensor'; given {self.input_activations}. "
                "Use dynamic: true for a scale per token."
            )

    @property
    def static(self) -> bool:
        """Whether the layer's input needs a calibrated scale."""
        return self.input_activations is not None and not self.dynamic

    def to_json(self) -> dict[str, Any]:
        """The formats as plain data."""
        activations = self.input_activations
        return {
            "weights": str(self.weights),
            "input_activations": None if activations is None else str(activations),
            "dynamic": self.dynamic,
        }


@dataclass(frozen=True)
class Scheme:
    """Formats of one quantization run.

    weights:           format of every quantized weight, viewed as (out, in) (convolutions: (out, in·kh·kw)).
    input_activations: format of every quantized layer's input, or None to leave activations in float.
    dynamic:           True: activation scales from each input; False: one calibrated scale per layer.
    ignore:            names of layers kept in float: whole names, last parts, or globs ("*.classifier").
    tied:              True: a layer whose weight is an embedding's too (mostly the output head) is quantized like any
                       other, from a copy of its own; the embedding keeps the float weight. False: it stays float.
    overrides:         pattern (matched as in `ignore`) → mapping of the keys above, for layers that differ. Kept as
                       pairs of pattern and LayerFormats, in order: the first that matches a layer is its own.
    """

    weights: Format
    input_activations: Format | None = None
    dynamic: bool = True
    ignore: tuple[str, ...] = ("lm_head",)
    tied: bool = False
    overrides: tuple[tuple[str, LayerFormats], ...] = ()

    def __post_init__(self) -> None:
        formats = LayerFormats(self.weights, self.input_activations, self.dynamic)
        object.__setattr__(self, "weights", formats.weights)
        object.__setattr__(self, "input_activations", formats.input_activations)
        if not isinstance(self.ignore, (list, tuple)) or not all(isinstance(name, str) for name in self.ignore):
            raise EvenbitsError(f"scheme key 'ignore' must be a list of layer names; given {self.ignore!r}.")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if not isinstance(self.tied, bool):
            raise EvenbitsError(f"scheme key 'tied' must be true or false; given {self.tied!r}.")
        object.__setattr__(self, "overrides", _overrides(self.overrides, formats))

    def with_head(self) -> Scheme:
        """The same scheme, the output head quantized too: `lm_head` is not ignored, nor are layers tied to an
        embedding."""
        return replace(self, ignore=tuple(name for name in self.ignore if name != "lm_head"), tied=True)

    def ignores(self, name: str) -> bool:
        """Whether the layer `name` is kept in float by `ignore`."""
        return any(_matches(pattern, name) for pattern in self.ignore)

    def of(self, name: str) -> LayerFormats:
        """The formats of the layer `name`: those of the first override that matches it, else the scheme's own."""
        pattern = self.override_of(name)
        return self.formats[0] if pattern is None else dict(self.overrides)[pattern]

    def override_of(self, name: str) -> str | None:
        """The pattern of the override that decides for the layer `name`, or None."""
        return next((pattern for pattern, _ in self.overrides if _matches(pattern, name)), None)

    @property
    def formats(self) -> tuple[LayerFormats, ...]:
        """The scheme's own formats, then those of its overrides."""
        own = LayerFormats(self.weights, self.input_activations, self.dynamic)
        return (own, *(formats for _, formats in self.overrides))

    def to_json(self) -> dict[str, Any]:
        """The scheme as plain data; `resolve` reads it back."""
        return {
            **self.formats[0].to_json(),
            "ignore": list(self.ignore),
            "tied": self.tied,
            "overrides": {pattern: formats.to_json() for pattern, formats in self.overrides},
        }

    def to_yaml(self) -> str:
        """The text of a scheme file; `resolve` reads it back."""
        import yaml

        text: str = yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True, width=120)
        return text


def _matches(pattern: str, name: str) -> bool:
    return pattern in (name, name.rpartition(".")[2]) or fnmatchcase(name, pattern)


def _overrides(given: Any, base: LayerFormats) -> tuple[tuple[str, LayerFormats], ...]:
    """A mapping, or pairs as a Scheme keeps them → pairs; keys left out are the base's."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    is_pairs = isinstance(pairs, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    if not is_pairs or not all(isinstance(pattern, str) for pattern, _ in pairs):
        raise EvenbitsError(f"scheme key 'overrides' must map layer names to formats; given {given!r}.")
    if len({pattern for pattern, _ in pairs}) < len(pairs):
        raise EvenbitsError("scheme key 'overrides' names a pattern twice.")
    return tuple((pattern, _override(pattern, value, base)) for pattern, value in pairs)


def _override(pattern: str, value: Any, base: LayerFormats) -> LayerFormats:
    if isinstance(value, LayerFormats):
        return value
    if not isinstance(value, Mapping) or not value:
        raise EvenbitsError(f"the override {pattern!r} must hold keys such as 'weights: ovp4:g32'; given {value!r}.")
    allowed = [field.name for field in fields(LayerFormats)]
    for key in value:
        if key not in allowed:
            raise unknown_name(f"key in the override {pattern!r}:", str(key), allowed)
    try:
        return replace(base, **value)
    except EvenbitsError as error:
        raise EvenbitsError(f"the override {pattern!r}: {error}") from error


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
