"""What differs between the two reports: that of the main line, and that of the main line and every further method."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from apprentice.method_sections import MethodSections

Curve = tuple[str, str, tuple[str, ...]]  # stage, title, columns of its history

READING = (
    "Each cell is a mean with its 95% interval over held-out prompts; accuracies are in per cent, losses, rewards and KL in "
    "nats. Differences are paired over the same prompts."
)
LABELS = (
    "Labels: what a model learned from beside demonstrations, itself or through the models it was made from, by the inputs "
    "that DVC knows: none (demonstrations alone), the verifier's verdicts, preference labels, or the "
    "qualities of rows that are no demonstrations."
)


@dataclass(frozen=True)
class Form:
    """One report. `sections` of params.yaml are on its page, each of them a dependency of the stage.

    Of the stages `trained` the history is read, of `measured` the metrics, and of `told` these are listed one by one.
    """

    file: str
    heading: str
    title: str
    reading: str
    style: str
    sections: tuple[str, ...]
    trained: tuple[str, ...]
    measured: tuple[str, ...]
    told: dict[str, str]
    curves: tuple[Curve, ...]


MAIN = Form(
    file="report",
    heading="report of seed",
    title="What alignment from demonstrations added",
    reading=READING,
    style="",
    sections=(  # `runtime` and `register` change no number
        *("seed", "compute", "ingest", "tokenizer", "validate", "pretrain", "sft", "sft_tuned", "srppo", "pairs", "rso"),
        *("evaluate", "report"),
    ),
    trained=("pretrain", "sft", "sft_tuned", "srppo", "rso"),
    measured=("sft", "sft_tuned", "srppo", "pairs"),
    told={"pairs": "Rejection sampling"},
    curves=(
        ("pretrain", "Pretraining: loss", ("loss",)),
        ("sft", "SFT: loss, nats per token", ("loss", "held_out_loss")),
        ("sft_tuned", "Tuned SFT: loss, nats per token", ("loss", "held_out_loss")),
        ("srppo", "SRPPO: self-reward, nats", ("reward",)),
        ("srppo", "SRPPO: KL, nats per response", ("kl_to_sft", "kl_to_base")),
        ("srppo", "SRPPO: response length, tokens", ("length",)),
        ("srppo", "SRPPO: reward by kind of token", ("reward_number", "reward_word", "reward_symbol", "reward_eos")),
        ("srppo", "SRPPO: slope of reward against length", ("reward_length_slope",)),
        ("srppo", "SRPPO: entropy, nats per token", ("entropy",)),
        ("rso", "RSO: loss", ("loss",)),
        ("rso", "RSO: margin", ("margin",)),
        ("rso", "RSO: accuracy on its pairs", ("accuracy",)),
    ),
)

CURVES = (  # of a further method, where its history has them
    ("loss", ("loss", "held_out_loss")),
    ("gate", ("gate",)),
    ("reward", ("reward",)),
    ("KL, nats per response", ("kl_to_sft", "kl_to_base")),
    ("response length, tokens", ("length",)),
    ("accuracy", ("accuracy",)),
    ("margin", ("margin",)),
    ("variance of reward and residual", ("reward_variance", "residual_variance")),
    ("verdicts that flip with the order", ("flip_rate",)),
    ("probability of beating the anchor", ("anchor_win_rate", "saturated")),
)
MANY = """\
main { max-width: 1320px; }
.big td { padding-top: 8px; padding-bottom: 8px; }
#kl .grid { grid-template-columns: 1fr; }
.answers { grid-auto-flow: row; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); row-gap: 26px; }
"""


def methods_form(stages: Sequence[str]) -> Form:
    """The report of every method; `stages` are those of methods/dvc.yaml behind the models in it."""
    return Form(
        file="methods",
        heading="every method, seed",
        title="Every method side by side",
        reading=f"{READING} {LABELS}",
        style=MANY,
        sections=("seed", "evaluate", "report", *(field.name for field in fields(MethodSections))),
        trained=tuple(stages),
        measured=tuple(stages),
        told={name: f"`{name}`" for name in stages},
        curves=tuple((name, f"{name}: {what}", columns) for name in stages for what, columns in CURVES),
    )
