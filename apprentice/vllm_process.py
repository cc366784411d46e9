"""The program that `apprentice.engine` runs under a Python that has vLLM. It imports nothing of this package.

Its argument is what vLLM's `LLM` is made with, as JSON. Each line of its input is a batch as JSON, each line of its output the
answer; what vLLM prints goes to the standard error.
When the input ends, as it does when its caller was killed, it removes the folder that the model's lies in.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm

    settings = json.loads(sys.argv[1])
    engine = vllm.LLM(**settings)
    print(json.dumps(vllm.__version__), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(vllm, engine, **json.loads(line))), file=answers)
    shutil.rmtree(Path(settings["model"]).parent, ignore_errors=True)


def answer(
    vllm: Any, engine: Any, reload: bool, prompts: list[list[int]], seeds: list[int], end: int, limit: int, temperature: float
) -> list[list[list[float]]]:
    """Token ids and log-probabilities of a response to each prompt; `reload`: the weights in the folder are others by now."""
    if reload:
        engine.collective_rpc("reload_weights")
        engine.reset_prefix_cache()
    settings = [
        vllm.SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=limit,
            stop_token_ids=[end],
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        for seed in seeds
    ]
    found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    drawn = [each.outputs[0] for each in found]
    return [
        [list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)]]
        for one in drawn
    ]


if __name__ == "__main__":
    main()
