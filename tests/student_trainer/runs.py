"""Small real runs for the trainer's tests: ragged rows of two domains, plans."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.planning.handshake import training_question
from shared.config.domains import Domain
from shared.config.run import Config
from shared.config.targets import Targets
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RaggedRows, write_rows
from shared.mixture.curriculum import write_order
from shared.run.plan import RunPlan
from shared.targets.question import HiddenAsk
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import question_of

ROOT = Path(__file__).parents[2]
DOMAINS = ("code", "prose")
POISONED_ID = tiny.VOCAB - 1  # in no row


def ragged_rows(seed: int, *, count: int) -> RaggedRows:
    """Rows of 6 to 40 tokens in one to three documents, some of them with a prompt."""
    generator = np.random.default_rng(seed)
    rows = RaggedRows([], [], [])
    for _ in range(count):
        length = int(generator.integers(6, 41))
        ids = generator.integers(3, POISONED_ID, length)
        cuts = sorted({0, *generator.integers(2, length - 2, int(generator.integers(0, 3)))})
        mask = np.ones(length, np.uint8)
        mask[[c - 1 for c in cuts[1:]] + [length - 1]] = 0
        if generator.random() < 0.5:
            mask[: length // 3] = 0
        rows.input_ids.append(ids)
        rows.doc_starts.append(np.array(cuts))
        rows.loss_masks.append(mask)
    return rows


def prepared_domains(folder: Path) -> tuple[PreparedDomain, ...]:
    """Both domains' training and validation rows on disk."""
    prepared = []
    for seed, name in enumerate(DOMAINS):
        train, validation = ragged_rows(seed, count=24), ragged_rows(100 + seed, count=5)
        paths = [str(folder / f"{name}.{part}.arrow") for part in ("train", "validation")]
        for path, rows in zip(paths, (train, validation), strict=True):
            write_rows(Path(path), domain=name, rows=rows)
        tokens = train.num_loss_tokens
        prepared.append(PreparedDomain(name, *paths, len(train), tokens, natural_weight=0.5))
    return tuple(prepared)


def plan_of(
    folder: Path,
    pair: tiny.Pair,
    domains: tuple[PreparedDomain, ...],
    *,
    vocab: int = tiny.VOCAB,
    **options: object,
) -> RunPlan:
    """A plan of a short run in `folder` whose models share `vocab` ids; options are sections or
    leaves of the config, merged."""
    fields: dict = {
        "name": folder.name,
        "steps": 4,
        "log_every": 3,
        "paths": {"runs": str(folder.parent)},
        "teachers": {"t": {"model": str(pair.teacher)}},
        "student": {"model": str(pair.student), "workers": 2},
        "domains": {domain.name: {"train": domain.train_path} for domain in domains},
        "data": {"context": 64},
        "batch": {"rows_per_step": 8, "micro_batch": 2},
        "targets": {"selector": "top_k", "top_k": 16, "encoding": "fp32"},
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}],
        "optimiser": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.01},
        "checkpoints": {"every": 2},
    }
    for name, value in options.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    config = Config.model_validate(fields)
    folder.mkdir(parents=True, exist_ok=True)
    return RunPlan(
        config=config,
        run_dir=str(folder),
        domains=domains,
        training_question=training_question(config, vocab),
        validation_question=question_of(
            vocab, vocab, temperatures=config.temperatures, encoding="fp32"
        ),
        kl_kind="full",
        teacher=None,
        packed=True,
        teacher_width=48 if config.hidden_layers else None,
    )


def plan_of_two(
    folder: Path,
    pair: tiny.Pair,
    domains: tuple[PreparedDomain, ...],
    teachers: Mapping[str, Path],
    *,
    cache: Path | None = None,
    vocabs: Mapping[str, int] | None = None,
    **options: object,
) -> RunPlan:
    """A plan of a short run in which each teacher, a name and a folder, teaches one domain; with a
    cache, their last states are asked for. `vocabs`: how many ids each shares with the student."""
    named = dict(zip(DOMAINS, teachers, strict=True))
    parts = {}
    for name, model in teachers.items():
        vocab = vocabs[name] if vocabs else tiny.VOCAB
        part = plan_of(folder, replace(pair, teacher=model), domains, vocab=vocab, **options)
        parts[name] = with_states(part, cache) if cache else part
    first = next(iter(parts.values())).config
    described = {
        domain: Domain(train=first.domains[domain].train, teacher=name)
        for domain, name in named.items()
    }
    asked = {name: part.config.teachers["t"] for name, part in parts.items()}
    config = first.model_copy(update={"teachers": asked, "domains": described})
    own = {
        name: replace(
            part,
            config=config.taught_by(name),
            domains=tuple(domain for domain in domains if named[domain.name] == name),
        )
        for name, part in parts.items()
    }
    return RunPlan.joined(config, domains, own)


def with_states(plan: RunPlan, cache: Path) -> RunPlan:
    """The same with the teacher's last states asked for, its head lying in a cache."""
    engine = HFEngine.load(plan.config.teachers["t"].model)
    engine.cache = str(cache)
    head = engine.ship_head()
    config = plan.config
    paths = config.paths.model_copy(update={"cache": str(cache)})
    targets = Targets(exact="last_hidden")
    assert plan.training_question is not None
    vocab = plan.training_question.ask.shared_vocab
    spec = question_of(
        0, vocab, head=head.digest, states=head.states, states_width=head.states_width
    )
    return replace(
        plan,
        config=config.model_copy(update={"paths": paths, "targets": targets}),
        training_question=replace(spec, hidden=HiddenAsk(config.hidden_layers, "fp32")),
        validation_question=spec,
    )


def with_orders(domains: tuple[PreparedDomain, ...], folder: Path) -> tuple[PreparedDomain, ...]:
    """The same domains with an order of their rows, as phases need it."""
    ordered = []
    for seed, domain in enumerate(domains):
        path = folder / f"{domain.name}.order.npy"
        write_order(path, np.random.default_rng(seed).normal(size=domain.num_rows))
        ordered.append(replace(domain, order_path=str(path)))
    return tuple(ordered)


def mark_exported(plan: RunPlan, *, step: int | None = None) -> None:
    """Let a run find its export in place, so that it spends no time on one."""
    folder = Path(plan.run_dir) / "export"
    folder.mkdir(exist_ok=True)
    facts = {"step": step or plan.config.steps, "files": {}}
    (folder / "tutelage.json").write_text(json.dumps(facts))
