#!/usr/bin/env bash
# The one door: sets up .venv; tools/ do the rest.
set -euo pipefail
for name in DATA_PATH DATA_DIR ARTIFACT_DIR; do  # relative to where the caller stands
  if [[ -n ${!name:-} && ${!name} != /* ]]; then export "$name=$PWD/${!name}"; fi
done
caller=$PWD
script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do  # it may be called through links
  target=$(readlink -- "$script")
  if [[ $target == /* ]]; then script=$target; else script=$(dirname -- "$script")/$target; fi
done
CDPATH='' cd -- "$(dirname -- "$script")"

from_caller() { if [[ $1 == /* ]]; then echo "$1"; else echo "$caller/$1"; fi; }

usage() {
  cat <<'TXT'
./run.sh [RECIPE]       train and score with recipes/RECIPE.env; default: record with CUDA and a data set, else demo
./run.sh RECIPE SEED... [--against FILE] [--publish]
                        these seeds one after another into runs/RECIPE, a finished one not again; then the results, compared
                        with FILE's, the submission folder, its audit and the report. Of recipe record a record's results go
                        into README.md and submission.json, with --publish those of any recipe and machine
./run.sh check [RECIPE]             all that would stop or slow a run on this machine, in under a minute
./run.sh retest [RECIPE]            score the artifacts of these seeds again
./run.sh decode [RECIPE] [ARGS]     code documents with the artifact of a run and read them back (tools/decode.py --help)
./run.sh submission DIR [RECIPE]    write the folder that can be copied as a record
./run.sh diff A B       what two recipes set differently: names, or files like recipes/*.env
./run.sh report [RUN...] [--out DIR]
                        an HTML page of run records: files, or folders that hold them; default: logs/ and runs/ into report/
./run.sh test [ARGS]    run the tests (ARGS go to pytest)
./run.sh setup          only make .venv and install
./run.sh pack-code [F]  write the single self-extracting train_gpt.py that a submission ships (default packed/train_gpt.py)
./run.sh help           this text; all settings: python train_gpt.py --help

Settings are environment variables and win over the recipe: SEED=42 ./run.sh, NPROC_PER_NODE=4 ./run.sh,
DATA_PATH=/my/shards ./run.sh pr2135; ARTIFACT_DIR replaces runs/RECIPE. Without a data set the demo's is built from Python's own library.
Names given on the line are relative to where you stand; what has a default lies beside run.sh.
TXT
}

# What the text says of one command.
help_of() {
  local line found=
  while IFS= read -r line; do
    if [[ $line != ' '* ]]; then found=; fi
    if [[ $line == "./run.sh $1"* ]]; then found=1; fi
    if [[ -n $found ]]; then echo "$line"; fi
  done < <(usage)
}

fail() { echo "run.sh: $*" >&2; exit 2; }

# Anything that is stamped .venv/installed: the Python it was made with, and the requirements.
setup() {
  local base sum stamp=
  base=${PYTHON:-python3}
  sum=$(cat requirements*.txt | cksum)
  PY=.venv/bin/python
  if [[ -x $PY && -f .venv/installed ]]; then
    stamp=$(< .venv/installed)
    # Without PYTHON any Python will do that it was made with.
    if [[ $stamp == *" $sum" && ( -z ${PYTHON:-} || $stamp == "$base $sum" ) ]]; then
      if [[ -f .venv/without_cuda ]]; then cat .venv/without_cuda >&2; fi
      return
    fi
  fi
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "needs Python 3.10 or newer; set PYTHON=/path/to/python3"
  install_into_venv "$base" "$sum"
}

install_into_venv() {
  local base=$1 own=() index=()
  # What a link leads to may be another checkout's, which --clear would empty.
  [[ ! -L .venv ]] || fail ".venv is a link to $(readlink .venv), which was not made for these requirements; remove the link"
  { exec 9<> .venv.lock; } 2>/dev/null || fail ".venv.lock: this folder is not writable; copy it to one that is"
  # The lock belongs to this shell's open file: it lasts until the shell ends, however that happens.
  "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    fail "$(cat .venv.lock) is setting up .venv; wait for its end, then start again"
  echo "process $$ on $(uname -n)" > .venv.lock
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
  echo "$base $2" > .venv/installed
  exec 9>&-
}

known() {
  [[ -f recipes/$1.env ]] || fail "no recipe recipes/$1.env; there are: $(cd recipes && echo *.env | sed 's/\.env//g')"
}

# Seeds of a recipe must be there before anything is installed for them.
has_seeds() {
  known "$1"
  base=${ARTIFACT_DIR:-runs/$1}
  compgen -G "$base/seed*" > /dev/null || fail "$base: no folders seed<N> in it; run ./run.sh $1 SEED... first"
}

for word in "$@"; do
  if [[ $word == --help || $word == -h ]]; then
    text=$(help_of "$1")
    if [[ -n $text ]]; then echo "$text"; else usage; fi
    exit
  fi
done
case ${1:-} in
  help) usage; exit ;;
  setup) setup; exit ;;
  test)
    setup; shift
    OMP_NUM_THREADS=1 exec "$PY" -m pytest -q -n "$(($(nproc) < 4 ? $(nproc) : 4))" --dist loadfile --no-loadscope-reorder "$@" ;;
  pack-code)
    target=packed/train_gpt.py
    if [[ -n ${2:-} ]]; then target=$(from_caller "$2"); fi
    setup
    mkdir -p "$(dirname "$target")"
    exec "$PY" tools/pack_submission.py "$target" ;;
  diff)
    (($# == 3)) || fail "diff: name two recipes"
    files=()
    for file in "$2" "$3"; do
      if [[ ! -f recipes/$file.env ]]; then file=$(from_caller "$file"); fi
      files+=("$file")
    done
    setup
    exec "$PY" tools/diff_recipes.py "${files[@]}" ;;
  report)
    shift
    runs=() out=()
    while (($#)); do
      if [[ $1 == --out ]]; then
        [[ -n ${2:-} ]] || fail "--out: name the folder to write"
        out=(--out "$(from_caller "$2")")
        shift
      else
        run=$(from_caller "$1")
        [[ -e $run ]] || fail "report: no file or folder $1"
        runs+=("$run")
      fi
      shift
    done
    if ((${#runs[@]} == 0)); then
      for run in logs runs/*; do if [[ -d $run ]]; then runs+=("$run"); fi; done
      ((${#runs[@]})) || fail "no logs/ and no runs/ yet; name run records or their folders"
    fi
    setup
    exec "$PY" tools/report.py "${runs[@]}" ${out[@]+"${out[@]}"} ;;
  submission)
    [[ -n ${2:-} ]] || fail "name the folder to write; see ./run.sh help"
    has_seeds "${3:-record}"; setup
    exec "$PY" tools/submission.py folder "$base" "$(from_caller "$2")" ;;
  decode)
    recipe=demo
    if [[ ${2:-} != "" && ${2:-} != --* ]]; then recipe=$2; shift; fi
    shift; known "$recipe"; setup
    exec "$PY" tools/launch.py decode "$recipe" "$@" ;;
  retest)
    has_seeds "${2:-record}"; setup
    exec "$PY" tools/launch.py retest "${2:-record}" ;;
  check)
    if [[ -n ${2:-} ]]; then known "$2"; fi
    setup
    exec "$PY" tools/check_machine.py ${2:+"$2"} ;;
esac
if [[ -n ${1:-} ]]; then known "$1"; fi
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
((${#seeds[@]} || ${#against[@]} == 0)) || fail "--against: name the seeds too"
setup
if ((${#seeds[@]} == 0)); then exec "$PY" tools/launch.py run ${recipe:+"$recipe"}; fi
if [[ -n $publish ]]; then against+=(--publish "$publish"); fi
exec "$PY" tools/launch.py seeds "$recipe" "${seeds[@]}" ${against[@]+"${against[@]}"}
