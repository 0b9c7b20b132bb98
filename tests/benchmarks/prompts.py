"""Does prompt optimisation help the teacher, and the student distilled from it?

`python -m tests.benchmarks.prompts --folder FOLDER` constructs a task with right answers: a small
Llama is trained to pick one of the words of a line, which one only an instruction (in many
wordings) or worked examples tell; without either it guesses. A domain holds lines and the word
that one task wants, without its instruction. For each seed, `tutelage prompts optimise` searches
from an instruction that is vague or wrong; then a student is distilled by `tutelage run` from the
same teacher without and with what was found, and asked for the words of lines it never saw.

Shares are printed with 95 % Wilson intervals.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.prompt_search import wording
from cluster.prompt_search.search import GENERIC
from shared.prompts.prompts import Example, Prompt
from shared.targets.generation import GenerationSpec, Openings
from teacher_service.engine.hf import HFEngine

PROJECT = Path(__file__).resolve().parents[2]
WORDS = {
    "colour": "red blue green white black pink grey brown gold violet",
    "animal": "cat dog cow hen fox owl bee ant pig goat wolf bear",
    "number": "one two three four five six seven eight nine ten",
    "fruit": "apple pear plum fig grape lemon melon peach cherry lime",
}
KINDS = {kind: words.split() for kind, words in WORDS.items()}
PLACES = {"first": 0, "last": -1}
STARTS = {"last": "Write the first word.", "animal": "Give the right word."}
VERBS = ("Write", "Give", "Say", "Name", "Find", "Pick", "Return")
ENDINGS = (".", " of the line.", " in the text.", " only.")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CONTEXT = 128
NEW_LINES, TRAINING_LINES = 300, 3000


def line_of(draw: random.Random) -> str:
    """A word of each kind, in any order."""
    words = [draw.choice(kind) for kind in KINDS.values()]
    draw.shuffle(words)
    return " ".join(words)


def answer(task: str, line: str) -> str:
    """The word of a line that a task wants."""
    words = line.split()
    if task in PLACES:
        return words[PLACES[task]]
    return next(word for word in words if word in KINDS[task])


def instruction(task: str, draw: random.Random) -> str:
    """A task in one of many wordings."""
    what = f"{task} word" if task in PLACES else task
    text = f"{draw.choice(VERBS)} the {what}{draw.choice(ENDINGS)}"
    return draw.choice([text, text, *wording.rewrites(text).values()])


def document(draw: random.Random) -> tuple[Prompt, str, str]:
    """A prompt, a line and its word: told by an instruction, by examples, by both or by neither."""
    task = draw.choice([*PLACES, *KINDS])
    told = draw.choice([task, task, ""])
    text = instruction(told, draw) if told else draw.choice(["", *GENERIC])
    lines = [line_of(draw) for _ in range(draw.randint(0, 4))]
    examples = tuple(Example(line, answer(task, line)) for line in lines)
    line = line_of(draw)
    return Prompt(text, examples), line, answer(task, line)


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Words, signs and line breaks are tokens."""
    texts = [instruction(task, random.Random(n)) for task in [*PLACES, *KINDS] for n in range(300)]
    texts += [*GENERIC, *wording.NEAR, *STARTS.values(), *(w for k in KINDS.values() for w in k)]
    texts += [" ".join(near.capitalize() for near in wording.near_words(v)) for v in VERBS]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" "), "removed"),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated"),
        ]
    )
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)} | {"\n"}
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *sorted(pieces)])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder: Path, *, width: int, layers: int, steps: int, told: bool, seed: int = 0
) -> None:
    """Train a Llama on `document`s, or with `told` off on lines without any prompt, and save it."""
    if (folder / "config.json").exists():
        return
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # its tensors are too small to share
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model, draw = LlamaForCausalLM(config), random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 3e-3, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        ids_BT, labels_BT = batch(tokenizer, [document(draw) for _ in range(48)], told=told)
        logits_BTV = model(ids_BT, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if (step + 1) % 200 == 0:
            print(f"{folder.name}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


def batch(tokenizer, documents: Sequence[tuple[Prompt, str, str]], *, told: bool):
    """Padded ids [B, T], and labels [B, T-1] that count answers and what ends them alone."""
    rows, labels = [], []
    for prompt, line, word in documents:
        text = f"{prompt.text() if told else ''}{line}\n{word}"
        ids = [1, *tokenizer(text)["input_ids"], 2]
        rows.append(ids)
        newline = tokenizer.convert_tokens_to_ids("\n")
        starts = [i for i in range(5, len(ids) - 1) if is_answer(ids, i, newline)]
        wanted = {*starts, len(ids) - 1}
        labels.append([ids[i] if i in wanted else -100 for i in range(1, len(ids))])
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    labels_BT = torch.tensor([[*row, *[-100] * (width - 1 - len(row))] for row in labels])
    return ids_BT, labels_BT


def is_answer(ids: Sequence[int], position: int, newline: int) -> bool:
    """Whether one word stands alone on the line after a line of words."""
    before, opens, word, after = ids[position - 2 : position + 2]
    return opens == newline and newline not in (before, word) and after in (newline, 2)


def write_job(folder: Path, task: str, *, seed: int) -> Path:
    """A config of one domain and its lines, others for training than for validation."""
    draw = random.Random(f"{task}/{seed}")
    lines = list(dict.fromkeys(line_of(draw) for _ in range(TRAINING_LINES + NEW_LINES)))
    rows = [json.dumps({"prompt": line, "response": answer(task, line)}) for line in lines]
    (folder / "valid.jsonl").write_text("\n".join(rows[:NEW_LINES]))
    (folder / "train.jsonl").write_text("\n".join(rows[NEW_LINES:]))
    models = folder.parent.parent
    job = {
        "name": "job",
        "seed": seed,
        "steps": 200,
        "log_every": 50,
        "paths": {"root": str(folder), "runs": str(folder), "cache": str(folder / "cache")},
        "teachers": {"teacher": {"model": str(models / "teacher"), "cpus": 0.5}},
        "student": {"model": str(models / "base"), "cpus": 0.5, "zero": 0},
        "domains": {task: {"train": "train.jsonl", "validation": "valid.jsonl"}},
        "data": {"context": 32},
        "batch": {"rows_per_step": 32, "micro_batch": 32},
        "targets": {"top_k": 32},
        "optimiser": {"lr": 2e-3, "warmup_steps": 10},
        "prompt_search": {"instructions": {task: STARTS[task]}, "confirm_documents": 200},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def tutelage(*arguments: str | Path) -> None:
    """The command, as a user gives it."""
    command = [sys.executable, "-m", "cluster", *map(str, arguments), "--address", "local"]
    subprocess.run(command, cwd=PROJECT, check=True)


def student_right(export: Path, lines: Path) -> int:
    """How many new lines a student answers right, shown nothing but the line."""
    engine = HFEngine.load(str(export))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    rows = [json.loads(row) for row in lines.read_text().split("\n")]
    asked = [[1, *tokenizer(f"{row['prompt']}\n")["input_ids"]] for row in rows]
    openings = Openings.build(names=[str(n) for n in range(len(rows))], input_ids=asked)
    written = engine.generate(openings, GenerationSpec(4, stop_ids=(2,))).ids()
    said = tokenizer.batch_decode(written)
    return sum(one.split() == [row["response"]] for one, row in zip(said, rows, strict=True))


def share(right: int, total: int) -> str:
    """A share with its 95 % Wilson interval."""
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return f"{p:.3f} [{middle - half:.3f}, {middle + half:.3f}]"


def one_search(
    folder: Path, task: str, *, seed: int, students: bool, overrides: Sequence[str]
) -> None:
    """Search, distil twice, print. Every task has students of its own: they see lines alone."""
    folder.mkdir(parents=True, exist_ok=True)
    job = write_job(folder, task, seed=seed)
    tutelage("prompts", "optimise", job, *overrides)
    entry = json.loads((folder / "prompts.json").read_text())["domains"][task]
    total, prompt = entry["confirm_documents"], entry["prompt"]
    scores = [entry[part]["mean"] for part in ("without_prompt", "confirmed")]
    before, after = (share(round(score * total), total) for score in scores)
    print(f"\nseed {seed}, {task}: kept {entry['kept']}, {len(entry['history'])} tried")
    print(f"  prompt   {prompt['instruction']!r}, {len(prompt['examples'])} examples")
    print(f"  teacher  without {before}   with {after}", flush=True)
    runs = {"without": [], "with": [f"prompts={folder / 'prompts.json'}"]} if students else {}
    told = []
    for name, options in runs.items():
        tutelage("run", job, f"name={name}", *options)
        right = student_right(folder / name / "export", folder / "valid.jsonl")
        told.append(f"{name} {share(right, NEW_LINES)}")
    print(f"  student  {'   '.join(told) or 'not trained'}", flush=True)


def main() -> None:
    """Parse the command line, train the models where the folder lacks them, run every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200, help="of the teacher's training")
    parser.add_argument("--no-students", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the search, as prompt_search.examples=0")
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    save_model(folder / "teacher", width=96, layers=3, steps=asked.steps, told=True)
    save_model(folder / "base", width=64, layers=3, steps=300, told=False, seed=1)
    for seed in range(asked.seeds):
        for task in STARTS:
            place = folder / f"seed-{seed}" / task
            students = not asked.no_students
            one_search(place, task, seed=seed, students=students, overrides=asked.overrides)


if __name__ == "__main__":
    main()
