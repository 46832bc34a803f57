"""Why a run is not faster: each reason alone, from a result object."""

import copy
import json

from report_sample import make_run, result

from gracile.report.gains import no_gains
from gracile.report.html import write


def sample(ratio=1.14, macs=(1000, 500), kernels=None, layers=(), ms=5.0):
    return {
        "before": {"macs": macs[0]},
        "after": {"macs": macs[1], "latency": {"openvino": ms}},
        "speedup": {"openvino": {"ratio": ratio}},
        "kernels": {"openvino": kernels or {}},
        "layers": list(layers),
    }


def layer(id="a", before=32, after=20, bits=32, sparsity=0.0, macs=(1000, 500)):
    return {
        "id": id, "channels_before": before, "channels_after": after, "bits": bits,
        "sparsity": sparsity, "macs_before": macs[0], "macs_after": macs[1],
    }  # fmt: skip


def only(data):
    (found,) = no_gains(data)
    return found.text


def test_widths_that_are_no_multiple():
    text = only(sample(layers=[layer(), layer("b", after=16)]))
    assert text == (
        "multiply-adds -50 %, milliseconds -12 %, because 1 of 2 cut layers have no multiple of 16 "
        "channels (a: 20), which float kernels round up (multiple_of: 16)."
    )


def test_zeros_that_are_multiplied():
    data = sample(ratio=1.01, macs=(1000, 1000), layers=[layer(after=32, sparsity=0.9)])
    text = only(data)
    assert text.startswith("weights that are zero 90 %, milliseconds -1 %, because 90 % of the")
    assert "prune whole filters" in text


def test_float_islands_layers_that_nothing_was_cut_from_and_overhead():
    float_ = {"convolutions": 19, "convolutions_integer": 12}
    even = layer(after=16, bits=8)
    assert "7 of 19 convolutions run in float" in only(sample(kernels=float_, layers=[even]))
    rest = layer("b", after=32, macs=(900, 900))
    text = only(sample(layers=[layer(after=16), rest]))
    assert "1 layers that nothing was cut from make 64 % of what is left" in text
    assert "at 0.050 ms" in only(sample(layers=[layer(after=16)], ms=0.05))


def test_no_reason_is_said_to_be_none():
    assert "profile the runtime" in only(sample(layers=[layer(after=16)]))


def test_a_slower_model_says_so():
    assert "milliseconds +25 %" in only(sample(ratio=0.8, layers=[layer()]))


def test_a_kept_promise_and_an_unmeasured_one_are_silent():
    assert no_gains(sample(ratio=1.5)) == []
    assert no_gains({**sample(), "speedup": {}}) == []
    assert no_gains(sample(macs=(1000, 950))) == []
    assert no_gains({}) == []


def test_the_report_has_a_section_only_then(tmp_path):
    run = make_run(tmp_path)
    assert "Why it is not faster" not in write(run).read_text()
    data = copy.deepcopy(result())
    data["speedup"]["onnxruntime"]["ratio"] = 1.05
    (run / "result.json").write_text(json.dumps(data))
    text = write(run).read_text()
    assert "Why it is not faster" in text
    assert "1 of 19" in text
