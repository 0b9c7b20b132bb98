"""The loss modules stand on torch alone."""

import subprocess
import sys
from pathlib import Path

import student_trainer.losses

PROBE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "transformers", "deepspeed", "pyarrow", "pydantic",
                                  "shared", "teacher_service", "cluster"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import importlib
for name in sys.argv[1:]:
    importlib.import_module("student_trainer.losses." + name)
"""


def test_loss_modules_import_with_torch_alone():
    folder = Path(student_trainer.losses.__path__[0])
    files = [path for path in folder.rglob("*.py") if path.stem != "__init__"]
    names = sorted(".".join(f.relative_to(folder).with_suffix("").parts) for f in files)
    assert {"token_losses", "terms.divergences", "kernel.fused"} <= set(names)
    root = folder.parents[1]
    subprocess.run([sys.executable, "-c", PROBE, *names], cwd=root, check=True)
