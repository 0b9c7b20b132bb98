"""Rows with images: what they hold, what is learnt of them, and which are refused.

T tokens   N positions with loss   V vocabulary
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoProcessor,
    Idefics3Processor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from cluster.planning.preparation import check
from shared.config.domains import HubDataset
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.data.tokenise import prepare
from shared.errors import ConfigError, DataError, HandshakeError
from shared.images.processor import ImageProcessor, differing_places, image_processor
from shared.images.reading import ImageRows
from shared.model_parts import token_types_of
from teacher_service.engine.hf import HFEngine
from tests import pictured, tiny
from tests.answers import decoded, question_of
from tests.drawn import dense_weights, drawn_spec
from tests.pictured import SEEN, VOCAB, config_of
from tests.student_trainer.tasks.test_image_text import as_pair, inputs_of, load, rewritten
from tests.tiny import Pair

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pictured.save_pair(tmp_path_factory.mktemp("models"))


def rows_of(config: Config, processor: ImageProcessor | None = None) -> Rows:
    """The training rows of a config with one domain, as a run prepares them."""
    processor = processor or image_processor(config.student.model, None)
    (domain,) = prepare(
        config,
        tokenizer=lambda: processor.processor.tokenizer,
        tokenizer_digest="tiny",
        cache=Path(config.paths.cache),
        images=ImageRows(processor, Path(config.paths.root)),
    )
    store = RowStore.open(domain.train_path)
    return store.take(range(len(store)))


def with_rows(config: Config, rows: list[dict[str, Any]]) -> Config:
    """The config with other training rows, in a file beside its own."""
    path = Path(str(config.domains["shapes"].train)).with_name("other.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = config.domains["shapes"].model_copy(update={"train": str(path)})
    return config.model_copy(update={"domains": {"shapes": domain}})


def test_rows_are_what_the_processor_makes_and_responses_alone_are_learnt(tmp_path, pair):
    config = config_of(tmp_path, "run", pair=pair)
    rows, processor = rows_of(config), AutoProcessor.from_pretrained(pair.student)
    columns = zip(rows.column("input_ids"), rows.column("loss_mask"), strict=True)
    for row, (ids, mask) in zip(pictured.rows_in(config, "train"), columns, strict=True):
        made, count = inputs_of(processor, row)
        assert ids.tolist() == made["input_ids"][0].tolist()
        assert (ids == processor.image_token_id).sum() == SEEN * len(row["images"])
        learnt = ids[1:][mask[:-1] == 1]
        assert len(learnt) == count
        assert processor.decode(learnt) == row["response"] + processor.tokenizer.eos_token
    assert max(map(len, rows.column("doc_starts"))) == 1


def test_plain_text_is_learnt_but_for_its_images(tmp_path, pair):
    config = config_of(tmp_path, "run", pair=pair)
    config = with_rows(
        config, [{"images": ["train-1-0.png"], "text": f"see <image> a red {n}"} for n in range(3)]
    )
    rows, place = rows_of(config), pictured.VOCAB - 1
    for ids, mask in zip(rows.column("input_ids"), rows.column("loss_mask"), strict=True):
        is_label = np.append(mask[:-1] == 1, False)
        assert not (ids[1:][is_label[:-1]] == place).any()
        assert mask.sum() == len(ids) - 1 - SEEN  # all else but the first token is
        assert mask[np.flatnonzero(ids == place)[-1]] == 1  # the image says what follows it


def test_a_row_is_its_images_too(tmp_path, pair):
    rows = rows_of(config_of(tmp_path, "run", pair=pair))
    kept, images = rows.with_draws(np.arange(len(rows))), rows.images()
    assert kept.images() == images
    assert kept.documents().images() == images
    assert rows.part(slice(2, 4)).images() == images[2:4]
    other = Rows(rows.table.drop_columns(["images"])).with_images([images[1], *images[1:]])
    same = [a == b for a, b in zip(rows.hashes(), other.hashes(), strict=True)]
    assert same == [False, *[True] * (len(rows) - 1)]


def test_both_responses_of_a_pair_have_the_images(tmp_path, pair):
    options = {"losses": [{"kind": "preference"}], "data": {"context": 96}}
    config = rewritten(config_of(tmp_path, "run", pair=pair, **options), as_pair)
    rows, place = rows_of(config), VOCAB - 1
    seen = [len(own) for own in rows.images()]
    alone = rows.documents()
    assert len(alone) == 2 * len(rows)
    counts = [int((ids == place).sum()) for ids in alone.column("input_ids")]
    assert counts == [SEEN * count for count in seen for _ in range(2)]
    assert [len(own) for own in alone.images()] == [count for count in seen for _ in range(2)]


def test_an_image_that_changes_makes_other_rows(tmp_path, pair):
    config = config_of(tmp_path, "run", pair=pair)
    before = rows_of(config).hashes()
    assert rows_of(config).hashes() == before
    pictured.draw("white", "circle", 99).save(tmp_path / "text" / "train-0-0.png")
    after = rows_of(config).hashes()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"images": ["broken.png"]}, r"other.jsonl:2, .*broken.png: its image cannot be read"),
        ({"images": ["gone.png"]}, r"other.jsonl:2: its image 'gone.png' is no file below"),
        ({"images": ["../../secret.png"]}, r"'../../secret.png' is no file below"),
        ({"images": ["iVBORw0KGgo" * 90]}, r"other.jsonl:2: its image 'iVBOR.* is no file below"),
        ({"images": ["a\0.png"]}, r"is no file below"),
        ({"images": ["program.eps"]}, "its image cannot be read .cannot identify"),
        ({"images": ["huge.png"]}, r"cannot be read .8001 x 8000 pixels, more than 50,000,000"),
        ({"images": [7]}, r"other.jsonl:2: an image is 7, neither a path nor encoded bytes"),
        ({"images": ["train-0-0.png"], "prompt": "<image> and <image>"}, "1 images and 2 places"),
        ({"images": ["train-0-0.png"], "response": "<image>"}, "2 places for them"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused_by_file_and_row(tmp_path, pair, row, said):
    config = config_of(tmp_path / "below", "run", pair=pair)
    (tmp_path / "below" / "text" / "broken.png").write_bytes(b"\x89PNG no image")
    pictured.draw("red", "circle", 1).save(tmp_path / "secret.png")
    pictured.draw("red", "circle", 1).save(tmp_path / "below" / "text" / "program.eps")
    Image.new("1", (8001, 8000)).save(tmp_path / "below" / "text" / "huge.png")
    good = {"images": ["train-0-0.png"], "prompt": "what?", "response": "red"}
    with pytest.raises(DataError, match=said):
        rows_of(with_rows(config, [good, good | row]))


def test_images_are_bytes_and_paths_of_the_root_too(tmp_path, pair):
    """As data sets of Hugging Face have them; in Parquet, under a name of their own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = config_of(tmp_path, "run", pair=pair)
    held_out = config.domains["shapes"].model_copy(update={"validation": None})
    expected = rows_of(config.model_copy(update={"domains": {"shapes": held_out}}))
    found = [json.loads(line) for line in (tmp_path / "text/train.jsonl").read_text().splitlines()]
    for number, row in enumerate(found):
        paths = [f"text/{name}" for name in row.pop("images")]
        seen = [{"bytes": (tmp_path / path).read_bytes(), "path": None} for path in paths]
        row["seen"] = seen if number % 2 else [{"bytes": None, "path": path} for path in paths]
    path = tmp_path / "elsewhere" / "rows.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(found), path)
    domain = held_out.model_copy(update={"train": str(path), "columns": {"images": "seen"}})
    assert rows_of(config.model_copy(update={"domains": {"shapes": domain}})).hashes() == (
        expected.hashes()
    )


def test_a_dataset_s_images_are_the_bytes_that_its_rows_hold(tmp_path, pair):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Encoded

    config = config_of(tmp_path, "run", pair=pair)
    held_out = config.domains["shapes"].model_copy(update={"validation": None})
    expected = rows_of(config.model_copy(update={"domains": {"shapes": held_out}}))
    found = [json.loads(line) for line in (tmp_path / "text/train.jsonl").read_text().splitlines()]
    for row in found:
        row["images"] = [str(tmp_path / "text" / name) for name in row["images"]]
    told = {"images": List(Encoded()), "prompt": Value("string"), "response": Value("string")}
    made = Dataset.from_list(found, features=Features(told))
    made.save_to_disk(str(tmp_path / "saved"))
    domain = held_out.model_copy(update={"train": HubDataset(dataset=str(tmp_path / "saved"))})
    assert rows_of(config.model_copy(update={"domains": {"shapes": domain}})).hashes() == (
        expected.hashes()
    )


def test_a_chat_template_is_told_of_images_as_parts(tmp_path, pair):
    """As `apply_chat_template` of the processor has it, special tokens of rows plain text."""
    config = config_of(tmp_path, "run", pair=pair, data={"context": 128})
    processor = AutoProcessor.from_pretrained(pair.student)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    rows = [
        {
            "images": ["train-2-0.png", "train-2-1.png"],
            "messages": [
                {"role": "user", "content": f"What {n} <image> is <image> seen?"},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "And <|eos|>?"},
                {"role": "assistant", "content": "blue"},
            ],
        }
        for n in range(3)
    ]
    seeing = ImageProcessor("tiny", processor)
    found = rows_of(with_rows(config, rows), seeing)
    images = [Image.open(tmp_path / "text" / name) for name in rows[0]["images"]]
    for row, ids, mask in zip(
        rows, found.column("input_ids"), found.column("loss_mask"), strict=True
    ):
        texts = row["messages"][0]["content"].split("<image>")
        said = [{"type": "text", "text": text} for text in texts]
        first = [said[0], {"type": "image"}, said[1], {"type": "image"}, said[2]]
        turns = [{"role": "user", "content": first}]
        asked = processor.apply_chat_template(turns, add_generation_prompt=True)
        made = processor(text=[asked], images=[images], add_special_tokens=False)["input_ids"][0]
        assert ids[: len(made)].tolist() == list(made)
        assert 2 not in ids.tolist()
        assert processor.decode(ids[1:][mask[:-1] == 1]) == "redblue"


def test_another_architecture_s_places_are_its_processor_s(tmp_path, pair):
    """Idefics3, which cuts an image into parts with tokens of rows and columns."""
    tokenizer = tiny.tokenizer()
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer.add_tokens([*names, *_places()], special_tokens=True)
    cut = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = Idefics3Processor(Idefics3ImageProcessorPil(**cut), tokenizer, image_seq_len=2)
    config = config_of(tmp_path, "run", pair=pair, data={"context": 256})
    rows = rows_of(config, ImageProcessor("tiny", processor))
    for row, ids in zip(pictured.rows_in(config, "train"), rows.column("input_ids"), strict=True):
        prompt = row["prompt"]
        if "<image>" not in prompt:
            prompt = "<image>" * len(row["images"]) + "\n" + prompt
        text = f"{tokenizer.bos_token}{prompt}\n{row['response']}{tokenizer.eos_token}"
        made = processor(text=[text], images=[row["images"]], add_special_tokens=False)
        assert ids.tolist() == list(made["input_ids"][0])


def _places() -> list[str]:
    return [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": VOCAB, "encoding": "fp32"},
        {"top_k": 5, "encoding": "fp32", "hidden_layers": (0, 1), "hidden_encoding": "fp32"},
    ],
)
def test_a_teacher_answers_what_a_plain_forward_gives(tmp_path, pair, asked):
    """Row by row, unpadded and in float64, to 1e-5; hidden states too."""
    config = config_of(tmp_path, "run", pair=pair)
    rows, engine = rows_of(config).part(slice(0, 4)), HFEngine.load(str(pair.teacher))
    question = question_of(asked.pop("top_k"), VOCAB, **asked)
    answer = engine.score(rows, question)
    answer.check(rows, question, engine.fingerprint)
    found, at = decoded(answer), 0
    model, processor = load(pair.teacher), AutoProcessor.from_pretrained(pair.teacher)
    for row in pictured.rows_in(config, "train")[:4]:
        made, count = inputs_of(processor, row)
        with torch.no_grad():
            pixels = made["pixel_values"].double()
            output = model(**made | {"pixel_values": pixels}, output_hidden_states=True)
        logp_NV = output.logits[0, -1 - count : -1].log_softmax(-1).numpy()
        part = slice(at, at + count)
        expected = np.take_along_axis(logp_NV, found.ids_NK[part], 1)
        assert np.abs(found.logprobs_NK[part] - expected).max() <= 1e-5
        for layer, states_ND in found.hidden_ND.items():
            own_ND = output.hidden_states[layer][0, -1 - count : -1].numpy()
            assert np.abs(states_ND[part] - own_ND).max() <= 1e-5
        at += count
    assert at == len(found.label_logprob_N)


def test_a_dataset_s_paths_are_below_the_root_alone(tmp_path, pair, monkeypatch):
    """A row names no file of the working directory."""
    from datasets import Dataset

    (tmp_path / "here").mkdir()
    pictured.draw("red", "circle", 1).save(tmp_path / "here" / "private.png")
    config = config_of(tmp_path / "below", "run", pair=pair)
    row = {"images": ["private.png"], "prompt": "what?", "response": "red"}
    Dataset.from_list([row] * 30).save_to_disk(str(tmp_path / "here" / "saved"))
    monkeypatch.chdir(tmp_path / "here")
    hub = HubDataset(dataset=str(tmp_path / "here" / "saved"))
    domain = config.domains["shapes"].model_copy(update={"train": hub, "validation": None})
    with pytest.raises(DataError, match=r"'private.png' is no file below"):
        rows_of(config.model_copy(update={"domains": {"shapes": domain}}))


def test_validation_text_that_is_alike_over_other_images_stays(tmp_path, pair):
    config = config_of(tmp_path, "run", pair=pair)
    for number in range(40):
        pictured.draw("red", "circle", number).save(tmp_path / "text" / f"alike-{number}.png")
    rows = [
        {"images": [f"alike-{number}.png"], "prompt": "what?", "response": "red"}
        for number in range(40)
    ]
    found = with_rows(config, rows)
    domain = found.domains["shapes"].model_copy(update={"validation": None})
    processor = image_processor(config.student.model, None)
    (prepared,) = prepare(
        found.model_copy(update={"domains": {"shapes": domain}}),
        tokenizer=lambda: processor.processor.tokenizer,
        tokenizer_digest="tiny",
        cache=Path(config.paths.cache),
        images=ImageRows(processor, Path(config.paths.root)),
    )
    held_out, train = (
        len(RowStore.open(path)) for path in (prepared.validation_path, prepared.train_path)
    )
    assert held_out > 1
    assert held_out + train == 40


def test_models_that_are_told_which_tokens_are_images_are_known():
    for model, name in (
        (transformers.Qwen2_5_VLModel, "mm_token_type_ids"),
        (transformers.Gemma3Model, "token_type_ids"),
        (transformers.LlavaModel, None),
        (transformers.Idefics3Model, None),
    ):
        assert token_types_of(model) == name


def test_a_teacher_that_sees_nothing_says_so(tiny_pair):
    rows = Rows.build(
        domains=["any"],
        indices=[0],
        input_ids=[np.arange(3, 9)],
        doc_starts=[np.zeros(1)],
        loss_masks=[np.append(np.ones(5), 0)],
        images=[[b"an image"]],
    )
    engine = HFEngine.load(str(tiny_pair.teacher))
    with pytest.raises(ConfigError, match="asked about images, and it is a model of text alone"):
        engine.score(rows, question_of(4, tiny.VOCAB))


def test_places_of_as_many_but_other_tokens_are_told_apart(pair):
    own, other = (AutoProcessor.from_pretrained(pair.student) for _ in range(2))
    other.image_token, other.image_token_id = other.tokenizer.eos_token, 2
    found = differing_places(ImageProcessor("one", own), ImageProcessor("two", other))
    assert found is not None
    _, one, two = found
    assert len(one) == len(two) == SEEN
    assert (set(one.tolist()), set(two.tolist())) == ({VOCAB - 1}, {2})
    assert differing_places(ImageProcessor("one", own), ImageProcessor("one", own)) is None


def dense_logprobs(config: Config, folder: Path, count: int) -> np.ndarray:
    """Of the first rows, in float64 [N, V]."""
    model, processor, found = load(folder), AutoProcessor.from_pretrained(folder), []
    for row in pictured.rows_in(config, "train")[:count]:
        made, num = inputs_of(processor, row)
        with torch.no_grad():
            pixels = made["pixel_values"].double()
            logits = model(**made | {"pixel_values": pixels}).logits[0, -1 - num : -1]
        found.append(logits.log_softmax(-1).numpy())
    return np.concatenate(found)


def test_ids_are_drawn_from_what_the_teacher_says_of_the_image(tmp_path, pair):
    """Entropies are those of a plain forward, no id stands for less than itself, and another image
    draws anew."""
    config = config_of(tmp_path, "run", pair=pair)
    rows, engine = rows_of(config).part(slice(0, 4)), HFEngine.load(str(pair.teacher))
    question = drawn_spec("threshold", 24, VOCAB)
    answer = engine.score(rows, question)
    answer.check(rows, question, engine.fingerprint)
    found, logp_NV = decoded(answer), dense_logprobs(config, pair.teacher, 4)
    assert found.entropy_N is not None
    np.testing.assert_allclose(found.entropy_N, -(np.exp(logp_NV) * logp_NV).sum(1), atol=1e-5)
    weights_NV = dense_weights(answer).numpy()
    np.testing.assert_allclose(weights_NV.sum(1), 1, atol=2e-6)
    kept_NV = weights_NV > 0
    assert (weights_NV >= np.exp(logp_NV) * (1 - 1e-4))[kept_NV].all()
    images = rows.images()
    other = Rows(rows.table.drop_columns(["images"])).with_images([images[1], *images[1:]])
    ids = [decoded(engine.score(asked, question)).ids_NK for asked in (rows, other)]
    first = int(rows.num_loss_tokens()[0])
    assert not np.array_equal(ids[0][:first], ids[1][:first])
    assert np.array_equal(ids[0][first:], ids[1][first:])


def test_last_states_times_the_head_are_what_a_plain_forward_says_of_the_image(tmp_path, pair):
    config = config_of(tmp_path, "run", pair=pair)
    rows, engine = rows_of(config).part(slice(0, 4)), HFEngine.load(str(pair.teacher))
    engine.cache = str(tmp_path / "cache")
    head = engine.ship_head()
    told = {"head": head.digest, "states": head.states, "states_width": head.states_width}
    last_ND = decoded(engine.score(rows, question_of(0, VOCAB, **told))).last_ND
    assert last_ND is not None
    logits_NV = last_ND.astype(np.float64) @ load(pair.teacher).lm_head.weight.detach().numpy().T
    found_NV = torch.from_numpy(logits_NV).log_softmax(-1).numpy()
    np.testing.assert_allclose(found_NV, dense_logprobs(config, pair.teacher, 4), atol=1e-5)


def test_models_that_see_otherwise_are_refused(tmp_path, pair, tiny_pair):
    pictured.save_llava(tmp_path / "large", width=48, layers=2, seed=3, side=32)
    other = {"t": {"model": str(tmp_path / "large")}}
    said = r"64 x 64 stands in 16 tokens .ids 512. for .* and in 4 tokens .ids 512. for the student"
    with pytest.raises(HandshakeError, match=said):
        check(config_of(tmp_path, "run", pair=pair, teachers=other))
    blind = replace(pair, student=tiny_pair.student, teacher=tiny_pair.teacher)
    with pytest.raises(ConfigError, match="no processor"):
        check(config_of(tmp_path, "run", pair=blind))
