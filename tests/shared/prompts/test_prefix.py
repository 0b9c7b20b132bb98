"""What the teacher is shown: the student's loss positions, after a prompt, with nothing between."""

from collections.abc import Iterator

import numpy as np
import pytest

from shared.data.layout import lay_out
from shared.data.rows import Rows
from shared.errors import DataError
from shared.prompts.prefix import Opening, opening, shown
from shared.prompts.prompts import Example, Prompt
from shared.text.documents import Document, Kind, Message
from shared.text.framing import encode
from tests.shared.text.test_framing import CHATML, GEMMA, LLAMA_2, ZEPHYR, chatting

PROMPT = Prompt("Answer briefly.", (Example("2+2", "4"), Example("3+3", "6")))
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
TEMPLATES = {
    "bare": None,
    "chatml": CHATML,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "default system": WITH_DEFAULT_SYSTEM,
}
CASES = [
    (name, kind)
    for name in TEMPLATES
    for kind in ("text", "pair", "messages")
    if name != "bare" or kind != "messages"  # a conversation needs a template
]
CHAT = (
    Message("user", "Name a prime."),
    Message("assistant", "Seven."),
    Message("user", "Another?"),
    Message("assistant", "Eleven."),
)


def templated(tokenizer, name: str):
    template = TEMPLATES[name]
    return tokenizer if template is None else chatting(tokenizer, template)


def ids_of(tokenizer, document: Document) -> np.ndarray:
    (one,) = encode(iter([document]), tokenizer=tokenizer, loss_on="responses")
    return one.input_ids


def random_rows(seed: int, *, plain: np.ndarray, domains: tuple[str, ...] = ("a", "b")) -> Rows:
    """Rows of documents that begin with the plain ids, or not, with loss on what follows them."""
    draw = np.random.default_rng(seed)
    ids, starts, masks = [], [], []
    for _ in range(8):
        documents = list(_documents(draw, plain))
        ids.append(np.concatenate([tokens for tokens, _ in documents]))
        masks.append(np.concatenate([mask for _, mask in documents]))
        starts.append(np.cumsum([0, *(len(tokens) for tokens, _ in documents[:-1])]))
    return Rows.build(
        domains=[domains[i] for i in draw.integers(0, len(domains), 8)],
        indices=range(8),
        input_ids=ids,
        doc_starts=starts,
        loss_masks=masks,
    )


def _documents(
    draw: np.random.Generator, plain: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for _ in range(draw.integers(1, 6)):
        begins = draw.random() < 0.7
        tokens = draw.integers(10, 500, draw.integers(1, 40))
        ids = np.concatenate([plain, tokens]) if begins else tokens
        mask = draw.integers(0, 2, len(ids))
        if begins:
            mask[: max(0, len(plain) - 1)] = 0
        mask[-1] = 0
        yield ids, mask


def documents_of(rows: Rows) -> list[tuple[str, list[int], list[int]]]:
    """(domain, ids, mask) of every document in order."""
    found = []
    columns = [rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask")]
    for domain, ids, starts, mask in zip(rows.domains(), *columns, strict=True):
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            found.append((domain, ids[start:stop].tolist(), mask[start:stop].tolist()))
    return found


def opened(plain: list[int], shown_ids: list[int]) -> Opening:
    return Opening(np.array(plain, np.int32), np.array(shown_ids, np.int32))


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "text"])
def test_a_shown_document_is_the_one_that_is_written_with_the_prompt(
    tokenizer, name: str, kind: Kind
) -> None:
    templated(tokenizer, name)
    document = Document("pair", "a:1", prompt=" Name one", response="Seven.")
    if kind == "messages":
        document = Document("messages", "a:1", messages=CHAT)
    found, ids = opening(PROMPT, tokenizer, kind), ids_of(tokenizer, document)
    size = len(found.plain_ids)
    np.testing.assert_array_equal(ids[:size], found.plain_ids)
    got = [*found.shown_ids, *ids[size:]]
    if name == "bare":
        prompt = tokenizer(PROMPT.text(), add_special_tokens=False)["input_ids"]
        assert got == [1, *prompt, *ids[1:]]
        return
    turns = (
        document.messages
        if kind == "messages"
        else (
            Message("user", document.prompt),
            Message("assistant", document.response),
        )
    )
    examples = [
        Message(role, text)
        for e in PROMPT.examples
        for role, text in (("user", e.prompt), ("assistant", e.response))
    ]
    whole = (Message("system", PROMPT.instruction), *examples, *turns)
    assert got == ids_of(tokenizer, Document("messages", "a:1", messages=whole)).tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_text_is_shown_after_the_prompts_text_whatever_the_template(
    tokenizer, name: str
) -> None:
    found = opening(PROMPT, templated(tokenizer, name), "text")
    assert found.plain_ids.tolist() == [1]
    assert tokenizer.decode(found.shown_ids) == "<|bos|>" + PROMPT.text()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_empty_prompt_changes_nothing(tokenizer, name: str, kind: Kind) -> None:
    found = opening(Prompt(), templated(tokenizer, name), kind)
    np.testing.assert_array_equal(found.plain_ids, found.shown_ids)
    rows = random_rows(0, plain=np.array([1]))
    sent = shown(rows, {"a": found, "b": found})
    if len(found.plain_ids) == 0:
        assert sent.hashes() == rows.hashes()
    assert (
        lay_out(sent, packed=False).label_N.tolist() == lay_out(rows, packed=False).label_N.tolist()
    )


def test_a_template_that_refuses_or_rewrites_is_refused(tokenizer) -> None:
    with pytest.raises(DataError, match=r"a prompt, its .*refuses the conversation \(roles must"):
        opening(PROMPT, chatting(tokenizer, LLAMA_2), "pair")
    rewriting = CHATML.replace("m.content", "m.content + ('!' if messages|length > 2 else '')")
    with pytest.raises(DataError, match="writes the user's words differently after a prompt"):
        opening(PROMPT, chatting(tokenizer, rewriting), "pair")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "instead", [opened([1], [1, 20, 21, 22]), opened([], [5, 6]), opened([3, 4], [7])]
)
def test_loss_positions_keep_number_label_and_order(seed: int, instead: Opening) -> None:
    rows = random_rows(seed, plain=instead.plain_ids)
    for openings in ({"a": instead, "b": instead}, {"b": instead}):
        sent = shown(rows, openings)
        for packed in (True, False):
            before, after = (lay_out(unit, packed=packed).label_N for unit in (rows, sent))
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("seed", range(4))
def test_each_document_gets_the_opening_of_its_domain_and_keeps_the_rest(seed: int) -> None:
    rows = random_rows(seed, plain=np.array([1]))
    openings = {"a": opened([1], [1, 600, 601])}
    pairs = zip(documents_of(rows), documents_of(shown(rows, openings)), strict=True)
    for (domain, ids, mask), sent in pairs:
        size = int(ids[:1] == [1])
        expected = (
            domain,
            [1, 600, 601, *ids[size:]],
            [0, 0, *(mask[:1] if size else [0]), *mask[size:]],
        )
        assert sent == (expected if domain == "a" else (domain, ids, mask))


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_no_longer_than_with_one_opening_and_keep_their_names(seed: int) -> None:
    rows = random_rows(seed, plain=np.array([1]))
    instead = opened([1], list(range(1, 30)))
    sent = shown(rows, {"a": instead})
    longest = max(len(ids) for ids in rows.column("input_ids"))
    assert max(len(ids) for ids in sent.column("input_ids")) <= longest + 29
    assert list(dict.fromkeys(sent.names())) == rows.names()
    untouched = [rows.hashes()[i] for i, domain in enumerate(rows.domains()) if domain == "b"]
    assert [h for h, d in zip(sent.hashes(), sent.domains(), strict=True) if d == "b"] == untouched


def test_what_is_sent_for_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rows = random_rows(5, plain=np.array([1]))
    openings = {"a": opened([1], [1, 20, 21]), "b": opened([1], [1, 30])}
    together = shown(rows, openings).hashes()
    alone = [
        h for i in range(len(rows)) for h in shown(rows.part(slice(i, i + 1)), openings).hashes()
    ]
    assert together == alone


def test_an_empty_unit_stays_empty() -> None:
    rows = random_rows(0, plain=np.array([1])).part(slice(0, 0))
    assert len(shown(rows, {"a": opened([1], [1, 2])})) == 0


def test_an_opening_that_is_learnt_is_refused() -> None:
    rows = Rows.build(
        domains=["a"],
        indices=[3],
        input_ids=[np.array([1, 2, 3, 4])],
        doc_starts=[np.array([0])],
        loss_masks=[np.array([1, 1, 1, 0])],
    )
    with pytest.raises(DataError, match=r"row a/3 learns tokens of the chat template .*=responses"):
        shown(rows, {"a": opened([1, 2], [1, 9, 2])})


def test_the_students_ids_stay_with_their_positions() -> None:
    """Rows become several, and none of their positions is another's."""
    rows = random_rows(0, plain=np.array([1]))
    label_N = lay_out(rows, packed=True).label_N
    named = rows.with_student_ids(np.stack([label_N, np.arange(len(label_N))], axis=1))
    sent = shown(named, {"a": opened([1], [1, 20, 21, 22])})
    assert len(sent) > len(rows)
    ids_NM = sent.student_ids()
    assert ids_NM is not None
    np.testing.assert_array_equal(ids_NM[:, 0], lay_out(sent, packed=True).label_N)
    assert sent.hashes() != shown(rows, {"a": opened([1], [1, 20, 21, 22])}).hashes()
