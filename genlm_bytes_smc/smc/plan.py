"""What is asked of a run, checked before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.smc.ahead import Ahead, AheadLeaf
from genlm_bytes_smc.smc.ahead import proposal_rows as proposal_rows_of
from genlm_bytes_smc.smc.checks import check_count, check_threshold
from genlm_bytes_smc.smc.critic import Critic, Predicate
from genlm_bytes_smc.smc.factors import (
    Combine,
    compile_rows,
    factors_of,
    has_language_model,
    name_of,
    names_of,
)
from genlm_bytes_smc.smc.frontier import random_beams
from genlm_bytes_smc.smc.rejuvenation import Suffix
from genlm_bytes_smc.smc.resampling import Resampler, resampler
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.rollout import Rollout
from genlm_bytes_smc.smc.state import SMCState
from genlm_bytes_smc.smc.twist import Loan, schedule_of


class SMCOptions(TypedDict, total=False):
    """What `smc` takes by keyword; see there."""

    proposal: Any
    twist: Any
    tempering: Any
    critic: Any
    twist_with_critic: bool
    terminate_when: Callable[[bytes], bool] | None
    resampling_method: str
    seed: int | None
    beam_seed: int | None
    share_beams: bool
    rollout: int | Rollout | None
    rejuvenate: Suffix | None
    record: bool
    resume: SMCResult | SMCState | None


@dataclass(frozen=True)
class Plan:
    """A run's target and settings.

    Attributes:
        potential: the target as it was given.
        leaves, names: the factors of target and proposal.
        n_target: the first so many of them are the target's.
        target, proposal: how their rows combine.
        loan: what the look-ahead lends to weights, and how loans are tempered.
        The others: see `smc`.
    """

    potential: Any
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    n_target: int
    target: Combine
    proposal: Combine | None
    loan: Loan
    critic: Critic | None
    terminate_when: Callable[[bytes], bool] | None
    n_particles: int
    ess_threshold: float
    max_bytes: int
    resample: Resampler
    seed: int
    beam_seed: int | None
    share_beams: bool
    rollout: Rollout
    rejuvenate: Suffix | None
    record: bool
    resume: SMCState | None


def make_plan(
    target: Any,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    proposal: Any = None,
    twist: Any = None,
    tempering: Any = None,
    critic: Any | Predicate = None,
    twist_with_critic: bool = True,
    terminate_when: Callable[[bytes], bool] | None = None,
    resampling_method: str = "systematic",
    seed: int | None = None,
    beam_seed: int | None = None,
    share_beams: bool = True,
    rollout: int | Rollout | None = None,
    rejuvenate: Suffix | None = None,
    record: bool = False,
    resume: SMCResult | SMCState | None = None,
) -> Plan:
    """Check what `smc` was given.

    Raises:
        TypeError, ValueError: what is wrong, what was got and what was expected.
    """
    check_count("n_particles", n_particles, 1)
    check_count("max_bytes", max_bytes, 1)
    check_threshold(ess_threshold)
    leaves: list[Any] = []
    rows = compile_rows(target, leaves)
    n_target = len(leaves)
    _check_target(leaves, terminated=terminate_when is not None)
    aheads = _Aheads(target, leaves, max_bytes)
    proposal_rows = _proposal_rows(proposal, rows, aheads)
    loan = _loan(target, twist, tempering, aheads)
    if terminate_when is not None and not callable(terminate_when):
        raise TypeError(f"terminate_when must be a function of bytes, got {terminate_when!r}")
    rolls = Rollout.of(rollout)
    _check_moves(rejuvenate, rolls, record)
    if not share_beams:
        _check_random(leaves)
    state = _resumed(resume, (n_particles, rolls.candidates), max_bytes, seed, beam_seed)
    _check_horizon(state, max_bytes, twist)
    return Plan(
        potential=target,
        leaves=tuple(leaves),
        names=names_of(leaves),
        n_target=n_target,
        target=rows,
        proposal=proposal_rows,
        loan=loan,
        critic=None if critic is None else Critic(critic, twist_with_critic and ess_threshold > 0),
        terminate_when=terminate_when,
        n_particles=int(n_particles),
        ess_threshold=float(ess_threshold),
        max_bytes=int(max_bytes),
        resample=resampler(resampling_method),
        seed=state.seed if state else int(seed or 0),
        beam_seed=state.beam_seed if state else beam_seed,
        share_beams=bool(share_beams),
        rollout=rolls,
        rejuvenate=rejuvenate,
        record=record,
        resume=state,
    )


def _check_target(leaves: list[Any], *, terminated: bool) -> None:
    """Raise unless texts of a target of these factors have a weight and, if nothing else
    terminates them, an end."""
    if not any(has_language_model(leaf) for leaf in leaves):
        raise ValueError(
            "a target needs a byte language model (ByteLLM) among its factors, got "
            f"{', '.join(names_of(leaves))}"
        )
    if not terminated:
        for leaf in leaves:
            check_ends(leaf)


def _check_random(leaves: list[Any]) -> None:
    """Raise if beams of equal texts are equal, so that there is nothing not to share."""
    if not random_beams(leaves):
        raise ValueError(
            'share_beams=False needs a language model with prune="unbiased": other beams of '
            "equal texts do not differ"
        )


def _check_horizon(state: SMCState | None, max_bytes: int, twist: Any) -> None:
    """Raise if the twist of what is resumed has given up texts that are possible now."""
    had = None if state is None else state.max_bytes
    if had is not None and had < max_bytes and getattr(twist, "max_bytes", None) == "run":
        raise ValueError(
            f"max_bytes must be at most {had}, as in what is resumed, got {max_bytes}: the twist "
            "looks to the run's limit and has given up texts that are longer. Make it with "
            "Lookahead(max_bytes=...) of the largest limit, or None, before a run that shall go on"
        )


class _Aheads:
    """Places look-aheads among the leaves, each object once."""

    def __init__(self, target: Any, leaves: list[Any], max_bytes: int) -> None:
        self.target = target
        self.leaves = leaves
        self.own = tuple(leaves)  # of the target
        self.max_bytes = max_bytes
        self.placed: list[tuple[Ahead, int]] = []

    def place(self, ahead: Ahead) -> int:
        """Which leaf a look-ahead is."""
        for known, at in self.placed:
            if known is ahead:
                return at
        self.placed.append((ahead, len(self.leaves)))
        self.leaves.append(AheadLeaf(ahead, self.target, self.own, self.max_bytes))
        return len(self.leaves) - 1


def _proposal_rows(proposal: Any, target: Combine, aheads: _Aheads) -> Combine | None:
    """How the rows to draw from combine, their leaves placed; None: the target's own."""
    if isinstance(proposal, Ahead):
        return proposal_rows_of(target, aheads.place(proposal), proposal)
    return None if proposal is None else compile_rows(proposal, aheads.leaves)


def _loan(target: Any, twist: Any, tempering: Any, aheads: _Aheads) -> Loan:
    if twist is not None and not isinstance(twist, Ahead):
        raise TypeError(f"twist must be a Lookahead, got {type(twist).__name__}")
    schedule = schedule_of(tempering)
    soft = () if schedule is None else tuple(f for f in factors_of(target) if _gradable(f))
    if twist is None:
        return Loan(schedule=schedule, soft=soft)
    return Loan(aheads.place(twist), twist.strength, schedule, soft)


def _gradable(factor: Any) -> bool:
    """Whether a factor has prefix weights between 0 and 1 that are its own."""
    return not has_language_model(factor) and not isinstance(factor, ByteDFA | ByteMatcher)


def _check_moves(rejuvenate: Any, rollout: Rollout, record: bool) -> None:
    if rejuvenate is not None and not isinstance(rejuvenate, Suffix):
        raise TypeError(f"rejuvenate must be a Suffix, got {rejuvenate!r}")
    if record and (rejuvenate is not None or rollout.candidates > 1):
        raise ValueError(
            "record=True notes what each particle read byte by byte, which neither rejuvenate "
            "nor a roll-out of several candidates leaves as it was"
        )


def _resumed(
    resume: Any,
    sizes: tuple[int, int],
    max_bytes: int,
    seed: int | None,
    beam_seed: int | None,
) -> SMCState | None:
    """The state to go on from, None for a new run; the seeds are those of the run."""
    if resume is None:
        for name, value in (("seed", seed), ("beam_seed", beam_seed)):
            if value is not None:
                check_count(name, value, 0)
        return None
    state = resume.resumable if isinstance(resume, SMCResult) else resume
    if not isinstance(state, SMCState):
        raise TypeError(f"resume must be an SMCResult or an SMCState, got {type(resume).__name__}")
    size, (n_particles, candidates) = len(state.particles.length), sizes
    if size not in (n_particles, n_particles * candidates):
        raise ValueError(f"n_particles must be {size}, as in what is resumed; got {n_particles}")
    if max_bytes < state.step:
        raise ValueError(
            f"max_bytes must be at least the {state.step} bytes read so far, got {max_bytes}"
        )
    for name, given, had in (("seed", seed, state.seed), ("beam_seed", beam_seed, state.beam_seed)):
        if given is not None and given != had:
            raise ValueError(f"{name} must be {had}, as in what is resumed; got {given}")
    return state


def check_ends(potential: Any) -> None:
    """Raise if a byte language model has no token that ends a text.

    Raises:
        ValueError: so it is, and every text would weigh zero.
    """
    params = getattr(potential, "params", None)
    if isinstance(params, BeamParams) and not params.eos:
        raise ValueError(
            f"no token of {name_of(potential)} ends a text, so every text has weight zero: name "
            "eos_byte_strings in its beam parameters, or end texts by terminate_when"
        )


def start_error(plan: Plan, log_weight: float, factors: dict[str, float]) -> Exception:
    """The error for a target that gives the empty text no finite positive weight."""
    blamed = ", ".join(f"{name} gave {w}" for name, w in factors.items())
    return ValueError(
        f"the empty text must have a finite log weight, got {log_weight} from "
        f"{name_of(plan.potential)} ({blamed or 'no factor alone'})"
    )
