"""Everything that wants measuring on a GPU, in one run of under eight minutes, into one JSON file.

Needs torch, transformers, numpy and this package alone; the section on the wire also pyarrow and
xxhash. Sections: conformance of scoring, selectors and losses against float64; the token loss at
N = 65,536, D = 2,048 and V = 151,936; scoring by random models of Qwen2.5's 1.5B and 7B shape; a
student's step; encoding and decoding. Each has a time of its own and is written as it goes.

    python -m tests.benchmarks.gpu [--out gpu.json]
    python -m tests.benchmarks.gpu --device cpu --small
"""

import argparse
import platform
from functools import partial
from pathlib import Path

import torch
import transformers

from tests.benchmarks.gpu import conformance, student, teacher, token_loss, wire
from tests.benchmarks.gpu.sections import Record, Section, measure
from tests.benchmarks.gpu.sizes import FULL, SMALL, Sizes


def sections(sizes: Sizes, device: torch.device, record: Record) -> list[Section]:
    """In the order of what matters most."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def rated() -> dict:
        rate = record.found.get("matrix product", {}).get("square", {}).get("flops_per_s")
        return dict(teacher.cases(sizes, device, dtype, rate))

    square = {"square": partial(teacher.matrix_rate, sizes, device, dtype)}
    share = sizes.seconds
    return [
        Section("matrix product", share / 4, lambda: square),
        Section("conformance", share, partial(conformance.cases, sizes, device)),
        Section("token loss", share * 1.5, partial(token_loss.cases, sizes, device)),
        Section("teacher", share * 1.5, rated),
        Section("student", share, partial(student.cases, sizes, device, dtype)),
        Section("wire", share / 2, partial(wire.cases, sizes, device)),
    ]


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers are of."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Run all sections; the file is whole after every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; name --device cpu --small")
    sizes = SMALL if options.small else FULL
    record = Record(options.out, {"machine": machine(device)})
    for section in sections(sizes, device, record):
        measure(section, record)
    print(f"Numbers   {options.out}")


if __name__ == "__main__":
    main()
