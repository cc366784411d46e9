"""Pooling over seeds: by hand on two seeds of two prompts."""

from tasks.seeds import pool, study, table


def values(seed: int, *numbers: float) -> dict[str, dict[str, float]]:
    rows = {f"{seed}/{i}": number for i, number in enumerate(numbers)}
    return {
        f"{domain}/{metric}": rows
        for domain in ("in_domain", "out_of_domain")
        for metric in ("greedy_accuracy", "sampled_accuracy")
    }


SEEDS = {
    0: {"base": values(0, 0, 0), "sft": values(0, 1, 0)},
    1: {"base": values(1, 1, 0), "sft": values(1, 1, 1)},
}


def test_prompts_of_different_seeds_stay_apart() -> None:
    pooled = pool(SEEDS)
    assert pooled["sft"]["in_domain/greedy_accuracy"] == {"0/0": 1, "0/1": 0, "1/0": 1, "1/1": 1}


def test_differences_are_paired_and_pooled() -> None:
    result = study(SEEDS, ["base"])
    (found,) = [d for d in result["differences"] if d["metric"] == "in_domain/greedy_accuracy"]
    # paired differences 1, 0, 0, 1: mean 1/2, s = sqrt(1/3), t(3) = 3.18245, half width 3.18245 * sqrt(1/3) / 2
    assert found["model"] == "sft" and found["difference"] == 0.5
    assert abs(found["high"] - (0.5 + 3.18245 * (1 / 3) ** 0.5 / 2)) < 1e-4
    assert [found["difference"] for found in result["by_seed"]["0"] if found["metric"] == "in_domain/greedy_accuracy"] == [0.5]


def test_the_table_names_its_command_and_each_seed() -> None:
    text = table(study(SEEDS, ["base"]))
    assert "python -m tasks.seeds 0 1" in text and "| sft | base |" in text and "(+0.500 +0.500)" in text
