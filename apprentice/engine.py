"""vLLM as the sampler (`compute.sampler: vllm`): a process of its own, with a copy of the model that is sampled from.

It has its own Python, since vLLM pins PyTorch and transformers. Weights go there through files, in the precision that is
computed in, before each batch of rollouts; requests and responses through its standard input and output.
"""

import atexit
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from apprentice import vllm_process
from apprentice.compute import Compute, vllm_python
from apprentice.footprint import shape_of
from apprentice.lora import Role
from apprentice.policy import weights

_WRITTEN = ("dtype", "architectures", "_name_or_path")  # entries of a configuration that saving a model elsewhere adds
ALWAYS_TIED = ("gemma", "gemma2")  # types of models whose head is the embedding in vLLM, whatever their configuration says
PATIENCE = 10  # seconds that it has to end by itself


@dataclass(frozen=True)
class Drawn:
    """ids: the response to each request, the end token included. logps: of each token, as vLLM computed it."""

    ids: list[list[int]]
    logps: list[list[float]]


class Engine:
    """A running vLLM for models of one configuration. Raises RuntimeError, with the errors that it told, once it has died."""

    def __init__(self, model: PreTrainedModel, compute: Compute) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="apprentice-vllm-", ignore_cleanup_errors=True)
        folder = Path(self.place.name)
        self.said = folder / "said.txt"
        self.model_folder, self.compute = folder / "model", compute
        self._write(model)
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [str(vllm_python()), vllm_process.__file__, json.dumps(self._settings(model))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=_environment(compute),
                start_new_session=True,  # Ctrl-C is for the stage, which finishes its step
            )
        self.version, self.stale = self._read(), False

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, end: int, max_new_tokens: int, temperature: float
    ) -> Drawn:
        """A response to each prompt from the weights written last, each by its own seed."""
        asked = {"reload": self.stale, "prompts": [list(ids) for ids in prompts], "seeds": list(seeds)}
        line = json.dumps(asked | {"end": end, "limit": max_new_tokens, "temperature": temperature})
        assert self.process.stdin
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._death() from None
        answers, self.stale = self._read(), False
        return Drawn([ids for ids, _ in answers], [logps for _, logps in answers])

    def load(self, model: PreTrainedModel) -> None:
        """Sample from these weights from now on."""
        self._write(model)
        self.stale = True

    def close(self) -> None:
        """End the process, and remove the copy of the model."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.place.cleanup()

    def _settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """Arguments of vLLM's LLM: the cache has room for `cache_tokens`, and nothing is read but weights and configuration."""
        compute, shape, text = self.compute, shape_of(model.config), model.config.get_text_config()
        longest = min(getattr(text, "max_position_embeddings", compute.cache_tokens), compute.cache_tokens)
        on_cpu = {  # whole prompts: of one that is read in parts its CPU code loses the seed, and fails
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(longest, compute.forward_tokens),
        }
        return {
            "model": str(self.model_folder),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": str(compute.dtype).removeprefix("torch."),
            "max_model_len": longest,
            "kv_cache_memory_bytes": compute.cache_tokens * shape.layers * shape.cache_width * compute.dtype.itemsize,
            "gpu_memory_utilization": 0.01,  # only asked for before it starts, where the cache has its size: the rest is taken
            "logprobs_mode": "processed_logprobs",
            **(on_cpu if compute.device.type == "cpu" else {}),
        }

    def _write(self, model: PreTrainedModel) -> None:
        whole = model.whole if isinstance(model, Role) else model
        tensors = {name: tensor.to("cpu", self.compute.dtype, copy=True) for name, tensor in _plain(model)}
        head = _tied_head(whole) if self.compute.device.type == "cpu" else None
        entries = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
        if head:  # on a CPU vLLM packs it, and reloads a tied one into the embedding alone
            tensors[head] = tensors[_name_of(whole, whole.get_input_embeddings())].clone()
            entries["tie_word_embeddings"] = False
        self.model_folder.mkdir(exist_ok=True)  # by hand, since save_pretrained writes in the first process of a team alone
        save_file(revert_weight_conversion(whole, tensors), self.model_folder / "model.safetensors", {"format": "pt"})
        (self.model_folder / "config.json").write_text(json.dumps(entries))

    def _read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> RuntimeError:
        code = self.process.wait()
        lines = self.said.read_text(errors="replace").splitlines()
        told = "\n".join(([line for line in lines if "Error" in line] or lines)[-5:])
        return RuntimeError(f"vLLM's process ended with {code}; set compute.sampler: own to do without it. It said:\n{told}")


_running: dict[str, Engine] = {}


def engine_with(model: PreTrainedModel, compute: Compute) -> Engine:
    """The engine of this process with a model's weights in it: one of the same configuration goes on, another one ends.

    Raises ValueError for what is no single model (a mixture of several).
    """
    if not isinstance(model, PreTrainedModel | Role):
        raise ValueError(f"compute.sampler: vllm samples from one model, got {type(model).__name__}; set it to own")
    form = {name: value for name, value in model.config.to_dict().items() if name not in _WRITTEN}
    key = f"{form} {compute.device} {compute.dtype} {compute.cache_tokens}"
    running = _running.get(key)
    if running and running.process.poll() is None:
        running.load(model)
    else:
        close_engine()
        _running[key] = Engine(model, compute)
    return _running[key]


@atexit.register
def close_engine() -> None:
    """End the engine of this process, if there is one."""
    while _running:
        _running.popitem()[1].close()


def _environment(compute: Compute) -> dict[str, str]:
    """Of this process, without its path of modules; what vLLM sees of the machine is what this process of a team has of it."""
    said = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    if compute.device.type == "cpu":
        said["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    if compute.device.type == "cuda":
        devices = said.get("CUDA_VISIBLE_DEVICES")
        said["CUDA_VISIBLE_DEVICES"] = devices.split(",")[compute.team.rank] if devices else str(compute.team.rank)
    return said


def _plain(model: PreTrainedModel) -> Iterable[tuple[str, torch.Tensor]]:
    """The weights of a model by the names of its checkpoint; of a role those that its adapter makes."""
    return model.trunk.weights_with(model.name) if isinstance(model, Role) else weights(model).items()


def _tied_head(model: PreTrainedModel) -> str | None:
    """The name that the head's weight would have, where it is that of the embedding and need not be in vLLM."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    return _name_of(model, head) if tied and model.config.model_type not in ALWAYS_TIED else None


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)
