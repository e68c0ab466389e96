#!/usr/bin/env bash
# The one door: sets up .venv, finds or builds data, trains and scores, tests.
set -euo pipefail
for name in DATA_PATH DATA_DIR ARTIFACT_DIR; do  # relative to where the caller stands
  if [[ -n ${!name:-} && ${!name} != /* ]]; then export "$name=$PWD/${!name}"; fi
done
caller=$PWD
CDPATH='' cd -- "$(dirname -- "$0")"

from_caller() { if [[ $1 == /* ]]; then echo "$1"; else echo "$caller/$1"; fi; }

usage() {
  cat <<'TXT'
./run.sh [RECIPE]       train and score with recipes/RECIPE.env; default: record with CUDA, demo without
./run.sh RECIPE SEED... [--against FILE] [--publish]
                        these seeds one after another into runs/RECIPE, a finished one not again; then the results, compared
                        with FILE's, the submission folder, its audit and the report. Of recipe record a record's results go
                        into README.md and submission.json, with --publish those of any recipe and machine
./run.sh retest [RECIPE]            score the artifacts of these seeds again
./run.sh decode [RECIPE] [ARGS]     code documents with the artifact of a run and read them back (tools/decode.py --help)
./run.sh submission DIR [RECIPE]    write the folder that can be copied as a record
./run.sh diff A B       what two recipes set differently: names, or files like recipes/*.env
./run.sh report [RUN...]            an HTML page of run records: files, or folders that hold them
./run.sh test [ARGS]    run the tests (ARGS go to pytest)
./run.sh setup          only make .venv and install
./run.sh pack-code [F]  write the single self-extracting train_gpt.py that a submission ships (default packed/train_gpt.py)
./run.sh help           this text; all settings: python train_gpt.py --help

Settings are environment variables and win over the recipe: SEED=42 ./run.sh, NPROC_PER_NODE=4 ./run.sh,
DATA_PATH=/my/shards ./run.sh pr2135; ARTIFACT_DIR replaces runs/RECIPE. Without a data set the demo's is built from Python's own library.
TXT
}

fail() { echo "run.sh: $*" >&2; exit 2; }

setup() {
  local base=${PYTHON:-python3} stamp own=() index=()
  stamp="$base $(cat requirements*.txt | cksum)"
  PY=.venv/bin/python
  if [[ -x $PY && $(cat .venv/installed 2>/dev/null) == "$stamp" ]]; then
    if [[ -f .venv/without_cuda ]]; then cat .venv/without_cuda >&2; fi
    return
  fi
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "needs Python 3.10 or newer; set PYTHON=/path/to/python3"
  echo "setting up .venv"
  # A torch that the machine brings along fits its driver: build on it if it is one of ours.
  if "$base" -c 'import torch; v = torch.__version__.split("."); assert (2, 11) <= (int(v[0]), int(v[1])) < (2, 14)' \
    2>/dev/null; then own=(--system-site-packages); fi
  "$base" -m venv --clear ${own[@]+"${own[@]}"} .venv ||
    fail "python -m venv failed: is this folder writable, and python3-venv installed?"
  if ! "$PY" -c 'import torch' 2>/dev/null; then
    # Without an NVIDIA driver the CPU build will do; PyPI's own brings gigabytes of CUDA along.
    command -v nvidia-smi > /dev/null || index=(--retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu)
    "$PY" -m pip install -q --disable-pip-version-check ${index[@]+"${index[@]}"} torch==2.13.0 2>/dev/null ||
      "$PY" -m pip install -q --disable-pip-version-check torch==2.13.0
  fi
  "$PY" -m pip install -q --disable-pip-version-check -r requirements.txt
  if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.' &&
    ! "$PY" -m pip install -q --disable-pip-version-check -r requirements-cuda.txt; then
    echo "run.sh: requirements-cuda.txt could not be installed; attention uses PyTorch's own kernel (rm -r .venv to try again)" |
      tee .venv/without_cuda >&2
  fi
  echo "$stamp" > .venv/installed
}

# Export what the recipe sets and the caller did not.
load_recipe() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    if [[ $line == *=* && $line != \#* && ! -v ${line%%=*} ]]; then export "${line?}"; fi
  done < "recipes/$1.env"
}

# DATA_PATH if it is set, else the published set if it has been downloaded, else the demo's.
find_data() {  # --own: no demo instead
  local folder
  if [[ -n ${DATA_PATH:-} ]]; then return; fi
  for folder in "${DATA_DIR:-data}"/datasets/fineweb10B_sp8192_caseops/{datasets/,}datasets/fineweb10B_sp8192_*; do
    if compgen -G "$folder/fineweb_train_*.bin" > /dev/null; then export DATA_PATH=$folder; return; fi
  done
  [[ ${1:-} != --own ]] ||
    fail "no data set found; get it with python prepare_caseops_data.py --download, or set DATA_PATH"
  echo "no data set found: using the demo's, made from Python's own library (README.md says how to get the real one)"
  if [[ ! -f data/demo/manifest.json ]]; then "$PY" tools/demo_corpus.py --out data/demo --keep; fi
  export DATA_PATH=data/demo
}

# The program under its launcher, in `launch`, with data and recipe in the environment; checks both first. --own as above.
prepare() {
  local gpus ranks
  gpus=$("$PY" -c 'import torch; print(torch.cuda.device_count())')
  ranks=${NPROC_PER_NODE:-$((gpus ? gpus : 1))}
  find_data ${2:+"$2"}
  if [[ -z ${VOCAB_SIZE:-} && -f $DATA_PATH/manifest.json ]]; then  # the vocabulary is the data's, not the recipe's
    VOCAB_SIZE=$("$PY" -c 'import json, sys; print(json.load(open(sys.argv[1]))["tokenizer"]["vocab_size"])' "$DATA_PATH/manifest.json")
    export VOCAB_SIZE
  fi
  recipe=${1:-$( ((gpus)) && echo record || echo demo)}
  load_recipe "$recipe"
  export RECIPE=$recipe
  RANK=0 WORLD_SIZE=$ranks "$PY" train_gpt.py --check
  launch=("$PY" train_gpt.py)
  if ((ranks > 1)); then launch=("$PY" -m torch.distributed.run --standalone --nproc_per_node="$ranks" train_gpt.py); fi
}

known() {
  [[ -f recipes/$1.env ]] || fail "no recipe recipes/$1.env; there are: $(cd recipes && echo *.env | sed 's/\.env//g')"
}

# The folder of a recipe's seeds; the variable that chose it must not reach the runs.
runs_of() {
  base=${ARTIFACT_DIR:-runs/$1}
  unset ARTIFACT_DIR
}

case ${1:-} in
  help|-h|--help) usage; exit ;;
  setup) setup; exit ;;
  test)
    setup; shift
    OMP_NUM_THREADS=1 exec "$PY" -m pytest -q -n "$(($(nproc) < 4 ? $(nproc) : 4))" --dist loadfile --no-loadscope-reorder "$@" ;;
  pack-code)
    setup
    target=$(from_caller "${2:-packed/train_gpt.py}")
    mkdir -p "$(dirname "$target")"
    exec "$PY" tools/pack_submission.py "$target" ;;
  diff)
    setup; shift
    exec "$PY" tools/diff_recipes.py "$@" ;;
  report)
    setup; shift
    runs=()
    for run in "$@"; do runs+=("$(from_caller "$run")"); done
    if (($# == 0)); then
      for run in logs runs/*; do if [[ -d $run ]]; then runs+=("$run"); fi; done
      ((${#runs[@]})) || fail "no logs/ and no runs/ yet; name run records or their folders"
    fi
    exec "$PY" tools/report.py "${runs[@]}" ;;
  submission)
    [[ -n ${2:-} ]] || fail "name the folder to write; see ./run.sh help"
    known "${3:-record}"; setup; runs_of "${3:-record}"
    exec "$PY" tools/submission.py folder "$base" "$(from_caller "$2")" ;;
  decode)
    recipe=demo
    if [[ ${2:-} != "" && ${2:-} != --* ]]; then recipe=$2; shift; fi
    shift; known "$recipe"; setup; prepare "$recipe"
    exec "$PY" tools/decode.py "$@" ;;
  retest)
    known "${2:-record}"; setup; runs_of "${2:-record}"; prepare "${2:-record}"
    exec "$PY" tools/submission.py retest "$base" -- "${launch[@]}" ;;
esac
[[ -z ${1:-} ]] || known "$1"
recipe=${1:-}
shift $(($# > 0))
seeds=() against=()
publish=$([[ $recipe != record ]] || echo record)
while (($#)); do
  case $1 in
    --against)
      against=(--against "$(from_caller "${2:-}")")
      [[ -f ${against[1]} ]] || fail "--against: no file ${2:-}"
      shift ;;
    --publish) publish=any ;;
    *) [[ $1 =~ ^[0-9]+$ ]] || fail "$1 is no seed; see ./run.sh help"; seeds+=("$1") ;;
  esac
  shift
done
setup
if ((${#seeds[@]} == 0)); then
  ((${#against[@]} == 0)) || fail "--against: name the seeds too"
  prepare "$recipe"
  exec "${launch[@]}"
fi
runs_of "$recipe"
options=(${against[@]+"${against[@]}"})
if [[ -n $publish ]]; then options+=(--publish "$publish"); fi
if [[ $recipe == demo ]]; then prepare demo; else prepare "$recipe" --own; fi
exec "$PY" tools/submission.py seeds "$base" "${seeds[@]}" ${options[@]+"${options[@]}"} -- "${launch[@]}"
