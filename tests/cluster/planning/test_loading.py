"""From a config file to a config that can run, in a job too."""

from pathlib import Path

from cluster.planning.loading import read
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
