"""The sampler: what a draw depends on, and whether it follows the model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.decoding import draw, prefill, uniforms
from apprentice.policy import score
from apprentice.sampling import SLOTS, Request, Rollout, row_key, sample
from tests.apprentice.toys import END, LIMIT, SMALL, VOCAB, enumerate_responses, enumerated, markov, naive_logps, tiny_llama

PROMPTS = [[0, 5, 7], [1], [2, 2, 2, 4, 9], [0, 5, 7], [8, 1]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(5, vocab=12)


def run(model: LlamaForCausalLM, requests: Sequence[Request], limit: int = 8, seed: str = "0", **options: object) -> Rollout:
    return sample(model, requests, seed=seed, end=END, max_new_tokens=limit, **options)


def texts(rollout: Rollout) -> list[list[int]]:
    """The ids of each response."""
    rows = zip(rollout.batch.responses.tolist(), rollout.batch.response_lengths.tolist(), strict=True)
    return [ids[:n] for ids, n in rows]


@contextmanager
def passes(model: LlamaForCausalLM) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the ids that go through a model."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def requests(count: int) -> list[Request]:
    return [Request(PROMPTS[i % 5], f"key {i % 5}", i // 5) for i in range(count)]


def splitmix64(key: int, position: int) -> float:
    """The published generator in Python's whole numbers: state key + (position + 1) times the golden gamma."""
    wrap = 2**64
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) % wrap
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % wrap
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % wrap
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_uniforms_are_splitmix64() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), row_key("0", Request([1], "k"))]
    positions = [0, 1, 47, 100_000]
    wanted = [[splitmix64(key, position) for position in positions] for key in keys]
    assert uniforms(torch.tensor(keys), torch.tensor(positions)).tolist() == wanted


def test_the_first_output_of_seed_0_is_the_published_one() -> None:
    assert uniforms(torch.tensor([0]), torch.tensor([0])).tolist() == [[(0xE220A8397B1DCDAF >> 11) / 2**53]]


def test_uniforms_are_uniform_over_rows_and_over_positions() -> None:
    rows = torch.tensor([row_key("seed", Request([1], "key", i)) for i in range(4000)])
    assert kstest(uniforms(rows, torch.tensor([3])).flatten().numpy(), "uniform").pvalue > 1e-4
    positions = uniforms(rows[:1], torch.arange(4000))[0]
    assert kstest(positions.numpy(), "uniform").pvalue > 1e-4


def test_draw_inverts_the_cdf() -> None:
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(7, 4)  # the third token is impossible
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.9, 1 - 1e-12]).double()
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 3, 3, 3]


def test_a_draw_does_not_depend_on_batch_mates_order_or_chunks(model: LlamaForCausalLM) -> None:
    asked = requests(20)
    together = texts(run(model, asked))
    assert texts(run(model, asked, compute=SMALL)) == together
    assert texts(run(model, asked, compute=Compute(CPU.device, CPU.dtype, 50))) == together
    assert texts(run(model, asked[::-1])) == together[::-1]
    assert [texts(run(model, [request]))[0] for request in asked[:5]] == together[:5]


def test_a_shorter_limit_cuts_the_same_response(model: LlamaForCausalLM) -> None:
    long, short = run(model, requests(20), limit=8), run(model, requests(20), limit=3)
    assert texts(short) == [ids[:3] for ids in texts(long)]


def test_G6_the_seed_and_the_key_decide(model: LlamaForCausalLM) -> None:
    asked = requests(20)
    first = texts(run(model, asked))
    assert texts(run(model, asked)) == first
    assert texts(run(model, asked, seed="1")) != first
    assert texts(run(model, [Request(r.prompt, "other " + r.key, r.sample) for r in asked])) != first
    assert len({row_key(s, Request([0], k, n)) for s in "01" for k in ("a", "b") for n in range(50)}) == 200


def test_samples_of_one_prompt_share_its_prefill_and_differ(model: LlamaForCausalLM) -> None:
    with passes(model) as shapes:
        rollout = run(model, [Request([0, 5, 7], "k", n) for n in range(16)] + [Request([1], "l")])
    assert shapes[0] == (2, 3)  # two distinct prompts
    assert shapes[1][1] == 1
    assert len({tuple(ids) for ids in texts(rollout)}) > 8


def test_prompts_are_read_in_passes_of_similar_length_within_the_budget(model: LlamaForCausalLM) -> None:
    asked = requests(20)
    with passes(model) as shapes:
        rollout = run(model, asked, compute=Compute(CPU.device, CPU.dtype, forward_tokens=6))
    assert shapes[:3] == [(1, 5), (2, 3), (1, 1)]  # of five tokens; of three and two; of one
    assert texts(rollout) == texts(run(model, asked))
    assert torch.allclose(rollout.logps, score(model, rollout.batch), atol=1e-4)


@torch.no_grad()
def test_prompts_in_any_order_end_before_the_room_for_responses(model: LlamaForCausalLM) -> None:
    prompts = [[1], [0, 5, 7], [2, 2, 2, 4, 9], [8, 1]]
    logits, attended, cache = prefill(model, prompts, 2, Compute(CPU.device, CPU.dtype, forward_tokens=6))
    assert attended.long().tolist() == [[0] * (5 - len(prompt)) + [1] * len(prompt) + [0, 0] for prompt in prompts]
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]), use_cache=True)
        assert torch.allclose(logits[row], alone.logits[0, -1], atol=1e-5)
        for part, own in zip(cache[::2], alone.past_key_values.layers, strict=True):
            assert torch.allclose(part[row, :, 5 - len(prompt) : 5], own.keys[0], atol=1e-5)
            assert not part[row, :, 5:].any()


def test_long_responses_keep_what_was_read_when_the_cache_grows() -> None:
    model = tiny_llama(5, vocab=12, initializer_range=0.1)
    rollout = run(model, requests(20), limit=50)
    assert int(rollout.batch.response_lengths.max()) > 2 * SLOTS["cpu"]
    assert torch.allclose(rollout.logps, score(model, rollout.batch), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_recorded_logps_are_those_of_the_training_forward(model: LlamaForCausalLM, temperature: float) -> None:
    rollout = run(model, requests(40), temperature=temperature)
    assert rollout.logps.shape == rollout.batch.mask.shape
    assert torch.allclose(rollout.logps, score(model, rollout.batch, temperature=temperature), atol=1e-4)
    ids = texts(rollout)[7]
    assert rollout.logps[7, : len(ids)].tolist() == pytest.approx(naive_logps(model, PROMPTS[2], ids, temperature), abs=1e-4)


def test_G1_left_padding_of_the_prompts_changes_nothing(model: LlamaForCausalLM) -> None:
    mates = [Request([1], "short"), Request([2] * 20, "long")]
    alone, padded = run(model, mates[:1]), run(model, mates)
    size = int(alone.batch.response_lengths[0])
    assert texts(padded)[0] == texts(alone)[0]
    assert torch.allclose(padded.logps[0, :size], alone.logps[0], atol=1e-5)


def test_greedy_is_the_argmax_loop_and_what_transformers_generates(model: LlamaForCausalLM) -> None:
    found = texts(run(model, requests(5), temperature=0.0))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        wanted: list[int] = []
        while len(wanted) < 8 and END not in wanted:
            with torch.no_grad():
                wanted.append(int(model(torch.tensor([prompt + wanted])).logits[0, -1].argmax()))
        assert ids == wanted
        stock = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        assert ids == stock[0, len(prompt) :].tolist()


def test_greedy_logps_are_the_models_own(model: LlamaForCausalLM) -> None:
    rollout = run(model, requests(5), temperature=0.0)
    assert torch.allclose(rollout.logps, score(model, rollout.batch), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(temperature: float) -> None:
    model = tiny_llama(7, vocab=6)
    rollout = run(model, [Request([0, 2], "k", n) for n in range(4000)], limit=1, temperature=temperature)
    seen = torch.bincount(rollout.batch.responses[:, 0], minlength=6)
    with torch.no_grad():
        wanted = (model(torch.tensor([[0, 2]])).logits[0, -1].double() / temperature).softmax(-1) * 4000
    assert wanted.min() > 5
    assert chisquare(seen.numpy(), wanted.numpy()).pvalue > 1e-4


def test_whole_responses_follow_the_model() -> None:
    model = tiny_llama(3)
    found = Counter(map(tuple, texts(run(model, [Request([0, 2], "k", n) for n in range(4000)], limit=LIMIT))))
    wanted = (score(model, enumerated()).double().sum(1).softmax(0) * 4000).tolist()
    seen = [found[tuple(ids)] for ids, _ in enumerate_responses()]
    assert sum(seen) == 4000  # nothing but what can be enumerated
    rare = [i for i, w in enumerate(wanted) if w < 5]
    common = [i for i in range(40) if i not in rare]
    pooled = [sum(v[i] for i in rare) for v in (seen, wanted)]
    assert chisquare([seen[i] for i in common] + pooled[:1], [wanted[i] for i in common] + pooled[1:]).pvalue > 1e-4


def test_finished_rows_leave_the_batch() -> None:
    # greedy: 0 -> end at once, 1 -> 2 -> 0 -> end
    following = torch.nn.functional.one_hot(torch.tensor([END, 2, 0, 0]), VOCAB)
    model = markov((30.0 * following).tolist())
    with passes(model) as shapes:
        rollout = run(model, [Request([n % 2], str(n)) for n in range(10)], temperature=0.0)
    assert shapes == [(2, 1), (5, 1), (5, 1)]
    assert texts(rollout) == [[END], [2, 0, END]] * 5


def test_finished_rows_never_continue(model: LlamaForCausalLM) -> None:
    rollout = run(model, requests(60), limit=10)
    lengths = rollout.batch.response_lengths.tolist()
    assert len(set(lengths)) > 3
    for ids, done in zip(texts(rollout), rollout.ended.tolist(), strict=True):
        assert END not in ids[:-1]
        assert done is (ids[-1] == END)
        assert done or len(ids) == 10
    assert (rollout.logps[rollout.batch.mask == 0] == 0).all()


def test_the_limit_leaves_a_response_unended() -> None:
    never = markov([[0.0, 0.0, 0.0, -50.0]] * VOCAB)
    rollout = run(never, [Request([0], "k", n) for n in range(5)], limit=4)
    assert not rollout.ended.any()
    assert rollout.batch.response_lengths.tolist() == [4] * 5
    assert END not in rollout.batch.responses
    last = markov([[-50.0, 0.0, -50.0, -50.0], [-50.0, -50.0, 0.0, -50.0], [-50.0, -50.0, -50.0, 0.0], [0.0] * 4])
    for limit, done in ((2, False), (3, True), (4, True)):  # 0 -> 1 -> 2 -> end
        rollout = run(last, [Request([0], "k")], limit=limit)
        assert rollout.ended.tolist() == [done]
        assert texts(rollout) == [[1, 2, END][:limit]]


def test_response_ids_leave_the_end_token_out(model: LlamaForCausalLM) -> None:
    rollout = run(model, requests(40), limit=4)
    assert 0 < int(rollout.ended.sum()) < 40
    for whole, ids, done in zip(texts(rollout), rollout.response_ids(), rollout.ended.tolist(), strict=True):
        assert ids == (whole[:-1] if done else whole)


def test_a_rollout_can_be_trained_on(model: LlamaForCausalLM) -> None:
    rollout = run(model, requests(4))
    assert not rollout.batch.ids.is_inference()
    assert not rollout.logps.is_inference()


def test_a_model_of_other_layers_than_attention_is_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match=r"MambaForCausalLM: it has layers that are no attention \(LinearAttentionLayer\)"):
        run(mamba, requests(2))


def test_no_request_is_an_error(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least one request"):
        run(model, [])
