"""The main job on real text: does the student get closer to the teacher, and what does it cost?

`python -m tests.benchmarks.real_text quality` trains full and LoRA students (ZeRO-2, 2 workers)
beside a copy on hard labels alone, on identical rows and steps, and prints NLL and KL per domain.
`python -m tests.benchmarks.real_text speed` prints tokens/s of the job beside the same student
alone on hard labels, one student and one teacher process with one thread each.

Both run the `tutelage` command on the recipe, as a user would.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
REFERENCE = PROJECT.parent / "shared"
RECIPE = PROJECT / "cluster" / "recipes" / "real_text.yaml"


def run(name: str, runs: Path, *overrides: str) -> Path:
    """One `tutelage run` of the recipe under a name; returns its folder."""
    command = [sys.executable, "-m", "cluster", "run", str(RECIPE)]
    settings = [f"paths.root={REFERENCE}", f"paths.runs={runs}", f"name={name}", *overrides]
    subprocess.run([*command, *settings], cwd=PROJECT, check=True)
    return runs / name


def quality(runs: Path, *, steps: int, seeds: int) -> None:
    """Full and LoRA students after `steps` of 8 x 256 tokens, beside hard labels alone."""
    shape = ["student.zero=2", "student.workers=2", "student.cpus=0.5", f"steps={steps}"]
    shape += ["batch.rows_per_step=8", "batch.micro_batch=4", "data.context=256", "baseline=true"]
    shape += ["mixture={policy: fixed, weights: uniform}"]
    lora = ["student.train.kind=lora", "student.train.r=32", "optimiser.lr=4e-3"]
    students = {"full": ["optimiser.lr=1e-3"], "lora": lora}
    for seed in range(seeds):
        for kind, special in students.items():
            folder = run(f"quality-{kind}-{seed}", runs, *shape, *special, f"seed={seed}")
            print_quality(f"{kind}, seed {seed}", folder)


def print_quality(title: str, folder: Path) -> None:
    """Per domain and in the mean: NLL and KL of the student and of hard labels alone."""
    before = json.loads((folder / "summary.json").read_text())["domains"]
    after = json.loads((folder / "baseline.json").read_text())["students"]
    print(f"\n{title}: nats per token on validation text, distilled | hard labels")
    columns = ("distilled_nll", "hard_labels_nll", "distilled_kl", "hard_labels_kl")
    lines = {
        name: [before[name]["kl_before"], *(both[column] for column in columns)]
        for name, both in after.items()
    }
    for name, cells in lines.items():
        print_cells(name, cells)
    print_cells("mean", [sum(column) / len(lines) for column in zip(*lines.values(), strict=True)])


def print_cells(name: str, cells: list[float]) -> None:
    """One line of the quality table."""
    before, nll, hard_nll, kl, hard_kl = cells
    print(
        f"{name:10} NLL {nll:.3f} | {hard_nll:.3f}   KL {before:.3f} -> {kl:.3f} | {hard_kl:.3f}"
        f"   lower: {'NLL ' if nll < hard_nll else ''}{'KL' if kl < hard_kl else ''}"
    )


def speed(runs: Path, *, steps: int, repeats: int) -> None:
    """Tokens/s with and without a teacher, interleaved, and the time spent waiting for it."""
    shape = [f"steps={steps}", "student.workers=1", "student.cpus=1", "baseline=false"]
    shape += ["teachers.teacher-6m.cpus=1", "mixture={policy: fixed, weights: uniform}"]
    ratios = []
    for repeat in range(repeats):
        with_teacher = run(f"speed-kl-{repeat}", runs, *shape)
        alone = run(f"speed-ce-{repeat}", runs, *shape, "losses=[{kind: cross_entropy}]")
        ours, hard = (json.loads((f / "summary.json").read_text()) for f in (with_teacher, alone))
        ratios.append(ours["tokens_per_s"] / hard["tokens_per_s"])
        print(
            f"\ndistilled {ours['tokens_per_s']:,.0f} tokens/s, hard labels alone "
            f"{hard['tokens_per_s']:,.0f}: ratio {ratios[-1]:.2f}; waiting for the teacher "
            f"{ours['teacher_wait_fraction']:.1%}, {ours['wire_bytes_per_token']:.0f} bytes/token"
        )
    print(f"ratio, best of {repeats}: {max(ratios):.2f}; all: {[f'{r:.2f}' for r in ratios]}")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=1, help="seeds, or pairs of speed runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "quality":
            quality(Path(folder), steps=arguments.steps, seeds=arguments.repeats)
        else:
            speed(Path(folder), steps=arguments.steps, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
