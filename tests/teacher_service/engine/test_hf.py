"""HFEngine against the model's own logits, and what it refuses."""

import shutil

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.data.trust import Trust
from shared.errors import ConfigError, HandshakeError, TeacherError
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring.projection import random_projection, save_projections
from tests import tiny
from tests.allocations import largest_tensor
from tests.answers import changed, decoded, question_of
from tests.drawn import drawn_answer, drawn_spec
from tests.teacher_service.scripted import VOCAB, make_rows
from tests.teacher_service.teachers import FAMILIES, documents, save_family
from tests.telling import telling

LENGTHS = [[20, 9, 5], [31], [2, 40], [3]]
FULL = question_of(top_k=VOCAB, shared_vocab=VOCAB, encoding="fp32", entropy=True)


def dense(model, rows):
    """Float64 log-probabilities [N, V], each document alone."""
    parts = [torch.from_numpy(ids.astype(np.int64))[None] for ids in documents(rows)]
    with torch.no_grad():
        logits = [model(ids, use_cache=False).logits[0, :-1].double() for ids in parts]
    return torch.cat(logits).log_softmax(1).numpy()


def by_id(arrays):
    """Log-probabilities [N, V] in the order of the ids, from a selection with k = V."""
    full_NV = np.full(arrays.ids_NK.shape, np.nan)
    np.put_along_axis(full_NV, arrays.ids_NK, arrays.logprobs_NK, axis=1)
    return full_NV


@pytest.mark.parametrize("family", telling(FAMILIES, "gemma2", "cohere", "qwen2_moe"))
def test_packed_answers_are_the_models_own_for_each_document_alone(family, tmp_path):
    folder = save_family(family, tmp_path)
    engine, rows = HFEngine.load(str(folder)), make_rows(LENGTHS)
    arrays = decoded(engine.score(rows, FULL))
    expected_NV = dense(AutoModelForCausalLM.from_pretrained(folder).eval(), rows)
    np.testing.assert_allclose(by_id(arrays), expected_NV, atol=1e-4)
    labels_N = np.concatenate([ids[1:] for ids in documents(rows)])
    label_N = np.take_along_axis(expected_NV, labels_N[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(arrays.label_logprob_N, label_N, atol=1e-4)
    entropy_N = -(np.exp(expected_NV) * expected_NV).sum(1)
    np.testing.assert_allclose(arrays.entropy_N, entropy_N, atol=1e-4)
    assert np.isneginf(arrays.log_tail_NS).all()
    assert engine.trust.packed == (family not in ("bloom", "opt"))


def test_a_model_that_would_leak_scores_documents_one_by_one_and_says_so(tmp_path):
    description = HFEngine.load(str(save_family("bloom", tmp_path))).describe()
    assert description.fingerprint["packed"] == "False"
    assert len(description.notes) == 1


def test_packed_equals_unpacked_per_token(tiny_pair):
    engine, rows = HFEngine.load(str(tiny_pair.teacher)), make_rows(LENGTHS, vocab=tiny.VOCAB)
    spec = question_of(top_k=tiny.VOCAB, shared_vocab=tiny.VOCAB, encoding="fp32")
    packed_NV = by_id(decoded(engine.score(rows, spec)))
    engine.trust = Trust(packed=False)
    np.testing.assert_allclose(by_id(decoded(engine.score(rows, spec))), packed_NV, atol=1e-5)


def test_ids_travel_with_their_own_numbers_and_the_tail_of_every_temperature(tiny_pair):
    engine, rows = HFEngine.load(str(tiny_pair.teacher)), make_rows(LENGTHS, vocab=tiny.VOCAB)
    spec = question_of(7, tiny.VOCAB, temperatures=(1.0, 3.0), encoding="fp32")
    found = decoded(engine.score(rows, spec))
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()
    dense_NV = dense(model, rows)
    likeliest_NK = np.sort(np.argsort(-dense_NV, axis=1)[:, :7], axis=1)
    np.testing.assert_array_equal(np.sort(found.ids_NK, axis=1), likeliest_NK)
    kept_NK = np.take_along_axis(dense_NV, found.ids_NK.astype(int), axis=1)
    np.testing.assert_allclose(found.logprobs_NK, kept_NK, atol=1e-5)
    labels_N = np.concatenate([ids[1:] for ids in documents(rows)]).astype(int)
    label_N = dense_NV[np.arange(len(labels_N)), labels_N]
    np.testing.assert_allclose(found.label_logprob_N, label_N, atol=1e-5)
    for column, temperature in enumerate(spec.ask.temperatures):
        share_NV = torch.from_numpy(dense_NV / temperature).softmax(1).numpy()
        rest_N = 1 - np.take_along_axis(share_NV, found.ids_NK.astype(int), axis=1).sum(1)
        np.testing.assert_allclose(np.exp(found.log_tail_NS[:, column]), rest_N, atol=1e-5)


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_ids_are_drawn_at_the_losses_temperature_and_labels_judged_at_one(tiny_pair, selector):
    engine, rows = HFEngine.load(str(tiny_pair.teacher)), make_rows([[30]], vocab=tiny.VOCAB)
    spec = drawn_spec(selector, 9, tiny.VOCAB, temperature=2.5, seed=3)
    found = decoded(engine.score(rows, spec))
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()
    ids = torch.from_numpy(rows.column("input_ids")[0].astype(np.int64))
    with torch.no_grad():
        logits_NV = model(ids[None], use_cache=False).logits[0, :-1].float()
    expected = decoded(drawn_answer(logits_NV, spec, rows=rows))
    np.testing.assert_array_equal(found.ids_NK, expected.ids_NK)
    np.testing.assert_allclose(found.logprobs_NK, expected.logprobs_NK, atol=1e-4)
    np.testing.assert_allclose(found.entropy_N, expected.entropy_N, atol=1e-4)
    label_N = logits_NV.log_softmax(1)[torch.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found.label_logprob_N, label_N, atol=1e-5)
    other = decoded(engine.score(rows, changed(spec, seed=4)))
    assert (found.ids_NK != other.ids_NK).any()


@pytest.mark.parametrize("family", telling(["llama", "gemma2", "gpt2", "opt"], "gemma2", "opt"))
def test_hidden_states_are_the_models_own(family, tmp_path):
    folder = save_family(family, tmp_path)
    engine, rows = HFEngine.load(str(folder)), make_rows([[24], [24]])
    spec = question_of(
        top_k=4, shared_vocab=VOCAB, hidden_layers=(0, 1, 2, 3), hidden_encoding="fp32"
    )
    found = engine.score(rows, spec).arrays().hidden_ND
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(np.stack(rows.column("input_ids")), dtype=torch.int64)
    with torch.no_grad():
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for layer in spec.hidden.layers:
        expected_ND = states[layer][:, :-1].flatten(0, 1).numpy()
        np.testing.assert_allclose(found[layer], expected_ND, atol=2e-5)
    assert engine.decoder.layers is not None, "hooks keep only what is asked for"


def test_hidden_states_travel_as_bfloat16_bits(tiny_pair):
    engine, rows = HFEngine.load(str(tiny_pair.teacher)), make_rows([[9]])
    asked = {"top_k": 4, "shared_vocab": tiny.VOCAB, "hidden_layers": (1,)}
    exact = engine.score(rows, question_of(hidden_encoding="fp32", **asked)).arrays().hidden_ND[1]
    bits = engine.score(rows, question_of(hidden_encoding="bf16", **asked)).arrays().hidden_ND[1]
    assert bits.dtype == np.uint16
    sent = torch.from_numpy(bits.copy()).view(torch.bfloat16)
    assert torch.equal(sent, torch.from_numpy(exact.copy()).bfloat16())


def test_a_projection_is_applied_before_states_travel(tiny_pair, tmp_path):
    engine, rows = HFEngine.load(str(tiny_pair.teacher)), make_rows([[9]])
    engine.cache = str(tmp_path)
    matrix_DE = random_projection(engine.describe().hidden_width, 8, seed=1)
    digest = save_projections(tmp_path, {1: matrix_DE})
    asked = {"top_k": 4, "shared_vocab": tiny.VOCAB, "hidden_layers": (1,)}
    whole = engine.score(rows, question_of(hidden_encoding="fp32", **asked))
    spec = question_of(hidden_encoding="fp32", projection=digest, **asked)
    narrow = engine.score(rows, spec)
    expected_NE = whole.arrays().hidden_ND[1] @ matrix_DE
    np.testing.assert_allclose(narrow.arrays().hidden_ND[1], expected_NE, atol=1e-5)
    assert narrow.question == spec


def test_a_projection_the_cache_lacks_is_refused_with_a_sentence(tiny_pair, tmp_path):
    engine = HFEngine.load(str(tiny_pair.teacher))
    engine.cache = str(tmp_path)
    spec = question_of(4, tiny.VOCAB, hidden_layers=(1,), projection="absent")
    with pytest.raises(ConfigError, match="no projection absent in its cache"):
        engine.score(make_rows([[9]]), spec)


def test_scoring_never_allocates_positions_times_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "teacher_service.scoring.scoring.CHUNK_LOGITS", {"cpu": 16 * VOCAB, "cuda": 0}
    )
    engine, rows = HFEngine.load(str(save_family("llama", tmp_path))), make_rows([[64]] * 8)
    spec = question_of(top_k=4, shared_vocab=VOCAB)
    # 8 x 64 positions: the widest activation is the attention's mask or the MLP.
    assert largest_tensor(lambda: engine.score(rows, spec)) < 8 * 64 * VOCAB


def test_an_empty_unit_has_no_positions(tiny_pair):
    engine = HFEngine.load(str(tiny_pair.teacher))
    spec = question_of(top_k=4, shared_vocab=tiny.VOCAB, hidden_layers=(1,))
    answer = engine.score(make_rows([]), spec)
    answer.check(make_rows([]), spec, engine.fingerprint)
    assert decoded(answer).ids_NK.shape == (0, 4)


@pytest.mark.parametrize("head", [False, True])
def test_an_adapter_changes_the_answer_as_peft_does(tiny_pair, tmp_path, head):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher)
    targets = ["q_proj", "down_proj", *(["lm_head"] if head else [])]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    rows = make_rows(LENGTHS, vocab=tiny.VOCAB)
    spec = question_of(top_k=tiny.VOCAB, shared_vocab=tiny.VOCAB, encoding="fp32")
    plain = HFEngine.load(str(tiny_pair.teacher))
    engine = HFEngine.load(str(tiny_pair.teacher), adapter=str(tmp_path / "adapter"))
    found_NV = by_id(decoded(engine.score(rows, spec)))
    np.testing.assert_allclose(found_NV, dense(adapted, rows), atol=2e-4)
    assert np.abs(found_NV - by_id(decoded(plain.score(rows, spec)))).max() > 0.1
    assert engine.fingerprint["adapter_weights"] != plain.fingerprint["adapter_weights"]


def test_the_fingerprint_follows_the_content_and_not_the_place(tiny_pair, tmp_path):
    moved = shutil.copytree(tiny_pair.teacher, tmp_path / "teacher")
    here, there = (HFEngine.load(str(f)).fingerprint for f in (tiny_pair.teacher, moved))
    assert here == there
    assert HFEngine.load(str(moved), dtype="bfloat16").fingerprint["dtype"] == "bfloat16"
    tiny.edit_config(moved, rms_norm_eps=0.5)
    assert HFEngine.load(str(moved)).fingerprint["weights"] != here["weights"]


def test_a_folder_without_weights_is_refused(tiny_pair, tmp_path):
    folder = shutil.copytree(tiny_pair.teacher, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        HFEngine.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        HFEngine.load(str(folder))
    with pytest.raises(ConfigError, match="does not exist"):
        HFEngine.load(str(tmp_path / "nowhere"))


def test_weights_that_are_torn_or_incomplete_are_refused(tiny_pair, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_pair.teacher, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights for model\.layers\.1\.mlp"):
        HFEngine.load(str(folder))
    whole = (tiny_pair.teacher / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        HFEngine.load(str(folder))


def test_a_missing_adapter_is_refused(tiny_pair, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        HFEngine.load(str(tiny_pair.teacher), adapter=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        HFEngine.load(str(tiny_pair.teacher), adapter=str(tiny_pair.student))


@pytest.mark.parametrize(
    ("spec", "rows", "error", "text"),
    [
        ({"top_k": 600}, [[5]], ConfigError, "600 ids are asked for, above the 512"),
        ({"shared_vocab": 513}, [[5]], HandshakeError, "513 ids"),
        ({"hidden_layers": (4,)}, [[5]], ConfigError, "layer 4 is asked for"),
        ({}, [[5], [129]], HandshakeError, "row text/1 has 129 tokens .* context is 128"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(tiny_pair, spec, rows, error, text):
    engine = HFEngine.load(str(tiny_pair.teacher))
    asked = question_of(**({"top_k": 4, "shared_vocab": tiny.VOCAB} | spec))
    with pytest.raises(error, match=text):
        engine.score(make_rows(rows), asked)


def test_a_token_the_teacher_does_not_know_is_refused(tiny_pair):
    engine = HFEngine.load(str(tiny_pair.teacher))
    with pytest.raises(HandshakeError, match="knows 512"):
        engine.score(make_rows([[40]], vocab=5000), question_of(4, tiny.VOCAB))


def test_bfloat16_answers_are_near_the_float32_ones(reference):
    folder, rows = str(reference / "models" / "teacher-6m"), make_rows([[60], [44]], vocab=4096)
    spec = question_of(top_k=4096, shared_vocab=4096, encoding="fp32")
    full_NV, half_NV = (
        by_id(decoded(HFEngine.load(folder, dtype=dtype).score(rows, spec)))
        for dtype in ("float32", "bfloat16")
    )
    kl_N = (np.exp(full_NV) * (full_NV - half_NV)).sum(1)
    assert 0 < kl_N.mean() < 5e-3


# N positions with loss   M ids named by the student per position   K ids kept
def asked_of(count, *, vocab=tiny.VOCAB):
    """Rows whose student names ids that differ from each other at a position."""
    rows = make_rows(LENGTHS, vocab=tiny.VOCAB)
    num = int(rows.num_loss_tokens().sum())
    rng = np.random.default_rng(4)
    return rows, rng.permuted(np.tile(np.arange(vocab), (num, 1)), axis=1)[:, :count]


def test_answers_about_named_ids_equal_the_dense_model(tiny_pair):
    rows, ids_NM = asked_of(6)
    spec = question_of(22, tiny.VOCAB, temperatures=(1.0, 2.0), encoding="fp32", student_ids=6)
    asked, engine = rows.with_student_ids(ids_NM), HFEngine.load(str(tiny_pair.teacher))
    answer = engine.score(asked, spec)
    answer.check(asked, spec, engine.fingerprint)
    found = decoded(answer)
    logp_NV = dense(AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval(), rows)
    others_NV = logp_NV.copy()
    np.put_along_axis(others_NV, ids_NM, -np.inf, axis=1)
    expected_NK = np.concatenate([ids_NM, np.argsort(-others_NV, axis=1)[:, :16]], axis=1)
    np.testing.assert_array_equal(found.ids_NK, np.sort(expected_NK, axis=1))
    expected_NK = np.take_along_axis(logp_NV, found.ids_NK, axis=1)
    np.testing.assert_allclose(found.logprobs_NK, expected_NK, atol=1e-4)
    for column, temperature in enumerate(spec.ask.temperatures):
        scaled_NV = torch.from_numpy(logp_NV / temperature).log_softmax(1)
        outside_NV = scaled_NV.scatter(1, torch.tensor(found.ids_NK), -torch.inf)
        tail_N = outside_NV.logsumexp(1).numpy()
        np.testing.assert_allclose(found.log_tail_NS[:, column], tail_N, atol=1e-4)


def test_asked_again_about_named_ids_the_answer_is_the_same_bytes_and_to_those_alone(tiny_pair):
    rows, ids_NM = asked_of(3)
    spec, engine = question_of(8, tiny.VOCAB, student_ids=3), HFEngine.load(str(tiny_pair.teacher))
    asked, other = (rows.with_student_ids(ids) for ids in (ids_NM, (ids_NM + 1) % tiny.VOCAB))
    answer, again = (engine.score(asked, spec) for _ in range(2))
    assert answer.table.equals(again.table, check_metadata=True)
    with pytest.raises(TeacherError, match="the answer is not about rows text/0, text/1"):
        answer.check(other, spec)
    with pytest.raises(TeacherError, match="the answer is not about rows"):
        answer.check(rows, spec)
    plain = question_of(8, tiny.VOCAB)
    with pytest.raises(TeacherError, match="and 3 named by the student, asked was"):
        answer.check(asked, plain)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda ids: None, HandshakeError, "with 3 ids of the student at 103 .* come with none"),
        (lambda ids: ids[:, :2], HandshakeError, "come with 2 at 103; run teacher and trainer"),
        (lambda ids: ids + 510, HandshakeError, "asks about ids 51. to 102. .* shares 512"),
        (lambda ids: ids[:, [0, 1, 1]], HandshakeError, "one id twice at a position of rows text"),
    ],
)
def test_named_ids_that_cannot_be_answered_are_refused(tiny_pair, change, error, text):
    rows, ids_NM = asked_of(3)
    engine, changed = HFEngine.load(str(tiny_pair.teacher)), change(ids_NM)
    asked = rows if changed is None else rows.with_student_ids(changed)
    with pytest.raises(error, match=text):
        engine.score(asked, question_of(8, tiny.VOCAB, student_ids=3))


def test_named_ids_need_room_for_others(tiny_pair):
    rows, ids_NM = asked_of(3)
    engine = HFEngine.load(str(tiny_pair.teacher))
    question = question_of(3, tiny.VOCAB, student_ids=3)
    with pytest.raises(
        ConfigError, match=r"3 ids of the student .* among 3 in all; they need room"
    ):
        engine.score(rows.with_student_ids(ids_NM), question)
