"""A PEFT adapter named as a model: a teacher's goes on its base, a student's is merged into it.

T tokens   V vocabulary
"""

import json
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from cluster.planning.handshake import shake_hands
from cluster.planning.loading import load
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.run_dir import RunDir
from student_trainer.models.student import load_model
from student_trainer.state.model_card import model_card
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.audit import load_engine
from tests import tiny
from tests.cluster.jobs import write_job
from tests.hub import publish
from tests.student_trainer.state.test_model_card import USAGE

IDS_1T = torch.arange(3, 19)[None]


@pytest.fixture
def adapter(tmp_path: Path, tiny_pair: tiny.Pair) -> Path:
    """A folder as `PeftModel.save_pretrained` writes it, of an adapter that changes the student."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits_by_peft(adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft.AutoPeftModelForCausalLM.from_pretrained(adapter)(input_ids=IDS_1T).logits


def set_base(adapter: Path, base: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def student_of(directory: Path, pair: tiny.Pair, model: object) -> Config:
    return load(write_job(directory, pair, student={"model": str(model)}), [])


def test_a_student_is_its_base_with_the_adapter(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, capsys
) -> None:
    config = student_of(tmp_path, tiny_pair, adapter)
    said = f"student.model is {adapter}, a PEFT adapter on {tiny_pair.student}"
    assert said in capsys.readouterr().out
    shake_hands(config)
    model = load_model(config.student, CAUSAL_LM.model)
    with torch.no_grad():
        logits_1TV = model(input_ids=IDS_1T).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_pair.student)(input_ids=IDS_1T).logits
    torch.testing.assert_close(logits_1TV, logits_by_peft(adapter), atol=1e-5, rtol=1e-5)
    assert (logits_1TV - base).abs().max() > 0.1
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_card_of_its_export_names_what_was_merged(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path
) -> None:
    config = student_of(tmp_path, tiny_pair, adapter)
    said = model_card(config, run_dir=RunDir(tmp_path / "run"), step=1, frozen=None, usage=USAGE)
    assert "adapter merged into student taught by teacher with Tutelage" in said
    assert "\nbase_model: student\n" in said
    assert Path(config.student.model).name not in said


def test_another_adapter_in_the_same_folder_is_another_student(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path
) -> None:
    first, again = (student_of(tmp_path, tiny_pair, adapter).student.model for _ in range(2))
    assert first == again
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.student)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    other = student_of(tmp_path, tiny_pair, adapter).student.model
    assert other != first
    assert AutoTokenizer.from_pretrained(other).chat_template == "{{ messages }}"
    assert AutoTokenizer.from_pretrained(first).chat_template is None


@pytest.mark.parametrize("with_config", [False, True])
def test_a_teacher_that_is_an_adapter_is_its_base_under_it(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, capsys, with_config: bool
) -> None:
    if with_config:
        shutil.copy(tiny_pair.student / "config.json", adapter)
    config = load(write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(adapter)}}), [])
    teacher = config.teachers["t"]
    assert (teacher.model, teacher.adapter) == (str(tiny_pair.student), str(adapter))
    assert f"teachers.t.model is {adapter}, a PEFT adapter" in capsys.readouterr().out
    engine = load_engine(teacher)
    with torch.no_grad():
        logits_1TV = engine.model(input_ids=IDS_1T).logits
    torch.testing.assert_close(logits_1TV, logits_by_peft(adapter), atol=1e-5, rtol=1e-5)
    assert engine.describe().fingerprint["adapter_weights"]


@pytest.fixture
def hub(tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, monkeypatch) -> None:
    """The adapter and its base on the hub, as some/adapter and some/base."""
    set_base(adapter, "some/base")
    publish(tmp_path / "hub", "some/base", {"main": tiny_pair.student})
    publish(tmp_path / "hub", "some/adapter", {"main": adapter})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_adapters_of_the_hub_are_found_by_name(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, hub: None
) -> None:
    named = {"student": {"model": "some/adapter"}, "teachers": {"t": {"model": "some/adapter"}}}
    config = load(write_job(tmp_path, tiny_pair, **named), [])
    teacher = config.teachers["t"]
    assert (teacher.model, teacher.adapter) == ("some/base", "some/adapter")
    with torch.no_grad():
        logits_1TV = load_model(config.student, CAUSAL_LM.model)(input_ids=IDS_1T).logits
    set_base(adapter, str(tiny_pair.student))
    torch.testing.assert_close(logits_1TV, logits_by_peft(adapter), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("role", ["student.model", "teachers.t.model"])
@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "does not name its base"),
        (["some/model"], "does not name its base"),
        ("/gone/model", "base_model_name_or_path in .* is '/gone/model', but .* is no folder"),
        ("itself", "which is or holds an adapter itself"),
    ],
)
def test_an_adapter_without_a_base_is_refused(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, role: str, base: object, said: str
) -> None:
    set_base(adapter, str(adapter) if base == "itself" else base)
    job = write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(tiny_pair.teacher)}})
    with pytest.raises(ConfigError, match=said):
        load(job, [f"{role}={adapter}"])


@pytest.mark.parametrize("role", ["student.model", "teachers.t.model"])
def test_a_whole_model_with_an_adapter_beside_it_is_refused(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, role: str
) -> None:
    shutil.copytree(tiny_pair.student, adapter, dirs_exist_ok=True)
    job = write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(tiny_pair.teacher)}})
    with pytest.raises(ConfigError, match=rf"{role} is {adapter}, which holds a whole model and"):
        load(job, [f"{role}={adapter}"])


def test_a_students_base_in_few_bits_is_refused(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path
) -> None:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.student, quantization_config=stored)
    model.save_pretrained(tmp_path / "base")
    set_base(adapter, str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"stored in 4 bits .* to the unquantised base"):
        student_of(tmp_path, tiny_pair, adapter)


@pytest.mark.parametrize("role", ["student", "teachers.t"])
def test_a_name_that_no_hub_has_is_no_adapter(
    tmp_path: Path, tiny_pair: tiny.Pair, role: str
) -> None:
    job = write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(tiny_pair.teacher)}})
    config = load(job, [f"{role}.model=no name of a hub"])
    with pytest.raises(
        ConfigError, match=rf"{role}\.model is 'no name of a hub', which is neither"
    ):
        shake_hands(config)


@pytest.mark.parametrize("role", ["student", "teachers.t"])
def test_without_a_hub_a_name_is_refused_at_once(
    tmp_path: Path, tiny_pair: tiny.Pair, monkeypatch, role: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    job = write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(tiny_pair.teacher)}})
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{role}\.model is 'some/model', .*no hub answers"):
        load(job, [f"{role}.model=some/model"])
    assert time.monotonic() - began < 20  # with the library's own patience it is a minute


def test_a_teacher_has_one_adapter(tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path) -> None:
    asked = {"model": str(adapter), "adapter": str(adapter)}
    with pytest.raises(ConfigError, match=rf"to a whole model, as {tiny_pair.student}, which is"):
        load(write_job(tmp_path, tiny_pair, teachers={"t": asked}), [])
