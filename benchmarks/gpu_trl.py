"""TRL's side of the benchmark of one device, as release 1.12.0 does the work by itself, in its default, bf16 mixed precision.

Fine-tuning is `training_step` of SFTTrainer (its default loss, which skips the logits of the prompt), in micro-batches, without
the optimiser's step. Scoring and rollouts are the functions that PPOTrainer calls, and the update is PPOTrainer's as shipped,
with a critic that is a model of its own: it knows no other. What is trained is in float32; PPOTrainer puts autocast around
training alone, so this samples and values in float32 (TF32 on a card that has it), and what is frozen is loaded in bfloat16.
Where the shape has adapters, policy and critic are adapters by peft, each on a trunk of its own, and all models are in bfloat16
(14 GiB each of 7.6B): one frozen model serves as reference and as both models of the reward, whose three passes are all
computed. Rows of a pass leave room for the logits of all tokens drawn, which PPOTrainer holds to the end of an update.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo.ppo_trainer import batch_generation, forward, selective_log_softmax

from apprentice.compute import Compute
from apprentice.policy import freeze
from benchmarks.gpu_shapes import Shape, Work, build, texts
from benchmarks.ppo import EPOCHS, Workload
from benchmarks.ppo_trl import LogRatio, ValueModel, collated, trl_arguments
from benchmarks.shapes import MADE


def works(shape: Shape, compute: Compute) -> dict[str, Work]:
    """The same kinds of work as ours, by whatever algorithms are fastest."""
    torch.use_deterministic_algorithms(False)
    device = compute.device
    read, train = shape.read, shape.train * shape.read
    scored = 2 * 4 * read  # the reference, both models of the reward, and the critic
    return {
        "sft": Work(partial(_sft, shape, device), read, train),
        "scoring": Work(partial(_scoring, shape, device), read, 2 * read),
        "rollouts": Work(partial(_rollouts, shape, device), shape.drawn, 2 * read),
        "ppo": Work(partial(_ppo, shape, device), shape.drawn, 2 * read + scored + EPOCHS * 2 * train),
    }


def _sft(shape: Shape, device: torch.device) -> Callable[[], object]:
    rows = [{"input_ids": ids, "labels": [-100] * shape.prompt + ids[shape.prompt :]} for ids in texts(shape).tolist()]
    micro = min(shape.rows, 4 if shape.adapters else 8)
    arguments = SFTConfig(
        output_dir=str(MADE / "trl"),
        use_cpu=device.type == "cpu",
        bf16=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=micro,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        _policy(shape, device), arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(shape)
    )
    model = trainer.accelerator.prepare(trainer.model)
    batches = [trainer.data_collator(rows[start : start + micro]) for start in range(0, shape.rows, micro)]

    def fine_tune() -> None:
        model.zero_grad()
        for batch in batches:
            trainer.training_step(model, dict(batch), torch.tensor(shape.drawn, device=device))

    return fine_tune


def _scoring(shape: Shape, device: torch.device) -> Callable[[], object]:
    model, ids, pad = _frozen(shape, device), texts(shape).to(device), _tokenizer(shape).pad_token_id

    def score(some: Tensor) -> Tensor:
        logits = forward(model, some, pad).logits[:, shape.prompt - 1 : -1]
        logits /= 1.0 + 1e-7
        return selective_log_softmax(logits, some[:, shape.prompt :])

    return torch.no_grad()(lambda: [score(some) for some in ids.split(_at_once(shape))])


def _rollouts(shape: Shape, device: torch.device) -> Callable[[], object]:
    model, prompts = _policy(shape, device), texts(shape)[:, : shape.prompt].to(device)
    drawing = GenerationConfig(max_new_tokens=shape.response, temperature=1.0 + 1e-7, top_k=0.0, top_p=1.0, do_sample=True)
    return partial(batch_generation, model, prompts, _at_once(shape), _tokenizer(shape).pad_token_id, drawing)


def _ppo(shape: Shape, device: torch.device) -> Callable[[], object]:
    arguments = trl_arguments(
        Workload("", True, shape.response, shape.rows, 1, micro=min(shape.rows, 2 if shape.adapters else 8)),
        0,
        use_cpu=device.type == "cpu",
        bf16=True,
        local_rollout_forward_batch_size=_at_once(shape),
    )
    Accelerator(mixed_precision="bf16")  # PPOTrainer takes over what `accelerate launch` sets, and not what `bf16` says
    prompts = texts(shape)[:, : shape.prompt].tolist()
    critic, target = _critic(shape, device), _frozen(shape, device)
    trainer = PPOTrainer(
        args=arguments,
        processing_class=_tokenizer(shape),
        model=_policy(shape, device),
        ref_model=target,
        reward_model=LogRatio(target, target if shape.adapters else _frozen(shape, device), shape.prompt),
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": 2 * prompts}),  # after the last batch accelerate accumulates no more
        data_collator=collated,
    )
    return trainer.train


def _at_once(shape: Shape) -> int:
    """Rows of a forward pass without gradient, which makes the logits of all their tokens."""
    return 32 if shape.adapters else 64


def _policy(shape: Shape, device: torch.device) -> Any:
    model = build(shape, device, torch.bfloat16 if shape.adapters else torch.float32)
    return _with_adapters(model, task_type="CAUSAL_LM") if shape.adapters else model


def _critic(shape: Shape, device: torch.device) -> Any:
    critic = ValueModel(build(shape, device, torch.bfloat16 if shape.adapters else torch.float32))
    if shape.adapters:
        critic.model = _with_adapters(critic.model)
    return critic


def _frozen(shape: Shape, device: torch.device) -> Any:
    return freeze(build(shape, device, torch.bfloat16))


def _with_adapters(model: Any, **kind: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **kind))


def _tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Its two tokens are outside the models' vocabulary: neither can be drawn."""
    words = shape.entries["vocab_size"]
    known = Tokenizer(models.WordLevel({"<no pad>": words, "<no end>": words + 1}, unk_token="<no pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<no pad>", eos_token="<no end>")
