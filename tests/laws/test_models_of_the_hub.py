"""Models by name: the revision that a config pins is the one loaded, and code runs where trusted.

Teacher and student alike.
"""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.planning.description import describe
from shared.config.models.student import Student
from shared.config.models.teachers import Teacher
from shared.errors import ConfigError
from student_trainer.models.student import load_model
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.audit import load_engine
from tests import tiny
from tests.hub import publish

KIND = CAUSAL_LM.model
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def give_own_tokenizer(folder: Path) -> None:
    """Let the tokenizer of a saved model be of a class whose code lies beside it."""
    (folder / "own_tokenizer.py").write_text(OWN_TOKENIZER)
    path, classes = folder / "tokenizer_config.json", [None, "own_tokenizer.OwnTokenizer"]
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": classes}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models and two adapters of the first."""
    folder = tmp_path_factory.mktemp("published")
    found = {name: folder / name for name in ("main", "v1")}
    for seed, path in enumerate(found.values()):
        tiny.save_model(path, width=32, layers=2, seed=seed)
    for seed in (0, 1):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = AutoModelForCausalLM.from_pretrained(found["main"])
        found[f"adapter {seed}"] = folder / f"adapter-{seed}"
        peft.get_peft_model(model, lora).save_pretrained(found[f"adapter {seed}"])
    return found


@pytest.fixture
def hub(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same on the hub, as some/model and some/adapter."""
    publish(tmp_path, "some/model", {name: folders[name] for name in ("main", "v1")})
    adapters = {"main": folders["adapter 0"], "v1": folders["adapter 1"]}
    publish(tmp_path, "some/adapter", adapters)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return folders


def digest(asked: Teacher, what: str) -> str:
    return load_engine(asked).describe().fingerprint[what]


@pytest.mark.parametrize(("revision", "folder"), [(None, "main"), ("v1", "v1")])
def test_a_teacher_is_the_one_of_its_revision(hub, revision, folder):
    found = digest(Teacher(model="some/model", revision=revision), "weights")
    assert found == digest(Teacher(model=str(hub[folder])), "weights")


@pytest.mark.parametrize(("revision", "folder"), [(None, "adapter 0"), ("v1", "adapter 1")])
def test_an_adapter_is_the_one_of_its_revision(hub, revision, folder):
    named = Teacher(model="some/model", adapter="some/adapter", adapter_revision=revision)
    lying = Teacher(model="some/model", adapter=str(hub[folder]))
    assert digest(named, "adapter_weights") == digest(lying, "adapter_weights")


@pytest.mark.parametrize(("revision", "folder"), [(None, "main"), ("v1", "v1")])
def test_a_student_is_the_one_of_its_revision(hub, revision, folder):
    found = load_model(Student(model="some/model", revision=revision), KIND).state_dict()
    expected = load_model(Student(model=str(hub[folder])), KIND).state_dict()
    assert all((found[name] == weight).all() for name, weight in expected.items())


@pytest.fixture(scope="module")
def with_code(folders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose class, and its tokenizer's, lies beside its weights."""
    folder = tmp_path_factory.mktemp("code") / "model"
    shutil.copytree(folders["main"], folder)
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlama"}
    tiny.edit_config(folder, model_type="own_llama", auto_map=classes)
    give_own_tokenizer(folder)
    return str(folder)


def test_a_models_own_code_runs_where_the_config_trusts_it(with_code, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("nobody is there to ask"))
    engine = load_engine(Teacher(model=with_code, trust_remote_code=True))
    identity = describe("student.model", with_code, revision=None, trusted=True, cache=tmp_path)
    assert engine.describe().fingerprint["tokenizer"] == identity.identity.digest
    student = load_model(Student(model=with_code, trust_remote_code=True), KIND)
    assert type(student).__name__ == "OwnLlama"


def test_a_models_own_code_does_not_run_otherwise(with_code):
    with pytest.raises(ConfigError, match=r"set teachers\.NAME\.trust_remote_code=true"):
        load_engine(Teacher(model=with_code))
    with pytest.raises(ConfigError, match=r"set student\.trust_remote_code=true"):
        load_model(Student(model=with_code), KIND)


def test_a_tokenizers_own_code_does_not_run_otherwise(folders, tmp_path):
    shutil.copytree(folders["main"], folder := tmp_path / "model")
    give_own_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"set student\.trust_remote_code=true"):
        describe("student.model", str(folder), revision=None, trusted=False, cache=tmp_path)
