"""What a job takes along of a working folder, and what is refused before it is sent."""

import os
import zipfile
from pathlib import Path

import pytest

from cluster.commands.jobs import submit
from cluster.submission import dashboard
from cluster.submission import package as packaging
from cluster.submission.ignore_file import write_ignore_file
from cluster.submission.package import Package, package_of, refuse_left_behind
from shared.config.file import load_config
from shared.config.run import Config
from shared.errors import ConfigError, PlacementError

CONFIG = """\
name: x
steps: 10
teachers: {t: {model: models/teacher}}
student: {model: hub/student}
domains:
  math: {train: data/*.jsonl, validation: data/valid/}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a config, a model and text."""
    write(tmp_path, "my.yaml", CONFIG)
    write(tmp_path, "models/teacher/model.safetensors")
    write(tmp_path, "data/one.jsonl")
    write(tmp_path, "data/valid/two.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, name: str, text: str = "text") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def config(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "my.yaml", overrides)


def packed(folder: Path, *overrides: str) -> Package:
    return package_of(folder, config(folder, *overrides))


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        refuse_left_behind(config(folder, *overrides), packed(folder, *overrides))
    return str(refused.value)


TAKEN = ["data/one.jsonl", "data/valid/two.jsonl", "models/teacher/model.safetensors", "my.yaml"]


@pytest.mark.parametrize(
    "name", [".git/HEAD", ".venv/bin/python", "runs/x/config.yaml", "a/__pycache__/b.pyc"]
)
def test_what_no_job_needs_stays_here(folder, name):
    write(folder, name)
    assert list(packed(folder).files) == TAKEN


def test_runs_and_caches_under_names_of_ones_own_stay_here(folder):
    write(folder, "results/x/config.yaml")
    write(folder, "kept/rows.arrow")
    assert list(packed(folder, "paths.runs=results", "paths.cache=kept/").files) == TAKEN


def test_what_ignore_files_name_stays_here_and_the_last_word_counts(folder):
    write(folder, ".gitignore", "*.log\n/secret\nnotes/*\n!notes/kept.txt\n")
    write(folder, ".rayignore", "large/\n")
    write(folder, "data/.gitignore", "three.jsonl\n")
    for name in ("a.log", "data/b.log", "secret", "large/c", "notes/d.txt", "data/three.jsonl"):
        write(folder, name)
    for name in ("notes/kept.txt", "data/secret", "three.jsonl"):
        write(folder, name)
    kept = {".gitignore", ".rayignore", "data/.gitignore"}
    kept |= {"notes/kept.txt", "data/secret", "three.jsonl"}
    assert set(packed(folder).files) == {*TAKEN, *kept}


def test_lines_that_are_no_patterns_say_nothing(folder):
    (folder / ".gitignore").write_bytes(b"!\n\\\n# note\n\n\xff\n/data/\n")
    assert set(packed(folder).files) == {".gitignore", TAKEN[2], TAKEN[3]}


def test_a_name_that_no_zip_holds_is_refused_unless_it_is_ignored(folder):
    (folder / os.fsdecode(b"old-\xff.txt")).write_text("text")
    with pytest.raises(ConfigError, match="has a name that is no UTF-8"):
        packed(folder)
    write(folder, ".gitignore", "old-*\n")
    assert set(packed(folder).files) == {".gitignore", *TAKEN}


def test_links_are_followed_but_not_in_circles_nor_into_nothing(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, "four.jsonl")
    (folder / "data" / "linked").symlink_to(elsewhere)
    (folder / "data" / "circle").symlink_to(folder)
    (folder / "data" / "nothing").symlink_to(folder / "absent")
    os.mkfifo(folder / "pipe")
    assert set(packed(folder).files) == {*TAKEN, "data/linked/four.jsonl"}


def test_a_package_is_the_same_bytes_until_a_file_changes(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for name in ("a.zip", "b.zip"):
        packed(folder).write(out / name)
    assert (out / "a.zip").read_bytes() == (out / "b.zip").read_bytes()
    with zipfile.ZipFile(out / "a.zip") as archive:
        assert archive.namelist() == TAKEN
        assert archive.read("my.yaml").decode() == CONFIG
    write(folder, "my.yaml", CONFIG + "seed: 1\n")
    packed(folder).write(out / "c.zip")
    assert (out / "a.zip").read_bytes() != (out / "c.zip").read_bytes()


def test_a_folder_that_is_too_large_is_refused_with_its_largest_entries(folder):
    for name, megabytes in {"data/big.bin": 70, "models/base": 20, "old": 15, "new": 1}.items():
        with (folder / name).open("wb") as file:
            file.truncate(megabytes * 10**6)
    with pytest.raises(ConfigError) as refused:
        packed(folder)
    said = str(refused.value)
    assert f"{folder} has 106.0 MB to take along, more than the 100.0 MB" in said
    assert "the largest are data (70.0 MB), models (20.0 MB), old (15.0 MB): name" in said
    assert "\n" not in said
    write(folder, ".gitignore", "/old\n")
    assert packed(folder).size < packaging.LIMIT_BYTES


def test_what_the_config_names_is_taken_along_or_refused(folder):
    refuse_left_behind(config(folder), packed(folder))
    assert "domains.math.train is 'no.txt', but" in refusal(folder, "domains.math.train=no.txt")
    write(folder.parent, "elsewhere.txt")
    said = refusal(folder, "domains.math.train=../elsewhere.txt")
    assert f"domains.math.train is '../elsewhere.txt', outside {folder}" in said
    write(folder, ".gitignore", "*.safetensors\n")
    said = refusal(folder)
    assert "teachers.t.model is 'models/teacher', of which models/teacher/model.safetensors" in said
    assert "ignore file" in said


def test_what_lies_on_the_cluster_is_not_looked_for_here(folder):
    overrides = ["teachers.t.model=/mnt/shared/teacher", "domains.math.train=/mnt/shared/a.jsonl"]
    refuse_left_behind(config(folder, *overrides), packed(folder))
    overrides = ["paths.root=/mnt/shared", "domains.math.train=b.jsonl"]
    refuse_left_behind(config(folder, *overrides), packed(folder))


@pytest.mark.parametrize("place", ["outside", "ignored"])
def test_a_config_that_is_not_taken_along_is_refused(folder, tmp_path_factory, place):
    path = folder / "my.yaml"
    if place == "outside":
        path = tmp_path_factory.mktemp("other") / "my.yaml"
        path.write_text(CONFIG)
    else:
        write(folder, ".gitignore", "*.yaml\n")
    with pytest.raises(ConfigError, match=f"{path} is not among what the job takes along"):
        submit(path, [])


def test_an_ignore_file_is_written_once(tmp_path):
    assert write_ignore_file(tmp_path)
    assert {".venv/", "runs/"} <= set((tmp_path / ".gitignore").read_text().splitlines())
    (tmp_path / ".gitignore").write_text("mine\n")
    assert not write_ignore_file(tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "mine\n"


def test_a_job_is_sent_after_a_wait_for_a_head_that_has_only_just_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboard, "STARTING_S", 0.5)
    with pytest.raises(PlacementError, match="no dashboard answers at http"):
        submit(Path("my.yaml"), [], address="127.0.0.1:9")
    assert "Waiting    for a dashboard at http://127.0.0.1:9, up to" in capsys.readouterr().out
