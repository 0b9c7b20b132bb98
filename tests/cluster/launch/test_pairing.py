"""Preferences that models write before a run: whose texts they are, that they are written once, and
a run that learns them.

Those who write are real engines in this process, but for the run's.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.cli import main
from cluster.launch import pairing
from cluster.launch.pairing import Writing, paired_domains
from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.errors import ConfigError, DataError
from shared.run.metrics import read_metrics
from shared.targets.generation import Continuations, GenerationSpec, Generator, Openings
from tests.cluster.jobs import WORDS, write_job
from tests.student_trainer.processes import teacher
from tests.tiny import Pair

NEW_TOKENS = 6
WRITTEN = {
    "losses": [{"kind": "preference", "pairs": "written", "beta": 0.5}],
    "source": {"max_new_tokens": NEW_TOKENS, "temperature": 0},
    "data": {"context": 64, "validation_rows": 4, "too_long": "drop"},
    "mixture": {"policy": "fixed"},
    "domains": {"said": {"train": "said.jsonl"}},
}


def job_of(folder: Path, pair: Pair, **parts: object) -> Path:
    """A job on one domain of prompts and responses."""
    words = WORDS["letters"]
    rows = [
        {"prompt": f"say {n} {words[n % 9]}", "response": f"{words[n % 7]} {n}"} for n in range(40)
    ]
    (folder / "said.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return write_job(folder, pair, **WRITTEN | parts)


@dataclass
class Author:
    """A real engine as something that writes; counts its services, and keeps what is asked."""

    folder: Path
    services: int = 0
    asked: list[Openings] = field(default_factory=list)
    fails_after: int | None = None  # calls

    @contextmanager
    def serve(self) -> Iterator[Generator]:
        self.services += 1
        yield self

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        if self.fails_after == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(openings)
        return teacher(str(self.folder)).generate(openings, spec)

    @property
    def writing(self) -> Writing:
        return Writing({"model": self.folder.name}, self.serve)


def paired(prepared: Prepared, folder: Path, first: Author, second: Author) -> PreparedDomain:
    (name,) = prepared.teachers
    (domain,) = paired_domains(prepared, folder, {name: first.writing}, second.writing)
    return domain


@pytest.fixture
def prepared(tmp_path: Path, tiny_pair: Pair) -> Prepared:
    return prepare_run(load(job_of(tmp_path, tiny_pair), []))


@pytest.fixture
def authors(tiny_pair: Pair) -> tuple[Author, Author]:
    return Author(tiny_pair.teacher), Author(tiny_pair.student)


def documents(path: str) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each document of a file of rows."""
    store, found = RowStore.open(path), []
    rows = store.take(range(len(store))).documents()
    for ids, mask in zip(rows.column("input_ids"), rows.column("loss_mask"), strict=True):
        first = int(np.flatnonzero(mask)[0]) + 1
        assert mask[first - 1 : -1].all()
        found.append((ids[:first].tolist(), ids[first:].tolist()))
    return found


def likeliest(folder: Path, prompt: list[int], ends: tuple[int, ...]) -> list[int]:
    """What transformers writes."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = torch.tensor([prompt])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": list(ends)}
    found = model.generate(asked, attention_mask=torch.ones_like(asked), pad_token_id=0, **options)
    return found[0, len(prompt) :].tolist()


def test_the_teachers_likeliest_text_is_chosen_and_the_students_rejected(
    prepared: Prepared, tmp_path: Path, tiny_pair: Pair, authors: tuple[Author, Author]
) -> None:
    given = documents(prepared.domains[0].train_path)
    domain = paired(prepared, tmp_path / "pairs", *authors)
    found = documents(domain.train_path)
    assert domain.num_rows == len(RowStore.open(domain.train_path))
    assert domain.validation_path == prepared.domains[0].validation_path
    pairs = [*zip(found[::2], found[1::2], strict=True)]
    assert {tuple(prompt) for (prompt, _), _ in pairs} <= {tuple(prompt) for prompt, _ in given}
    for (prompt, chosen), (same, rejected) in pairs[:4]:
        assert prompt == same
        assert chosen == likeliest(tiny_pair.teacher, prompt, prepared.ends)
        assert rejected == likeliest(tiny_pair.student, prompt, prepared.ends)
    counts = json.loads((tmp_path / "pairs" / "counts.json").read_text())["said"]
    assert counts["pairs"] == len(pairs) > 20
    assert counts["pairs"] + counts["alike"] == counts["prompts"] == len(given)
    assert 0 < counts["teacher_tokens"] <= NEW_TOKENS * len(given)


def test_validation_text_is_never_gone_on_from(
    prepared: Prepared, tmp_path: Path, authors: tuple[Author, Author]
) -> None:
    paired(prepared, tmp_path / "pairs", *authors)
    held = {tuple(prompt) for prompt, _ in documents(prepared.domains[0].validation_path)}
    assert held
    for author in authors:
        assert author.asked
        for openings in author.asked:
            assert not held & {tuple(ids.tolist()) for ids in openings.ids()}


def test_what_was_written_before_a_kill_is_not_written_again(
    prepared: Prepared, tmp_path: Path, authors: tuple[Author, Author]
) -> None:
    first, second = authors
    second.fails_after = 0
    with pytest.raises(KeyboardInterrupt):
        paired(prepared, tmp_path / "pairs", *authors)
    second.fails_after = None
    domain = paired(prepared, tmp_path / "pairs", *authors)
    rows = Path(domain.train_path).read_bytes()
    assert (first.services, second.services) == (1, 2)
    assert paired(prepared, tmp_path / "pairs", *authors) == domain
    assert Path(domain.train_path).read_bytes() == rows
    assert (first.services, second.services) == (1, 2)
    source = prepared.config.source.model_copy(update={"temperature": 1.5})
    warm = replace(prepared, config=prepared.config.model_copy(update={"source": source}))
    paired(warm, tmp_path / "pairs", *authors)
    assert (first.services, second.services) == (2, 3)
    assert Path(domain.train_path).read_bytes() != rows


def test_parts_that_were_written_before_a_kill_are_not_written_again(
    prepared: Prepared,
    tmp_path: Path,
    authors: tuple[Author, Author],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part is ten prompts; the fourth is not answered at first."""
    monkeypatch.setattr(pairing, "PART", 10)
    first, second = authors
    whole = Author(first.folder), Author(second.folder)
    rows = Path(paired(prepared, tmp_path / "whole", *whole).train_path).read_bytes()
    assert (parts := len(whole[0].asked)) > 3
    first.fails_after = 3
    with pytest.raises(KeyboardInterrupt):
        paired(prepared, tmp_path / "pairs", *authors)
    first.fails_after = None
    domain = paired(prepared, tmp_path / "pairs", *authors)
    assert len(first.asked) == parts
    asked = [ids.tolist() for openings in first.asked for ids in openings.ids()]
    assert sorted(asked) == sorted(i.tolist() for one in whole[0].asked for i in one.ids())
    assert Path(domain.train_path).read_bytes() == rows


def test_a_student_is_loaded_once_for_all_domains(
    tmp_path: Path, tiny_pair: Pair, authors: tuple[Author, Author]
) -> None:
    domains = {name: {"train": "said.jsonl"} for name in ("said", "told")}
    both = prepare_run(load(job_of(tmp_path, tiny_pair, domains=domains), []))
    (name,) = both.teachers
    writing = [author.writing for author in authors]
    found = paired_domains(both, tmp_path / "pairs", {name: writing[0]}, writing[1])
    assert [domain.name for domain in found] == ["said", "told"]
    first, second = (documents(domain.train_path) for domain in found)
    assert sorted(first) == sorted(second)  # of the same text
    assert [author.services for author in authors] == [1, 1]


def test_models_that_write_the_same_make_no_pair(
    prepared: Prepared, tmp_path: Path, tiny_pair: Pair
) -> None:
    twins = Author(tiny_pair.teacher), Author(tiny_pair.teacher)
    with pytest.raises(DataError, match=r"wrote the same after all \d+ prompts of domain said"):
        paired(prepared, tmp_path / "pairs", *twins)


def test_prompts_without_room_for_two_responses_are_refused(
    tmp_path: Path, tiny_pair: Pair, authors: tuple[Author, Author]
) -> None:
    job = job_of(tmp_path, tiny_pair)
    rows = [{"prompt": "alpha " * 8 + str(n), "response": "beta"} for n in range(30)]
    (tmp_path / "said.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prepared = prepare_run(load(job, []))
    with pytest.raises(DataError, match=r"no prompt that leaves room for two responses in data.co"):
        paired(prepared, tmp_path / "pairs", *authors)


FOLLOWING = {"t": {"model": "m", "follow_student": {"lag": 1}}}
BY_LENGTH = {"difficulty": "length", "phases": 2, "max_steps": 2, "plateau": None}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"targets": {"teacher_free": True, "store": "s"}}, "leaves no teacher to write"),
        ({"progressive": BY_LENGTH}, "progressive orders rows before pairs are written"),
        ({"cross_tokenizer": "uld"}, "in tokens of its own; set pairs=given"),
        ({"task": "image_text"}, "models write after text alone; set pairs=given"),
        ({"teachers": FOLLOWING}, "has a follow_student, which writes as the student does; leave"),
    ],
)
def test_a_run_whose_pairs_nobody_could_write_is_refused(
    tmp_path: Path, tiny_pair: Pair, asked: dict, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(job_of(tmp_path, tiny_pair, **asked), [])


@pytest.fixture(scope="module")
def learnt(ray_cluster, tmp_path_factory, tiny_pair) -> tuple[Path, str]:
    """A config whose run has finished, and what it said."""
    job = job_of(tmp_path_factory.mktemp("job"), tiny_pair, steps=4, log_every=1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["run", str(job)]) == 0
    return job, said.getvalue()


def test_a_run_learns_what_its_models_wrote(
    learnt: tuple[Path, str], tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    job, said = learnt
    run = job.parent / "runs" / "job"
    assert "to write rejected responses" in said
    assert "pairs of said: " in said
    pairs = documents(str(run / "pairs" / "rows.0.arrow"))
    assert len(pairs) % 2 == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.student)
    assert all("say" in tokenizer.decode(prompt) for prompt, _ in pairs)
    terms = [line.terms["preference"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(terms) >= 4
    assert None not in terms
    assert main(["capture", str(job), f"targets.store={job.parent / 'store'}"]) == 2
    assert "capture cannot know them" in capsys.readouterr().err


@pytest.mark.drill
def test_a_run_with_more_steps_goes_on_with_the_pairs_that_it_had(
    learnt: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job, run = learnt[0], learnt[0].parent / "runs" / "job"
    rows = (run / "pairs" / "rows.0.arrow").read_bytes()
    assert main(["run", str(job), "steps=6"]) == 0
    assert "to write rejected responses" not in capsys.readouterr().out
    assert (run / "pairs" / "rows.0.arrow").read_bytes() == rows
    terms = [line.terms["preference"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(terms) == 6
    assert None not in terms
