#!/usr/bin/env bash
# SPIN (arXiv 2401.01335): DPO that prefers the given response of PROMPTS to the policy's own; no
# reward model is needed. The reference is refreshed each round. recipes/steps.sh says what to set;
# REWARD and JUDGE only look on. ROUNDS is 3.

# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"
: "${PROMPTS:?conversations with responses to learn from}"

policy=$POLICY shown=("$OUT/start")
answered "$OUT/start" "$policy"
for round in $(seq "${ROUNDS:-3}"); do
  now=$OUT/round-$round
  made "$now/samples.jsonl" rmjax.sample "$policy" "$PROMPTS" "$now/samples.jsonl" \
    "${SAMPLE[@]}" --seed="$round"
  made "$now/pairs.jsonl" rmjax.choose "$now/samples.jsonl" "$now/pairs.jsonl" --way=spin \
    --given="$PROMPTS"
  trained "${CONFIG:-$CONFIGS/smollm2_135m_dpo.py}" "$now/policy" "$policy" "$now/pairs.jsonl"
  policy=$now/policy shown+=("$now")
  answered "$now" "$policy"
done
shown "${shown[@]}"
