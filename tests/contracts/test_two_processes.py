"""Every method under two gloo processes with different data: decisions are equal on both ranks."""

import os
import socket
from datetime import timedelta

import method_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gracile.distribute.collective import average_gradients


def run(rank: int, name: str, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    s = cases.session(name, calibration=cases.data(77, rank))
    for epoch in range(cases.EPOCHS):
        cases.train_epoch(s, epoch, rank, sync=average_gradients)
    masks = {a: s.mask(a) for a in s.overlays.addresses("mask")}
    result = s.finish()
    found = {"plan": result.plan.to_json(), "tensors": result.tensors, "masks": masks}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", cases.names())
def test_masks_observers_and_plan_are_equal_on_both_ranks(name, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run, (name, port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert a["plan"] == b["plan"]
    for part in ("masks", "tensors"):
        assert a[part].keys() == b[part].keys()
        for key in a[part]:
            assert torch.equal(a[part][key], b[part][key]), f"{part} {key}"
    if name not in (
        "distill/kd",
        "regularize/slimming",
        "recover/batch_norm",
        "recover/reconstruct",
    ):
        kinds = ("remove", "skip", "factorize", "replace", "exit")
        cuts = sum(a["plan"].count(f'"kind":"{kind}"') for kind in kinds)
        assert len(a["masks"]) + len(a["tensors"]) + cuts > 0
