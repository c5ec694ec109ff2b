"""The settings of a run, checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.checks import check_count, check_threshold
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.potential.power_mean import PowerMean
from genlm_bytes_smc.smc.critics import Critic, Judge, split
from genlm_bytes_smc.smc.factors import (
    Tree,
    compile_rows,
    engines_of,
    factors_of,
    has_language_model,
    name_of,
    names_of,
    place_of,
    random_beams,
)
from genlm_bytes_smc.smc.particles import SMCState
from genlm_bytes_smc.smc.resampling import (
    FloatArray,
    Resampler,
    Rollout,
    Suffix,
    resampler,
    strings_of,
)
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.weighers import (
    Ahead,
    Combine,
    Ending,
    Predicate,
    Tempering,
    Twist,
    Weigher,
    proposal_rows,
    schedule_of,
)


class SMCOptions(TypedDict, total=False):
    """The keyword arguments of `smc`; see there."""

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
    draft: Any
    block: int
    resample_at: str | bytes | Sequence[str | bytes] | None
    record: bool
    resume: SMCResult | SMCState | None
    distinct: bool
    lookahead: Any


@dataclass(frozen=True)
class Plan:
    """The target and the settings of a run.

    Attributes:
        potential: the target as it was given.
        leaves, names: the factors of target and proposal.
        n_target: the first so many of them are the target's.
        target: how their rows make the target's.
        exponents: float64[leaves], the power of each in the target.
        proposal: how their rows make those to draw from; None: the target's own.
        weighers: what changes weights after reading, in this order.
        engines: the distinct engines of all language models, those of critics too.
        The others: see `smc`.
    """

    potential: Any
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    n_target: int
    target: Tree
    exponents: FloatArray
    proposal: Combine | None
    weighers: tuple[Weigher, ...]
    engines: tuple[Any, ...]
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
    resample_at: tuple[bytes, ...]
    record: bool
    resume: SMCState | None
    distinct: bool


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
    draft: Any = None,
    block: int = 16,
    resample_at: str | bytes | Sequence[str | bytes] | None = None,
    record: bool = False,
    resume: SMCResult | SMCState | None = None,
    distinct: bool = False,
    lookahead: Any = None,
    **unknown: Any,
) -> Plan:
    """Check the arguments of `smc`.

    Raises:
        TypeError, ValueError: what is wrong, what was got and what was expected.
    """
    if unknown:
        known = ", ".join(SMCOptions.__annotations__)
        raise TypeError(f"an option must be one of {known}; got {', '.join(unknown)}")
    check_count("n_particles", n_particles, 1)
    check_count("max_bytes", max_bytes, 1)
    check_threshold(ess_threshold)
    proposal, twist = _both(lookahead, proposal, twist)
    leaves: list[Any] = []
    rows = compile_rows(target, leaves)
    _check_target(leaves, terminated=terminate_when is not None)
    rolls, judge = Rollout.of(rollout), None
    if draft is not None:
        beside = {"proposal": proposal, "twist": twist, "tempering": tempering}
        target, proposal, judge = split(target, draft, block, beside)
        rolls = Rollout.of(block) if rollout is None else rolls
        leaves = []
        rows = compile_rows(target, leaves)
    n_target = len(leaves)
    if isinstance(proposal, Ahead):
        proposal_of: Combine | None = proposal_rows(rows, place_of(proposal, leaves), proposal)
    else:
        proposal_of = None if proposal is None else compile_rows(proposal, leaves)
    weighers: list[Weigher] = [] if terminate_when is None else [Ending(terminate_when)]
    at_ends = (rolls.n_bytes, n_particles * rolls.candidates, terminate_when)
    if judge is not None:
        weighers.append(Judge(judge, ess_threshold > 0, *at_ends))
    if critic is not None:
        weighers.append(Critic(critic, twist_with_critic and ess_threshold > 0, *at_ends))
    weighers += _twists(target, twist, tempering, leaves)
    _check_moves(rejuvenate, rolls, record)
    strings = strings_of(resample_at)
    others = {"rollout": rollout, "rejuvenate": rejuvenate, "tempering": tempering, "draft": draft}
    unshared = {"share_beams": None if share_beams else False}
    if strings:
        _refuse(
            "with resample_at particles wait for others, so their texts differ in length",
            {**others, **unshared},
            (proposal, twist),
        )
    if distinct:
        method = None if resampling_method == "systematic" else resampling_method
        _refuse(
            "distinct=True chooses texts before they are read, in place of drawing and resampling "
            "particles",
            {**others, "resample_at": resample_at, "record": record or None, **unshared,
             "resampling_method": method},
        )  # fmt: skip
    if not share_beams and not random_beams(leaves):
        raise ValueError(
            'share_beams=False needs a language model with prune="unbiased": other beams of '
            "equal texts do not differ"
        )
    state = _resumed(resume, (n_particles, rolls.candidates), max_bytes, seed, beam_seed)
    _check_horizon(state, max_bytes, twist, waits=bool(strings))
    return Plan(
        potential=target,
        leaves=tuple(leaves),
        names=names_of(leaves),
        n_target=n_target,
        target=rows,
        exponents=rows.exponents(len(leaves)),
        proposal=proposal_of,
        weighers=tuple(weighers),
        engines=engines_of([*leaves, *[p for weigher in weighers for p in weigher.potentials]]),
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
        resample_at=strings,
        record=record,
        resume=state,
        distinct=bool(distinct),
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


def _check_horizon(state: SMCState | None, max_bytes: int, twist: Any, *, waits: bool) -> None:
    """Raise if what is resumed has given up texts that are possible now."""
    had = None if state is None else state.max_bytes
    if waits and had not in (None, max_bytes):
        raise ValueError(
            f"max_bytes must be {had}, as in what is resumed, got {max_bytes}: with resample_at "
            "particles come to it at different steps"
        )
    if had is not None and had < max_bytes and getattr(twist, "max_bytes", None) == "run":
        raise ValueError(
            f"max_bytes must be at most {had}, as in what is resumed, got {max_bytes}: the twist "
            "looks to the run's limit and has given up texts that are longer. Make it with "
            "Lookahead(max_bytes=...) of the largest limit, or None, before a run that shall go on"
        )


def _both(lookahead: Any, proposal: Any, twist: Any) -> tuple[Any, Any]:
    """Return proposal and twist, which a look-ahead is both of.

    Raises:
        TypeError, ValueError: no look-ahead, or one besides a proposal or a twist.
    """
    if lookahead is None:
        return proposal, twist
    if isinstance(lookahead, str) and lookahead == "auto":
        raise ValueError('lookahead="auto" is an option of smc and smc_repeat alone')
    if not isinstance(lookahead, Ahead):
        raise TypeError(f'lookahead must be None, "auto" or a Lookahead, got {lookahead!r}')
    if proposal is not None or twist is not None:
        raise ValueError(
            "lookahead is proposal and twist at once, so neither can be given besides it"
        )
    return lookahead, lookahead


def _twists(target: Any, twist: Any, tempering: Any, leaves: list[Any]) -> list[Weigher]:
    """Return the weighers that `twist` and `tempering` name.

    Raises:
        TypeError, ValueError: what is wrong with them.
    """
    if twist is not None and not isinstance(twist, Ahead):
        raise TypeError(f"twist must be a Lookahead, got {type(twist).__name__}")
    out: list[Weigher] = []
    if twist is not None:
        at = place_of(twist, leaves)
        out.append(Twist(at, twist.strength, names_of(leaves)[at]))
    schedule = schedule_of(tempering)
    if schedule is not None:
        out.append(Tempering(schedule, [f for f in factors_of(target) if _gradable(f)]))
    return out


def _gradable(factor: Any) -> bool:
    """Return whether a factor has prefix weights between 0 and 1 that are its own."""
    return not has_language_model(factor) and not isinstance(factor, ByteDFA | ByteMatcher)


def _check_moves(rejuvenate: Any, rollout: Rollout, record: bool) -> None:
    if rejuvenate is not None and not isinstance(rejuvenate, Suffix):
        raise TypeError(f"rejuvenate must be a Suffix, got {rejuvenate!r}")
    if record and (rejuvenate is not None or rollout.candidates > 1):
        raise ValueError(
            "record=True notes what each particle read byte by byte, which neither rejuvenate "
            "nor a roll-out of several candidates leaves as it was"
        )


def _refuse(reason: str, options: dict[str, Any], ahead: Sequence[Any] = ()) -> None:
    """Raise if any of these options is given, or any of `ahead` is a look-ahead, and say why."""
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    given += ["a Lookahead" for x in ahead if isinstance(x, Ahead)]
    if given:
        raise ValueError(f"{reason}, which does not go with {', '.join(given)}")


def _resumed(
    resume: Any,
    sizes: tuple[int, int],
    max_bytes: int,
    seed: int | None,
    beam_seed: int | None,
) -> SMCState | None:
    """Return the state to go on from, None for a new run; its seeds are those of the run."""
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
    read = int(state.particles.length.max())
    if max_bytes < read:
        raise ValueError(
            f"max_bytes must be at least the {read} bytes read so far, got {max_bytes}"
        )
    for name, given, had in (("seed", seed, state.seed), ("beam_seed", beam_seed, state.beam_seed)):
        if given is not None and given != had:
            raise ValueError(f"{name} must be {had}, as in what is resumed; got {given}")
    return state


def check_ends(potential: Any) -> None:
    """Raise if a byte language model has no token that ends a text.

    A mean of positive order needs an end under one of its members only, and is not looked at.

    Raises:
        ValueError: so it is, and every text would weigh zero.
    """
    if isinstance(potential, PowerMean) and potential.order <= 0:
        leaves: list[Any] = []
        for member in potential.members:
            compile_rows(member, leaves)
        for leaf in leaves:
            check_ends(leaf)
    params = getattr(potential, "params", None)
    if isinstance(params, BeamParams) and not params.eos:
        raise ValueError(
            f"no token of {name_of(potential)} ends a text, so every text has weight zero: name "
            "eos_byte_strings in its beam parameters, or end texts by terminate_when"
        )
