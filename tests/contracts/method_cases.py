"""A small network and, for every registered method, a recipe that uses it: what contracts run over.

A new method adds its line to `CASES`; `test_every_method_has_a_case` says so if it is missing.
"""

import torch
from torch import nn

from gracile import registry
from gracile.recipe.load import loads
from gracile.train.session import Session

FILTERS = 'weights: "type:Conv2d", granularity: filter'
RAMP = "{ramp: cubic, initial: 0.1, final: 0.5}"
GRADUAL = f"{{prune: gradual, {FILTERS}, sparsity: {RAMP}, when: {{start: 0ep, stop: 2ep}}}}"
CASES = {
    "prune/gradual": f"m: {GRADUAL}",
    "prune/oneshot": 'm: {prune: oneshot, weights: "type:Conv2d", sparsity: 0.5, when: {at: 1ep}}',
    "prune/thin": f"filters: {GRADUAL}\n  m: {{prune: thin, when: {{at: 2ep}}}}",
    "prune/structure": f"m: {{prune: structure, ratio: {RAMP}, when: {{start: 0ep, stop: 2ep}}}}",
    "prune/greedy": "m: {prune: greedy, ratio: 0.4, target: macs, step: 0.3, when: {at: 2ep}}",
    "prune/legr": "m: {prune: legr, ratio: 0.4, target: macs, generations: 12, when: {at: 2ep}}",
    "prune/depth": "m: {prune: depth, count: 1, when: {at: 1ep}}",
    "prune/gates": 'm: {prune: gates, weights: "type:Conv2d", sparsity: 0.5, gate_lr: 1, '
    "when: {start: 0ep, stop: 2ep}}",
    "prune/movement": 'm: {prune: movement, weights: "type:Conv2d", sparsity: '
    "{ramp: linear, final: 0.5}, when: {start: 0ep, stop: 2ep, every: 1mb}, freeze: 2ep}",
    "prune/threshold": 'm: {prune: threshold, weights: "type:Conv2d", threshold: 0.6, '
    "relative_to: std, when: {start: 0ep, stop: 2ep}}",
    "prune/splicing": 'm: {prune: splicing, weights: "type:Conv2d", sensitivity: 0.3, '
    "when: {start: 0ep, stop: 2ep, every: 2mb}}",
    "prune/rnn": "m: {prune: rnn, weights: inner, q: 0.06, ramp_at: 1ep, when: {start: 0ep}}",
    "prune/drop": 'm: {prune: drop, weights: "type:Conv2d", range: [0.1, 0.5], lifetime: span, '
    "when: {start: 0ep, every: 2mb}}",
    "prune/n_m": "m: {prune: n_m, weights: [inner, outer], masked: trained, sr_ste: 2e-4, "
    "when: {start: 0ep, stop: 2ep, every: 1mb}}",
    "prune/keep_zeros": 'few: {prune: oneshot, weights: "type:Conv2d", sparsity: 0.5, '
    'when: {at: 0ep}}\n  m: {prune: keep_zeros, weights: "type:Conv2d", when: {at: 1ep}}',
    "prune/lottery": 'm: {prune: lottery, weights: "type:Conv2d", sparsity: 0.3, rewind_to: 2mb, '
    "when: {start: 1ep, every: 2mb}}",
    "recover/batch_norm": "m: {recover: batch_norm, when: {at: end}}",
    "recover/accuracy": "int8: {quantize: ptq, bits: 2}\n  m: {recover: accuracy, max_drop: 0, "
    "when: {at: end}}",
    "recover/bias": "int8: {quantize: ptq}\n  m: {recover: bias, mode: full, when: {at: end}}",
    "recover/equalize": "m: {recover: equalize, when: {at: end}}\n  int8: {quantize: ptq}",
    "recover/reconstruct": f"filters: {GRADUAL}\n  m: {{recover: reconstruct, when: {{at: 2ep}}}}",
    "recover/ladder": f"cut: {{prune: structure, ratio: {RAMP}, when: {{start: 0ep, stop: 2ep}}}}\n"
    "  int8: {quantize: ptq, bits: 4}\n  m: {recover: ladder, max_drop: 0, layerwise_epochs: 0.5}",
    "regularize/penalty": 'm: {regularize: penalty, weights: "type:Conv2d", penalty: group_lasso, '
    "strength: {ramp: linear, final: 0.05}, threshold: 0.08, when: {start: 0ep, stop: 2ep}}",
    "regularize/slimming": "m: {regularize: slimming, strength: 1e-3}",
    "distill/kd": "m: {distill: kd, temperature: 2, alpha: 0.3}",
    "distill/features": "hints: {distill: features, at: {relu_1: relu_1, add: add}, "
    f"loss: fitnets}}\n  filters: {GRADUAL}\n  thin: {{prune: thin, when: {{at: 2ep}}}}\n"
    "  m: {distill: features, weight: 2}",
    "early_exit/branches": "m: {early_exit: branches, at: [relu], imitate: 1, "
    "goal: {mean_cost: 0.8}, when: {at: 1ep}}",
    "lowrank/factorize": "m: {lowrank: factorize, weights: [inner, outer, head], round_to: 2, "
    "rank: {name: knapsack, ratio: 0.6}, when: {start: 0ep, stop: 2ep}}",
    "lowrank/replace": "m: {lowrank: replace, block: {name: separable, norm: true, "
    "activation: relu}, fit: true, when: {start: 0ep, stop: 2ep}}",
    "quantize/ptq": "m: {quantize: ptq, when: {at: end}}",
    "quantize/dynamic": "m: {quantize: dynamic, weight_bits: 6, when: {at: 1ep}}",
    "quantize/share": 'm: {quantize: share, weights: "type:Conv2d", bits: 3, '
    "codebook_lr: 1e-2, when: {start: 1ep}}",
    "quantize/product": "m: {quantize: product, weights: [inner, outer], subspace: 4, words: 8, "
    "correct: true, rounds: 2, codebook_lr: 1e-2, when: {start: 1ep}}",
    "quantize/levels": "m: {quantize: levels, bits: 3, bucket: 50, rounding: stochastic, "
    "when: {start: 1ep}}",
    "quantize/qat": "m: {quantize: qat, edges_bits: 6, precision: {bits: [[4, 4], [8, 8]], "
    "limit: {size: 0.7, bit_operations: 0.7}}, when: {start: 1ep}}",
    "quantize/lsq": "m: {quantize: lsq, bits: 4, edges_bits: 8, when: {start: 1ep}}",
    "quantize/learned": "m: {quantize: learned, weight_symmetric: false, freeze: 2ep, "
    "overrides: [{weights: '**', weight_bits: 6}, {weights: head, bits: float}], "
    "when: {start: 0ep}}",
    "quantize/pact": "m: {quantize: pact, bits: 4, clip_decay: 1e-3, when: {start: 1ep}}",
    "quantize/dorefa": "m: {quantize: dorefa, bits: 4, gradient_bits: 6, when: {start: 0ep}}",
    "quantize/wrpn": "m: {quantize: wrpn, bits: 4, when: {start: 0ep}}",
    "quantize/binary": "m: {quantize: binary, activations_from: 1ep, when: {start: 2ep}}",
}
EPOCHS, STEPS, BATCH = 3, 3, 8


class Tiny(nn.Module):
    """Conv, BatchNorm, a residual block, pooling, a head."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.outer(self.relu(self.bn2(self.inner(x)))))
        return self.head(self.pool(x).flatten(1))


def names() -> list[str]:
    return registry.names("method")


def recipe(name: str, seed: int = 0):
    return loads(
        f"recipe: 1\nseed: {seed}\ntrain: {{epochs: {EPOCHS}}}\nmethods:\n  {CASES[name]}\n",
        name="case.yaml",
    )


def data(epoch: int, rank: int = 0):
    g = torch.Generator().manual_seed(1000 * rank + epoch)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=g), torch.randint(0, 4, (BATCH,), generator=g))
        for _ in range(STEPS)
    ]


def session(name: str, *, calibration=None, seed: int = 0) -> Session:
    torch.manual_seed(seed)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return Session(
        model,
        recipe(name, seed),
        optimizer,
        example=data(99)[0][0][:4],
        steps_per_epoch=STEPS,
        calibration=calibration or data(77),
        loss_of=nn.functional.cross_entropy,
        val=lambda: data(55),
        train=data(66),
    )


def train_epoch(s: Session, epoch: int, rank: int = 0, sync=lambda model: None) -> None:
    s.model.train()
    s.on_epoch_begin(epoch)
    for batch, (x, y) in enumerate(data(epoch, rank)):
        s.on_minibatch_begin(epoch, batch, STEPS)
        s.model.train()
        loss = nn.functional.cross_entropy(s.model(x), y)
        loss = s.before_backward_pass(epoch, batch, STEPS, loss)
        s.optimizer.zero_grad()
        loss.backward()
        sync(s.model)
        s.before_parameter_optimization(epoch, batch, STEPS)
        s.optimizer.step()
        s.on_minibatch_end(epoch, batch, STEPS)
    s.on_epoch_end(epoch)


def finished(name: str, **options):
    s = session(name, **options)
    for epoch in range(EPOCHS):
        train_epoch(s, epoch)
    return s, s.finish()
