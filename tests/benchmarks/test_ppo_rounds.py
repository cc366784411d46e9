"""What the PPO benchmark assumes of our PPO."""

from apprentice.compute import CPU
from apprentice.ppo import PPO
from benchmarks.ppo import Workload, order
from tests.apprentice.toys import pool, srppo_config, tiny_llama


def test_the_peer_is_given_the_prompts_that_ours_draws() -> None:
    prompts, work = pool(), Workload("tiny", False, 3, 5, 2, 1)
    config, scorers = srppo_config(batch_size=5), {"sft": tiny_llama(1), "base": tiny_llama(2)}
    trainer = PPO(tiny_llama(0), scorers, prompts, lambda *_: None, config, seed="7", compute=CPU)  # type: ignore[arg-type]
    drawn = []
    for trainer.iteration in range(2):
        drawn.append(list(trainer.sample().keys))
    assert drawn == [[prompts.keys[i] for i in rows] for rows in order(work, len(prompts.ids), "7")]
