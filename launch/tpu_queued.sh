#!/usr/bin/env bash
# Trains on a Cloud TPU slice made with queued resources.
#
#   export PROJECT=... ZONE=us-west4-a NAME=p2r-4b BUCKET=gs://my-bucket SERVICE_ACCOUNT=p2r@...
#   launch/tpu_queued.sh create                     # wait until the slice is there
#   launch/tpu_queued.sh setup                      # this checkout and its packages, on all workers
#   launch/tpu_queued.sh run --config configs/p2r_4b.yaml --data.train gs://... # detached
#   launch/tpu_queued.sh watch --config ... # or: all three, again after every preemption
#   launch/tpu_queued.sh status | logs [WORKER] | ssh [WORKER] | stop | delete
#
# What ends by itself: the request, if it gets no slice within WAIT_HOURS; the slice, when training
# has ended (AFTER=delete) and in any case MAX_HOURS after the first `create`: every worker starts a
# timer for that when it boots, so it holds if this machine is off. `delete` touches nothing but the
# queued resource NAME, and only if this script made it (label p2r_delete_at).
#
# Needs bash 4 and GNU date, as on Linux or in Cloud Shell. Settings, all from the environment:
#   PROJECT, ZONE, NAME   required. NAME is the queued resource and its node.
#   BUCKET          gs://..., required by setup, run, watch: code, run folder, logs.
#   ACCELERATOR     default v5litepod-16; v5p-8 (cores: 4 chips), v6e-16, ...
#   RUNTIME         default: the image that suits ACCELERATOR.
#   SPOT            1 (default) = preemptible, cheaper; 0 = on demand.
#   SERVICE_ACCOUNT of the workers: needs roles/tpu.admin, to delete the slice, and
#                   roles/storage.objectUser on the bucket. Default: Compute Engine's own.
#   NETWORK, SUBNETWORK   default: the default network.
#   MAX_HOURS       default 24. WAIT_HOURS: default 12.
#   PRICE           dollars per chip and hour (cloud.google.com/tpu/pricing), to print what
#                   forgetting costs.
#   AFTER           delete (default) or keep: the slice, once training has ended, well or not.
#   RUN             run folder; default BUCKET/runs/NAME.
#   EXPORT, DATA_FROM, DATA_TO, MAX_RESTARTS   as in entry.sh, on the workers.
#   POLL            seconds between two looks; default 60.
#   SSH_FLAGS       more flags for `gcloud ... ssh`, such as --internal-ip.
set -euo pipefail

die() {
  echo "tpu_queued.sh: $*" >&2
  exit 2
}

: "${PROJECT:?set PROJECT}" "${ZONE:?set ZONE}" "${NAME:?set NAME}"
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die "NAME must be like p2r-4b, is '$NAME'"
accelerator=${ACCELERATOR:-v5litepod-16}
case $accelerator in
  v5litepod-*) image=v2-alpha-tpuv5-lite chips=${accelerator#*-} ;;
  v5p-*) image=v2-alpha-tpuv5 chips=$((${accelerator#*-} / 2)) ;;
  v6e-*) image=v2-alpha-tpuv6e chips=${accelerator#*-} ;;
  *) image="" chips="" ;;
esac
runtime=${RUNTIME:-$image}
spot=${SPOT:-1}
max_hours=${MAX_HOURS:-24}
wait_hours=${WAIT_HOURS:-12}
after=${AFTER:-delete}
poll=${POLL:-60}
run_folder=${RUN:-${BUCKET:-}/runs/$NAME}
here=(--project="$PROJECT" --zone="$ZONE")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

queued() { gcloud compute tpus queued-resources "$@"; }

need_bucket() { [[ ${BUCKET:-} == gs://* ]] || die "set BUCKET to gs://..."; }

state() { # such as ACTIVE; empty if there is no such resource, UNKNOWN if nobody can tell
  local said errors
  errors=$(mktemp)
  said=$(queued describe "$NAME" "${here[@]}" --format='value(state.state)' 2>"$errors") ||
    if grep -qi 'not.found' "$errors"; then said=""; else said=UNKNOWN; fi
  rm -f "$errors"
  echo "$said"
}

delete_at() { # seconds since 1970; empty if there is no such resource, or others made it
  queued describe "$NAME" "${here[@]}" \
    --format='value(tpu.nodeSpec[0].node.labels.p2r_delete_at)' 2>/dev/null || true
}

on_workers() { # WORKERS COMMAND
  local flags=()
  read -ra flags <<<"${SSH_FLAGS:-}"
  gcloud compute tpus tpu-vm ssh "$NAME" "${here[@]}" "${flags[@]}" --worker="$1" --command="$2"
}

end_command() { # what a worker runs to end its own slice
  # shellcheck disable=SC2016  # the worker expands it
  printf 'PATH=$PATH:/snap/bin gcloud compute tpus queued-resources delete %q %q %q %s' \
    "$NAME" "${here[@]}" '--force --quiet --async'
}

create() { # DEADLINE in seconds since 1970
  local deadline=$1 flags=() boot
  [[ -n $runtime ]] || die "set RUNTIME: no image is known for ACCELERATOR=$accelerator"
  [[ -z $(state) ]] || die "$NAME is there already: status, or delete"
  echo "creating queued resource $NAME in $PROJECT, $ZONE: $accelerator, image $runtime," \
    "$( ((spot)) && echo spot || echo 'on demand')"
  echo "it deletes itself on $(date -u -d "@$deadline" '+%F %H:%M') UTC, if it was not before:" \
    "launch/tpu_queued.sh delete"
  if [[ -n $chips ]]; then
    local hours=$(((deadline - $(date +%s) + 3599) / 3600))
    echo "forgotten until then it costs $((chips * hours)) chip hours$([[ -z ${PRICE:-} ]] ||
      awk "BEGIN { printf \" = \$%.0f\", $chips * $hours * $PRICE }")"
  fi
  ((!spot)) || flags+=(--spot)
  [[ -z ${SERVICE_ACCOUNT:-} ]] || flags+=(--service-account="$SERVICE_ACCOUNT")
  [[ -z ${NETWORK:-} ]] || flags+=(--network="$NETWORK")
  [[ -z ${SUBNETWORK:-} ]] || flags+=(--subnetwork="$SUBNETWORK")
  boot=$(mktemp)
  cat >"$boot" <<EOF
#!/bin/bash
left=\$(($deadline - \$(date +%s)))
systemd-run --unit=p2r-deadline --on-active="\$((left > 60 ? left : 60))" \\
  bash -c $(printf %q "$(end_command)")
EOF
  queued create "$NAME" "${here[@]}" --node-id="$NAME" --accelerator-type="$accelerator" \
    --runtime-version="$runtime" --valid-until-duration="${wait_hours}h" \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --labels="p2r_delete_at=$deadline" --metadata-from-file="startup-script=$boot" \
    --async "${flags[@]}" || {
    rm -f "$boot"
    return 1
  }
  rm -f "$boot"
}

wait_active() {
  local now="" before=""
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$(date -u +%T) $NAME: ${now:-gone}"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      "" | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep "$poll"
  done
}

commit() { git -C "$root" rev-parse --short=12 HEAD; } # which the workers are to run

setup() {
  need_bucket
  local code archive
  git -C "$root" diff --quiet HEAD || echo "note: what is not committed stays here"
  code=$BUCKET/code/p2r-$(commit).tar.gz
  archive=$(mktemp --suffix=.tar.gz)
  # Step by step by hand: bash forgets `set -e` in a function whose failure the caller handles.
  if ! git -C "$root" archive --format=tar.gz --output="$archive" HEAD ||
    ! gcloud storage cp --quiet "$archive" "$code" ||
    ! on_workers all "set -eo pipefail; mkdir -p ~/p2r
      PATH=\$PATH:/snap/bin gcloud storage cat $(printf %q "$code") | tar -xz -C ~/p2r
      ~/p2r/launch/install.sh tpu; echo $(commit) >~/p2r/.ready"; then
    rm -f "$archive"
    echo "setup failed" >&2
    return 1
  fi
  rm -f "$archive"
}

start() { # AGAIN and the arguments of `p2r train`. Leaves workers alone that train; those that
  # have ended, too, unless AGAIN is 1.
  local again=$1 settings=(RUN="$run_folder" DISTRIBUTED=on) name
  shift
  for name in EXPORT DATA_FROM DATA_TO MAX_RESTARTS; do
    [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
  done
  # Half a minute for the others to copy their logs.
  [[ $after != delete ]] || settings+=("ON_FINISH=sleep 30; $(end_command)")
  on_workers all "set -e; cd ~/p2r
    if [ -e entry.pid ] && kill -0 \"\$(cat entry.pid)\" 2>/dev/null; then exit 0; fi
    if [ $again = 0 ] && grep -qsx '[0-9][0-9]*' logs/*.exit; then exit 0; fi
    number=\$(curl -sf -H 'Metadata-Flavor: Google' \
http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
    PATH=\$PATH:/snap/bin gcloud storage rm --quiet $(
    printf %q "$run_folder"
  )/logs/worker-\$number.exit 2>/dev/null || true
    PATH=\$PWD/.venv/bin:\$PATH nohup setsid env WORKER=\"\$number\" LOG_DIR=\"\$PWD/logs\" $(
    printf '%q ' "${settings[@]}"
  )launch/entry.sh $(printf '%q ' "$@")>/dev/null 2>&1 </dev/null &
    echo \$! >entry.pid"
}

exit_state() { # of worker 0: running, stopped, an exit code, or empty
  gcloud storage cat "$run_folder/logs/worker-0.exit" 2>/dev/null || true
}

remove() {
  local at
  [[ -n $(state) ]] || {
    echo "there is no queued resource $NAME in $PROJECT, $ZONE"
    return 0
  }
  at=$(delete_at)
  [[ -n $at ]] || die "not deleted: $NAME was not made by this script (no label p2r_delete_at), or" \
    "its labels cannot be read"
  if queued delete "$NAME" "${here[@]}" --force --quiet; then
    echo "deleted $NAME"
  else # a worker may have been faster
    [[ $(state) =~ ^(|DELETING)$ ]] || die "$NAME is still there: $(state)"
  fi
}

watch() { # create, setup and run, again after every preemption, until training has ended
  need_bucket
  local deadline now ended again=1
  deadline=$(delete_at)
  : "${deadline:=$(($(date +%s) + max_hours * 3600))}"
  trap 'echo; echo "no longer watching; $NAME goes on until its time is up, or: delete"; exit 130' INT
  while (($(date +%s) < deadline)); do
    now=$(state)
    case $now in
      ACTIVE) ;;
      "" | FAILED | SUSPENDED)
        [[ -z $now ]] || remove
        create "$deadline"
        ;;&
      *)
        wait_active || sleep "$poll"
        continue
        ;;
    esac
    # All of it does nothing where it was done. A slice that was just lost cannot be reached: the
    # next look finds that out. Workers that rebooted start again.
    if on_workers all "grep -qx $(commit) ~/p2r/.ready" || setup; then
      if start "$again" "$@"; then again=0; fi
    fi
    sleep "$poll"
    ended=""
    ((again)) || ended=$(exit_state) # else it may be that of an earlier run
    if [[ $ended =~ ^[0-9]+$ ]]; then
      echo "training ended with exit code $ended; logs: $run_folder/logs"
      [[ $after != delete ]] || remove
      return "$ended"
    fi
  done
  echo "MAX_HOURS are over"
  remove
  return 75
}

action=${1:-}
(($# == 0)) || shift
case $action in
  create)
    create "$(($(date +%s) + max_hours * 3600))"
    wait_active || die "no slice: $(state)"
    ;;
  setup) setup ;;
  run)
    need_bucket
    start 1 "$@"
    echo "started; launch/tpu_queued.sh logs | status | watch ..."
    ;;
  watch) watch "$@" ;;
  status)
    echo "$NAME: $(state); worker 0: $(exit_state)"
    ;;
  logs) on_workers "${1:-0}" "tail -n 100 -F ~/p2r/logs/*.log" ;;
  ssh)
    gcloud compute tpus tpu-vm ssh "$NAME" "${here[@]}" --worker="${1:-0}"
    ;;
  stop) # the run saves itself; the slice stays
    on_workers all "cd ~/p2r && kill -TERM \"\$(cat entry.pid)\" &&
      while kill -0 \"\$(cat entry.pid)\" 2>/dev/null; do sleep 1; done; cat logs/*.exit"
    ;;
  delete) remove ;;
  *) die "say create, setup, run, watch, status, logs, ssh, stop or delete; see the top of the file" ;;
esac
