"""Writing on: greedy and drawn continuations, alone, in batches and over replicas."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pytest
import ray
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, GenerationConfig, RwkvConfig

from shared.config.models.teachers import Teacher
from shared.errors import ConfigError, HandshakeError, TeacherError
from shared.targets.generation import GenerationSpec, Openings
from teacher_service.engine.hf import HFEngine
from teacher_service.service import service
from teacher_service.service.pool import GenerationPool
from teacher_service.service.replicas.naming import replica_name
from tests.teacher_service.engine.test_trust import LEAKY, longrope, saved
from tests.teacher_service.scripted import VOCAB, Scripted, echoed
from tests.teacher_service.teachers import FAMILIES, save_family
from tests.telling import telling
from tests.tiny import VOCAB as TINY_VOCAB

GREEDY = GenerationSpec(12, stop_ids=(2,))
DRAWN = replace(GREEDY, temperature=1.0)
LENGTHS = (3, 17, 40, 8, 40, 1)
RWKV = RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=128)
POISON = 2  # below every id of `openings`


def openings(lengths=LENGTHS, *, vocab: int = VOCAB, seed: int = 0, first: int = 0) -> Openings:
    rng = np.random.default_rng(seed)
    names = [f"intent/{first + n}" for n in range(len(lengths))]
    return Openings.build(names=names, input_ids=[rng.integers(3, vocab, n) for n in lengths])


def part(asked: Openings, lines: slice) -> Openings:
    return Openings.build(names=asked.names()[lines], input_ids=asked.ids()[lines])


def written(engine, asked: Openings, spec: GenerationSpec) -> list[list[int]]:
    return [ids.tolist() for ids in engine.generate(asked, spec).ids()]


@pytest.fixture(scope="module")
def engine(tiny_pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


@pytest.fixture
def name(ray_cluster) -> Iterator[str]:
    """A service name of its own, stopped afterwards."""
    name = f"generate-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


@pytest.mark.parametrize("family", telling(FAMILIES, "gemma2", "bloom"))
def test_greedy_in_a_batch_is_the_models_own_greedy_one_by_one(family, tmp_path):
    folder = save_family(family, tmp_path)
    found = HFEngine.load(str(folder)).generate(openings(), GREEDY)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for ids, output in zip(openings().ids(), found.ids(), strict=True):
        alone = torch.from_numpy(ids.astype(np.int64))[None]
        whole = model.generate(alone, max_new_tokens=12, do_sample=False, eos_token_id=2)
        expected = whole[0, len(ids) :].tolist()
        assert output.tolist() == [token for token in expected if token != 2]


def test_a_mixture_whose_config_asks_for_the_loss_of_its_routers_writes_the_same(tmp_path):
    """In a padded batch, where transformers' own generation fails for it."""
    folder = save_family("qwen2_moe", tmp_path)
    plain, asking = (HFEngine.load(str(folder)) for _ in range(2))
    asking.model.config.output_router_logits = True
    assert written(asking, openings(), GREEDY) == written(plain, openings(), GREEDY)
    assert asking.model.config.output_router_logits


@pytest.mark.parametrize(
    "family",
    telling(["longrope", "recurrent gemma", "lfm2", "rwkv"], "longrope", "recurrent gemma"),
)
def test_neighbours_change_nothing_where_a_batch_would_let_them(family, tmp_path):
    """Below, across and beyond the switch of longrope; recurrent states that read padding."""
    if family == "longrope":
        folder = longrope(tmp_path)
    else:
        config = LEAKY.get(family, RWKV)
        folder = saved(tmp_path, config, scale=2.0)
    asked, model = openings([60, 5, 100, 5], vocab=96), AutoModelForCausalLM.from_pretrained(folder)
    found = HFEngine.load(str(folder)).generate(asked, GenerationSpec(12))
    for ids, output in zip(asked.ids(), found.ids(), strict=True):
        alone = torch.from_numpy(ids.astype(np.int64))[None]
        whole = model.eval().generate(alone, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert output.tolist() == whole[0, len(ids) :].tolist()


def test_every_position_is_drawn_anew(engine):
    """So hot that the draw alone decides: one draw for all positions would repeat one token."""
    for ids in written(engine, openings(), GenerationSpec(12, temperature=1e6)):
        assert len(set(ids)) > 6


@pytest.mark.parametrize("family", telling(FAMILIES, "qwen2_moe"))
def test_what_is_drawn_depends_on_the_opening_and_not_on_its_neighbours(family, tmp_path):
    engine, asked = HFEngine.load(str(save_family(family, tmp_path))), openings()
    together = written(engine, asked, DRAWN)
    alone = [written(engine, part(asked, slice(n, n + 1)), DRAWN)[0] for n in range(len(asked))]
    assert together == alone
    backwards = Openings.build(names=asked.names()[::-1], input_ids=asked.ids()[::-1])
    assert written(engine, backwards, DRAWN) == together[::-1]


def test_the_same_seed_draws_the_same_and_another_draws_other(engine):
    asked = openings(vocab=TINY_VOCAB)
    first = written(engine, asked, DRAWN)
    assert written(engine, asked, DRAWN) == first
    assert written(engine, asked, replace(DRAWN, seed=1)) != first


def test_what_is_drawn_is_distributed_as_the_softmax(engine, tiny_pair):
    """The place of each drawn token in its own cumulative distribution is uniform, at the first
    and the second position alike."""
    asked, temperature = openings([4] * 600, vocab=TINY_VOCAB), 0.7
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()
    spread = np.random.default_rng(5)
    places: list[np.ndarray] = []
    for seed in range(3):
        spec = GenerationSpec(2, temperature=temperature, seed=seed)
        drawn_B2 = torch.from_numpy(np.stack(engine.generate(asked, spec).ids()).astype(np.int64))
        ids_BT = torch.cat([torch.from_numpy(np.stack(asked.ids()).astype(np.int64)), drawn_B2], 1)
        with torch.no_grad():
            logits_B2V = model(ids_BT, use_cache=False).logits[:, 3:5].double()
        p_B2V = (logits_B2V / temperature).softmax(-1)
        upto_B2 = p_B2V.cumsum(-1).gather(2, drawn_B2[..., None])[..., 0]
        own_B2 = p_B2V.gather(2, drawn_B2[..., None])[..., 0]
        places.append((upto_B2 - own_B2 * torch.from_numpy(spread.random(own_B2.shape))).numpy())
    for position in range(2):
        counts, _ = np.histogram(np.concatenate(places)[:, position], bins=12, range=(0, 1))
        assert stats.chisquare(counts).pvalue > 0.01


def test_near_zero_temperature_draws_the_likeliest(engine):
    asked = openings(vocab=TINY_VOCAB)
    cold = replace(GREEDY, temperature=1e-4)
    assert written(engine, asked, cold) == written(engine, asked, GREEDY)


def test_a_continuation_ends_before_the_first_stop_id(engine):
    asked = openings([9], vocab=TINY_VOCAB)
    (free,) = written(engine, asked, replace(GREEDY, stop_ids=()))
    assert len(free) == 12
    stop = free[4]
    found = engine.generate(asked, replace(GREEDY, stop_ids=(stop,)))
    assert found.ids()[0].tolist() == free[: free.index(stop)]
    assert found.stopped() == [True]
    assert engine.generate(asked, replace(GREEDY, stop_ids=())).stopped() == [False]


def test_a_models_own_generation_defaults_play_no_part(tiny_pair, tmp_path):
    """A folder may ask for sampling, penalties and an end of its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher)
    model.save_pretrained(tmp_path)
    GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, eos_token_id=[3, 4, 5]
    ).save_pretrained(tmp_path)
    asked = openings(vocab=TINY_VOCAB)
    plain = HFEngine.load(str(tiny_pair.teacher))
    assert written(HFEngine.load(str(tmp_path)), asked, GREEDY) == written(plain, asked, GREEDY)


def test_what_can_never_be_answered_is_refused(engine):
    with pytest.raises(HandshakeError, match=r"intent/0 has 120 tokens .* context is 128;"):
        engine.generate(openings([120], vocab=TINY_VOCAB), GREEDY)
    engine.generate(openings([116], vocab=TINY_VOCAB), GREEDY)
    with pytest.raises(ConfigError, match="intent/0 has no token to start from"):
        engine.generate(openings([0]), GREEDY)
    unknown = Openings.build(names=["a"], input_ids=[[TINY_VOCAB]])
    with pytest.raises(HandshakeError, match=f"a holds token id {TINY_VOCAB}"):
        engine.generate(unknown, GREEDY)
    with pytest.raises(ConfigError, match="at most 0 tokens"):
        engine.generate(openings([3]), GenerationSpec(0))


def test_two_replicas_answer_in_order_with_the_bits_of_one(name, tiny_pair, engine):
    teacher = Teacher(model=str(tiny_pair.teacher), cpus=0.5, replicas=2)
    described = service.start(name, teacher, detached=False).described()
    pool = GenerationPool(0, service=name, teacher=described.fingerprint)
    asked = [openings([5, 30, 11], vocab=TINY_VOCAB, seed=n) for n in range(8)]
    for batch in asked:
        pool.submit(batch, DRAWN)
    for batch in asked:
        assert pool.next().table.equals(engine.generate(batch, DRAWN).table)
    replicas = [ray.get_actor(replica_name(name, n), namespace=name) for n in range(2)]
    units = [health.units for health in ray.get([each.health.remote() for each in replicas])]
    assert sum(units) == 8
    assert min(units) > 0


@pytest.mark.drill
def test_a_replica_killed_in_mid_batch_costs_nothing_but_time(name, tiny_pair, engine):
    teacher = Teacher(model=str(tiny_pair.teacher), cpus=0.5, replicas=2)
    described = service.start(name, teacher, detached=False).described()
    pool = GenerationPool(0, service=name, teacher=described.fingerprint)
    spec = replace(DRAWN, max_new_tokens=60, stop_ids=())
    asked = [openings([5, 30, 11, 50], vocab=TINY_VOCAB, seed=n) for n in range(20)]
    for batch in asked:
        pool.submit(batch, spec)
    answers = [pool.next() for _ in range(3)]
    os.kill(service.status(name).replicas[0].health.pid, signal.SIGKILL)
    answers += [pool.next() for _ in range(17)]
    for batch, answer in zip(asked, answers, strict=True):
        assert answer.table.equals(engine.generate(batch, spec).table, check_metadata=True)
    assert pool.stats.retried_units > 0


def started(name: str, engine: Scripted, **settings) -> GenerationPool:
    teacher = Teacher(model="any", cpus=0.1, replicas=2)
    described = service.start(name, teacher, detached=False, make_engine=engine).described()
    return GenerationPool(0, service=name, teacher=described.fingerprint, **settings)


def test_a_batch_lost_with_its_replica_is_asked_again(name, tmp_path):
    pool = started(name, Scripted(killed_once=str(tmp_path / "killed")), unit_deadline_s=60)
    asked = [openings([9, 4], seed=n) for n in range(5)]
    for batch in asked:
        pool.submit(batch, DRAWN)
    for batch in asked:
        assert pool.next().table.equals(echoed(batch, DRAWN).table, check_metadata=True)
    assert pool.stats.retried_units > 0


@pytest.mark.drill
def test_a_batch_that_kills_every_replica_stops_with_its_names(name):
    pool = started(name, Scripted(killed_by=POISON))
    pool.submit(Openings.build(names=["sql/7"], input_ids=[[5, POISON]]), GREEDY)
    with pytest.raises(TeacherError, match=r"unit of rows sql/7; .*died while continuing it"):
        pool.next()
