"""What the manifests beside this file have in common; tests hold each of them against it."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = ("Dockerfile", "storage.yaml", "raycluster.yaml", "rayjob.yaml", "launcher.yaml")

RAY = "2.60.0"
PYTHON = "3.11"
IMAGE = f"tutelage:ray{RAY}"  # the name that `tutelage manifests --image` replaces
USER, GROUP = 1000, 100  # those of Ray's own images, which are not root
SHARED = "/mnt/shared"  # where every node mounts the same storage
CLAIM = "tutelage-shared"
SECRET, SECRET_KEY = "tutelage-token", "auth_token"
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
IDLE_S = 300  # until a node that nobody uses is given back


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of one role."""

    gpus: int  # of a node; as many replicas or workers find room on it
    least: int
    most: int


GROUPS = {"teacher": Group(gpus=1, least=1, most=8), "student": Group(gpus=4, least=1, most=1)}
