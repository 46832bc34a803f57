"""Verdict and summary table: every number by hand."""

import io

import pytest
from report_sample import EVIL, result
from rich.console import Console

from gracile.report.tables import comparison_markdown, lines, markdown, summary
from gracile.report.texts import signed
from gracile.report.verdict import verdict


def shown(data):
    out = io.StringIO()
    Console(width=100, file=out).print(summary(data))
    return out.getvalue()


def test_lines_carry_their_unit_and_the_change():
    found = {n.label: (n.before, n.after, n.change) for n in lines(result())}
    assert found == {
        "Top-1 accuracy (%)": ("92.55", "91.94", "−0.61 points"),
        "Top-1, OpenVINO (%)": ("92.55", "91.94", "−0.61 points"),
        "Top-1, ONNX Runtime (%)": ("92.55", "91.96", "−0.59 points"),
        "Top-5 accuracy (%)": ("99.78", "99.71", "−0.07 points"),
        "Loss (nats)": ("0.287", "0.302", "+0.015"),
        "Multiply-adds (M)": ("40.55", "21.84", "−46.1 %"),
        "Parameters (k)": ("269.72", "151.21", "−43.9 %"),
        "Size of the weights (MiB)": ("1.04", "0.18", "−82.8 %"),
        "Artifact, OpenVINO (MiB)": ("1.07", "0.21", "−80.0 %"),
        "Artifact, ONNX Runtime (MiB)": ("1.05", "0.20", "−80.7 %"),
        "Latency, OpenVINO (ms)": ("0.842", "0.349", "2.41× faster"),
        "Latency, ONNX Runtime (ms)": ("1.103", "0.587", "1.88× faster"),
    }


def test_the_measured_ratio_wins_over_the_quotient_of_the_medians():
    data = {
        "before": {"latency": {"openvino": 2.0}},
        "after": {"latency": {"openvino": 1.0}},
        "speedup": {"openvino": {"ratio": 1.9, "ci95": [1.8, 2.0]}},
    }
    assert lines(data)[0].change == "1.90× faster"
    assert lines({**data, "speedup": {}})[0].change == "2.00× faster"


def test_slower_is_called_slower():
    data = {"speedup": {"openvino": {"ratio": 0.8, "ci95": [0.7, 1.1]}}}
    judged = verdict(data)
    assert judged.headline == "1.25× slower in OpenVINO, accuracy not measured."
    assert "not distinguishable from no change" in judged.detail


def test_what_nobody_measured_is_left_out_and_half_measured_is_a_dash():
    assert lines({}) == []
    (line,) = lines({"before": {"top1": 0.5}, "after": {"top1": None}})
    assert (line.before, line.after, line.change) == ("50.00", "–", "–")


@pytest.mark.parametrize(
    ("data", "headline"),
    [
        ({}, "Speed not measured, accuracy not measured."),
        (
            {"before": {"bytes": 400, "top1": 0.9}, "after": {"bytes": 100, "top1": 0.9}},
            "4.00× smaller, speed not measured, no accuracy lost.",
        ),
        (
            {
                "before": {"top1": 0.9},
                "after": {"top1": 0.912},
                "speedup": {"onnxruntime:GPU": {"ratio": 2.0, "ci95": None}},
            },
            "2.00× faster in ONNX Runtime (GPU), 1.20 points of accuracy gained.",
        ),
    ],
)
def test_the_headline_says_only_what_was_measured(data, headline):
    assert verdict(data).headline == headline


@pytest.mark.parametrize(
    ("data", "met", "label"),
    [
        ({}, None, "No goal was set"),
        ({"goal": {"met": True}}, True, "Goal met"),
        ({"goal": {"met": False}}, False, "Goal missed"),
        ({"goal": {"met": True}, "exit": 3}, False, "Verification failed: do not deploy"),
    ],
)
def test_the_goal_is_judged_by_the_run_and_a_failed_proof_beats_it(data, met, label):
    assert (verdict(data).met, verdict(data).label) == (met, label)


def test_the_checks_of_the_run_are_shown_as_they_were_judged():
    wishes = [(w.name, w.asked, w.got, w.met) for w in verdict(result()).wishes]
    assert wishes == [
        ("Speed-up in OpenVINO", "at least 2.5", "2.413", False),
        ("Speed-up in ONNX Runtime", "at least 2.5", "1.879", False),
        ("Artifact size in OpenVINO (MB)", "at most 0.3", "0.224", True),
        ("Top-1 drop (points)", "at most 1", "0.61", True),
    ]


def test_a_goal_without_checks_is_set_against_what_came_out():
    data = result()
    del data["goal"]["checks"]
    wishes = [(w.name, w.asked, w.got) for w in verdict(data).wishes]
    assert wishes == [
        ("Speed-up", "at least 2.5×", "2.41× OpenVINO, 1.88× ONNX Runtime"),
        ("Size", "at most 0.3 MB", "0.19 MB"),
        ("Accuracy lost", "at most 1 point", "0.61 points"),
    ]


def test_a_wish_that_was_not_measured_says_so():
    (wish,) = verdict({"goal": {"latency_ms": 3, "met": None}}).wishes
    assert (wish.asked, wish.got) == ("at most 3 ms", "not measured")


def test_the_drop_the_run_judged_is_the_one_that_is_told():
    data = {"before": {"top1": 0.9}, "after": {"top1": 0.8}, "drop_points": 2.5}
    assert "2.50 points of accuracy lost" in verdict(data).headline


def test_the_terminal_shows_verdict_and_table():
    text = shown(result())
    assert "Goal missed" in text
    assert "91.94   −0.61 points" in text


def test_brackets_in_a_name_are_not_markup():
    name = "[bold]x[/nope]"
    data = {"speedup": {name: {"ratio": 2.0}}, "after": {"latency": {name: 1.0}}}
    assert shown(data).count(name) == 2


def test_a_comparison_is_a_markdown_table():
    rows = [
        {"recipe": "a|b", "seed": s, "top1": t, "drop": 0.5, "speedup": {"openvino": 2.0},
         "macs": 1e6, "bytes": 1024}
        for s, t in enumerate((0.90, 0.92))
    ]  # fmt: skip
    head, rule, row, *_ = comparison_markdown(rows).splitlines()
    assert head.startswith("| Recipe | Seeds | Top-1 (%) |")
    assert rule == "|---|---:|---:|---:|---:|---:|---:|"
    assert row == r"| 1 · a\|b | 2 | 91.00 ± 1.41 | 0.50 ± 0.00 | 2.00 ± 0.00 | 1.00 | 1.00 |"


def test_markdown_is_a_table_with_numbers_to_the_right():
    text = markdown(result())
    assert text.startswith("**Goal missed.** 2.41× faster in OpenVINO")
    assert "|---|---:|---:|---:|" in text
    assert "| Top-1 accuracy (%) | 92.55 | 91.94 | −0.61 points |" in text
    assert "| Speed-up, OpenVINO, 95 % interval (×) |  |  | 2.36–2.47 |" in text


def test_a_runtime_name_cannot_break_out_of_markdown():
    data = {"before": {"latency": {f"a|{EVIL}": 1.0}}, "after": {}}
    row = markdown(data).splitlines()[-1]
    assert (
        row == r"| Latency, a\|&lt;script>document.title='owned'&lt;/script> (ms) | 1.000 | – | – |"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.614, "+0.61"), (-0.614, "−0.61"), (-0.001, "0.00"), (0.0, "0.00")]
)
def test_signs(value, text):
    assert signed(value) == text
