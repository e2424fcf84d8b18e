#!/usr/bin/env bash
# MTLM1 in three phases, on 14B tokens of FineWeb-Edu: mtlm1-88m (113,068,800 parameters) for half of them, grown by
# stacking its 12 layers, mtlm1-200m (201,560,832 parameters) for the other half; 69 tokens per parameter.
#
#     bash mtlm1.sh                                        # on a TPU v5e-8
#     BATCH=128 bash mtlm1.sh --grad-accum-steps 4               # on one GPU
#     TOKENS=140000000 DATA='text/*.jsonl.xz' EVAL_DATA=DIR BATCH=128 bash mtlm1.sh --grad-accum-steps 4
#                                                          # a hundredth, of files, without a network
#
# Stopped or interrupted, the same command resumes; finished, it trains nothing. Arguments go to train_tpu.run.
# Before: pip install -c constraints.txt -e '.[tpu,torch,eval]' (cuda instead of tpu on a GPU), and activate that
# environment. MTLM2's data serves: DATA=runs/mtlm2/data.
#
# What to expect. Nobody has run this in full. On a TPU it has not been run at all, so its time and cost there are not
# known; the memory is what the TPU's compiler asks for (docs/RESULTS.md). The GPU's times are 7B tokens at the rates
# measured over 65M each (docs/RESULTS.md, batch 128). At a hundredth this script took 8 minutes on H100s (same page).
#
#                      TPU v5e-8                                                    one H100
#   88M, 7B tokens     not measured                                                 4.0 h (490k tokens/s)
#   200M, 7B tokens    not measured                                                 7.2 h (271k tokens/s)
#   memory             7.0, then 10.9 of 15.75 GiB per chip                         23.3 GiB for the 200M, 32 at a time
#   cost               USD 9.60 per hour, at USD 1.20 per chip-hour on demand       yours
#                      (2026-11; check https://cloud.google.com/tpu/pricing)
#   growing            18 to 36 s, 2.8 GiB of the host's memory (docs/STACKING.md)
#   preparing, once    2.8 core-hours at 1.4M tokens/s per core (docs/RESULTS.md), and the download. It needs no
#                      accelerator: where these hours cost, prepare on another machine and give the folder as DATA.
#   disk               25 GB prepared (1.76 bytes per token, measured on 9.8M tokens of Wikipedia); about 36 GB of
#                      downloads in Hugging Face's cache (an estimate: 18 files of 2 GB; a file is fetched when
#                      reading comes to it), which may go once the data is prepared; 6 GB for the runs and exports
#
# The learning rate is the 88M's, 1.7e-3 on 130.5M tokens at batch 64, moved by a rule that was measured up to 261M
# tokens and batch 128 (docs/RESULTS.md): here 1.76e-3. It was not tuned for these, nor for what the model grows into.
# Whether growing pays is in docs/STACKING.md: at equal FLOPs it is better than the 200M from scratch, and at 0.65 tokens per
# parameter worse than the 88M for longer. At the 69 of this script nobody has compared them.
set -euo pipefail

TOKENS=${TOKENS:-14000000000}                           # to train on
DATA=${DATA:-hf:HuggingFaceFW/fineweb-edu:sample-100BT} # text for train_tpu.prepare, or a folder
                                                        # that it made; several sources: A;B
HELDOUT=${HELDOUT:-}                                    # held-out sets, NAME=PATH;NAME=PATH
VALID_FRACTION=${VALID_FRACTION:-0.001}                 # without them: the part of DATA that is held out
RUN_DIR=${RUN_DIR:-runs/mtlm1}                          # everything goes into this folder
BATCH=${BATCH:-256}                                     # sequences per step, over all chips
BASE=${BASE:-mtlm1-88m}                                 # the preset that is grown to twice its layers
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
((steps >= 2)) || fail "TOKENS is $TOKENS, fewer than two steps of $BATCH x $CONTEXT: give more, or a smaller BATCH"
needed="train_tpu stacking torch transformers${TASKS:+ lm_eval}"
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

# 2. The shallow model, for half of the steps; its schedule is that of all of them and does not decay yet.
if [[ ! -d $RUN_DIR/grown ]]; then
    python -m train_tpu.run --preset "$BASE" --context "$CONTEXT" --data "$data" --batch "$BATCH" --steps "$steps" \
        --stop-at $((steps / 2)) --out "$RUN_DIR/base" "$@"

    # 3. Every layer twice: 12 become 24, the optimizer's state with them.
    python -m stacking.grow "$RUN_DIR/base" --out "$RUN_DIR/grown"
fi

# 4. The deep model, for the other half: settings, schedule and the place in the data are in its folder, and the run
# refuses others.
python -m train_tpu.run --out "$RUN_DIR/grown" --batch "$BATCH" --steps "$steps" "$@"

# 5. Evaluation, a folder for transformers, and what the model writes.
if [[ -n $TASKS ]]; then
    python -m eval.run "$RUN_DIR/grown" --tasks "$TASKS" ${EVAL_DATA:+--data-dir "$EVAL_DATA"}
fi
[[ -d $RUN_DIR/exported ]] || python -m port_torch.convert "$RUN_DIR/grown" "$RUN_DIR/exported"
python -m port_torch.generate "$RUN_DIR/exported" --prompt "In the early years of"
exit
}
