"""Samples on the page: every text is there, escaped, beside the others."""

import html
from pathlib import Path

from cluster.evaluation.generations import Generation, Written, write_generations
from cluster.evaluation.scores import Scores
from cluster.report.page import write_report
from cluster.report.samples import MOST_CHARS, PER_DOMAIN, samples_of
from shared.run.run_dir import RunDir
from tests.cluster.report.test_page import Page
from tests.cluster.run_dirs import write_run

MARKUP = "<script>alert('it')</script> & <b>"


def generation(domain: str, number: int, *, scored: bool, prompt: str = "why?") -> Generation:
    scores = {
        "teacher": Scores(1.0, 1.0, 1.0),
        "before": Scores(0.0, 0.25, None),
        "after": Scores(0.0, 0.5, 0.75),
    }
    models = {
        name: Written(f"{name} {number} {MARKUP}", name == "before", own if scored else None)
        for name, own in scores.items()
    }
    right = f"because {number}"
    return Generation(domain, f"{number:016x}", prompt, right, 9, 300, models)


def test_the_page_shows_the_first_samples_side_by_side(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_run(run.path, domains=("code", "legal"))
    asked = [generation("code", number, scored=True, prompt=MARKUP) for number in range(5)]
    write_generations(run.generations, [*asked, generation("legal", 7, scored=False)])
    text = write_report(run.path).read_text()
    page = Page(text)
    assert (page.open, page.fetched) == ([], [])
    assert "<script" not in text
    shown = html.unescape(text)
    for number in range(PER_DOMAIN):
        for name in ("teacher", "before", "after"):
            assert f"{name} {number} {MARKUP}" in shown
        assert f"because {number}" in shown
    assert f"because {PER_DOMAIN}" not in shown
    assert "the text goes on" in shown
    assert "student after, step 300" in shown


def test_a_page_without_texts_has_no_samples(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert "<h2>Samples" not in write_report(tmp_path / "run").read_text()


def test_notes_tell_scores_and_what_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    write_generations(path, [generation("code", 0, scored=True)])
    (sample,) = samples_of(path, ("code",))["code"]
    assert [text.notes for text in sample.texts] == [
        (),
        ("exact match",),
        ("F1 0.25", "cut"),
        ("F1 0.50", "Rouge-L 0.75"),
    ]


def test_long_texts_are_shortened_and_torn_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    write_generations(path, [generation("code", 0, scored=True, prompt="x" * 2 * MOST_CHARS)])
    damaged = b'5\n{"domain": "code"}\n{"domain": "code", "models": 3}\n\xff\n{"domain": "co'
    path.write_bytes(path.read_bytes() + damaged)
    found = samples_of(path, ("legal", "code"))
    assert {name: len(samples) for name, samples in found.items()} == {"code": 1}
    assert found["code"][0].prompt == "… " + "x" * MOST_CHARS
