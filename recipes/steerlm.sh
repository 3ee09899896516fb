#!/usr/bin/env bash
# SteerLM (arXiv 2310.05344): the reward model's ratings of the responses in PROMPTS are written
# into their prompts, the policy learns from that, and is then asked for the ratings one wishes.
# recipes/steps.sh says what to set. WISHES are several sets of ratings, each an option --ratings
# of rmjax.sample; RATINGS, 0,4, is the range.

# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"
: "${REWARD:?a reward model of several attributes}" "${PROMPTS:?conversations with responses}"
: "${WISHES:?such as helpfulness:4,verbosity:0 helpfulness:4,verbosity:4}"

answered "$OUT/start" "$POLICY"
made "$OUT/scored.jsonl" rmjax.score "$REWARD" "$PROMPTS" "$OUT/scored.jsonl"
made "$OUT/steered.jsonl" rmjax.choose "$OUT/scored.jsonl" "$OUT/steered.jsonl" --way=steerlm \
  --ratings="${RATINGS:-0,4}"
trained "${CONFIG:-$CONFIGS/smollm2_135m_sft.py}" "$OUT/policy" "$POLICY" "$OUT/steered.jsonl"
shown=("$OUT/start")
for wish in $WISHES; do
  now=$OUT/${wish//[:,]/-}
  answered "$now" "$OUT/policy" --ratings="$wish"
  shown+=("$now")
done
shown "${shown[@]}"
