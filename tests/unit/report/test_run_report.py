"""Reports of run directories from the files that a run writes."""

import json
import math

import pytest

from firth.report.page import render, write
from firth.report.run_report import numbers, run_report, summary
from firth.types import UserError
from tests.support.html_pages import Reader


def rows(valid=lambda s: 2 + 6 * math.exp(-s / 100), steps=600, **more):
    """Return rows as firth.training.logging writes them."""
    out = []
    for s in range(10, steps + 1, 10):
        common = {"step": s, "seconds": s * 0.15, "tokens": s * 4096}
        measured = {"loss": 1.9 + 6 * math.exp(-s / 100), "norm": 1.0, "rate": 1e-3, "tokens_per_second": 27_000.0}
        out.append({"split": "train"} | common | measured | {"flops_per_second": 2.4e11, "skipped": 0} | more)
        if s % 100 == 0:
            out.append({"split": "valid"} | common | {"loss": valid(s), "bits_per_byte": valid(s) / 2.2})
    return out


def directory(path, metrics, recipe="name: gpt\nobjective: causal_lm\n"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if recipe:
        (path / "recipe.yaml").write_text(recipe)
    return path


def test_a_whole_run(tmp_path):
    run = directory(tmp_path / "my run", rows())
    command = ["generate", "Generate text", '"Once"']
    counts = {"documents": 1000, "bad_utf8": 2}
    (run / "done.json").write_text(json.dumps({"steps": 600, "counts": counts, "next_command": command}))
    samples = [{"step": s, "prompt": "ROMEO:", "text": f"<b>{s}</b>"} for s in (0, 300, 600)]
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text('{"architectures": ["NanoChatForCausalLM"]}')
    report = run_report(run)
    assert [section.title for section in report.sections] == [
        "Metrics",
        "Samples",
        "Training",
        "Data",
        "Recipe",
    ]
    assert [figure.title for figure in report.sections[0].figures] == ["Loss", "Bits per byte"]
    assert [figure.title for figure in report.sections[2].figures] == [
        "Learning rate",
        "Gradient norm before clipping",
        "Speed",
    ]
    assert dict(report.sections[1].samples[0].answers) == {"step 0": "<b>0</b>", "step 600": "<b>600</b>"}
    assert report.sections[3].tables[0].rows[1] == ("bad utf8", 2)
    lines = [command.line for command in report.commands]
    assert lines[0] == f"firth generate '{run}' \"Once\""
    assert lines[1] == f"firth evaluate '{run}' my-text.txt"
    assert f'NanoChatForCausalLM as M; print(M.from_pretrained("{run}/model"))' in lines[2]
    page = render(report)
    Reader(page)
    assert "&lt;b&gt;600&lt;/b&gt;" in page
    assert write(report, run / "report.html").stat().st_size < 300_000


def test_summary():
    assert summary(rows()) == (
        "600 steps over 2.46M tokens in 1 min 30 s. The loss on held-out text fell from 4.21 to 2.01."
    )
    worse = summary(rows(valid=lambda s: 3 + abs(s - 300) / 300))
    assert "did not fall: it was 3.67 and is 4." in worse
    assert "Its best was 3 at step 300; since then the model has been overfitting." in worse
    untested = [row for row in rows() if row["split"] == "train"]
    assert "on the training text fell from 7.33 to 1.91" in summary(untested)


def test_key_numbers():
    found = {n.label: (n.value, n.note) for n in numbers(rows())}
    assert list(found) == ["bits per byte", "loss", "training loss", "tokens per second"]
    assert found["loss"] == (2.015, "held-out text, 4.21 at the first evaluation")
    assert found["tokens per second"] == (27000.0, "median over the run, 240GFLOP/s")


def test_loss_terms_share_a_figure_and_unknown_metrics_get_one(tmp_path):
    more = {"loss/pair": 0.7, "loss/tokens": 3.0, "true_reward": 1.5}
    report = run_report(directory(tmp_path, rows(**more), "objective: [nsp, {kind: mlm}]\n"))
    assert report.title.startswith("nsp + mlm: ")
    figures = {figure.title: figure for figure in report.sections[0].figures}
    assert [curve.label for curve in figures["Loss by term"].curves] == ["pair", "tokens"]
    assert figures["True reward"].y == "true reward"
    assert [command.line.split()[1] for command in report.commands] == ["evaluate"]


def phases(count=20, **changes):
    """Return rows of rollout phases as `firth.align.rollouts` writes them."""
    common = {"split": "rollouts", "seconds": 1.0, "tokens": 0}
    return [
        common
        | {
            "step": 2 * s + 1,
            "reward": s / 10,
            "truth": 1 - s / 40,
            "kl_per_answer": s / 4,
            "finished": 0.75,
            "phase": s,
        }
        | changes
        for s in range(count)
    ]


def test_reinforcement_learning_pages_start_with_reward(tmp_path):
    drawn = phases(truth=None)
    report = run_report(directory(tmp_path, drawn[:1] + rows(steps=20, kl_per_token=0.02) + drawn[1:]))
    assert [section.title for section in report.sections[:2]] == ["Rollouts", "Metrics"]
    assert [f.title for f in report.sections[1].figures] == ["Loss", "KL to the reference model"]
    figures = {f.title: f for f in report.sections[0].figures}
    assert "True score (not used in training)" not in figures
    assert list(figures["Reward"].curves[0].y)[:3] == [0.0, 0.1, 0.2]
    assert list(figures["KL to the initial policy"].curves[0].x)[:3] == [1, 3, 5]
    assert [(n.label, n.value) for n in report.numbers] == [
        ("reward", 1.85), ("KL, nats per answer", 4.62), ("answers that end", 0.75), ("tokens per second", 27000.0),
    ]  # fmt: skip
    assert "The reward rose from 0.05 to 1.85." in report.text
    assert "diverge from the starting model by 4.62 nats each. 75% of them end" in report.text
    assert "loss" not in report.text
    Reader(render(report))


def test_reward_and_true_score_are_drawn_over_kl(tmp_path):
    report = run_report(directory(tmp_path, rows(steps=20) + phases()))
    figure = report.sections[0].figures[0]
    assert figure.title == "Reward over KL"
    reward, truth, fitted = figure.curves
    assert fitted.dashed and fitted.y[0] == pytest.approx(1.0, abs=0.05)
    assert not reward.line and len(reward.x) == 20 and list(reward.x[:3]) == list(truth.x[:3]) == [0.0, 0.25, 0.5]
    assert (reward.y[-1], truth.y[-1]) == (1.9, 0.525)
    assert "The true score fell from 0.988 to 0.538." in report.text
    assert render(report).count('class="dot c1"') >= 20


def test_chosen_and_rejected_share_a_figure(tmp_path):
    report = run_report(directory(tmp_path, rows(steps=200, chosen=-2.0, rejected=-5.0), "objective: dpo\n"))
    figures = {figure.title: figure for figure in report.sections[0].figures}
    assert "Chosen" not in figures and "Rejected" not in figures
    assert [c.label for c in figures["Log-probability above the reference"].curves] == ["preferred", "rejected"]


def test_held_out_texts_are_shown_before_and_after(tmp_path):
    texts = [
        {"step": s, "prompt": f"question {i}", "held_out": True, "score": "reward", "answers": [
            {"name": "model", "text": f"at {s}", "score": s / 10}, {"name": "preferred", "text": "yes", "score": 1.0 + s},
        ]} for s in (0, 20) for i in range(8)
    ]  # fmt: skip
    run = directory(tmp_path, rows(steps=20))
    (run / "held_out_texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    section = next(s for s in run_report(run).sections if s.title == "Answers before and after training")
    assert section.text == "The model was not trained on these prompts. In parentheses: reward."
    assert len(section.samples) == 8
    assert dict(section.samples[0].answers) == {
        "step 0 (0)": "at 0", "step 20 (2)": "at 20", "preferred (1 before, 21 after)": "yes",
    }  # fmt: skip


def test_skipped_steps_are_reported(tmp_path):
    report = run_report(directory(tmp_path, rows(skipped=3, loss=None)))
    assert "3 steps had no finite gradient" in report.sections[1].text
    Reader(render(report))


def test_one_row_is_a_report(tmp_path):
    Reader(render(run_report(directory(tmp_path, rows(steps=10), recipe=""))))


def test_truncated_last_line_is_skipped_and_others_are_errors(tmp_path):
    run = directory(tmp_path, rows())
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"split": "tr')
    assert "600 steps" in run_report(run).text
    (run / "metrics.jsonl").write_text('{"split": "tr\n' + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: this is not JSON"):
        run_report(run)


def test_directories_without_a_run_are_errors(tmp_path):
    with pytest.raises(UserError, match="give a run directory"):
        run_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no row yet"):
        run_report(tmp_path)


def test_metrics_measured_once_are_numbers(tmp_path):
    """A metric of a single held-out row is in a table; with a second row it is drawn."""
    end = {"step": 600, "seconds": 90.0, "tokens": 600 * 4096, "split": "valid", "matthews": 0.5}
    section = run_report(directory(tmp_path / "once", [*rows(), end])).sections[0]
    assert [(table.title, table.rows) for table in section.tables] == [
        ("Measured once", [("Matthews' correlation", 0.5)])
    ]
    assert "Matthews' correlation" not in [figure.title for figure in section.figures]
    again = run_report(directory(tmp_path / "twice", [*rows(), end | {"step": 300}, end])).sections[0]
    assert not again.tables
    assert "Matthews' correlation" in [figure.title for figure in again.figures]
