"""Our sampler against `generate`, natural stop, at 16 to 1024 rows. Ours records log-probabilities too.

The rounds that are not measured are enough for its trace of a model's step, a tenth of a second once (`apprentice.replay`).
"""

from collections.abc import Callable

import torch

from apprentice.sampling import Request, sample
from benchmarks.measure import Side, alternate
from benchmarks.results import Results
from benchmarks.shapes import computing, computing_plainly, make, material
from benchmarks.worker import Figures, Prepare

ROWS = (16, 64, 256, 1024)
LIMIT = {"tiny": 48, "wide": 16}  # tokens of a response


def family(results: Results, runs: int) -> None:
    """Both shapes, all numbers of rows."""
    for shape in ("tiny", "wide"):
        make(shape)
        for rows in ROWS:
            options = {"shape": shape, "rows": rows}
            sides = {
                f"ours_{rows}": Side("benchmarks.sampling:ours", options),
                f"generate_{rows}": Side("benchmarks.sampling:generate", options),
            }
            results.compare(f"sampling/{shape}", alternate(sides, runs, warm_up=3), ours=f"ours_{rows}")


def ours(shape: str, rows: int) -> Prepare:
    """Our sampler, one response to each prompt."""
    given, compute = material(shape), computing()
    model = given.model("sft")

    def prepare(repeat: int) -> Callable[[], Figures]:
        requests = [Request(prompt, str(i)) for i, prompt in enumerate(given.prompts[:rows])]

        def draw() -> Figures:
            rollout = sample(model, requests, seed=str(repeat), end=given.end, max_new_tokens=LIMIT[shape], compute=compute)
            return {"tokens": float(rollout.batch.response_lengths.sum()), "ended": float(rollout.ended.float().mean())}

        return draw

    return prepare


def generate(shape: str, rows: int) -> Prepare:
    """`generate` on the whole batch, padded on the left."""
    given = material(shape)
    computing_plainly()
    model = given.plain_model("sft")
    prompts = given.prompts[:rows]
    width, end, pad = max(map(len, prompts)), given.end, given.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    attended = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def prepare(repeat: int) -> Callable[[], Figures]:
        torch.manual_seed(repeat)

        def draw() -> Figures:
            drawn = model.generate(
                input_ids=ids,
                attention_mask=attended,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=LIMIT[shape],
                eos_token_id=end,
                pad_token_id=pad,
            )[:, width:]
            ended = (drawn == end).any(1)
            lengths = torch.where(ended, (drawn == end).int().argmax(1) + 1, drawn.size(1))
            return {"tokens": float(lengths.sum()), "ended": float(ended.float().mean())}

        return draw

    return prepare
