"""What a checkpoint holds, read from its config and the header of its weights. No model is built, and no tensor loaded
but the bytes of pairs, which are checked one layer at a time."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evenbits.checkpoints.contents import check_pairs
from evenbits.checkpoints.files import CONFIG, WEIGHTS, check_config, check_files, read_config
from evenbits.checkpoints.native import VERSION
from evenbits.errors import CheckpointError, EvenbitsError
from evenbits.nn.base import WEIGHT_BUFFERS
from evenbits.numerics.elements import PairType, row_bytes
from evenbits.numerics.format import Format

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_ITEM_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def describe(path: str | Path) -> dict[str, Any]:
    """Layers with their formats, true bits and bytes as they lie on disk, regions, and totals, as plain data.

    The hashes of all files are checked first, then every byte of outlier-victim pairs. Raises CheckpointError for
    anything that is not an intact checkpoint.
    """
    folder = Path(path)
    config = read_config(folder)
    check_config(folder, config, VERSION)
    check_files(folder, config)
    try:
        found = _described(folder, config, _tensor_bytes(folder / WEIGHTS))
        _check_bytes(folder / WEIGHTS, config)
        return found
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ArithmeticError, EvenbitsError) as error:
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
        "note": Format.parse(entry["weight"]).padding(prod(entry["shape"][1:])),
    }


def _tensor_bytes(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: prod(s.get_shape()) * _ITEM_BYTES[s.get_dtype()] for name, s in slices.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _check_bytes(path: Path, config: dict[str, Any]) -> None:
    formats = {name: Format.parse(entry["weight"]) for name, entry in config["layers"].items()}
    pairs = {name: fmt for name, fmt in formats.items() if isinstance(fmt.dtype, PairType)}
    if not pairs:
        return
    with safe_open(path, framework="pt") as tensors:
        for name, fmt in pairs.items():
            packed, shape = tensors.get_tensor(f"{name}.weight"), config["layers"][name]["shape"]
            expected = [shape[0], row_bytes(fmt.dtype, prod(shape[1:]))]
            if list(packed.shape) != expected:
                raise CheckpointError(
                    f"layer {name!r} of the checkpoint ({fmt}) has bytes of shape {list(packed.shape)} instead of "
                    f"{expected}."
                )
            check_pairs(name, packed, fmt)
