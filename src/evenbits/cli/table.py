"""`evenbits table RECIPE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenbits.cli import options
from evenbits.cli.output import emit, note, working


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
