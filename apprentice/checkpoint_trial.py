"""What `apprentice.foreign_checkpoint` runs in a process of its own: `python -m apprentice.checkpoint_trial FOLDER...`.

Each part is announced on standard output, then tried within a limit of CPU seconds, at which the kernel ends the process, and
of memory. A refusal is the last line, with exit code 3. The chat template is rendered for a few chats. Transformers renders in
jinja2's sandbox, which keeps a template from files and from Python's internals but bounds neither nested loops nor growth.
"""

import resource
import signal
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import set_verbosity_error

from apprentice.foreign_checkpoint import other_layers, weight_places

SECONDS = {"config": 20, "tokenizer": 60, "chat template": 10}  # of CPU; honest ones need a hundredth
BYTES_PER_SECOND = 50_000_000  # of weights, on a slow disk and CPU
MEMORY = 4 * 2**30  # beyond what is taken when the trial begins
CHUNK = 2**22  # elements looked at at once
REFUSED = 3
GROWTH = 2**16  # characters a template may add to what is said
SAID = "How much is 2 + 2? "
ROLES = (["user"], ["system", "user"], ["user", "assistant", "user"], ["user", "assistant"] * 10 + ["user"])


def build(folder: Path) -> PreTrainedModel:
    """The architecture of config.json, no weight allocated, every shape held against the files."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a hostile config makes a library raise
        raise ValueError(f"{folder}: config.json describes no model that can be built ({_line(error)})") from error
    if others := other_layers(config):
        raise ValueError(
            f"{folder}: it has layers that are no attention ({', '.join(others)}), and cannot be sampled from here"
        )
    stored = _shapes(folder)
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        shape = stored.get(name, stored.get(name.removeprefix(prefix)))
        if shape is not None and shape != list(parameter.shape):
            raise ValueError(f"{folder}: {name} is {list(parameter.shape)} by config.json, {shape} in the file")
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(torch.Size(shape).numel() for shape in stored.values())
    if wanted > held:
        raise ValueError(f"{folder}: config.json describes {wanted:,} parameters, the files hold {held:,}")
    return model


def read_tokenizer(folder: Path, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer, which needs an end token and no more tokens than the model embeds."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer.decode(tokenizer(SAID, add_special_tokens=False)["input_ids"])
    except Exception as error:  # the same
        raise ValueError(f"{folder}: no tokenizer that can be read ({_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no end-of-text token (eos_token), so that no response could end")
    token, place = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if place >= rows:
        raise ValueError(f"{folder}: its tokenizer has token {token!r} at {place}, its model embeds {rows} tokens only")
    return tokenizer


def render(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Render the chat template for a few chats; it may refuse roles, but not a single user message."""
    if tokenizer.chat_template is None:
        return
    for roles in ROLES:
        for said in (SAID, SAID * 500):
            chat = [{"role": role, "content": said} for role in roles]
            try:
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # the same
                if roles != ROLES[0] and type(error).__name__ == "TemplateError":  # its own `raise_exception`
                    continue
                raise ValueError(f"{folder}: its chat template cannot be rendered ({_line(error)})") from error
            if len(text) > GROWTH + 4 * len(said) * len(roles):
                raise ValueError(f"{folder}: its chat template makes {len(text):,} characters of {len(said) * len(roles):,}")


def check_finite(folder: Path) -> None:
    """Look at every weight once."""
    for name, file in weight_places(folder).items():
        with safe_open(file, framework="pt") as opened:
            for part in opened.get_tensor(name).flatten().split(CHUNK):
                if not part.float().isfinite().all():
                    raise ValueError(f"{folder}: {name} holds numbers that are NaN or infinite")


def trial(folder: Path) -> None:
    """Everything in turn. Raises ValueError with the reason to refuse the folder."""
    begin(folder, "config", SECONDS["config"])
    model = build(folder)
    begin(folder, "tokenizer", SECONDS["tokenizer"])
    tokenizer = read_tokenizer(folder, model.get_input_embeddings().weight.size(0))
    begin(folder, "chat template", SECONDS["chat template"])
    render(folder, tokenizer)
    size = sum(file.stat().st_size for file in set(weight_places(folder).values()))
    begin(folder, "weights", 60 + size // BYTES_PER_SECOND)
    check_finite(folder)


def begin(folder: Path, part: str, seconds: int) -> None:
    """Announce a part and give it its CPU seconds; without a handler the signal ends the process, even inside C."""
    print(f"{folder}: its {part}", flush=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory() -> None:
    """Bound what the process may take from here on; only Linux tells how much that is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        taken = int(statm.read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of each stored tensor."""
    found = {}
    for name, file in weight_places(folder).items():
        with safe_open(file, framework="pt") as opened:
            found[name] = opened.get_slice(name).get_shape()
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def main(folders: list[str]) -> int:
    """Try folders in turn."""
    set_verbosity_error()
    torch.set_num_threads(1)
    limit_memory()
    try:
        for folder in folders:
            trial(Path(folder))
    except ValueError as error:
        print(error)
        return REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
