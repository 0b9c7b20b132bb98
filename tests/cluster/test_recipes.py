"""Every recipe is a config that loads, and the starter is one too."""

from pathlib import Path

import pytest

import cluster
from cluster.cli import main
from cluster.launch.driver import on_hard_labels
from shared.config.file import dump, load_config, resolve

RECIPES = sorted((Path(cluster.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    config = load_config(path)
    assert config.accumulation >= 1


def test_the_copy_on_hard_labels_of_every_recipe_with_one_is_a_config_that_loads(tmp_path):
    compared = [found for found in map(load_config, RECIPES) if found.baseline]
    assert len(compared) > 5
    for config in compared:
        hard = on_hard_labels(config)
        (tmp_path / "hard.yaml").write_text(dump(hard))
        assert load_config(tmp_path / "hard.yaml") == hard, config.name


def test_the_real_text_recipe_finds_its_models_and_text(reference):
    path = next(path for path in RECIPES if path.stem == "real_text")
    config = resolve(load_config(path, [f"paths.root={reference}"]))
    assert len(config.domains) >= 5
    assert Path(config.student.model).is_dir()


def test_the_gpu_recipe_asks_for_six_gpus():
    config = load_config(next(path for path in RECIPES if path.stem.startswith("qwen")))
    (teacher,) = config.teachers.values()
    assert teacher.replicas * teacher.gpus == 2
    assert config.student.workers * config.student.gpus == 4
    assert (config.student.dtype, config.student.zero) == ("bfloat16", 2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_init_writes_every_recipe_that_is_listed_with_commands_that_name_the_file(
    path, tmp_path, capsys
):
    assert main(["recipes"]) == 0
    assert any(line.startswith(f"{path.stem} ") for line in capsys.readouterr().out.splitlines())
    mine = tmp_path / "mine.yaml"
    assert main(["init", str(mine), "--recipe", path.stem]) == 0
    assert load_config(mine) == load_config(path)
    assert "cluster/recipes" not in mine.read_text()


def test_every_recipe_is_listed_with_a_whole_sentence_on_one_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()[: len(RECIPES)]
    assert max(map(len, lines)) <= 100


def test_a_recipe_that_there_is_none_of_is_named_with_the_nearest(tmp_path, capsys):
    assert main(["init", str(tmp_path / "mine.yaml"), "--recipe", "reel_text"]) == 2
    assert "did you mean real_text?" in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def test_init_writes_a_config_of_about_a_dozen_lines_that_loads(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert 8 <= len(lines) <= 18
    assert sum("#" in line for line in lines) >= 5
    load_config(path)
    assert "runs/" in (tmp_path / ".gitignore").read_text().splitlines()
    assert ".gitignore keeps runs" in capsys.readouterr().out
    assert main(["init", str(path)]) == 2  # an existing file stays
    assert "exists already" in capsys.readouterr().err


def test_init_writes_the_file_that_the_documents_go_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "tutelage run my.yaml" in capsys.readouterr().out
    assert main(["plan", "my.yaml"]) == 2
    said = capsys.readouterr().err
    assert "teachers.teacher.model is 'path/or/hub-name', which stands in a first config" in said
    assert main(["plan", "my.yaml", "teachers.teacher.model=org/one"]) == 2
    assert "student.model is 'path/or/hub-name', which stands" in capsys.readouterr().err
