"""Signals, and a second command on the same files: the first one ends well, or says why not."""

import os
import signal

from campaign import forks, served_signals
from campaign.ledger import Row
from campaign.served import Load
from campaign.tries import Tries, at

PART = "signals"
# By promise, the signals, and with which status a command may end beside 0.
_SENT: dict[str, tuple[list[int], tuple[int, ...]]] = {
    "Ctrl-C": ([signal.SIGINT], (130,)),
    "SIGTERM twice": ([signal.SIGTERM, signal.SIGTERM], (-signal.SIGTERM,)),
    "SIGSTOP and SIGCONT": ([signal.SIGSTOP, signal.SIGCONT], ()),
}
_TWO = "two at once"
_BETWEEN = 0.2  # seconds between two signals


def run(tries: Tries) -> list[Row]:
    """Sends each signal to each command in turn, until the minutes are over."""
    names = [(promise, name) for name in tries.victims for promise in (*_SENT, _TWO)]
    rows = {(promise, name): Row(PART, f"{promise}: {name}") for promise, name in names}
    load = Load(tries.scratch) if tries.served else None
    of_server = served_signals.rows(PART)
    while not tries.over():
        for name, _ in tries.each(1):
            for promise, (sent, codes) in _SENT.items():
                moment = tries.moment(name)
                fault = _sent(tries, name, moment, sent, codes)
                tries.count(rows[promise, name], f"at {moment:.2f} s", fault)
            moment = tries.moment(name)
            tries.count(rows[_TWO, name], f"at {moment:.2f} s", _twice(tries, name, moment))
        if load is not None:
            served_signals.run(tries, load, of_server)
    return [row for row in (*rows.values(), *of_server.values()) if row.tried]


def _sent(tries: Tries, name: str, moment: float, sent: list[int], codes: tuple[int, ...]) -> str:
    """Sends signals to a command and continues it; what went wrong, if anything did."""
    directory, left = tries.fresh(name), [*sent]

    def when(process: int, now: float) -> bool:
        if now < moment + _BETWEEN * (len(sent) - len(left)):
            return False
        os.kill(process, left.pop(0))
        return not left

    ended = forks.run(tries.victims[name].arguments, directory, when=when)
    fault = unlike(ended.code, ended.text, codes)
    return fault or tries.again(name, directory)


def unlike(code: int | None, text: str, codes: tuple[int, ...]) -> str:
    """What is wrong with how a command ended that got a signal; nothing if all is right."""
    said = [line for line in text.splitlines() if line.startswith("interrupted")]
    if code not in (*codes, 0):
        return f"status {code}: {text[-300:]!r}"
    if "Traceback" in text or "Exception ignored" in text:
        return f"a traceback: {text[-300:]!r}"
    if code == 130 and len(said) != 1:
        return f"{len(said)} lines: {text[-300:]!r}"
    return ""


def _twice(tries: Tries, name: str, moment: float) -> str:
    """Gives a command again while it runs; the first must end well, the second well or in a line.

    Either may be the one that is refused, where the second was faster.
    """
    directory, logs = tries.fresh(name), tries.fresh("logs")
    arguments, second = tries.victims[name].arguments, []
    begin = at(
        moment,
        lambda process: second.append(forks.start(arguments, directory, logs / "second.txt")),
    )
    first = forks.run(arguments, directory, when=begin, log=logs / "first.txt")
    codes = [first.code]
    if second:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(second[0], 0)[1]))
    texts = [first.text, (logs / "second.txt").read_text() if second else ""]
    refused = [text for code, text in zip(codes, texts) if code == 1]
    if 0 not in codes or not {*codes} <= {0, 1}:
        return f"status {codes}: {[text[-200:] for text in texts]!r}"
    if any("Traceback" in text or text.count("error: ") != 1 for text in refused):
        return f"no line: {refused[0][-300:]!r}"
    return tries.again(name, directory)
