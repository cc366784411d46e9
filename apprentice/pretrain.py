"""The tiny base: a stock Llama trained from scratch on a stream of documents, so that a laptop has a base model at all."""

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from apprentice.compute import Compute
from apprentice.layers import set_layers
from apprentice.logps import token_logps
from apprentice.losses import next_token_loss
from apprentice.masking import length_mask
from apprentice.optimise import Optimiser, flat_then_decay
from apprentice.policy import weights
from apprentice.recorder import Recorder, Row, State
from apprentice.sections import PretrainConfig
from apprentice.tokens import encode_prompts, encode_responses, pad_id

Document = tuple[str, str]  # prompt, response
_BATCHES_AHEAD = 16  # documents are made and sorted by length this many batches at a time


def build_base(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model whose vocabulary is exactly the tokenizer's."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(base_config(config, tokenizer)).eval()


def base_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape of the tiny base."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        pad_token_id=pad_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Callable[[random.Random], Document],
    config: PretrainConfig,
    *,
    seed: int,
    compute: Compute,
    recorder: Recorder,
) -> None:
    """Train `model` in place on all tokens of documents drawn from `documents`. Rows: loss, learning_rate, tokens."""
    set_layers(model.to(compute.device), compute)
    optimiser = Optimiser(
        model.parameters(),
        config.learning_rate,
        max_grad_norm=1.0,
        schedule=flat_then_decay(config.steps, config.warmup_steps),
        weight_decay=config.weight_decay,
    )
    start = tokens = 0
    if saved := recorder.resume():
        model.load_state_dict(saved["model"], strict=False)
        optimiser.restore(saved["optimiser"])
        start, tokens = saved["step"], saved["tokens"]

    def state() -> State:
        return {"model": weights(model), "optimiser": optimiser.state(), "step": step, "tokens": tokens}

    for step, (ids, lengths) in enumerate(_batches(documents, tokenizer, config, seed, start), start + 1):
        ids, mask = ids.to(compute.device), length_mask(lengths - 1, ids.size(1) - 1).to(compute.device)
        with compute.autocast():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss, metrics = next_token_loss(token_logps(logits, ids[:, 1:]), mask)
        loss.backward()
        row: Row = {"loss": float(metrics["loss"]), "learning_rate": optimiser.rate}
        if recorder.takes(f"step {step} of {config.steps}", {**row, "grad_norm": optimiser.clip()}):
            optimiser.step()
            tokens += int(lengths.sum())
        else:
            optimiser.drop()
            row = dict.fromkeys(row)
        recorder.step(step, config.steps, {**row, "tokens": tokens}, state)
    recorder.over(state)


def _batches(
    documents: Callable[[random.Random], Document],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainConfig,
    seed: int,
    start: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded ids [B, L] and lengths [B] of each step from `start` on; a block's documents depend on its number alone."""
    for block in range(start // _BATCHES_AHEAD, -(-config.steps // _BATCHES_AHEAD)):
        rng = random.Random(f"{seed}/pretrain/{block}")
        made = [documents(rng) for _ in range(config.batch_size * _BATCHES_AHEAD)]
        prompts = encode_prompts(tokenizer, [prompt for prompt, _ in made])
        responses = encode_responses(tokenizer, [response for _, response in made])
        rows = sorted((p + r for p, r in zip(prompts, responses, strict=True)), key=len)
        groups = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        rng.shuffle(groups)
        for step, group in enumerate(groups, block * _BATCHES_AHEAD):
            if start <= step < config.steps:
                width = max(map(len, group))
                pad = pad_id(tokenizer)
                yield (
                    torch.tensor([row + [pad] * (width - len(row)) for row in group]),
                    torch.tensor(list(map(len, group))),
                )
