"""What a particle step spends where: time by stages, and waits of the host for the device."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_models import Mixed, wait_for
from genlm_bytes_smc.lm.rows import RowStore
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.smc import reading
from genlm_bytes_smc.smc.lanes import BeamLanes, StateLanes

STAGES = ("forward", "rows", "beam", "constraint", "draw", "host")
MIX = "mix"  # with the bigram LM: work of the benchmark's, no stage of a step
_CALLS: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (TreeTransformer, ("evaluate",), "forward"),
    (Mixed, ("mix",), MIX),
    (RowStore, ("_insert",), "rows"),
    (BeamLanes, ("rows", "rows_within", "step", "ended", "gather"), "beam"),
    (StateLanes, ("rows", "step", "gather"), "constraint"),
    (reading, ("draw",), "draw"),
)
# Operations whose result the host must see: a value, or a size that only the device knows.
_SEEN = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select",
    "_unique2", "unique_dim", "repeat_interleave",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # the same for a mask


class Stages:
    """Wall time by stage, with a wait for the device wherever one begins or ends.

    Use it as a context manager; calls are watched inside. A stage that runs inside another
    (a forward inside a step of the beam) counts for itself alone; "host" is what is in none.

    Attributes:
        seconds: by stage, after the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._open, self._last = device, ["host"], 0.0
        self._patches = ExitStack()

    def __enter__(self) -> Stages:
        with ExitStack() as patches:
            for owner, names, stage in _CALLS:
                for name in names:
                    patches.enter_context(patched(owner, name, self._watched(stage)))
            self._patches = patches.pop_all()
        self.restart()
        return self

    def restart(self) -> None:
        """Begin from nothing, in the stage "host"."""
        self.seconds = dict.fromkeys((*STAGES, MIX), 0.0)
        self._open = ["host"]
        wait_for(self._device)
        self._last = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._mark()
        self._patches.close()

    @property
    def inside(self) -> float:
        """Return the share of the time inside the forward, that of mixing left out."""
        return self.seconds["forward"] / sum(self.seconds[stage] for stage in STAGES)

    def _mark(self) -> None:
        """Add the time since the last mark to the innermost stage that is open."""
        wait_for(self._device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _watched(self, stage: str) -> Callable[[Any], Any]:
        """Return what makes a watched function of a function, a coroutine function too."""

        def make(call: Any) -> Any:
            if inspect.iscoroutinefunction(call):

                @functools.wraps(call)
                async def later(*args: Any, **kwargs: Any) -> Any:
                    with self._stage(stage):
                        return await call(*args, **kwargs)

                return later

            @functools.wraps(call)
            def now(*args: Any, **kwargs: Any) -> Any:
                with self._stage(stage):
                    return call(*args, **kwargs)

            return now

        return make


class Waits(TorchDispatchMode):
    """Counts how often the host waits for the device, inside the model's forward and outside it.

    A wait is a copy to the host that blocks, a value read by the host, an operation whose result
    has a size that only the device knows, or a call that synchronises.

    Attributes:
        inside, outside: how often.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.inside = self.outside = 0
        self._kind, self._depth = device.type, 0
        self._patches = ExitStack()

    def __enter__(self) -> Waits:
        with ExitStack() as patches:
            patches.enter_context(patched(TreeTransformer, "evaluate", self._entered))
            for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
                patches.enter_context(patched(owner, "synchronize", self._counted))
            self._patches = patches.pop_all()
        super().__enter__()
        return self

    def restart(self) -> None:
        """Count from nothing."""
        self.inside = self.outside = 0

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _entered(self, call: Any) -> Any:
        @functools.wraps(call)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1

        return forward

    def _counted(self, call: Any) -> Any:
        @functools.wraps(call)
        def synchronize(*args: Any, **kwargs: Any) -> Any:
            self._count()
            return call(*args, **kwargs)

        return synchronize

    def _count(self) -> None:
        if self._depth:
            self.inside += 1
        else:
            self.outside += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if x.device.type == self._kind]
        name = func.overloadpacket.__name__
        masked = name in _INDEXED and any(x.dtype == torch.bool for x in here[1:])
        if here and (name in _SEEN or masked or self._copied(name, args, kwargs or {}, out)):
            self._count()
        return out

    def _copied(self, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        """Return whether this copies from the device to the host and waits for it."""
        if self._kind == "cpu" or not isinstance(out, torch.Tensor) or out.device.type != "cpu":
            return False
        behind = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        return not (behind and out.is_pinned())


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a class or module by what `make` returns for it, inside a block.

    Raises:
        AttributeError: `owner` itself does not define it.
    """
    if name not in vars(owner) and not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__} has no {name}, which the benchmark watches")
    own, call = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(call))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, call)
        else:
            delattr(owner, name)
