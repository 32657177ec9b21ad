"""Deltas in files: our own, and those of LT-SFT and of PEFT's SHiRA."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch

from ..ops.sparse_delta import SparseDelta, SparseLayout
from ..ops.sparse_delta.layout import INDEX_TENSORS

#: A mark in a file's metadata, so that no other file is mistaken for one of these.
FORMAT = "peft_kernels.SparseDeltas"
LT_SFT_FILE = "pytorch_diff.bin"
SHIRA_FILE = "adapter_model.safetensors"
SHIRA_PREFIX = "base_model.model."


def save(deltas: Mapping[str, SparseDelta], path: str | PathLike) -> None:
    """One safetensors file: values and positions of every delta, as compact as they are."""
    from safetensors.torch import save_file

    tensors, facts = {}, {}
    for name, delta in deltas.items():
        layout = delta.layout
        facts[name] = {"kind": layout.kind, "shape": layout.shape, "tile": layout.tile}
        held = {"values": delta.values.detach(), **layout.tensors}
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in held.items()}
    save_file(tensors, path, {"format": FORMAT, "deltas": json.dumps(facts)})


def load(path: str | PathLike, device: torch.device | str = "cpu") -> dict[str, SparseDelta]:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file is another one, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"expected sparse deltas in {path}, got a file without the mark of them")
            found = {}
            for name, facts in json.loads(metadata["deltas"]).items():
                tensors = [file.get_tensor(f"{name}.{key}") for key in INDEX_TENSORS[facts["kind"]]]
                layout = SparseLayout.of_tensors(facts["kind"], tuple(facts["shape"]), tensors, tuple(facts["tile"]))
                layout.check_range()
                found[name] = SparseDelta(layout, file.get_tensor(f"{name}.values"))
            return found
    except (SafetensorError, KeyError, TypeError, RuntimeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"expected sparse deltas in {path}, got a damaged file ({_line(error)})") from error


def export_lt_sft(deltas: Mapping[str, SparseDelta], folder: str | PathLike) -> None:
    """`pytorch_diff.bin` as composable-sft's `SFT` reads it (Ansell et al., 2022): a difference for each
    "<name>.weight", positions as steps through the weight column by column.

    Raises:
        ValueError: a weight has more entries than that reader's 32 bits can count; nothing is written then.
    """
    diffs = {}
    for name, delta in deltas.items():
        N, K = delta.layout.shape
        if N * K >= 1 << 31:
            raise ValueError(f"expected weights of less than 2³¹ entries, got {[N, K]} for {name!r}")
        flat = delta.layout.indices()
        flat, order = (flat // max(1, K) + flat % max(1, K) * N).cpu().sort()
        diffs[f"{name}.weight"] = {
            "size": torch.Size((N, K)),
            "index_steps": flat.diff(prepend=flat.new_zeros(1)).tolist(),
            "values": delta.values.detach().cpu()[order],
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"diffs": diffs, "abs": {}}, folder / LT_SFT_FILE)


def import_lt_sft(folder: str | PathLike, device: torch.device | str = "cpu") -> dict[str, SparseDelta]:
    """Read the differences of matrices in a folder with `pytorch_diff.bin`, by name without ".weight". Nothing in the
    file is executed.

    Raises:
        ValueError: the file is another one, or damaged; it has differences of what is no matrix, or whole parameters,
            such as a head, which are no sparse deltas.
    """
    path = Path(folder) / LT_SFT_FILE
    found = {}
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content.get("abs"):
            raise ValueError(f"expected differences only in {path}, got {next(iter(content['abs']))!r} as a whole")
        for name, diff in content["diffs"].items():
            if not name.endswith(".weight") or len(diff["size"]) != 2:
                raise ValueError(f"expected differences of matrices in {path}, got {name!r} {list(diff['size'])}")
            N, K = diff["size"]
            by_columns = torch.tensor(diff["index_steps"], dtype=torch.int64, device=device).cumsum(0)
            flat, order = (by_columns % N * K + by_columns // N).sort()
            layout = SparseLayout.from_indices((N, K), flat)
            found[name.removesuffix(".weight")] = SparseDelta(layout, diff["values"].to(device)[order])
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"expected an LT-SFT file in {path}, got another or a damaged one ({_line(error)})") from error
    return found


def export_shira(
    deltas: Mapping[str, SparseDelta], folder: str | PathLike, base_model: str | None = None, task: str | None = None
) -> None:
    """An adapter that `PeftModel.from_pretrained` reads as SHiRA (Bhardwaj et al., 2024).

    PEFT fixes the number of values of a layer to r(N + K), with one r for all: further positions with Δ = 0 fill up to
    the smallest r that holds every delta.

    Args:
        base_model, task: for the adapter's config: a name or path, and PEFT's task type, such as "CAUSAL_LM".

    Raises:
        ValueError: there is no delta, or a weight has fewer entries than r(N + K); nothing is written then.
    """
    from peft import ShiraConfig
    from safetensors.torch import save_file

    if not deltas:
        raise ValueError("expected at least one delta, got none")
    r = max(1, *(math.ceil(delta.layout.nnz / sum(delta.layout.shape)) for delta in deltas.values()))
    tensors = {}
    for name, delta in deltas.items():
        N, K = delta.layout.shape
        if r * (N + K) > N * K:
            raise ValueError(f"expected weights that hold {r} · (N + K) values, got {[N, K]} for {name!r}")
        flat, values = _filled(delta, r * (N + K))
        tensors[f"{SHIRA_PREFIX}{name}.shira_weight"] = values
        tensors[f"{SHIRA_PREFIX}{name}.shira_indices"] = torch.stack([flat // K, flat % K]).int()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SHIRA_FILE, {"format": "pt"})
    config = ShiraConfig(
        r=r, target_modules=list(deltas), base_model_name_or_path=base_model, task_type=task, inference_mode=True
    )
    config.save_pretrained(folder)


def import_shira(folder: str | PathLike, model_shapes: Mapping[str, tuple[int, int]]) -> dict[str, SparseDelta]:
    """Read the deltas of a SHiRA adapter that PEFT saved.

    Args:
        model_shapes: (N, K) of the weights by name of the module, which the file does not hold; tensors will do.

    Raises:
        ValueError: the file is another one, or damaged, or has a module without a shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / SHIRA_FILE
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected a SHiRA adapter in {path}, got a damaged file ({_line(error)})") from error
    found = {}
    for key, values in tensors.items():
        name = key.removeprefix(SHIRA_PREFIX).removesuffix(".shira_weight")
        if not key.endswith(".shira_weight"):
            continue
        indices = tensors.get(key.removesuffix("weight") + "indices")
        if indices is None or indices.shape != (2, len(values)):
            raise ValueError(f"expected {len(values)} positions beside the values of {name!r} in {path}, got others")
        if name not in model_shapes:
            raise ValueError(f"expected modules of the model in {path}, got {name!r}")
        shape = tuple(getattr(model_shapes[name], "shape", model_shapes[name]))
        flat, order = (indices[0].long() * shape[1] + indices[1]).sort()
        found[name] = SparseDelta(SparseLayout.from_indices(shape, flat), values[order])
    if not found:
        raise ValueError(f"expected a SHiRA adapter in {path}, got a file without one")
    return found


def _filled(delta: SparseDelta, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions, ascending, and float32 values, filled up to `count` with the first positions that are free."""
    N, K = delta.layout.shape
    flat, order = delta.layout.indices().cpu().sort()
    values = delta.values.detach().float().cpu()[order]
    first = torch.arange(min(N * K, count))  # at most nnz of them are taken, so count - nnz are free
    free = first[~torch.isin(first, flat)][: count - len(flat)]
    flat, order = torch.cat([flat, free]).sort()
    return flat, torch.cat([values, values.new_zeros(len(free))])[order]


def _line(error: Exception) -> str:
    """Return the first line of a message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
