"""What is left of a teacher's hidden states after projection and rounding, and what they cost.

`python -m tests.benchmarks.targets.hidden_payload` prints, for the reference teacher on real text,
how far states rebuilt from what travelled are from the true ones. Projections are fitted as a run
fits them, on training rows; the error is measured on validation rows.

N positions with loss   D hidden width   E shipped width
"""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run, run_plan
from cluster.planning.projecting import projection_of
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.targets.payload import bytes_per_token
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring.projection import load_projections
from tests.answers import question_of
from tests.student_trainer.processes import LocalTeacher

PROJECT = Path(__file__).resolve().parents[3]
REFERENCE = PROJECT.parent / "shared"
RECIPE = PROJECT / "cluster" / "recipes" / "real_text.yaml"


@dataclass(frozen=True)
class Result:
    """One way to ship the states of a layer."""

    projection: str
    width: int
    encoding: str
    errors: dict[int, float]  # teacher layer -> root of the mean squared error over the states'
    bytes_per_token: float  # of one layer


def measure(
    reference: Path, cache: Path, *, widths: list[int], layers: tuple[int, ...], rows: int
) -> list[Result]:
    """Every width, projection and encoding on `rows` validation rows of each domain."""
    shape = [f"paths.root={reference}", f"paths.cache={cache}", f"data.validation_rows={rows}"]
    pairs = ", ".join(f"{layer}: 1" for layer in layers)
    shape += [f"losses=[{{kind: hidden_states, layers: {{{pairs}}}}}]"]
    prepared = prepare_run(load(RECIPE, shape))
    engine = HFEngine.load(prepared.teacher.model)
    engine.cache = str(cache)
    units = [RowStore.open(d.validation_path).take(range(rows)) for d in prepared.domains]
    whole = question_of(
        1, prepared.facts.shared_vocab, hidden_layers=layers, hidden_encoding="fp32"
    )
    exact = [engine.score(unit, whole).arrays().hidden_ND for unit in units]
    return [
        _result(_asking(prepared, width, projection, encoding), engine, units, exact)
        for width in widths
        for projection in ("pca", "random")
        for encoding in ("bf16", "int8")
    ]


def _asking(prepared: Prepared, width: int, projection: str, encoding: str) -> Prepared:
    config = prepared.config
    asked = {"width": width, "projection": projection, "encoding": encoding}
    hidden = config.targets.hidden.model_copy(update=asked)
    targets = config.targets.model_copy(update={"hidden": hidden})
    return replace(prepared, config=config.model_copy(update={"targets": targets}))


def _result(
    prepared: Prepared, engine: HFEngine, units: list[Rows], exact: list[dict[int, np.ndarray]]
) -> Result:
    teacher, asked = engine.fingerprint, prepared.config.targets.hidden
    digest = projection_of(prepared, teacher, lambda rank: LocalTeacher(engine))
    plan = run_plan(prepared, run_dir=Path(), teacher=teacher, projection=digest)
    spec, width = plan.training_question, plan.teacher_width
    assert spec is not None
    assert width is not None
    shipped = [_states(engine.score(unit, spec)) for unit in units]
    layers = spec.hidden.layers
    matrices = {layer: np.eye(width, dtype=np.float32) for layer in layers}
    if digest:  # a full width travels as it is
        matrices = load_projections(prepared.config.paths.cache, digest)
    errors = {
        layer: _error(
            [states[layer] for states in exact],
            [states[layer] @ matrices[layer].T for states in shipped],
        )
        for layer in layers
    }
    cost = bytes_per_token(spec, hidden_width=width)["hidden states"] / len(layers)
    return Result(asked.projection, asked.width, asked.encoding, errors, cost)


def _states(answer: SoftTargets) -> dict[int, np.ndarray]:
    """Float32 states of an answer, whatever they travelled as."""
    found = answer.arrays().hidden_ND
    if answer.question.hidden.encoding != "bf16":
        return found
    return {
        layer: torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()
        for layer, bits in found.items()
    }


def _error(exact: list[np.ndarray], rebuilt: list[np.ndarray]) -> float:
    exact_ND, rebuilt_ND = np.concatenate(exact), np.concatenate(rebuilt)
    return float(np.linalg.norm(exact_ND - rebuilt_ND) / np.linalg.norm(exact_ND))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--rows", type=int, default=8, help="validation rows of each domain")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        results = measure(
            REFERENCE,
            Path(cache),
            widths=options.widths,
            layers=tuple(options.layers),
            rows=options.rows,
        )
    print("projection width encoding  bytes/token  relative error of layer")
    for found in results:
        errors = "  ".join(f"{layer}: {error:.4f}" for layer, error in found.errors.items())
        print(
            f"{found.projection:10} {found.width:5} {found.encoding:8} "
            f"{found.bytes_per_token:12.0f}  {errors}"
        )


if __name__ == "__main__":
    main()
