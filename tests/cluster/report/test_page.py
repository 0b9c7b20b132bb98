"""report.html: self-contained, escaped, and there for every state a run can be in."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.report.measurement import DomainSummary
from cluster.report.page import gap_closed, write_report
from cluster.report.plots import (
    MAX_POINTS,
    NAME_CHARS,
    NAME_PX,
    ROW_HEIGHT,
    Mark,
    Series,
    area_plot,
    line_plot,
    row_plot,
    thinned,
    ticks,
)
from cluster.report.services import note_scaling
from shared.prompts.prompts import Example, Prompt
from shared.run.run_dir import RunDir
from tests.cluster.run_dirs import write_run

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags balance and collects what a browser would fetch or run."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"script", "link", "img", "iframe", "object", "embed"}:
            self.fetched.append(tag)
        self.fetched += [f"{k}={v}" for k, v in attrs if k in {"src", "href", "xlink:href"}]
        self.fetched += [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


def svg(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


@pytest.mark.parametrize(
    "state",
    [
        {"baseline": True, "losses": ("forward_kl", "cross_entropy")},
        {"finished": False, "steps": 120},
        {"steps": 10, "finished": False},
        {"steps": 0, "finished": False},
        {"teacher": False},
        {"domains": ("only",)},
        {"domains": tuple(f"domain-{i}" for i in range(30)), "baseline": True},
    ],
    ids=["whole", "unfinished", "one line", "no line", "no teacher", "one domain", "30 domains"],
)
def test_every_state_of_a_run_gives_a_page_that_loads_nothing(tmp_path: Path, state: dict):
    write_run(tmp_path / "run", **state)
    path = write_report(tmp_path / "run")
    text = path.read_text()
    page = Page(text)
    assert path == tmp_path / "run" / "report.html"
    assert (page.open, page.fetched) == ([], [])
    assert not re.search(r"url\(|@import|https?://", text)
    assert "nan" not in re.findall(r'(?:x|y|points|cx|cy)="([^"]*)"', text)


def test_a_run_that_has_only_begun_is_reported(tmp_path: Path):
    write_run(tmp_path / "run", steps=0, finished=False)
    for name in ("evaluations.json", "weight_log.jsonl", "environment.json"):
        (tmp_path / "run" / name).unlink()
    assert "Nothing measured yet." in write_report(tmp_path / "run").read_text()


def test_names_and_files_are_escaped_everywhere(tmp_path: Path):
    evil = "<script>alert('&')</script>"
    write_run(tmp_path / "run", domains=(evil, "b"), baseline=True)
    (tmp_path / "run" / "environment.json").write_text('{"x": "</pre><script>"}')
    text = write_report(tmp_path / "run").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert Page(text).fetched == []


def test_the_page_has_every_plot_and_number_of_the_run(tmp_path: Path):
    write_run(tmp_path / "run", baseline=True)
    text = write_report(tmp_path / "run").read_text()
    captions = re.findall(r"<figcaption>(.*?) <small>", text)
    assert captions == [
        "NLL on validation text",
        "KL to the teacher on validation text",
        "Loss",
        "Gradient norm",
        "KL by domain, training text",
        "Domain weights",
        "Mixture",
        "Speed",
        "Waiting for the teacher",
        "Where the time went",
    ]
    assert "Units were retried up to step 120 (1)." in text
    assert "Weight log, 6 entries" in text


def test_a_token_adaptive_loss_adds_its_curves_by_domain(tmp_path: Path):
    write_run(tmp_path / "run", losses=("atkd",))
    text = write_report(tmp_path / "run").read_text()
    captions = re.findall(r"<figcaption>(.*?) <small>", text)
    first = captions.index("Mixture") + 1
    assert captions[first : first + 4] == [
        "Hard tokens by domain",
        "Uncertainty by domain",
        "TKD by domain",
        "DKD by domain",
    ]


def test_a_student_that_writes_adds_its_curves_and_its_time(tmp_path: Path):
    write_run(tmp_path / "run")
    plain = write_report(tmp_path / "run").read_text()
    path = tmp_path / "run" / "metrics.jsonl"
    written = {"rollouts": 5, "tokens": 40, "ended": 0.4, "lag": 1.0, "importance_ratio": 0.97}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    added = {"rollouts": written | {"unanswered": 0}, "writing_s": 0.1, "tokens_written": 40}
    path.write_text("".join(json.dumps(line | added) + "\n" for line in lines))
    text = write_report(tmp_path / "run").read_text()
    for said in ("Text of its own", "ended by itself", "Importance ratio", "waiting for text"):
        assert said not in plain
        assert said in text


def test_several_teachers_have_a_table_and_curves_of_their_own(tmp_path: Path):
    write_run(tmp_path / "one")
    alone = write_report(tmp_path / "one").read_text()
    write_run(tmp_path / "two", teachers=("big", "small"))
    both = write_report(tmp_path / "two").read_text()
    for said in ("<h2>Teachers</h2>", "KL by teacher", "Waiting by teacher", "Bytes by teacher"):
        assert said not in alone
        assert said in both
    assert re.search(r">models/small</td><td[^>]*>reference, mathematics</td>", both)


def test_readings_at_a_step_list_every_domain(tmp_path: Path):
    write_run(tmp_path / "run", domains=("law", "math"))
    titles = Page(write_report(tmp_path / "run").read_text()).titles
    at_100 = [t for t in titles if t.startswith("step 100\n") and "law" in t and "math" in t]
    assert len(at_100) == 3  # the plots of KL, of weights and of what was drawn


def corners(polygon: ElementTree.Element) -> list[tuple[float, float]]:
    points = (point.split(",") for point in (polygon.get("points") or "").split())
    return [(float(x), float(y)) for x, y in points]


@pytest.mark.parametrize("steps", [1, 2, 7, 3 * MAX_POINTS])
def test_parts_of_a_whole_lie_upon_each_other_and_fill_it(steps: int):
    first = Series("first", tuple((float(i), 0.25) for i in range(steps)), 0)
    second = Series("second", tuple((float(i), 0.75) for i in range(steps)), 1)
    lower, upper = svg(area_plot([first, second], label="parts")).iter("polygon")
    half = len(corners(lower)) // 2
    assert corners(lower)[:half] == corners(upper)[half:][::-1]  # the one's top, the other's bottom
    (bottom,) = {y for _, y in corners(lower)[half:]}
    (middle,) = {y for _, y in corners(lower)[:half]}
    (top,) = {y for _, y in corners(upper)[:half]}
    assert (bottom - middle) / (bottom - top) == pytest.approx(0.25, abs=0.002)
    xs = [x for x, _ in corners(lower)[:half]]
    assert xs == sorted(xs)


def test_a_part_that_is_not_there_at_a_step_is_nothing_there():
    whole = Series("whole", ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)), 0)
    late = Series("late", ((2.0, 1.0),), 1)
    plotted = svg(area_plot([whole, late], label="parts"))
    upper = corners(list(plotted.iter("polygon"))[1])
    assert upper[0] == upper[5]
    assert upper[1] == upper[4]
    assert upper[2][1] < upper[3][1]


def test_the_parts_of_a_steps_time_are_all_of_it(tmp_path: Path):
    write_run(tmp_path / "run")
    titles = Page(write_report(tmp_path / "run").read_text()).titles
    (told,) = [t for t in titles if t.startswith("step 100\n") and "optimiser" in t]
    shares = dict(re.findall(r"^(.*): (.*) %$", told, re.M))
    assert (shares["forward and backward"], shares["optimiser"]) == ("75", "12.5")
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.2)


def domain_of(teacher: float | None, before: float, after: float) -> DomainSummary:
    return {"teacher_nll": teacher, "student_nll_before": before, "student_nll_after": after}  # type: ignore[typeddict-item]


def test_the_gap_that_is_closed_is_of_the_distance_to_the_teacher():
    assert gap_closed(domain_of(2.0, 4.0, 2.5)) == 0.75
    assert gap_closed(domain_of(2.0, 4.0, 4.0)) == 0.0
    assert gap_closed(domain_of(2.0, 4.0, 1.0)) == 1.5
    assert gap_closed(domain_of(4.0, 2.0, 1.0)) is None  # the teacher is not ahead
    assert gap_closed(domain_of(None, 2.0, 1.0)) is None


def test_prompts_are_shown_with_what_was_tried(tmp_path: Path):
    write_run(tmp_path / "run")
    found = Prompt("Answer in <one> word.", (Example("one", "two"),))
    tried = {"round": 0, "origin": "seed", "fits": True, "dev_mean": -1.5, "dev_se": 0.1}
    told = found.entry() | {
        "metric": "nll",
        "kept": False,
        "stopped": "patience",
        "confirmed": {"mean": -1.25, "se": 0.01},
        "without_prompt": {"mean": -1.125, "se": 0.02},
        "history": [
            found.entry() | tried,
            Prompt().entry() | tried | {"fits": False, "dev_mean": None, "dev_se": None},
        ],
    }
    domains = {"code": told, "legal": Prompt().entry()}
    written = json.dumps({"format": 1, "domains": domains})
    RunDir(tmp_path / "run").prompts.write_text(written)
    text = write_report(tmp_path / "run").read_text()
    assert "code, 2 tried by nll" in text
    assert "<pre>Answer in &lt;one&gt; word.\n\none\ntwo\n\n</pre>" in text
    assert "-1.125 ± 0.020 without, -1.250 ± 0.010 with it, so that it was not kept" in text
    assert "does not fit" in text
    assert "No prompt." in text
    Page(text)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (-3.2, 7.7), (0, 1e-9), (5, 5), (0, 9_100), (2.1, 2.2)]
)
def test_ticks_are_round_few_and_cover_the_data(low: float, high: float):
    marks = ticks(low, high)
    steps = {round((b - a) / (marks[1] - marks[0]), 6) for a, b in pairwise(marks)}
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low <= high <= marks[-1]
    assert steps == {1.0}
    assert f"{marks[1] - marks[0]:.0e}"[0] in "125"


def test_points_lie_where_the_axes_say():
    drawn = svg(line_plot([Series("a", ((0, 0.0), (5, 5.0), (10, 10.0)), 0)], label="a"))
    curve = next(e for e in drawn if e.tag == "polyline")
    (x0, y0), (x1, y1), (x2, y2) = (
        map(float, p.split(",")) for p in curve.get("points", "").split()
    )
    labels = {e.text: e for e in drawn if e.get("class") == "tick end"}
    assert (x1, y1) == ((x0 + x2) / 2, (y0 + y2) / 2)
    assert float(labels["0"].get("y", "nan")) == pytest.approx(y0 + 4)
    assert float(labels["10"].get("y", "nan")) == pytest.approx(y2 + 4)


def test_a_long_run_is_drawn_by_means_that_keep_its_total():
    points = tuple((step, float(step % 7)) for step in range(10 * MAX_POINTS))
    short = thinned(Series("a", points)).points
    assert len(short) == MAX_POINTS
    assert sum(y for _, y in short) * 10 == pytest.approx(sum(y for _, y in points))
    assert short[-1][0] == points[-1][0]


def test_thirty_domains_never_share_colour_and_dash():
    drawn = svg(line_plot([Series(str(i), ((0, i), (1, i)), i) for i in range(30)], label="a"))
    looks = [(e.get("class"), e.get("stroke-dasharray")) for e in drawn if e.tag == "polyline"]
    assert len(set(looks)) == 30


LONG = "a-domain-whose-name-says-where-its-text-comes-from-and-of-which-year-it-is"


def test_row_plots_have_room_for_whole_names_of_any_length():
    def plotted(*names: str) -> ElementTree.Element:
        rows = {name: [Mark("before", 1.0, "hollow")] for name in names}
        return svg(row_plot(rows, label="a", x_label="x"))

    def height(drawn: ElementTree.Element) -> float:
        return float(drawn.get("viewBox", "").split()[3])

    few, many = plotted("0"), plotted(*map(str, range(30)))
    assert height(many) - height(few) == 29 * (ROW_HEIGHT + NAME_PX)
    long = plotted(LONG)
    assert height(long) - height(few) == NAME_PX
    lines = [e.text or "" for e in long.iter("text") if e.get("class") == "name"]
    assert "".join(lines) == LONG
    assert max(map(len, lines)) <= NAME_CHARS


def test_every_cell_says_what_it_is_where_a_row_is_a_card(tmp_path):
    """Of tables with a head, where the page is narrow."""
    write_run(tmp_path / "run", steps=20)
    text = write_report(tmp_path / "run").read_text()
    tables = re.findall(r'<div class="scroll">.*?</table>', text, re.S)
    cells = [cell for table in tables for cell in re.findall(r"<td[^>]*>", table)]
    assert len(tables) > 1
    assert [c for c in cells if "data-label=" not in c and 'class="words"' not in c] == []


def test_a_page_says_when_a_service_grew_and_shrank(tmp_path):
    write_run(tmp_path / "run", steps=20)
    run_dir = RunDir(tmp_path / "run")
    assert "<h2>Replicas</h2>" not in write_report(run_dir.path).read_text()
    run_dir.logs.mkdir()
    note_scaling(run_dir, "big", "1 -> 2 replicas, steps waited 40 %")
    with run_dir.scaling.open("a") as file:
        file.write('{"time": 1, "st')
    text = write_report(run_dir.path).read_text()
    assert Page(text).open == []
    assert "<h2>Replicas</h2>" in text
    said = "1 -&gt; 2 replicas, steps waited 40 %"
    assert '<th scope="row">20</th><td data-label="teacher service">big</td>' in text
    assert f'<td class="words">{said}</td>' in text


def test_numbers_of_workers_are_told_where_they_changed(tmp_path):
    write_run(tmp_path / "run", domains=("a", "b"), steps=60)
    assert "Workers of the student" not in write_report(tmp_path / "run").read_text()
    path = RunDir(tmp_path / "run").metrics
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    numbers = [2] * (len(lines) - 1) + [1]
    told = [line | {"workers": n} for line, n in zip(lines, numbers, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    page = write_report(tmp_path / "run").read_text()
    assert f"Workers of the student: 2 from step 1, 1 from step {lines[-2]['step'] + 1}." in page
