"""What is right and wrong with machines, as functions of what they told."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.doctor.machine import Folder, Machine, python_required, requirements
from shared.in_words import in_bytes

GB = 10**9
LEAST_DISK_BYTES = 1 * GB  # a run's smallest checkpoint and its logs
LITTLE_DISK_BYTES = 20 * GB  # of a few checkpoints of a student of a billion parameters
FULL_SHARE = 0.05  # Ray writes nothing to a disk with less than this left
LITTLE_MEMORY_BYTES = 4 * GB
LITTLE_SHARED_BYTES = 2 * GB
LITTLE_OPEN_FILES = 1024
# Packages whose releases must be one over all nodes, since they speak to each other.
SPOKEN = ("ray", "torch", "pyarrow", "transformers")


class Verdict(StrEnum):
    """What a finding means for a run."""

    OK = "ok"
    NOTE = "-"  # good to know
    WARN = "warn"  # it runs, slower or not everywhere
    FATAL = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what it is about, what was seen, and the way out where one is needed."""

    about: str
    verdict: Verdict
    said: str
    cure: str = ""


def examine(machine: Machine) -> list[Finding]:
    """All findings of one machine, in the order in which they are printed."""
    found = [
        *_python(machine),
        *_packages(machine, requirements()),
        *_gpus(machine),
        _cpu(machine),
        _memory(machine),
        _shared_memory(machine),
        _open_files(machine),
        *(_disk(name, folder) for name, folder in machine.folders.items()),
        *_tokens(machine),
    ]
    return [finding for finding in found if finding.said]


def compare(here: Machine, others: Sequence[Machine]) -> list[Finding]:
    """How other nodes differ from this one where they must not, or where numbers change."""
    found = []
    for other in others:
        about = f"node {other.node}"
        told = {"python": (_minor(here.python), _minor(other.python))}
        told |= {name: (here.packages.get(name), other.packages.get(name)) for name in SPOKEN}
        unlike = {name: pair for name, pair in told.items() if pair[0] != pair[1]}
        for name, (mine, theirs) in unlike.items():
            cure = f"install {name} {mine} there, or run from {name} {theirs}"
            said = f"{name} is {theirs or 'missing'}, here it is {mine or 'missing'}"
            found.append(Finding(about, Verdict.FATAL, said, cure))
        if other.features != here.features:
            said = "another CPU: the last digits of what it computes differ from this machine's"
            found.append(Finding(about, Verdict.NOTE, said))
        if not unlike:
            found.append(Finding(about, Verdict.OK, f"the same releases; {_has(other)}"))
    return found


def _python(machine: Machine) -> Iterator[Finding]:
    if machine.python in SpecifierSet(python_required()):
        yield Finding("python", Verdict.OK, f"{machine.python} on {machine.system}")
    else:
        said = f"{machine.python}, and Tutelage needs {python_required()}"
        yield Finding("python", Verdict.FATAL, said, "make the environment with another Python")


def _packages(machine: Machine, required: Sequence[Requirement]) -> Iterator[Finding]:
    """A line for all that are right, and one for each that is not."""
    right = 0
    for requirement in required:
        version = machine.packages.get(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            right += 1
            continue
        said = f"{version or 'missing'}, and Tutelage needs {requirement.specifier}"
        cure = f'pip install "{requirement}"'
        yield Finding(requirement.name, Verdict.FATAL, said, cure)
    versions = ", ".join(f"{name} {machine.packages.get(name)}" for name in SPOKEN)
    yield Finding("packages", Verdict.OK, f"{right} of {len(required)} as required: {versions}")


def _gpus(machine: Machine) -> Iterator[Finding]:
    torch, gpus = machine.torch, machine.gpus
    if torch is None:
        cure = 'python -c "import torch" shows what is missing; install torch again'
        yield Finding("torch", Verdict.FATAL, "cannot be imported", cure)
        return
    if not gpus and not torch.gpus:
        yield Finding("GPU", Verdict.NOTE, "none; models run on the CPU")
        return
    kinds = {gpu.name: gpu.memory_bytes for gpu in gpus}
    named = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in kinds.items())
    said = f"{max(len(gpus), torch.gpus)}: {named or torch.accelerator}"
    if torch.accelerator is None:
        cure = "install the build of torch for CUDA, as pytorch.org/get-started says"
        yield Finding("GPU", Verdict.WARN, f"{said}; torch is built for CPUs alone", cure)
    elif torch.gpus < len(gpus):
        cure = "look at CUDA_VISIBLE_DEVICES, and whether the driver is as new as torch's CUDA"
        seen = f"{said}; torch ({torch.accelerator}) finds {torch.gpus}"
        yield Finding("GPU", Verdict.WARN, seen, cure)
    else:
        yield Finding("GPU", Verdict.OK, f"{said}; torch for {torch.accelerator}")
        yield _nccl(torch.gpus, torch.nccl)


def _nccl(gpus: int, nccl: str | None) -> Finding:
    if nccl is None and gpus > 1:
        cure = "install a build of torch that has NCCL"
        return Finding("NCCL", Verdict.WARN, "missing; several GPUs cannot train together", cure)
    return Finding("NCCL", Verdict.OK if nccl else Verdict.NOTE, nccl or "missing; one GPU")


def _cpu(machine: Machine) -> Finding:
    said = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    if "avx512_bf16" in machine.features:
        said += "; bfloat16 instructions, under which 4-bit weights keep their plain kernel"
    elif machine.features and "avx2" not in machine.features:
        return Finding("CPU", Verdict.WARN, f"{said} without AVX2; quantised weights are slow")
    return Finding("CPU", Verdict.OK, said)


def _memory(machine: Machine) -> Finding:
    free, total = machine.free_memory_bytes, machine.memory_bytes
    said = f"{in_bytes(free)} free of {in_bytes(total)}"
    if free < LITTLE_MEMORY_BYTES:
        cure = "end what uses it: Ray kills processes once a node is at 95 %"
        return Finding("memory", Verdict.WARN, said, cure)
    return Finding("memory", Verdict.OK, said)


def _shared_memory(machine: Machine) -> Finding:
    shared = machine.shared_memory
    if shared is None:
        return Finding("shared memory", Verdict.NOTE, "/dev/shm is not there; Ray uses files")
    said = f"{in_bytes(shared.free_bytes)} free of {in_bytes(shared.total_bytes)}"
    if shared.free_bytes < LITTLE_SHARED_BYTES:
        cure = "give the container more (docker run --shm-size=8g; on Kubernetes an emptyDir of "
        cure += "medium Memory at /dev/shm)"
        return Finding("shared memory", Verdict.WARN, said, cure)
    return Finding("shared memory", Verdict.OK, said)


def _open_files(machine: Machine) -> Finding:
    if 0 <= machine.open_files < LITTLE_OPEN_FILES:
        said = f"at most {machine.open_files} in a process"
        return Finding("open files", Verdict.WARN, said, "ulimit -n 65536")
    return Finding("open files", Verdict.OK, "")


def _disk(name: str, folder: Folder) -> Finding:
    said = f"{in_bytes(folder.free_bytes)} free at {folder.path}"
    about = f"disk: {name}"
    if not folder.writable:
        cure = "give write access, or name another folder"
        return Finding(about, Verdict.FATAL, f"{folder.path} may not be written to", cure)
    if folder.free_bytes < LEAST_DISK_BYTES:
        return Finding(about, Verdict.FATAL, said, "free space, or name another folder")
    if folder.free_bytes < FULL_SHARE * folder.total_bytes:
        cure = "free space: Ray puts no objects on a disk that is 95 % full"
        return Finding(about, Verdict.WARN, said, cure)
    if folder.free_bytes < LITTLE_DISK_BYTES:
        cure = "a checkpoint of a full student takes 16 bytes a parameter; free space for three"
        return Finding(about, Verdict.WARN, said, cure)
    return Finding(about, Verdict.OK, said)


def _tokens(machine: Machine) -> Iterator[Finding]:
    there = [name for name, found in machine.tokens.items() if found]
    said = f"{', '.join(there)} (not shown)" if there else "none; gated models need HF_TOKEN"
    yield Finding("tokens", Verdict.NOTE, said)
    if machine.hub_offline:
        said = "HF_HUB_OFFLINE is set: only what is in the cache can be named"
        yield Finding("hub", Verdict.NOTE, said)


def _has(machine: Machine) -> str:
    gpus = f", {len(machine.gpus)} GPUs" if machine.gpus else ""
    free = in_bytes(machine.free_memory_bytes)
    return f"{machine.cores} cores{gpus}, {free} free of {in_bytes(machine.memory_bytes)}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
