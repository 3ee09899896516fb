"""JSON over HTTP to one server: tries again what may pass, and says in words what does not."""

import json
import re
from typing import Any

import urllib3
from urllib3.exceptions import (
    HTTPError,
    InvalidHeader,
    LocationParseError,
    MaxRetryError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
    TimeoutError,
)
from urllib3.util import Retry, Timeout, parse_url

from rmjax.errors import UserError, shortened
from rmjax.generation.http_deadline import POOLS

_BUSY = (408, 429, 500, 502, 503, 504)  # a server says so that may answer later
_PAUSE = 1.0  # seconds; doubled with each try
_LONGEST_PAUSE = 60.0
_CONNECTING = 10.0  # seconds
_MOST_SAID = 300  # of a server's own words


class BadReply(UserError):
    """A reply that is not what was asked for; the server may answer better when asked again."""


class _Patience(Retry):
    """Waits as long as a server asks for (`Retry-After`), but no longer than between other tries.

    What it asks for in no known form is as if it had asked for nothing.
    """

    def parse_retry_after(self, retry_after: str) -> float:
        """Seconds."""
        try:
            return min(super().parse_retry_after(retry_after), _LONGEST_PAUSE)
        except (InvalidHeader, ValueError, OverflowError):
            return 0.0


class JsonServer:
    """A server that answers JSON; threads may share one.

    The key goes into a header of each request and nowhere else: what a server says is shown without
    it, and no redirection is followed, which could take it to another server.

    Attributes:
      url: of the server, without a path's last slash and without `/v1`.
    """

    def __init__(self, url: str, key: str, timeout: float, retries: int, connections: int):
        """Nothing is asked yet.

        Args:
          url: where it listens, such as `http://localhost:8000`.
          key: sent as a bearer token; empty for none.
          timeout: seconds in which one try must be answered.
          retries: how often a request is tried again.
          connections: that are kept open.

        Raises:
          UserError: the URL is none, or it has a password in it.
        """
        try:
            parsed = parse_url(url)
        except LocationParseError:
            parsed = None
        if not parsed or parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"{url!r}: expected the URL of a server, such as http://localhost:8000")
        if parsed.auth or parsed.query or parsed.fragment:
            raise UserError(
                f"the URL of {parsed.host} has more in it than a server and a path; a key belongs "
                "in the environment variable OPENAI_API_KEY, where nothing shows or stores it"
            )
        self.url = re.sub(r"(/v1)?/*$", "", url.rstrip("/"))
        self._key, self._timeout, self._tries = key, timeout, retries + 1
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._retry = _Patience(
            retries,
            redirect=False,
            allowed_methods=None,  # a sample may be asked for twice
            status_forcelist=_BUSY,
            backoff_factor=_PAUSE,
            backoff_max=_LONGEST_PAUSE,
            backoff_jitter=_PAUSE,
            raise_on_status=False,
        )
        self._pool = urllib3.PoolManager(
            maxsize=connections, timeout=Timeout(connect=min(_CONNECTING, timeout), read=timeout)
        )
        self._pool.pool_classes_by_scheme = POOLS

    def get(self, path: str, what: str) -> dict[str, Any]:
        """What the server answers, tried once; see `post`."""
        return self._ask("GET", path, None, what, self._retry.new(total=0))

    def post(self, path: str, body: dict[str, Any], what: str) -> dict[str, Any]:
        """What the server answers.

        A server that is busy or does not answer is asked again, after pauses that grow, or that the
        server names (`Retry-After`), of a minute at most.

        Args:
          path: such as `/v1/completions`.
          body: what is sent.
          what: is asked, for messages.

        Raises:
          UserError: it does not answer or refuses.
          BadReply: it answers something that is no JSON object.
        """
        return self._ask("POST", path, json.dumps(body).encode(), what, self._retry)

    def _ask(
        self, method: str, path: str, body: bytes | None, what: str, retry: Retry
    ) -> dict[str, Any]:
        where = self.url + path
        try:
            reply = self._pool.request(
                method, where, body=body, headers=self._headers, retries=retry, redirect=False
            )
        except HTTPError as error:
            raise UserError(f"{what}: {where} {self._failure(error)}") from error
        if reply.status != 200:
            raise UserError(f"{what}: {where} {self._refusal(reply)}")
        found = _parsed(reply.data)
        if not isinstance(found, dict):
            raise BadReply(
                f"{what}: {where} answers what is no JSON object: {self._said(reply.data)}"
            )
        return found

    def _failure(self, error: HTTPError) -> str:
        """Why there is no answer at all."""
        reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        if isinstance(reason, ReadTimeoutError):
            return f"does not answer within {self._timeout:g} s, however often it is asked"
        if isinstance(reason, SSLError):
            return f"has no connection that is safe ({reason})"
        if isinstance(reason, NewConnectionError | TimeoutError):
            return (
                "cannot be reached: nobody listens there, or not yet. Start the server, or name "
                f"another host and port ({reason})"
            )
        return f"breaks the connection off, however often it is asked ({reason})"

    def _refusal(self, reply: urllib3.BaseHTTPResponse) -> str:
        """What a status other than 200 means."""
        status, said = reply.status, self._said(reply.data)
        if status in (401, 403):
            # The server's own words may have part of the key in them.
            done = "refuses the key in" if self._key else "wants a key: give it in"
            return f"{done} the environment variable OPENAI_API_KEY (status {status})"
        if 300 <= status < 400:
            return f"sends elsewhere (status {status}): name the URL that it sends to"
        if status == 404:
            return f"answers that there is no such thing (status 404): {said}"
        if status in _BUSY:
            return f"answers status {status} after {self._tries} tries: {said}"
        return f"refuses (status {status}): {said}"

    def _said(self, data: bytes) -> str:
        """A server's own words, as far as they fit in a message."""
        found = _parsed(data)
        for field in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(field):
                found = found[field]
        text = found if isinstance(found, str) else data.decode(errors="replace")
        if self._key:
            text = text.replace(self._key, "***")
        return shortened(text, _MOST_SAID) or "nothing"


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
