"""Estimates of memory and disk: by hand on a made-up shape, counted on real configurations, measured on a model that fills."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from apprentice.compute import Compute
from apprentice.footprint import Shape, footprint, shape_of
from tests.apprentice.toys import tiny_llama

SHAPE = Shape(parameters=1000, layers=2, width=8, inner=20, vocabulary=50, cache_width=16)
SMALLER = Shape(parameters=10, layers=1, width=8, inner=20, vocabulary=50, cache_width=16)
COMPUTE = Compute(torch.device("cpu"), torch.float32, forward_tokens=10, cache_tokens=100)


def test_training_by_hand() -> None:
    """Logits 10 * 50 * 4 * 2, a piece that is all of them * 3, activations 10 * (36 * 8 + 16 * 20) bytes * 2 layers: 22160,
    more than the cache's 2 * 16 * 100 * 4."""
    found = footprint([SHAPE], [SMALLER], COMPUTE, samples=True)
    assert found.certain == 16 * 1000 + 4 * 10
    assert found.memory == found.certain + 22160 + 12 * 1000
    assert found.disk == 2 * 4 * 1000 + 2 * 12 * 1000


def test_a_snapshot_takes_nothing_of_a_device_beside_the_machines_memory() -> None:
    on_cuda = dataclasses.replace(COMPUTE, device=torch.device("cuda"))
    assert footprint([SHAPE], [SMALLER], on_cuda, samples=True).memory == 16 * 1000 + 4 * 10 + 4000 + 6000 + 12160


def test_sampling_by_hand() -> None:
    """Nothing is written but rows; a cache of 200 tokens is larger than a pass of 10 * 50 * 4 * (1 + 3) + 6080."""
    found = footprint([], [SHAPE, SMALLER], dataclasses.replace(COMPUTE, cache_tokens=200), samples=True)
    assert (found.certain, found.memory, found.disk) == (4040, 4040 + 25600, 0)
    assert footprint([], [SHAPE, SMALLER], COMPUTE, samples=False).memory == 4040 + 8000 + 6080


def test_of_many_logits_a_piece_is_in_float32() -> None:
    """In bfloat16 10 * 2^27 numbers of 2 bytes, and 2^26 on a CUDA device three times in float32."""
    compute = dataclasses.replace(COMPUTE, device=torch.device("cuda"), dtype=torch.bfloat16)
    large = dataclasses.replace(SHAPE, vocabulary=2**27)
    found = footprint([], [large], compute, samples=False)
    assert found.memory == found.certain + 10 * 2**27 * 2 + 3 * 4 * 2**26 + 10 * (26 * 8 + 8 * 20)


def test_models_written_untrained_by_hand() -> None:
    """Each in 4 bytes a parameter of the largest, and once more in DVC's cache."""
    assert footprint([], [SHAPE, SMALLER], COMPUTE, samples=False, written=3).disk == 3 * 2 * 4 * 1000
    half = dataclasses.replace(COMPUTE, dtype=torch.bfloat16)
    assert footprint([], [SHAPE, SMALLER], half, samples=False, written=3).certain == 4 * 1010  # added up in float32


def test_activations_computed_again_by_hand() -> None:
    """Those of one layer, 10 * (36 * 8 + 16 * 20) bytes, and the inputs of both, 4 bytes * 10 * 8 each."""
    again = dataclasses.replace(COMPUTE, gradient_checkpointing=True)
    found = footprint([SHAPE], [SMALLER], again, samples=False)
    assert found.memory == found.certain + 10000 + 6080 + 640 + 12 * 1000
    assert footprint([], [SHAPE], again, samples=False) == footprint([], [SHAPE], COMPUTE, samples=False)


def test_a_critic_is_trained_too_and_only_one_model_is_written() -> None:
    found = footprint([SHAPE, SHAPE], [], COMPUTE, samples=True)
    assert found.certain == 2 * 16 * 1000 and found.disk == 2 * 4 * 1000 + 2 * 12 * 2000


SPREAD = dataclasses.replace(SHAPE, rest=600)  # and 200 in each of its layers


def test_training_spread_over_processes_by_hand() -> None:
    """A quarter of 32040 bytes; beside it the pass of 22160 as above and 12 bytes of each of 600 + 2 * 200 parameters: more
    than a model of 4000 bytes and its cache; a quarter of the one snapshot."""
    found = footprint([SPREAD, SPREAD], [SMALLER], COMPUTE, samples=True, processes=4)
    assert found.certain == (2 * 16 * 1000 + 4 * 10) // 4 == 8010
    assert found.memory == 8010 + 22160 + 12 * 1000 + 12 * 2000 // 4
    assert found.disk == footprint([SPREAD, SPREAD], [SMALLER], COMPUTE, samples=True).disk


def test_a_model_that_samples_is_whole_beside_the_parts_by_hand() -> None:
    """4000 bytes of it and the cache of 2 * 16 * 1000 * 4; without one, a pass of 10 * 50 * 4 * (1 + 3) + 6080."""
    found = footprint([], [SPREAD, SMALLER], dataclasses.replace(COMPUTE, cache_tokens=1000), samples=True, processes=2)
    assert (found.certain, found.memory) == (2020, 2020 + 4000 + 128000)
    assert footprint([], [SPREAD, SMALLER], COMPUTE, samples=False, processes=2).memory == 2020 + 4000 + 8000 + 6080


def test_weights_that_were_cast_stay_for_the_way_back_unless_it_is_computed_again() -> None:
    """2 bytes of each of the 1000 parameters, half the bytes of logits, 10 * (26 * 8 + 8 * 20) of activations in a layer."""
    cast = dataclasses.replace(COMPUTE, device=torch.device("cuda"), dtype=torch.bfloat16, cache_tokens=1)
    found = footprint([SPREAD], [], cast, samples=False, processes=2)
    assert found.memory == 8000 + 12 * 1000 + 10 * 50 * (2 * 2 + 3 * 4) + 3680 * 2 + 2 * 1000
    again = footprint([SPREAD], [], dataclasses.replace(cast, gradient_checkpointing=True), samples=False, processes=2)
    assert again.memory == found.memory - 2 * 1000 - 3680 + 4 * 10 * 8 * 2


def test_mixed_precision_by_hand() -> None:
    """Of what is frozen 600 parameters in 4 bytes, 400 in 2; what is trained once more in 2, beside a pass, or a cache."""
    half = dataclasses.replace(COMPUTE, device=torch.device("cuda"), dtype=torch.bfloat16)
    found = footprint([SHAPE], [SPREAD], half, samples=True)
    assert found.certain == 16 * 1000 + 4 * 600 + 2 * 400
    assert found.memory == found.certain + 2 * 1000 + 10 * 50 * (2 * 2 + 3 * 4) + 2 * 3680
    sampling = footprint([SHAPE], [SPREAD], dataclasses.replace(half, cache_tokens=1000), samples=True)
    assert sampling.memory == found.certain + 2 * 1000 + 2 * 16 * 1000 * 2


def test_vllm_has_a_copy_and_its_cache_throughout_by_hand() -> None:
    """4000 bytes of the largest model and the cache of 2 * 16 * 1000 * 4, beside a pass of 10 * 50 * 4 * (1 + 3) + 6080."""
    compute = dataclasses.replace(COMPUTE, cache_tokens=1000, sampler="vllm")
    found = footprint([], [SPREAD, SMALLER], compute, samples=True)
    assert (found.certain, found.memory) == (4040 + 4000 + 128000, 4040 + 4000 + 128000 + 8000 + 6080)
    assert footprint([], [SPREAD, SMALLER], compute, samples=False).certain == 4040


def test_a_shape_counts_what_the_model_has_tied_weights_once() -> None:
    model = tiny_llama(0, vocab=12, num_key_value_heads=1)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert shape_of(model.config) == Shape(expected, 2, 16, 32, 12, 2 * 1 * 8, rest=12 * 16 + 16)  # embedding and last norm
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_names_of_other_families_are_understood() -> None:
    gpt2 = shape_of(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40, n_positions=16))
    assert (gpt2.layers, gpt2.width, gpt2.inner, gpt2.vocabulary, gpt2.cache_width) == (3, 32, 128, 40, 64)


def test_a_large_model_is_estimated_without_being_made() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    assert shape_of(config).parameters == 6_738_415_616  # the published count of Llama 7B


MEASURED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from apprentice.footprint import footprint, shape_of
from apprentice.compute import Compute
from apprentice.logps import token_logps
torch.set_num_threads(1)


def peak():  # of this process alone: what getrusage tells begins with its parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


config = LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
warm = LlamaForCausalLM(tiny)
warm(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
before = peak()
compute = Compute(torch.device("cpu"), torch.float32, forward_tokens=1024)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(8000, (8, 128))
for _ in range(2):
    optimizer.zero_grad()
    (-token_logps(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).mean()).backward()
    optimizer.step()
copy = [value.clone() for value in model.parameters()] + [v.clone() for s in optimizer.state.values() for v in s.values()]
used = peak() - before
print(footprint([shape_of(config)], [], compute, samples=False).memory / used)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_estimate_is_near_what_a_process_takes() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert 0.6 < float(done.stdout) < 1.7, done.stdout
