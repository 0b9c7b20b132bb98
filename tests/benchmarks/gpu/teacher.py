"""A teacher's scoring against its own forward pass and against the rate of a matrix product.

`rate`: floating-point operations per second of the decoder's matrices alone, attention left out,
as a share of what a square product reached in this run. N positions   D width   V vocabulary
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from teacher_service.engine.model_parts import find_decoder, find_head
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import Selection, select
from tests.benchmarks.gpu.sections import Case, Numbers, release, timed
from tests.benchmarks.gpu.sizes import Shape, Sizes


def matrix_rate(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Numbers:
    """Operations per second of a square product of random numbers."""
    size = sizes.square
    first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = timed(lambda: [first @ second for _ in range(10)], device, sizes.rounds)
    return {"flops_per_s": 10 * 2 * size**3 / found["seconds"]}


def cases(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, rate: float | None
) -> Mapping[str, Case]:
    """One for each model, since making it takes longer than measuring."""
    return {
        name: partial(scoring, shape, sizes, device, dtype, rate)
        for name, shape in sizes.teachers.items()
    }


def scoring(
    shape: Shape, sizes: Sizes, device: torch.device, dtype: torch.dtype, rate: float | None
) -> Numbers:
    """Seconds of a unit: the decoder, the model's own forward pass to full logits, and the decoder
    with each selector, which is what a replica does with it."""
    model = shape.random(device, dtype)
    decoder, head = find_decoder(model, device), find_head(model)
    assert head is not None, "it is one product"
    rows, tokens = sizes.unit
    ids_BT = torch.randint(shape.vocabulary, (rows, tokens), device=device)
    positions_BT = torch.arange(tokens, device=device).expand(rows, -1)
    every_N = torch.arange(rows * tokens, device=device)
    label_N = ids_BT.flatten().roll(-1)

    def hidden() -> Tensor:
        return decoder.hidden(ids_BT, positions_BT, every_N, ())[decoder.num_layers]

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)

    found = {"decoder": timed(hidden, device, sizes.rounds)}
    for name, selected in selectors(sizes.top_k, shape.vocabulary):
        found[name] = timed(lambda s=selected: s(hidden(), head, label_N), device, sizes.rounds)
    release()
    found["forward"] = timed(forward, device, sizes.rounds)  # last: full logits may have no room
    operations = 2 * rows * tokens * shape.decoder_weights
    decoder_s, forward_s = (found[name]["seconds"] for name in ("decoder", "forward"))
    ratios = {
        f"{name} / forward": numbers["seconds"] / forward_s
        for name, numbers in found.items()
        if name not in ("decoder", "forward")
    }
    reached = {} if rate is None else {"decoder rate": operations / decoder_s / rate}
    return {"tokens": rows * tokens, **found, **ratios, **reached}


def selectors(top_k: int, vocabulary: int) -> Iterator[tuple[str, Callable[..., Selection]]]:
    """By rank, and drawn in both ways."""
    yield "top_k", partial(select, num_ids=top_k, shared_vocab=vocabulary)
    for selector, count in (("threshold", 1), ("sampled", top_k)):

        def drawn(hidden_ND, head, label_N, *, selector=selector, count=count) -> Selection:
            shape = (len(hidden_ND), count)
            uniform_NU = torch.rand(shape, dtype=torch.float64, device=hidden_ND.device)
            return draw(
                hidden_ND,
                head,
                label_N,
                uniform_NU=uniform_NU,
                selector=selector,
                num_ids=top_k,
                shared_vocab=vocabulary,
            )

        yield selector, drawn
