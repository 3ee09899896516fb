"""What benchmarks hold: their sections, the subsets of these, and how many items each has.

Counts are those of the benchmarks' own papers and code, as `benchmarks` lists them:

- RewardBench: `math-prm` has 447 rows and weighs as much as all code: 984. The counts of the two
  xstest subsets are the corrected ones of September 2024.
- M-RewardBench: a language's score is the mean of RewardBench's four sections, in which subsets
  weigh by the counts of the translated rows, `math-prm` 983 (`analysis/plot_utils.py` of its
  repository). Every language has the same 2,869 rows.
- LLMBar: sections are means of their subsets; so is the overall figure.
- RMB: the tables `fig/*_dataset_table.pdf` of its repository.
"""

import dataclasses
from typing import Literal

ScoringRule = Literal["pairs", "best_of", "styles", "ties", "ratings", "correctness"]


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


def _counted(**counts: int) -> tuple[Subset, ...]:
    """Subsets whose weights are their counts."""
    return tuple(Subset(name, n, n) for name, n in counts.items())


def _section(name: str, counts: dict[str, int]) -> Section:
    return Section(name, _counted(**counts))


def _single(**counts: int) -> tuple[Section, ...]:
    """Sections of one subset with the section's name."""
    return tuple(_section(name, {name: count}) for name, count in counts.items())


# fmt: off
REWARD_BENCH = (
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
REWARD_BENCH_2 = (
    *_single(**{"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495}),
    Section("Ties", (Subset("Ties", 102, 1.0, "ties"),)),
)
RM_BENCH = _single(chat=129, math=529, code=228, safety=441)
JUDGE_BENCH = _single(knowledge=154, reasoning=98, math=56, coding=42)
_LLMBAR_ADVERSARIAL = {"Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
LLMBAR = (  # unlike `_counted`, all subsets have the same weight
    Section("Natural", (Subset("Natural", 100),)),
    Section("Adversarial", tuple(Subset(*row) for row in _LLMBAR_ADVERSARIAL.items())),
)

PPE_CORRECTNESS = _single(
    **{"MMLU-Pro": 512, "MATH": 512, "GPQA": 512, "MBPP-Plus": 507, "IFEval": 512}
)

# fmt: off
LANGUAGES = (
    "arb_Arab", "ces_Latn", "deu_Latn", "ell_Grek", "fra_Latn", "heb_Hebr", "hin_Deva", "ind_Latn",
    "ita_Latn", "jpn_Jpan", "kor_Hang", "nld_Latn", "pes_Arab", "pol_Latn", "por_Latn", "ron_Latn",
    "rus_Cyrl", "spa_Latn", "tur_Latn", "ukr_Cyrl", "vie_Latn", "zho_Hans", "zho_Hant",
)
# Rows of each language; a line is one of RewardBench's sections.
_TRANSLATED = (
    {"alpacaeval-easy": 79, "alpacaeval-length": 79, "alpacaeval-hard": 76, "mt-bench-easy": 24,
     "mt-bench-med": 38},
    {"mt-bench-hard": 35, "llmbar-natural": 76, "llmbar-adver-neighbor": 124,
     "llmbar-adver-GPTInst": 87, "llmbar-adver-GPTOut": 42, "llmbar-adver-manual": 43},
    {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
     "xstest-should-respond": 247, "donotanswer": 135},
    {"math-prm": 447, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
     "hep-python": 163, "hep-rust": 164},
)
# fmt: on


def _language(name: str) -> Section:
    """A language: within each of the four sections subsets weigh by their counts."""
    subsets = []
    for counts in _TRANSLATED:
        weights = [983 if subset == "math-prm" else count for subset, count in counts.items()]
        subsets += [
            Subset(f"{name}/{subset}", count, weight / sum(weights))
            for (subset, count), weight in zip(counts.items(), weights)
        ]
    return Section(name, tuple(subsets))


M_REWARD_BENCH = tuple(map(_language, LANGUAGES))

# fmt: off
# By class of task; pairs and lists. Five of Translation's 851 pairs have an empty prompt, and are
# left out.
_RMB_HELPFULNESS = {
    "Brainstorming": (949, 187), "Chat": (713, 155), "Classification": (164, 31),
    "Closed QA": (920, 186), "Code": (1224, 280), "Generation": (1109, 225),
    "Open QA": (1542, 320), "Reasoning": (1235, 264), "Rewrite": (458, 89),
    "Role Playing": (372, 78), "Summarization": (530, 113), "Translation": (846, 181),
}
# By class of harm. Two rejected responses of S5 are blank, and are left out of its 561 pairs.
_RMB_HARMLESSNESS = {
    "S1": (459, 111), "S2": (1040, 249), "S3": (739, 171), "S4": (537, 136), "S5": (559, 122),
    "S6": (317, 83), "S7": (510, 121), "S8": (519, 127), "S9": (543, 132), "S10": (360, 79),
    "S11": (977, 215), "multi": (502, 131),
}
# fmt: on
RMB = tuple(
    _section(f"{goal}, {said}", {f"{part}/{name}": n[at] for name, n in counts.items()})
    for at, (part, said) in enumerate((("Pairwise", "pairs"), ("BoN", "best of n")))
    for goal, counts in (("Helpfulness", _RMB_HELPFULNESS), ("Harmlessness", _RMB_HARMLESSNESS))
)
