#!/usr/bin/env bash
# Rejection sampling (Llama 2, arXiv 2307.09288, 3.2.3): sample, score, imitate the best of each
# prompt; round by round. recipes/steps.sh says what to set. N is 8, ROUNDS is 1.

# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"
: "${REWARD:?a reward model}" "${PROMPTS:?prompts to learn from}"

policy=$POLICY shown=("$OUT/start")
answered "$OUT/start" "$policy"
for round in $(seq "${ROUNDS:-1}"); do
  now=$OUT/round-$round
  made "$now/samples.jsonl" rmjax.sample "$policy" "$PROMPTS" "$now/samples.jsonl" \
    "${SAMPLE[@]}" --distinct --n="${N:-8}" --seed="$round"
  made "$now/scored.jsonl" rmjax.score "$REWARD" "$now/samples.jsonl" "$now/scored.jsonl"
  made "$now/best.jsonl" rmjax.choose "$now/scored.jsonl" "$now/best.jsonl" --way=best-of
  trained "${CONFIG:-$CONFIGS/smollm2_135m_sft.py}" "$now/policy" "$policy" "$now/best.jsonl"
  policy=$now/policy shown+=("$now")
  answered "$now" "$policy"
done
shown "${shown[@]}"
