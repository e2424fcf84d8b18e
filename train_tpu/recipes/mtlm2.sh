#!/usr/bin/env bash
# MTLM2: mtlm2-40m (40,149,248 parameters) on 14B tokens of FineWeb-Edu, 349 tokens per parameter.
#
#     bash mtlm2.sh                                        # on a TPU v5e-8
#     BATCH=128 bash mtlm2.sh                              # on one GPU
#     TOKENS=140000000 DATA='text/*.jsonl.xz' EVAL_DATA=DIR BATCH=128 bash mtlm2.sh
#                                                          # a hundredth, of files, without a network
#
# Stopped or interrupted, the same command resumes; finished, it trains nothing. Arguments go to train_tpu.run:
# `bash mtlm2.sh --grad-accum-steps 2`. Before: pip install -c constraints.txt -e '.[tpu,torch,eval]' (cuda instead of tpu
# on a GPU), and activate that environment.
#
# What to expect. Nobody has run this in full. On a TPU it has not been run at all, so its speed there is not known:
# the time given is that of MTLM2's original script, at the 0.55M to 0.6M tokens/s that its README reports; the memory
# is what the TPU's compiler asks for (docs/RESULTS.md). The GPU's time is 14B tokens at the rate measured over 261M
# (docs/RESULTS.md, batch 128). At a hundredth this script took 4 minutes on an H100 (same page).
#
#                      TPU v5e-8                                                    one H200
#   training           not measured; 6.5 to 7.1 h at the original's speed           2.6 h (1.47M tokens/s)
#   memory             1.7 of 15.75 GiB per chip                                    18.9 GiB
#   cost of that time  USD 62 to 68 at the original's speed, at USD 1.20 per        yours
#                      chip-hour on demand (2026-11; check
#                      https://cloud.google.com/tpu/pricing)
#   preparing, once    2.8 core-hours at 1.4M tokens/s per core (docs/RESULTS.md), and the download. It needs no
#                      accelerator: where these hours cost, prepare on another machine and give the folder as DATA.
#   disk               25 GB prepared (1.76 bytes per token, measured on 9.8M tokens of Wikipedia); about 36 GB of
#                      downloads in Hugging Face's cache (an estimate: 18 files of 2 GB; a file is fetched when
#                      reading comes to it), which may go once the data is prepared; 1 GB for the run
#
# The learning rate is the preset's, 5.6e-3, measured on 261M tokens at batch 128 (docs/RESULTS.md) and not tuned for
# these; fewer tokens or smaller batches move it by a rule.
set -euo pipefail

TOKENS=${TOKENS:-14000000000}                           # to train on
DATA=${DATA:-hf:HuggingFaceFW/fineweb-edu:sample-100BT} # text for train_tpu.prepare, or a folder
                                                        # that it made; several sources: A;B
HELDOUT=${HELDOUT:-}                                    # held-out sets, NAME=PATH;NAME=PATH
VALID_FRACTION=${VALID_FRACTION:-0.001}                 # without them: the part of DATA that is held out
RUN_DIR=${RUN_DIR:-runs/mtlm2}                          # everything goes into this folder
BATCH=${BATCH:-256}                                     # sequences per step, over all chips
MODEL=${MODEL:-mtlm2-40m}                               # a preset
CONTEXT=${CONTEXT:-1024}                                # its tokens a sequence
TASKS=${TASKS-wikitext,arc_easy,arc_challenge,openbookqa,truthfulqa_mc2} # to evaluate; empty: none
EVAL_DATA=${EVAL_DATA:-}                                # folder with their data; default: from the Hugging Face hub

fail() {
    echo "error: $1" >&2
    exit 2
}
for name in TOKENS BATCH CONTEXT; do
    [[ ${!name} =~ ^[1-9][0-9]{0,17}$ ]] || fail "$name is '${!name}': give a whole number, such as 140000000"
done
steps=$((TOKENS / (BATCH * CONTEXT)))
((steps >= 1)) || fail "TOKENS is $TOKENS, fewer than one step of $BATCH x $CONTEXT: give more, or a smaller BATCH"
needed="train_tpu torch transformers${TASKS:+ lm_eval}"
# shellcheck disable=SC2086  # words
python -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, sys.argv[1:])))' $needed ||
    fail "packages are missing, of $needed: pip install -c constraints.txt -e '.[torch,eval]' in an active environment"
echo "$TOKENS tokens of $DATA, $steps steps of $BATCH x $CONTEXT, into $RUN_DIR"

{ # read to its end before it runs, so that this file may change meanwhile

# 1. Text to windows of tokens, as many as are trained on.
data=$RUN_DIR/data
if [[ -f $DATA/dataset.json ]]; then
    data=$DATA
elif [[ ! -d $data ]]; then
    mapfile -td ';' sources < <(printf %s "$DATA")
    mapfile -td ';' sets < <(printf %s "$HELDOUT")
    held=(--valid-fraction "$VALID_FRACTION")
    ((${#sets[@]} == 0)) || held=("${sets[@]/#/--valid=}")
    python -m train_tpu.prepare "${sources[@]}" --out "$data" --context "$CONTEXT" --train-tokens "$TOKENS" "${held[@]}"
elif ! grep -q "\"train_tokens\": $TOKENS," "$data/dataset.json"; then
    fail "$data was not prepared for $TOKENS tokens: remove it, or choose another RUN_DIR"
fi

# 2. Training.
python -m train_tpu.run --preset "$MODEL" --context "$CONTEXT" --data "$data" --batch "$BATCH" --steps "$steps" \
    --out "$RUN_DIR/run" "$@"

# 3. Evaluation, a folder for transformers, and what the model writes.
if [[ -n $TASKS ]]; then
    python -m eval.run "$RUN_DIR/run" --tasks "$TASKS" ${EVAL_DATA:+--data-dir "$EVAL_DATA"}
fi
[[ -d $RUN_DIR/exported ]] || python -m port_torch.convert "$RUN_DIR/run" "$RUN_DIR/exported"
python -m port_torch.generate "$RUN_DIR/exported" --prompt "In the early years of"
exit
}
