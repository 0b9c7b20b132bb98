"""What else a family goes through: each stage beside plain transformers, on a `Trial`.

N positions with loss   V vocabulary   D hidden width
"""

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from shared.config.run import Config
from shared.targets.asks.head_location import find_head
from student_trainer.objective import Objective
from student_trainer.sources.batches import Batch, Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import decoded, question_of
from tests.families.trial import CLOSE, CPU, NEW_TOKENS, Trial, plain_of

LAYERS = (1, 2)
HIDDEN = {"kind": "hidden_states", "layers": {layer: layer for layer in LAYERS}}


def with_hidden(trial: Trial) -> Config:
    """The config of a student that learns states of the teacher's layers."""
    fields = trial.plan.config.model_dump()
    return type(trial.plan.config).model_validate(fields | {"losses": [HIDDEN]})


def hidden(trial: Trial, engine: HFEngine) -> None:
    """The states of the student that a loss asks for are those of the model."""
    student = CAUSAL_LM.load(with_hidden(trial), device=CPU)
    student.saved.eval()
    batch = _batch(trial, engine)
    with torch.no_grad():
        output, _ = student.outputs(batch, {"output_hidden_states": True})
        expected = plain_of(trial.plain(), trial.rows, states=True)
    for layer in LAYERS:
        states_ND = output.hidden_states[layer].flatten(0, 1)[batch["loss_index_N"]]
        error = float((states_ND - expected.states[layer]).abs().max())
        assert error <= CLOSE * float(expected.states[layer].abs().max()), f"layer {layer}"


def twin(trial: Trial, engine: HFEngine) -> None:
    """A student that is its own teacher has nothing to learn."""
    config = trial.plan.config
    student = CAUSAL_LM.load(config, device=CPU)
    objective = Objective(student, config, teacher_width=None).eval()
    with torch.no_grad():
        (sums,) = objective(_batch(trial, engine), mode="evaluate")
        expected = plain_of(trial.plain(), trial.rows).nll
    nll, kl = (float(s) / int(trial.rows.num_loss_tokens().sum()) for s in sums.sum(1))
    assert abs(kl) < 1e-5, f"KL {kl:.1e} of a model to itself"
    assert abs(nll - expected) < CLOSE


def exact(trial: Trial, engine: HFEngine) -> None:
    """The last states of a teacher, times the head that it ships, are its distribution."""
    engine.cache = str(trial.folder / "cache")
    head = engine.ship_head()
    asked: dict[str, Any] = {"states": head.states, "states_width": head.states_width}
    answer = engine.score(trial.rows, question_of(0, tiny.VOCAB, head=head.digest, **asked))
    found = load_file(find_head(engine.cache, head.digest))
    logits_NV = torch.from_numpy(decoded(answer).last_ND.copy()) @ found["weight"].T
    logits_NV = (logits_NV + found.get("bias", torch.zeros(()))) * found["logit_scale"]
    if "soft_cap" in found:
        logits_NV = found["soft_cap"] * (logits_NV / found["soft_cap"]).tanh()
    with torch.no_grad():
        expected_NV = plain_of(trial.plain(), trial.rows).logprobs_NV
    np.testing.assert_allclose(logits_NV.log_softmax(1), expected_NV, rtol=0, atol=CLOSE)


def writes(exported: Any) -> None:
    """Greedy text of an export with its cache is that without."""
    ids_1T = torch.arange(3, 12)[None]
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        cached, plain = (
            exported.generate(input_ids=ids_1T, use_cache=use, **settings) for use in (True, False)
        )
    assert cached.tolist() == plain.tolist(), "greedy text depends on the cache"


def _batch(trial: Trial, engine: HFEngine) -> Batch:
    """The trial's rows with an engine's answers over all ids."""
    answer = engine.score(trial.rows, question_of(tiny.VOCAB, tiny.VOCAB, encoding="fp32"))
    plan = trial.plan
    layouts = Layouts(tuple(plan.config.domains), plan.packed, CPU, CAUSAL_LM, plan.passes)
    return layouts.batch(trial.rows, answer)
