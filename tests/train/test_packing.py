"""A finished model in few bytes: the folder, its files, what it tells, and files that lie."""

import json

import pytest
import torch
import train_case as case
from safetensors import safe_open
from safetensors.torch import save_file

from gracile.cli.main import main
from gracile.core.plan import Architecture
from gracile.core.result import Result
from gracile.errors import UserError
from gracile.export.packed import KEY
from gracile.models.spec import ModelSpec, architecture_sha
from gracile.train.checkpoint import (
    PACKED,
    REPLAYED,
    WEIGHTS,
    check_kinds,
    inspected,
    load_model,
    save_model,
)

AT_END = "when: {at: end}"
EXAMPLE = torch.zeros(2, 3, 8, 8)
KINDS = {
    "float": (),
    "sparse": ('few: {prune: oneshot, weights: "type:Conv2d", sparsity: 0.9, when: {at: 1ep}}',),
    "shared": (
        'few: {prune: oneshot, weights: "type:Conv2d", sparsity: 0.7, when: {at: 0ep}}',
        "m: {quantize: share, bits: 3, when: {start: 1ep}}",
    ),
    "halves": (f"m: {{quantize: share, codebook: float16, {AT_END}}}",),
    "product": (
        f"m: {{quantize: product, weights: [inner, outer], subspace: 4, words: 8, {AT_END}}}",
        "cut: {prune: structure, ratio: 0.4, when: {at: 1ep}}",
    ),
    "integers": (f"m: {{quantize: share, bits: 3, {AT_END}}}", case.PTQ),
}


def spec() -> ModelSpec:
    model = case.net()
    architecture = Architecture(name="Net", sha256=architecture_sha(model))
    return ModelSpec(model, architecture, "net.py:Net", "net.py")


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {kind: case.by_callbacks(case.session(*methods)) for kind, methods in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_folder_loads_as_the_plain_one_does(kind, results, tmp_path):
    result = results[kind]
    save_model(tmp_path / "plain", result)
    save_model(tmp_path / "packed", result, packed=True)
    assert {p.name for p in (tmp_path / "packed").iterdir()} == {
        PACKED, "model.json", "plan.json"
    }  # fmt: skip
    plain, packed = (
        load_model(tmp_path / name, EXAMPLE, factory=spec) for name in ("plain", "packed")
    )
    case.assert_same(packed.model.state_dict(), plain.model.state_dict())
    case.assert_same(packed.tensors, plain.tensors)
    assert packed.plan == plain.plan
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(packed.model(x), result.model(x))
    sizes = [(tmp_path / d / f).stat().st_size for d, f in (("plain", WEIGHTS), ("packed", PACKED))]
    if kind != "float":
        assert sizes[1] < sizes[0]


def test_weights_are_made_of_their_codes_and_masks_of_their_weights(results, tmp_path):
    save_model(tmp_path, results["shared"], packed=True)
    with safe_open(tmp_path / PACKED, "pt") as f:
        names = set(f.keys())
    assert "inner.weight" not in names
    assert "inner.weight.mask" not in names
    assert "inner.weight.shared.codes" in names


@pytest.fixture
def packed(results, tmp_path):
    save_model(tmp_path, results["shared"], packed=True)
    return tmp_path


def change(folder, edit=lambda header, tensors: None):
    with safe_open(folder / PACKED, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        header = json.loads(f.metadata()[KEY])
    edit(header, tensors)
    save_file(tensors, folder / PACKED, metadata={"format": "pt", KEY: json.dumps(header)})


def no_codes(h, t):
    del t["inner.weight.shared.codes"], h["tensors"]["inner.weight.shared.codes"]


def short_codebook(h, t):
    t["inner.weight.shared.codebook"] = t["inner.weight.shared.codebook"][:2].clone()


def deep_codebook(h, t):
    t["inner.weight.shared.codebook"] = torch.zeros(3, 3)


def other_key(h, t):
    h["shared"]["inner.weight"] = "nothing"


def other_weight(h, t):
    h["nonzero"]["inner.weight.mask"] = "nothing"


def cut_stream(h, t):
    name = "inner.weight.shared.codes"
    t[name] = t[name][:-1].clone()


def other_shape(h, t):
    h["tensors"]["inner.weight.shared.codes"]["shape"] = [12, 8, 3]


@pytest.mark.parametrize(
    "edit",
    [no_codes, short_codebook, deep_codebook, other_key, other_weight, cut_stream, other_shape],
)
def test_a_file_that_lies_is_one_clear_error(edit, packed):
    change(packed)
    load_model(packed, EXAMPLE, factory=spec)
    change(packed, edit)
    with pytest.raises(UserError, match=r"packed.safetensors: damaged.*'inner.weight"):
        load_model(packed, EXAMPLE, factory=spec)


def test_a_torn_packed_file_is_refused(packed):
    data = (packed / PACKED).read_bytes()
    (packed / PACKED).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a safetensors file"):
        load_model(packed, EXAMPLE, factory=spec)


def test_inspect_tells_bytes_and_ways(packed, capsys):
    found = inspected(packed)
    assert found.file_bytes == (packed / PACKED).stat().st_size
    by_name = {line.name: line for line in found.lines}
    assert by_name["inner.weight"].bytes == 0
    assert by_name["inner.weight"].how == "by its codebook and codes"
    assert by_name["inner.weight.mask"].how == "by its weight"
    assert by_name["inner.weight"].plain_bytes == 4 * 8 * 12 * 9
    assert "Huffman codes of" in by_name["inner.weight.shared.codes"].how
    state = case.net().state_dict()
    assert found.weight_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert main(["inspect", str(packed), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file_bytes"] == found.file_bytes
    assert main(["inspect", str(packed)]) == 0
    assert "the weights alone, plain, are" in capsys.readouterr().out


def test_what_cannot_be_replayed_says_the_way_out(results):
    with pytest.raises(UserError, match=r"kind 'share', .* cannot replay .*Run the recipe without"):
        check_kinds(results["halves"].plan, "replay", known=REPLAYED)


def test_inspect_of_nothing_is_a_user_error(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
