"""Put smaller layers in the place of one, and prove that they compute what their product does."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gracile.core.plan import Factorize
from gracile.errors import UserError, VerificationError, nearest
from gracile.graph import verify
from gracile.graph.capture import bare_copy
from gracile.graph.skip import forget
from gracile.nn.chain import build, layer_of
from gracile.nn.schemes import chain_of, product

TAKEN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
Inputs = Tensor | tuple[Tensor, ...]
Factors = Mapping[str, Sequence[Tensor]]  # path of a layer -> one for each step with a tensor


def refusal(model: nn.Module, at: str) -> str | None:
    """Why a layer cannot be replaced by others; None if it can."""
    try:
        module = model.get_submodule(at)
        layer_of(module)
    except AttributeError:
        return "it is no module of this model"
    except UserError as e:
        return str(e)
    assert isinstance(module.weight, Tensor)
    named = model.named_parameters(remove_duplicate=False)
    owners = [n for n, p in named if p is module.weight and n != f"{at}.weight"]
    if owners:
        return f"its weight is also '{owners[0]}'; a tied weight stays whole, give each its own"
    if type(module) not in TAKEN:
        return f"{type(module).__name__} computes something of its own"
    return None


def factorized(
    model: nn.Module,
    edits: Sequence[Factorize],
    factors: Factors | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Replace layers by the chains that stand for them, in place; an `nn.Sequential` for each.

    The bias goes to the last layer. Names of new parameters are `<layer>.<number>.weight`.

    Args:
        model: changed in place.
        edits: which, in order.
        factors: the new weights; None leaves zeros, to be loaded.
        optimizer: new weights join the group of the old one, the new bias that of the old bias,
            which may decay less; the state of the old ones is forgotten.

    Raises:
        UserError: no such layer, one that cannot be replaced, or ranks that do not fit it.
    """
    for edit in edits:
        module = _layer(model, edit)
        given = None if factors is None else factors[edit.at]
        chain = chain_of(edit.scheme, layer_of(module), edit.ranks)
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        if given is not None:
            given = [f.to(weight.device) for f in given]
        put(model, edit.at, build(chain, given, bias, dtype=weight.dtype), optimizer)
    return model


def put(
    model: nn.Module, at: str, ours: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a module in a layer's place, on its device, in its mode, trained if its weight was.

    Args:
        model: changed in place.
        at: path of the layer.
        ours: what comes there; its biases are trained, and join the group, as the layer's was, if
            it had one.
        optimizer: see `factorized`.
    """
    module = model.get_submodule(at)
    (weights, biases), (ours_w, ours_b) = _by_role(module), _by_role(ours)
    ours = ours.to(weights[0].device).train(module.training)
    if not biases:
        ours_w, ours_b = ours_w + ours_b, []
    for old, new in ((weights, ours_w), (biases, ours_b)):
        for p in new:
            p.requires_grad_(old[-1].requires_grad)
    home, _, name = at.rpartition(".")
    model.get_submodule(home)._modules[name] = ours
    if optimizer is not None:
        _exchange(optimizer, weights, ours_w)
        _exchange(optimizer, biases, ours_b)


def prove_factorization(
    model: nn.Module, edits: Sequence[Factorize], factors: Factors, examples: Sequence[Inputs]
) -> verify.Proof:
    """Compare the chains with layers that hold their products, in eval and train mode.

    What is proven is that the chains sit where the layers sat, with their strides, paddings and
    biases; how near a product is to the layer's own weight is the scheme's business.

    Raises:
        UserError: see `factorized`.
        VerificationError: the two differ.
    """
    whole: nn.Module = bare_copy(model)
    dtype, whole, inputs = verify.to_compare(whole, examples)
    for edit in edits:
        module = _layer(whole, edit)
        layer = layer_of(module)
        chain = chain_of(edit.scheme, layer, edit.ranks)
        weight = product(chain, [_double(f) for f in factors[edit.at]], layer)
        with torch.no_grad():
            module.get_parameter("weight").copy_(weight)
    if dtype == torch.float64:
        factors = {at: [_double(f) for f in fs] for at, fs in factors.items()}
    chained = factorized(bare_copy(whole), edits, factors)
    try:
        worst, checks = verify._compare(whole, chained, [], inputs, dtype)
    except (verify._Different, AttributeError) as e:
        names = ", ".join(f"'{edit.at}'" for edit in edits)
        mode = "train" if getattr(e, "training", False) else "eval"
        raise VerificationError(
            f"factorizing {names} changed more than weights, in {mode} mode: {e}. The model was "
            "left as it was; leave these layers out, if the forward reads them by itself."
        ) from None
    tolerance = verify.TOLERANCE[dtype]
    return verify.Proof(str(dtype).removeprefix("torch."), worst, tolerance, checks)


def _layer(model: nn.Module, edit: Factorize) -> nn.Module:
    if (why := refusal(model, edit.at)) is not None:
        known = [p for p, m in model.named_modules() if type(m) in TAKEN]
        raise UserError(
            f"'{edit.at}' cannot be factorized: {why.rstrip('.')}.{nearest(edit.at, known)}"
        )
    return model.get_submodule(edit.at)


def _double(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _by_role(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that are no biases, and biases."""
    named = list(module.named_parameters())
    biases = [p for n, p in named if n.endswith("bias")]
    return [p for n, p in named if not n.endswith("bias")], biases


def _exchange(
    optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
) -> None:
    """New parameters in the place of old ones; none join where the old ones were not trained."""
    gone = {id(p) for p in old}
    home = next(
        (g for g in optimizer.param_groups if any(id(p) in gone for p in g["params"])), None
    )
    if home is not None:
        home["params"].extend(new)
    forget(optimizer, old)
