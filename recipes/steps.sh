# shellcheck shell=bash
# shellcheck disable=SC2034  # the recipes use what is set here
# What the recipes share: settings, and steps that are made once. Each recipe begins with it.
#
# A recipe is run as
#
#   POLICY=MODEL REWARD=MODEL PROMPTS=DATA HELD_OUT=DATA OUT=DIR recipes/NAME.sh
#
# Set      POLICY    the language model to begin with
#          REWARD    the reward model that teaches
#          PROMPTS   prompts to learn from: any source of data, also SOURCE:SPLIT
#          HELD_OUT  prompts that show what was learned; others than PROMPTS
#          OUT       a directory
# May set  JUDGE     a reward model that did not teach, to see what was hacked
#          CONFIG    of the training
#          TRAIN     more of its options, such as "--config.optimizer.learning_rate=1e-6"
#          SAMPLE    options of rmjax.sample
#          N         samples of a prompt
#          ROUNDS    how many
# Resumes  by the same command: what is done is passed over, and what was killed goes on.
# Shows    OUT/report/report.html

set -euo pipefail

: "${POLICY:?a language model}" "${OUT:?a directory}"
: "${HELD_OUT:?prompts to judge by, not those to learn from}"
CONFIGS=$(dirname "$0")/../configs
REWARD=${REWARD:-} JUDGE=${JUDGE:-}
# Several lines, too: `read` ends with an error at the end of its input, which is what is wanted.
read -rd '' -a SAMPLE <<< "${SAMPLE:---temperature=0.7 --top-p=0.9 --max-tokens=512}" || true
read -rd '' -a TRAIN <<< "${TRAIN:-}" || true

# made FILE COMMAND ...: runs one of rmjax's commands, which writes FILE, unless it is there.
made() {
  local file=$1
  shift
  if [[ -e $file ]]; then
    echo "there already: $file"
  else
    echo "\$ python -m $*"
    python -m "$@"
  fi
}

# trained CONFIG DIR MODEL DATA: a run that begins with MODEL and learns from DATA.
trained() {
  echo "\$ python -m rmjax.train --config=$1 --config.workdir=$2 ..."
  python -m rmjax.train --config="$1" --config.workdir="$2" --config.init="$3" \
    --config.data.train="$4" ${TRAIN[@]+"${TRAIN[@]}"}
}

# answered DIR MODEL [OPTIONS]: the answers to the prompts that are held out, with scores.
answered() {
  local dir=$1 model=$2
  shift 2
  made "$dir/answers.jsonl" rmjax.sample "$model" "$HELD_OUT" "$dir/answers.jsonl" \
    "${SAMPLE[@]}" --distinct --seed=1000 --log-probabilities "$@"
  made "$dir/scores-start.jsonl" rmjax.score "$POLICY" "$dir/answers.jsonl" \
    "$dir/scores-start.jsonl" --value=log_probability
  judged "$dir"
}

# judged DIR: scores of DIR/answers.jsonl by the model that teaches and by the one that does not.
judged() {
  if [[ $REWARD ]]; then
    made "$1/scores-reward.jsonl" rmjax.score "$REWARD" "$1/answers.jsonl" "$1/scores-reward.jsonl"
  fi
  if [[ $JUDGE ]]; then
    made "$1/scores-judge.jsonl" rmjax.score "$JUDGE" "$1/answers.jsonl" "$1/scores-judge.jsonl"
  fi
}

# shown DIR ...: the page that compares them with the first.
shown() {
  python -m rmjax.report --rounds "$@" --out="$OUT/report"
}
