"""Prefect flows: the order of the work. Importing this sets only defaults of the environment, and fast.

Prefect's home is `.prefect` in the project (pyproject.toml says the same to its command line), so a user's own stays as it
is; no tool phones home.
"""

import os
from pathlib import Path

from tasks.stage import PRIVACY

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "PREFECT_HOME": str(ROOT / ".prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 s is too short on a busy machine
    **PRIVACY,
}

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
