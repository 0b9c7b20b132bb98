"""Each fault of a machine is found, named with its value and its cure; a sound one has none."""

from dataclasses import replace

import pytest

from cluster.doctor.findings import GB, Verdict, compare, examine
from cluster.doctor.machine import Folder, Gpu, Machine, Torch, python_required, requirements

ROOM = Folder("/runs", 500 * GB, 1000 * GB, writable=True)
SOUND = Machine(
    node="a",
    system="Linux 6",
    python="3.11.9",
    packages={r.name: next(iter(r.specifier)).version for r in requirements()}
    | {"torch": "2.13.1+cu130", "ray": "2.60.1"},
    cores=8,
    features=("avx2", "avx512f"),
    memory_bytes=64 * GB,
    free_memory_bytes=48 * GB,
    shared_memory=Folder("/dev/shm", 30 * GB, 32 * GB, writable=True),
    open_files=65536,
    gpus=(Gpu("H200", 141 * 2**30, "580.1"),) * 2,
    torch=Torch("CUDA 13.0", 2, "2.28.3"),
    folders={"runs": ROOM},
    tokens={"Hugging Face": True, "Ray": False},
    hub_offline=False,
)


def about(machine: Machine, subject: str):
    (found,) = [f for f in examine(machine) if f.about == subject]
    return found


def packages(**versions: str | None) -> dict[str, str | None]:
    return SOUND.packages | versions


def test_each_requirement_of_the_package_is_looked_at():
    names = {r.name for r in requirements()}
    assert {"ray", "torch", "transformers", "peft", "deepspeed", "pyarrow"} <= names
    assert not {"ruff", "trl"} & names, "extras are nobody's need"
    assert ">=3.11" in python_required()


def test_a_sound_machine_has_nothing_to_mend():
    found = examine(replace(SOUND, packages=_least()))
    assert len(found) > 6
    assert {f.verdict for f in found} <= {Verdict.OK, Verdict.NOTE}
    assert not [f for f in found if f.cure]


def _least() -> dict[str, str | None]:
    """Every package at the lowest release that is allowed."""
    return {
        r.name: min((s.version for s in r.specifier if s.operator == ">="), default="1")
        for r in requirements()
    }


FAULTS = {
    "python": ({"python": "3.10.2"}, "python", Verdict.FATAL, "3.10.2", "another Python"),
    "an old release": (
        {"packages": packages(ray="2.59.0")},
        "ray",
        Verdict.FATAL,
        "2.59.0, and Tutelage needs <2.61,>=2.60",
        "pip install",
    ),
    "a missing package": (
        {"packages": packages(peft=None)},
        "peft",
        Verdict.FATAL,
        "missing",
        'pip install "peft',
    ),
    "a torch that does not load": (
        {"torch": None},
        "torch",
        Verdict.FATAL,
        "cannot be imported",
        "install torch",
    ),
    "GPUs under a torch for CPUs": (
        {"torch": Torch(None, 0, None)},
        "GPU",
        Verdict.WARN,
        "2: H200 (141 GiB); torch is built for CPUs alone",
        "CUDA",
    ),
    "a hidden GPU": (
        {"torch": Torch("CUDA 13.0", 1, "2.28.3")},
        "GPU",
        Verdict.WARN,
        "torch (CUDA 13.0) finds 1",
        "CUDA_VISIBLE_DEVICES",
    ),
    "no NCCL": (
        {"torch": Torch("CUDA 13.0", 2, None)},
        "NCCL",
        Verdict.WARN,
        "cannot train together",
        "NCCL",
    ),
    "an old CPU": ({"features": ("sse2",)}, "CPU", Verdict.WARN, "without AVX2", ""),
    "little memory": (
        {"free_memory_bytes": GB},
        "memory",
        Verdict.WARN,
        "1.0 GB free of 64.0 GB",
        "95 %",
    ),
    "a container's shared memory": (
        {"shared_memory": Folder("/dev/shm", 64 * 2**20, 64 * 2**20, writable=True)},
        "shared memory",
        Verdict.WARN,
        "67.1 MB free",
        "--shm-size",
    ),
    "few files": ({"open_files": 256}, "open files", Verdict.WARN, "at most 256", "ulimit -n"),
    "a full disk": (
        {"folders": {"runs": replace(ROOM, free_bytes=GB // 2)}},
        "disk: runs",
        Verdict.FATAL,
        "500.0 MB free at /runs",
        "free space",
    ),
    "a disk that Ray calls full": (
        {"folders": {"runs": replace(ROOM, free_bytes=40 * GB)}},
        "disk: runs",
        Verdict.WARN,
        "40.0 GB free",
        "95 %",
    ),
    "a small disk": (
        {"folders": {"runs": Folder("/runs", 15 * GB, 20 * GB, writable=True)}},
        "disk: runs",
        Verdict.WARN,
        "15.0 GB free",
        "checkpoint",
    ),
    "a folder of somebody else's": (
        {"folders": {"runs": replace(ROOM, writable=False)}},
        "disk: runs",
        Verdict.FATAL,
        "/runs may not be written to",
        "write access",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_cure_is_said(fault):
    changes, subject, verdict, said, cure = FAULTS[fault]
    found = about(replace(SOUND, **changes), subject)
    assert found.verdict is verdict
    assert said in found.said
    assert cure in found.cure


NOTES = {
    "no GPU": ({"gpus": (), "torch": Torch(None, 0, None)}, "GPU", "none; models run on the CPU"),
    "a CPU on which 4-bit kernels err": (
        {"features": ("avx2", "avx512_bf16")},
        "CPU",
        "4-bit weights keep their plain kernel",
    ),
    "no shared memory": ({"shared_memory": None}, "shared memory", "is not there"),
    "a token": ({}, "tokens", "Hugging Face (not shown)"),
    "no token": ({"tokens": {"Ray": False}}, "tokens", "none; gated models need HF_TOKEN"),
    "a hub that is switched off": ({"hub_offline": True}, "hub", "HF_HUB_OFFLINE is set"),
}


@pytest.mark.parametrize("note", NOTES)
def test_what_is_good_to_know_is_no_fault(note):
    changes, subject, said = NOTES[note]
    found = about(replace(SOUND, **changes), subject)
    assert found.verdict in (Verdict.OK, Verdict.NOTE)
    assert said in found.said


def test_a_node_that_is_alike_is_said_to_be_so():
    (found,) = compare(SOUND, [replace(SOUND, node="b")])
    assert found.verdict is Verdict.OK
    assert "the same releases; 8 cores, 2 GPUs, 48.0 GB free" in found.said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packages": packages(ray="2.60.0")}, "ray is 2.60.0, here it is 2.60.1"),
        ({"packages": packages(pyarrow=None)}, "pyarrow is missing, here it is"),
        ({"python": "3.12.1"}, "python is 3.12, here it is 3.11"),
    ],
)
def test_a_node_whose_processes_cannot_speak_to_ours_is_fatal(changes, said):
    (found,) = compare(SOUND, [replace(SOUND, node="b", **changes)])
    assert (found.about, found.verdict) == ("node b", Verdict.FATAL)
    assert said in found.said
    assert found.cure


def test_patch_releases_of_python_may_differ_and_another_cpu_is_noted():
    other = replace(SOUND, node="b", python="3.11.2", features=("avx2",))
    verdicts = [f.verdict for f in compare(SOUND, [other])]
    assert verdicts == [Verdict.NOTE, Verdict.OK]
