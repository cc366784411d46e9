"""Take in the real checkpoint that params.yaml names (pretrain.checkpoint): find or fetch it, inspect it, try it out."""

import re
from pathlib import Path

from apprentice.foreign_checkpoint import inspect_checkpoint, try_out
from apprentice.sections import PretrainConfig
from tasks.stage import Stage, StageError

FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # no weights in pickle, no code


def take_in(stage: Stage) -> Path:
    """The folder of the checkpoint, a hub's fetched first. Raises StageError with the reason when it is refused."""
    config = stage.params.pretrain
    folder = Path(config.checkpoint or "")
    if folder.exists():
        stage.expect_inside(folder, "pretrain.checkpoint")
    if not folder.is_dir():
        folder = _fetched(config)
    try:
        inspect_checkpoint(folder)
        try_out(folder)
    except ValueError as error:
        raise StageError(f"pretrain.checkpoint is refused: {error}") from None
    return folder


def _fetched(config: PretrainConfig) -> Path:
    """The hub's snapshot of a commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, revision = str(config.checkpoint), config.revision
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise StageError(
            f"pretrain.revision: expected the commit of {name!r} (40 hexadecimal digits), so that it cannot change; "
            f"got {revision or 'null'}"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FETCHED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StageError(
            f"pretrain.checkpoint: {name!r} is no folder here and cannot be fetched from the hub ({reason})"
        ) from None
