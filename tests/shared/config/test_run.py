"""The config tree: what it derives, and what it refuses as a whole."""

import pytest
from pydantic import ValidationError

from shared.config.run import Config
from shared.config.selectors import selector_note

SMALLEST = {
    "name": "x",
    "steps": 10,
    "teachers": {"t": {"model": "a"}},
    "student": {"model": "b"},
    "domains": {"math": {"train": "m"}, "code": {"train": "c"}},
}


def config(**parts: object) -> Config:
    return Config.model_validate(SMALLEST | parts)


def test_accumulation_is_what_is_left_of_a_step_for_one_worker():
    batch = {"rows_per_step": 24, "micro_batch": 3}
    assert config(batch=batch, student={"model": "b", "workers": 2}).accumulation == 4


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValidationError, match=r"batch.rows_per_step is 8, not a multiple"):
        config(batch={"rows_per_step": 8, "micro_batch": 3})


def test_workers_are_numbers_within_bounds_that_divide_a_step():
    batch = {"rows_per_step": 24, "micro_batch": 2}
    found = config(batch=batch, student={"model": "b", "workers": {"min": 2, "max": 9}})
    assert found.worker_counts == (2, 3, 4, 6)
    assert (found.fewest_workers, found.most_workers, found.accumulation) == (2, 6, 2)
    fixed = config(batch=batch, student={"model": "b", "workers": 3})
    assert fixed.worker_counts == (3,)
    with pytest.raises(ValidationError, match=r"times any student.workers from 7 to 11"):
        config(batch=batch, student={"model": "b", "workers": {"min": 7, "max": 11}})


def test_temperatures_begin_with_one_and_hold_each_once():
    losses = [{"kind": "forward_kl", "temperature": t} for t in (2.0, 1.0, 2.0, 4.0)]
    assert config(losses=losses).temperatures == (1.0, 2.0, 4.0)


def test_only_losses_that_learn_from_a_teacher_need_one():
    assert not config(losses=[{"kind": "cross_entropy"}]).needs_teacher
    assert config().needs_teacher


def test_a_second_token_adaptive_loss_is_refused():
    once = config(losses=[{"kind": "atkd"}, {"kind": "forward_kl"}])
    assert (once.losses[0].hard_fraction, once.losses[0].easy_weight) == (0.5, 0.2)
    assert once.needs_teacher
    with pytest.raises(ValidationError, match="more than one atkd; keep one"):
        config(losses=[{"kind": "atkd"}, {"kind": "atkd", "direction": "reverse"}])


def test_the_defaults_of_the_divergences_are_their_papers():
    kinds = ("jsd", "skew_forward_kl", "skew_reverse_kl", "akl", "taid", "alpha_beta")
    found = config(losses=[{"kind": kind} for kind in kinds])
    jsd, forward, reverse, akl, taid, abkd = (loss.model_dump() for loss in found.losses)
    assert (jsd["beta"], jsd["continuous"]) == (0.5, False)
    assert forward["alpha"] == reverse["alpha"] == 0.1
    assert akl["mu"] == 0.5
    assert (abkd["alpha"], abkd["beta"]) == (0.2, 0.7)
    assert [taid[name] for name in ("t_start", "t_end", "alpha", "beta")] == [0.4, 1.0, 5e-4, 0.99]
    assert found.needs_teacher
    assert found.taid == found.losses[4]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([{"kind": "taid"}, {"kind": "taid"}], "more than one taid; keep one"),
        ([{"kind": "taid", "t_start": 0.8, "t_end": 0.5}], "t_start of taid is 0.8, above its"),
        ([{"kind": "skew_forward_kl", "alpha": 1}], "less than 1"),
        (
            [{"kind": "jsd", "beta": 1e-5, "continuous": True}],
            "beta of jsd is 1e-05.* from 0, so take that, or a value from 0.001 to 0.999",
        ),
    ],
)
def test_divergences_that_cannot_work_are_refused(losses, sentence):
    with pytest.raises(ValidationError, match=sentence):
        config(losses=losses)


def test_prefetch_never_passes_the_lag():
    for lag in (0, 1, 2, 5):
        mixture = {"policy": "ddk", "interval": 10, "lag_steps": lag}
        assert config(mixture=mixture).prefetch_steps <= lag


def test_an_interval_below_the_lag_is_refused():
    with pytest.raises(ValidationError, match=r"raise the interval or lower the lag"):
        config(mixture={"policy": "ddk", "interval": 2, "lag_steps": 3})


@pytest.mark.parametrize("policy", ["ddk", "doremi", "sheared", "odm"])
def test_a_floor_that_domains_cannot_all_have_is_refused(policy):
    mixture = {"policy": policy, "floor": 0.6}
    with pytest.raises(ValidationError, match=r"mixture.floor is 0.6 for each of 2 domains"):
        config(mixture=mixture)
    assert config(mixture=mixture | {"floor": 0.5}).mixture.policy == policy


@pytest.mark.parametrize(
    ("policy", "option", "value"),
    [
        ("ddk", "alpha", 1.5),
        ("doremi", "step_size", 0),
        ("doremi", "step_size", 1e308),
        ("doremi", "smoothing", 0),
        ("sheared", "step_size", -1),
        ("sheared", "step_size", 1e308),
        ("sheared", "smoothing", 2),
        ("odm", "smoothing", -0.1),
        ("odm", "max_change", 0),
        ("ddk", "floor", -0.1),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused(policy, option, value):
    with pytest.raises(ValidationError, match=rf"mixture.{policy}.{option}\n"):
        config(mixture={"policy": policy, option: value})


def test_fixed_weights_name_every_domain():
    with pytest.raises(ValidationError, match=r"mixture.weights must name every domain"):
        config(mixture={"policy": "fixed", "weights": {"math": 1.0}})


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.7e308])
def test_fixed_weights_have_a_positive_finite_sum(weight):
    with pytest.raises(ValidationError, match=r"mixture.weights must be non-negative with a pos"):
        config(mixture={"policy": "fixed", "weights": {"math": weight, "code": weight}})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        config().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("losses", "picked"),
    [
        ([{"kind": "forward_kl"}], "threshold"),
        ([{"kind": "cross_entropy"}, {"kind": "forward_kl", "temperature": 2}], "threshold"),
        (
            [{"kind": "soft_cross_entropy"}, {"kind": "hidden_states", "layers": {1: 1}}],
            "threshold",
        ),
        ([{"kind": "forward_kl"}, {"kind": "soft_cross_entropy"}], "top_k"),  # temperatures 1, 2
        ([{"kind": "forward_kl"}, {"kind": "reverse_kl"}], "top_k"),
        ([{"kind": "taid"}], "top_k"),
        ([{"kind": "atkd"}], "top_k"),
        ([{"kind": "forward_kl"}, {"kind": "atkd"}], "top_k"),
        ([{"kind": "cross_entropy"}], "top_k"),
        ([{"kind": "hidden_states", "layers": {1: 1}}], "top_k"),
    ],
)
def test_auto_draws_ids_where_every_divergence_takes_them(losses, picked):
    found = config(losses=losses)
    assert found.selector_for(512) == picked
    assert found.selector_for(found.targets.top_k) == "top_k", "nothing is left to draw"
    said = selector_note("auto", found.selector_for(512), found.losses, 64)
    assert said.startswith(f"targets.selector auto picks {picked}")
    assert ": " in said


def test_a_named_selector_stands_for_itself_and_only_a_biased_one_warns():
    for name in ("top_k", "renormalised", "threshold", "sampled"):
        found = config(targets={"selector": name})
        assert found.selector_for(512) == name
        said = selector_note(name, name, found.losses, 64)
        assert ("this biases the student" in said) == (name == "renormalised")


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([{"kind": "reverse_kl"}], "but the loss reverse_kl compares both distributions"),
        ([{"kind": "forward_kl"}, {"kind": "atkd"}], "but the loss atkd compares"),
        ([{"kind": "taid"}], "take targets.selector=top_k, or forward_kl or soft_cross_entropy"),
        (
            [{"kind": "forward_kl"}, {"kind": "soft_cross_entropy"}],
            "draws ids at one temperature, but losses have 1 and 2; give them the same",
        ),
    ],
)
def test_a_selector_that_draws_is_refused_where_it_cannot_serve(selector, losses, sentence):
    with pytest.raises(ValidationError, match=sentence) as caught:
        config(losses=losses, targets={"selector": selector})
    assert f"targets.selector is {selector}" in str(caught.value)
    config(losses=losses, targets={"selector": "renormalised"})


def test_losses_without_the_teacher_have_no_temperature_to_draw_at():
    losses = [
        {"kind": "forward_kl", "temperature": 2.0},
        {"kind": "cross_entropy"},
        {"kind": "hidden_states", "layers": {1: 1}},
    ]
    assert config(losses=losses, targets={"selector": "threshold"}).selector_for(512) == "threshold"


REVERSE = [{"kind": "cross_entropy"}, {"kind": "reverse_kl"}]


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "reverse_kl"},
        {"kind": "jsd"},
        {"kind": "skew_reverse_kl"},
        {"kind": "total_variation"},
        {"kind": "akl"},
        {"kind": "generalised_kl", "direction": "reverse"},
        {"kind": "atkd", "direction": "reverse"},
    ],
)
@pytest.mark.parametrize("lag", [0, 3])
def test_a_student_that_names_ids_is_asked_about_when_its_step_is_reached(loss, lag):
    mixture = {"policy": "ddk", "interval": 10, "lag_steps": lag}
    found = config(losses=[loss], targets={"student_ids": 16}, mixture=mixture)
    assert found.prefetch_steps == 0
    assert found.selector_for(512) == "top_k"
    said = selector_note("auto", "top_k", found.losses, 64, student_ids=16)
    ending = "the 16 likeliest ids of the student, the 64 most likely others and the exact mass of"
    assert ending in said


@pytest.mark.parametrize(
    ("losses", "targets", "sentence"),
    [
        ([{"kind": "forward_kl"}], {}, "no loss weighs ids by the student's .* forward_kl alone"),
        ([{"kind": "jsd", "beta": 0}], {}, "take reverse_kl, jsd with beta above 0, skew_reverse"),
        ([{"kind": "akl", "mu": 1}], {}, "akl with mu below 1"),
        ([{"kind": "atkd"}, {"kind": "generalised_kl"}], {}, "with atkd and generalised_kl alone"),
        ([{"kind": "cross_entropy"}], {}, "no loss weighs ids"),
        (REVERSE, {"selector": "renormalised"}, "needs targets.selector top_k, not renormalised"),
        (REVERSE, {"store": "s"}, "targets.store is s, which keeps answers for any; remove one"),
        (REVERSE, {"store": "s", "teacher_free": True}, "depend on the student of the moment"),
        (REVERSE, {"exact": "last_hidden"}, "ships no ids, so targets.student_ids has no meaning"),
        ([{"kind": "forward_kl"}], {"selector": "sampled"}, "needs targets.selector top_k, not sa"),
    ],
)
def test_a_student_that_cannot_name_ids_is_refused(losses, targets, sentence):
    with pytest.raises(ValidationError, match=sentence):
        config(losses=losses, targets={"student_ids": 16} | targets)
    config(losses=losses, targets=targets | {"student_ids": 0})


TWO = {"a": {"model": "a"}, "b": {"model": "b"}}


EXACT = {"targets": {"exact": "last_hidden"}}


def taught(math: object, code: str | None, **parts: object) -> Config:
    named = {"math": {"train": "m", "teacher": math}, "code": {"train": "c", "teacher": code}}
    return config(**{"teachers": TWO, "domains": named, **parts})


def test_a_domain_names_its_teacher():
    both = taught("b", "a")
    assert [both.teacher_of(name) for name in both.domains] == ["b", "a"]
    part = both.taught_by("b")
    assert (list(part.teachers), list(part.domains)) == (["b"], ["math"])


def test_a_domain_may_name_several_teachers_with_weights():
    both = taught({"a": 3, "b": 1}, "b", targets={"exact": "last_hidden"})
    assert both.teachers_of("math") == {"a": 0.75, "b": 0.25}
    assert both.teachers_of("code") == {"b": 1.0}
    assert both.teacher_of("math") == "a"
    part = both.taught_by("a")
    assert (list(part.domains), part.teachers_of("math")) == (["math"], {"a": 1.0})
    assert list(both.taught_by("b").domains) == ["math", "code"]
    assert type(part).model_validate(part.model_dump()) == part


@pytest.mark.parametrize(
    ("teacher", "parts", "says"),
    [
        ({"a": 1, "b": 1}, {}, "averages a and b, who ship other ids of a position each; set"),
        ({}, {}, "domains.math.teacher names no teacher"),
        ({"a": 1, "c": 1}, EXACT, "domains.math.teacher is 'c', but teachers has a, b"),
        ({"a": 0, "b": 1}, EXACT, "greater than 0"),
        ({"a": 1e300, "b": 1e-300}, EXACT, "gives b a share of 0, less than 1e-07"),
        ({"a": 1e308, "b": 1e308}, EXACT, "gives a a share of 0, less than 1e-07"),
        ({"a": 1, "b": 1}, EXACT | {"progressive": {}, "steps": 60}, "what one teacher finds"),
    ],
)
def test_an_average_that_is_not_exact_is_refused(teacher, parts, says):
    with pytest.raises(ValidationError, match=says):
        taught(teacher, "b", **parts)


def test_the_only_teacher_need_not_be_named_and_may_be():
    assert config().teacher_of("code") == "t"
    named = {"math": {"train": "m", "teacher": "t"}, "code": {"train": "c"}}
    assert config(domains=named).teacher_of("math") == "t"


@pytest.mark.parametrize(
    ("math", "code", "said"),
    [
        ("a", None, r"domains.code names no teacher, and there are 2; set domains.code.teacher to"),
        ("a", "c", r"domains.code.teacher is 'c', but teachers has a, b; name one of them"),
        ("a", "a", r"teachers.b teaches no domain; set domains.NAME.teacher=b for one, or remove"),
    ],
)
def test_a_teacher_that_is_missing_unknown_or_unused_is_refused(math, code, said):
    with pytest.raises(ValidationError, match=said):
        taught(math, code)


def test_hidden_states_of_several_teachers_are_refused():
    losses = [{"kind": "forward_kl"}, {"kind": "hidden_states", "layers": {1: 1}}]
    with pytest.raises(ValidationError, match=r"one teacher's width, but teachers has 2"):
        taught("a", "b", losses=losses)
