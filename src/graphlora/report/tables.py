"""Tables of a study, as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphlora.report.aggregate import (
    ModelScores,
    StudyNumbers,
    metric_mean,
    stability,
    variant_runs,
)
from graphlora.report.inference import mean
from graphlora.report.names import AVERAGE, difference_unit, is_share, metric_label, task_label, variant_label
from graphlora.report.numerals import NONE, interval, mean_std, millions, number, p_text, ratio_text, signed
from graphlora.report.reading import BASE
from graphlora.report.routing import routing_health
from graphlora.report.speed import SPEED, speed_problem

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"$\dagger$",
    "∞": r"$\infty$",
    "–": "--",
    "→": r"$\to$",
    "<": r"$<$",
    ">": r"$>$",
}
# Columns of the costs: metric, factor, digits, head, and whether sharing the device changes them.
COSTS = (
    ("step_time", 1e3, 1, "step (ms)", True),
    (SPEED, 1, 0, "tokens/s", True),
    ("peak_memory", 2**-30, 2, "peak memory (GiB)", False),
    ("train_seconds", 1, 0, "training (s)", True),
)


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: Short name for files and links.
        title: Heading.
        caption: What to see, the number of seeds and what each kind of number means.
        columns: Heads; the first columns up to `labels` are text, the others numbers.
        rows: Cells as text.
        strong: Row and column of the cells in bold.
        labels: Number of leading text columns.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()
    labels: int = 1

    def markdown(self) -> str:
        """The table with its caption above it."""
        rows = [
            [f"**{cell}**" if (r, c) in self.strong else cell for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]
        rule = ["---" if column < self.labels else "---:" for column in range(len(self.columns))]
        lines = [self.columns, rule, *rows]
        body = "\n".join(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
        )
        return f"{self.caption}\n\n{body}\n"

    def latex(self) -> str:
        """A `table` environment, in the style of the package booktabs."""
        rows = [
            " & ".join(
                rf"\textbf{{{latex_text(cell)}}}" if (r, c) in self.strong else latex_text(cell)
                for c, cell in enumerate(row)
            )
            for r, row in enumerate(self.rows)
        ]
        heads = " & ".join(latex_text(column) for column in self.columns)
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex_text(self.caption)}}}",
            rf"  \label{{tab:{self.name}}}",
            rf"  \begin{{tabular}}{{{'l' * self.labels}{'r' * (len(self.columns) - self.labels)}}}",
            r"    \toprule",
            rf"    {heads} \\",
            r"    \midrule",
            *(rf"    {row} \\" for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def study_tables(numbers: StudyNumbers) -> list[Table]:
    """All tables of a study, model by model; tables without content are left out."""
    tables = []
    for scores in numbers.models:
        suffix = f"-{scores.model}" if len(numbers.models) > 1 else ""
        where = f", {scores.model}"
        for table in (
            _score_table(numbers, scores, suffix, where),
            _comparison_table(numbers, scores, suffix, where),
            _stability_table(numbers, scores, suffix, where),
            _cost_table(scores, suffix, where),
            _routing_table(scores, suffix, where),
        ):
            if table.rows:
                tables.append(table)
    return tables


def seeds_text(scores: ModelScores) -> str:
    """`5 seeds`, or `2 to 5 seeds` where cells differ."""
    counts = {
        cell.summary.n
        for (variant, column), cell in scores.cells.items()
        if variant != BASE and column != AVERAGE
    } or {1}
    low, high = min(counts), max(counts)
    return f"{low} to {high} seeds" if low < high else f"{high} seed{'' if high == 1 else 's'}"


def latex_text(text: str) -> str:
    """Text with the characters that LaTeX reserves escaped."""
    return "".join(LATEX.get(character, character) for character in text)


def column_label(column: str) -> str:
    """Head of a column of scores."""
    return AVERAGE if column == AVERAGE else task_label(column)


def column_text(column: str) -> str:
    """A column of scores within a sentence."""
    return "the average over tasks" if column == AVERAGE else task_label(column)


def _score_table(numbers: StudyNumbers, scores: ModelScores, suffix: str, where: str) -> Table:
    rows, means = [], {}
    sizes = {
        variant: size
        for variant in scores.trained
        if (size := metric_mean(variant_runs(scores, variant), "num_trained")) is not None
    }
    for index, variant in enumerate(scores.variants):
        row = [variant_label(variant)]
        if sizes:
            row.append(millions(sizes.get(variant)))
        for column in scores.columns:
            cell = scores.cells.get((variant, column))
            if cell is None:
                row.append(NONE)
                continue
            if variant != BASE:
                means[index, len(row)] = cell.summary.mean
            row.append(mean_std(cell.summary) + ("†" if cell.marked else ""))
        if len(scores.tasks) > 1:
            stds = [
                std
                for task in scores.tasks
                if (cell := scores.cells.get((variant, task))) and (std := cell.summary.std) is not None
            ]
            row.append(f"{mean(stds):.2f}" if len(stds) == len(scores.tasks) else NONE)
        rows.append(tuple(row))
    best_of = max if is_share(numbers.metric) else min
    best = {
        best_of((key for key in means if key[1] == column), key=lambda key: means[key])
        for column in {column for _, column in means}
    }
    heads = [
        "method",
        *(["trained (M)"] if sizes else []),
        *(column_label(column) for column in scores.columns),
    ]
    heads += ["mean std"] if len(scores.tasks) > 1 else []
    caption = (
        f"{_metric_text(numbers)}, mean ± standard deviation over {seeds_text(scores)}{where}. "
        "Bold: the best mean of a column, whether or not the difference is significant (see the comparison)."
        + (
            " Mean std: mean of the tasks' standard deviations, the paper's stability."
            if len(scores.tasks) > 1
            else ""
        )
    )
    return Table(f"scores{suffix}", "Scores", caption, tuple(heads), tuple(rows), frozenset(best))


def _comparison_table(numbers: StudyNumbers, scores: ModelScores, suffix: str, where: str) -> Table:
    found = {(c.column, c.variant): c for c in numbers.comparisons if c.model == scores.model}
    rows = []
    for column in scores.columns:
        for variant in scores.trained:
            cell = scores.cells.get((variant, column))
            if cell is None:
                continue
            s = cell.summary
            row = [
                column_label(column),
                variant_label(variant),
                str(s.n),
                f"{s.mean:.2f}",
                number(s.std),
                interval(s),
            ]
            if c := found.get((column, variant)):
                row += [signed(c.difference.mean), interval(c.difference, signs=True), str(c.difference.n)]
                row += [p_text(c.t_p), p_text(c.holm_p), p_text(c.flip_p, digits=4)]
            else:
                row += ["reference" if variant == numbers.reference else NONE] + [NONE] * 5
            rows.append(tuple(row))
    tests = sum(c.t_p is not None for c in numbers.comparisons)
    other = variant_label(numbers.reference) if numbers.reference else "a reference (none was named)"
    caption = (
        f"Each method with its 95% t interval over seeds{where}, and its difference to {other} in "
        f"{difference_unit(numbers.metric)} over the seeds that both have (pairs), with the 95% t interval. p: paired "
        f"t test; Holm: the same corrected for all tests of this study together ({tests}); flips: exact sign-flip "
        "permutation test, which cannot fall below 2 / 2^pairs (0.0625 for five)."
    )
    heads = ("task", "method", "n", "mean", "std", "95% interval", "difference", "95% interval", "pairs")
    heads += ("p", "Holm", "flips")
    return Table(f"comparison{suffix}", "Comparison", caption, heads, tuple(rows), labels=2)


def _stability_table(numbers: StudyNumbers, scores: ModelScores, suffix: str, where: str) -> Table:
    rows = []
    several = len(scores.tasks) > 1
    for variant in scores.trained:
        if numbers.reference is None or variant == numbers.reference:
            continue
        ratios = [stability(scores, variant, numbers.reference, task) for task in scores.tasks]
        if several:
            ratios.append(stability(scores, variant, numbers.reference))
        if any(ratio is not None for ratio in ratios):
            rows.append((variant_label(variant), *(ratio_text(ratio) for ratio in ratios)))
    reference = variant_label(numbers.reference) if numbers.reference else ""
    caption = (
        f"Stability{where}: variance over {seeds_text(scores)} divided by the variance of {reference}, with its 95% F "
        f"interval. Above 1: varies more than {reference}; an interval that holds 1 shows no difference. The interval "
        "takes scores as normal and the two methods as independent, and is not corrected for the number of rows."
    )
    heads = (
        "method",
        *(task_label(task) for task in scores.tasks),
        *(("all tasks, pooled",) if several else ()),
    )
    return Table(f"stability{suffix}", "Stability: ratio of variances", caption, heads, tuple(rows))


def _cost_table(scores: ModelScores, suffix: str, where: str) -> Table:
    rows = []
    problem = speed_problem(scores)
    for variant in scores.trained:
        runs = variant_runs(scores, variant)
        size = metric_mean(runs, "num_trained")
        values = [
            (metric_mean(runs, name), scale, digits)
            for name, scale, digits, _, timed in COSTS
            if not (timed and problem)
        ]
        if size is not None or any(value is not None for value, _, _ in values):
            cells = (
                NONE if value is None else f"{value * scale:,.{digits}f}" for value, scale, digits in values
            )
            rows.append((variant_label(variant), str(len(runs)), millions(size), *cells))
    caption = f"Cost{where}: means over all runs of a method. " + (
        problem or "Times are those of the machine and of what else ran on it at the time (see provenance)."
    )
    heads = ("method", "runs", "trained (M)")
    heads += tuple(head for _, _, _, head, timed in COSTS if not (timed and problem))
    return Table(f"cost{suffix}", "Cost", caption, heads, tuple(rows))


def _routing_table(scores: ModelScores, suffix: str, where: str) -> Table:
    rows = []
    for health in routing_health(scores):
        row = [task_label(health.task), variant_label(health.variant), str(health.n)]
        row += [
            number(health.worst_cv),
            number(health.mean_cv),
            number(health.mean_entropy),
            number(health.dead, 1),
        ]
        row += [number(health.tie_percent, 2), number(health.overlap, 3)]
        rows.append(tuple(row))
    caption = (
        f"Routing{where}. Load CV: standard deviation of the experts' loads over their mean (0 is even), in the "
        "worst layer of any seed and on average; entropy of the routing (1 is even); dead experts per run, all "
        "layers together; ties: share of tokens whose choice of experts hangs on rounding to bfloat16; overlap: mean "
        "absolute cosine between the experts' updates. n: number of seeds."
    )
    heads = (
        "task",
        "method",
        "n",
        "load CV, worst",
        "load CV, mean",
        "entropy",
        "dead",
        "ties (%)",
        "overlap",
    )
    return Table(f"routing{suffix}", "Routing health", caption, heads, tuple(rows), labels=2)


def _metric_text(numbers: StudyNumbers) -> str:
    split = "" if numbers.study.split == "test" else ", on the validation split"
    text = metric_label(numbers.metric).replace(", %", " in percent")
    return f"{text[0].upper()}{text[1:]}{split}"


def joined_markdown(tables: Sequence[Table]) -> str:
    """Tables one after the other, under their titles."""
    return "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables)
