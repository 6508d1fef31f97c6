"""`evenbits table RECIPE`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, note, working

if TYPE_CHECKING:
    from evenbits.pipeline.table import Table


def table(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package (olive_sst2) or a YAML file.")],
    data: Annotated[Path, typer.Option(help="Folder that the recipe's names are below.")] = Path(),
    model: Annotated[str | None, typer.Option(help="Another model in place of the recipe's.")] = None,
    detach: options.Detach = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Run a recipe: quantize a model in several ways and print the accuracy table."""
    with working(detach):
        from evenbits.pipeline.table import make_table
        from evenbits.schemes.recipe import read_recipe

        made = make_table(read_recipe(recipe), data, model=model, say=note)
    if as_json:
        emit(made.to_json())
        return
    from evenbits.reporting.tables import show
    from evenbits.reporting.tables import table as draw

    columns = ["run", made.metric, "±", "against float", "±", "p", "bits / weight", "published"]
    rows = [
        (r.name, r.metric, r.standard_error, r.difference, r.paired_error, r.p, r.bits_per_weight, r.published)
        for r in made.rows
    ]
    show(draw(f"{made.title}, n = {made.n:,}", columns, rows))
    how = "p: exact McNemar test" if made.metric == "accuracy" else "by bootstrap over items, the same draws for both"
    show(f"±: one standard error; against float: the same items, paired; {how}.")
    _show_divergences(made)


def _show_divergences(made: Table) -> None:
    """How far each run is from float, where the task has classes; beside the reference run, if there is one."""
    from evenbits.reporting.tables import show
    from evenbits.reporting.tables import table as draw

    apart = [(row.name, row.divergence) for row in made.rows if row.divergence is not None]
    if not apart:
        return
    beside = [] if made.reference is None else [f"minus {made.reference}", "±"]
    figures = []
    for name, found in apart:
        numbers = (found.mean, found.error, found.difference, found.paired_error)[: 2 + len(beside)]
        figures.append((name, *(None if number is None else 1000 * number for number in numbers)))
    show("", draw("divergence from float", ["run", "mnat", "±", *beside], figures))
    show("Kullback-Leibler divergence of class probabilities, thousandths of a nat per item; ±: one standard error.")
