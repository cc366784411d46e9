"""Task arithmetic in memory: identities on tiny models, facts worked by hand, and what is refused."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from apprentice.tokens import train_word_tokenizer
from apprentice.vectors import (
    Vector,
    add,
    check_configs,
    check_tokenizers,
    cosine,
    difference,
    facts,
    random_vector,
    with_norms_of,
)
from tests.apprentice.toys import hash_of, tiny_llama


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def double(seed: int, **changes: Any) -> Any:
    return tiny_llama(seed, **changes).double()


def vector_of(*values: Sequence[float], names: str = "abc") -> Vector:
    return Vector({name: torch.tensor(value) for name, value in zip(names, values, strict=False)}, (), {})


def test_V1_minus_plus_the_vector_is_plus() -> None:
    plus, minus = tiny_llama(1), tiny_llama(2)
    exact = add(copy.deepcopy(minus), difference(plus, minus, dtype=torch.float64), 1.0)
    assert same(exact, plus)  # the difference of two float32 numbers of like size is exact in float64
    ids = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(exact(ids).logits, plus(ids).logits)
    single = difference(plus, minus)
    near = add(copy.deepcopy(minus), single, 1.0)
    for name, wanted in parameters(plus).items():
        bound = 2.0**-23 * (wanted.abs() + single.tensors[name].abs())  # one rounding of each of the two operations
        assert ((parameters(near)[name] - wanted).abs() <= bound).all(), name
    assert torch.allclose(near(ids).logits, plus(ids).logits, atol=1e-4)


def test_V2_nothing_added_changes_nothing() -> None:
    target = tiny_llama(3)
    before = hash_of(target)
    assert add(target, difference(tiny_llama(1), tiny_llama(2)), 0.0) is target
    assert hash_of(target) == before


def test_V2_adding_and_taking_away_is_the_identity() -> None:
    target, vector = double(3), difference(double(1), double(2), dtype=torch.float64)
    before = parameters(target)
    add(target, vector, 0.7)
    assert not same(target, double(3))
    add(target, vector, -0.7)
    assert all(torch.allclose(before[name], tensor, rtol=0, atol=1e-14) for name, tensor in parameters(target).items())


def test_V2_vectors_commute_and_add_up() -> None:
    a = difference(double(1), double(2), dtype=torch.float64)
    b = difference(double(4), double(5), dtype=torch.float64)
    one, other, halves = double(3), double(3), double(3)
    add(add(one, a, 1.0), b, -0.5)
    add(add(other, b, -0.5), a, 1.0)
    for _ in range(2):
        add(add(halves, a, 0.5), b, -0.25)
    for x, y, z in zip(one.parameters(), other.parameters(), halves.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-14) and torch.allclose(x, z, rtol=0, atol=1e-14)
    assert not same(one, double(3))


def test_V3_tied_embeddings_take_the_vector_once() -> None:
    plus, minus, target = (tiny_llama(seed, tie_word_embeddings=True) for seed in (1, 2, 3))
    wanted = parameters(target)["model.embed_tokens.weight"] + 2 * (
        parameters(plus)["model.embed_tokens.weight"] - parameters(minus)["model.embed_tokens.weight"]
    )
    vector = difference(plus, minus)
    assert "lm_head.weight" not in vector.tensors
    add(target, vector, 2.0)
    assert target.lm_head.weight is target.model.embed_tokens.weight
    assert torch.allclose(target.lm_head.weight, wanted, atol=1e-6)


def test_V3_memory_shared_under_two_parameters_takes_the_vector_once() -> None:
    plus, minus, target = (tiny_llama(seed, tie_word_embeddings=False) for seed in (1, 2, 3))
    for model in (plus, minus, target):
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    step = parameters(plus)["lm_head.weight"] - parameters(minus)["lm_head.weight"]
    wanted = parameters(target)["lm_head.weight"] + 2 * step
    vector = difference(plus, minus)
    assert "lm_head.weight" not in vector.tensors
    add(target, vector, 2.0)
    assert torch.allclose(target.lm_head.weight, wanted, atol=1e-6)
    assert torch.equal(target.lm_head.weight, target.model.embed_tokens.weight)


def test_V3_buffers_stay_as_the_target_has_them() -> None:
    target, donors = tiny_llama(3), [tiny_llama(1), tiny_llama(2)]
    for value, model in enumerate([target, *donors]):
        model.register_buffer("steps", torch.tensor([7 + value]))
        model.register_buffer("scale", torch.tensor([0.5 + value]))
    add(target, difference(*donors), 1.0)
    assert target.steps.tolist() == [7] and target.scale.tolist() == [0.5]


def test_V4_tensors_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is \[4, 16\] in plus, \[5, 16\] in minus"):
        difference(tiny_llama(1), tiny_llama(2, vocab=5))
    with pytest.raises(ValueError, match=r"lm_head\.weight is absent in plus, \[4, 16\] in minus"):
        difference(tiny_llama(1), tiny_llama(2, tie_word_embeddings=False))
    deeper = r"9 tensors differ: model\.layers\.2\..* is absent in the vector, .*; and 4 more"  # a layer has 9
    with pytest.raises(ValueError, match=deeper):
        add(tiny_llama(3, num_hidden_layers=3), difference(tiny_llama(1), tiny_llama(2)), 1.0)


def test_V4_a_foreign_architecture_is_refused_by_the_names_that_differ() -> None:
    shape = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2, tie_word_embeddings=True))
    with pytest.raises(
        ValueError, match=r"6 tensors differ: model\.layers\.0\.self_attn\.q_proj\.bias is absent in the vector"
    ):
        add(qwen, difference(tiny_llama(1), tiny_llama(2)), 1.0)  # biases of q, k, v in two layers
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight is \[4, 16\] in plus, absent in minus"):
        difference(gpt, tiny_llama(1))


def test_V4_equal_shapes_with_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads is 2 in plus, 4 in minus"):
        difference(tiny_llama(1), tiny_llama(2, num_attention_heads=4, num_key_value_heads=4, head_dim=4))
    assert check_configs({"a": {"rope_theta": 1e4, "dtype": "float32"}, "b": {"rope_theta": 1e6, "dtype": "bfloat16"}}) == [
        "config: rope_theta is 10000.0 in a, 1000000.0 in b"
    ]


def test_V4_whole_numbers_and_quantised_weights_are_refused() -> None:
    packed = tiny_llama(2)
    packed.model.norm.weight = nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \[16\] in plus, \[16\] of whole numbers in minus"):
        difference(tiny_llama(1), packed)
    quantised = tiny_llama(2)
    quantised.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="minus is quantised"):
        difference(tiny_llama(1), quantised)


def bpe(merges: list[tuple[str, str]], lowercase: bool = False, **changes: Any) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", "a", "b", "c", "ab", "bc"])}
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if lowercase:
        model.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=model, **{"unk_token": "<unk>", "eos_token": "<eos>", **changes})


def test_V4_tokenizers_that_encode_otherwise_are_refused() -> None:
    ours = bpe([("a", "b"), ("b", "c")])
    assert check_tokenizers({"plus": ours, "minus": bpe([("a", "b"), ("b", "c")])}) == []
    with pytest.raises(ValueError, match="of plus and target differ in their merges"):
        check_tokenizers({"plus": ours, "minus": ours, "target": bpe([("b", "c"), ("a", "b")])})
    with pytest.raises(ValueError, match="normalizer"):
        check_tokenizers({"plus": ours, "minus": bpe([("a", "b"), ("b", "c")], lowercase=True)})
    words = train_word_tokenizer(["one two"], 2)
    with pytest.raises(ValueError, match=r"differ in 2 tokens: 'three'; 'two'"):
        check_tokenizers({"plus": words, "minus": train_word_tokenizer(["one three"], 2, ["one"])})
    added = train_word_tokenizer(["one two"], 2)
    added.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(ValueError, match="differ in 1 tokens: '<think>'"):
        check_tokenizers({"plus": words, "minus": added})


def test_templates_and_roles_may_differ_and_are_told() -> None:
    merges = [("a", "b"), ("b", "c")]
    templated = bpe(merges)
    templated.chat_template = "{{ messages }}"
    assert check_tokenizers({"plus": bpe(merges), "target": templated}) == ["chat templates of plus and target differ"]
    (note,) = check_tokenizers({"plus": bpe(merges), "target": bpe(merges, eos_token="c")})
    assert note.startswith("special tokens: ") and "'<eos>'" in note and "'c'" in note


def test_V5_the_control_has_the_norms_of_the_vector() -> None:
    plus, minus = tiny_llama(1), tiny_llama(2)
    minus.model.norm.weight.data.copy_(plus.model.norm.weight)
    vector = difference(plus, minus)
    noise = random_vector(vector, 5)
    assert noise.tensors.keys() == vector.tensors.keys()
    for name, tensor in vector.tensors.items():
        squares = sum(x * x for x in tensor.flatten().tolist())
        assert sum(x * x for x in noise.tensors[name].flatten().tolist()) == pytest.approx(squares, rel=1e-5), name
    assert not noise.tensors["model.norm.weight"].any() and noise.exclude == vector.exclude
    count = sum(tensor.numel() for tensor in vector.tensors.values())
    assert abs(cosine(vector, noise)) < 4 / count**0.5
    again = Vector(dict(reversed(vector.tensors.items())), (), {})  # whatever the order
    assert all(torch.equal(tensor, random_vector(again, 5).tensors[name]) for name, tensor in noise.tensors.items())
    assert abs(cosine(noise, random_vector(vector, 6))) < 4 / count**0.5
    one, other = random_vector(vector_of([1.0, 2.0], [1.0, 2.0]), 5).tensors.values()
    assert not torch.equal(one, other)  # each tensor has noise of its own


def test_another_vector_at_the_norms_of_the_first_by_hand() -> None:
    # norms 5, 13, 1 and 0; the control's 2, 1, 0 and 2
    vector = vector_of([3.0, 4.0], [5.0, -12.0], [1.0, 0.0], [0.0, 0.0], names="abcd")
    control = Vector(vector_of([0.0, -2.0], [0.6, 0.8], [0.0, 0.0], [2.0, 0.0], names="abcd").tensors, ("*norm*",), {"x": 1})
    found = with_norms_of(vector, control)
    wanted = {"a": [0.0, -5.0], "b": [7.8, 10.4], "c": [0.0, 0.0], "d": [0.0, 0.0]}
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: pytest.approx(values, rel=1e-6) for name, values in wanted.items()
    }
    assert (found.exclude, found.config) == (control.exclude, control.config)
    assert control.tensors["a"].tolist() == [0.0, -2.0]  # left as it was
    with pytest.raises(ValueError, match=r"a is .* in the vector, .* in the control"):
        with_norms_of(vector, vector_of([1.0], names="a"))


def test_the_control_is_gaussian() -> None:
    n = 40_000
    noise = random_vector(vector_of([2.0] * n), 0).tensors["a"] / 2
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500)):  # of a standard normal
        assert abs(float((noise.abs() < bound).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_bf16_weights_are_added_in_float32_and_cast_once() -> None:
    plus, minus, target = (tiny_llama(seed).bfloat16() for seed in (1, 2, 3))
    before = parameters(target)
    vector = difference(plus, minus)
    add(target, vector, 0.25)
    coarse = 0
    for name, got in parameters(target).items():
        delta = parameters(plus)[name].double() - parameters(minus)[name].double()
        assert vector.tensors[name].dtype == torch.float32 and got.dtype == torch.bfloat16
        assert torch.equal(got, (before[name].double() + 0.25 * delta).bfloat16()), name
        rough = before[name] + 0.25 * (parameters(plus)[name] - parameters(minus)[name])
        coarse += int((rough != got).sum())
    assert coarse > 100  # what arithmetic in bfloat16 would get otherwise


def test_excluded_names_stay() -> None:
    target = tiny_llama(3)
    before = parameters(target)
    add(target, difference(tiny_llama(1), tiny_llama(2), ["*embed*", "*.mlp.*"]), 1.0)
    moved = {name for name, tensor in parameters(target).items() if not torch.equal(tensor, before[name])}
    assert moved and all("self_attn" in name for name in moved)  # norms are 1 in each model, so their step is 0
    assert len(moved) == 8


def test_excluded_names_need_not_agree() -> None:
    vector = difference(tiny_llama(1), tiny_llama(2, vocab=5), ["*embed_tokens*"])
    assert not any("embed" in name for name in vector.tensors)


def test_a_pattern_that_matches_nothing_or_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tensor name matches '\*lm_haed\*'; names are like model\.embed_tokens"):
        difference(tiny_llama(1), tiny_llama(2), ["*lm_haed*"])
    with pytest.raises(ValueError, match="leave no tensor"):
        difference(tiny_llama(1), tiny_llama(2), ["*"])


def test_what_is_not_finite_is_refused_and_the_target_left_alone() -> None:
    plus, target = tiny_llama(1), tiny_llama(3).half()
    vector = difference(plus, tiny_llama(2))
    before = hash_of(target)
    with pytest.raises(ValueError, match=r"the target plus 1e\+06 times the vector is not finite in torch\.float16"):
        add(target, vector, 1e6)
    assert hash_of(target) == before
    plus.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: plus - minus is not finite"):
        difference(plus, tiny_llama(2))


class Weights(nn.Module):
    """Stands for a model: layers of one row each, and a bias of 0."""

    def __init__(self, *layers: Sequence[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(len(row), 1, bias=False) for row in layers)
        for layer, row in zip(self.layers, layers, strict=True):
            layer.weight.data = torch.tensor([row])
        self.bias = nn.Parameter(torch.zeros(1))


def test_facts_by_hand() -> None:
    # layers (6, 0) and (8, 0) move by (3, 0) and (0, 4): norm 5 of 10; the bias moves by 12 from 0: norm 13 of 10
    tensors = {"layers.0.weight": torch.tensor([[3.0, 0]]), "layers.1.weight": torch.tensor([[0, 4.0]])}
    vector = Vector({**tensors, "bias": torch.tensor([12.0])}, (), {})
    found = facts(vector, Weights([6.0, 0.0], [8.0, 0.0]), "chain")  # type: ignore[arg-type]
    assert (found.lineage, found.tensors, found.elements, found.changed) == ("chain", 3, 5, 3 / 5)
    assert found.norm == pytest.approx(13) and found.relative_norm == pytest.approx(1.3)
    assert found.groups["layers.*.weight"] == pytest.approx((5, 0.5))
    assert found.groups["bias"] == (pytest.approx(12), None)
    assert found.vanishing == {"bfloat16": 0, "float16": 0}


def test_what_half_precision_loses_by_hand() -> None:
    # near 1 the grid of bfloat16 is 2^-7 and that of float16 2^-10; a step under half of it is lost
    steps = torch.tensor([[2.0**-9, 2.0**-12, 2.0**-3, 0.0]])
    vector = Vector({"layers.0.weight": steps, "bias": torch.zeros(1)}, (), {})
    found = facts(vector, Weights([1.0, 1.0, 1.0, 1.0]), "")  # type: ignore[arg-type]
    assert found.vanishing == {"bfloat16": pytest.approx(2 / 3), "float16": pytest.approx(1 / 3)}
    still = Vector({"layers.0.weight": 0 * steps, "bias": torch.zeros(1)}, (), {})
    nothing = facts(still, Weights([1.0] * 4), "")  # type: ignore[arg-type]
    assert nothing.vanishing == {"bfloat16": None, "float16": None} and nothing.norm == 0


def test_cosine_by_hand() -> None:
    assert cosine(vector_of([3.0], [4.0]), vector_of([4.0], [3.0])) == pytest.approx(24 / 25)
    assert cosine(vector_of([3.0, 4.0]), vector_of([-6.0, -8.0])) == pytest.approx(-1)
    with pytest.raises(ValueError, match="no direction"):
        cosine(vector_of([3.0]), vector_of([0.0]))
    with pytest.raises(ValueError, match="b is"):
        cosine(vector_of([3.0], [1.0]), vector_of([3.0]))
