"""Rows of a model that vLLM runs, through vLLM's public interface alone.

A request for one token is made for each context, all in one `LLM.generate`; a logits
processor catches the whole row before vLLM samples from it (`vllm_capture`). Prefix caching
gives a context the keys and values of its parent, so that a one-token extension costs what
vLLM's last unfinished block costs. Nothing of vLLM's private modules is imported or patched.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from genlm_bytes_smc.lm.contexts import IntArray, start_tokens
from genlm_bytes_smc.lm.devices import device_of
from genlm_bytes_smc.lm.engine import EngineError, RowEngine
from genlm_bytes_smc.lm.files import require
from genlm_bytes_smc.lm.vllm_env import TAG, process_kept, setting

_CAPTURE = "genlm_bytes_smc.lm.vllm_capture"
_ROW_BYTES = 1 << 28  # of caught rows at one time
_CPU_KV_BYTES = 1 << 30
_CPU_BLOCK = 32  # tokens; the least that vLLM's CPU kernels like

_tags = itertools.count()  # over all engines of the process: workers keep one table of rows


class VLLMEngine(RowEngine):
    """Next-token rows of a model that vLLM runs.

    Use `VLLMEngine.load`, or `load_model(name, backend="vllm")`. It is a context manager;
    `close` ends vLLM's engine and its workers.

    Rows are float32 log-probabilities on the device of the model; with several workers
    (tensor or pipeline parallelism) they come to this process through the CPU, and stay
    there unless `device` says otherwise.

    Args:
        llm: a `vllm.LLM` made with `VLLMEngine.options(...)`.
        start: token ids that contexts begin with; None chooses as `start_tokens` does.
        lora: a `vllm.lora.request.LoRARequest` that every context is computed with, or None.
        device: where rows are brought; None leaves them where they come.

    Attributes:
        llm: vLLM's engine; None once closed.
        counts: `forwards` counts calls of `generate`, `positions` the tokens sent to it; how
            many of them came from the prefix cache is vLLM's own affair.

    Raises:
        ValueError: the model's rows are narrower than the tokenizer's vocabulary, or nothing
            can begin a text.
        EngineError: this vLLM does not let rows be caught.
    """

    def __init__(
        self,
        llm: Any,
        *,
        start: int | Sequence[int] | None = None,
        lora: Any = None,
        device: str | torch.device | None = None,
    ) -> None:
        tokenizer = llm.get_tokenizer()
        super().__init__(
            tokenizer,
            device=torch.device("cpu"),
            width=None,
            window=int(llm.model_config.max_model_len) - 1,  # one place is for the token drawn
            start=start_tokens(tokenizer, start),
        )
        from vllm import SamplingParams

        self.rows_are_cheap = True  # its rows come to the host, from wherever it runs
        self.llm: Any = llm
        self._lora = lora
        self._target = None if device is None else device_of(device)
        self._params = SamplingParams
        self._failure: BaseException | None = None
        setting.hold()
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def options(opts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Arguments for `vllm.LLM` under which rows can be caught.

        Args:
            opts: arguments of one's own; they come first, except that the logits processor
                is added to `logits_processors`.

        Raises:
            ValueError: `worker_extension_cls` is taken.
        """
        out = {
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "trust_remote_code": False,
            **(opts or {}),
        }
        if "worker_extension_cls" in out:
            raise ValueError(
                "worker_extension_cls is how rows are fetched from vLLM's workers, and cannot be "
                f"{out['worker_extension_cls']!r}"
            )
        given = list(out.get("logits_processors") or ())
        out["logits_processors"] = [*given, f"{_CAPTURE}:RowCapture"]
        out["worker_extension_cls"] = f"{_CAPTURE}.RowWorker"
        if _on_cpu():
            out.setdefault("enforce_eager", True)
            out.setdefault("block_size", _CPU_BLOCK)
            out.setdefault("kv_cache_memory_bytes", _CPU_KV_BYTES)
        return out

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        engine_opts: Mapping[str, Any] | None = None,
        start: int | Sequence[int] | None = None,
    ) -> Self:
        """Start vLLM on a model; takes ten seconds to some minutes.

        Args:
            name: a directory in Hugging Face's format, or a name on its hub.
            dtype: of the weights; None: the one they are stored in.
            engine_opts: arguments of `vllm.LLM`: `tensor_parallel_size`,
                `gpu_memory_utilization`, `quantization`, `max_model_len` and so on. Beside
                them, `lora`: the directory of a LoRA adapter (or a `LoRARequest`) that every
                context is computed with; and `rows_device`: the class's `device`.
            start: as for the class.

        Raises:
            ImportError: vLLM is not installed.
            EngineError: vLLM could not start; the cause is attached.
        """
        require("backend 'vllm' needs the package", ["vllm"], "vllm")
        opts = dict(engine_opts or {})
        lora, device = opts.pop("lora", None), opts.pop("rows_device", None)
        if lora is not None:
            opts["enable_lora"] = True
        if dtype is not None:
            opts.setdefault("dtype", str(dtype).removeprefix("torch."))
        setting.hold()
        try:
            logging.getLogger("vllm").setLevel(logging.WARNING)
            from vllm import LLM

            opts = cls.options(opts)
            try:
                with process_kept():
                    llm = LLM(model=name, **opts)
            except (TypeError, ImportError):
                raise
            except Exception as error:
                _clean(last=setting.holders == 1)
                raise EngineError(f"vLLM could not start on {name!r}: {_said(error)}") from error
            return cls(llm, start=start, lora=_lora_request(lora), device=device)
        finally:
            setting.release()

    # -- rows --------------------------------------------------------------------------

    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """Rows of distinct contexts: float32[B, width] log-probabilities in nats.

        Raises:
            EngineError: vLLM failed, now or before, or the engine was closed.
            BadRowError: the model returned NaN or +inf.
        """
        most = max(1, _ROW_BYTES // (4 * (self.width or 1)))
        parts = [
            self._generate([self.tree.tokens(n) for n in nodes[i : i + most].tolist()])
            for i in range(0, len(nodes), most)
        ]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._refuse_nan(rows, nodes)
        self.counts.rows += len(nodes)
        self.counts.positions += int(self.tree.depth[nodes].sum())
        return rows

    def _generate(self, contexts: list[list[int]]) -> torch.Tensor:
        """Rows of contexts from one `generate` of one token each."""
        if self.llm is None:
            raise EngineError("this engine was closed; load the model again")
        if self._failure is not None:
            raise EngineError(
                f"vLLM failed earlier and does not run any more: {_said(self._failure)}"
            ) from self._failure
        tags = list(itertools.islice(_tags, len(contexts)))
        params = [  # without a seed the second model runner takes one from numpy's generator
            self._params(
                max_tokens=1, temperature=0.0, seed=0, ignore_eos=True, detokenize=False,
                extra_args={TAG: tag},
            )
            for tag in tags
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": context} for context in contexts]
        try:
            self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora)
            answers = self.llm.collective_rpc("take_caught_rows", args=(tags,))
        except BaseException as error:
            # Requests may be left half done inside vLLM: nothing more can be asked of it.
            self._failure = error
            if not isinstance(error, Exception):
                raise
            raise EngineError(
                f"vLLM failed on {len(contexts)} contexts of up to {max(map(len, contexts))} "
                f"tokens: {_said(error)}"
            ) from error
        self.counts.forwards += 1
        rows: torch.Tensor | None = next((rows for rows in answers if rows is not None), None)
        if rows is None:
            raise EngineError(
                "vLLM ran, but its logits processors saw nothing to catch; rows need a model that "
                "generates, all sampling in one place (enable_batch_sharded_sampling=False) and "
                "no speculative decoding"
            )
        return rows if self._target is None else rows.to(self._target)

    def _probe(self) -> None:
        """One row, to see that rows can be caught, how wide they are and where they are."""
        rows = self._generate([list(self.start)])
        self.device, self.width = rows.device, int(rows.shape[1])
        _ = self.byte_vocab  # refused here if rows are narrower, or spellings unknown
        self.counts.reset()

    # -- ending ------------------------------------------------------------------------

    def _clear_cache(self) -> None:
        """Drop the prefix cache of vLLM; rows come out the same."""
        if self.llm is not None:
            self.llm.reset_prefix_cache()

    def _close(self) -> None:
        """End vLLM's engine and its workers and free their memory. Closing again does nothing.

        An engine that died is beyond asking, and raises nothing.
        """
        if self.llm is None:
            return
        llm, self.llm = self.llm, None
        # vLLM's own shutdown ends the process groups of every engine in this process. While
        # another is open, one that runs here is only let go of: that frees all it holds.
        if setting.holders == 1 or _has_workers(llm):
            _shut_down(llm)
        else:
            _keep_groups(llm)
        del llm
        self._failure = None
        _clean(last=setting.release())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _shut_down(llm: Any) -> None:
    for name in ("shutdown", "engine_core.shutdown"):  # where vLLM has kept it so far
        end = llm.llm_engine
        for part in name.split("."):
            end = getattr(end, part, None)
        if callable(end):
            try:
                end()
            except Exception:
                logging.getLogger(__name__).debug("vLLM's shutdown failed", exc_info=True)
            return


def _keep_groups(llm: Any) -> None:
    """Keep the process groups of other engines when this one is collected.

    Newer versions of vLLM shut an engine down as it is collected, and keep what was there while
    it started from being collected at all.
    """
    ending = getattr(getattr(llm.llm_engine, "engine_core", None), "_finalizer", None)
    if ending is not None:
        ending.detach()
        gc.unfreeze()


def _has_workers(llm: Any) -> bool:
    """Return whether an engine has processes of its own."""
    config = getattr(llm.llm_engine, "vllm_config", None)
    return int(getattr(getattr(config, "parallel_config", None), "world_size", 1)) > 1


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _lora_request(lora: Any) -> Any:
    """Return a `LoRARequest` as it is, or make one for a directory."""
    if lora is None or (not hasattr(lora, "__fspath__") and not isinstance(lora, str)):
        return lora
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(lora))


def _clean(last: bool) -> None:
    """Free what vLLM's engines held; with the last of them, their process groups too."""
    gc.collect()  # vLLM's objects refer to each other in circles
    if last:
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
