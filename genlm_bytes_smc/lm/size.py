"""Whether a model's weights fit a device, told before anything is loaded.

Sizes come from the headers of safetensors files where the model is a local directory, else
from the configuration alone (the model is built without memory, on torch's meta device).
Where neither says, nothing is claimed and loading goes ahead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genlm_bytes_smc.lm.engine import EngineError

_FLOATS = ("F64", "F32", "F16", "BF16")


class ModelTooLargeError(EngineError, MemoryError):
    """A model's weights alone exceed the memory that its device has free."""


def weight_bytes(source: str, dtype: torch.dtype | None) -> int | None:
    """Bytes that the weights of a model take once loaded.

    Args:
        source: a directory in Hugging Face's format, or a name whose configuration is in the
            hub's local cache.
        dtype: what floating-point weights are converted to; None: left as stored.

    Returns:
        The bytes, or None where it cannot be told (no such files, or quantised weights).

    Raises:
        ValueError: a file is broken, or all are without weights.
    """
    path = Path(source)
    if path.is_dir():
        if "quantization_config" in _config_json(path):
            dtype = None  # as stored, whatever is asked for
        files = sorted(path.glob("*.safetensors"))
        if files:
            total = sum(_file_bytes(f, dtype) for f in files)
            if total == 0:  # transformers would fill the model with random numbers
                raise ValueError(f"the safetensors files in {source!r} hold no weights")
            return total
    return _built_bytes(source, dtype)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has free, in bytes; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def check_fits(
    source: str,
    dtype: torch.dtype | None,
    *,
    free: int | None,
    where: str,
    parts: int = 1,
    advice: str = "",
) -> None:
    """Raise if a model's weights exceed what is free.

    Args:
        source, dtype: as for `weight_bytes`.
        free: bytes free on each device, None if unknown.
        where: what the device is called.
        parts: devices the weights are split between.
        advice: what to do about it, for the message.

    Raises:
        ModelTooLargeError: so it is.
    """
    if free is None:
        return
    need = weight_bytes(source, dtype)
    if need is not None and need / parts > free:
        share = f" / {parts}" if parts > 1 else ""
        raise ModelTooLargeError(
            f"the weights of {source!r} take {gib(need)}{share}, and {where} has {gib(free)} "
            f"free{advice and '; ' + advice}"
        )


def check_fits_vllm(source: str, dtype: torch.dtype | None, opts: Mapping[str, Any]) -> None:
    """As `check_fits`, for vLLM on this machine's first GPU, or its CPU.

    Args:
        source, dtype: as for `weight_bytes`.
        opts: arguments of `vllm.LLM`.
    """
    if opts.get("quantization") or opts.get("load_format", "auto") not in ("auto", "safetensors"):
        return
    parts = int(opts.get("tensor_parallel_size", 1)) * int(opts.get("pipeline_parallel_size", 1))
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        free = int(total * float(opts.get("gpu_memory_utilization", 0.9)))
        advice = "raise tensor_parallel_size or gpu_memory_utilization, or quantise"
        check_fits(
            source, dtype, free=free, where="vLLM's share of a GPU", parts=parts, advice=advice
        )
    else:
        check_fits(source, dtype, free=free_bytes(torch.device("cpu")), where="the CPU")


def _file_bytes(path: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the tensors of one safetensors file after conversion.

    Raises:
        ValueError: it is none.
    """
    from huggingface_hub import parse_local_safetensors_file_metadata

    total = 0
    try:
        for tensor in parse_local_safetensors_file_metadata(path).tensors.values():
            first, behind = tensor.data_offsets
            if dtype is None or tensor.dtype not in _FLOATS:
                total += behind - first
            else:
                total += tensor.parameter_count * dtype.itemsize
    except Exception as error:  # whatever a broken header makes of the parser
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} is no safetensors file ({told})") from None
    return total


def _built_bytes(source: str, dtype: torch.dtype | None) -> int | None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # unknown architectures, remote code, nothing cached: it cannot be told
        return None
    stored = getattr(config, "dtype", None)
    kind = dtype or (stored if isinstance(stored, torch.dtype) else torch.float32)
    return int(kind.itemsize * sum(p.numel() for p in model.parameters()))


def _config_json(path: Path) -> dict[str, Any]:
    try:
        out = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return out if isinstance(out, dict) else {}


def gib(size: int) -> str:
    """Format a number of bytes for a message."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 28 else f"{size / 2**20:.1f} MiB"
