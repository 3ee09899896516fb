"""The table of endpoints; another form of request is another entry."""

from rmjax.serving.nim import CHAT
from rmjax.serving.openrlhf import GET_REWARD
from rmjax.serving.questions import Endpoint
from rmjax.serving.rewards import REWARDS
from rmjax.serving.vllm import CLASSIFY, POOLING, RERANK, SCORE

ENDPOINTS: tuple[Endpoint, ...] = (REWARDS, GET_REWARD, CLASSIFY, POOLING, SCORE, RERANK, CHAT)
