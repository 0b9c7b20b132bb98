"""How alike classes are, by an autoencoder over the mean token embeddings of their texts (ReffAKD,
arXiv 2404.09886), as soft labels.

With e a text's code, the similarity of classes a and b is

    M[a, b] = mean of cos(e_i, e_j) over rows i of a and j of b      (a != b)
    M[a, a] = mean of cos(e_i, e_j) over distinct rows i, j of a, plus a constant
    P = softmax of each row of M

and the target of a row of class y is P[y], which no temperature changes. The published code takes
convolutions over images: three layers to a quarter of the input, squared error, SGD at .1 with
momentum .9 and weight decay 5e-4, batches of 128, 200 epochs with a fifth of the rate from .3, .6
and .8 of them on. For text: linear layers from the D numbers of a mean embedding, each scaled to
mean 0 and variance 1, to a half and a quarter of them and back, with ReLU between.

N rows   D width of an embedding   E width of a code   C classes
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import ConfigError

LR, MOMENTUM, WEIGHT_DECAY, BATCH = 0.1, 0.9, 5e-4, 128
MILESTONES, FALL = (0.3, 0.6, 0.8), 0.2  # shares of the epochs, and the factor of the rate


def mean_embeddings(embedding_VD: Tensor, texts: Sequence[np.ndarray]) -> Tensor:
    """The mean embedding of each text's tokens [N, D]."""
    ids = [torch.from_numpy(text.astype(np.int64)) for text in texts]
    return torch.stack([embedding_VD[own].mean(0) for own in ids])


def codes_of(means_ND: Tensor, *, epochs: int, seed: int) -> Tensor:
    """Codes [N, E] of an autoencoder that is fitted to these mean embeddings."""
    scaled_ND = _scaled(means_ND.float())
    width = scaled_ND.shape[1]
    half, quarter = max(1, width // 2), max(1, width // 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(width, half), nn.ReLU(), nn.Linear(half, quarter))
        decoder = nn.Sequential(nn.Linear(quarter, half), nn.ReLU(), nn.Linear(half, width))
        with _one_thread():  # for layers so small more take longer
            _fit(nn.Sequential(encoder, decoder), scaled_ND, epochs=epochs)
    with torch.no_grad():
        return encoder(scaled_ND)


def similarities(
    codes_NE: Tensor, label_N: np.ndarray, *, num_classes: int, samples: int, seed: int
) -> np.ndarray:
    """M without its constant, float64 [C, C], of at most `samples` rows of each class, which has
    two or more."""
    draw, units_NE = np.random.default_rng(seed), F.normalize(codes_NE.double(), dim=1).numpy()
    sums, counts = [], []
    for number in range(num_classes):
        own = np.flatnonzero(label_N == number)
        chosen = draw.permutation(own)[:samples]
        sums.append(units_NE[chosen].sum(0))
        counts.append(len(chosen))
    sum_CE, count_C = np.stack(sums), np.array(counts)
    pairs_CC = np.outer(count_C, count_C)
    found_CC = sum_CE @ sum_CE.T
    inside = np.diag_indices(num_classes)
    found_CC[inside] -= count_C  # of each row with itself
    pairs_CC[inside] -= count_C
    return found_CC / pairs_CC


def soft_labels(
    similarity_CC: np.ndarray, *, diagonal: float, classes: Sequence[str], option: str
) -> np.ndarray:
    """P, float64 [C, C], a row for each class. Raises ConfigError where a class is no likelier than
    another in its own row; `option` is where the config asks for it."""
    found_CC = similarity_CC + diagonal * np.eye(len(classes))
    if not np.isfinite(found_CC).all():
        raise ConfigError(
            f"{option}: the autoencoder ended without numbers; lower {option}.passes, or name a "
            "model with other embeddings"
        )
    for number, row_C in enumerate(found_CC):
        others_C = np.where(np.arange(len(classes)) == number, -np.inf, row_C)
        nearest = int(others_C.argmax())
        if row_C[number] <= others_C[nearest]:
            least = others_C[nearest] - similarity_CC[number, number]
            raise ConfigError(
                f"{option}.diagonal is {diagonal:g}, with which rows of {classes[number]} are as "
                f"near to those of {classes[nearest]} as to their own; set it above {least:.4f}, "
                f"or raise {option}.samples"
            )
    powers_CC = np.exp(found_CC - found_CC.max(1, keepdims=True))
    label_CC = powers_CC / powers_CC.sum(1, keepdims=True)
    if not label_CC.astype(np.float32).all():
        raise ConfigError(
            f"{option}.diagonal is {diagonal:g}, with which other classes have no "
            "probability left; lower it"
        )
    return label_CC


def _scaled(means_ND: Tensor) -> Tensor:
    """Every number with mean 0 and variance 1 over the rows; those that never change are 0."""
    centred_ND = means_ND - means_ND.mean(0)
    spread_D = centred_ND.square().mean(0).sqrt()
    return centred_ND / torch.where(spread_D > 0, spread_D, torch.ones_like(spread_D))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute with one thread in a `with`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(model: nn.Module, scaled_ND: Tensor, *, epochs: int) -> None:
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    falls = [round(share * epochs) for share in MILESTONES]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, falls, FALL)
    for _ in range(epochs):
        for part_ND in scaled_ND[torch.randperm(len(scaled_ND))].split(BATCH):
            optimiser.zero_grad()
            F.mse_loss(model(part_ND), part_ND).backward()
            optimiser.step()
        schedule.step()
