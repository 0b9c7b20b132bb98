"""Laws of a step that need several ranks: normalisation, ZeRO, dropout, errors that stop all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.data.row_store import write_rows
from shared.run.plan import RunPlan
from student_trainer.metrics.sums import SumLayout
from student_trainer.state.checkpoint import damage_of, latest_checkpoint
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, final_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import (
    POISONED_ID,
    mark_exported,
    plan_of,
    prepared_domains,
    ragged_rows,
    with_states,
)
from tests.telling import asked, telling

LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.5}
GRADIENTS = {
    "reference": (1, 8, {}),
    "1x8 one rank": (1, 1, {}),
    "2x4 one rank": (1, 2, {}),
    "1x4 two ranks": (2, 1, {}),
    "2x2 two ranks": (2, 2, {}),
    "4x1 two ranks": (2, 4, {}),
    "zero 1": (2, 2, {"zero": 1}),
    "zero 2": (2, 2, {"zero": 2}),
    "zero 3": (2, 2, {"zero": 3}),
    "checkpointing": (2, 2, {"activation_checkpointing": True}),
}

# A token-adaptive loss splits the tokens of the whole step, however it is cut.
ADAPTIVE = {
    f"adaptive {name}": GRADIENTS[name]
    for name in ("reference", "1x8 one rank", "2x4 one rank", "2x2 two ranks", "4x1 two ranks")
}
ATKD = [{"kind": "atkd"}, {"kind": "soft_cross_entropy", "weight": 0.5}]
# So it does in reverse, by what the student says of all of them.
REVERSE = {
    f"reverse {name}": GRADIENTS[name]
    for name in ("reference", "1x8 one rank", "2x4 one rank", "2x2 two ranks", "zero 3")
}
# All divergences at once, with the head of one rank and with one gathered from two.
DIVERGENCES = {"divergences reference": (1, 8, {}), "divergences zero 3": (2, 2, {"zero": 3})}
EVERY_DIVERGENCE = [
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "reverse_kl"},
    {"kind": "jsd", "beta": 0.1, "continuous": True},
    {"kind": "skew_forward_kl"},
    {"kind": "skew_reverse_kl", "temperature": 2.0},
    {"kind": "total_variation"},
    {"kind": "akl"},
    {"kind": "generalised_kl", "direction": "reverse"},
    {"kind": "taid"},
]
# The teacher's last states in place of ids: what its whole vocabulary teaches.
WHOLE = {"states reference": (1, 8, {})}
WHOLE |= {f"states zero {zero}": (2, 2, {"zero": zero}) for zero in range(4)}
# Which ids are drawn does not depend on who asks.
DRAWN = {
    "drawn reference": (1, 8, {}),
    "drawn 1x8 one rank": (1, 1, {}),
    "drawn two ranks": (2, 2, {}),
    "drawn zero 3": (2, 2, {"zero": 3}),
}
THRESHOLD = {
    "losses": [{"kind": "forward_kl", "temperature": 2.0}, {"kind": "cross_entropy"}],
    "targets": {"selector": "threshold"},
}
# Which ids a student names does not depend on who holds which of its weights and rows.
NAMING = {
    "naming reference": (1, 8, {}),
    "naming 1x8 one rank": (1, 1, {}),
    "naming two ranks": (2, 2, {}),
    "naming zero 3": (2, 2, {"zero": 3}),
}
NAMED = {
    "losses": [{"kind": "reverse_kl", "temperature": 2.0}, {"kind": "jsd"}],
    "targets": {"student_ids": 8},
}
CUTS = GRADIENTS | ADAPTIVE | REVERSE | DIVERGENCES | WHOLE | DRAWN | NAMING
TELLING = (
    *("1x8 one rank", "2x2 two ranks", "zero 3", "checkpointing", "adaptive 4x1 two ranks"),
    *("reverse zero 3", "divergences zero 3", "states zero 2", "drawn zero 3", "naming zero 3"),
)
every_cut = pytest.mark.parametrize(
    "name", telling([name for name in CUTS if "reference" not in name], *TELLING)
)


def losses_of(name: str) -> dict:
    """The losses of a cut, where they are not the default ones."""
    if name in DRAWN:
        return THRESHOLD
    if name in NAMING:
        return NAMED
    if name in REVERSE:
        return {"losses": [{"kind": "atkd", "direction": "reverse"}]}
    if name in WHOLE:
        return {"losses": [*EVERY_DIVERGENCE, {"kind": "atkd"}]}
    if name in DIVERGENCES:
        return {"losses": EVERY_DIVERGENCE}
    return {"losses": ATKD} if name in ADAPTIVE else {}


def reference_of(name: str) -> str:
    """The cut that the others of its losses are compared with."""
    kinds = {"adaptive reference": ADAPTIVE, "reverse reference": REVERSE}
    kinds |= {"divergences reference": DIVERGENCES, "states reference": WHOLE}
    kinds |= {"drawn reference": DRAWN, "naming reference": NAMING}
    return next((reference for reference, cuts in kinds.items() if name in cuts), "reference")


class Laws:
    """Everything the tests look at, from one group of one process and one of two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pair = tiny.save_pair(folder / "models", tied=False)
        self.domains = prepared_domains(folder)
        self.jobs: dict[int, dict[str, dict]] = {1: {}, 2: {}}
        self.results: dict[str, dict] = {}
        self.plans: dict[str, RunPlan] = {}

    def add(self, name: str, kind: str, *, ranks: int = 2, **options: object) -> None:
        arguments = options.pop("arguments", {})
        domains = options.pop("prepared", self.domains)
        where = options.pop("folder", name.replace(" ", "-"))
        pair = options.pop("pair", self.pair)
        states, whole = options.pop("states", False), options.pop("whole", False)
        plan = plan_of(self.folder / str(where), pair, domains, **options)  # type: ignore[arg-type]
        if states:
            plan = with_states(plan, self.folder / "cache")
        if whole:
            assert plan.validation_question is not None
            plan = replace(plan, training_question=plan.validation_question)
        mark_exported(plan)
        self.plans[name] = plan
        self.jobs[ranks][name] = as_job(kind, plan, **arguments)  # type: ignore[arg-type]

    def run(self) -> None:
        for ranks in (2, 1):
            jobs = self.jobs[ranks]
            found = run_jobs(list(jobs.values()), self.folder / f"jobs-{ranks}", ranks=ranks)
            self.results |= dict(zip(jobs, found, strict=True))

    def gradient(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def laws(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Laws:
    """All jobs of this file, run."""
    laws = Laws(tmp_path_factory.mktemp("laws"))
    cuts = asked(request, "name")
    for name in dict.fromkeys(["adaptive reference", *map(reference_of, cuts), *cuts]):
        ranks, micro_batch, student = CUTS[name]
        laws.add(
            name,
            "gradient",
            **losses_of(name),
            ranks=ranks,
            student={"workers": ranks, "zero": 0, **student},
            batch={"rows_per_step": 8, "micro_batch": micro_batch},
            arguments={"file": str(laws.folder / f"{name}.pt")},
            states=name in WHOLE and name != "states reference",
            whole=name == "states reference",
        )
    laws.add("ranks agree", "ranks_agree", student={"zero": 2})
    text_alone = [{"kind": "cross_entropy"}]
    laws.add("dropout", "dropout", student={"train": LORA, "zero": 0}, losses=text_alone)
    laws.add(
        "norms",
        "norms_around_evaluation",
        student={"train": LORA | {"kind": "qlora", "dropout": 0.0}, "zero": 0},
        losses=text_alone,
    )
    twin = tiny.Pair(laws.pair.teacher, laws.pair.teacher)
    laws.add(
        "same model",
        "gradient",
        pair=twin,
        losses=[{"kind": "forward_kl"}],
        targets={"top_k": 16, "encoding": "fp32"},
        arguments={"file": str(laws.folder / "same model.pt")},
    )
    for name, own in (("names no id", 0), ("names ids", 12)):
        laws.add(
            name,
            "train",
            student={"train": LORA},
            losses=[{"kind": "reverse_kl"}],
            targets={"top_k": tiny.VOCAB - own, "student_ids": own},
        )
    add_poisoned(laws)
    add_far(laws)
    laws.add("two steps", "train", folder="disk", steps=2)
    laws.add("full disk", "full_disk", folder="disk", steps=4)
    laws.add("fewer rows", "train", folder="disk", steps=4, batch={"rows_per_step": 4})
    states = {"states": {"buffer": {"rows": []}}}
    laws.add("other states", "other_states", ranks=2, folder="disk", steps=4, arguments=states)
    laws.run()
    return laws


def add_poisoned(laws: Laws) -> None:
    """A run whose student has no finite state for one token, which row code/7 alone holds."""
    model = AutoModelForCausalLM.from_pretrained(laws.pair.student)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISONED_ID] = float("nan")
    model.save_pretrained(laws.folder / "poisoned")
    tiny.save_tokenizer(laws.folder / "poisoned")
    rows = ragged_rows(0, count=24)
    rows.input_ids[7][0] = POISONED_ID
    path = laws.folder / "poisoned.arrow"
    write_rows(path, domain="code", rows=rows)
    code = replace(laws.domains[0], train_path=str(path))
    laws.add(
        "poisoned",
        "train",
        steps=6,
        prepared=(code, laws.domains[1]),
        pair=tiny.Pair(laws.pair.teacher, laws.folder / "poisoned"),
        checkpoints={"every": 1, "keep": 9},
    )


def add_far(laws: Laws) -> None:
    """A student that is sure of other tokens than its teacher, as under another tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(laws.pair.student)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    model.save_pretrained(laws.folder / "far")
    tiny.save_tokenizer(laws.folder / "far")
    laws.add("far", "train", pair=tiny.Pair(laws.pair.teacher, laws.folder / "far"))


@every_cut
def test_gradients_do_not_depend_on_how_a_step_is_cut(laws: Laws, name: str) -> None:
    expected, found = laws.gradient(reference_of(name)), laws.gradient(name)
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for weight, gradient in expected.items():
        assert (found[weight] - gradient).abs().max() <= 1e-5 * scale, weight


@every_cut
def test_sums_do_not_depend_on_how_a_step_is_cut(laws: Laws, name: str) -> None:
    expected = laws.results[reference_of(name)]["sums"]
    np.testing.assert_allclose(laws.results[name]["sums"], expected, rtol=1e-5)


def test_half_of_a_steps_tokens_are_hard(laws: Laws) -> None:
    sums = laws.results["adaptive reference"]["sums"]
    layout = SumLayout.of(laws.plans["adaptive reference"].config)
    hard = sum(sums[layout.place("hard_share")])
    assert hard == laws.results["adaptive reference"]["tokens"] // 2 + 1


def test_every_rank_holds_the_same_bits_after_three_steps(laws: Laws) -> None:
    first, second = laws.results["ranks agree"]["digests"]
    assert first == second
    assert laws.results["ranks agree"]["changed"]


def test_dropout_is_on_while_training_and_repeats_with_its_seed(laws: Laws) -> None:
    first, other, again = laws.results["dropout"]["losses"]
    assert first == again
    assert first != other


def test_a_student_that_names_ids_draws_the_same_numbers_and_rows(laws: Laws) -> None:
    """All ids are kept either way; what differs is a forward pass before every step, and dropout
    and prefetch know nothing of it."""
    runs = [laws.folder / name for name in ("names-no-id", "names-ids")]
    assert not any(laws.results[name]["error"] for name in ("names no id", "names ids"))
    weights, others = (final_weights(run) for run in runs)
    assert weights
    assert all((others[name] == weight).all() for name, weight in weights.items())
    assert comparable_lines(runs[0]) == comparable_lines(runs[1])


def test_an_evaluation_pass_leaves_quantised_gradients_alone(laws: Laws) -> None:
    before, after = laws.results["norms"]["norms"]
    assert before > 0
    assert before == after


def test_a_student_that_is_its_teacher_has_nothing_to_learn(laws: Laws) -> None:
    loss = laws.results["same model"]["sums"][0]
    assert abs(loss) < 1e-4
    gradients = laws.gradient("same model")
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-5


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_row(laws: Laws) -> None:
    found = laws.results["poisoned"]
    assert found["error"] == "NonFiniteLossError"
    assert "in code, rows code/7;" in found["message"]
    step = int(found["message"].split("step ")[1].split()[0])
    last = latest_checkpoint(laws.folder / "poisoned" / "checkpoints")
    assert (last is None) == (step == 1)
    assert last is None or last.name == f"step-{step - 1:06d}"


def test_a_full_disk_stops_all_ranks_and_keeps_the_checkpoint_before(laws: Laws) -> None:
    found = laws.results["full disk"]
    assert found["error"] == "StorageError"
    assert "step-000004" in found["message"]
    left = [p.name for p in (laws.folder / "disk" / "checkpoints").glob("step-*")]
    assert left == ["step-000002"]
    assert damage_of(laws.folder / "disk" / "checkpoints" / "step-000002") is None


def test_a_checkpoint_with_a_state_that_nothing_takes_up_is_refused(laws: Laws) -> None:
    found = laws.results["other states"]
    assert found["error"] == "CheckpointError"
    assert "step-000002 holds a state named buffer, which nothing" in found["message"]


def test_a_checkpoint_of_other_blocks_of_rows_is_refused(laws: Laws) -> None:
    found = laws.results["fewer rows"]
    assert found["error"] == "CheckpointError"
    assert "batch.rows_per_step 8, now it is 4" in found["message"]


def test_a_student_further_from_its_teacher_than_one_that_knows_nothing_stops_before_a_step(
    laws: Laws,
) -> None:
    result, run_dir = laws.results["far"], Path(laws.plans["far"].run_dir)
    assert result["error"] == "HandshakeError"
    assert f"at most ln {tiny.VOCAB} = {np.log(tiny.VOCAB):.3f}" in result["message"]
    said = (run_dir / "logs" / "progress.log").read_text()
    assert "KL of the unchanged student to its teacher, nats per token: code " in said
    assert not latest_checkpoint(run_dir / "checkpoints")
    assert not (run_dir / "evaluations.json").exists()
