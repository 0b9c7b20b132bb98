"""Does it pay that a teacher writes rows? `tutelage active` on intents with few labels.

The teacher of 6 M weights was trained for what is asked of it: its prompts are those of the rounds,
made up from the few rows and drawn scores, and its answers rows of the classes that are weak there,
taken from text that no student sees; half of its rows are utterances with their intents. Accuracy
is of test rows that neither rounds nor validation hold.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.active.answers import Answer
from cluster.active.classes import ClassScore, weakest
from cluster.active.folder import ActiveDir
from cluster.active.material import Material, material_of
from cluster.active.pgkd import prompt
from shared.config.file import load_config, resolve
from shared.run.run_dir import write_atomically

NUM_CLASSES, PARTS = 10, {"few": 5, "validation": 15, "test": 20}  # rows of each class
MADE_SEED, TEACHER_PROMPTS = 100, 1000
FOLDER = "made/rounds"
INSTRUCTION = "Write utterances to an assistant, each with its intent."
OPTIONS = {
    "steps": "60",
    "teachers": f"{{writer: {{model: {FOLDER}/writer, cpus: 0.5}}}}",
    "student": "{model: models/student-base-1m, cpus: 0.5}",
    "domains.intent.train": f"{FOLDER}/few.jsonl",
    "domains.intent.validation": f"{FOLDER}/validation.jsonl",
    "data.context": "96",
    "batch": "{rows_per_step: 16, micro_batch: 16}",
    "losses": "[{kind: cross_entropy}]",
    "optimiser.lr": "2e-3",
    "active": "{method: pgkd, rounds: 3, patience: 3, start: base, prompts: 16, rows: 3, shots: 1, "
    "correct: 0, incorrect: 0, hard_negatives: 1, report_classes: 2, max_new_tokens: 120, "
    f"validation_prompts: 150, budget_tokens: 200000, instruction: '{INSTRUCTION}'}}",
}
Run = Callable[..., None]  # a command on a recipe


@dataclass(frozen=True)
class Rows:
    """Rows of a few classes, by what they are for."""

    parts: dict[str, list[dict]]
    rest: dict[str, list[dict]]  # of each class; what the teacher learns to write


def drawn_rows(root: Path) -> Rows:
    """The same classes and rows, whatever the seed of a trial."""
    by_class = defaultdict(list)
    for path in sorted((root / "data" / "intent").glob("*.train.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            by_class[row["response"]].append(row)
    draws = random.Random(MADE_SEED)
    full = sorted(name for name, rows in by_class.items() if len(rows) >= 2 * sum(PARTS.values()))
    chosen = draws.sample([name for name in full if name != "oos"], NUM_CLASSES)
    parts: dict[str, list[dict]] = {part: [] for part in PARTS}
    rest = {}
    for name in chosen:
        rows = draws.sample(by_class[name], len(by_class[name]))
        for part, count in PARTS.items():
            parts[part] += rows[:count]
            rows = rows[count:]
        rest[name] = rows
    return Rows(parts, rest)


def make_writer(to: Path, *, folder: Path, root: Path, command: Run) -> None:
    """The text of all parts, and the teacher that writes."""
    rows, place = drawn_rows(root), to.parent
    place.mkdir(parents=True, exist_ok=True)
    for part, own in rows.parts.items():
        write_atomically(place / f"{part}.jsonl", "\n".join(map(json.dumps, own)))
    taught = [row for own in rows.rest.values() for row in own]
    taught += _lessons(rows, _material(folder, root))
    random.Random(MADE_SEED).shuffle(taught)
    write_atomically(place / "writer.jsonl", "\n".join(map(json.dumps, taught)))
    options = OPTIONS | {
        "name": "writer",
        "student": "{model: models/teacher-6m, cpus: 0.5}",
        "teachers": "{none: {model: models/teacher-6m, cpus: 0.1}}",
        "domains.intent.train": f"{FOLDER}/writer.jsonl",
        "data": "{context: 512, validation_rows: 8, too_long: drop}",
        "steps": "250",
        "batch": "{rows_per_step: 8, micro_batch: 8}",
        "optimiser.lr": "1e-3",
        "seed": str(MADE_SEED),
        "active": "null",
    }
    command("pgkd", options, folder=folder, root=root)
    (folder / "runs" / "writer" / "export").rename(to)


def _material(folder: Path, root: Path) -> Material:
    from transformers import AutoTokenizer

    recipe = Path(__file__).resolve().parents[3] / "cluster" / "recipes" / "pgkd.yaml"
    options = {n: v.replace("made/", f"{folder}/made/") for n, v in OPTIONS.items()}
    options |= {"paths.root": str(root), "teachers": "{writer: {model: models/teacher-6m}}"}
    overrides = [f"{n}={v}" for n, v in options.items()]
    config = resolve(load_config(recipe, overrides))
    return material_of(config, AutoTokenizer.from_pretrained(root / "models" / "teacher-6m"))


def _lessons(rows: Rows, material: Material) -> list[dict]:
    """Prompts as rounds make them, of drawn scores and mistakes, with answers in their form."""
    draws, found = random.Random(MADE_SEED), []
    keys, shots = sorted(material.train), material.shots(1)
    for _ in range(TEACHER_PROMPTS):
        scores = {name: _drawn_score(draws) for name in material.classes}
        hard = [_drawn_answer(draws.choice(keys), material, draws)]
        text = prompt(material, shots, scores, [], [], hard)
        asked = [*weakest(scores, 2), material.row(hard[0].key).response, hard[0].text]
        wanted = [draws.choice(rows.rest[draws.choice(asked)]) for _ in range(3)]
        found.append({"prompt": text, "response": "\n".join(map(json.dumps, wanted))})
    return found


def _drawn_score(draws: random.Random) -> ClassScore:
    precision, recall = draws.random(), draws.random()
    return ClassScore(precision, recall, 2 * precision * recall / (precision + recall), 15, 15)


def _drawn_answer(key: str, material: Material, draws: random.Random) -> Answer:
    right = material.row(key).response
    return Answer(key, right, draws.choice(material.classes), draws.random())


def measures_of_rounds(run: Path, folder: Path) -> dict[str, Any]:
    """Accuracy on test rows of the first round's student, which saw the few rows alone, and of the
    best round's, which began like it, and how many rows were kept."""
    active = ActiveDir(run)
    told = json.loads(active.rounds.read_text())
    test = [json.loads(line) for line in (folder / FOLDER / "test.jsonl").read_text().splitlines()]
    best = told["best"]
    accuracy = {
        "hard": accuracy_of(active.round(0).run.export, test),
        "after": accuracy_of(active.round(best).run.export, test),
        "teacher": accuracy_of(folder / FOLDER / "writer", test),
    }
    return {"accuracy": accuracy, "kept": {"after": sum(one["kept"] for one in told["rounds"])}}


def accuracy_of(model: Path, rows: Sequence[dict]) -> float:
    """The share of rows that plain `transformers` answers rightly, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = [f"{tokenizer.bos_token}{row['prompt']}\n" for row in rows]
    asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        ids = network.generate(**asked, max_new_tokens=16, do_sample=False)
    length = asked["input_ids"].shape[1]
    answers = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    right = [a.strip() == row["response"] for a, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)
