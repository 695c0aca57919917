"""Reports: complete where the run is, whole where it is not, and safe with any text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from phi2.evaluation.toy import Score, Transcript
from phi2.lab.report import write_comparison, write_report
from phi2.pages.charts import (
    Line,
    difference_chart,
    distinct_digits,
    interval_chart,
    line_chart,
    nice_ticks,
    number,
    scatter_chart,
    thin,
)
from phi2.pages.page import picture
from phi2.runs.shown import MAIN_CHARTS, curves

FILES = ("config.yaml", "metrics.jsonl", "data_audit.json", "samples.jsonl", "environment.json")
EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "br"}


@pytest.fixture
def run(tmp_path):
    """A run folder with everything in it."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": s, "type": "train", "loss": 1 / s, "rewards/margins": s, "learning_rate": 1e-4} for s in (1, 2)]
    lines.append({"step": 2, "type": "eval", "eval_loss": 0.25})
    audit = {"rows": 12, "kept": 10, "dropped": {"empty": {"rows": 2, "reason": EVIL, "first": []}}, "truncated": 3}
    audit |= {"tokens": 100, "target_tokens": 40, "length": {"min": 4, "max": 20}}
    sample = {"step": 2, "prompt": EVIL, "answer": "an answer", "finish_reason": "stop"}
    settings = {"model": "nano", "loss": "sigmoid", "lora": {"r": 7}, "data": EVIL, "adapter": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data_audit.json").write_text(json.dumps(audit))
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13"}}))
    return folder


class Tags(HTMLParser):
    """Checks that every tag is closed in its place, and gathers names, addresses and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.addresses, self.said = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def parsed(path):
    return Tags(path.read_text(encoding="utf-8"))


def test_what_a_loss_keeps_has_a_curve():
    lines = [{"step": step, "type": "train", "loss": 1.0, "state/mean": 0.1 * step} for step in range(1, 4)]
    assert "Kept by the loss: mean" in curves(lines) and "Kept by" not in curves(lines, MAIN_CHARTS)


def test_a_report_shows_curves_data_samples_settings_and_machine(run):
    text = parsed(write_report(run)).text
    assert "Preference optimisation (sigmoid) of nano" in text
    for told in (
        "held out 0.25",
        "dropped: empty",
        "cut to max_length",
        "an answer",
        "lora.r 7",
        "packages.torch 2.13",
    ):
        assert told in text


def test_a_report_needs_nothing_from_elsewhere(run):
    html = parsed(write_report(run))
    assert html.addresses == [] and "script" not in html.seen
    assert not re.search(r"url\(|@import|http", write_report(run).read_text())


def test_text_of_others_stays_text(run):
    assert EVIL in parsed(write_report(run)).text


def test_the_audit_of_held_out_rows_is_shown(run, tmp_path):
    assert "Held-out data" not in parsed(write_report(run)).text
    (run / "eval_audit.json").write_text((run / "data_audit.json").read_text().replace("12", "34"))
    for path in (write_report(run), write_comparison(tmp_path / "all.html", "Title", scores(), {"The run": run})):
        assert "Held-out data" in (text := parsed(path).text) and "rows 34" in text


def test_columns_that_were_not_read_are_shown_with_their_rows(run):
    audit = json.loads((run / "data_audit.json").read_text()) | {"columns": {"not read": {EVIL: 9}, "ignored": {}}}
    (run / "data_audit.json").write_text(json.dumps(audit))
    assert f"column not read: {EVIL} 9" in parsed(write_report(run)).text


@pytest.mark.parametrize(
    ("step", "epoch", "told"), [(1, 1.0, "1 update, 1 epoch,"), (2000, 0.5, "2,000 updates, 0.5 epochs,")]
)
def test_one_update_is_not_several(run, step, epoch, told):
    (run / "metrics.jsonl").write_text(json.dumps({"step": step, "type": "train", "loss": 1.0, "epoch": epoch}))
    assert told in parsed(write_report(run)).text


@pytest.mark.parametrize("missing", FILES)
def test_any_one_file_may_be_missing(run, missing):
    (run / missing).unlink()
    parsed(write_report(run))


def test_an_empty_folder_still_gives_a_report(tmp_path):
    assert "No update was logged." in parsed(write_report(tmp_path)).text


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "data_audit.json", "config.yaml"])
def test_a_damaged_file_is_named_and_the_old_report_stays(run, name):
    before = write_report(run).read_text()
    with (run / name).open("a") as file:
        file.write("{[\n")
    with pytest.raises(ValueError, match=rf"{name}.*not valid"):
        write_report(run)
    assert (run / "report.html").read_text() == before


def test_a_damaged_line_is_named(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 4"):
        write_report(run)


def test_a_report_is_made_of_a_run_that_was_killed_while_it_wrote(run):
    before = write_report(run).read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    assert write_report(run).read_text() == before


def test_a_sample_may_hold_any_line_break_of_unicode(run):
    with (run / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "prompt": "Q", "answer": "first\u2028second"}\n')
    assert "first second" in parsed(write_report(run)).text


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def scores():
    def score(successes):
        return Score(successes, 10, (Transcript(EVIL, "said", "expected", successes > 5),))

    return {"base": {"quiz": score(1)}, "SFT": {"quiz": score(9), "follow": score(4)}}


def test_a_comparison_shows_grades_runs_conversation_and_answers(run, tmp_path):
    chat = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": "hello"}]
    html = parsed(write_comparison(tmp_path / "all.html", "Title", scores(), {"The run": run}, chat))
    for told in ("Title", "10.0%", "90.0%", "59.6 to 98.2", "among 10", "The run", "hello", "expected", EVIL):
        assert told in html.text


def test_a_comparison_of_nothing_is_a_page(tmp_path):
    parsed(write_comparison(tmp_path / "all.html", "Title", {}))


def svg(figure):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.DOTALL)[0])


def places(figure):
    """Coordinates of every polyline of a figure."""
    lines = [line.get("points") for line in svg(figure).iter("polyline")]
    return [[tuple(map(float, place.split(","))) for place in line.split()] for line in lines]


def test_a_line_goes_from_the_first_step_to_the_last_and_up_for_larger_values():
    ((first, middle, last),) = places(line_chart("t", [Line("a", [(10, 1.0), (20, 3.0), (40, 2.0)])]))
    assert first[0] < middle[0] < last[0] and (middle[0] - first[0]) * 2 == pytest.approx(last[0] - middle[0], abs=0.2)
    assert middle[1] < last[1] < first[1]


def test_a_chart_without_points_is_no_chart():
    assert line_chart("t", [Line("a", []), Line("b", [(1, math.nan)])]) == ""


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(-1e30, 1e30) | st.sampled_from([math.nan, math.inf])), min_size=1
    )
)
def test_every_point_of_a_chart_lies_inside_it(points):
    figure = line_chart("t", [Line("a", sorted(points))])
    if figure:
        _, _, width, height = map(float, svg(figure).get("viewBox").split())
        for line in places(figure):
            assert all(0 <= x <= width and 0 <= y <= height for x, y in line)


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 8))
def test_ticks_cover_the_range_without_crowding_it(low, width, most):
    high = low + width
    if high - low > 1e-6 * abs(low):
        ticks = nice_ticks(low, high, most)
        slack = 1e-6 * (high - low)
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= most + 2


@given(
    low=st.one_of(st.floats(-1e6, 1e6), st.sampled_from([25.0, 0.69314, 1e9, -3e-7, 0.0])),
    width=st.floats(1e-7, 1e6),
)
def test_the_labels_of_ticks_differ_and_say_their_values(low, width):
    assume(width > 1e-8 * abs(low))
    ticks = nice_ticks(low, low + width, 4)
    digits = distinct_digits(ticks)
    labels = [number(tick, digits) for tick in ticks]
    values = [float(label.replace("\N{MINUS SIGN}", "-").replace(",", "")) for label in labels]
    assert len(set(labels)) == len(labels) and values == sorted(values)
    gap = ticks[1] - ticks[0]
    assert all(abs(value - tick) < gap / 2 for value, tick in zip(values, ticks, strict=True))
    assert max(map(len, labels)) <= 18


def test_values_that_hardly_differ_have_ticks_and_a_legend_that_do():
    drawn = line_chart(
        "loss", [Line("train", [(1, 25.0001), (2, 25.0004)]), Line("eval", [(1, 25.0002), (2, 25.0003)])]
    )
    ticks = re.findall(r'text-anchor="end"[^>]*>([^<]+)</text>', drawn)
    assert len(set(ticks)) == len(ticks) >= 4
    assert "<b>25.0004</b>" in drawn and "<b>25.0003</b>" in drawn


def test_the_horizontal_axis_says_what_it_counts():
    assert ">step</text>" in line_chart("loss", [Line("train", [(1, 1.0), (2, 2.0)])])


def test_the_marks_of_an_interval_chart_stand_at_their_shares():
    figure = svg(interval_chart("t", {"quiz": {"a": (0.0, 0.25, 0.5), "b": (0.5, 0.75, 1.0)}}))
    a, b = (float(circle.get("cx")) for circle in figure.iter("circle"))
    whiskers = [line for line in figure.iter("line") if "whisker" in line.get("class")]
    (a_low, a_high), (b_low, b_high) = ((float(w.get("x1")), float(w.get("x2"))) for w in whiskers)
    assert a - a_low == a_high - a and a_high == b_low and b - a == b_high - a_high


def test_the_marks_of_a_difference_chart_stand_at_their_values_on_both_sides_of_0():
    figure = svg(difference_chart("t", {"ipo": (-2.0, -1.0, 0.0), "simpo": (0.0, 1.0, 3.0)}))
    (zero,) = (line for line in figure.iter("line") if line.get("class") == "zero")
    ipo, simpo = (float(circle.get("cx")) - float(zero.get("x1")) for circle in figure.iter("circle"))
    assert ipo == pytest.approx(-simpo) and ipo < 0
    assert "simpo, difference: 1, 95 % interval 0 to 3" in {title.text for title in figure.iter("title")}


def test_a_difference_without_an_interval_is_not_drawn():
    assert difference_chart("t", {"ipo": (math.nan, 1.0, math.nan)}) == ""


def test_points_a_hundredfold_apart_stand_by_their_logarithm():
    figure = svg(scatter_chart("t", {"a": [(0.01, 1.0), (0.1, 2.0), (10.0, 3.0)]}, "KL", "accuracy"))
    first, second, third = sorted(float(circle.get("cx")) for circle in figure.iter("circle"))
    assert third - second == pytest.approx(2 * (second - first), abs=0.2)


def test_of_more_lines_than_colours_the_first_stands_out_and_the_others_have_names_to_point_at():
    lines = [Line(f"line {i}", [(1, 0.0), (2, float(i))], [(1, 0.0), (2, 0.0)], [(1, 1.0), (2, 2.0)]) for i in range(9)]
    drawn = line_chart("t", lines)
    assert drawn.count('class="key') == 2 and drawn.count("band") == 1 and "line 8 8 at step 2" in drawn


def test_a_picture_is_a_document_of_its_own():
    document = picture(difference_chart("t", {"ipo": (-2.0, -1.0, 0.0)}))
    assert ElementTree.fromstring(document).tag == "{http://www.w3.org/2000/svg}svg"


def test_long_lines_are_thinned_to_means_of_neighbours():
    points = thin([(i, float(i % 2)) for i in range(1000)], most=100)
    assert len(points) == 100 and {y for _, y in points} == {0.5} and points[-1][0] == 999


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234567, "1,234,567"), (2e-5, "2e\N{MINUS SIGN}5"), (-3.14159, "\N{MINUS SIGN}3.142")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
