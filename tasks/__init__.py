"""Units of work: a module per DVC stage under the stage's own name, run as `python -m tasks.<stage>`.

Beside them: `stage` (what stages share), `dvcstage` (run one stage through DVC), and the two Prefect modules `repro` and
`tracking`.
"""
