#!/usr/bin/env bash
# Iterative DPO (HelpSteer2, arXiv 2406.08673, 4.3): sample, score, take the best and the worst of
# each prompt, train; round by round. A round's reference is the policy that it begins with.
# recipes/steps.sh says what to set. N is 10, ROUNDS is 3.

# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"
: "${REWARD:?a reward model}" "${PROMPTS:?prompts to learn from}"

policy=$POLICY shown=("$OUT/start")
answered "$OUT/start" "$policy"
for round in $(seq "${ROUNDS:-3}"); do
  now=$OUT/round-$round
  made "$now/samples.jsonl" rmjax.sample "$policy" "$PROMPTS" "$now/samples.jsonl" \
    "${SAMPLE[@]}" --distinct --n="${N:-10}" --seed="$round"
  made "$now/scored.jsonl" rmjax.score "$REWARD" "$now/samples.jsonl" "$now/scored.jsonl"
  made "$now/pairs.jsonl" rmjax.choose "$now/scored.jsonl" "$now/pairs.jsonl" --way=pairs
  trained "${CONFIG:-$CONFIGS/smollm2_135m_dpo.py}" "$now/policy" "$policy" "$now/pairs.jsonl"
  policy=$now/policy shown+=("$now")
  answered "$now" "$policy"
done
shown "${shown[@]}"
