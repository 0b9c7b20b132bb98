"""From a config file to a config that can run, in a job too."""

from pathlib import Path

import pytest

from cluster.planning.loading import read
from shared.errors import ConfigError
from tests.cluster.jobs import write_job


def test_a_job_is_out_of_its_folder_once_the_config_is_read(tmp_path, tiny_pair, monkeypatch):
    folder, home = tmp_path / "copy", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    write_job(folder, tiny_pair)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(home))
    outside = read(Path("job.yaml"), [])
    assert Path.cwd() == folder
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert read(Path("job.yaml"), []) == outside
    assert Path.cwd() == home


CONFIG = """
name: job
steps: 4
teachers: {t: {model: ./t}}
student: {model: ./s}
domains: {d: {train: d.jsonl}}
evaluation: {store_gb: 5}
"""


def test_a_run_that_goes_on_keeps_an_option_without_effect(tmp_path: Path) -> None:
    path, run = tmp_path / "job.yaml", tmp_path / "runs" / "job"
    path.write_text(CONFIG)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}')
    for model in ("t", "s"):
        (tmp_path / model).mkdir()
    paths = [f"paths.root={tmp_path}", f"paths.runs={run.parent}", f"paths.cache={tmp_path}/cache"]
    with pytest.raises(ConfigError, match=r"evaluation\.store_gb is 5\.0, but targets\.store"):
        read(path, paths)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    assert read(path, paths).evaluation.store_gb == 5
