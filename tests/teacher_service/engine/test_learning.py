"""A teacher's modules that learn: their gradient, their versions, and a backbone that stays as it
is.

R rows   N positions with loss   V vocabulary   M ids that the student names   X and all others
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from peft import LoraConfig, get_peft_model
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shared.config.models.modules import TrainedModules
from shared.data.rows import Rows
from shared.errors import ConfigError, DamagedError, NonFiniteLossError, StorageError, TeacherError
from shared.targets.lessons import Learnt, Lesson
from shared.targets.weights import BEGINNING, ModuleFiles, WeightsRef
from teacher_service.engine import lora
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.learning import LearningEngine
from teacher_service.scoring import module_losses
from tests.allocations import largest_tensor
from tests.answers import changed, decoded, question_of
from tests.families.making import save_family as saved_by_name
from tests.teacher_service.scripted import VOCAB, Scripted, make_rows
from tests.teacher_service.teachers import documents, save_family
from tests.telling import telling

FULL = question_of(top_k=VOCAB, shared_vocab=VOCAB, encoding="fp32")
UNITS = ([[20, 9, 5], [31]], [[2, 40], [3]])
FAST = {"lr": 0.03, "r": 4, "alpha": 6.0}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def made(llama: Path, tmp_path: Path) -> Callable[..., LearningEngine]:
    """Makes replicas of one teacher, whose versions lie in one folder."""

    def make(folder: Path = llama, seed: int = 0, **asked: object) -> LearningEngine:
        modules = TrainedModules.model_validate(FAST | asked)
        files = ModuleFiles(tmp_path / "modules")
        return LearningEngine(HFEngine.load(str(folder)), modules, seed=seed, files=files)

    return make


def said(rows: Rows, *, ids: int = 8, seed: int = 0) -> Rows:
    """The rows with what some student says of them."""
    generator = torch.Generator().manual_seed(seed)
    size = int(rows.num_loss_tokens().sum())
    logprob_NV = torch.randn(size, VOCAB, generator=generator).mul(2).log_softmax(1)
    kept_NM, ids_NM = logprob_NV.topk(ids)
    rest_N1 = logprob_NV.scatter(1, ids_NM, -torch.inf).logsumexp(1, keepdim=True)
    return rows.with_student_logprobs(ids_NM.numpy(), torch.cat([kept_NM, rest_N1], 1).numpy())


def lesson_of(*units: Rows) -> tuple[Rows, Callable[[WeightsRef], Lesson]]:
    import pyarrow as pa

    joined = Rows(pa.concat_tables([rows.table for rows in units]).combine_chunks())
    return joined, lambda ref: Lesson(ref, tuple(map(len, units)))


ROWS, LESSON = lesson_of(*(said(make_rows(unit, seed=n), seed=n) for n, unit in enumerate(UNITS)))


def taught(engine: LearningEngine, times: int, ref: WeightsRef = BEGINNING) -> list[Learnt]:
    found = []
    for _ in range(times):
        learnt = engine.learn(ROWS, LESSON(ref))
        learnt.check(ROWS, LESSON(ref), engine.describe().fingerprint)
        ref = learnt.modules
        found.append(learnt)
    return found


def answer(engine: LearningEngine, ref: WeightsRef | None, rows: Rows = ROWS) -> np.ndarray:
    fields = ref and {"version": ref.version, "digest": ref.digest}
    question = changed(FULL, weights=fields)
    found = engine.score(rows, question)
    found.check(rows, question, engine.describe().fingerprint)
    return decoded(found).logprobs_NK


def backbone(engine: LearningEngine) -> str:
    state = xxhash.xxh3_128()
    for name, tensor in engine._engine.model.state_dict().items():  # type: ignore[attr-defined]
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("family", telling(["llama", "gpt2", "bloom", "qwen2_moe"], "gpt2"))
def test_the_backbone_keeps_its_hash_and_its_answers(made, tmp_path, family):
    folder = save_family(family, tmp_path / family)
    plain, engine = HFEngine.load(str(folder)), made(folder)
    before, expected = backbone(engine), decoded(plain.score(ROWS, FULL)).logprobs_NK
    np.testing.assert_array_equal(answer(engine, None), expected)
    np.testing.assert_array_equal(answer(engine, BEGINNING), expected)
    last = taught(engine, 2)[-1].modules
    assert backbone(engine) == before
    np.testing.assert_array_equal(answer(engine, None), expected)
    np.testing.assert_array_equal(answer(engine, BEGINNING), expected)
    assert np.abs(answer(engine, last) - expected).max() > 0.01
    assert not any(p.requires_grad for p in engine._engine.model.parameters())


def reference(engine: LearningEngine, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients by plain float64 autograd over the whole vocabulary's logits, every document alone,
    the modules folded into the weights."""
    asked, model = engine._asked, AutoModelForCausalLM.from_pretrained(folder).double().eval()
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in engine.modules.parameters.items()
    }
    weights = dict(model.named_parameters())
    prefix = next(n for n, m in model.named_modules() if m is model.base_model)
    for name in sorted({name.rpartition(".lora_")[0] for name in leaves}):
        added = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"] * asked.alpha / asked.r
        layer = model.get_submodule(f"{prefix}.{name}")
        added = added.T if isinstance(layer, Conv1D) else added
        weights[f"{prefix}.{name}.weight"] = weights[f"{prefix}.{name}.weight"] + added
    ids = [torch.from_numpy(part.astype(np.int64)) for part in documents(ROWS)]
    call = {"use_cache": False}
    logits = [functional_call(model, weights, (part[None],), call).logits[0, :-1] for part in ids]
    log_p_NV = torch.cat(logits).log_softmax(1)
    label_N = torch.cat([part[1:] for part in ids])
    nll_N = -log_p_NV.gather(1, label_N[:, None])[:, 0]
    ids_NM = torch.tensor(ROWS.student_ids()).long()
    log_q_NX = torch.tensor(ROWS.student_logprobs()).double()
    inside_NV = torch.zeros_like(log_p_NV).scatter(1, ids_NM, 1.0).bool()
    rest_N1 = log_p_NV.exp().masked_fill(inside_NV, 0).sum(1, keepdim=True).log()
    log_p_NX = torch.cat([log_p_NV.gather(1, ids_NM), rest_N1], 1)
    pair = (log_q_NX, log_p_NX) if asked.divergence == "forward_kl" else (log_p_NX, log_q_NX)
    kl_N = (pair[0].exp() * (pair[0] - pair[1])).sum(1)
    (nll_N + asked.eta * kl_N).mean().backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    return {**found, "losses": torch.stack([nll_N.mean(), kl_N.mean()]).detach()}


@pytest.mark.parametrize(
    ("family", "asked"),
    telling(
        [
            ("llama", {"eta": 0.7}),
            ("llama", {"eta": 0.7, "divergence": "reverse_kl"}),
            ("gemma2", {"eta": 0.0, "target_modules": ["q_proj", "down_proj"]}),
            ("gpt2", {"eta": 0.3, "alpha": 9.0}),
            ("bloom", {"eta": 1.0, "target_modules": ["query_key_value"]}),
        ],
        ("llama", {"eta": 0.7, "divergence": "reverse_kl"}),
        ("gpt2", {"eta": 0.3, "alpha": 9.0}),
    ),
)
def test_the_gradient_is_that_of_plain_autograd_in_float64(
    made, tmp_path, monkeypatch, family, asked
):
    monkeypatch.setattr(module_losses, "chunk_size", lambda *_: 1)  # of 16 positions
    folder = save_family(family, tmp_path / family)
    engine = made(folder, **asked)
    first = taught(engine, 1)[0].modules  # so that B is not zero
    expected = reference(engine, folder)
    learnt = engine.learn(ROWS, LESSON(first))
    losses = expected.pop("losses") * torch.tensor([1.0, asked["eta"] > 0])
    found = torch.tensor(learnt.losses) * torch.tensor([1.0, asked["eta"] > 0])
    torch.testing.assert_close(found, losses.float(), rtol=1e-4, atol=1e-5)
    for name, parameter in engine.modules.parameters.items():
        largest = expected[name].abs().max()
        torch.testing.assert_close(
            parameter.grad, expected[name].float(), rtol=1e-3, atol=float(1e-4 * largest)
        )


def test_every_option_changes_what_is_learnt(made):
    online_modules: tuple[dict[str, Any], ...] = (
        {},
        {"r": 5},
        {"alpha": 7.0},
        {"target_modules": ["v_proj"]},
        {"lr": 0.02},
        {"eta": 0.1},
        {"divergence": "reverse_kl"},
    )
    engines = [made(seed=1), *(made(**options) for options in online_modules)]
    learnt = [taught(engine, 2)[-1].modules.digest for engine in engines]
    assert len(set(learnt)) == len(learnt)


def test_modules_move_towards_a_student_that_stands_still(made):
    """eta is large, so that the labels hardly count."""
    found = taught(made(eta=50.0, lr=0.003), 12)
    kls = [learnt.losses[1] for learnt in found]
    assert all(after < before for before, after in pairwise(kls))
    assert kls[-1] < 0.9 * kls[0]


def test_frozen_modules_answer_as_the_teacher_does(made):
    engine = made(lr=0.0)
    last = taught(engine, 3)[-1].modules
    np.testing.assert_array_equal(answer(engine, last), answer(engine, None))


def test_any_replica_takes_any_update_also_again(made):
    """Two that take turns, and one that comes later, write what one alone writes."""
    one, others = made(), (made(), made())
    expected = [learnt.modules for learnt in taught(one, 4)]
    ref, found = BEGINNING, []
    for number in range(4):
        ref = others[number % 2].learn(ROWS, LESSON(ref)).modules
        answer(others[number % 2], BEGINNING if number % 3 else found[-1] if found else None)
        found.append(ref)
    assert found == expected
    assert taught(made(), 2, ref=expected[1])[-1].modules == expected[3]
    np.testing.assert_array_equal(answer(made(), expected[2]), answer(one, expected[2]))


def test_a_version_that_is_not_what_was_written_answers_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "ARRIVAL_S", 0.0)
    ref = taught(made(), 1)[0].modules
    path = ModuleFiles(tmp_path / "modules").path(ref)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedError, match="is not what was written as version 1"):
        answer(made(), ref)
    path.unlink()
    with pytest.raises(TeacherError, match=r"version 1 .* cannot be read .* no such file"):
        made().learn(ROWS, LESSON(ref))


def test_a_version_that_is_seen_late_is_waited_for(made, tmp_path, monkeypatch):
    ref, aside = taught(made(), 1)[0].modules, tmp_path / "aside"
    path = ModuleFiles(tmp_path / "modules").path(ref)
    path.rename(aside)
    monkeypatch.setattr(lora.time, "sleep", lambda _: aside.exists() and aside.rename(path))
    assert taught(made(), 1, ref=ref) == taught(made(), 2)[1:]


def test_an_update_that_cannot_be_kept_says_so_and_can_be_taken_again(made, tmp_path):
    engine = made()
    (tmp_path / "modules").write_text("in the way")
    with pytest.raises(StorageError, match="version 1 of the teacher's modules cannot be kept"):
        taught(engine, 1)
    (tmp_path / "modules").unlink()
    assert taught(engine, 2) == taught(made(), 2)


def test_a_loss_that_is_none_is_learnt_by_nobody(made):
    engine, rows = made(), make_rows([[9]])
    ids_NM = np.zeros((8, 1), np.int64)
    broken = rows.with_student_logprobs(ids_NM, np.full((8, 2), np.nan))
    with pytest.raises(
        NonFiniteLossError, match=r"rows text/0; lower teachers\.NAME\.online_modules"
    ):
        engine.learn(broken, Lesson(BEGINNING, (1,)))
    assert taught(engine, 1) == taught(made(), 1)


def test_a_gradient_that_is_none_is_learnt_by_nobody(made, tmp_path):
    """Of a loss that is finite before its weight."""
    engine = made(eta=1e39)
    with pytest.raises(NonFiniteLossError, match=r"or a gradient, .*online_modules\.lr or eta"):
        taught(engine, 1)
    assert not [*(tmp_path / "modules").glob("*")]
    np.testing.assert_array_equal(answer(engine, BEGINNING), answer(engine, None))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target_modules": ["q_proj", "query"]}, r"names query, .* that it has are down_proj"),
        ({"target_modules": ["lm_head"]}, "names lm_head"),
    ],
)
def test_layers_that_are_not_there_are_refused(made, asked, said):
    with pytest.raises(ConfigError, match=said):
        made(**asked)


def test_modules_stand_beside_linear_layers_of_a_models_own(made, tmp_path):
    """Falcon's have a `forward` of their own; a mixer of Mamba reads some as plain weights."""
    engine = made(saved_by_name("falcon", tmp_path / "falcon", seed=3))
    assert any(name.endswith("query_key_value.lora_A") for name in engine.modules.parameters)
    last = taught(engine, 2)[-1].modules
    assert np.abs(answer(engine, last) - answer(engine, None)).max() > 0.01
    beside = made(saved_by_name("mamba", tmp_path / "mamba", seed=3), target_modules=["dt_proj"])
    with pytest.raises(ConfigError, match=r"is \['dt_proj'\], layers whose weights .* name others"):
        taught(beside, 1)


def test_an_adapter_of_the_teachers_own_stays_as_it_is(llama, tmp_path):
    """Its layers go by the names that they have without it."""
    plain = AutoModelForCausalLM.from_pretrained(llama)
    adapted: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    engine = HFEngine.load(str(llama), adapter=str(tmp_path / "adapter"))
    expected = decoded(engine.score(ROWS, FULL)).logprobs_NK
    files = ModuleFiles(tmp_path / "modules")
    named = TrainedModules(target_modules=["q_proj", "o_proj"], lr=0.03)
    one = LearningEngine(engine, named, seed=0, files=files)
    layers = {name.rpartition(".lora_")[0] for name in one.modules.parameters}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "o_proj"}
    last = taught(one, 2)[-1].modules
    assert np.abs(answer(one, last) - expected).max() > 0.01
    np.testing.assert_array_equal(answer(one, None), expected)
    whole = LearningEngine(HFEngine.load(str(llama)), TrainedModules(), seed=0, files=files)
    again = HFEngine.load(str(llama), adapter=str(tmp_path / "adapter"))
    every = LearningEngine(again, TrainedModules(), seed=0, files=files)
    assert every.modules.parameters.keys() == whole.modules.parameters.keys()


def test_an_engine_without_gradients_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a Scripted forms no gradient"):
        LearningEngine(Scripted(), TrainedModules(), seed=0, files=ModuleFiles(tmp_path))


def test_no_tensor_of_all_positions_by_the_vocabulary_is_made(made, monkeypatch):
    monkeypatch.setattr(module_losses, "chunk_size", lambda *_: 64)
    rows = said(make_rows([[64]] * 8))
    engine = made()
    assert largest_tensor(lambda: engine.learn(rows, Lesson(BEGINNING, (8,)))) < 8 * 63 * VOCAB
