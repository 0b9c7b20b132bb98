"""What a cluster is started from: every file says what the module of facts says, and is taken by
what reads it."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.manifests.facts import (
    CLAIM,
    FILES,
    FOLDER,
    GROUP,
    GROUPS,
    IDLE_S,
    IMAGE,
    PORTS,
    PYTHON,
    RAY,
    SECRET,
    SECRET_KEY,
    SHARED,
    USER,
)
from tests.documents import ROOT

JOB, CLUSTER = "rayjob.yaml", "raycluster.yaml"


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    spec = loaded(name)["spec"]
    return spec["rayClusterSpec"] if name == JOB else spec


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pods of a manifest by what they are."""
    spec = cluster_spec(name)
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    if name == JOB:
        yield "submitter", loaded(name)["spec"]["submitterPodTemplate"]["spec"]


def containers(name: str) -> dict[str, dict[str, Any]]:
    """The container of each pod."""
    found = {}
    for role, pod in pods(name):
        (found[role],) = pod["containers"]
    return found


def derived(spec: dict[str, Any]) -> dict[str, Any]:
    """The autoscaler's config that Ray derives from a RayCluster, checked by its own schema."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    metadata = {"name": "tutelage", "namespace": "default"}
    return _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})


def test_ray_is_the_version_that_is_installed_and_required():
    assert version("ray") == RAY
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (required,) = [line for line in project["dependencies"] if line.startswith("ray[")]
    minor = ".".join(RAY.split(".")[:2])
    assert f">={minor}," in required
    assert f">={PYTHON}," in project["requires-python"]


def test_every_file_there_is_is_written_and_packaged():
    assert {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "")} == {
        *FILES
    } - {"Dockerfile"}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {"manifests/*.yaml", "manifests/Dockerfile"} <= set(packages["package-data"]["cluster"])


def test_every_version_and_image_is_the_one_of_the_facts():
    for name in FILES:
        text = (FOLDER / name).read_text()
        assert set(re.findall(r"\d+\.\d+\.\d+(?!\.)", re.sub(r"(\d+\.){3}\d+", "", text))) <= {RAY}
        assert set(re.findall(r"\btutelage:\S+", text)) <= {IMAGE}


def test_the_dockerfile_copies_the_packages_and_installs_this_ray_as_nobody_special():
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    (base,) = [rest for step, rest in steps if step == "FROM"]
    assert base == f"rayproject/ray:{RAY}-py{PYTHON.replace('.', '')}-gpu"
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[1:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [
        name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    assert sorted(copied) == sorted(["pyproject.toml", "README.md", "LICENSE", *packages])
    assert all((ROOT / name).exists() for name in copied)
    users = [rest for step, rest in steps if step == "USER"]
    assert users[-1] == f"{USER}:{GROUP}"
    (install,) = [rest for step, rest in steps if step == "RUN" and "pip install" in rest]
    assert f'"ray[default,train]=={RAY}"' in install


def test_the_cluster_of_a_job_is_the_cluster():
    assert cluster_spec(JOB) == cluster_spec(CLUSTER)
    assert cluster_spec(CLUSTER)["rayVersion"] == RAY


def test_the_autoscaler_sees_head_teachers_and_students_as_the_facts_have_them():
    found = derived(cluster_spec(CLUSTER))
    assert found["idle_timeout_minutes"] * 60 == IDLE_S
    kinds = found["available_node_types"]
    head = kinds.pop(found["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert set(kinds) == set(GROUPS)
    for role, group in GROUPS.items():
        assert (kinds[role]["min_workers"], kinds[role]["max_workers"]) == (group.least, group.most)
        resources = kinds[role]["resources"]
        assert resources["GPU"] == group.gpus
        assert resources[role] == group.gpus
        assert resources["CPU"] >= group.gpus
    assert GROUPS["teacher"].least < GROUPS["teacher"].most


@pytest.mark.parametrize("name", [CLUSTER, JOB])
def test_every_pod_is_confined_has_the_token_and_the_storage_and_tells_whether_it_is_well(name):
    environment = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    for role, pod in pods(name):
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == USER
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {variable["name"] for variable in container["env"]} == environment
        (token,) = [v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v]
        assert token == {"name": SECRET, "key": SECRET_KEY}
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits["memory"] == requests["memory"]
        if role == "submitter":
            continue
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": SHARED}]
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM
        for probe in ("readinessProbe", "livenessProbe"):
            assert "local_raylet_healthz" in container[probe]["exec"]["command"][-1]
    options = cluster_spec(name)["autoscalerOptions"]
    assert {variable["name"] for variable in options["env"]} == environment


def test_health_is_asked_where_ray_answers_without_a_token():
    from ray.dashboard import http_server_agent

    head = containers(CLUSTER)["head"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports == PORTS
    asked = head["readinessProbe"]["exec"]["command"][-1]
    assert f"localhost:{PORTS['dashboard']}/api/gcs_healthz" in asked
    (path,) = set(re.findall(r"52365(/\S+)", asked))
    source = Path(http_server_agent.__file__).read_text()
    assert f'"{path}"' in source


def test_storage_is_shared_by_all_nodes():
    claim = loaded("storage.yaml")
    assert claim["metadata"]["name"] == CLAIM
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_command_of_a_job_is_one_that_tutelage_takes():
    from typer.main import get_command

    from cluster.cli import app

    words = shlex.split(loaded(JOB)["spec"]["entrypoint"])
    command: Any = get_command(app)
    assert words.pop(0) == "tutelage"
    command.commands[words.pop(0)].make_context("tutelage", list(words))
    assert words[0].startswith(f"{SHARED}/")
    for option in ("paths.root", "paths.runs", "paths.cache"):
        assert any(word.startswith(f"{option}={SHARED}") for word in words)


def test_the_launcher_takes_its_config_and_nodes_are_those_of_the_facts():
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(loaded("launcher.yaml"))
    validate_config(config)
    kinds = dict(config["available_node_types"])
    assert kinds.pop(config["head_node_type"])["resources"] == {"CPU": 0}
    for role, group in GROUPS.items():
        found = kinds[role]
        assert (found["min_workers"], found["max_workers"]) == (group.least, group.most)
        assert (found["resources"]["GPU"], found["resources"][role]) == (group.gpus, group.gpus)
    assert config["max_workers"] == sum(group.most for group in GROUPS.values())
    assert config["idle_timeout_minutes"] * 60 == IDLE_S
    assert config["docker"]["image"] == IMAGE
    assert f"-v {SHARED}:{SHARED}" in config["docker"]["run_options"]
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for start in (line for line in starts if "ray start" in line):
        assert start.startswith("RAY_AUTH_MODE=token ")
        assert str(PORTS["gcs"]) in start
    assert any(f"--dashboard-port={PORTS['dashboard']}" in line for line in starts)


@pytest.mark.parametrize("image", ["my image:1 2", "me/tutelage:", "a:b:c", "me//x", "x\ny"])
def test_what_names_no_image_is_refused(tmp_path, capsys, image):
    assert main(["manifests", str(tmp_path / "mine"), "--image", image]) == 2
    assert f"--image is {image!r}, which names no image" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "image", ["a", "ghcr.io/me/x:1.0-gpu", "host:5000/x", f"x@sha256:{'0' * 64}"]
)
def test_images_of_every_registry_are_taken(tmp_path, image):
    assert main(["manifests", str(tmp_path / "mine"), "--image", image]) == 0


def test_manifests_are_written_for_an_image_of_ones_own_and_overwrite_nothing(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert main(["manifests", str(folder), "--image", "me/tutelage:7"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(FILES)
    assert f"{folder}/raycluster.yaml: A cluster that stays, for jobs that come and go" in said[2]
    assert "me/tutelage:7" in (folder / "raycluster.yaml").read_text()
    assert IMAGE not in "".join((folder / name).read_text() for name in FILES)
    assert main(["manifests", str(folder)]) == 2
    assert "Dockerfile exists already; name another folder" in capsys.readouterr().err
    assert main(["manifests", str(tmp_path / "plain")]) == 0
    for name in FILES:
        assert (tmp_path / "plain" / name).read_text() == (FOLDER / name).read_text()
    (tmp_path / "file").write_text("")
    assert main(["manifests", str(tmp_path / "file" / "x")]) == 2


def test_resources_of_groups_are_written_as_ray_start_reads_them():
    for group in cluster_spec(CLUSTER)["workerGroupSpecs"]:
        (argument,) = shlex.split(group["rayStartParams"]["resources"])
        role = group["groupName"]
        assert json.loads(argument) == {role: GROUPS[role].gpus}
