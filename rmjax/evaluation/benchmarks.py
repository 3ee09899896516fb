"""The table of benchmarks: where they come from, what their rows are, and how they are scored.

The rules are those of the benchmarks' own papers and code:

- RewardBench, arXiv 2403.13787.
- RewardBench 2, arXiv 2506.01937.
- RM-Bench, arXiv 2410.16184.
- JudgeBench, arXiv 2410.12784, the pairs of GPT-4o.
- PPE, arXiv 2410.14872: human preferences without ties, and five sets of 32 samples a prompt.
- RMB, arXiv 2410.09893. The overall figure is the mean of its four parts, as papers report it.
- M-RewardBench, arXiv 2410.15522, without its 800 translations, which its average leaves out.
- LLMBar, arXiv 2310.07641.
- HelpSteer2, arXiv 2406.08673, HelpSteer2-Preference, arXiv 2410.01257, and HelpSteer3-Preference,
  arXiv 2505.11475.
"""

import dataclasses
from typing import Literal

from rmjax.evaluation import benchmark_sections as sections
from rmjax.evaluation.benchmark_sections import LANGUAGES, ScoringRule, Section

RowFormat = Literal["choices", "judgements", "votes", "graded", "rmb", "llmbar", "pairs", "ratings"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the table.

    Attributes:
      name: on the command line.
      title: in reports.
      source: on the hub, or the directory in `clone`; empty where the user names a file.
      split: of the source.
      row_format: which fields the rows have; see `item_readers`.
      rule: how items are scored; see `scoring_rules`.
      sections: in the order of the report; none where the subsets are whatever the data hold.
      overall: whether the overall score is the mean of the sections or of all items.
      ties: the credit of equal values in a pair.
      subset: the field that names a row's subset.
      parts: directories of the source that hold rows, and what the subset of these begins with.
      files: which files of a local directory hold rows, as a pattern; empty if the split says it.
      clone: the repository on GitHub that has the data, where the hub does not.
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
    subset: str = "subset"
    parts: tuple[tuple[str, str], ...] = ()
    files: str = ""
    clone: str = ""


_PPE = tuple((f"PPE-{part.name}-Best-of-K", part.name) for part in sections.PPE_CORRECTNESS)

# fmt: off
_ROWS = (  # name, title, source, split, row format, rule, sections
    Benchmark("reward-bench", "RewardBench", "allenai/reward-bench", "filtered",
              "choices", "pairs", sections.REWARD_BENCH),
    Benchmark("reward-bench-2", "RewardBench 2", "allenai/reward-bench-2", "test",
              "choices", "best_of", sections.REWARD_BENCH_2),
    Benchmark("rm-bench", "RM-Bench", "THU-KEG/RM-Bench", "train",
              "choices", "styles", sections.RM_BENCH, files="*_filtered.json"),
    Benchmark("judge-bench", "JudgeBench", "ScalerLab/JudgeBench", "gpt",
              "judgements", "pairs", sections.JUDGE_BENCH, overall="items"),
    Benchmark("ppe-preference", "PPE Preference", "lmarena-ai/PPE-Human-Preference-V1", "test",
              "votes", "pairs", overall="items"),
    Benchmark("ppe-correctness", "PPE Correctness", "lmarena-ai", "train",
              "graded", "correctness", sections.PPE_CORRECTNESS, parts=_PPE),
    Benchmark("rmb", "RMB", "RMB_dataset", "",
              "rmb", "pairs", sections.RMB, files="*.json",
              clone="Zhou-Zoey/RMB-Reward-Model-Benchmark"),
    Benchmark("m-reward-bench", "M-RewardBench", "CohereLabsCommunity/multilingual-reward-bench",
              "test", "choices", "pairs", sections.M_REWARD_BENCH,
              parts=tuple((name, name) for name in LANGUAGES)),
    Benchmark("llmbar", "LLMBar", "Dataset/LLMBar", "",
              "llmbar", "pairs", sections.LLMBAR, files="dataset.json",
              clone="princeton-nlp/LLMBar"),
    Benchmark("helpsteer2", "HelpSteer2, ratings", "nvidia/HelpSteer2", "validation",
              "ratings", "ratings", overall="items"),
    Benchmark("helpsteer2-preference", "HelpSteer2-Preference", "nvidia/HelpSteer2/preference",
              "validation", "pairs", "pairs", overall="items", ties=0.5),
    Benchmark("helpsteer3", "HelpSteer3-Preference", "nvidia/HelpSteer3", "validation",
              "pairs", "pairs", overall="items", ties=0.5, subset="domain",
              parts=(("preference", ""),)),
    # The user's own data.
    Benchmark("pairs", "Pairs", "", "validation", "pairs", "pairs", overall="items", ties=0.5),
    Benchmark("best-of-n", "Best of n", "", "test", "choices", "best_of", overall="items"),
    Benchmark("ratings", "Ratings", "", "validation", "ratings", "ratings", overall="items"),
)
# fmt: on

BENCHMARKS = {row.name: row for row in _ROWS}
# What `python -m rmjax.evaluate MODEL` runs: what the hub has, but for those of 30,000 responses
# and more.
DEFAULT = (
    *("reward-bench", "reward-bench-2", "rm-bench", "judge-bench"),
    *("helpsteer2", "helpsteer2-preference", "helpsteer3"),
)

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
    "correctness": "share of a prompt's pairs, each of a right and a wrong sample that the data "
    "name, in which the right one has the higher value; a tie is {ties}; the mean over prompts",
    "ratings": "share of the pairs of responses to a prompt that the value orders as {gold} does, "
    "equal values counted one half; the mean over prompts",
}
