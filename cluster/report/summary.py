"""What a run says at its end: `summary.json` for programs and a table for people."""

import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.builtin.corpus import is_built_in
from cluster.report.classes import class_table
from cluster.report.measurement import (
    BaselineSummary,
    DomainSummary,
    Failures,
    Summary,
    domain_summary,
    kl,
    measure,
    measure_baseline,
    nll,
    teacher_summary,
)
from cluster.report.record import RunRecord, read_record
from shared.config.paths import in_job
from shared.config.tasks.task import OfEntities, Tagging
from shared.in_words import NAME_WIDTH, shortened
from shared.loading import is_bag
from shared.run.metrics import DomainEvaluation
from shared.run.run_dir import RunDir, write_atomically

CELL_WIDTH, TABLE_WIDTH = 8, 100


def summarise(run_dir: Path, *, status: str, failures: Failures) -> Summary:
    """Write `summary.json`, and `baseline.json` where a baseline ran; return the summary.

    `status` is "finished", "failed" or "interrupted". Files are replaced whole or not at all.
    """
    record = read_record(run_dir)
    summary = measure(record, status=status, failures=failures)
    _write_json(RunDir(run_dir).summary, summary)
    if record.baseline:
        _write_json(RunDir(run_dir).baseline_summary, measure_baseline(record, record.baseline))
    return summary


def _write_json(path: Path, value: Summary | BaselineSummary) -> None:
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def final_table(run_dir: Path) -> str:
    """Per domain the teacher, the student before and after, and the one on hard labels; then
    which student is lower, where the report is, and what to run next. At most 100 columns."""
    record = read_record(run_dir)
    verdicts = verdict(record)
    blocks = [_table(record), _classes(record), _teachers(record), verdicts, _what_next(record)]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def verdict(record: RunRecord) -> list[str]:
    """Plain sentences: what training changed, and which of two students is lower where."""
    sentences = [*_stopped(record), *_change(record)]
    if record.baseline is None:
        return sentences
    for quantity, measured in (("KL to the teacher", kl), ("NLL", nll)):
        sentences += _lower(record, record.baseline, quantity=quantity, measured=measured)
    return sentences


def _stopped(record: RunRecord) -> list[str]:
    config = record.config
    if record.log.end(config.steps) > min(record.steps, config.steps - 1):
        return []
    return [
        f"Stopped after step {record.steps} of {config.steps}: the student's perplexity was at "
        f"most {config.stop_ratio:g} times the teacher's in every domain."
    ]


def _change(record: RunRecord) -> list[str]:
    falls: dict[str, float] = {}
    for name in record.domains:
        before, after = kl(record.before.get(name)), kl(record.after.get(name))
        if before and after is not None:
            falls[name] = 1 - after / before
    if not falls:
        return []
    rose = [name for name, fall in falls.items() if fall <= 0]
    if rose:
        return [f"KL to the teacher did not fall in {', '.join(rose)}."]
    hardly = [name for name, fall in falls.items() if fall < 0.01]
    if hardly:
        return [f"KL to the teacher fell in every domain, by less than 1 % in {', '.join(hardly)}."]
    least = math.floor(100 * min(falls.values()))
    return [f"KL to the teacher fell by {least} % or more in every domain."]


def _lower(
    record: RunRecord,
    baseline: RunRecord,
    *,
    quantity: str,
    measured: Callable[[DomainEvaluation | None], float | None],
) -> list[str]:
    """Who ends lower in which domains, if both students were measured."""
    lower: dict[str, list[str]] = {"distilled student": [], "hard labels": [], "neither": []}
    for name in record.domains:
        distilled, hard = (measured(run.after.get(name)) for run in (record, baseline))
        if distilled is None or hard is None:
            continue
        winner = "distilled student" if distilled < hard else "hard labels"
        lower["neither" if distilled == hard else winner].append(name)
    compared = sum(len(names) for names in lower.values())
    parts = [
        f"{who} in {'every domain' if len(names) == compared else ', '.join(names)}"
        for who, names in lower.items()
        if names
    ]
    return [f"Lower {quantity}: {'; '.join(parts)}."] if parts else []


def _table(record: RunRecord) -> list[str]:
    """Header lines and a line per domain; the hard-labels columns only where they exist."""
    domains = {name: domain_summary(record, name) for name in record.domains}
    kinds = ", ".join(sorted({domain["kl_kind"] for domain in domains.values()} - {"none"}))
    heads = (["teacher", "before", "after"], ["before", "after"], ["first", "last"])
    if record.baseline:
        heads[0].append("hard")
        heads[1].append("hard")
    width = _width(record)
    return [
        f"Validation text, nats per {record.config.task.unit}; lower is better.",
        *([f"KL(teacher || student): {kinds}"] if kinds else []),
        *_heads(("NLL", "KL", "weight"), heads, width=width),
        *(_line(record, name, domain, width=width) for name, domain in domains.items()),
        *(["hard: the same student trained on hard labels alone"] if record.baseline else []),
    ]


def _width(record: RunRecord) -> int:
    """Of the column of domains."""
    return min(NAME_WIDTH, max(len("domain"), *map(len, record.domains)))


def _heads(titles: Sequence[str], heads: Sequence[list[str]], *, width: int) -> list[str]:
    """Two lines over groups of columns."""
    groups = [
        f" {title} ".center(CELL_WIDTH * len(head) - 1, "-")
        for title, head in zip(titles, heads, strict=True)
    ]
    return [
        "".join([" " * width, *(f"    {group}" for group in groups)]),
        "".join(["domain".ljust(width), *("   " + _cells(group) for group in heads)]),
    ]


def _classes(record: RunRecord) -> list[str]:
    """A line per domain whose rows have classes; at most 100 columns."""
    titles, who, lines, note, costs = class_table(record)
    if not lines:
        return []
    width = _width(record)
    return [
        f"Validation rows. {note}",
        *_heads(titles, [who] * len(titles), width=width),
        *(
            shortened(line.domain, width).ljust(width)
            + "".join("   " + _cells(list(map(_number, group))) for group in line.values)
            for line in lines
        ),
        *(["What a row takes, asked by itself, a teacher through its service."] if costs else []),
        *costs,
    ]


def _teachers(record: RunRecord) -> list[str]:
    """A line per teacher, where there are several; at most 100 columns."""
    found = {name: teacher_summary(record, name) for name in record.config.teachers}
    if len(found) == 1:
        return []
    width = min(NAME_WIDTH, max(len("teacher"), *map(len, found)))
    room = TABLE_WIDTH - width - 4 * CELL_WIDTH - 6
    lines = [
        "By teacher: KL before and after, share of training that waited, bytes per loss token.",
        f"{'teacher'.ljust(width)}   {_cells(['KL', 'KL', 'wait', 'B/token'])}   domains",
    ]
    for name, one in found.items():
        kls = [_number(one["kl_before"]), _number(one["kl_after"])]
        cost = [f"{one['wait_fraction']:.1%}", f"{one['wire_bytes_per_token']:.0f}"]
        domains = shortened(", ".join(one["domains"]), room)
        lines.append(f"{shortened(name, width).ljust(width)}   {_cells([*kls, *cost])}   {domains}")
    return lines


def _line(record: RunRecord, name: str, domain: DomainSummary, *, width: int) -> str:
    nlls = [domain["teacher_nll"], domain["student_nll_before"], domain["student_nll_after"]]
    kls = [domain["kl_before"], domain["kl_after"]]
    if record.baseline:
        hard = record.baseline.after.get(name)
        nlls.append(nll(hard))
        kls.append(kl(hard))
    weights = [domain["weight_first"], domain["weight_last"]]
    groups = ([_number(value) for value in group] for group in (nlls, kls, weights))
    return "".join(
        [shortened(name, width).ljust(width), *("   " + _cells(group) for group in groups)]
    )


def _cells(texts: list[str]) -> str:
    return "".join(text.rjust(CELL_WIDTH) for text in texts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _what_next(record: RunRecord) -> list[str]:
    run, program = _near(record.directory), _program()
    files = RunDir(run)
    peft = record.config.student.train.kind != "full"
    library, loader = ("peft", "AutoPeft") if peft else ("transformers", "Auto")
    more = ", trust_remote_code=True" if record.config.student.trust_remote_code else ""
    model = f"{loader}ModelForCausalLM"
    if (task := record.config.task).classifies:
        kind = "Token" if isinstance(task, Tagging) else "Sequence"
        model = f"{loader}ModelFor{kind}Classification"
        more += f", num_labels={len(task.classes)}" if peft else ""
    if task.sees and not peft:
        model = "AutoModelForImageTextToText"
    used = [
        f"Use it    from {library} import {model}",
        f'          model = {model}.from_pretrained("{files.export}"{more})',
    ]
    if is_bag(record.config.student.model) or (task.sees and peft):
        used = [f"Use it    as {files.export / 'README.md'} says"]
    return [
        f"Report    {files.report}",
        f"Numbers   {files.summary}",
        *([] if isinstance(task, OfEntities) else [f"Evaluate  {program} eval {run}"]),
        *used,
        *_after_demo(record, program),
        *_to_fetch(files),
    ]


def _after_demo(record: RunRecord, program: str) -> list[str]:
    """What to try after a run of the built-in models; a run of one's own has no such lines."""
    config = record.config
    if not is_built_in(config.student.model, config.paths.cache):
        return []
    return [
        f"Next      {program} init my.yaml, for models and text of your own",
        f"          {program} recipes, configs to start from",
    ]


def _to_fetch(files: RunDir) -> list[str]:
    """How the student comes to where a job was submitted from, unless the run's folder is mounted
    there too."""
    if not in_job():
        return []
    here, export = socket.gethostname(), files.export.absolute()
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return [f"Fetch it  kubectl cp {here}:{export} export"]
    return [f"Fetch it  scp -r {here}:{export} ."]


def _program() -> str:
    """How to call `tutelage` from here, where its environment may not be active."""
    beside = Path(sys.executable).parent / "tutelage"
    if shutil.which("tutelage") or not beside.exists():
        return "tutelage"
    return str(_near(beside))


def _near(path: Path) -> Path:
    """Relative to the current folder where the path lies below it; whole in the log of a job, whose
    reader is elsewhere."""
    if in_job():
        return path
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray may remove a submitted job's folder before the job has ended
        return path
    return path.relative_to(here) if path.is_relative_to(here) else path
