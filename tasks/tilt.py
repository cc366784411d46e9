"""Control: decode token by token from target^(1 + weight) baseline^(-weight), no training."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/tilt, which names the two models and the weight: they are read when it is used."""
    from apprentice.tilt import write_tilt
    from tasks.checkpoints import lineage, model_folder

    config = stage.config
    folder = model_folder(stage, "tilt")
    target, baseline = (model_folder(stage, name) for name in (config.target, config.baseline))
    hashes = {path.name: lineage(path) for path in (target, baseline)}  # so that a change of theirs is a change here
    write_tilt(folder, target, baseline, config.weight, hashes)
    stage.metrics({"weight": config.weight})
    stage.say(f"wrote {folder.relative_to(stage.data.parent)}: {config.target} against {config.baseline}")


run(__name__, main, __doc__)
