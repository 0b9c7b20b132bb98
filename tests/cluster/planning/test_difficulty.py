"""Difficulty of rows: what transformers computes in float64, scored once and by anybody once.

N positions with loss, all rows end to end   R rows   V vocabulary
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.planning.difficulty import ScoringModel, centre_of, scores
from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run
from cluster.planning.prompting import Showing
from shared.data.layout import lay_out
from shared.data.row_store import RowStore
from shared.errors import ConfigError
from shared.run.plan import OpenReader
from shared.targets.reader import ReaderStats
from tests.cluster.jobs import WORDS, write_job
from tests.student_trainer.processes import LocalTeacher, teacher
from tests.tiny import Pair

MEASURES = ("teacher_nll", "teacher_entropy", "gap", "length")


@dataclass
class Model:
    """A real engine in this process, as something rows are scored by; counts its services."""

    role: str
    folder: Path
    services: int = 0
    stats: list[ReaderStats] = field(default_factory=list)

    @contextmanager
    def serve(self) -> Iterator[OpenReader]:
        self.services += 1

        def open_reader(rank: int) -> LocalTeacher:
            reader = LocalTeacher(teacher(str(self.folder)))
            self.stats.append(reader.stats)
            return reader

        yield open_reader

    @property
    def asked(self) -> ScoringModel:
        return ScoringModel(self.role, {"model": self.folder.name}, self.serve)  # type: ignore[arg-type]

    @property
    def units(self) -> int:
        return sum(stats.units for stats in self.stats)


def prepared_in(folder: Path, pair: Pair, **parts: object) -> Prepared:
    """Two domains of a few rows of tokenised text and an empty cache of scores."""
    path = write_job(folder, pair, documents=14, **parts)
    return prepare_run(load(path, ["batch.micro_batch=4"]))


@pytest.fixture
def prepared(tmp_path: Path, tiny_pair: Pair) -> Prepared:
    return prepared_in(tmp_path, tiny_pair)


@pytest.fixture
def models(tiny_pair: Pair) -> tuple[Model, Model]:
    return Model("teacher", tiny_pair.teacher), Model("student", tiny_pair.student)


def found(prepared: Prepared, measure: str, *models: Model) -> dict[str, np.ndarray]:
    asked = [model.asked for model in models]
    (name,) = prepared.teachers
    return scores(prepared, measure, teachers={name: asked[0]}, student=asked[1])  # type: ignore[arg-type]


def with_micro_batch(prepared: Prepared, size: int, cache: Path) -> Prepared:
    config = prepared.config
    paths = config.paths.model_copy(update={"cache": str(cache)})
    batch = config.batch.model_copy(update={"micro_batch": size})
    return replace(prepared, config=config.model_copy(update={"paths": paths, "batch": batch}))


def dense(folder: Path, path: str, *, by: str = "row_N") -> dict[str, np.ndarray]:
    """Mean NLL of the label and mean entropy of each row, or document, in float64, documents
    alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    store = RowStore.open(path)
    layout = lay_out(store.take(range(len(store))), packed=False)
    with torch.no_grad():
        logits = model(torch.from_numpy(layout.input_ids_BT), use_cache=False).logits.flatten(0, 1)
    logp_NV = logits[torch.from_numpy(layout.loss_index_N)].log_softmax(1)
    label_N1 = torch.from_numpy(layout.label_N)[:, None]
    values = {
        "nll": -logp_NV.gather(1, label_N1)[:, 0],
        "entropy": -(logp_NV.exp() * logp_NV).sum(1),
    }
    owner_N = np.unique(getattr(layout, by), return_inverse=True)[1]
    count = np.bincount(owner_N)
    return {k: np.bincount(owner_N, weights=v.numpy()) / count for k, v in values.items()}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_pair) -> tuple[Prepared, tuple[Model, Model], dict]:
    """Rows, who scored them, and every measure of them."""
    prepared = prepared_in(tmp_path_factory.mktemp("scored"), tiny_pair)
    models = Model("teacher", tiny_pair.teacher), Model("student", tiny_pair.student)
    return prepared, models, {measure: found(prepared, measure, *models) for measure in MEASURES}


def test_scores_are_those_of_transformers_in_float64(scored, tiny_pair):
    prepared, _, by_measure = scored
    for domain in prepared.domains:
        of_teacher, of_student = (
            dense(folder, domain.train_path) for folder in (tiny_pair.teacher, tiny_pair.student)
        )
        rows = RowStore.open(domain.train_path)
        expected = {
            "teacher_nll": of_teacher["nll"],
            "teacher_entropy": of_teacher["entropy"],
            "gap": of_student["nll"] - of_teacher["nll"],
            "length": rows.take(range(len(rows))).num_loss_tokens(),
        }
        assert expected.keys() == by_measure.keys()
        for measure, by_domain in by_measure.items():
            assert list(by_domain) == [domain.name for domain in prepared.domains]
            assert by_domain[domain.name].dtype == np.float64
            np.testing.assert_allclose(by_domain[domain.name], expected[measure], atol=2e-5)
            assert np.ptp(expected[measure]) > 1e-2


STATISTICS = ("mean", "lower_quartile", "median", "upper_quartile")


def test_a_weightings_centre_is_a_statistic_of_all_documents_scored_once(
    tmp_path, models, tiny_pair, capsys
):
    """Of documents that share rows, and not of these."""
    path = write_job(tmp_path, tiny_pair, mixture={"policy": "fixed"})
    for name, words in WORDS.items():
        texts = [f"{' '.join(words[: 1 + n % len(words)])} {n}" for n in range(50)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    prepared = prepare_run(load(path, ["batch.micro_batch=2"]))
    paths = [domain.train_path for domain in prepared.domains]
    value_D, value_R = (
        np.concatenate([dense(tiny_pair.teacher, path, by=by)["nll"] for path in paths])
        for by in ("document_N", "row_N")
    )
    assert len(value_D) > 2 * len(value_R)
    expected = [value_D.mean(), *np.percentile(value_D, [25, 50, 75])]
    (name,) = prepared.teachers
    asked = {name: models[0].asked}
    for statistic, value in zip(STATISTICS, expected, strict=True):
        centre = centre_of(prepared, statistic, teachers=asked)
        assert centre == pytest.approx(value, abs=2e-5)
        said = f"{statistic.replace('_', ' ')} of the teacher's NLL of {len(value_D)} documents"
        assert said in capsys.readouterr().out
    assert abs(value_D.mean() - value_R.mean()) > 1e-3
    assert models[0].services == 1
    assert len({round(value, 4) for value in expected}) == len(expected)
    by_row = scores(prepared, "teacher_nll", teachers=asked, student=None)
    np.testing.assert_allclose(np.concatenate([*by_row.values()]), value_R, atol=2e-5)
    assert models[0].services == 1, "rows and documents are scored together"


@pytest.mark.drill
def test_the_size_of_a_unit_moves_a_score_by_rounding_alone(prepared, models, tmp_path):
    by_size = {
        size: found(with_micro_batch(prepared, size, tmp_path / str(size)), "teacher_nll", *models)
        for size in (1, 3, 64)
    }
    for name, one_R in by_size[1].items():
        for size in (3, 64):
            np.testing.assert_allclose(by_size[size][name], one_R, atol=1e-5)
    assert models[0].services == 3


def test_what_is_kept_is_not_scored_again(scored):
    prepared, models, first = scored
    num_rows = [domain.num_rows for domain in prepared.domains]
    of_a_pass = sum(-(-rows // 4) for rows in num_rows)
    assert models[0].units == 2 * of_a_pass  # NLL and entropy; `gap` finds the NLL
    assert models[1].units == of_a_pass
    unserved = [replace(model.asked, serve=None) for model in models]
    for measure, by_domain in first.items():
        (name,) = prepared.teachers
        again = scores(prepared, measure, teachers={name: unserved[0]}, student=unserved[1])
        for name, value_R in by_domain.items():
            np.testing.assert_array_equal(again[name], value_R)


def test_a_student_that_is_its_teacher_has_no_gap(prepared, models):
    twin = Model("student", models[0].folder)
    for value_R in found(prepared, "gap", models[0], twin).values():
        np.testing.assert_allclose(value_R, 0, atol=1e-6)


def test_other_text_another_model_and_another_quantity_are_scored_anew(prepared, models, tiny_pair):
    found(prepared, "teacher_nll", *models)
    other = Model("teacher", tiny_pair.student)
    found(prepared, "teacher_nll", other, models[1])
    assert other.services == 1
    shorter = tuple(replace(d, train_path=d.validation_path) for d in prepared.domains)
    sizes = [len(RowStore.open(d.train_path)) for d in shorter]
    shorter = tuple(replace(d, num_rows=n) for d, n in zip(shorter, sizes, strict=True))
    by_domain = found(replace(prepared, domains=shorter), "teacher_nll", *models)
    assert [len(value_R) for value_R in by_domain.values()] == sizes
    assert models[0].services == 2


def test_a_teacher_that_is_shown_prompts_scores_anew_and_the_student_does_not(prepared, models):
    found(prepared, "gap", *models)
    found(replace(prepared, showing=Showing("digest")), "gap", *models)
    assert (models[0].services, models[1].services) == (2, 1)


@pytest.mark.parametrize("measure", ["teacher_nll", "teacher_entropy", "gap"])
def test_without_a_teacher_what_is_not_kept_is_refused(measure, prepared, models):
    absent, (name,) = replace(models[0].asked, serve=None), prepared.teachers
    with pytest.raises(ConfigError, match=r"no scores by this teacher of the rows of letters"):
        scores(prepared, measure, teachers={name: absent}, student=models[1].asked)
    by_length = scores(prepared, "length", teachers={name: absent}, student=None)
    assert by_length.keys() == {"letters", "numbers"}
    assert models[1].services == 0


def test_every_domain_is_scored_by_its_own_teacher(tmp_path, tiny_pair, models):
    """The student is the second teacher here."""
    teachers = {"a": {"model": str(tiny_pair.teacher)}, "b": {"model": str(tiny_pair.student)}}
    domains = {
        name: {"train": f"{name}.jsonl", "teacher": teacher}
        for name, teacher in (("letters", "a"), ("numbers", "b"))
    }
    both = prepared_in(tmp_path, tiny_pair, teachers=teachers, domains=domains)
    second = Model("teacher", tiny_pair.student)
    asked = {"a": models[0].asked, "b": second.asked}
    by_domain = scores(both, "teacher_nll", teachers=asked, student=None)
    for name, model in (("a", models[0]), ("b", second)):
        part = both.taught_by(name)
        alone = scores(part, "teacher_nll", teachers={name: model.asked}, student=None)
        (domain,) = alone
        np.testing.assert_array_equal(by_domain[domain], alone[domain])
    gap = scores(both, "gap", teachers=asked, student=models[1].asked)
    np.testing.assert_allclose(gap["numbers"], 0, atol=1e-6)  # its teacher is the student
    assert np.abs(gap["letters"]).max() > 0.01
    assert (models[0].services, second.services, models[1].services) == (1, 1, 1)


def test_damaged_scores_are_scored_again(prepared, models):
    first = found(prepared, "teacher_nll", *models)
    files = sorted((Path(prepared.config.paths.cache) / "difficulty").glob("*.json"))
    assert len(files) == 2
    files[0].write_text(files[0].read_text()[:-9])
    files[1].write_text(files[1].read_text().replace("1", "2", 1))
    again = found(prepared, "teacher_nll", *models)
    assert models[0].services == 2
    for name, value_R in first.items():
        np.testing.assert_array_equal(again[name], value_R)


def test_two_runs_at_once_score_every_row_once(prepared, models):
    results: list[dict[str, np.ndarray]] = []
    threads = [
        Thread(target=lambda: results.append(found(prepared, "teacher_nll", *models)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name])
    assert models[0].units == sum(-(-domain.num_rows // 4) for domain in prepared.domains)
