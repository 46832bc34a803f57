"""Zeros of tensors, counted by hand."""

import torch
from torch import nn

from gracile.analyze.sparsity import sparsity_rows, to_csv, total


def net():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
        model[0].weight[0] = 0  # a filter
        model[0].weight[:, 1] = 0  # a channel
        model[0].weight[1, 0, 0, 0] = 0  # and one more
        model[3].weight[0, :3] = 0
    return model


def test_every_granularity_by_hand():
    conv, linear = sparsity_rows(net())
    assert (conv.tensor, conv.shape, conv.size) == ("0.weight", "4x2x3x3", 72)
    assert conv.nnz == 72 - 18 - 27 - 1
    assert (conv.kernel, conv.filter, conv.channel) == (5 / 8, 1 / 4, 1 / 2)
    assert conv.element == 46 / 72
    assert conv.mean == conv.mean_abs == 26 / 72
    assert (linear.nnz, linear.kernel, linear.filter, linear.channel) == (13, None, 0, 0)


def test_the_total_counts_weights_once_and_every_takes_all():
    model = net()
    assert total(sparsity_rows(model)).nnz == 72 + 16 - 46 - 3
    names = [r.tensor for r in sparsity_rows(model, every=True)]
    assert names == [n for n, _ in model.named_parameters()]
    model.add_module("again", nn.Linear(8, 2))
    model.again.weight = model[3].weight
    assert total(sparsity_rows(model)).size == 72 + 16


def test_csv_has_a_line_a_tensor():
    head, conv, linear = to_csv(sparsity_rows(net())).splitlines()
    assert head == "tensor,shape,size,nnz,element,kernel,filter,channel,mean,std,mean_abs"
    assert conv.startswith("0.weight,4x2x3x3,72,26,0.6388889,0.625,0.25,0.5,")
    assert linear.startswith("3.weight,2x8,16,13,0.1875,,0,0,")
