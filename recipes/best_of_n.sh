#!/usr/bin/env bash
# Best of n, without any training: what the reward model's choice among more samples is worth, and
# when it begins to be hacked. recipes/steps.sh says what to set; N is the largest n, 16.

# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"
: "${REWARD:?a reward model}"

made "$OUT/samples.jsonl" rmjax.sample "$POLICY" "$HELD_OUT" "$OUT/samples.jsonl" \
  "${SAMPLE[@]}" --distinct --n="${N:-16}"
made "$OUT/scored.jsonl" rmjax.score "$REWARD" "$OUT/samples.jsonl" "$OUT/scored.jsonl"
shown=()
for ((n = 1; n <= ${N:-16}; n *= 2)); do
  made "$OUT/best-of-$n/answers.jsonl" rmjax.choose "$OUT/scored.jsonl" \
    "$OUT/best-of-$n/answers.jsonl" --way=best-of --first="$n" --unended
  judged "$OUT/best-of-$n"
  shown+=("$OUT/best-of-$n")
done
shown "${shown[@]}"
