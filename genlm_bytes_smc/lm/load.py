"""Models by name: the bundled one, a Hugging Face one, or one behind another backend."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch

from genlm_bytes_smc.lm.adapter import AdapterEngine, as_engine
from genlm_bytes_smc.lm.bundled import BundledGPT2, BundledTokenizer
from genlm_bytes_smc.lm.devices import device_of
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.files import (
    SMOLLM2,
    check_fits,
    check_fits_vllm,
    directory_of,
    free_bytes,
    require,
)
from genlm_bytes_smc.lm.transformer import TreeTransformer

if TYPE_CHECKING:
    from genlm.backend.llm import AsyncLM

    from genlm_bytes_smc.lm.vllm_engine import VLLMEngine

# transformers, genlm-backend and vLLM are imported by the functions that need them: the bundled
# model needs none of them, and they take longer than all else.

_TINY = Path(__file__).with_name("tiny")
BACKENDS = ("hf", "vllm", "mlx", "sgl")

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")
}
_PACKAGES = {"mlx": "mlx_lm", "sgl": "sglang"}
_SHARED_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code",
)  # fmt: skip


def load_model(
    name: str | os.PathLike[str] | AsyncLM = "tiny",
    backend: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine_opts: Mapping[str, Any] | None = None,
    start: int | Sequence[int] | None = None,
    limit_bytes: int | None = None,
) -> RowEngine:
    """Load a language model and make it answer for many contexts at once.

    Args:
        name: ``"tiny"`` for the small English model that comes with this package (nothing is
            downloaded); ``"smollm2"`` for SmolLM2-135M-Instruct, fetched and converted at
            first use; a directory in Hugging Face's format; a GGUF file, or a directory with
            one, for ``"hf"`` and ``"vllm"`` converted at first use (see docs/models.md); the
            name of a model on the Hugging Face hub; or an `AsyncLM` or `RowEngine`, for which
            see `as_engine`.
        backend: ``"hf"`` (the default) runs the model here by tree attention
            (`TreeTransformer`); ``"vllm"`` runs it by vLLM (`VLLMEngine`; `close` it when
            done, or use it in a `with` block); ``"mlx"`` and ``"sgl"`` run it by
            genlm-backend's class of that kind. They need the package's extra of that name.
        device: for ``"hf"``, where to run: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
            None: CUDA where there is some, else the CPU.
        dtype: of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"``,
            or ``"auto"`` (None) for the one they are stored in. Rows are float32 in any case.
            vLLM has no ``"float64"``.
        engine_opts: passed on: to `AutoModelForCausalLM.from_pretrained` for ``"hf"``; to
            `vllm.LLM` for ``"vllm"`` (`tensor_parallel_size`, `gpu_memory_utilization`,
            `quantization`, and `lora`: see `VLLMEngine.load`); to the engine of SGLang; to
            `AsyncMlxLM` for ``"mlx"``. Python code that comes with a model is run only with
            ``{"trust_remote_code": True}``.
        start: token ids that contexts begin with; None chooses as `start_tokens` does.
        limit_bytes: for ``"hf"``, the most memory for keys and values (None: 1 GiB).

    Returns:
        An engine; also an `AsyncLM`, so genlm-control and genlm-bytes can use it.

    Raises:
        ValueError: an unknown backend, device or dtype, an option that does not apply, or a
            model that cannot be loaded from its files.
        FileNotFoundError: no such directory or model.
        ImportError: the backend's package is not installed, or one that GGUF needs.
        OSError: the directory for converted models cannot be written, or is full.
        ModelTooLargeError: the weights alone exceed the device's free memory; found out
            before loading where the files or the configuration tell.
        EngineError: vLLM could not start.
    """
    if not isinstance(name, (str, os.PathLike)):
        if any(option is not None for option in (backend, device, dtype, engine_opts)):
            raise ValueError(
                "backend, device, dtype and engine_opts say how to load a model by name; "
                f"{type(name).__name__} is loaded already"
            )
        return as_engine(name, start=start, limit_bytes=limit_bytes)
    backend, opts = backend or "hf", dict(engine_opts or {})
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "hf":
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = device_of(device, known=True)
        model, tokenizer = _load_here(name, place, _dtype(dtype), opts)
        return TreeTransformer(
            model, tokenizer, limit_bytes=limit_bytes, start=start,
            device=None if "device_map" in opts else place,
        )  # fmt: skip
    if device is not None or limit_bytes is not None:
        raise ValueError(
            f"device and limit_bytes apply to backend 'hf'; backend {backend!r} manages its "
            "memory itself (see engine_opts)"
        )
    if backend == "vllm":
        return _load_vllm(name, _dtype(dtype), opts, start)
    llm = _load_other(os.fspath(name), backend, _dtype(dtype), opts)
    return AdapterEngine(llm, start=start, owned=True)


def _load_here(
    name: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype | None,
    opts: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Return a model that runs here, if it fits, and its tokenizer."""
    if name == "tiny":
        if opts:
            return _load_bundled(dtype, opts)
        model = BundledGPT2(_TINY, dtype, lambda: _load_bundled(dtype, {})[0])
        return model, BundledTokenizer(_TINY, _load_bundled_tokenizer)
    name = directory_of(name, dtype)
    # These spread the weights or shrink them, by rules that the check does not know.
    if not {"device_map", "quantization_config"} & set(opts):
        advice = "a smaller dtype, engine_opts={'device_map': 'auto'} or backend 'vllm' may do"
        free, where = free_bytes(device), str(device)
        check_fits(_source(name), dtype, free=free, where=where, advice=advice)
    return _load_hf(name, dtype, opts)


def _load_hf(
    name: str | os.PathLike[str], dtype: torch.dtype | None, opts: Mapping[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"dtype": "auto" if dtype is None else dtype, **opts, "output_loading_info": True}
    # Said, because transformers asks on stdin if not told.
    options["trust_remote_code"] = bool(opts.get("trust_remote_code"))
    source = _source(name)
    if not Path(source).is_dir() and not _hub_in_reach():
        options["local_files_only"] = True
    shared = {k: options[k] for k in _SHARED_OPTIONS if k in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        model, told = AutoModelForCausalLM.from_pretrained(source, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # broken files make transformers and torch raise errors of any kind
        raise _not_found(source, error) from None
    if missing := sorted(told["missing_keys"]):  # transformers has filled them at random
        raise ValueError(
            f"cannot load the model in {source!r}: its files lack {len(missing)} of the weights "
            f"that its configuration asks for, such as {missing[0]}"
        )
    return model, tokenizer


def _load_bundled(dtype: torch.dtype | None, opts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load the bundled model and its tokenizer as transformers has them, without progress bars."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        return _load_hf(_TINY, dtype, opts)
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _load_bundled_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_TINY, trust_remote_code=False)


def _load_vllm(
    name: str | os.PathLike[str],
    dtype: torch.dtype | None,
    opts: dict[str, Any],
    start: int | Sequence[int] | None,
) -> VLLMEngine:
    require("backend 'vllm' needs the package", ["vllm"], "vllm")
    from genlm_bytes_smc.lm.vllm_engine import VLLMEngine

    if dtype == torch.float64:
        raise ValueError("vLLM runs no float64; known: auto, float32, bfloat16, float16")
    source = _source(_TINY if name == "tiny" else directory_of(name, dtype))
    if dtype is None and "dtype" not in opts:
        trusted = bool(opts.get("trust_remote_code"))
        dtype = _stored_dtype(source, trusted)  # vLLM's "auto" would make float16 of float32
    check_fits_vllm(source, dtype, opts)
    return VLLMEngine.load(source, dtype=dtype, engine_opts=opts, start=start)


def _stored_dtype(source: str, trusted: bool) -> torch.dtype | None:
    """Read what the configuration says the weights are stored in, if it is at hand."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=trusted
        )
    except (OSError, ValueError):
        return None
    stored = getattr(config.get_text_config(decoder=True), "dtype", None)
    return stored if stored in _DTYPES.values() else None


def _source(name: str | os.PathLike[str]) -> str:
    """Return the name or directory as transformers takes it; a directory must exist."""
    text = os.fspath(name)
    if not text:
        raise FileNotFoundError("no model has an empty name")
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{text!r} is no model: the directory has no config.json")
        return str(path)
    looks_like_path = isinstance(name, os.PathLike) or text.startswith((".", "~", os.sep))
    if looks_like_path or text.count("/") > 1:
        raise FileNotFoundError(f"no such model directory: {text!r}")
    return text


def _hub_in_reach() -> bool:
    """Whether the hub's name resolves. If not, its client would retry for most of a minute."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():  # the user said so: nothing is looked up
        return False
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if getproxies() or host is None:
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _not_found(source: str, error: Exception) -> Exception:
    told = str(error).strip().splitlines()
    reason = told[0].strip() if told else ""
    if reason.endswith(":"):  # what is wrong stands on the lines that follow
        reason = shorten(str(error), 500, placeholder=" ...")
    if isinstance(error, pickle.UnpicklingError):
        reason = (
            "its weights are pickled Python objects other than tensors, which may run code when "
            "they are loaded; have them converted to safetensors"
        )
    elif not reason or not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
    elif "trust_remote_code" in str(error):
        reason += (
            " To run it, pass engine_opts={'trust_remote_code': True} (--trust-remote-code on the "
            "command line)."
        )
    if Path(source).is_dir() or not isinstance(error, OSError):
        return ValueError(f"cannot load the model in {source!r}: {reason}")
    near = get_close_matches(source.lower(), ("tiny", SMOLLM2), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return FileNotFoundError(
        f"cannot load model {source!r}: no such directory, and no such model on the Hugging Face "
        f"hub or in its local cache ({reason}){hint}"
    )


def _load_other(
    name: str, backend: str, dtype: torch.dtype | None, opts: dict[str, Any]
) -> AsyncLM:
    require(f"backend {backend!r} needs the package", [_PACKAGES[backend]], backend)
    from genlm.backend import llm as classes

    if backend == "mlx":
        if dtype is not None:
            raise ValueError("dtype does not apply to backend 'mlx'")
        import mlx_lm

        # as `AsyncMlxLM.from_name`, which leaves it to the tokenizer to ask
        own_code = {"trust_remote_code": bool(opts.pop("trust_remote_code", None))}
        model, tokenizer = mlx_lm.load(name, tokenizer_config=own_code)
        return classes.AsyncMlxLM(model, tokenizer, **opts)
    if dtype is not None:
        opts.setdefault("dtype", str(dtype).removeprefix("torch."))
    return classes.AsyncSGLTransformer.from_name(name, engine_opts=opts)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    for name, known in _DTYPES.items():
        if dtype in (name, known):
            return known
    raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(_DTYPES)}")
