"""What was tried, what survived and what was lost: one row for each promise."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Row:
    """One promise of a part.

    Attributes:
      part: of the campaign.
      promise: what was tried, in words.
      tried: how often.
      lost: what went wrong, a line each.
    """

    part: str
    promise: str
    tried: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)

    def count(self, fault: str = "") -> None:
        """One more try; `fault` says how it went wrong, if it did."""
        self.tried += 1
        if fault:
            self.lost.append(fault)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, with what was lost beneath it."""
    lines = ["| part | what | tried | survived | lost |", "|---|---|---:|---:|---:|"]
    for row in rows:
        survived = row.tried - len(row.lost)
        lines.append(
            f"| {row.part} | {row.promise} | {row.tried:,} | {survived:,} | {len(row.lost):,} |"
        )
    lines += [""] * any(row.lost for row in rows)
    lines += [f"lost: {row.part}: {row.promise}: {fault}" for row in rows for fault in row.lost]
    return "\n".join(lines)
