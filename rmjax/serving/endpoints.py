"""The table of endpoints; another form of request is another entry."""

from rmjax.serving.classify import CLASSIFY, POOLING
from rmjax.serving.nim import CHAT
from rmjax.serving.openrlhf import GET_REWARD
from rmjax.serving.questions import Endpoint
from rmjax.serving.rerank import RERANK, SCORE
from rmjax.serving.rewards import REWARDS

ENDPOINTS: tuple[Endpoint, ...] = (REWARDS, GET_REWARD, CLASSIFY, POOLING, SCORE, RERANK, CHAT)
