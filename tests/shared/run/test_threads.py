"""Threads are counted in whole CPUs, also where torch is there already."""

import os

import pytest
import torch

from shared.run.threads import use_threads


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1.0, 1), (2.9, 2)])
def test_a_process_computes_with_as_many_threads_as_whole_cpus(cpus, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = torch.get_num_threads()
    try:
        use_threads(cpus)
        assert torch.get_num_threads() == threads
        assert os.environ["OMP_NUM_THREADS"] == str(threads)
    finally:
        torch.set_num_threads(before)
