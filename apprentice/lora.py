"""LoRA (2106.09685): several models as adapters on one frozen trunk, so that it is in memory once.

A `Role` is one of them, and does what a model does: it is called, sampled from, trained, frozen, saved. A deep copy of a role
is a new adapter on the same trunk that starts as the old one. `peft` adds and merges the adapters, and is imported only here.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from apprentice.demonstrations import digest
from apprentice.footprint import Shape, shape_of
from apprentice.foreign_checkpoint import read_json, tensor_names
from apprentice.sections import LoRAConfig

ADAPTER, TRUNK = "adapter", "trunk.json"  # a folder beside the merged weights, in PEFT's format; in it, what it stands on
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Trunk:
    """A model whose weights stay as they are, under adapters of one form; each call of a role switches to that role's.

    origin: what is written beside an adapter of which model it stands on. heads: modules of the model that the roles train
    whole (the score of a reward model). Raises ValueError where `config.targets` names no linear layer, or another one.
    """

    def __init__(
        self, model: PreTrainedModel, config: LoRAConfig, *, seed: str, origin: Mapping[str, str], heads: Sequence[str] = ()
    ) -> None:
        self.model, self.config, self.seed = model.eval().requires_grad_(False), config, seed
        self.origin, self.heads = origin, heads
        self.merged = False
        self._peft: Any = None
        self._layers: dict[str, Any] = {}
        self._active: str | None = None

    def role(self, folder: Path | None = None) -> "Role":
        """The frozen model that the adapter in `folder` makes of the trunk, or the trunk itself.

        Raises ValueError for an adapter of another form than the trunk's.
        """
        if folder is None:
            return Role(self, None)
        said, wanted = read_json(folder / _CONFIG), (self.config.rank, self.config.alpha)
        if (found := (said.get("r"), said.get("lora_alpha"))) != wanted:
            raise ValueError(
                f"{folder}: an adapter of rank and alpha {found}, and params.yaml says lora.rank and lora.alpha {wanted}; run "
                "the stage that made it again"
            )
        tensor_names(folder / _WEIGHTS)
        role, tensors = self.train(), load_file(folder / _WEIGHTS)
        own = {_peft_name(name): tensor for name, tensor in role.adapter.state_dict().items()}
        if wrong := sorted(name for name in own.keys() | tensors.keys() if _shape(own, name) != _shape(tensors, name)):
            raise ValueError(
                f"{folder}: the adapter fits not the layers of lora.targets ({self.config.targets}), first {wrong[0]}; run the "
                "stage that made it again"
            )
        role.adapter.load_state_dict({name: tensors[_peft_name(name)] for name in role.adapter.state_dict()})
        return role.requires_grad_(False)

    def train(self, start: "Role | None" = None) -> "Role":
        """A new role to train, equal to the role `start`, or else to the trunk."""
        name = f"role{len(self._peft.peft_config) if self._peft else 0}"
        with torch.random.fork_rng():
            torch.manual_seed(int(digest([self.seed, name])[:15], 16))
            self._add(name)
        role = Role(self, name)
        if start is not None and start.name is not None:
            role.adapter.load_state_dict(start.adapter.state_dict())
        return role

    def _add(self, name: str) -> None:
        """Add an adapter, which changes nothing yet: its second factor is zero."""
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            target_modules=self.config.targets,
            exclude_modules=list(self.heads) or None,
        )
        asked = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if self._peft is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what PEFT asks it
                    self._peft = get_peft_model(self.model, config, adapter_name=name)
            except ValueError as error:
                raise ValueError(f"lora.targets: {self.config.targets!r} names no layer of this model ({error})") from error
        else:
            self._peft.add_adapter(name, config)
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in asked)
        self._layers = {path: part for path, part in self.model.named_modules() if isinstance(part, BaseTunerLayer)}
        if other := [path for path, layer in self._layers.items() if name not in layer.lora_A]:
            raise ValueError(f"lora.targets: {self.config.targets!r} names {other[0]}, which is no linear layer")
        embedding = self.model.get_input_embeddings().weight
        if tied := [path for path, layer in self._layers.items() if layer.get_base_layer().weight is embedding]:
            raise ValueError(f"lora.targets: {self.config.targets!r} names {tied[0]}, whose weights are those of the embedding")
        self._switch(None)

    def parts_of(self, name: str) -> Iterator[tuple[str, nn.ModuleDict]]:
        """The two factors of an adapter in each layer, by the layer's path."""
        for path, layer in self._layers.items():
            yield path, nn.ModuleDict({"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]})

    def activate(self, name: str | None) -> None:
        """Make the model that of an adapter, or bare. Raises RuntimeError once the trunk is merged into a model."""
        if self.merged:
            raise RuntimeError("this trunk was merged into the model that was saved, and serves no other role any more")
        if name != self._active:
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        """PEFT makes the gradients follow the adapter that is active; here they follow who asked for them."""
        for layer in self._layers.values():
            asked = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            layer.set_adapter([] if name is None else [name], inference_mode=True)
            for parameter in asked:
                parameter.requires_grad_(True)
        self._active = name

    @torch.no_grad()
    def weights_with(self, name: str | None) -> Iterator[tuple[str, Tensor]]:
        """What an adapter makes of the trunk's weights, by their names in a checkpoint; the trunk stays as it is."""
        for path, weight in self.model.named_parameters():
            if ".lora_" not in path:
                layer = self._layers.get(path.removesuffix(".base_layer.weight"))
                added = 0.0 if layer is None or name is None else layer.get_delta_weight(name)
                yield path.replace(".base_layer.", "."), weight.detach() + added

    def merge(self, name: str) -> PreTrainedModel:
        """The plain model that an adapter makes; the trunk is used up, so that no copy of it is needed."""
        self.activate(name)
        self.merged = True
        self.model.float()
        model: PreTrainedModel = self._peft.merge_and_unload(adapter_names=[name])
        return model

    def about(self, name: str) -> dict[str, Any]:
        """An adapter's configuration in PEFT's format, in an order that is always the same."""
        said = self._peft.peft_config[name].to_dict()
        own = {"base_model_name_or_path": self.origin["path"], "task_type": "CAUSAL_LM", "inference_mode": True}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in (said | own).items()}


class Role(nn.Module):
    """One model on a trunk: its parameters are those of its adapter and of the heads it trains; without adapter, none.

    `base_model` is the same role below the head of the language model, as it is of a transformers model.
    """

    def __init__(self, trunk: Trunk, name: str | None, body: bool = False) -> None:
        super().__init__()
        self.trunk, self.name, self.body = trunk, name, body
        parts = trunk.parts_of(name) if name else ()
        self.adapter = nn.ModuleDict({path.replace(".", "/"): factors for path, factors in parts})
        for head in () if body or not name else trunk.heads:
            setattr(self, head, getattr(trunk.model, head))
        if not body:
            self.requires_grad_(name is not None)
        self.eval()

    @property
    def config(self) -> Any:
        """The configuration of the whole model."""
        return self.trunk.model.config

    @property
    def whole(self) -> PreTrainedModel:
        """The model that this role is an adapter of."""
        return self.trunk.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.trunk.model.device
        return device

    @cached_property
    def base_model(self) -> "Role":
        """The same weights, ending in hidden states."""
        return Role(self.trunk, self.name, body=True)

    def forward(self, **inputs: Any) -> Any:
        """What the model says with this role's adapter."""
        self.trunk.activate(self.name)
        return (self.trunk.model.base_model if self.body else self.trunk.model)(**inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Role":
        """A model of its own, to train, that starts equal: a new adapter on the same trunk."""
        copied = self.trunk.train(self)
        return copied.base_model if self.body else copied

    def get_memory_footprint(self) -> int:
        """Bytes of the model that `save_pretrained` writes."""
        return sum(4 * parameter.numel() for parameter in self.trunk.model.parameters())

    @property
    def settings(self) -> dict[str, Any]:
        """What a model card tells of the adapter."""
        config = self.trunk.config
        return {"lora": {"rank": config.rank, "alpha": config.alpha, "targets": config.targets, **self.trunk.origin}}

    def save_pretrained(self, folder: Path) -> None:
        """Write the merged model as any model, and the adapter beside it where the adapter is the whole difference.

        The trunk is used up by it: no role on it can be called afterwards.
        """
        assert self.name is not None
        if not self.trunk.heads:
            place = folder / ADAPTER
            place.mkdir(parents=True)
            tensors = {_peft_name(name): tensor.contiguous() for name, tensor in self.adapter.state_dict().items()}
            save_file(tensors, place / _WEIGHTS, metadata={"format": "pt"})
            for file, said in ((_CONFIG, self.trunk.about(self.name)), (TRUNK, dict(self.trunk.origin))):
                (place / file).write_text(json.dumps(said, indent=2, sort_keys=True, default=str) + "\n")
        self.trunk.merge(self.name).save_pretrained(folder)


def read_origin(folder: Path) -> dict[str, str] | None:
    """What the adapter in a model folder stands on, as it was told when written; None where the folder has no adapter."""
    place = folder / ADAPTER / TRUNK
    if not place.is_file():
        return None
    said: dict[str, str] = read_json(place)
    return said


def adapter_shape(config: PretrainedConfig, lora: LoRAConfig) -> Shape:
    """The shape of an adapter on such a model, neither being made. Raises ValueError where `lora.targets` fits it not."""
    whole = shape_of(config)
    with torch.device("meta"):
        role = Trunk(AutoModelForCausalLM.from_config(config), lora, seed="", origin={}).train()
    return replace(whole, parameters=sum(parameter.numel() for parameter in role.parameters()), trunk=whole.parameters)


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace("/", ".")


def _shape(tensors: Mapping[str, Tensor], name: str) -> Any:
    return tensors[name].shape if name in tensors else None
