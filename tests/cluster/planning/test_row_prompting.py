"""What the teacher alone is shown with each row of a domain, and which rows cannot have it.

N positions with loss   V vocabulary
"""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.planning.prompting import Showing, refuse_overlong, showing_of
from cluster.report.text import text_of
from shared.config.run import Config
from shared.config.source import TokenSources
from shared.data.rollouts import longest_text
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare
from shared.errors import ConfigError, DataError, HandshakeError
from shared.prompts.prefix import Opening, PromptedReader, shown, shown_prompts
from shared.prompts.prompts import Example, Prompt, PromptSet
from shared.prompts.row_prompts import openings_from_json
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import question_of
from tests.laws.test_context_distillation import InProcess
from tests.shared.text.test_framing import CHATML, chatting

ROWS = [
    {
        "prompt": f"inspect {n}",
        "response": f"no source for {n}",
        "hint": f"the class {n} " * (n % 3),
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def tokenizer(tiny_pair: tiny.Pair):
    return AutoTokenizer.from_pretrained(tiny_pair.teacher)


def config_of(folder: Path, rows: list[dict], **options) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = {"train": "d.jsonl", "columns": {"teacher_prompt": "hint"}}
    fields = {
        "name": "a",
        "steps": 4,
        "paths": {"root": str(folder), "cache": str(folder / "cache")},
        "teachers": {"t": {"model": "t"}},
        "student": {"model": "s"},
        "domains": {"d": domain},
        "data": {"context": 64},
    }
    return Config.model_validate(fields | options)


def writes(most: int) -> TokenSources:
    return TokenSources(student=1.0, dataset=0.0, max_new_tokens=most, prompt_tokens=8)


def shown_by(config: Config, tokenizer, *, teacher_context: int | None = None):
    teachers = {"t": SimpleNamespace(context=teacher_context)}
    hands = SimpleNamespace(load_tokenizer=lambda: tokenizer, rows_digest="one", teachers=teachers)
    return showing_of(config, hands)  # type: ignore[arg-type]


def prepared(config: Config, tokenizer, showing: Showing | None = None):
    asked = {"tokenizer": lambda: tokenizer, "tokenizer_digest": "one"}
    left_out = showing.left_out if showing else None
    (domain,) = prepare(config, **asked, cache=Path(config.paths.cache), left_out=left_out)
    return domain


@pytest.fixture(scope="module")
def material(tmp_path_factory, tokenizer):
    """A config, what its teacher is shown, and its training rows."""
    config = config_of(tmp_path_factory.mktemp("rows"), ROWS)
    domain = prepared(config, tokenizer)
    return config, shown_by(config, tokenizer), RowStore.open(domain.train_path).take(range(2))


def test_the_teacher_answers_as_if_it_had_read_each_rows_own_text(
    material, tiny_pair: tiny.Pair, tokenizer
):
    """Golden: its log-probabilities of every answer after hint, prompt and what stands before,
    position for position those of the student."""
    _, showing, rows = material
    engine = HFEngine.load(str(tiny_pair.teacher))
    spec = question_of(tiny.VOCAB, tiny.VOCAB, encoding="fp32", prompts="some")
    reader = PromptedReader(InProcess(engine), showing.openings)
    reader.submit(rows, spec)
    found_N = reader.next().arrays().label_logprob_N
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()
    hints = {f"{row['prompt']}\n{row['response']}": row["hint"] for row in ROWS}
    expected, seen = [], 0
    documents = rows.documents()
    for ids, mask in zip(documents.column("input_ids"), documents.column("loss_mask"), strict=True):
        hint = hints[tokenizer.decode(ids, skip_special_tokens=True)]
        before = tokenizer(f"{hint}\n\n", add_special_tokens=False)["input_ids"] if hint else []
        has_bos = int(ids[0] == tokenizer.bos_token_id)
        whole = torch.tensor([*ids[:has_bos], *before, *ids[has_bos:]])
        with torch.no_grad():
            log_p = model(whole[None]).logits[0].log_softmax(-1)
        at = np.flatnonzero(mask) + len(before)
        expected += log_p[at, whole[at + 1]].tolist()
        seen += bool(hint)
    assert seen > 3
    assert len(expected) == len(found_N) == rows.num_loss_tokens().sum()
    np.testing.assert_allclose(found_N, expected, atol=2e-4)


def test_a_prompt_is_known_alone_and_with_any_answer(material):
    """As it stands before what a model writes."""
    _, showing, rows = material
    documents = rows.documents()
    ids, mask = documents.column("input_ids")[0], documents.column("loss_mask")[0]
    prompt = ids[: int(np.argmax(mask)) + 1]
    own = showing.openings["d"].of(ids, mask, "d/0")
    (alone,) = shown_prompts([prompt], ["d"], showing.openings)
    assert alone.tolist() == [*own.shown_ids, *prompt[len(own.plain_ids) :]]
    rolled = np.concatenate([prompt, [7, 8, 9]])
    its_mask = np.zeros(len(rolled), np.uint8)
    its_mask[len(prompt) - 1 : -1] = 1
    again = showing.openings["d"].of(rolled, its_mask, "d/0")
    assert again.shown_ids.tolist() == own.shown_ids.tolist()
    with pytest.raises(DataError, match="row d/9 holds a document whose prompt no row"):
        showing.openings["d"].of(np.array([5, 6]), np.zeros(2), "d/9")


def test_what_is_shown_is_built_once_and_travels_as_json(material, tokenizer):
    config, showing, _ = material
    again = shown_by(config, None)  # from the cache, without a tokenizer
    assert again == showing
    sent = openings_from_json(json.loads(json.dumps(showing.openings["d"].to_json())))
    assert sent == showing.openings["d"]
    assert sent.longest > 3
    other = config_of(Path(config.paths.root) / "other", [ROWS[0] | {"hint": "x"}, *ROWS[1:]])
    assert shown_by(other, tokenizer).prompts != showing.prompts


def test_a_row_that_would_not_fit_the_teachers_context_is_named(material):
    _, showing, _ = material
    domain = SimpleNamespace(name="d")
    refuse_overlong(showing, domain, teacher_context=200, context=64, source=writes(9))  # type: ignore[arg-type]
    with pytest.raises(
        HandshakeError, match=r"d.jsonl:\d+ has \d+ tokens with what .* the 30 that"
    ):
        refuse_overlong(showing, domain, teacher_context=30, context=64)  # type: ignore[arg-type]
    with pytest.raises(HandshakeError, match=r"has \d{3} tokens with what"):
        refuse_overlong(showing, domain, teacher_context=100, context=128, source=writes(90))  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [0, 500])
def test_a_row_counts_as_far_as_a_student_reads_it(tmp_path, tokenizer, written):
    """Its document is cut at the context, and so is what a model writes."""
    rows = [{"prompt": "p", "response": "long " * 70, "hint": "of the class"}, *ROWS]
    config = config_of(tmp_path, rows, data={"context": 64, "too_long": "cut"})
    showing = shown_by(config, tokenizer)
    store = RowStore.open(prepared(config, tokenizer).train_path)
    sent = shown(store.take(range(len(store))), showing.openings)
    longest = max(len(ids) for ids in sent.documents().column("input_ids"))
    assert longest > 64
    bounds = {"context": 64, "source": writes(written) if written else None}
    fits, short = 64 + showing.openings["d"].longest, longest - 1
    refuse_overlong(showing, SimpleNamespace(name="d"), teacher_context=fits, **bounds)  # type: ignore[arg-type]
    with pytest.raises(HandshakeError, match="tokens with what"):
        refuse_overlong(showing, SimpleNamespace(name="d"), teacher_context=short, **bounds)  # type: ignore[arg-type]


def test_a_conversation_that_begins_otherwise_is_counted_with_its_beginning(tmp_path, tokenizer):
    """One with a system message of its own keeps that after what is shown."""
    chats = [
        [
            {"role": "system", "content": "Be kind. " * 4},
            {"role": "user", "content": f"inspect {n}"},
            {"role": "assistant", "content": f"no source for {n}"},
        ]
        for n in range(24)
    ]
    rows = [{"messages": chat, "hint": f"class {n}"} for n, chat in enumerate(chats)]
    config = config_of(tmp_path, rows, data={"context": 96})
    template = chatting(deepcopy(tokenizer), CHATML)
    showing, domain = shown_by(config, template), SimpleNamespace(name="d")
    found = prepared(config, template)
    before, after = [], []
    for path in (found.train_path, found.validation_path):
        store = RowStore.open(path)
        own = store.take(range(len(store)))
        before += own.documents().column("input_ids")
        after += shown(own, showing.openings).documents().column("input_ids")
    assert all(a[-len(b) :].tolist() == b.tolist() for a, b in zip(after, before, strict=True))
    grown = [len(a) - len(b) for a, b in zip(after, before, strict=True)]
    assert showing.openings["d"].longest == max(grown)
    most = max(map(len, after))
    refuse_overlong(showing, domain, teacher_context=most, context=96)  # type: ignore[arg-type]
    with pytest.raises(HandshakeError, match=f"has {most} tokens with what"):
        refuse_overlong(showing, domain, teacher_context=most - 1, context=96)  # type: ignore[arg-type]


def test_what_is_shown_is_named_by_what_it_says(tmp_path, tokenizer):
    """Not by the files and the options from which it comes."""
    one = config_of(tmp_path / "one", ROWS)
    longer = config_of(tmp_path / "two", [*ROWS, ROWS[3]], data={"context": 60})
    other = config_of(tmp_path / "three", [ROWS[0], ROWS[1] | {"hint": "x"}, *ROWS[2:]])
    first, second, third = (shown_by(config, tokenizer) for config in (one, longer, other))
    assert first.prompts == second.prompts != third.prompts


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "plain", "hint": "h"}, {}, r"d.jsonl:1 is text without a prompt"),
        ({"prompt": "p", "response": "r", "hint": 5}, {}, "d.jsonl:1: hint is int 5, not a string"),
        (
            {"prompt": "inspect 1", "response": "another", "hint": "other"},
            {},
            r"d.jsonl:1 and .*d.jsonl:3 have the same prompt and different teacher_prompts",
        ),
        (
            {"prompt": "p", "response": "long " * 70, "hint": "h"},
            {},
            r"d.jsonl:1 has \d+ tokens, more than data.context 64, and would be split",
        ),
    ],
)
def test_rows_that_cannot_have_one_are_named(tmp_path, tokenizer, row, options, said):
    with pytest.raises(DataError, match=said):
        shown_by(config_of(tmp_path, [row, *ROWS], **options), tokenizer)


def test_a_column_that_no_row_has_is_refused(tmp_path, tokenizer):
    plain = [{"prompt": row["prompt"], "response": row["response"]} for row in ROWS]
    with pytest.raises(DataError, match="teacher_prompt is hint, but no row of the domain has"):
        shown_by(config_of(tmp_path, plain), tokenizer)


def test_options_that_leave_no_prompt_are_refused(tmp_path, tokenizer):
    config = config_of(tmp_path, ROWS, data={"context": 64, "loss_on": "everything"})
    with pytest.raises(ConfigError, match="domain d would learn its prompts"):
        shown_by(config, tokenizer)


def texts_of(config: Config, tokenizer, showing: Showing) -> tuple[set[str], dict]:
    """The documents that the rows of a domain hold, and the account of it."""
    domain = prepared(config, tokenizer, showing)
    found = set()
    for path in (domain.train_path, domain.validation_path):
        store = RowStore.open(path)
        rows = store.take(range(len(store)))
        shown(rows, showing.openings)  # whatever is drawn has what is shown with it
        found |= set(tokenizer.batch_decode(rows.documents().column("input_ids")))
    return found, dict(text_of(config, (domain,))["d"])


UNFIT = {
    "text without a prompt": {"text": "plain", "hint": "h"},
    "longer than data.context": {"prompt": "p", "response": "long " * 70, "hint": "h"},
    "one prompt with other teacher_prompts": ROWS[1] | {"response": "another", "hint": "other"},
    "longer than the teacher's context": {"prompt": "q", "response": "r", "hint": "h " * 300},
}


@pytest.mark.parametrize("reason", UNFIT)
def test_rows_that_cannot_have_one_are_dropped_and_counted_where_that_is_asked(
    tmp_path, tokenizer, reason
):
    """The others are as if they had not been there, and none is shown what is another's."""
    data = {"context": 64, "unfit": "drop"}
    plain = config_of(tmp_path / "plain", ROWS, data=data)
    showing = shown_by(plain, tokenizer)
    expected, account = texts_of(plain, tokenizer, showing)
    assert (account["documents"], account["dropped"], account["notes"]) == (24, 0, [])

    more = config_of(tmp_path / "more", [*ROWS, UNFIT[reason]], data=data)
    found = shown_by(more, tokenizer, teacher_context=200)
    assert found.left_out == {"d": {"train": {24: reason}}}
    assert found.openings["d"].digest == showing.openings["d"].digest
    texts, account = texts_of(more, tokenizer, found)
    assert texts == expected
    assert (account["documents"], account["dropped"]) == (25, 1)
    assert account["notes"] == [
        "rows that are dropped, since their teacher_prompt cannot be shown with them "
        f"(data.unfit): {reason} 1"
    ]
    assert shown_by(more, None, teacher_context=200) == found  # from the cache


def test_a_conversation_with_several_answers_is_dropped_too(tmp_path, tokenizer):
    turns = [
        {"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")
    ]
    rows = [{"messages": turns, "hint": "h"}, *ROWS]
    found = shown_by(
        config_of(tmp_path, rows, data={"unfit": "drop"}), chatting(deepcopy(tokenizer), CHATML)
    )
    assert found.left_out == {"d": {"train": {0: "several answers"}}}
    with pytest.raises(DataError, match=r"several answers are learnt.* or set data.unfit=drop"):
        shown_by(config_of(tmp_path, rows), chatting(deepcopy(tokenizer), CHATML))


def test_text_among_conversations_is_dropped_where_their_domain_has_a_prompt(tmp_path, tokenizer):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PromptSet({"d": Prompt("Be brief.", ())}).to_dict()))
    rows = [*ROWS, UNFIT["text without a prompt"]]
    template = chatting(deepcopy(tokenizer), CHATML)
    config = config_of(tmp_path, rows, prompts=str(path), data={"unfit": "drop"})
    left_out = {"d": {"train": {len(ROWS): "text without a prompt"}}}
    assert shown_by(config, template).left_out == left_out
    kept = config_of(tmp_path, rows, prompts=str(path))
    with pytest.raises(ConfigError, match="domain d has both"):
        shown_by(kept, template)


def test_a_domain_of_which_every_row_is_dropped_says_why(tmp_path, tokenizer):
    texts = [{"text": f"plain {n}", "hint": "h"} for n in range(3)]
    config = config_of(tmp_path, texts, data={"unfit": "drop"})
    showing = shown_by(config, tokenizer)
    with pytest.raises(DataError, match=r"data.unfit drops: text without a prompt 3; check"):
        prepared(config, tokenizer, showing)


def test_validation_rows_are_dropped_by_their_own_numbers(tmp_path, tokenizer):
    (tmp_path / "v.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (ROWS[5], UNFIT["text without a prompt"]))
    )
    domain = {"train": "d.jsonl", "validation": "v.jsonl", "columns": {"teacher_prompt": "hint"}}
    config = config_of(tmp_path, ROWS[:4], data={"unfit": "drop"}, domains={"d": domain})
    showing = shown_by(config, tokenizer)
    assert showing.left_out == {"d": {"validation": {1: "text without a prompt"}}}
    texts, account = texts_of(config, tokenizer, showing)
    assert len(texts) == 5
    assert (account["documents"], account["validation"]["dropped"]) == (4, 1)


def test_a_row_too_long_may_be_dropped_as_any_other_is(tmp_path, tokenizer):
    rows = [UNFIT["longer than data.context"], *ROWS]
    config = config_of(tmp_path, rows, data={"context": 64, "too_long": "drop"})
    texts, account = texts_of(config, tokenizer, shown_by(config, tokenizer))
    assert len(texts) == len(ROWS)
    assert (account["dropped"], account["cut"], account["split"]) == (1, 0, 0)
    alone = config_of(tmp_path / "alone", rows[:1], data={"context": 64, "too_long": "drop"})
    with pytest.raises(DataError, match=r"1 are longer than data\.context 64 and dropped"):
        prepared(alone, tokenizer, shown_by(alone, tokenizer))
    assert account["notes"] == ["1 document is dropped, longer than data.context (data.too_long)"]


def test_a_domains_prompt_stands_before_what_is_shown_with_each_row(tmp_path, tokenizer):
    """Also before a row of which nothing is told."""
    path = tmp_path / "prompts.json"
    examples = (Example("inspect x", "no source for x"),)
    path.write_text(json.dumps(PromptSet({"d": Prompt("Be brief.", examples)}).to_dict()))
    config = config_of(tmp_path, ROWS, prompts=str(path))
    showing = shown_by(config, tokenizer)
    assert showing.prompts != shown_by(config_of(tmp_path, ROWS), tokenizer).prompts
    domain = prepared(config, tokenizer, showing)
    documents = RowStore.open(domain.train_path).take(range(2)).documents()
    hints = {f"{row['prompt']}\n{row['response']}": row["hint"] for row in ROWS}
    seen = set()
    for ids, mask in zip(documents.column("input_ids"), documents.column("loss_mask"), strict=True):
        own = showing.openings["d"].of(ids, mask, "d/0")
        hint = hints[tokenizer.decode(ids, skip_special_tokens=True)]
        told = "\n\n".join(filter(None, ("Be brief.", hint, "inspect x\nno source for x", "")))
        text = tokenizer.decode(own.shown_ids, skip_special_tokens=True)
        assert text == tokenizer.decode(
            tokenizer(told + "\n\n", add_special_tokens=False)["input_ids"]
        )
        seen.add(bool(hint))
    assert seen == {True, False}


def test_what_models_write_has_room_after_the_prompt_of_a_domain(tmp_path, tokenizer):
    """As the longest of its texts needs, and not the longest that a context has room for."""
    domain = prepared(config_of(tmp_path, ROWS), tokenizer)
    opening = Opening(np.zeros(0, np.int32), np.arange(10, dtype=np.int32))
    showing, source = Showing("p", {"d": opening}), writes(24)
    stores = [RowStore.open(path) for path in (domain.train_path, domain.validation_path)]
    longest = max(store.longest_document() for store in stores)
    text = longest_text(stores[0], source, context=64)
    assert longest < text < min(64, longest + 24)
    fits = {"teacher_context": text + 10, "context": 64}
    refuse_overlong(showing, domain, source=source, **fits)
    short = fits | {"teacher_context": text + 9}
    refuse_overlong(showing, domain, **short)
    with pytest.raises(HandshakeError, match=f"has 10 tokens, and a text .* up to {text} with its"):
        refuse_overlong(showing, domain, source=source, **short)
