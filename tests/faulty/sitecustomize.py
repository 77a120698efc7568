"""Python imports this at its start where the folder is on PYTHONPATH: real processes of a run then fail as told."""

import os

from tests import faults

faults.subscribe(int(os.environ.get("RANK", 0)))
