"""`python -m tests.student_trainer.state.frozen FILE`."""

import sys
import tempfile
from pathlib import Path

from tests.student_trainer.state.frozen import freeze

with tempfile.TemporaryDirectory() as folder:
    freeze(Path(folder), Path(sys.argv[1]))
