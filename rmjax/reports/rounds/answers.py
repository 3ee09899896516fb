"""What a round's directory holds: a policy's answers to the same prompts, and scores of them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.data.conversation import Conversation, prompt_key
from rmjax.data.fields import is_number
from rmjax.data.messages import message_text
from rmjax.data.readers import Row, open_source
from rmjax.data.row_reader import RowReader
from rmjax.errors import UserError

ANSWERS = "answers.jsonl"
START = "start"  # the name of scores that are log-probabilities by the policy of the start
_SCORES = "scores-"
_LARGEST = 1e100  # of a score, so that squares and sums are finite


@dataclasses.dataclass(frozen=True)
class Answer:
    """One response.

    Attributes:
      conversation: that ends with it.
      text: of it.
      ended: whether the model came to an end; None if the file does not say.
      log_probability: of its tokens by the policy that said it; NaN if the file does not say.
    """

    conversation: Conversation
    text: str
    ended: bool | None
    log_probability: float


@dataclasses.dataclass(frozen=True)
class Round:
    """A round's answers.

    Attributes:
      name: of its directory.
      prompts: a key for each prompt, all different, in order.
      answers: to each prompt, at least one.
      values: of each judge by name, of each answer in order; NaN where there is no score.
      attributes: of each judge by name, its attributes' scores by name, likewise.
    """

    name: str
    prompts: list[str]
    answers: list[list[Answer]]
    values: dict[str, Float[np.ndarray, "N"]]
    attributes: dict[str, dict[str, Float[np.ndarray, "N"]]]

    @property
    def flat(self) -> list[Answer]:
        """All answers, in order."""
        return [answer for answers in self.answers for answer in answers]

    @property
    def words(self) -> Float[np.ndarray, "N"]:
        """How many words each answer has."""
        return np.asarray([len(answer.text.split()) for answer in self.flat], float)

    @property
    def log_ratios(self) -> Float[np.ndarray, "N"]:
        """log(policy / start) of each answer; NaN where one of the two is not known."""
        own = np.asarray([answer.log_probability for answer in self.flat])
        return own - self.values.get(START, np.full(len(own), np.nan))

    def by_prompt(self, values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "P"]:
        """The mean over the answers to each prompt, of those that have a value."""
        parts = np.split(values, np.cumsum([len(answers) for answers in self.answers])[:-1])
        known = [part[np.isfinite(part)] for part in parts]
        return np.asarray([part.mean() if len(part) else np.nan for part in known])

    @property
    def judges(self) -> list[str]:
        """Names of the reward models whose scores there are."""
        return [name for name in self.values if name != START]


def read_round(directory: str | Path) -> Round:
    """Reads a round.

    Args:
      directory: with `answers.jsonl`, rows of responses in any layout; and for each judge
        `scores-NAME.jsonl`, as `rmjax.score` writes it for these rows.

    Raises:
      UserError: a file is missing or broken, or scores are not of these answers.
    """
    path = Path(directory).expanduser()
    if not (path / ANSWERS).is_file():
        raise UserError(
            f"{path}: there is no {ANSWERS} in it, the answers of a policy as `rmjax.sample` "
            "writes them"
        )
    prompts, answers = [], []
    for row, conversations in _rows(path / ANSWERS):
        if not conversations:
            continue  # a prompt that fills the context
        prompts.append(prompt_key(conversations))
        answers.append([_answer(row, c, i) for i, c in enumerate(conversations)])
    if not prompts:
        raise UserError(f"{path / ANSWERS}: no prompt has an answer")
    values: dict[str, np.ndarray] = {}
    attributes: dict[str, dict[str, np.ndarray]] = {}
    # What taught comes first.
    files = sorted(path.glob(f"{_SCORES}*.jsonl"), key=lambda f: (f.stem != "scores-reward", f))
    for file in files:
        name = file.stem.removeprefix(_SCORES)
        values[name], attributes[name] = _scores(file, answers)
    return _merged(Round(path.name, prompts, answers, values, attributes))


def _merged(found: Round) -> Round:
    """The same with one entry for each prompt, which counts once, however many rows it has."""
    numbers: dict[str, int] = {}
    of_rows = [numbers.setdefault(key, len(numbers)) for key in found.prompts]
    answers: list[list[Answer]] = [[] for _ in numbers]
    for number, row in zip(of_rows, found.answers):
        answers[number] += row
    of_answers = np.repeat(of_rows, [len(row) for row in found.answers])
    order = np.argsort(of_answers, kind="stable")
    values = {name: x[order] for name, x in found.values.items()}
    attributes = {
        judge: {name: x[order] for name, x in columns.items()}
        for judge, columns in found.attributes.items()
    }
    return Round(found.name, list(numbers), answers, values, attributes)


def _rows(path: Path) -> list[tuple[Row, list[Conversation]]]:
    reader = RowReader()
    return [(row, reader.responses(row)) for row in open_source(str(path), "")]


def _number(value: Any, row: Row) -> float:
    """A score; NaN where there is none."""
    if value is None:
        return np.nan
    if not is_number(value) or not abs(value) <= _LARGEST:
        raise UserError(f"{row.where}: a score is {value!r}, expected a number or null")
    return float(value)


def _answer(row: Row, conversation: Conversation, number: int) -> Answer:
    def column(name: str) -> Any:
        found = row.fields.get(name)
        return found[number] if isinstance(found, list) and number < len(found) else None

    ended, own = column("ended"), column("log_probabilities")
    return Answer(
        conversation,
        message_text(conversation.messages[-1]),
        ended if isinstance(ended, bool) else None,
        sum(_number(value, row) for value in own) if own else np.nan,
    )


def _scores(
    path: Path, answers: list[list[Answer]]
) -> tuple[Float[np.ndarray, "N"], dict[str, Float[np.ndarray, "N"]]]:
    """Values and attributes of a file of scores.

    Raises:
      UserError: it is not of these answers.
    """
    rows = [(row, found) for row, found in _rows(path) if found]
    same = [[a.conversation for a in part] for part in answers] == [found for _, found in rows]
    if not same:
        raise UserError(
            f"{path}: these are not scores of the {ANSWERS} beside it; remove it and score them "
            "again"
        )
    values: list[float] = []
    named: list[dict[str, float]] = []
    for row, found in rows:
        scores, own = row.fields.get("scores"), row.fields.get("attributes")
        if not all(isinstance(x, list) and len(x) == len(found) for x in (scores, own)):
            raise UserError(f"{row.where}: no scores, as `rmjax.score` writes them")
        values += [_number(score, row) for score in scores or []]
        named += [{k: _number(v, row) for k, v in (x or {}).items()} for x in own or []]
    names = list(dict.fromkeys(name for row in named for name in row))
    columns = {n: np.asarray([row.get(n, np.nan) for row in named], float) for n in names}
    return np.asarray(values, float), columns


def check_same_prompts(rounds: list[Round]) -> None:
    """Raises a `UserError` unless all rounds answer the same prompts in the same order."""
    for other in rounds[1:]:
        if other.prompts != rounds[0].prompts:
            count = len(set(other.prompts) & set(rounds[0].prompts))
            raise UserError(
                f"{other.name}: {len(other.prompts)} prompts, of which {count} are among the "
                f"{len(rounds[0].prompts)} of {rounds[0].name}; rounds are compared on the same "
                "prompts in the same order"
            )
    names = [found.name for found in rounds]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: two directories have the same name; rename one")


def last_user_turn(answer: Answer) -> str:
    """The text that was answered."""
    return message_text(answer.conversation.messages[-2])
