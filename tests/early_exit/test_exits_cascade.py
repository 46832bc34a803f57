import exit_case as case
import pytest
import torch

from gracile.analyze.cost import totals
from gracile.early_exit.cascade import Cascade, exit_macs
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.stages import input_names, stages
from gracile.nn.exits import all_exits, choice_of, entropy

INT8 = "\n  int8: {quantize: ptq, when: {at: end}}"
BEFORE = "cut: {prune: structure, ratio: 0.4, when: {at: 0ep}}\n  "
AFTER = "\n  cut: {prune: structure, ratio: 0.4, when: {at: 1ep}}"


@pytest.fixture(scope="module")
def result():
    return case.finished()


def at_thresholds(model, at):
    choice_of(model).thresholds.copy_(torch.tensor(at))
    return model


def test_every_operator_is_in_one_stage(result):
    found = stages(result.model, case.images())
    every = [id for stage in found for id in stage.nodes]
    graph = capture(result.model, case.images())
    operators = {n.id for n in graph if n.op not in ("input", "output", "param", "exits")}
    assert len(every) == len(set(every))
    assert set(every) == operators
    assert input_names(found) == ["x"]


def test_all_tensors_alive_at_a_cut_are_handed_on(result):
    _, middle, last = stages(result.model, case.images())
    assert middle.reads == ("relu",)
    assert last.reads == ("relu", "relu_1")


@pytest.mark.parametrize("methods", [case.EXITS, case.EXITS + INT8, BEFORE + case.EXITS,
                                     case.EXITS + AFTER])  # fmt: skip
@pytest.mark.parametrize("at", [(0.0, 0.0), (1.01, 0.0), (0.0, 1.01), (0.99, 0.97)])
def test_gather_and_scatter_equal_the_whole_network(methods, at):
    model = at_thresholds(case.finished(methods).model, at)
    x = case.images()
    with torch.no_grad():
        got, taken = Cascade(model, x).eval().answer(x)
        wanted, answers = model(x), torch.stack(all_exits(model, x))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, answers[taken, torch.arange(len(x))], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_input_leaves_at_the_first_exit_that_is_sure(result):
    model, x = at_thresholds(result.model, (0.95, 0.95)), case.images()
    first, second, _ = all_exits(model, x)
    heats = choice_of(model).temperatures
    wanted = torch.where(
        entropy(first, heats[0]) < 0.95, 0, torch.where(entropy(second, heats[1]) < 0.95, 1, 2)
    )
    assert torch.equal(Cascade(model, x).eval().answer(x)[1], wanted)


def test_costs_count_the_heads_on_the_way(result):
    until, whole = exit_macs(result.model, case.images())
    stem, block, head = 3 * 8 * 9 * 64, 8 * 8 * 9 * 64, 8 * 4
    assert until == [
        stem + head, stem + head + block + head, stem + 2 * head + 2 * block + head
    ]  # fmt: skip
    assert (
        whole == until[-1] - 2 * head == totals(case.Net(), capture(case.Net(), case.images())).macs
    )


def test_a_model_without_exits_has_no_stages():
    with pytest.raises(UserError, match="no early exits"):
        Cascade(case.Net(), case.images())
    with pytest.raises(UserError, match="early_exit: branches"):
        all_exits(case.Net(), case.images())
