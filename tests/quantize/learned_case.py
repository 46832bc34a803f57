"""What the tests of methods with learned ranges share: a started method, and a resumed one."""

import copy

import torch
from quant_session import FakeSession, batch, net, run

from gracile import registry


def start(name, model=None, *, epochs=3, **options):
    """(session, method, optimizer) of `quantize: <name>`, attached."""
    options.setdefault("when", {"start": "0ep"})
    session = FakeSession(model or net(), epochs=epochs)
    cls = registry.get("method", f"quantize/{name}").obj
    method = cls("q", cls.Options(**options))
    session.methods = [method]
    method.on_attach(session)
    return session, method, session.optimizer


def fired(name, model=None, **options):
    """The same after its first firing."""
    session, method, optimizer = start(name, model, **options)
    method.on_fire(session, 1.0)
    return session, method, optimizer


def trained(name, *, epochs=3, **options):
    """(model, plan, tensors, method) at the end."""
    session, method, optimizer = start(name, epochs=epochs, **options)
    run(session, method, optimizer, epochs)
    return (*session.finish(method), method)


def resumed(name, stop_after, *, epochs=3, **options):
    """The same, stopped after some epochs and gone on with in another session."""
    session, method, optimizer = start(name, epochs=epochs, **options)
    run(session, method, optimizer, stop_after)
    stored = copy.deepcopy(
        {
            "method": method.state_dict(),
            "model": session.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
    )
    session, method, optimizer = start(name, net(seed=5), epochs=epochs, **options)
    method.load_state_dict(stored["method"])
    session.model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    run(session, method, optimizer, epochs, first=stop_after)
    return (*session.finish(method), method)


def same(a, b):
    """Two results of the above are equal, bit by bit."""
    assert a[1] == b[1]
    assert a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][k], b[2][k]) for k in a[2])
    with torch.no_grad():
        assert torch.equal(a[0](batch(1)), b[0](batch(1)))
