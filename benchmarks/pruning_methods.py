"""The recipes of the pruning benchmark: one way to prune each, all trained for as long."""

from collections.abc import Mapping
from typing import Any

Methods = Mapping[str, Any]
EPOCHS = 1
MACS = 0.5  # share of the MACs that goes in structured pruning
ZEROS = 0.85  # share of the weights that goes in unstructured pruning
START, THIRD = {"at": "0ep"}, {"at": "0.33ep"}
GROWING = {"start": "0ep", "stop": "0.5ep", "every": "0.05ep"}
WEIGHTS = ["type:Conv2d", "!conv1.weight"]


def cut(criterion: Any = "l1", when: Any = START, ratio: Any = MACS, **options: Any) -> Methods:
    """Whole channels of the whole network, ranked together, to half of the MACs."""
    return {
        "cut": {
            "prune": "structure",
            "ratio": ratio,
            "target": "macs",
            "criterion": criterion,
            "when": when,
            **options,
        }
    }


def zero(
    criterion: Any = "l1", when: Any = START, sparsity: Any = ZEROS, **options: Any
) -> Methods:
    """Single weights of all convolutions but the first."""
    return {
        "zero": {
            "prune": "gradual",
            "weights": WEIGHTS,
            "criterion": criterion,
            "sparsity": sparsity,
            "when": when,
            **options,
        }
    }


def ramp(final: float) -> dict[str, Any]:
    """The cubic ramp of Zhu and Gupta, from a tenth of the way."""
    return {"ramp": "cubic", "initial": final / 10, "final": final}


REPAIR = {"repair": {"recover": "reconstruct", "when": START}}
TEACHER = {"teacher": {"distill": "kd", "temperature": 4, "alpha": 0.1}}
SLIMMING = {
    "slim": {"regularize": "slimming", "strength": 1e-3, "when": {"start": "0ep", "stop": "0.33ep"}}
}
LASSO = {
    "lasso": {
        "regularize": "penalty",
        "weights": WEIGHTS,
        "penalty": "group_lasso",
        "strength": 5e-4,
        "when": {"start": "0ep", "stop": "0.33ep"},
    }
}
SPARSE = {
    "sparse": {
        "regularize": "penalty",
        "weights": WEIGHTS,
        "penalty": "l1",
        "granularity": "element",
        "strength": 1e-5,
        "when": {"start": "0ep", "stop": "0.33ep"},
    }
}
GATES = {
    "gates": {
        "prune": "gates",
        "weights": WEIGHTS,
        "sparsity": {"ramp": "linear", "initial": 0.1, "final": ZEROS},
        "gate_lr": 0.05,
        "when": GROWING,
        "freeze": "0.67ep",
    }
}
INT8 = {"int8": {"quantize": "qat", "when": {"start": "0.67ep"}}}

STRUCTURED: Mapping[str, Methods] = {
    "random": cut("random"),
    "L1": cut("l1"),
    "L1, layer by layer": cut("l1", scope="layer"),
    "L2": cut("l2"),
    "geometric median": cut("geometric_median"),
    "BatchNorm scale": cut("norm_scale"),
    "APoZ": cut("apoz"),
    "mean activation": cut("mean_activation"),
    "Taylor": cut("taylor"),
    "Fisher": cut("fisher"),
    "Taylor in steps": cut("taylor", GROWING, ramp(MACS)),
    "Taylor, reconstruction": {**cut("taylor"), **REPAIR},
    "Taylor, distillation": {**cut("taylor"), **TEACHER},
    "network slimming": {**SLIMMING, **cut("norm_scale", THIRD)},
    "group lasso": {**LASSO, **cut("l2", THIRD)},
    "greedy": {"cut": {"prune": "greedy", "ratio": MACS, "target": "macs", "when": START}},
}
UNSTRUCTURED: Mapping[str, Methods] = {
    "random": zero("random"),
    "magnitude, layer by layer": zero("l1"),
    "magnitude, global": zero("l1", scope="global"),
    "normed magnitude, global": zero("normed", scope="global"),
    "LAMP, global": zero("lamp", scope="global"),
    "SNIP, global": zero("snip", scope="global"),
    "Fisher, global": zero("fisher", scope="global"),
    "AGP, layer by layer": zero("l1", GROWING, ramp(ZEROS)),
    "AGP, LAMP": zero("lamp", GROWING, ramp(ZEROS), scope="global"),
    "AGP, masked weights trained": zero(
        "lamp", GROWING, ramp(ZEROS), scope="global", masked="trained", scores_from="dense"
    ),
    "LAMP, reconstruction": {**zero("lamp", scope="global"), **REPAIR},
    "AGP, LAMP, distillation": {**zero("lamp", GROWING, ramp(ZEROS), scope="global"), **TEACHER},
    "L1 penalty, then LAMP": {**SPARSE, **zero("lamp", THIRD, scope="global")},
    "AGP, LAMP, INT8": {**zero("lamp", GROWING, ramp(ZEROS), scope="global"), **INT8},
    "gates (RB, L0)": GATES,
    "gates (RB, L0), INT8": {**GATES, **INT8},
    "movement": {
        "scores": {
            "prune": "movement",
            "weights": WEIGHTS,
            "sparsity": ramp(ZEROS),
            "when": {"start": "0.1ep", "stop": "0.6ep", "every": "0.05ep"},
            "freeze": "0.67ep",
        }
    },
}
REFEREES = ("random", "small network")
