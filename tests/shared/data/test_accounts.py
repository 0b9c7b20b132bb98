"""What became of a domain's text is counted, and options change it as they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cluster.report.text import COLUMNS, text_lines, text_of
from shared.config.domains import Data, Domain
from shared.config.run import Config
from shared.data.row_cache import facts_of
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare
from shared.errors import DataError
from shared.text.tokenizers import identify, rows_digest, same_templates, with_template
from tests.shared.text.test_framing import CHATML, chatting
from tests.shared.text.test_sources import write

THOUGHT = "(m.reasoning_content or '') + m.content"


@pytest.fixture
def tokenizer(tokenizer):
    return chatting(tokenizer, CHATML)


def chat(number: int, *roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{role} {number}"} for role in roles]}


def configured(root: Path, **data) -> Config:
    domain = {"train": "train", "validation": "valid.jsonl"}
    return Config.model_validate(
        {
            "name": "x",
            "steps": 1,
            "paths": {"root": str(root)},
            "teachers": {"t": {"model": "t"}},
            "student": {"model": "s"},
            "domains": {"chat": domain},
            "data": {"context": 64} | data,
        }
    )


def accounted(root: Path, tokenizer, rows: list[dict], **data):
    """The account of one domain, and its training rows."""
    write(root / "train" / "a.jsonl", *rows)
    write(root / "valid.jsonl", {"text": "held out"})
    return prepared(configured(root, **data), tokenizer)


def prepared(config: Config, tokenizer):
    """The account of a config's domains, and the training rows of the first."""
    digest, root = rows_digest(tokenizer, identify(tokenizer)), Path(config.paths.root)
    domains = prepare(
        config, tokenizer=lambda: tokenizer, tokenizer_digest=digest, cache=root / "cache"
    )
    return text_of(config, domains), RowStore.open(domains[0].train_path), domains


def test_a_line_per_domain_counts_what_became_of_its_documents(tmp_path: Path, tokenizer) -> None:
    half = [chat(n, "user", "assistant" if n % 2 else "narrator") for n in range(40)]
    rows = [*half, half[1], {"text": "long " * 100, "id": 7}, {"text": "of <|eos|> here"}]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "README.md").write_text("about")
    (tmp_path / "train" / "load.py").write_text("import datasets")
    found, store, _ = accounted(tmp_path, tokenizer, rows)
    text = found["chat"]
    assert (text["documents"], text["dropped"], text["duplicate"]) == (44, 20, 1)
    assert (text["cut"], text["split"]) == (0, 1)
    assert (text["rows"], text["with_loss"]) == (len(store), store.num_loss_tokens)
    assert text["tokens"] == sum(map(len, store.take(range(len(store))).column("input_ids")))
    assert text["notes"] == [
        "kinds of rows: messages 41, text 3",
        "roles of the dropped documents: user 20, narrator 20",
        "1 special token written in the text is plain text (data.special_tokens)",
        "fields that are not read: id 1",
        "files that are not read: README.md",
        "files that are one text each, beside rows: load.py",
    ]
    header, line, held_out, *notes = text_lines(found)
    assert header.split("  ")[0] == "domain"
    for name, told, counts in (("chat", line, text), ("validation", held_out, text["validation"])):
        assert told.split() == [name, *(f"{counts[column]:,}" for column in COLUMNS)]
        assert len(told) == len(header) <= 100
    assert notes[1] == "chat: roles of the dropped documents: user 20, narrator 20"


def test_markup_beside_prose_is_named_with_the_way_out(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a.txt", "b.txt", "settings.yaml", "Page.HTML"):
        (tmp_path / "train" / name).write_text(f"words of {name} that go on for a while " * 30)
    write(tmp_path / "valid.jsonl", {"text": "held out"})
    said = "files that are learnt as one text each, beside prose (a glob as *.txt leaves them out)"
    for source, told in (("train", [f"{said}: Page.HTML, settings.yaml"]), ("train/*.txt", [])):
        domain = Domain(train=source, validation="valid.jsonl")
        config = configured(tmp_path).model_copy(update={"domains": {"chat": domain}})
        text, _, _ = prepared(config, tokenizer)
        assert [n for n in text["chat"]["notes"] if n.startswith("files")] == told


def test_validation_text_of_its_own_is_accounted_for_too(tmp_path: Path, tokenizer) -> None:
    held = [chat(n, "user", "assistant" if n % 2 else "critic") | {"id": n} for n in range(60)]
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "LICENSE").write_text("about")
    write(tmp_path / "held" / "b.jsonl", *held, held[1], {"text": "long " * 100})
    config = configured(tmp_path, validation_rows=3)
    config.domains["chat"] = Domain(train="train", validation="held")
    write(tmp_path / "train" / "a.jsonl", *(chat(n, "user", "assistant") for n in range(70, 99)))
    found, _, (domain,) = prepared(config, tokenizer)
    text = found["chat"]["validation"]
    store = RowStore.open(domain.validation_path)
    assert (text["documents"], text["dropped"], text["duplicate"], text["split"]) == (62, 30, 1, 1)
    assert (text["rows"], text["with_loss"]) == (3, store.num_loss_tokens)
    assert text["tokens"] == sum(map(len, store.take(range(3)).column("input_ids")))
    kinds, roles, unread, files, used = text["notes"]
    assert kinds == "kinds of rows: messages 61, text 1"
    assert roles == "roles of the dropped documents: user 30, critic 30"
    assert unread == "fields that are not read: id 61"
    assert files == "files that are not read: LICENSE"
    assert re.fullmatch(r"3 of \d+ rows are used \(data.validation_rows\)", used)
    assert not found["chat"]["notes"]
    assert "chat, validation: fields that are not read: id 61" in text_lines(found)


def test_what_is_held_out_of_the_training_text_has_its_line(tmp_path: Path, tokenizer) -> None:
    config = configured(tmp_path)
    config.domains["chat"] = Domain(train="train")
    rows = [chat(n, "user", "assistant") for n in range(200)]
    write(tmp_path / "train" / "a.jsonl", *rows, *rows[:40])
    found, _, (domain,) = prepared(config, tokenizer)
    text = found["chat"]["validation"]
    assert (found["chat"]["held_out"], text["notes"]) == (True, [])
    assert text_lines(found)[2].split()[:3] == ["held", "out", "10"]
    documents = pieces(RowStore.open(domain.validation_path))
    assert text["documents"] == len(documents) == 10
    assert found["chat"]["documents"] == 240
    write(tmp_path / "train" / "a.jsonl", {"text": " ".join(str(n) for n in range(2000))})
    book, _, _ = prepared(config, tokenizer)
    assert (book["chat"]["validation"]["documents"], book["chat"]["validation"]["split"]) == (1, 1)


def test_validation_text_without_an_answer_names_its_roles(tmp_path: Path, tokenizer) -> None:
    config = configured(tmp_path)
    write(tmp_path / "train" / "a.jsonl", *(chat(n, "user", "assistant") for n in range(9)))
    write(tmp_path / "valid.jsonl", chat(1, "user", "critic"))
    with pytest.raises(DataError, match=r"validation text of .* 1 documents, .*user 1, critic 1;"):
        prepared(config, tokenizer)


def test_usual_role_names_leave_nothing_to_drop(tmp_path: Path, tokenizer) -> None:
    rows = [chat(n, "human", ("model", "gpt", "bot")[n % 3]) for n in range(30)]
    found, _, _ = accounted(tmp_path, tokenizer, rows)
    assert found["chat"]["dropped"] == 0
    assert not found["chat"]["notes"]


def test_names_of_fields_are_told_on_a_line_of_bounded_length(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": f"t {n}", "": n, "a\nb": n, "k" * 99: n} for n in range(3)]
    found, _, _ = accounted(tmp_path, tokenizer, rows)
    told = f"'' 3, a b 3, {'k' * 38}.. 3"
    assert found["chat"]["notes"] == [f"fields that are not read: {told}"]


def test_files_of_other_splits_and_empty_ones_are_named(tmp_path: Path, tokenizer) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl", "x.valid.jsonl", "contest.jsonl"):
        write(tmp_path / "train" / name, {"text": name})
    (tmp_path / "train" / "b.jsonl").touch()
    found, _, _ = accounted(tmp_path, tokenizer, [{"text": "a"}])
    assert found["chat"]["notes"] == [
        "files that are empty: b.jsonl",
        "files that are trained on, whatever their names say: test-0.jsonl, x.valid.jsonl",
    ]
    (tmp_path / "train" / "train-0.jsonl").unlink()
    found, _, _ = accounted(tmp_path, tokenizer, [{"text": "a"}])
    assert found["chat"]["notes"] == ["files that are empty: b.jsonl"]


def test_answers_without_a_word_are_counted(tmp_path: Path, tokenizer) -> None:
    full = [chat(n, "user", "assistant") for n in range(9)]
    empty = {"messages": [*full[0]["messages"], *full[1]["messages"]]}
    empty["messages"][1] = {"role": "assistant", "content": " "}
    found, _, _ = accounted(tmp_path, tokenizer, [*full, empty, {"prompt": "p", "response": ""}])
    assert found["chat"]["notes"] == [
        "kinds of rows: messages 10, pair 1",
        "2 answers are empty: they teach to end where an answer begins",
    ]
    tokenizer.chat_template = None
    rows = [{"prompt": "p", "response": ""}, {"prompt": "p", "response": "r"}]
    found, _, _ = accounted(tmp_path, tokenizer, rows)
    assert found["chat"]["notes"] == ["1 answer is empty: it teaches to end where an answer begins"]


def test_an_empty_domain_names_the_roles_it_saw(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match=r"2 documents, .*\(roles: user 2, narrator 1; the"):
        accounted(tmp_path, tokenizer, [chat(1, "user"), chat(2, "user", "narrator")])


def test_an_empty_domain_of_prompts_beyond_the_context_names_the_cut(
    tmp_path: Path, tokenizer
) -> None:
    rows = [{"prompt": "word " * 200, "response": "yes"}] * 30
    said = r"30 documents, of 30 .* beyond data.context 64 .data.too_long=cut.; raise .*long=split;"
    with pytest.raises(DataError, match=said):
        accounted(tmp_path, tokenizer, rows, too_long="cut")


@pytest.mark.parametrize(
    "said",
    [
        *({"weight": 0}, {"train": False}, {"loss_weight": "0"}, {"no_loss": True}),
        *({"loss": False}, {"loss": "False"}, {"skip": True}, {"exclude": "true"}),
        *({"ignore": True}, {"is_trainable": 0, "weight": 1}),
    ],
)
@pytest.mark.parametrize("loss_on", ["responses", "everything"])
def test_a_row_that_says_it_is_not_learnt_is_not(
    tmp_path: Path, tokenizer, said: dict, loss_on: str
) -> None:
    learnt = [*(chat(n, "user", "assistant") for n in range(9)), {"text": "t", "weight": 1.0}]
    rows = [chat(40, "user", "assistant"), {"text": "u"}, {"prompt": "p", "response": "r"}]
    _, plain, _ = accounted(tmp_path, tokenizer, learnt, loss_on=loss_on)
    rows = [*learnt, *(row | said for row in rows)]
    found, store, _ = accounted(tmp_path, tokenizer, rows, loss_on=loss_on)
    assert pieces(store) == pieces(plain)
    assert found["chat"]["dropped"] == 3
    assert found["chat"]["notes"][1:] == [
        "3 documents are not learnt, as they say themselves (weight: 0, train: false or the like)"
    ]
    with pytest.raises(DataError, match=r"3 documents, none with .* .3 say so themselves"):
        accounted(tmp_path, tokenizer, rows[-3:], loss_on=loss_on)


def test_a_conversation_whose_answers_say_that_they_are_not_learnt_is_counted_so(
    tmp_path: Path, tokenizer
) -> None:
    silent = chat(1, "user", "assistant")
    silent["messages"][1]["weight"] = 0
    found, _, _ = accounted(tmp_path, tokenizer, [silent, chat(2, "user", "assistant")])
    assert (found["chat"]["dropped"], len(found["chat"]["notes"])) == (1, 1)
    assert found["chat"]["notes"][0].startswith("1 document is not learnt, as it says itself")


def test_answers_that_say_that_they_go_on_are_counted(tmp_path: Path, tokenizer) -> None:
    rows = [chat(n, "user", "assistant") for n in range(9)]
    for row in rows[:2]:
        row["messages"][1]["prefix"] = True
    found, _, _ = accounted(tmp_path, tokenizer, rows)
    said = "2 answers go on, as they say themselves, and their ends are not learnt"
    assert found["chat"]["notes"] == [f"{said} (prefix: true or the like)"]


def test_an_answer_whose_thought_alone_says_something_is_empty_where_it_is_not_written(
    tmp_path: Path, tokenizer
) -> None:
    row = chat(1, "user", "assistant")
    row["messages"][1] |= {"content": "", "reasoning_content": "hm"}
    for template, empty in ((CHATML, 1), (CHATML.replace("m.content", THOUGHT), 0)):
        tokenizer.chat_template = template
        found, _, _ = accounted(tmp_path, tokenizer, [row])
        assert sum("is empty: it teaches" in note for note in found["chat"]["notes"]) == empty


def test_what_a_row_says_unclearly_of_its_loss_is_counted(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": f"t {n}", "weight": 0.5, "loss": 0, "loss_mask": [0, 1]} for n in range(5)]
    rows = [row | {"skip": 1, "exclude": 0} for row in rows]
    found, _, _ = accounted(tmp_path, tokenizer, rows)
    assert found["chat"]["dropped"] == 0
    told = "weight 5, loss 5, loss_mask 5, skip 5, exclude 5"
    assert found["chat"]["notes"] == [f"fields that are not read: {told}"]


def test_roles_that_are_not_known_are_named_beside_assistants(tmp_path: Path, tokenizer) -> None:
    rows = [chat(n, "user", "expert", "tool", "assistant") for n in range(9)]
    rows.append(chat(9, "user", "expert"))
    found, _, _ = accounted(tmp_path, tokenizer, rows)
    assert found["chat"]["notes"] == [
        "roles of the dropped documents: user 1, expert 1",
        "roles that are not known, whose messages are not learnt: expert 9",
    ]
    found, _, _ = accounted(tmp_path, tokenizer, rows, loss_on="everything")
    assert found["chat"]["notes"] == []


def test_an_answer_beyond_the_context_is_said_to_be_dropped(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": "word " * 200, "response": "yes"}, {"text": "short"}]
    found, _, _ = accounted(tmp_path, tokenizer, rows, too_long="cut")
    assert found["chat"]["dropped"] == 1
    said = "1 document is dropped, since what is learnt of it begins beyond data.context"
    assert said in found["chat"]["notes"]
    rows[0]["response"] = "yes " * 200
    found, _, _ = accounted(tmp_path, tokenizer, rows, too_long="split_with_prompt")
    said = "a later piece; it leaves less than a quarter of data.context"
    assert any(note.endswith(said) for note in found["chat"]["notes"])


def test_a_cut_is_said_to_lose_the_end(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": "long " * 100}, {"text": "short"}]
    found, _, _ = accounted(tmp_path, tokenizer, rows, too_long="cut")
    assert (found["chat"]["cut"], found["chat"]["split"]) == (1, 0)
    assert "1 document loses its end, cut off and not learnt" in found["chat"]["notes"][0]


def pieces(store: RowStore) -> list[tuple[list[int], list[int]]]:
    """Ids and learnt ids of every document in the rows."""
    rows = store.take(range(len(store)))
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    return [
        (part.tolist(), part[1:][mask[:-1] == 1].tolist())
        for ids, starts, masks in zip(*columns, strict=True)
        for part, mask in zip(np.split(ids, starts[1:]), np.split(masks, starts[1:]), strict=True)
    ]


@pytest.mark.parametrize("length", range(60, 190, 13))
def test_a_prompt_stands_with_every_piece_and_every_token_is_learnt_once(
    tmp_path: Path, tokenizer, length: int
) -> None:
    row = {"prompt": "Count.", "response": " ".join(str(n) for n in range(length // 3))}
    _, plain, _ = accounted(tmp_path, tokenizer, [row], context=512)
    ((whole, learnt),) = pieces(plain)
    opening = whole[: whole.index(learnt[0])]
    options = {"context": 48, "too_long": "split_with_prompt"}
    found, store, _ = accounted(tmp_path, tokenizer, [row], **options)
    parts = pieces(store)
    assert len(parts) > 1
    assert [token for _, tokens in parts for token in tokens] == learnt
    assert all(ids[: len(opening)] == opening and len(ids) <= 48 for ids, _ in parts)
    assert not found["chat"]["notes"]
    found, _, _ = accounted(tmp_path, tokenizer, [row], context=48)
    assert "1 document goes on without its prompt" in found["chat"]["notes"][0]


@pytest.mark.parametrize("count", range(8, 40))
def test_the_end_of_a_split_text_is_always_learnt(tmp_path: Path, tokenizer, count: int) -> None:
    _, store, _ = accounted(tmp_path, tokenizer, [{"text": " a" * count}], context=16)
    assert any(2 in learnt for _, learnt in pieces(store))


def test_bos_stands_before_every_piece_of_a_text_where_the_prompt_would(
    tmp_path: Path, tokenizer
) -> None:
    rows = [{"text": " ".join(str(n) for n in range(90))}]
    _, store, _ = accounted(tmp_path, tokenizer, rows, too_long="split_with_prompt")
    assert all(ids[0] == 1 for ids, _ in pieces(store))


def test_options_decide_what_special_tokens_and_templates_become(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": "a <|eos|> b"}, chat(1, "user", "assistant")]
    names = []
    for options in ({}, {"special_tokens": "control"}, {"chat_template": "plain"}):
        _, _, (domain,) = accounted(tmp_path, tokenizer, rows, **options)
        names.append(domain.train_path)
        control = options.get("special_tokens") == "control"
        assert facts_of(domain.train_path).training.account.tally.special_as_control == control
    assert len(set(names)) == 3
    tokenizer.chat_template = {"plain": CHATML, "other": "x"}
    identity = identify(tokenizer)
    data = Data(chat_template="plain")
    assert with_template(identity, data.chat_template, model="m").chat_template == CHATML
    tokenizer.chat_template = {"other": "x", "plain": CHATML}
    assert same_templates(identity, identify(tokenizer))
    with pytest.raises(DataError, match=r"is 'no', but the templates of m are: plain, other"):
        with_template(identity, "no", model="m")


def test_an_older_corpus_is_made_again_under_its_name(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": f"document {n}"} for n in range(30)]
    _, store, (domain,) = accounted(tmp_path, tokenizer, rows)
    before = Path(store.path).read_bytes()
    facts = Path(store.path).parent / "facts.json"
    told = json.loads(facts.read_text())
    older = {name: value for name, value in told.items() if name != "training"}
    other = told | {"made_by": told["made_by"] | {"tokenizers": "0.1"}}
    for stale in (older, other):
        facts.write_text(json.dumps(stale))
        _, store, (again,) = accounted(tmp_path, tokenizer, rows)
        assert again == domain
        assert Path(store.path).read_bytes() == before
        assert json.loads(facts.read_text()) == told


def test_the_name_of_a_corpus_follows_what_the_tokenizers_identity_leaves_out(tokenizer) -> None:
    identity = identify(tokenizer)
    assert rows_digest(tokenizer, identity) == identity.digest
    digests = {identity.digest}
    tokenizer.chat_template = "{{ pad_token }}" + CHATML
    digests.add(rows_digest(tokenizer, identify(tokenizer)))
    tokenizer.pad_token = "<|eos|>"
    digests.add(rows_digest(tokenizer, identify(tokenizer)))
    tokenizer.chat_template = CHATML
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("wider", lstrip=True, normalized=False, special=True)])
    identity = identify(tokenizer)
    digests |= {identity.digest, rows_digest(tokenizer, identity)}
    assert len(digests) == 5
