"""Fit a table, write fit.json and the page fit.html, and return the fit as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firth import kernel_choice
from firth.io.atomic import make_directory
from firth.io.integrity import read_record
from firth.report.charts import Curve, Figure, number
from firth.report.page import Command, Report, Section, StatCell, Table
from firth.report.page import write as write_page
from firth.scaling import fit
from firth.scaling.fit import Estimate
from firth.scaling.fitted import CONSTANTS, Fit, describe, fit_points, optimum_text, repeat_lines
from firth.scaling.sweep import SWEEP, TEXT
from firth.scaling.table import Points, read_points

LARGER = 3.0
"""The budget of the report, as a multiple of the largest in the table, if none is given."""
MAX_CURVES = 5
"""Most sizes or budgets with a curve of their own."""


def fit_and_report(table: Path, budgets: Sequence[float], draws: int, skip_diverged: bool, seed: int, out: Path) -> str:
    """Fit a table, write fit.json and fit.html, and return the fit as text.

    Args:
        table: The table of runs.
        budgets: FLOPs to find the best size for; empty takes LARGER times the largest of the table.
        draws: Bootstrap samples.
        skip_diverged: Leave out runs that diverged.
        seed: Seed of the bootstrap.
        out: Directory of the files.

    Raises:
        UserError: The table cannot be fitted.
    """
    result = fit_points(read_points(table, skip_diverged), draws, seed, skip_diverged, source_of(table))
    wanted = tuple(budgets) or (LARGER * result.fitted.flops[1],)
    make_directory(out)
    result.fitted.save(out / "fit.json")
    write_page(page(result, wanted), out / "fit.html")
    return f"{describe(result, wanted)}\n\n{out / 'fit.json'}   page: {out / 'fit.html'}"


def source_of(table: Path) -> dict[str, Any]:
    """Return what is known of the runs of a table: its name, and for a sweep its recipe, its text and the machine."""
    source: dict[str, Any] = {"table": table.name}
    files = (table.parent / SWEEP, table.parent / TEXT)
    if all(file.exists() for file in files):
        recipe, text = (read_record(file) for file in files)
        source |= {**recipe, **text, "cpu": kernel_choice.cpu()}
    return source


def page(result: Fit, budgets: Sequence[float]) -> Report:
    """Return the page of a fit."""
    fitted = result.fitted
    best = [fitted.optimum(C) for C in budgets]
    own = best[0]
    exponent = result.approaches[-1].a
    numbers = [StatCell("exponent a", round(exponent.value, 3), f"N ~ C^a; {exponent.low:.3f} to {exponent.high:.3f}")]
    if not own.too_wide:
        numbers += [
            StatCell(
                "parameters", own.parameters.value, f"best for {number(own.flops, 3)} FLOPs; {_range(own.parameters)}"
            ),
            StatCell("tokens", own.tokens.value, _range(own.tokens)),
            StatCell("loss", round(own.loss.value, 3), f"{own.loss.low:.3f} to {own.loss.high:.3f}"),
        ]
    sections = [
        Section(
            "Loss against compute",
            "Each curve is one size; its points are whole runs. The frontier is the least loss of the fitted law at each compute.",
            figures=(compute_figure(result, budgets),),
        ),
        Section(
            "Size at equal compute",
            "Each curve is one budget. Where its lowest point is between other sizes, it shows the best size.",
            figures=(isoflop_figure(result), *size_figure(result, budgets)),
        ),
        Section(
            "The fit",
            "\n\n".join(optimum_text(fitted, C) for C in budgets),
            figures=(residual_figure(result),),
            tables=tables(result),
        ),
    ]
    if len(result.repeated):
        sections.append(
            Section("Text read several times", "\n\n".join(repeat_lines(result)), figures=(repeat_figure(result),))
        )
    return Report(
        "A scaling law",
        sections=tuple(sections),
        text="\n\n".join([f"{len(result.points)} runs of {len(np.unique(result.points.N))} sizes.", *result.excluded]),
        numbers=tuple(numbers),
        commands=(Command("Plan a run with this law", "firth plan --text DIR --hours 1 --law fit.json"),),
        facts={name: str(value) for name, value in fitted.source.items() if name != "recipe"},
    )  # fmt: skip


def _range(one: Estimate) -> str:
    return f"{number(one.low, 3)} to {number(one.high, 3)}"


def _some(values: np.ndarray) -> list[float]:
    """Return at most MAX_CURVES of the distinct values, evenly spaced."""
    distinct = np.unique(values)
    return [float(v) for v in distinct[np.unique(np.linspace(0, len(distinct) - 1, MAX_CURVES).round().astype(int))]]


def compute_figure(result: Fit, budgets: Sequence[float]) -> Figure:
    """Return the losses of each size over compute, with the frontier of the law and the budgets."""
    points, fitted = result.points, result.fitted
    curves = [_curve(f"{number(n, 3)}", points, np.equal(points.N, n), points.C) for n in _some(points.N)]
    C = np.geomspace(points.C.min(), max(points.C.max(), *budgets), 80)
    frontier = [float(fitted.law.loss(*fitted.law.optimum(c, fitted.rule))) for c in C]
    curves.append(Curve("frontier", C.tolist(), frontier, dashed=True, color=MAX_CURVES))
    own = [fitted.optimum(c) for c in budgets]
    curves.append(
        Curve("your budget", [o.flops for o in own], [o.loss.value for o in own], points=True, line=False, color=MAX_CURVES,
              intervals=[(o.loss.low, o.loss.high) for o in own])
    )  # fmt: skip
    return Figure(
        "Held-out loss by compute",
        "FLOPs",
        "loss",
        tuple(curves),
        "The numbers at the curves are parameters.",
        log_x=True,
        log_y=False,
    )


def _curve(label: str, points: Points, own: np.ndarray, x: np.ndarray) -> Curve:
    order = np.argsort(x[own])
    return Curve(label, x[own][order].tolist(), points.loss[own][order].tolist(), points=True)


def isoflop_figure(result: Fit) -> Figure:
    """Return the losses of each budget over size, with the lowest point of its parabola."""
    points = result.points
    groups = fit.budget_groups(points)
    chosen = {round(v) for v in _some(np.arange(len(groups)))} if groups else set()
    curves = []
    for k, group in enumerate(groups):
        if k in chosen:
            curves.append(
                _curve(
                    f"{np.exp(np.log(points.C[group]).mean()):.1g}",
                    points,
                    np.isin(np.arange(len(points)), group),
                    points.N,
                )
            )
    best = result.approaches[1].best
    if best:
        curves.append(
            Curve("lowest", [b[1] for b in best], [b[3] for b in best], points=True, dashed=True, color=MAX_CURVES)
        )
    note = "The numbers at the curves are FLOPs." if groups else "No budget has three sizes."
    shown = tuple(curves) or (_curve("runs", points, points.N > 0, points.N),)
    return Figure("IsoFLOP curves", "parameters", "loss", shown, note, log_x=True)


def size_figure(result: Fit, budgets: Sequence[float]) -> tuple[Figure, ...]:
    """Return the best size over compute by all approaches that give one."""
    points = result.points
    C = np.geomspace(points.C.min(), max(points.C.max(), *budgets), 40)
    curves = [
        Curve(one.name, C.tolist(), [one.parameters(c) for c in C], color=k)
        for k, one in enumerate(result.approaches)
        if not one.missing
    ]
    best = result.approaches[1].best
    if best:
        curves.append(
            Curve("lowest", [b[0] for b in best], [b[1] for b in best], points=True, line=False, color=MAX_CURVES)
        )
    return (Figure("Best size by compute", "FLOPs", "parameters", tuple(curves), log_x=True, log_y=True),)


def residual_figure(result: Fit) -> Figure:
    """Return the residuals of log loss over compute, by size."""
    points, left = result.points, 100 * np.asarray(result.fitted.residuals)
    curves = []
    for n in _some(points.N):
        own = np.equal(points.N, n)
        curves.append(Curve(f"{number(n, 3)}", points.C[own].tolist(), left[own].tolist(), points=True, line=False))
    note = (
        "Measured loss minus that of the law, in percent. A pattern means that the law has another form than the runs."
    )
    return Figure("Residuals", "FLOPs", "percent", tuple(curves), note, log_x=True, zero=True)


def repeat_figure(result: Fit) -> Figure:
    """Return the losses of runs that read text again, by epochs, measured and by the law."""
    points, fitted = result.repeated, result.fitted
    curves = []
    groups = sorted({(float(u), float(n)) for u, n in zip(points.unique.round(-3), points.N, strict=True)})
    chosen = [groups[round(k)] for k in _some(np.arange(len(groups)))]
    for k, (unique, N) in enumerate(chosen):
        own = np.equal(points.unique.round(-3), unique) & np.equal(points.N, N)
        curves.append(_curve(f"{number(unique, 3)}, {number(N, 3)}", points, own, points.epochs))
        if fitted.repeats is not None:
            epochs = np.geomspace(1, points.epochs[own].max(), 40)
            loss = fitted.repeats.loss(N, epochs * unique, unique, fitted.rule)
            curves.append(Curve("law", epochs.tolist(), loss.tolist(), dashed=True, color=2 * k))
    note = "The numbers at the curves are unique tokens and parameters."
    return Figure("Loss by epochs", "epochs", "loss", tuple(curves), note, log_x=True)


def tables(result: Fit) -> tuple[Table, ...]:
    """Return the constants and the exponents with their intervals."""
    fitted = result.fitted
    constants = []
    for name in CONSTANTS:
        one = Estimate.of(getattr(fitted.law, name), [getattr(law, name) for law in fitted.draws])
        constants.append([name, f"{one.value:.4g}", f"{one.low:.4g} to {one.high:.4g}"])
    rows = []
    for approach in result.approaches:
        a, b = approach.a, approach.b
        values = [f"{a.value:.3f}", _short(a), f"{b.value:.3f}", _short(b)]
        rows.append([approach.name, *([approach.missing, "", "", ""] if approach.missing else values)])
    return (
        Table("loss = E + A / N^alpha + B / D^beta", ["constant", "value", "95% interval"], constants),
        Table("N ~ C^a, D ~ C^b", ["approach", "a", "interval", "b", "interval"], rows),
    )


def _short(one: Estimate) -> str:
    return f"{one.low:.3f} to {one.high:.3f}"
