"""LoRA modules on a frozen decoder: what they add to its linear layers, their optimiser, and both
as files of versions.

The decoder's own layers stay as they are, and their outputs the same bits, where no version is on.

r rank   I input width of a layer   O output width
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.config.models.modules import TrainedModules
from shared.errors import ConfigError, DamagedError, TeacherError, reason_of
from shared.targets.weights import BEGINNING, ModuleFiles, WeightsRef, digest_of

PLAIN = (nn.Linear.forward, Conv1D.forward)
BETAS, EPS = (0.9, 0.95), 1e-8
ARRIVAL_S = 30.0  # within which a file that was written is seen on another node
POLL_S = 0.2
WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")


class LoraModules:
    """Low-rank products beside linear layers, in float32; `y + alpha / r B A x` while a version is
    on. A begins random, B zero, so that version 0 adds nothing."""

    def __init__(
        self, decoder: nn.Module, asked: TrainedModules, *, seed: int, files: ModuleFiles
    ) -> None:
        """Raises ConfigError for a name in `target_modules` that no linear layer has."""
        self._files, self._seed, self._scale = files, seed, asked.alpha / asked.r
        self._is_on, self._holds, self._has_moments = False, BEGINNING, True
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in _chosen(decoder, asked.target_modules):
            into, out = _widths(layer)
            device = layer.weight.device
            for part, shape in (("A", (asked.r, into)), ("B", (out, asked.r))):
                zeros = torch.zeros(shape, dtype=torch.float32, device=device)
                self.parameters[f"{name}.lora_{part}"] = nn.Parameter(zeros)
            layer.register_forward_hook(self._adding(name))
        self._optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=asked.lr, betas=BETAS, eps=EPS, weight_decay=0.0
        )
        self._begin()

    @contextmanager
    def on(self, ref: WeightsRef | None) -> Iterator[None]:
        """The modules of a version added, within a `with`; none where `ref` is None. Raises
        DamagedError where its file is not what was written, TeacherError where it cannot be
        read."""
        if ref is not None and ref != self._holds:
            self._load(ref, moments=False)
        self._is_on = ref is not None
        try:
            yield
        finally:
            self._is_on = False

    @contextmanager
    def learning(self, ref: WeightsRef) -> Iterator[None]:
        """The same with the optimiser as it was after that version, to be updated."""
        if ref != self._holds or not self._has_moments:
            self._load(ref, moments=True)
        self._optimiser.zero_grad()
        with self.on(ref):
            yield

    def gradient_is_finite(self) -> bool:
        """Whether the gradient formed in `learning` is."""
        gradients = (parameter.grad for parameter in self.parameters.values())
        return all(bool(g.isfinite().all()) for g in gradients if g is not None)

    def update(self) -> WeightsRef:
        """Take one step of the optimiser by the gradient formed in `learning`, and keep what came
        of it as the next version. Raises StorageError."""
        version = self._holds.version + 1
        for parameter in self.parameters.values():
            if parameter.grad is None:  # of a layer that no token reached
                parameter.grad = torch.zeros_like(parameter)
        self._holds = WeightsRef(-1, "")  # an update that fails half way holds no version
        self._optimiser.step()
        self._holds = self._written(version)
        return self._holds

    def _adding(self, name: str) -> Any:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._is_on:
                return None
            a_rI, b_Or = (self.parameters[f"{name}.lora_{part}"] for part in "AB")
            added = inputs[0].to(a_rI.dtype) @ a_rI.T @ b_Or.T
            return (output + added * self._scale).to(output.dtype)

        return add

    @torch.no_grad()
    def _begin(self) -> None:
        """Be version 0; the same numbers on any device."""
        generator = torch.Generator().manual_seed(self._seed)
        for name, parameter in self.parameters.items():
            if name.endswith(".lora_A"):
                bound = 1 / math.sqrt(parameter.shape[1])
                random = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(random)
            else:
                parameter.zero_()
        self._optimiser.state.clear()
        self._holds, self._has_moments = BEGINNING, True

    @torch.no_grad()
    def _load(self, ref: WeightsRef, *, moments: bool) -> None:
        if ref == BEGINNING:
            self._begin()
            return
        found = _read(self._files, ref)
        self._holds = WeightsRef(-1, "")  # a load that fails half way holds no version
        for name, parameter in self.parameters.items():
            parameter.copy_(found[f"{WEIGHTS}.{name}"])
            if moments:
                kept = {key: found[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
                step = torch.tensor(float(ref.version))
                self._optimiser.state[parameter] = {"step": step, **kept}
        self._holds, self._has_moments = ref, moments

    def _written(self, version: int) -> WeightsRef:
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self._optimiser.state[parameter]
            named = {WEIGHTS: parameter.detach(), **{key: state[key] for key in MOMENTS}}
            tensors |= {f"{key}.{name}": value.cpu() for key, value in named.items()}
        return self._files.write(version, partial(save_file, tensors))


def _read(files: ModuleFiles, ref: WeightsRef) -> dict[str, Tensor]:
    """The tensors of a version's file, once it is seen here."""
    path, deadline = files.path(ref), time.monotonic() + ARRIVAL_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    try:
        is_whole = digest_of(path) == ref.digest
        found = load_file(path) if is_whole else {}
    except (OSError, SafetensorError) as error:
        raise TeacherError(
            f"version {ref.version} of the teacher's modules cannot be read from {path}: "
            f"{reason_of(error)}; look at the disk, and run the same command again, it resumes "
            "from the last checkpoint"
        ) from None
    if not is_whole:
        raise DamagedError(
            f"{path} is not what was written as version {ref.version} of the teacher's modules; "
            "restore it from a backup, or start over with --fresh"
        )
    return found


def _chosen(
    decoder: nn.Module, asked: Literal["all-linear"] | Sequence[str]
) -> list[tuple[str, Any]]:
    """The linear layers that are asked for, by name. Raises ConfigError for a name of none."""
    layers = _linear(decoder)
    if asked == "all-linear":
        asked = tuple(layers)
    found = {}
    for end in asked:
        ending = {n: layer for n, layer in layers.items() if n == end or n.endswith(f".{end}")}
        if not ending:
            last = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"teachers.NAME.online_modules.target_modules names {end}, but the teacher's "
                f"decoder has no such linear layer; those that it has are {last or 'none'}"
            )
        found |= ending
    if not found:
        raise ConfigError(
            "teachers.NAME.online_modules is set, but the teacher's decoder has no linear layer "
            "that they could stand beside; leave them out"
        )
    return [(name, layer) for name, layer in layers.items() if name in found]


def _linear(decoder: nn.Module) -> dict[str, Any]:
    """The linear layers of a decoder by name. One under an adapter of the teacher's own counts as
    the layer that it is, the adapter's parts as none."""
    adapted = {name for name, module in decoder.named_modules() if hasattr(module, "base_layer")}
    found: dict[str, Any] = {}
    for name, module in decoder.named_modules():
        owner = next((one for one in adapted if name.startswith(f"{one}.")), None)
        if (owner is None or name == f"{owner}.base_layer") and _is_product(module):
            found[name if owner is None else owner] = module
    return found


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether a layer gives the product with its weight; one of a model's own code is tried."""
    if type(layer).forward in PLAIN:
        return True
    if not isinstance(layer, nn.Linear):
        return False
    states_1I = torch.linspace(-1, 1, layer.in_features).to(layer.weight)[None]
    product_1O = nn.functional.linear(states_1I, layer.weight, layer.bias)
    try:
        found = layer(states_1I)
    except Exception:  # of that code, as where it takes other shapes
        return False
    plain = isinstance(found, Tensor) and found.shape == product_1O.shape
    return plain and torch.allclose(found, product_1O, rtol=1e-2, atol=1e-3)


def _widths(layer: Any) -> tuple[int, int]:
    """What goes into a layer and comes out of it."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
