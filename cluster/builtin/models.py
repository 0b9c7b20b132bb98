"""The embedded default: a tokenizer, a teacher and a student base, made once and cached.

A config names them `builtin:teacher`, `builtin:student` and `builtin:<domain>`; `resolve_builtin`
turns such names into paths. The student has read one domain only, so it has the others to learn.
Importing this module is cheap: torch and transformers load when something is built.
"""

import difflib
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.builtin.corpus import DOMAINS, build_corpus, corpus_folder
from cluster.builtin.plans import ModelPlan, plans
from cluster.report.stages import begin
from cluster.session.session import with_variables
from shared.config.domains import Domain, HubDataset, Source
from shared.config.paths import BUILTIN
from shared.config.run import Config
from shared.errors import ConfigError
from shared.files import obey_umask
from shared.locking import alone

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

VOCAB = 2048
TRAINING = 2  # raised whenever the same plan would give another model
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")  # ids 0, 1, 2
MODELS = ("teacher", "student")
# Built-in models are trained without; DeepSpeed, where it has to find out, says so on the terminal.
WITHOUT_GPU = {"DS_ACCELERATOR": "cpu"}
Side = Literal["train", "validation"]


def resolve_builtin(config: Config) -> Config:
    """The config with every `builtin:` name replaced by the path of what it stands for, which is
    built first where the cache lacks it. A config without such names returns as it is.

    Raises ConfigError for an unknown name, DataError where this Python has too little text.
    """
    if not any(_builtin_names(config)):
        return config
    _refuse_unknown(config)
    stages = stages_to_build(config)
    if "corpus" in stages:
        begin("corpus")
    folder = build_corpus(_cache(config))
    if not _tokenizer_folder(folder).is_dir():
        build_tokenizer(folder)
    if "models" in stages:
        begin("models")
    paths = {name: str(build_model(name, folder)) for name in _used_models(config)}
    teachers = {
        name: teacher.model_copy(update={"model": _model_path(teacher.model, paths)})
        for name, teacher in config.teachers.items()
    }
    student = config.student.model_copy(update={"model": _model_path(config.student.model, paths)})
    domains = {name: _resolved(domain, folder) for name, domain in config.domains.items()}
    return config.model_copy(update={"teachers": teachers, "student": student, "domains": domains})


def stages_to_build(config: Config) -> list[str]:
    """Which of the stages "corpus" and "models" a config with `builtin:` names needs and the cache
    lacks. Raises ConfigError for an unknown name."""
    if not any(_builtin_names(config)):
        return []
    _refuse_unknown(config)
    folder = corpus_folder(_cache(config))
    models = [_model_folder(name, folder, plans()[name]) for name in _used_models(config)]
    needed = {"corpus": [folder / "corpus", _tokenizer_folder(folder)], "models": models}
    return [name for name, parts in needed.items() if not all(part.is_dir() for part in parts)]


def build_model(name: str, folder: Path, *, plan: ModelPlan | None = None) -> Path:
    """The folder of the built-in teacher or student, with its tokenizer, trained on the corpus in
    `folder` on first use; after an interruption the same call continues."""
    plan = plan or plans()[name]
    target = _model_folder(name, folder, plan)
    if not target.is_dir():
        with alone(folder / f"{target.name}.lock", making=f"the built-in {name}"):
            if not target.is_dir():
                with renamed_into_place(target) as scratch:
                    _train_into(scratch, plan, build_tokenizer(folder), target)
    return target


def build_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The byte-level BPE tokenizer of the corpus in `folder`, trained on first use."""
    from transformers import PreTrainedTokenizerFast

    target = _tokenizer_folder(folder)
    if not target.is_dir():
        with alone(folder / f"{target.name}.lock", making="the built-in tokenizer"):
            if not target.is_dir():
                texts = (text for domain in DOMAINS for text in _texts(folder, domain))
                with renamed_into_place(target) as scratch:
                    train_tokenizer(texts, vocab=VOCAB).save_pretrained(scratch)
    return PreTrainedTokenizerFast.from_pretrained(target)


def train_tokenizer(texts: Iterable[str], *, vocab: int, **settings) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with the special ids 0 to 2; `settings` are of the transformers
    class around it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, **settings
    )


def _train_into(
    scratch: Path, plan: ModelPlan, tokenizer: "PreTrainedTokenizerFast", target: Path
) -> None:
    """Write the model of a plan; what a training has done so far lies beside `target`."""
    from transformers.utils import logging

    from cluster.builtin.training import train_model

    logging.disable_progress_bar()  # one shard needs none
    tokens = [end_to_end(tokenizer, _texts(target.parent, domain)) for domain in plan.domains]
    print(f"training {target}", file=sys.stderr, flush=True)
    model = train_model(
        plan,
        tokens,
        vocab=VOCAB,
        title=f"built-in {target.name.partition('-')[0]}",
        folder=target.with_suffix(".training"),
    )
    with with_variables(WITHOUT_GPU):
        model.save_pretrained(scratch)  # which imports deepspeed, where there is one
    tokenizer.model_max_length = plan.max_length
    tokenizer.save_pretrained(scratch)


def end_to_end(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> "np.ndarray":
    """The ids of documents, each between its special ones, int32."""
    import numpy as np

    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return np.array([i for ids in encoded for i in (bos, *ids, eos)], dtype=np.int32)


def _texts(folder: Path, domain: str) -> Iterator[str]:
    with _text_file(folder, domain, "train").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _text_file(folder: Path, domain: str, side: Side) -> Path:
    return folder / "corpus" / f"{domain}.{side}.jsonl"


def _cache(config: Config) -> Path:
    return Path(config.paths.cache).expanduser().absolute()


def _used_models(config: Config) -> list[str]:
    used = {name for _, name in _builtin_names(config)}
    return [name for name in MODELS if BUILTIN + name in used]


def _model_folder(name: str, folder: Path, plan: ModelPlan) -> Path:
    key = hashlib.sha256(repr((TRAINING, plan, VOCAB)).encode()).hexdigest()[:8]
    return folder / f"{name}-{key}"


def _tokenizer_folder(folder: Path) -> Path:
    return folder / f"tokenizer-{VOCAB}"


@contextmanager
def renamed_into_place(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and vanishes otherwise."""
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial."))
    try:
        yield scratch
        obey_umask(scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _builtin_names(config: Config) -> Iterator[tuple[str, str]]:
    """(option, name) of every `builtin:` string in a config."""
    options: dict[str, Source] = {"student.model": config.student.model}
    options |= {f"teachers.{name}.model": t.model for name, t in config.teachers.items()}
    for name, domain in config.domains.items():
        for side in ("train", "validation"):
            for number, source in enumerate(_listed(getattr(domain, side))):
                options[f"domains.{name}.{side}.{number}"] = source
    for option, value in options.items():
        if isinstance(value, str) and value.startswith(BUILTIN):
            yield option, value


def _refuse_unknown(config: Config) -> None:
    for option, name in _builtin_names(config):
        known = [BUILTIN + k for k in (DOMAINS if option.startswith("domains.") else MODELS)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{option} is {name!r}, which is not built in; did you mean {near!r}? "
                f"There are {', '.join(known)}"
            )


def _listed(sources: Source | Sequence[Source] | None) -> list[Source]:
    if sources is None:
        return []
    return [sources] if isinstance(sources, str | HubDataset) else list(sources)


def _model_path(model: str, paths: Mapping[str, str]) -> str:
    return paths.get(model.removeprefix(BUILTIN), model) if model.startswith(BUILTIN) else model


def _resolved(domain: Domain, folder: Path) -> Domain:
    """Built-in training text brings its own validation text where the domain names none."""
    validation = domain.validation
    if validation is None:
        train = _listed(domain.train)
        validation = [s for s in train if isinstance(s, str) and s.startswith(BUILTIN)] or None
    return domain.model_copy(
        update={
            "train": [_source_path(s, folder, "train") for s in _listed(domain.train)],
            "validation": validation
            and [_source_path(s, folder, "validation") for s in _listed(validation)],
        }
    )


def _source_path(source: Source, folder: Path, side: Side) -> Source:
    if isinstance(source, str) and source.startswith(BUILTIN):
        return str(_text_file(folder, source.removeprefix(BUILTIN), side))
    return source
