#!/usr/bin/env bash
# One worker of a training run: the program that every launcher here starts, once on each host.
#
#   RUN=gs://BUCKET/runs/NAME launch/entry.sh --config configs/p2r_4b.yaml --data.train ...
#
# The arguments go to `p2r train`. A run that ends with a code of RESTART_ON is started again and
# goes on from its last checkpoint; all workers do the same, and wait for each other when they
# start. SIGTERM, SIGINT and SIGUSR1 are passed on: the run saves itself, and this script ends with
# 75 for whoever starts it again elsewhere. Any other exit code is final and kept.
#
# Settings, all from the environment:
#   RUN             run folder, seen by all workers: gs://... or a shared disk. Required.
#   COORDINATOR     HOST:PORT of worker 0, where nothing tells the workers of each other; needs
#                   PROCESSES and WORKER. Cloud TPU pods, GKE TPU slices and Slurm need none.
#   PROCESSES       number of workers, with COORDINATOR.
#   WORKER          number of this worker, from 0; default: what the launcher's environment says.
#   DISTRIBUTED     on = join the other workers although the environment names none (TPU VMs, whose
#                   metadata server does); default: let p2r decide.
#   MAX_RESTARTS    how often to start again here; default 20.
#   RESTART_ON      exit codes that start again; default "75 134 137 143": asked to or another
#                   worker was lost, lost in silence (abort), killed, terminated while starting.
#   BACKOFF         seconds before the first restart, doubled up to 60; default 5. (Below the 300
#                   that a starting worker waits for the others.)
#   DATA_FROM, DATA_TO   folder to copy before the start, e.g. prepared data onto a fast local disk.
#   EXPORT          folder to write Hugging Face weights to after success; worker 0 does it.
#   LOG_DIR         local folder of worker-N.log and worker-N.exit (running, stopped, or the exit
#                   code); default: logs of RUN, or of /tmp/p2r for a run in a bucket.
#   LOG_URL         where they are copied every LOG_SECONDS (default 60); default: RUN/logs in a
#                   bucket, else nowhere.
#   ON_FINISH       command for worker 0 once the exit code is final, such as one that deletes the
#                   machines; not run when stopped by a signal.
set -euo pipefail

: "${RUN:?set RUN to the run folder, gs://BUCKET/runs/NAME or a disk that all workers see}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
worker=${WORKER:-${TPU_WORKER_ID:-${JOB_COMPLETION_INDEX:-${SLURM_PROCID:-${SKYPILOT_NODE_RANK:-0}}}}}
max_restarts=${MAX_RESTARTS:-20}
restart_on=" ${RESTART_ON:-75 134 137 143} "
backoff=${BACKOFF:-5}

if [[ $RUN == gs://* ]]; then
  log_dir=${LOG_DIR:-/tmp/p2r/${RUN##*/}/logs}
  log_url=${LOG_URL-$RUN/logs}
  # Restarted workers, and slices made anew, find what was compiled before.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$RUN/compiled}
else
  log_dir=${LOG_DIR:-$RUN/logs}
  log_url=${LOG_URL-}
fi
# Huge pages for the host's large arrays; the Makefile tells what they are worth. glibc only.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export PYTHONUNBUFFERED=1

where=()
if [[ -n ${COORDINATOR:-} ]]; then
  : "${PROCESSES:?COORDINATOR needs PROCESSES, the number of workers}"
  where=(--distributed.coordinator "$COORDINATOR" --distributed.processes "$PROCESSES"
    --distributed.process "$worker")
elif [[ -n ${DISTRIBUTED:-} ]]; then
  where=(--distributed.enabled "$DISTRIBUTED")
fi

mkdir -p "$log_dir"
log=$log_dir/worker-$worker.log
state=$log_dir/worker-$worker.exit

say() { printf '%s worker %s: %s\n' "$(date -u +%FT%TZ)" "$worker" "$*" | tee -a "$log"; }

upload() { # FILES: copies those whose names start so; a bucket out of reach must not end a run
  [[ -z $log_url ]] || python "$here/copy_files.py" "$log_dir" "$log_url" \
    --only "$1" >/dev/null 2>&1 || true
}

child="" uploader="" stop=0 interrupted=0
# shellcheck disable=SC2329  # a trap calls it
on_signal() {
  stop=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap on_signal TERM INT USR1
trap '[[ -z $uploader ]] || kill "$uploader" 2>/dev/null || true' EXIT

wait_for() { # exit code of a child, however often a signal interrupts the waiting
  code=0
  while :; do
    interrupted=0
    code=0
    wait "$1" || code=$?
    ((interrupted)) || break
  done
}

run() { # a program whose output goes to the log, and from there to our own output
  local printed printer
  printed=$(stat -c %s "$log")
  "$@" >>"$log" 2>&1 &
  child=$!
  ((!stop)) || kill -TERM "$child" 2>/dev/null || true
  tail -c "+$((printed + 1))" -f -s 0.2 --pid="$child" "$log" &
  printer=$!
  wait_for "$child"
  child=""
  # Not `wait`: its code is of no interest, and a signal must not end it early.
  while kill -0 "$printer" 2>/dev/null; do sleep 0.1; done
}

exported() { # whether EXPORT is whole: its config.json is written last
  python -c 'import sys
from p2r_jax.paths import as_path
sys.exit(not (as_path(sys.argv[1]) / "config.json").is_file())' "$EXPORT" 2>/dev/null
}

pause() { # sleep that a signal ends
  local code # what wait_for sets is not the run's
  sleep "$1" &
  child=$!
  ((!stop)) || kill "$child" 2>/dev/null || true # it may have come just before
  wait_for "$child"
  child=""
}

touch "$log"
echo running >"$state"
if [[ -n $log_url ]]; then
  upload "worker-$worker."
  (
    trap - EXIT
    # Not the state: an upload that is under way must not overwrite the last one.
    while sleep "${LOG_SECONDS:-60}"; do upload "worker-$worker.log"; done
  ) >/dev/null 2>&1 &
  uploader=$!
fi

code=0
if [[ -n ${DATA_FROM:-} ]]; then
  say "copying $DATA_FROM to ${DATA_TO:?DATA_FROM needs DATA_TO, a local folder}"
  run python "$here/copy_files.py" "$DATA_FROM" "$DATA_TO"
fi

delay=$backoff
for ((restarts = 0; code == 0; restarts++)); do
  ((!stop)) || {
    code=75
    break
  }
  begin=$SECONDS
  # After the arguments: a config among them may name a run folder, too.
  arguments=("$@" --run "$RUN" "${where[@]}")
  say "p2r train ${arguments[*]}"
  run p2r train "${arguments[@]}"
  say "p2r train ended with exit code $code"
  ((code != 0 && !stop)) || break
  [[ $restart_on == *" $code "* ]] || break
  if ((restarts >= max_restarts)); then
    say "no restart: there were $restarts already"
    # Whoever starts all workers again must first see the one whose exit code forbids it.
    ((stop)) || pause "$delay"
    break
  fi
  ((SECONDS - begin < 600)) || delay=$backoff # it had been going well
  say "starting again in $delay s"
  pause "$delay"
  ((!stop)) || break
  delay=$((delay * 2 < 60 ? delay * 2 : 60))
  code=0
done

if ((stop && code != 0)); then
  # 143: the signal came before p2r could handle it.
  [[ $restart_on != *" $code "* ]] || code=75
  echo stopped >"$state"
else
  if ((code == 0 && worker == 0)) && [[ -n ${EXPORT:-} ]]; then
    if exported; then
      say "$EXPORT is there already"
    else
      run p2r convert to-hf "$RUN" "$EXPORT"
      say "export to $EXPORT ended with exit code $code"
    fi
  fi
  echo "$code" >"$state"
fi
upload "worker-$worker."
if ((worker == 0)) && [[ -n ${ON_FINISH:-} && $(<"$state") != stopped ]]; then
  say "running ON_FINISH"
  bash -c "$ON_FINISH" >>"$log" 2>&1 || say "ON_FINISH failed: see the log"
fi
exit "$code"
