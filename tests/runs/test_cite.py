"""`sdkit cite`: what a page cites, BibTeX and LaTeX that their readers accept, and the text of a run."""

import json
import re

import pytest
import yaml
from attrs import evolve
from tinyruns import LORA, distil, make_spec, model, teacher

from sdkit import __version__
from sdkit.language.resolved import resolved
from sdkit.language.specs import CrossEntropy, DatasetSamples, EmaWeights, RolloutSpec, Table
from sdkit.runs import latex
from sdkit.runs.bibliography import SOFTWARE_AUTHORS, SOFTWARE_TITLE, papers_in, software_bibtex
from sdkit.runs.cite import cite, read, together
from sdkit.runs.history import device_hours

HOURS = [{"step": 1, "time/step": 1800.0}, {"step": 1, "time/evaluation": 900.0}, {"step": 2, "time/step": 1800.0}]


@pytest.fixture
def make_run(tmp_path):
    """Writes the directory of a run of this spec."""

    def make(spec, written="method: sdft\n"):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "spec.yaml").write_text(written)
        (folder / "resolved.yaml").write_text(json.dumps(resolved(spec)))
        (folder / "status.json").write_text(json.dumps({"state": "done", "step": 2}))
        attempt = {"after_step": 0, "ranks": 2, "hardware": {"accelerators": ["NVIDIA H200", "NVIDIA H200"]}}
        facts = {"base": str(tmp_path), "attempts": [attempt], "versions": {"torch": "2.13"}}
        (folder / "provenance.json").write_text(json.dumps(facts))
        lines = [line | {"tokens_generated": 12345.0} for line in HOURS]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.mark.parametrize(
    ("comment", "labels"),
    [
        (
            'Doe et al. 2024, "A Title", arXiv 2401.00001; also Roe 2023, arXiv 2302.00002.',
            ["Doe et al. (2024)", "Roe (2023)"],
        ),
        ("Values of arXiv 2401.00001.", ["arXiv:2401.00001"]),
        ('Roe 2023, "A Post" (Blog), and code', ["Roe (2023)"]),
        ("Nothing is cited here since 2024.", []),
    ],
)
def test_papers_of_a_comment(comment, labels):
    assert [paper.label for paper in papers_in(comment)] == labels


def test_page_says_what_another_one_leaves_out():
    (paper,) = papers_in("Details of arXiv 2601.19897, by hand")
    assert (paper.author, paper.year, paper.title) == (
        "Shenfeld",
        2026,
        "Self-Distillation Enables Continual Learning",
    )


def test_bibtex_of_a_paper():
    (paper,) = papers_in('Müller et al. 2024, "Töne & Zeit", arXiv 2401.00001')
    assert paper.bibtex().splitlines() == [
        "@misc{muller2024_2401.00001,",
        '  author        = {M{\\"{u}}ller and others},',
        '  title         = {{T{\\"{o}}ne \\& Zeit}},',
        "  year          = {2024},",
        "  eprint        = {2401.00001},",
        "  archivePrefix = {arXiv},",
        "  url           = {https://arxiv.org/abs/2401.00001}",
        "}",
    ]


def test_unknown_author_and_title_are_left_out():
    (paper,) = papers_in("arXiv 2401.00001")
    assert paper.bibtex().startswith("@misc{arxiv2401.00001,\n  year ")


def test_software_is_cited_as_in_citation_cff(request):
    cff = yaml.safe_load((request.config.rootpath / "CITATION.cff").read_text())
    assert (cff["title"], cff["authors"], cff["version"]) == (
        SOFTWARE_TITLE,
        [{"name": SOFTWARE_AUTHORS}],
        __version__,
    )
    assert SOFTWARE_TITLE in software_bibtex()


def test_latex_escapes_every_special_character():
    assert latex.escape(r"50% of a_b & {c} #1 $x^2~\y") == (
        r"50\% of a\_b \& \{c\} \#1 \$x\textasciicircum{}2\textasciitilde{}\textbackslash{}y"
    )
    assert latex.escape("8 × KL(T‖S) ≥ −1 … ü") == r"8 $\times$ KL(T$\|$S) $\geq$ $-$1 \ldots{} ü"


def test_hours_count_the_ranks_of_each_attempt():
    attempts = [{"after_step": 0, "ranks": 4}, {"after_step": 1, "ranks": 2}]
    assert device_hours(HOURS, attempts) == 0.5 * 4 + 0.25 * 4 + 0.5 * 2
    assert device_hours(HOURS, []) == 1.25


def test_text_of_a_run(make_run, tmp_path):
    spec = make_spec(
        "hub/some-model", model=model("hub/some-model", lora=LORA), teacher=teacher(EmaWeights(update_rate=0.3))
    )
    text = cite(read(spec, tmp_path, make_run(spec)), "markdown")
    paragraph, table, bibtex = text.split("\n\n", 2)
    assert paragraph.startswith(
        "We trained LoRA adapters of rank 4 (α = 8) of hub/some-model in float32 for 2 steps with sdkit, following "
        "Shenfeld et al. (2026). Each step used 4 prompts and 1 completion of at most 8 tokens for each, sampled at "
        "temperature 1 (student on its own prompt). The teacher was an exponential moving average of the student "
        "(update_rate 0.3 per optimizer step), which saw the demonstration in the user turn. The loss was the forward "
        "KL(teacher‖student) over the whole vocabulary (temperature 1, "
    )
    assert paragraph.endswith(
        "The run, with seed 0, took 2.5 device hours on 2 × NVIDIA H200 and sampled 12,345 tokens."
    )
    assert "| learning rate | 0.001, constant, 0 warm-up steps |" in table
    assert bibtex.startswith("```bibtex\n@misc{shenfeld2026_2601.19897,")
    assert "@misc{sdkit," in bibtex


def test_latex_of_a_run_has_citations_and_balanced_braces(make_run, tmp_path):
    spec = make_spec("hub/a_model", losses=Table({**distil(), "again": distil()["distil"]}))
    text = cite(read(spec, tmp_path, make_run(spec)), "latex")
    assert r"Shenfeld et al. (2026)~\cite{shenfeld2026_2601.19897}" in text
    assert r"hub/a\_model" in text
    assert "The loss was the sum of the " in text
    assert not re.search(r"(?<!\\)[#_](?!2601)", text.split("\n", 1)[1])
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")


def test_run_on_data_without_a_page(make_run, tmp_path):
    spec = make_spec(
        "hub/m",
        teacher=None,
        losses=Table({"imitate": CrossEntropy()}),
        rollout=RolloutSpec(sampled_by=DatasetSamples(), max_new_tokens=8),
    )
    run = read(spec, tmp_path, make_run(spec, "# A note.\nlosses: {}\n"))
    text = cite(run, "markdown")
    assert run.papers == []
    assert "with sdkit. Each step used 4 prompts with the data set's own completions (column demonstration)" in text
    assert "teacher was" not in text
    assert "sampled 12,345" not in text


def test_page_of_the_users_own(make_run, tmp_path):
    (tmp_path / "mine.yaml").write_text('# Mine.\n# Doe 2024, "A Title", arXiv 2401.00001.\nlosses: {}\n')
    spec = make_spec("hub/m")
    assert cite(read(spec, tmp_path, make_run(spec, "method: ./mine.yaml\n")), "bibtex").startswith("@misc{doe2024")


def test_seeds_are_listed_and_their_hours_added(make_run, tmp_path):
    spec = make_spec("hub/m")
    run = read(spec, tmp_path, make_run(spec))
    text = cite(together([run, evolve(run, seeds=(7,))]), "markdown")
    assert "The 2 runs, with seeds 0 and 7, took 5 device hours on 2 × NVIDIA H200 and sampled 24,690 tokens." in text
    assert "| seeds | 0, 7 |" in text


def test_command_prints_bibtex(make_run, sdkit):
    spec = make_spec("hub/m")
    code, out, err = sdkit("cite", make_run(spec), "--format", "bibtex")
    assert (code, err) == (0, "")
    assert out.count("@misc{") == 2
