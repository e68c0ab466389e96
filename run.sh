#!/usr/bin/env bash
# The one door: sets up .venv, finds or builds data, trains and scores, tests.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TXT'
./run.sh [RECIPE]       train and score with recipes/RECIPE.env; default: record with CUDA, demo without
./run.sh test [ARGS]    run the tests (ARGS go to pytest)
./run.sh setup          only make .venv and install
./run.sh help           this text; all settings: python train_gpt.py --help

Settings are environment variables and win over the recipe: SEED=42 ./run.sh, NPROC_PER_NODE=4 ./run.sh,
DATA_PATH=/my/shards ./run.sh pr2135. Without a data set the demo's is built from Python's own library.
TXT
}

fail() { echo "run.sh: $*" >&2; exit 2; }

setup() {
  local base=${PYTHON:-python3} stamp
  stamp=$(cat requirements.txt run.sh | cksum)
  PY=.venv/bin/python
  [[ -x $PY && $(cat .venv/installed 2>/dev/null) == "$stamp" ]] && return
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "needs Python 3.10 or newer; set PYTHON=/path/to/python3"
  echo "setting up .venv"
  # A torch that the machine brings along fits its driver: use it.
  local own=(); "$base" -c 'import torch' 2>/dev/null && own=(--system-site-packages)
  "$base" -m venv --clear "${own[@]}" .venv || fail "python -m venv failed; on Debian: apt-get install python3-venv"
  "$PY" -c 'import torch' 2>/dev/null || "$PY" -m pip install -q --disable-pip-version-check torch==2.13.0
  "$PY" -m pip install -q --disable-pip-version-check -r requirements.txt
  echo "$stamp" > .venv/installed
}

# Export what the recipe sets and the caller did not.
load_recipe() {
  local line
  while IFS= read -r line; do
    [[ $line == *=* && $line != \#* && ! -v ${line%%=*} ]] && export "${line?}"
  done < "recipes/$1.env"
  return 0
}

# DATA_PATH if it is set, else the published set if it has been downloaded, else the demo's.
find_data() {
  [[ -n ${DATA_PATH:-} ]] && return
  local folder
  for folder in "${DATA_DIR:-data}"/datasets/fineweb10B_sp8192_caseops/{datasets/,}datasets/fineweb10B_sp8192_*; do
    compgen -G "$folder/fineweb_train_*.bin" > /dev/null && { export DATA_PATH=$folder; return; }
  done
  echo "no data set found: using the demo's, made from Python's own library (README.md says how to get the real one)"
  [[ -f data/demo/manifest.json ]] || "$PY" prepare_caseops_data.py --demo --out data/demo --overwrite
  export DATA_PATH=data/demo VOCAB_SIZE=${VOCAB_SIZE:-1024}
}

recipe=${1:-}
case $recipe in
  help|-h|--help) usage; exit ;;
  setup) setup; exit ;;
  test) setup; shift; exec "$PY" -m pytest -q "$@" ;;
esac
(( $# <= 1 )) || fail "one recipe at a time; see ./run.sh help"
[[ -z $recipe || -f recipes/$recipe.env ]] ||
  fail "no recipe recipes/$recipe.env; there are: $(cd recipes && echo *.env | sed 's/\.env//g')"
setup
gpus=$("$PY" -c 'import torch; print(torch.cuda.device_count())')
find_data
load_recipe "${recipe:-$( ((gpus)) && echo record || echo demo)}"
"$PY" train_gpt.py --check
exec "$PY" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-$((gpus ? gpus : 1))}" train_gpt.py
