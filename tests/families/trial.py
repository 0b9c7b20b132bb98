"""One family through the product, beside plain transformers with every document alone.

N positions with loss   V vocabulary
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.config.run import Config
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import Rows
from shared.run.plan import RunPlan
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import HiddenAsk, Question
from student_trainer.loop import train
from student_trainer.models.student import LoadStudent
from student_trainer.objective import Objective
from student_trainer.run import close_run, open_run
from student_trainer.sources.batches import Layouts
from student_trainer.state import reload
from student_trainer.state.export import Reloader
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.torchrun import StandingWeights
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import decoded, question_of
from tests.student_trainer.processes import reader_of
from tests.student_trainer.runs import plan_of

CPU = torch.device("cpu")
CLOSE = 2e-4  # nats of a log-probability, or of the largest gradient or state
NEW_TOKENS = 4


class HereReloader(Reloader):
    """Loads an export in this process, where a new one would take longer than all the rest."""

    def __init__(self) -> None:
        pass

    def answer(self, question: dict) -> dict:
        return reload.answer(question) | {"ours": []}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Plain:
    """What plain transformers says of rows."""

    logprobs_NV: Tensor
    labels_N: Tensor
    states: list[Tensor]  # by layer [N, D], the embedding's first

    @property
    def nll(self) -> float:
        return -float(self.logprobs_NV.gather(1, self.labels_N[:, None]).mean())


def plain_of(model: Any, rows: Rows, *, states: bool = False) -> Plain:
    """Every document alone, without padding, positions or cache."""
    logprobs, labels, found = [], [], []
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    for ids, starts, mask in zip(*columns, strict=True):
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            at = torch.from_numpy(np.flatnonzero(mask[start:stop]))
            document = torch.from_numpy(ids[start:stop].astype(np.int64))
            if not len(at):
                continue
            output = model(
                input_ids=document[None],
                use_cache=False,
                return_dict=True,
                output_hidden_states=states,
            )
            logprobs.append(output.logits[0, at].float().log_softmax(-1))
            labels.append(document[at + 1])
            if states:
                found.append([layer[0, at] for layer in output.hidden_states])
    by_layer = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return Plain(torch.cat(logprobs), torch.cat(labels), by_layer)


@dataclass
class Trial:
    """A family's model as teacher and as student of a Llama."""

    family: Path  # its model and tokenizer
    plan: RunPlan  # of its student, whose teacher is a Llama
    engine: HFEngine  # of that Llama
    folder: Path

    @cached_property
    def rows(self) -> Rows:
        """Two rows of each domain."""
        stores = [RowStore.open(domain.train_path) for domain in self.plan.domains]
        return take_rows(stores, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))

    @cached_property
    def validation(self) -> list[Rows]:
        stores = [RowStore.open(domain.validation_path) for domain in self.plan.domains]
        return [
            take_rows(stores, np.full(len(store), place), np.arange(len(store)))
            for place, store in enumerate(stores)
        ]

    def plain(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.family, dtype=torch.float32).eval()

    def scores(self, engine: HFEngine) -> None:
        """The teacher's answers are the model's own log-probabilities and hidden states."""
        widths = engine.describe().state_widths
        with torch.no_grad():
            expected = plain_of(self.plain(), self.rows, states=bool(widths))
        layers = tuple(layer for layer, width in enumerate(widths) if width == widths[0])
        question = Question(_everything().ask, hidden=HiddenAsk(layers, "fp32"))
        found = decoded(engine.score(self.rows, question))
        expected_NV = expected.logprobs_NV[:, : tiny.VOCAB]
        logprobs_NV = np.full(expected_NV.shape, np.nan, np.float32)
        np.put_along_axis(logprobs_NV, found.ids_NK.astype(np.int64), found.logprobs_NK, 1)
        _same("a log-probability", torch.from_numpy(logprobs_NV), expected_NV, CLOSE)
        for layer in layers:
            states_ND = torch.from_numpy(np.array(found.hidden_ND[layer]))
            scale = float(expected.states[layer].abs().max())
            _same(f"state {layer}", states_ND, expected.states[layer], CLOSE * scale)

    def continues(self, engine: HFEngine) -> None:
        """Greedy text of the teacher is that of the model without a cache."""
        openings = [np.arange(3, 12), np.arange(40, 45)]
        asked = Openings.build(names=["a", "b"], input_ids=openings)
        found = engine.generate(asked, GenerationSpec(max_new_tokens=NEW_TOKENS))
        model, expected = self.plain(), []
        for opening in openings:
            ids = torch.from_numpy(opening)[None]
            for _ in range(NEW_TOKENS):
                with torch.no_grad():
                    best = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                ids = torch.cat([ids, best[None, None]], 1)
            expected.append(ids[0, len(opening) :].tolist())
        assert [list(ids) for ids in found.ids()] == expected, "greedy text differs"

    def gradient(self, *, checkpointing: bool = False) -> None:
        """Loss and gradient of the student are those of plain autograd, also where activations are
        computed again, as in training alone."""
        config = self.with_student(activation_checkpointing=checkpointing)
        student = CAUSAL_LM.load(config, device=CPU)
        objective = Objective(student, config, teacher_width=None).train(checkpointing)
        answer = self.engine.score(self.rows, _everything())
        layouts = Layouts(tuple(config.domains), self.plan.packed, CPU, CAUSAL_LM, self.plan.passes)
        scale = 1 / int(self.rows.num_loss_tokens().sum())
        loss, *_ = objective(layouts.batch(self.rows, answer), multiplier=scale)
        loss.backward()
        model = self.plain()
        expected_loss = self._plain_loss(model) * scale
        expected_loss.backward()
        _same("the loss", loss.detach(), expected_loss.detach(), CLOSE)
        found = {n: p.grad for n, p in student.saved.named_parameters()}
        wanted = {n: p.grad for n, p in model.named_parameters()}
        largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
        for name, gradient in wanted.items():
            pair = [torch.zeros(()) if g is None else g for g in (found[name], gradient)]
            _same(f"the gradient of {name}", *pair, 5 * CLOSE * largest)

    def with_train(self, kind: str) -> Config:
        """The config of a student that trains whole, or in adapters."""
        train = {"kind": "lora", "r": 2} if kind == "lora" else {"kind": kind}
        return self.with_student(train=train)

    def with_student(self, **options: object) -> Config:
        """The config of a student with other options."""
        fields = self.plan.config.model_dump()
        fields["student"] |= options
        return type(self.plan.config).model_validate(fields)

    def trains(self, kind: str, *, load: LoadStudent | None = None, zero: int | None = None) -> Any:
        """A run's export, loaded by transformers or peft, says of validation text what the run
        says of its student, which has moved; returns it."""
        folder = self.folder / kind
        folder.mkdir()
        config = self.with_train(kind)
        if zero is not None:
            student = config.student.model_copy(update={"zero": zero})
            config = config.model_copy(update={"student": student})
        plan = replace(self.plan, config=config, run_dir=str(folder))
        run = open_run(plan, reader_of(plan), lambda: StandingWeights(plan), load=load)
        run.reloader = HereReloader()
        try:
            train(run)
        finally:
            close_run(run)
        written = json.loads((folder / "evaluations.json").read_text())
        if kind == "lora":
            exported = PeftModel.from_pretrained(self.plain(), str(folder / "export")).eval()
        else:
            auto: Any = AutoModelForCausalLM
            exported = auto.from_pretrained(folder / "export", dtype=torch.float32).eval()
        for domain, rows in zip(plan.domains, self.validation, strict=True):
            with torch.no_grad():
                nll = plain_of(exported, rows).nll
            before, after = (
                written[when][domain.name]["student_nll"] for when in ("before", "after")
            )
            assert abs(after - nll) < CLOSE, f"the run says NLL {after}, its export {nll}"
            assert before != after, "the student has not moved"
        return exported

    def _plain_loss(self, model: Any) -> Tensor:
        """Forward KL from the Llama plus half the cross-entropy, summed over positions."""
        with torch.no_grad():
            teacher_NV = plain_of(self.engine.model, self.rows).logprobs_NV
        student = plain_of(model, self.rows)
        logprobs_NV, label_N1 = student.logprobs_NV, student.labels_N[:, None]
        kl_N = (teacher_NV.exp() * (teacher_NV - logprobs_NV)).sum(1)
        return (kl_N - 0.5 * logprobs_NV.gather(1, label_N1)[:, 0]).sum()


def plan_for(
    family: Path, llama: Path, domains: tuple, folder: Path, *, context: int = 64
) -> RunPlan:
    """Two steps with every id of the vocabulary shipped."""
    return plan_of(
        folder,
        tiny.Pair(teacher=llama, student=family),
        domains,
        steps=2,
        log_every=1,
        data={"context": context},
        student={"workers": 1},
        batch={"rows_per_step": 4, "micro_batch": 4},
        targets={"selector": "top_k", "top_k": tiny.VOCAB, "encoding": "fp32"},
        optimiser={"lr": 1e-2, "warmup_steps": 0},
    )


def _everything() -> Question:
    return question_of(tiny.VOCAB, tiny.VOCAB, encoding="fp32")


def _same(what: str, found: Tensor, expected: Tensor, within: float) -> None:
    error = float((found - expected).abs().max())
    assert error <= within, f"{what} is off by {error:.1e}, more than {within:.1e}"
