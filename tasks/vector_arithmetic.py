"""Task arithmetic on checkpoint folders: OUT = TARGET + COEFFICIENT * (PLUS - MINUS).

All folders must hold one architecture with one tokenizer, as safetensors. The target is MINUS unless named. Without --out
nothing is written: the facts of PLUS - MINUS are printed, such as how much of it half precision would lose.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from apprentice.vector_folders import Checkpoint, FolderVector
    from apprentice.vectors import Facts

EXAMPLES = """examples:
  give a model what reinforcement learning taught its sibling:
    python -m tasks.vector_arithmetic --plus rl --minus sft --target chat --out chat-reasoning
  the subtraction test, and the control with noise of the same norms:
    python -m tasks.vector_arithmetic --plus rl --minus sft --target chat --coefficient -1 --out chat-less
    python -m tasks.vector_arithmetic --plus rl --minus sft --target chat --random-control 0 --out chat-noise
  half the way back from a fine-tuned model to its base:
    python -m tasks.vector_arithmetic --plus sft --minus base --coefficient 0.5 --out halfway
"""


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="python -m tasks.vector_arithmetic",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--plus", type=Path, required=True, metavar="PLUS", help="the donor that has what is wanted")
    made.add_argument("--minus", type=Path, required=True, metavar="MINUS", help="the donor without it")
    made.add_argument("--target", type=Path, metavar="TARGET", help="the model that gets it (default: MINUS)")
    made.add_argument("--coefficient", type=number, default=1.0, metavar="C", help="how much of it; negative takes away (1)")
    made.add_argument("--out", type=Path, metavar="OUT", help="the new checkpoint folder; must not exist")
    made.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="tensor names that stay as the target has them, quoted, e.g. '*embed_tokens*' '*norm*'",
    )
    made.add_argument(
        "--random-control", type=int, metavar="SEED", help="add noise, each tensor with the norm of PLUS - MINUS, instead"
    )
    made.add_argument(
        "--lineage",
        default="not told",
        metavar="TEXT",
        help="noted in the card: parallel (both donors from one model) or chain (PLUS was trained from MINUS)",
    )
    return made


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    asked = parser().parse_args(arguments)
    try:
        work(asked)
    except (ValueError, OSError) as error:
        print(f"vector_arithmetic: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def work(asked: argparse.Namespace) -> None:
    """Compare, print the facts, and write OUT if it is named. Raises ValueError for what cannot be done."""
    from transformers.utils.logging import set_verbosity_error

    from apprentice.foreign_checkpoint import try_out
    from apprentice.vector_folders import Checkpoint, add_to_folder, check_alike, folder_difference, place_of

    set_verbosity_error()
    if asked.out and asked.out.exists():
        raise ValueError(f"{asked.out} exists; name a folder that does not")
    try_out(*dict.fromkeys(place_of(folder) for folder in (asked.plus, asked.minus, asked.target or asked.minus)))
    parts = {"plus": Checkpoint(asked.plus), "minus": Checkpoint(asked.minus)}
    parts["target"] = Checkpoint(asked.target) if asked.target else parts["minus"]
    _, notes = check_alike(parts, asked.exclude)
    vector = folder_difference(parts["plus"], parts["minus"], asked.exclude, asked.random_control)
    facts = vector.facts(asked.lineage)
    if not facts.norm:
        raise ValueError(f"{asked.plus} and {asked.minus} are equal in every tensor that takes part: there is nothing to add")
    print("\n".join([*told(facts), *(f"note: {note}" for note in notes)]))
    if not asked.out:
        return
    lost = add_to_folder(
        parts["target"], vector, asked.coefficient, asked.out, lambda share: card(asked, parts, vector, facts, notes, share)
    )
    print(f"wrote {asked.out}" + (f"; {lost:.1%} of the step is lost to rounding in the target's dtype" if lost else ""))


def told(facts: "Facts") -> list[str]:
    """The facts in lines."""
    lines = [
        f"{facts.tensors} tensors, {facts.elements:,} elements of which {facts.changed:.1%} differ; lineage: {facts.lineage}",
        f"norm {facts.norm:.6g}, {relative(facts.relative_norm)} of MINUS",
        "lost if stored as " + ", ".join(f"{half} {share:.1%}" for half, share in facts.vanishing.items() if share is not None),
    ]
    width = max(map(len, facts.groups))
    return lines + [f"  {name:<{width}}  {norm:<12.6g} {relative(part)}" for name, (norm, part) in facts.groups.items()]


def relative(share: float | None) -> str:
    """A share of a norm; a norm of 0 has none."""
    return "new" if share is None else f"{share:.4g}"


def card(
    asked: argparse.Namespace,
    parts: "dict[str, Checkpoint]",
    vector: "FolderVector",
    facts: "Facts",
    notes: list[str],
    lost: float | None,
) -> str:
    """The model card of OUT: what was added to what, with hashes."""
    from dataclasses import asdict

    from apprentice.policy import file_hashes

    hashes = {role: file_hashes(part.folder) for role, part in parts.items()}
    origin = "".join(
        f"- {role}: `{part.folder}`\n" + "".join(f"  - `{f.name}` sha256 {hashes[role][f.name]}\n" for f in part.weight_files())
        for role, part in parts.items()
    )
    kind = "plus - minus" if vector.random_seed is None else f"noise of its norms, seed {vector.random_seed}"
    figures = {**asdict(facts), "lost_to_rounding": lost}
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [apprentice, task-arithmetic]\n---\n\n"
        f"# {asked.out.name}\n\nMade by `tasks.vector_arithmetic` of Apprentice: the target plus {asked.coefficient:g} times "
        f"the vector ({kind}), added in float32.\n\n"
        f"## Made from\n\n{origin}\n"
        f"Left out: {', '.join(f'`{pattern}`' for pattern in vector.exclude) or 'nothing'}\n\n"
        + "".join(f"Note: {note}\n\n" for note in notes)
        + f"## The vector\n\n```json\n{json.dumps(figures, indent=2)}\n```\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
