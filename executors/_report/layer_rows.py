"""What the layer shows: whether y is right, which inference needs, and gradients, which training needs besides."""

from __future__ import annotations

from collections.abc import Sequence

from executors._report.cells import LOOKS, cell, group, panel
from executors._report.judged import JudgedExecutor
from executors._report.markup import Html, tag
from moe_ref.conformance.reporting.ledger import FAILS, HOLDS, NOT_APPLICABLE

ROWS = {
    "y": ("y, on the layer:", "all that inference needs."),
    "gradients": ("gradients, on the layer:", "training needs them besides."),
}


def layer_rows(judged: Sequence[JudgedExecutor]) -> Html:
    """A row for y and one for gradients."""
    rows = [group("The layer", len(judged))]
    for key, (title, says) in ROWS.items():
        head = tag("th", tag("b", title), " ", tag("span", says), scope="row", role="rowheader")
        made = [_cell(place, own, key, len(judged)) for place, own in enumerate(judged)]
        row = tag("tr", head, *(each for each, _ in made), class_="clause", role="row")
        rows += [row, *(opened for _, opened in made if opened)]
    return tag("tbody", *rows, role="rowgroup")


def _cell(place: int, own: JudgedExecutor, row: str, columns: int) -> tuple[Html, Html | None]:
    """The cell, and what it opens."""
    judgement = own.row.judgement
    if judgement is None:
        return cell(own.name, "absent", "·", "not run", title=own.row.reason), None
    failures = [each for each in own.on_layer if row in own.needs(each)]
    if failures:
        key = f"e{place}-layer-{row}"
        opened = panel(key, row, own, columns, failures)
        return cell(own.name, *LOOKS[FAILS], opens=key), opened
    judged = row == "y" or any(verdict.name != "y" for verdict in judgement.verdicts)
    return cell(own.name, *LOOKS[HOLDS if judged else NOT_APPLICABLE]), None
