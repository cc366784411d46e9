"""From scored candidates to preference pairs, with the figures that tell whether the sampler did anything."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from apprentice.demonstrations import Demonstration, digest, prompt_id
from apprentice.rejection import Accepted, any_sample, make_pairs, rejection_sample
from apprentice.sections import PairsConfig
from tasks.candidates import Candidate, scores
from tasks.stage import StageError


def pick_prompts(pool: Sequence[Demonstration], count: int, seed: int) -> list[Demonstration]:
    """`count` prompts of the pool, chosen by hash: more prompts keep those already chosen."""
    return sorted(pool, key=lambda row: digest([seed, prompt_id(row.prompt)]))[:count]


def requests_of(rows: Sequence[Demonstration], tokenizer: Any, candidates: int) -> list[Any]:
    """One sampling request for each candidate, prompt by prompt."""
    from apprentice.sampling import Request
    from apprentice.tokens import encode_prompts

    encoded = encode_prompts(tokenizer, [row.prompt for row in rows])
    return [Request(ids, prompt_id(row.prompt), n) for ids, row in zip(encoded, rows, strict=True) for n in range(candidates)]


def _counts(group: Sequence[Candidate], rewards: Sequence[float], accepted: Accepted, config: PairsConfig) -> Counter[str]:
    """What is counted of one prompt's candidates; a reward of minus infinity is that of an unfinished one."""
    best = max(rewards)
    return Counter(
        accepted=len(accepted.positions),
        trials=accepted.trials,
        hits=accepted.hits,
        rounds=accepted.rounds,
        unfinished=sum(not row["ended"] for row in group),
        lower=sum(float("-inf") < reward < best for reward in rewards),
        lower_hits=sum(rewards[i] < best for i in accepted.positions[: accepted.hits]),
        short=len(accepted.positions) < config.accepted,
    )


def choose_pairs(
    groups: Sequence[Sequence[Candidate]], config: PairsConfig, seed: int, tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rejection-sample each prompt's candidates (`sft_sample_rank`: take any) and pair those accepted.

    Candidates cut off before the end token are left out; a pair of identical texts is dropped. Returns rows in TRL's
    preference form and the figures. Tells where rejection accepted at first but the best of each prompt. Raises StageError
    when no pair is left.
    """
    pairs: list[dict[str, Any]] = []
    totals = Counter[str]()
    reward, gap = 0.0, 0.0
    for group in groups:
        rewards = scores(group)
        rng = random.Random(f"{seed}/pairs/{group[0]['prompt_id']}")
        if config.source == "sft_sample_rank":
            accepted = any_sample(rewards, config.accepted, rng)
        else:
            accepted = rejection_sample(rewards, config.accepted, config.beta, rng)
        totals += _counts(group, rewards, accepted, config)
        top = sorted((r for r in rewards if r > float("-inf")), reverse=True)[: len(accepted.positions)]
        reward += sum(rewards[i] for i in accepted.positions)
        gap += sum(top) - sum(rewards[i] for i in accepted.positions)
        for chosen, rejected in make_pairs(accepted.positions, rewards, config.pairing, rng):
            if group[chosen]["response"] == group[rejected]["response"]:
                totals["identical"] += 1
            else:
                pairs.append(preference(group[chosen], group[rejected]))
    if not pairs:
        raise StageError(
            f"no pair survived: {totals['accepted']} candidates accepted, {totals['identical']} pairs of identical texts, "
            f"{totals['unfinished']} of {sum(map(len, groups))} candidates unfinished. Raise pairs.max_new_tokens, "
            "pairs.candidates or pairs.temperature"
        )
    if config.source == "rso_sample_rank" and config.beta and totals["lower"] and not totals["lower_hits"]:
        tell(
            f"of {totals['lower']} candidates below their prompt's best the first round accepted none: at pairs.beta "
            f"{config.beta:g} rejection takes the best ones only; raise it"
        )
    return pairs, {
        "pairs": len(pairs),
        "acceptance_rate": round(totals["hits"] / max(1, totals["trials"]), 6),
        "rounds": round(totals["rounds"] / len(groups), 6),
        "accepted_reward": round(reward / max(1, totals["accepted"]), 6),
        "gap_to_top_k": round(gap / max(1, totals["accepted"]), 6),
        "pairs_dropped_identical": totals["identical"],
        "candidates_unfinished": totals["unfinished"],
        "prompts_short": totals["short"],
        "margin": round(sum(p["chosen_score"] - p["rejected_score"] for p in pairs) / len(pairs), 6),
    }


def preference(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    """One row that TRL's preference trainers read too."""
    return {
        "prompt": chosen["prompt"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_score": chosen["reward"],
        "rejected_score": rejected["reward"],
    }


def summary(figures: dict[str, Any]) -> str:
    """One line on what the sampler did."""
    return (
        f"{figures['pairs']} pairs; first-round acceptance {figures['acceptance_rate']:.2f}, {figures['rounds']:.1f} rounds, "
        f"accepted reward {figures['accepted_reward']:.3f}, {figures['gap_to_top_k']:.3f} below the top; dropped "
        f"{figures['pairs_dropped_identical']} identical pairs, {figures['candidates_unfinished']} unfinished candidates"
    )
