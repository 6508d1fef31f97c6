"""What a checkpoint holds, read from its config and the header of its weights. No tensor is loaded, no model built."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evenbits.checkpoints.files import CONFIG, WEIGHTS, check_config, check_files, read_config
from evenbits.checkpoints.native import VERSION
from evenbits.errors import CheckpointError
from evenbits.nn.base import WEIGHT_BUFFERS

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_ITEM_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def describe(path: str | Path) -> dict[str, Any]:
    """Layers with their formats, true bits and bytes as they lie on disk, regions, and totals, as plain data.

    The hashes of all files are checked first. Raises CheckpointError for anything that is not an intact checkpoint.
    """
    folder = Path(path)
    config = read_config(folder)
    check_config(folder, config, VERSION)
    check_files(folder, config)
    try:
        return _described(folder, config, _tensor_bytes(folder / WEIGHTS))
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"the tables of {folder / CONFIG} cannot be read: {error!r}.") from error


def _described(folder: Path, config: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    result = config.get("result") or {}
    solved = {row["name"]: row for row in result.get("layers", [])}
    layers = [_layer(name, entry, sizes, solved.get(name, {})) for name, entry in config["layers"].items()]
    floats = [row for row in result.get("layers", []) if row["status"] == "float"]
    weight_bytes = sum(layer["weight_bytes"] for layer in layers)
    return {
        "path": str(folder),
        "source": config["source"],
        "evenbits_version": config["evenbits_version"],
        "scheme": result.get("scheme"),
        "method": result.get("method"),
        "layers": layers,
        "float_layers": [{"name": row["name"], "shape": row["shape"], "reason": row["reason"]} for row in floats],
        "regions": result.get("regions", []),
        "weight_bytes": weight_bytes,
        "float_weight_bytes": sum(layer["float_weight_bytes"] for layer in layers),
        "other_bytes": sum(sizes.values()) - weight_bytes,
        "file_bytes": sum(entry["bytes"] for entry in config["files"].values()) + (folder / CONFIG).stat().st_size,
    }


def _layer(name: str, entry: dict[str, Any], sizes: dict[str, int], row: dict[str, Any]) -> dict[str, Any]:
    elements = prod(entry["shape"])
    nbytes = sizes[f"{name}.weight"] + sum(
        sizes.get(f"{name}.{part}", 0) for part in WEIGHT_BUFFERS if part != "weight"
    )
    activations = entry["input"] and f"{entry['input']} {'static' if entry['static'] else 'dynamic'}"
    return {
        "name": name,
        "kind": entry["kind"],
        "shape": entry["shape"],
        "format": entry["weight"],
        "input_format": activations or "float",
        "smoothing": "multiplied" if entry["multiplier"] else "indexed" if entry["permutation"] else "",
        "bits_per_weight": 8 * nbytes / elements,
        "weight_bytes": nbytes,
        "float_weight_bytes": 4 * elements,
        "sqnr_db": row.get("sqnr_db"),
        "output_sqnr_db": row.get("output_sqnr_db"),
        "pairs": row.get("pairs"),
    }


def _tensor_bytes(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: prod(s.get_shape()) * _ITEM_BYTES[s.get_dtype()] for name, s in slices.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
