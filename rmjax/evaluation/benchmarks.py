"""The table of benchmarks: where they come from, what they hold, and how they are scored.

Counts and rules are those of the benchmarks' own papers and code:

- RewardBench, arXiv 2403.13787. `math-prm` has 447 rows and weighs as much as all code: 984.
  The counts of the two xstest subsets are the corrected ones of September 2024.
- RewardBench 2, arXiv 2506.01937.
- RM-Bench, arXiv 2410.16184.
- JudgeBench, arXiv 2410.12784, the pairs of GPT-4o.
- LLMBar, arXiv 2310.07641. Sections are means of their subsets; so is the overall figure.
- HelpSteer2, arXiv 2406.08673, and HelpSteer2-Preference, arXiv 2410.01257.
"""

import dataclasses
from typing import Literal

RowFormat = Literal["choices", "judgements", "llmbar", "pairs", "ratings"]
ScoringRule = Literal["pairs", "best_of", "styles", "ties", "ratings"]


@dataclasses.dataclass(frozen=True)
class Subset:
    """A part of a benchmark with a score of its own.

    Attributes:
      name: as in the data.
      count: how many items it has; 0 if that is not known.
      weight: in its section.
      rule: how its items are scored, if not by the benchmark's rule.
    """

    name: str
    count: int = 0
    weight: float = 1.0
    rule: ScoringRule | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """A named group of subsets; its score is their weighted mean."""

    name: str
    subsets: tuple[Subset, ...]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the table.

    Attributes:
      name: on the command line.
      title: in reports.
      source: on the hub; empty where the user names a file.
      split: of the source.
      row_format: which fields the rows have; see `items`.
      rule: how items are scored; see `scoring_rules`.
      sections: in the order of the report; none where the subsets are whatever the data hold.
      overall: whether the overall score is the mean of the sections or of all items.
      ties: the credit of equal values in a pair.
    """

    name: str
    title: str
    source: str
    split: str
    row_format: RowFormat
    rule: ScoringRule
    sections: tuple[Section, ...] = ()
    overall: Literal["sections", "items"] = "sections"
    ties: float = 0.0


def _counted(**counts: int) -> tuple[Subset, ...]:
    """Subsets whose weights are their counts."""
    return tuple(Subset(name, n, n) for name, n in counts.items())


def _section(name: str, counts: dict[str, int]) -> Section:
    return Section(name, _counted(**counts))


def _single(**counts: int) -> tuple[Section, ...]:
    """Sections of one subset with the section's name."""
    return tuple(_section(name, {name: count}) for name, count in counts.items())


# fmt: off
_REWARD_BENCH = (
    _section("Chat", {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
        "mt-bench-easy": 28, "mt-bench-med": 40,
    }),
    _section("Chat Hard", {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    }),
    _section("Safety", {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    }),
    Section("Reasoning", (
        Subset("math-prm", 447, 984.0),
        *_counted(**{f"hep-{x}": 164 for x in ("cpp", "go", "java", "js", "python", "rust")}),
    )),
)
# fmt: on
_REWARD_BENCH_2 = (
    *_single(**{"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495}),
    Section("Ties", (Subset("Ties", 102, 1.0, "ties"),)),
)
_RM_BENCH = _single(chat=129, math=529, code=228, safety=441)
_JUDGE_BENCH = _single(knowledge=154, reasoning=98, math=56, coding=42)
_LLMBAR_ADVERSARIAL = {"Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
_LLMBAR = (  # unlike `_counted`, all subsets have the same weight
    Section("Natural", (Subset("Natural", 100),)),
    Section("Adversarial", tuple(Subset(*row) for row in _LLMBAR_ADVERSARIAL.items())),
)

# fmt: off
_ROWS = (  # name, title, source, split, row format, rule, sections
    Benchmark("reward-bench", "RewardBench", "allenai/reward-bench", "filtered",
              "choices", "pairs", _REWARD_BENCH),
    Benchmark("reward-bench-2", "RewardBench 2", "allenai/reward-bench-2", "test",
              "choices", "best_of", _REWARD_BENCH_2),
    Benchmark("rm-bench", "RM-Bench", "THU-KEG/RM-Bench", "train",
              "choices", "styles", _RM_BENCH),
    Benchmark("judge-bench", "JudgeBench", "ScalerLab/JudgeBench", "gpt",
              "judgements", "pairs", _JUDGE_BENCH, overall="items"),
    Benchmark("llmbar", "LLMBar", "Dataset/LLMBar", "",
              "llmbar", "pairs", _LLMBAR),
    Benchmark("helpsteer2", "HelpSteer2, ratings", "nvidia/HelpSteer2", "validation",
              "ratings", "ratings", overall="items"),
    Benchmark("helpsteer2-preference", "HelpSteer2-Preference", "nvidia/HelpSteer2/preference",
              "validation", "pairs", "pairs", overall="items", ties=0.5),
    # The user's own data.
    Benchmark("pairs", "Pairs", "", "validation", "pairs", "pairs", overall="items", ties=0.5),
    Benchmark("best-of-n", "Best of n", "", "test", "choices", "best_of", overall="items"),
    Benchmark("ratings", "Ratings", "", "validation", "ratings", "ratings", overall="items"),
)
# fmt: on

BENCHMARKS = {row.name: row for row in _ROWS}
# What `python -m rmjax.evaluate MODEL` runs by default: all that the hub has as data files.
FROM_HUB = tuple(row.name for row in _ROWS if row.source.count("/") and row.name != "llmbar")

# In JudgeBench the subset follows from the beginning of the row's source.
JUDGE_BENCH_SOURCES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}

# The scoring rules in words, for reports.
RULE_DESCRIPTIONS = {
    "pairs": "right where every good response has a higher value than every bad one; a tie is "
    "{ties}",
    "best_of": "1 / (responses tied for the highest value) if a good one is among them, else 0",
    "styles": "share of the nine comparisons of three good and three bad responses: easy, normal "
    "and hard by style, their plain mean; a tie is wrong",
    "ties": ".3 tied accuracy + .3 reference accuracy + .2 gap beyond the spread of right answers "
    "+ .2 the same, also of the reference + .01 tanh(gap / spread - 1)",
    "ratings": "share of the pairs of responses to a prompt that the value orders as {gold} does, "
    "equal values counted one half; the mean over prompts",
}
