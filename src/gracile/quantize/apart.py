"""Which attention and recurrent layers a quantizing method takes apart first.

Whole, such a layer is one operator that no runtime here computes in integers with our grids.
"""

from typing import Any, Literal

from gracile.core.plan import Decompose
from gracile.graph.decompose import ATTENTION, RECURRENT, decompose_edits, refusal
from gracile.recipe.fields import Selector

Which = Literal["auto"] | bool | Selector


def taken_apart(s: Any, which: Any, weights: Any, by: str) -> list[Decompose]:
    """The edits that take layers apart, in order; none for those that are apart already.

    Args:
        s: the Session.
        which: "auto" attention, True recurrent layers as well, False none, or a selector.
        weights: selector of what may be quantized, None for all: a layer with none of these is left
            whole.
        by: the recipe's name of the entry.
    """
    if which is False:
        return []
    nodes = s.graph.of_op(*(ATTENTION if which == "auto" else (*ATTENTION, *RECURRENT)))
    for chosen in (which, weights):
        if not isinstance(chosen, bool) and chosen not in ("auto", None):
            names = set(s.tensors(chosen))
            nodes = [n for n in nodes if names & set(n.params.values())]
    able = []
    for node in nodes:
        why = refusal(s.graph, node)
        if why is None:
            able.append(node.id)
        elif which != "auto":
            s.warn("quantize.whole", f"'{node.id}' stays whole and in float: {why}.")
    return decompose_edits(s.graph, able, by)


def note_whole(s: Any, by: str) -> None:
    """Tell the ledger of recurrent layers that could have been taken apart."""
    for node in s.graph.of_op(*RECURRENT):
        why = f"'{node.op}' runs in float while it is whole; decompose: true takes it apart"
        for name in (node.id, *node.params.values()):
            s.note(name, "precision", "float", "not_asked", why, by)
