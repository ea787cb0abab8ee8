"""Reports in a real browser: no errors, no requests, the figures of the run, and interactions that work."""

import pytest
from browser import Browser, find_browser
from reportruns import make_hostile, trajectory_run
from tinyruns import lines

from sdkit.report.page import write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")


@pytest.fixture(scope="module")
def both(report_run, tmp_path_factory):
    """The page of a run and of its copy with hostile texts."""
    folder = tmp_path_factory.mktemp("both")
    write_report([report_run, make_hostile(report_run, folder / "hostile")], folder / "report.html", "tokens")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(both):
    browser = Browser(find_browser())
    browser.open(both)
    yield browser
    browser.close()


def choose(selector, value):
    return (
        f"{{ const node = document.querySelector({selector!r}); node.value = {value!r}; "
        "node.dispatchEvent(new Event('change')); node.dispatchEvent(new Event('input')); }"
    )


def test_page_has_no_errors_and_asks_for_nothing(browser, both):
    assert browser.errors == []
    assert browser.requests == [f"file://{both}"]
    assert browser.evaluate("document.querySelectorAll('.js-plotly-plot').length") >= 10
    assert browser.evaluate("window.stolen ?? null") is None


def test_table_and_curves_show_the_metrics(browser, report_run):
    evaluated = [line for line in lines(report_run / "metrics.jsonl") if "eval/score" in line]
    rows = browser.evaluate(
        "[...document.querySelectorAll('#scores tbody tr')].map((row) => [row.dataset.run, row.dataset.score, "
        "...[...row.cells].map((cell) => cell.textContent)])"
    )
    [row] = [row for row in rows if row[:2] == ["run", "sums/greedy/right"]]
    assert row[6].startswith(f"{evaluated[0]['eval/sums/greedy/right']:.3f} [")
    drawn = browser.evaluate(
        "[...document.querySelector('.js-plotly-plot').data.find((t) => t.name === 'run, greedy').y]"
    )
    assert drawn == [line["eval/sums/greedy/right"] for line in evaluated]


def test_axis_metric_and_smoothing_can_be_chosen(browser, report_run):
    steps = [line for line in lines(report_run / "metrics.jsonl") if "loss" in line]
    first = "document.querySelector('.js-plotly-plot').data.find((t) => t.name === 'run')"
    browser.evaluate(choose("#metric", "grad_norm"))
    assert browser.evaluate(f"[...{first}.y]") == [line["grad_norm"] for line in steps]
    assert browser.evaluate(f"[...{first}.x]") == [line["step"] for line in steps]
    browser.evaluate(choose("#axis", "tokens"))
    assert browser.evaluate(f"[...{first}.x]") == [line["tokens_generated"] for line in steps]
    browser.evaluate(choose("#metric", "") + choose("#axis", "steps"))
    browser.evaluate(choose("#smooth", "0.9") + choose("#smooth", "0"))
    assert browser.errors == []


def test_prompts_can_be_clicked_through(browser, report_run):
    records = [r for r in lines(report_run / "evaluations/step_000002.jsonl") if r["decoding"] == "greedy"]
    items = browser.evaluate("document.querySelectorAll('#prompts button').length")
    assert items == len([r for r in records if r["suite"] == "sums"]) == 4
    for i in range(items):
        browser.evaluate(f"document.querySelectorAll('#prompts button')[{i}].click()")
        texts = browser.evaluate(
            "[...document.querySelectorAll('#prompt .card .text')].map((node) => node.textContent)"
        )
        assert texts[0] == records[i]["prompt"]
        assert len(texts) == 4  # the prompt, then before training and after each step
        assert "Example:" in browser.evaluate("document.querySelector('#prompt details').textContent")
    assert browser.evaluate("document.querySelectorAll('#prompts [aria-current=true]').length") == 1


def test_hostile_texts_are_shown_as_text(browser):
    browser.evaluate(choose("#held-out-controls select", "1"))
    text = browser.evaluate("document.querySelectorAll('#prompt .card .text')[1].textContent")
    assert text.startswith("</script><script>window.stolen = 1</script><img src=x")
    assert "␀⟨U+202E⟩ &amp; {{ 7 * 7 }}" in text
    assert browser.evaluate("document.querySelectorAll('main img').length") == 0
    assert browser.evaluate("window.stolen ?? null") is None
    assert browser.errors == []


def test_rollouts_of_each_step_are_coloured(browser, report_run):
    for place, step in enumerate((1, 2)):
        browser.evaluate(choose("#rollouts-controls input[type=range]", str(place)))
        records = lines(report_run / f"rollouts/step_{step - 1:06d}.jsonl")
        assert browser.evaluate("document.querySelectorAll('#rollouts-list .card').length") == len(records)
        titles = browser.evaluate(
            "[...document.querySelector('#rollouts-list .card').querySelectorAll('.token')].map((node) => node.title)"
        )
        assert f"{max(records[0]['token_divergence'])} nats" in titles
    browser.evaluate("document.getElementById('show-prompts').click()")
    assert "Example:" in browser.evaluate("document.querySelector('#rollouts-list').textContent")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (800, "dark")])
def test_page_fits_its_window(browser, both, width, scheme):
    browser.open(both, width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.documentElement.dataset.theme") == scheme
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate("document.documentElement.dataset.theme") != scheme
    assert browser.errors == []


def test_endings_of_trajectories_are_stacked_in_their_section(browser, tmp_path):
    write_report([trajectory_run(tmp_path / "run")], tmp_path / "report.html", "tokens")
    browser.open(tmp_path / "report.html")
    drawn = browser.evaluate(
        "[...document.querySelectorAll('#turns .js-plotly-plot')[0].data].map((t) => [t.stackgroup, ...t.x, ...t.y])"
    )
    assert drawn == [["run 0", 1, 2, 0.25, 0.25], ["run 0", 1, 2, 0.75, 0.75]]
    assert browser.errors == []
