"""Laws of what a teacher writes: bounds of the narrow types' errors, what they leave exact, and the
bytes that leave its device, which are those that travel."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from shared.errors import TeacherError
from shared.targets.codec.decoding import logprobs_from_int8
from shared.targets.codec.elias_fano import EliasFano
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.scoring import encoding
from teacher_service.scoring.answering import encode
from teacher_service.scoring.encoding import ids_in_bytes, in_float16, logprobs_in_int8
from teacher_service.scoring.scoring import Selection
from tests.answers import decoded, question_of
from tests.shared.targets.codec.test_elias_fano import VOCABS, selections, sizes

# N positions   K ids   D width of the states
N, K, D, V = 40, 16, 12, 70_000
LARGEST = np.finfo(np.float16).max


def likeliest(num: int, k: int, *, spread: float = 4.0, others: int = 500, seed: int = 0):
    """Log-probabilities [N, K] of the likeliest of k + others outcomes, and the rest's mass [N]."""
    logits = np.random.default_rng(seed).normal(size=(num, k + others)) * spread
    logprobs = np.sort(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[:, ::-1]
    tail_N = np.logaddexp.reduce(logprobs[:, k:], axis=1) if others else np.full(num, -np.inf)
    return logprobs[:, :k].astype(np.float32), tail_N.astype(np.float32)


def through_int8(logprobs_NK: np.ndarray, tail_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What comes back, and the size of a step [N]."""
    sent = (torch.from_numpy(sent) for sent in (logprobs_NK, tail_N))
    steps_NK, range_N = (got.numpy() for got in logprobs_in_int8(*sent))
    assert (steps_NK.dtype, range_N.dtype) == (np.uint8, np.float16)
    return logprobs_from_int8(steps_NK, range_N, tail_N), range_N.astype(np.float64) / 255


@pytest.mark.parametrize("spread", [1e-3, 0.3, 4.0, 30.0])
@pytest.mark.parametrize("k", [2, 32, 64])
def test_int8_keeps_every_distance_from_the_top_within_half_a_step(k: int, spread: float) -> None:
    sent_NK, tail_N = likeliest(200, k, spread=spread)
    got_NK, step_N = through_int8(sent_NK, tail_N)
    below_NK, found_NK = (a.astype(np.float64).max(1)[:, None] - a for a in (sent_NK, got_NK))
    # The range is a float16 and the level a float32: their rounding comes on top of half a step.
    bound_NK = step_N[:, None] * 0.63 + 1e-6 + 1e-6 * np.abs(sent_NK)
    assert (np.abs(found_NK - below_NK) <= bound_NK).all()
    assert (np.argmax(got_NK, axis=1) == np.argmax(sent_NK, axis=1)).all()


@pytest.mark.parametrize("others", [0, 1, 500])
def test_int8_leaves_the_kept_mass_exactly_what_the_tail_leaves(others: int) -> None:
    sent_NK, tail_N = likeliest(200, 16, others=others)
    got_NK, _ = through_int8(sent_NK, tail_N)
    mass_N = np.exp(got_NK.astype(np.float64)).sum(1) + np.exp(tail_N.astype(np.float64))
    np.testing.assert_allclose(mass_N, 1, atol=3e-6)


def test_int8_costs_less_than_a_step_squared_over_8_in_kl() -> None:
    sent_NK, tail_N = likeliest(400, 64)
    got_NK, step_N = through_int8(sent_NK, tail_N)
    p_NK = np.exp(sent_NK.astype(np.float64))
    kl_N = (p_NK * (sent_NK.astype(np.float64) - got_NK)).sum(1)
    assert (kl_N <= step_N**2 / 8 * 1.1 + 1e-6).all()
    assert 0 < kl_N.mean() < 1e-4


def test_int8_of_one_id_or_of_equal_ones_is_exact() -> None:
    for k in (1, 5):
        sent_NK = np.full((3, k), np.log(0.5 / k), np.float32)
        got_NK, _ = through_int8(sent_NK, np.full(3, np.log(0.5), np.float32))
        np.testing.assert_allclose(got_NK, sent_NK, rtol=1e-6)


def test_int8_stays_finite_where_probabilities_or_what_the_tail_leaves_vanish() -> None:
    sent_NK = np.array([[0, -1e5, -3e38], [-17, -18, -19]], np.float32)
    got_NK, _ = through_int8(sent_NK, np.array([-1e5, 0], np.float32))
    assert np.isfinite(got_NK).all()
    assert got_NK[0, 1] < -LARGEST / 2


def test_int8_refuses_masses_that_do_not_sum_to_one() -> None:
    sent_NK, tail_N = likeliest(4, 8)
    with pytest.raises(TeacherError, match=r"do not sum to 1.*use fp16"):
        logprobs_in_int8(torch.from_numpy(sent_NK) - 0.5, torch.from_numpy(tail_N))


def test_float16_never_falls_below_its_smallest_number() -> None:
    got = in_float16(torch.tensor([-1e9, -7.0])).numpy()
    np.testing.assert_array_equal(got, np.array([-LARGEST, -7], np.float16))


def selection(*, drawn: bool) -> Selection:
    """Of random logits; ids kept exactly are few where ids are drawn, and none at one position."""
    torch.manual_seed(0)
    logprobs_NV = (torch.randn(N, 300) * 8).log_softmax(1).sort(1, descending=True)[0]
    logprobs_NK, tail_N = logprobs_NV[:, :K].clone(), logprobs_NV[:, K:].logsumexp(1)
    logprobs_NK[3, -1] = -1e6  # below what a half holds
    if drawn:
        logprobs_NK[:, 5:] = -torch.inf
        logprobs_NK[1] = -torch.inf
        tail_N = logprobs_NV[:, 5:].logsumexp(1)
    return Selection(
        ids_NK=torch.rand(N, V).topk(K)[1],
        logprobs_NK=logprobs_NK,
        log_tail_NS=tail_N[:, None].clamp(max=0),
        label_logprob_N=logprobs_NV[:, 2],
        entropy_N=torch.rand(N) if drawn else None,
    )


def states() -> dict[int, torch.Tensor]:
    """Of two layers, with a large position and one of zeros."""
    states_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    states_ND[0] *= 1e4
    states_ND[1] = 0
    return {2: states_ND, 5: states_ND.double().sin()}


def answer(spec: Question, columns: dict[str, np.ndarray]) -> SoftTargets:
    """One row of all positions."""
    return SoftTargets.build(
        question=spec,
        teacher={},
        row_hashes=[bytes(16)],
        num_targets_R=np.array([N]),
        columns=columns,
    )


def sound(*, drawn: bool) -> Selection:
    """A selection whose kept ids and tail sum to 1."""
    found = selection(drawn=drawn)
    if not drawn:
        found.logprobs_NK[3, -1] = found.logprobs_NK[3, -2]
        found.log_tail_NS[:, 0] = torch.log1p(-found.logprobs_NK.double().exp().sum(1)).float()
    return found


@pytest.mark.parametrize("hidden", ["bf16", "int8", "fp32"])
@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("selector", ["top_k", "threshold", "sampled"])
@pytest.mark.parametrize("ids", ["plain", "elias_fano"])
def test_what_leaves_the_device_is_what_travels(selector, encoding, hidden, ids) -> None:
    """Byte for byte and column by column: nothing is left for the host to narrow."""
    drawn = selector != "top_k"
    spec = question_of(
        K, V, selector=selector, encoding=encoding, entropy=drawn, ids=ids, hidden_layers=(2, 5),
        hidden_encoding=hidden,
    )  # fmt: skip
    columns = encode(sound(drawn=drawn), spec, hidden=states())
    table = answer(spec, columns).table
    assert table.column_names == ["row_hash", *columns]
    for name, sent in columns.items():
        values = table.column(name).chunk(0).values
        values = values.values if pa.types.is_fixed_size_list(values.type) else values
        assert values.to_numpy().tobytes() == sent.tobytes()


@pytest.mark.parametrize("encoded", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("selector", ["top_k", "threshold", "sampled"])
def test_positions_are_encoded_alike_in_any_parts(selector, encoded, monkeypatch) -> None:
    drawn = selector != "top_k"
    spec = question_of(K, V, selector=selector, encoding=encoded, entropy=drawn)
    whole = encode(sound(drawn=drawn), spec)
    for ids in (1, 3 * K, N * K):
        monkeypatch.setitem(encoding.PART_IDS, "cpu", ids)
        for name, column in encode(sound(drawn=drawn), spec).items():
            np.testing.assert_array_equal(column, whole[name], err_msg=name)


@pytest.mark.parametrize("vocab", VOCABS)
def test_ids_take_the_bytes_of_their_code(vocab: int) -> None:
    for num_ids in sizes(vocab):
        code, ids_NK = EliasFano(num_ids, vocab), selections(num_ids, vocab)
        asked = torch.from_numpy(ids_NK).int()
        np.testing.assert_array_equal(ids_in_bytes(asked, code).numpy(), code.encode(ids_NK))
    assert ids_in_bytes(torch.empty(0, 2).int(), EliasFano(2, vocab)).shape[0] == 0


def test_an_empty_slot_repeats_the_largest_id_and_stands_behind_it() -> None:
    """Where nothing is left to draw, at the position of three ids with mass."""
    logprobs_1K = torch.tensor([0.5, 0.3, 0.2]).log()
    found = Selection(
        ids_NK=torch.tensor([[7, 9, 4, 8, 3]]),
        logprobs_NK=torch.cat([logprobs_1K, torch.full((2,), -torch.inf)])[None],
        log_tail_NS=torch.full((1, 1), -torch.inf),
        label_logprob_N=torch.zeros(1),
        entropy_N=torch.zeros(1),
    )
    spec = question_of(5, 11, selector="threshold", encoding="fp32", entropy=True, ids="plain")
    columns = encode(found, spec)
    np.testing.assert_array_equal(columns["top_ids"], [[4, 7, 9, 9, 9]])
    np.testing.assert_array_equal(columns["exact"], [[0b00111]])
    np.testing.assert_array_equal(columns["exact_logprobs"], logprobs_1K[[2, 0, 1]])


@pytest.mark.parametrize("ids", ["plain", "elias_fano"])
def test_sampled_ids_that_cover_all_the_mass_are_themselves(ids) -> None:
    """Nothing is outside, and yet no slot is empty."""
    nothing = torch.full((1, 4), -torch.inf)
    found = Selection(
        torch.tensor([[7, 3, 3, 7]]), nothing, nothing[:, :1], torch.zeros(1), torch.zeros(1)
    )
    spec = question_of(4, 11, selector="sampled", entropy=True, ids=ids)
    built = SoftTargets.build(
        question=spec,
        teacher={},
        row_hashes=[bytes(16)],
        num_targets_R=np.array([1]),
        columns=encode(found, spec),
    )
    np.testing.assert_array_equal(decoded(built).ids_NK, [[3, 3, 7, 7]])
    np.testing.assert_allclose(decoded(built).logprobs_NK, np.log(0.25), rtol=1e-6)


@pytest.mark.parametrize("wrong", [[0, 2, 1], [0, 1, 1], [0, 1, 3]])
def test_a_whole_vocabulary_out_of_order_is_refused(wrong: list[int]) -> None:
    found = Selection(
        torch.tensor([wrong]), torch.zeros(1, 3), torch.full((1, 1), -torch.inf), torch.zeros(1)
    )
    with pytest.raises(TeacherError, match="whole vocabulary and not in order"):
        encode(found, question_of(3, 3))


@pytest.mark.parametrize(("encoded", "size"), [("bf16", 2), ("int8", 1), ("fp32", 4)])
def test_states_leave_the_device_in_the_type_in_which_they_travel(encoded: str, size: int) -> None:
    spec = question_of(K, V, hidden_layers=(2, 5), hidden_encoding=encoded)  # type: ignore[arg-type]
    columns = encode(selection(drawn=False), spec, hidden=states())
    built = answer(spec, columns)
    for layer in (2, 5):
        assert columns[f"hidden_{layer}"].itemsize == size
        values = built.table.schema.field(f"hidden_{layer}").type.value_type.value_type
        assert values == {1: pa.int8(), 2: pa.uint16(), 4: pa.float32()}[size]


def test_int8_states_are_within_half_a_step_of_each_positions_largest() -> None:
    spec = question_of(K, V, hidden_layers=(2, 5), hidden_encoding="int8")
    columns = encode(selection(drawn=False), spec, hidden=states())
    got = answer(spec, columns).arrays().hidden_ND
    for layer, states_ND in states().items():
        half_step_N1 = np.abs(states_ND.numpy()).max(axis=1, keepdims=True) / 127 / 2
        assert (np.abs(got[layer] - states_ND.numpy()) <= half_step_N1 * (1 + 1e-5)).all()


@pytest.mark.parametrize("selector", ["top_k", "threshold"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_probability_that_is_no_number_is_refused(selector, bad: float) -> None:
    drawn = selector == "threshold"
    found = selection(drawn=drawn)
    found.logprobs_NK[4, 2] = bad
    spec = question_of(K, V, selector=selector, entropy=drawn)
    if drawn and bad == -torch.inf:  # a drawn id's
        assert encode(found, spec)
        return
    with pytest.raises(TeacherError, match="non-finite logprobs"):
        encode(found, spec)


@pytest.mark.parametrize("tail", [0.1, torch.nan, torch.inf])
def test_a_tail_that_is_no_probability_is_refused(tail: float) -> None:
    found = selection(drawn=False)
    found.log_tail_NS[4] = tail
    with pytest.raises(TeacherError, match="tail mass outside"):
        encode(found, question_of(K, V))


@pytest.mark.parametrize("wrong", [-1, V])
def test_an_id_that_is_not_shared_is_refused(wrong: int) -> None:
    found = selection(drawn=False)
    found.ids_NK[4, 2] = wrong
    with pytest.raises(TeacherError, match=rf"selected ids .*{wrong}.* of 70,000 shared"):
        encode(found, question_of(K, V))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("selector", ["top_k", "threshold", "sampled"])
@pytest.mark.parametrize("ids", ["plain", "elias_fano"])
def test_a_gpu_writes_the_bytes_of_a_cpu(selector, encoding, ids) -> None:
    drawn = selector != "top_k"
    spec = question_of(
        K, V, selector=selector, encoding=encoding, entropy=drawn, ids=ids, hidden_layers=(2, 5)
    )
    here = sound(drawn=drawn)
    fields = {name: getattr(here, name) for name in here.__dataclass_fields__}
    there = Selection(**{n: None if x is None else x.cuda() for n, x in fields.items()})
    found = encode(there, spec, hidden={n: x.cuda() for n, x in states().items()})
    for name, column in encode(here, spec, hidden=states()).items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)
